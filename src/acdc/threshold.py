"""Soft thresholds that are learned: a layer computes with ``sign(w) · max(|w| - σ(s), 0)``.

Every layer has one ``s``. Its state is a float tensor ``[s, momentum of s]``, and all here are pure
functions of it: the sparsifier holds the states and the dense weights ``w``.

>>> import torch
>>> rule = SoftThreshold()
>>> w = torch.tensor([1.0, -0.75, 0.5, -0.25])
>>> rule.shrink(w, torch.tensor([0.0, 0.0]))  # σ(0) = 1/2
tensor([ 0.5000, -0.2500,  0.0000,  0.0000])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from acdc.errors import InputError
from acdc.score import Scores

LOWEST = -60.0  # σ(-60) is 9e-27: it shrinks nothing
NEAR_ONE = 1 - 2**-20  # weights beyond have no logit, and no threshold reaches them


@final
@dataclass(frozen=True)
class SoftThreshold:
    """How the threshold of a layer is learned: SGD on ``s``.

    Args:
        rate: Learning rate, as a multiple of that of the layer's weights.
        momentum: Of the SGD.
        decay: Weight decay of ``s``, which draws it to 0.

    Source: Kusupati et al., ICML 2020, section 3; RAIVNLab/STR, ``utils/conv_type.py``.
    """

    rate: float = 1.0
    momentum: float = 0.9
    decay: float = 0.0

    def __post_init__(self) -> None:
        if not self.rate >= 0:
            raise InputError(f"rate is {self.rate!r}. Give a number from 0 up.")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum is {self.momentum!r}. Give a number from 0 up, below 1.")
        if not self.decay >= 0:
            raise InputError(f"decay is {self.decay!r}. Give a number from 0 up.")

    def start(self, weight: Tensor) -> Tensor:
        """Return the state of a layer that is not thresholded yet."""
        return torch.tensor([LOWEST, 0.0], device=weight.device)

    def shrink(self, weight: Tensor, state: Tensor) -> Tensor:
        """Return the weights that the layer computes with."""
        threshold = state[0].sigmoid().to(weight.dtype)
        # A NaN is not below it: what has diverged shall not look like a zero.
        return torch.where(weight.abs() <= threshold, 0.0, weight - weight.sign() * threshold)

    def learn(self, state: Tensor, shrunk: Tensor, gradient: Tensor, lr: float) -> Tensor:
        """Return the state after a step.

        Args:
            state: Before it.
            shrunk: The weights that the layer computed with.
            gradient: Of the loss by them. By ``s`` it is ``-σ'(s) · sum(gradient · sign(w))`` over
                those that are not zero.
            lr: The learning rate of the layer's weights.
        """
        s, momentum = state
        slope = s.sigmoid() * (-s).sigmoid()
        by_s = -slope * (gradient * shrunk.sign()).sum(dtype=torch.float32)
        momentum = self.momentum * momentum + by_s + self.decay * s
        return torch.stack([s - self.rate * lr * momentum, momentum])

    def rank(self, params: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> Scores:
        """Return by how much ``s`` of a layer could rise before each of its weights is zero.

        Args:
            params: The dense weights.
            states: Theirs. A layer without one is as at the start.
        """
        return Scores(
            {name: tuple(w.shape) for name, w in params.items()},
            lambda name: _logit(params[name]) - self._of(name, params, states)[0],
        )

    def settle(
        self,
        params: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
        support: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return the states shifted until they cut to ``support``, all ``s`` by the same amount.

        A layer whose number of kept weights was none of its threshold's doing (a floor, a count of
        its own) gets the threshold of its largest weight that is not kept.

        Args:
            params: The dense weights.
            states: As for :meth:`rank`.
            support: Chosen by :meth:`rank`.
        """
        old = {name: self._of(name, params, states) for name in params}
        ends = {name: _ends(_logit(params[name]), support[name]) for name in params}
        # Any shift between the two ends is right for a layer; the median of all ends is for most,
        # and where it is for all, this is the largest score that is not kept.
        shifts = [(end - old[name][0]).cpu() for name in ends for end in ends[name]]
        shift = torch.stack(shifts).median().item()
        new = {}
        for name, (low, high) in ends.items():
            s, momentum = old[name]
            fits = (s + shift >= low) & (s + shift < high)
            new[name] = torch.stack([torch.where(fits, s + shift, low), momentum])
        return new

    def _of(self, name: str, params: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> Tensor:
        return states[name] if name in states else self.start(params[name])


def _logit(weight: Tensor) -> Tensor:
    """Return the ``s`` at which a weight becomes zero; beyond 1 it goes on rising, in a line."""
    size = weight.abs().float()
    inside = size.clamp(torch.tensor(LOWEST).sigmoid().item(), NEAR_ONE)
    return inside.logit() + (size - inside).clamp(min=0.0)


def _ends(score: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest score that is not kept, and the smallest that is."""
    low = score.masked_fill(kept, LOWEST).max()
    high = score.masked_fill(~kept, float("inf")).min()
    return low, high
