"""The dense twin: the network at the end of the last dense phase."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acdc.layers import unwrapped


@dataclass(frozen=True)
class DenseTwin:
    """The network at the end of the last dense phase, with what is needed to train it further.

    Args:
        step: Executed steps at its end.
        model: Its state dict on the CPU, running statistics included.
        optimizer: The optimizer's state dict at the same moment, on the CPU.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]

    @classmethod
    def capture(cls, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> DenseTwin:
        """Copy a model and its optimizer as they are after ``step`` executed steps."""
        return cls(step, on_cpu(model.state_dict()), on_cpu(optimizer.state_dict()))

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Load the twin into ``model`` and ``optimizer``, to fine-tune it on the rest of the run.

        Remove the sparsifier first, and set the learning-rate scheduler to ``step``.
        """
        unwrapped(model).load_state_dict(self.model)
        if optimizer is not None:
            optimizer.load_state_dict(deepcopy(self.optimizer))


def on_cpu(value: Any) -> Any:
    """Return a deep copy of a nested state with every tensor copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_cpu(item) for item in value)
    return deepcopy(value)
