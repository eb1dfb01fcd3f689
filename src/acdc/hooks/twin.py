"""The dense twin: the network at the end of the last dense phase."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from acdc.errors import InputError
from acdc.hooks.optimizers import OneOrSeveral, Optimizers
from acdc.layers import unwrapped
from acdc.shards import mesh_of


@dataclass(frozen=True)
class DenseTwin:
    """The network at the end of the last dense phase, with what is needed to train it further.

    Args:
        step: Executed steps at its end.
        model: Its state dict on the CPU, running statistics included.
        optimizer: The optimizer's state dict at the same moment, on the CPU; a list of several.
        average: State dict of the registered average of the weights, if there is one.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: Any
    average: dict[str, Tensor] | None = None

    @classmethod
    def capture(
        cls,
        step: int,
        model: nn.Module,
        optimizers: Optimizers,
        average: nn.Module | None = None,
    ) -> DenseTwin:
        """Copy a model and its optimizers as they are after ``step`` executed steps."""
        averages = None if average is None else on_cpu(averaged(average).state_dict())
        return cls(step, on_cpu(model.state_dict()), on_cpu(optimizers.state_dict()), averages)

    def restore(self, model: nn.Module, optimizer: OneOrSeveral | None = None) -> None:
        """Load the twin into ``model`` and ``optimizer``, to fine-tune it on the rest of the run.

        Give as many optimizers as the sparsifier had, in the same order. Remove the sparsifier
        first, and set the learning-rate scheduler to ``step``.

        Raises:
            InputError: The twin is of sharded weights and those of the model are whole, or the
                other way round. Nothing is loaded then.
        """
        inner = unwrapped(model)
        sharded = mesh_of(self.model.values()) is not None
        if sharded != (mesh_of(inner.state_dict().values()) is not None):
            held, others = ("sharded", "whole") if sharded else ("whole", "sharded")
            raise InputError(
                f"The weights of the dense twin are {held}, and those of the model are {others}. "
                f"Restore it into the model that was trained. The pair of "
                f"acdc.distributed.pair(sparsifier) loads into a model with whole weights: "
                f"pair.dense_model(model)."
            )
        inner.load_state_dict(self.model)
        if optimizer is not None:
            Optimizers(optimizer).load_state_dict(deepcopy(self.optimizer))


def averaged(average: nn.Module) -> nn.Module:
    """Return the copy of the model that an average of its weights holds.

    ``torch.optim.swa_utils.AveragedModel`` and the averages of timm call it ``module``.
    """
    inner = getattr(average, "module", None)
    return unwrapped(inner if isinstance(inner, nn.Module) else average)


def on_cpu(value: Any) -> Any:
    """Return a deep copy of a nested state with every tensor copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_cpu(item) for item in value)
    return deepcopy(value)
