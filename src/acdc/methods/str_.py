"""STR: soft threshold weight reparameterization.

A layer computes with ``sign(w) · max(|w| - σ(s), 0)``. Every layer has one ``s``, whose state is a
float tensor ``[s, momentum of s]``. The method carries these tensors by the name of the weight.

>>> rule = SoftThreshold()
>>> w = torch.tensor([1.0, -0.75, 0.5, -0.25])
>>> rule.shrink(w, torch.tensor([0.0, 0.0]))  # σ(0) = 1/2
tensor([ 0.5000, -0.2500,  0.0000,  0.0000])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from acdc.errors import InputError
from acdc.layers import Layers
from acdc.methods.base import Reset
from acdc.methods.families import Ramped
from acdc.methods.training import Behind
from acdc.methods.weights import Weights
from acdc.pattern import Unstructured
from acdc.schedule import Phase, Plan, Schedule
from acdc.score import Scores
from acdc.shape import shapes_of
from acdc.support import Support

Thresholds = dict[str, Tensor]
"""State of the threshold of each layer by the name of its weight."""


@final
@dataclass(frozen=True)
class STR(Ramped[Thresholds]):
    """Compute with ``sign(w) · max(|w| - σ(s), 0)``, and learn ``s``, one for each layer, by its
    gradient: the network finds out by itself how sparse every layer shall be.

    Where we differ: the sparsity is asked for, as of all methods. In the paper it is an outcome. A
    weight decay raises all ``s`` alike, gradients part them, and one searches for the decay that
    ends near the sparsity wanted. Here a shift, the same for all layers, takes the part of that
    decay: with it the total rises on a cubic, exact at every choice of the support. Between two
    choices ``s`` learns on; a kept weight that its threshold overtakes is zero, and one that is not
    kept waits for the next choice.

    From the last choice on the support stays, and its count is exact; a kept weight below its
    threshold at the end is one zero more.

    Args:
        pattern: ``Unstructured(s)``, of global scope: any other leaves nothing to learn.
        schedule: Usually one sparse phase.
        first: Sparsity of the first choice.
        every: Time between choices of the support.
        length: Time from the first choice to the last.
        rate: Learning rate of the thresholds, as a multiple of that of the weights. They are
            trained by SGD, whatever trains the weights; with Adam and its small rates give more.
        momentum: Of that SGD.
        decay: Weight decay of ``s``. As all are shifted alike, it draws the layers together.
        reset: Optimizer state cleared when weights come back. They only decay meanwhile.
        layers: Which layers are pruned; ``None``: the pattern's default.

    Source: Kusupati et al., ICML 2020, sections 3 and 4; RAIVNLab/STR, ``utils/conv_type.py`` and
    ``resnet50-str.yaml``, for momentum and decay.
    """

    name: ClassVar[str] = "str"
    needs_whole_weights: ClassVar[str] = "its thresholds are learned by sums over whole weights"
    label: ClassVar[str] = "STR"
    citation: ClassVar[str] = """\
@inproceedings{kusupati2020str,
  title     = {Soft Threshold Weight Reparameterization for Learnable Sparsity},
  author    = {Kusupati, Aditya and Ramanujan, Vivek and Somani, Raghav and Wortsman, Mitchell and
               Jain, Prateek and Kakade, Sham and Farhadi, Ali},
  booktitle = {International Conference on Machine Learning},
  year      = {2020},
  note      = {arXiv:2002.03231}
}
"""
    patterns = (Unstructured,)

    pattern: Unstructured
    schedule: Plan | Schedule
    first: float = 0.0
    every: str = "16st"
    length: str = "75%"
    rate: float = 1.0
    momentum: float = 0.875
    decay: float = 2.25e-5
    reset: Reset = "none"
    layers: Layers | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        SoftThreshold(self.rate, self.momentum, self.decay)  # checks them

    def _check_pattern(self) -> None:
        super()._check_pattern()
        if self.pattern.scope != "global":
            raise InputError(
                f"STR(pattern=...) is {self.pattern!r}, which this method cannot keep. Give the "
                f'scope "global": how sparse each layer is, is what STR learns.'
            )

    @property
    def threshold(self) -> SoftThreshold:
        """How the thresholds are learned."""
        return SoftThreshold(self.rate, self.momentum, self.decay)

    @property
    def training(self) -> Behind:
        """Dense weights behind kept ones that are shrunk; what is zero has no gradient."""
        return Behind(straight_through=False, view=self._shrunk, is_network=False)

    def _shrunk(self, name: str, weight: Tensor, state: Thresholds) -> Tensor:
        return self.threshold.shrink(weight, state[name])

    def init(self, weights: Weights) -> Thresholds:
        """Return no thresholds: there are some in sparse phases only."""
        return {}

    def observe(
        self, step: int, weights: Weights, support: Support, state: Thresholds
    ) -> Thresholds:
        """Return the thresholds after a step of their own."""
        learned = dict(state)
        for name, threshold in state.items():
            gradient = weights.gradient(name)
            if gradient is not None:
                rate = weights.rate(name)
                learned[name] = self.threshold.learn(threshold, weights[name], gradient, rate)
        return {name: weights.peers.from_first(threshold) for name, threshold in learned.items()}

    def rank(self, weights: Weights, state: Thresholds) -> Scores:
        """Rank by how much the thresholds could rise before a weight is zero."""
        return self.threshold.rank(weights, state)

    def go_on(
        self, step: int, phase: Phase, weights: Weights, support: Support, state: Thresholds
    ) -> Support:
        """Choose among all dense weights where it is due."""
        if not self.cuts(step, phase):
            return support
        return self._at(step).select(self.rank(weights, state))

    def settle(self, weights: Weights, support: Support, state: Thresholds) -> Thresholds:
        """Return the thresholds that cut to the new support; none in a dense phase."""
        if support.is_full:
            return {}
        settled = self.threshold.settle(weights, state, support)
        return {name: weights.peers.from_first(threshold) for name, threshold in settled.items()}


# --- the thresholds -------------------------------------------------------------------------------

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
            shapes_of(params),
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
