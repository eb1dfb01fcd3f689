"""The mean of the whole network over some steps, which takes the network's place later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn

from acdc.errors import InputError
from acdc.methods.training import Mean, When
from acdc.shards import local, placed


class NetworkMean:
    """Takes the network into a mean at the steps that a method names. Without such steps it stays
    empty.

    Args:
        model: The network.
        mean: Which steps the mean is over, and when it takes the network's place; ``None``: never.

    Attributes:
        tensors: The mean of every parameter and buffer by name, each on the device of the network;
            of a buffer of integers, its last value.
    """

    def __init__(self, model: nn.Module, mean: Mean | None) -> None:
        self._model, self._mean = model, mean
        self.tensors: dict[str, Tensor] = {}
        self._noted = -1  # the last step that is in the mean

    def note(self, step: int) -> None:
        """Take the network as it is after ``step`` executed steps into the mean, where due.

        A step that has been taken is not taken again.
        """
        nth = 0 if self._mean is None else self._mean.nth(step)
        if not nth or step == self._noted:
            return
        self._noted = step
        if nth == 1:
            self.tensors = {}
        for name, value in self._network():
            mean = self.tensors.get(name)
            if mean is None:
                self.tensors[name] = value.detach().clone()
            elif mean.is_floating_point():
                local(mean).lerp_(local(value), 1 / nth)
            else:
                mean.copy_(value)

    def is_due(self, step: int, when: When) -> bool:
        """Return whether the mean takes the network's place after ``step`` executed steps."""
        return bool(self.tensors) and self._mean is not None and self._mean.use(step) == when

    def put_in(self) -> None:
        """Put the mean into the network."""
        for name, value in self._network():
            local(value).copy_(local(self.tensors[name]))

    def drop(self) -> None:
        """Forget the mean, which has been used for the last time."""
        self.tensors = {}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds: nothing, for a method that uses no mean."""
        if self._mean is None:
            return {}
        return {"mean": {"noted": self._noted, "network": dict(self.tensors)}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` returned, from the state of a sparsifier.

        Raises:
            InputError: It is the mean of another network.
        """
        if self._mean is None:
            return
        saved, own = state["mean"]["network"], dict(self._network())
        if saved and {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in own.items()}:
            raise InputError(
                "The state holds the mean of another network: its tensors have other names or "
                "shapes than those of this model. Resume with the model of the run."
            )
        self._noted = state["mean"]["noted"]
        self.tensors = {
            n: placed(v, own[n]).to(own[n].device, own[n].dtype, copy=True)
            for n, v in saved.items()
        }

    def _network(self) -> Iterator[tuple[str, Tensor]]:
        return chain(self._model.named_parameters(), self._model.named_buffers())
