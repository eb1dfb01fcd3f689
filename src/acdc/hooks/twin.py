"""The dense twin: the network at the end of the last dense phase."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from acdc.errors import InputError
from acdc.hooks.optimizers import Given, Optimizers
from acdc.layers import unwrapped
from acdc.methods.base import Method
from acdc.pair import Pair
from acdc.support import Support


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

    def restore(self, model: nn.Module, optimizer: Given | None = None) -> None:
        """Load the twin into ``model`` and ``optimizer``, to fine-tune it on the rest of the run.

        Give as many optimizers as the sparsifier had, in the same order. Remove the sparsifier
        first, and set the learning-rate scheduler to ``step``.
        """
        unwrapped(model).load_state_dict(self.model)
        if optimizer is not None:
            Optimizers(optimizer).load_state_dict(deepcopy(self.optimizer))


def averaged(average: nn.Module) -> nn.Module:
    """Return the copy of the model that an average of its weights holds.

    ``torch.optim.swa_utils.AveragedModel`` and the averages of timm call it ``module``.
    """
    inner = getattr(average, "module", None)
    return unwrapped(inner if isinstance(inner, nn.Module) else average)


def paired(
    method: Method[Any],
    step: int,
    support: Support,
    model: nn.Module,
    twin: DenseTwin | None,
    behind: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> Pair:
    """Return the pair of a network as it is now.

    Args:
        method: The method that trained it.
        step: Executed steps.
        support: The support now.
        model: The network.
        twin: The network at the end of the last dense phase, if that has passed.
        behind: The dense weights behind a sparse view, if there are some.
        facts: What is kept with the pair.

    Raises:
        InputError: The network is dense now, or there is no dense network.
    """
    schedule = method.resolved
    if schedule.phase_at(step).kind == "dense" or (twin is None and not behind):
        last = schedule.last("dense")
        raise InputError(
            f"There is no pair yet: after {step} of {schedule.total} steps the network is "
            f"{schedule.phase_at(step).kind}. The dense twin is the end of the last dense phase"
            + (f", at step {last.stop}" if last else ", and this schedule has none")
            + "; the sparse one is the end of the run. A sparse network alone is saved by "
            "acdc.SparseNetwork(model.state_dict(), sparsifier.support).save(folder)."
        )
    sparse = on_cpu(model.state_dict())
    if twin is None or (behind and method.training.is_network):
        dense, dense_step = sparse | dict(behind), step
    else:
        dense, dense_step = dict(twin.model), twin.step
    known = {"method": method.name, "step": step, "dense_step": dense_step}
    known["schedule"] = schedule.to_dict()
    return Pair(sparse, dense, support.to("cpu"), {**known, **facts})


def paired_averages(pair: Pair, average: nn.Module, twin: DenseTwin | None) -> Pair:
    """Return a pair of averages: that of the sparse network, and that of its dense twin.

    Args:
        pair: The pair of the weights themselves.
        average: The average of the weights, now.
        twin: The dense twin, with its average.

    Raises:
        InputError: The average of the dense twin was not captured, or is of another model.
    """
    if twin is None or twin.average is None:
        raise InputError(
            "The average of the dense twin was not captured. Call "
            "sparsifier.register_average(average) before the end of the last dense phase; a "
            "method without a dense phase has no such average."
        )
    sparse = on_cpu(averaged(average).state_dict())
    for name, mask in pair.support.items():
        if name not in sparse or sparse[name].shape != mask.shape:
            raise InputError(
                f"The average has no weight {name!r} of shape {tuple(mask.shape)}. Give an average "
                f"of the model that the sparsifier is bound to."
            )
        sparse[name].masked_fill_(~mask, 0.0)  # an average still holds weights of before the cut
    return Pair(sparse, twin.average, pair.support, {**pair.facts, "average": True})


def on_cpu(value: Any) -> Any:
    """Return a deep copy of a nested state with every tensor copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_cpu(item) for item in value)
    return deepcopy(value)
