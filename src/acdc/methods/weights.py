"""The prunable weights, as methods see them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from acdc import shards
from acdc.errors import InputError
from acdc.processes import ALONE, Peers
from acdc.shape import Shape, shapes_of


class Weights(Mapping[str, Tensor]):
    """The prunable weights by name, and what their optimizer knows about them.

    Args:
        params: The weights.
        state: Function from a weight to its optimizer state, if there is any. (Not the state
            itself: loading a checkpoint into an optimizer puts another mapping in its place.)
        rate: Function from a weight to its learning rate.
        scale: Function from a weight to the factor of its gradient, where a GradScaler leaves the
            unscaling to a fused optimizer; otherwise ``None``.
        peers: The processes that train the weights together.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        state: Callable[[Tensor], Mapping[str, Any] | None] = lambda weight: None,
        rate: Callable[[Tensor], float] = lambda weight: 1.0,
        scale: Callable[[Tensor], Tensor | None] = lambda weight: None,
        peers: Peers = ALONE,
    ) -> None:
        self.peers = peers
        self._params, self._state, self._rate, self._scale = params, state, rate, scale

    @classmethod
    def of(
        cls,
        params: Mapping[str, Tensor],
        optimizers: Iterable[torch.optim.Optimizer],
        peers: Peers = ALONE,
    ) -> Weights:
        """Return the weights as one or several optimizers train them."""
        # By the index of the group: loading a checkpoint puts other groups there.
        home = {
            id(p): (optimizer, i)
            for optimizer in optimizers
            for i, group in enumerate(optimizer.param_groups)
            for p in group["params"]
        }

        def rate(weight: Tensor) -> float:
            optimizer, i = home[id(weight)]
            return float(optimizer.param_groups[i].get("lr", 1.0))

        return cls(
            params,
            lambda weight: home[id(weight)][0].state.get(weight),
            rate,
            lambda weight: getattr(home[id(weight)][0], "grad_scale", None),
            peers,
        )

    def __getitem__(self, name: str) -> Tensor:
        return self._params[name]

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of the weights, with the axes along which they are multiplied."""
        return shapes_of(self._params)

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)

    def gradient(self, name: str) -> Tensor | None:
        """Return the gradient of a weight as the optimizer applies it, or ``None`` without one.

        The gradient is accumulated over batches, reduced over processes, unscaled and clipped.
        """
        grad, scale = self._params[name].grad, self._scale(self._params[name])
        if grad is None or scale is None:
            return grad
        return shards.like(grad, shards.local(grad) / scale)

    def rate(self, name: str) -> float:
        """Return the learning rate of a weight."""
        return self._rate(self._params[name])

    def momentum(self, name: str) -> Tensor:
        """Return where the optimizer would move a weight by itself: the momentum of SGD, the
        normalised first moment of Adam and its like, or the gradient where there is neither.

        Raises:
            InputError: There is neither momentum nor gradient.
        """
        param = self._params[name]
        state = self._state(param) or {}
        if "exp_avg" in state:
            first: Tensor = state["exp_avg"]
            second = state.get("exp_avg_sq")
            return first if second is None else first / (second.sqrt() + 1e-8)
        buffer: Tensor | None = state.get("momentum_buffer")
        if buffer is None:
            buffer = param.grad
        if buffer is None:
            raise InputError(
                f"The weight {name!r} has neither momentum nor gradient to rank by. Check that "
                f"the loss depends on it."
            )
        return buffer
