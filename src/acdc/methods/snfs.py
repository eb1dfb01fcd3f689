"""SNFS, sparse momentum: sparse networks from scratch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, final

import torch
from torch import Tensor

from acdc import score, shards
from acdc.errors import InputError
from acdc.layers import Layers
from acdc.methods.base import Forecast, Reset
from acdc.methods.families import Evolving
from acdc.methods.training import Masked
from acdc.methods.weights import Weights
from acdc.pattern import Unstructured
from acdc.schedule import Phase, Plan, Schedule
from acdc.score import Scores
from acdc.support import Support
from acdc.topk import largest


@final
@dataclass(frozen=True)
class SNFS(Evolving):
    """Start from a random support; every epoch, drop the smallest weights, and grow where momentum
    is largest, in the layers whose weights have the most of it.

    Gradients and momentum stay dense in every step, so no step is cheap and no engine helps; only
    the weights are sparse. A weight that grows finds its momentum there, which is why ``reset`` is
    ``"none"``. An optimizer without momentum is asked for the gradient instead.

    An update: of every layer the smallest weights leave, ``ceil(p · kept)`` of them. Places are
    given out in proportion to the mean momentum of each layer's kept weights, and go to the largest
    momentum of what is not kept. The total never changes: shares are rounded by largest remainder,
    where the authors' code drifts and makes up for it later.

    Args:
        pattern: How many weights each layer keeps at first.
        schedule: Usually one sparse phase.
        drop: Share of the kept weights of a layer that leaves, at first; a layer that is less than
            a fifth sparse loses at most its sparsity.
        every: Time between updates.
        until: Updates end here, counted from the start of the run; the share falls to 0 by then, on
            half a cosine.
        seed: Of the first support; all processes draw the same.
        reset: Optimizer state cleared when weights come back; after a dense phase, too.
        layers: Which layers are pruned; ``None``: the pattern's default.

    Source: Dettmers and Zettlemoyer, 2019, section 3; TimDettmers/sparse_learning, ``core.py`` and
    ``funcs.py``. The authors' share ends at .005, ours at 0.
    """

    name: ClassVar[str] = "snfs"
    label: ClassVar[str] = "SNFS"
    citation: ClassVar[str] = """\
@article{dettmers2019snfs,
  title   = {Sparse Networks from Scratch: Faster Training without Losing Performance},
  author  = {Dettmers, Tim and Zettlemoyer, Luke},
  journal = {arXiv preprint arXiv:1907.04840},
  year    = {2019}
}
"""

    pattern: Unstructured
    schedule: Plan | Schedule
    drop: float = 0.5
    every: str = "1ep"
    until: str = "100%"
    seed: int = 0
    reset: Reset = "none"
    layers: Layers | None = None

    @property
    def training(self) -> Masked:
        """Kept weights alone, with the gradient of all weights in every step: momentum is dense."""
        return Masked(dense_gradient=lambda step: True)

    def forecast(self, weights: Mapping[str, Tensor]) -> Forecast:
        """Return the supports at the start of each phase: updates move weights between layers."""
        return replace(super().forecast(weights), exact=False)

    def go_on(
        self, step: int, phase: Phase, weights: Weights, support: Support, state: None
    ) -> Support:
        """Drop, share out and grow where an update is due."""
        if not self.due(step, phase):
            return support
        momentum = Scores(weights.shapes, lambda name: weights.momentum(name).abs())
        rest = self._rest(self.share(step, phase), weights, support)
        growth = self._growth(momentum, support, rest)
        masks = {}
        for name, mask in rest.items():
            others = score.among(momentum.subset([name]), {name: ~mask})
            masks[name] = mask | largest(others, growth[name])[name]
        return Support(masks)

    def _rest(self, share: float, weights: Weights, support: Support) -> Support:
        """Return what stays of every layer."""
        magnitude = score.among(score.magnitude(weights), support)
        masks = {}
        for name, kept in support.counts().items():
            zeros = support[name].numel() - kept
            part = Fraction(share)
            if 5 * zeros < support[name].numel():
                part = min(part, Fraction(zeros, support[name].numel()))
            leaving = math.ceil(part * kept)
            leaving = min(leaving, max(0, kept - self.pattern.floor))  # no layer dies
            masks[name] = largest(magnitude.subset([name]), kept - leaving)[name]
        return Support(masks)

    def _growth(self, momentum: Scores, support: Support, rest: Support) -> dict[str, int]:
        """Share out among the layers as many weights as have left."""
        mean = {
            name: _sum_within(momentum[name], mask, momentum.dtype) / max(1, kept)
            for (name, mask), kept in zip(support.items(), support.counts().values(), strict=True)
        }
        room = {name: mask.numel() - rest.counts()[name] for name, mask in rest.items()}
        return apportion(support.nnz - rest.nnz, mean, room)


def _sum_within(values: Tensor, mask: Tensor, dtype: torch.dtype) -> float:
    """Return the sum of the values that a mask keeps. Collective, if they are sharded."""
    part = shards.local(values) * shards.local(mask)
    if not shards.counts_here(values):
        part = part.new_zeros(1)
    return float(shards.total(part.sum(dtype=dtype), shards.mesh_of([values])))


def apportion(total: int, weight: Mapping[str, float], room: Mapping[str, int]) -> dict[str, int]:
    """Share out ``total`` in proportion to ``weight``, at most ``room`` to each.

    What does not fit goes to the others in the same proportion. Shares are rounded by largest
    remainder, ties to the earlier name, so that they sum up to ``total``.

    >>> apportion(10, {"a": 3.0, "b": 1.0, "c": 1.0}, {"a": 4, "b": 9, "c": 9})
    {'a': 4, 'b': 3, 'c': 3}

    Raises:
        InputError: There is not enough room, or a weight is negative or not finite.
    """
    if total > sum(room.values()):
        raise InputError(
            f"{total:,} cannot be shared out: there is room for {sum(room.values()):,}."
        )
    if bad := [name for name, value in weight.items() if not 0 <= value < math.inf]:
        raise InputError(
            f"The share of {bad[0]!r} is {weight[bad[0]]}, which is none. The training may have "
            f"diverged: lower the learning rate, or go back to an earlier checkpoint."
        )
    shares: dict[str, Fraction] = {}
    free = list(room)
    while free:
        left = total - sum(shares.values())
        parts = {name: Fraction(weight[name]) for name in free}
        if not any(parts.values()):
            parts = {name: Fraction(room[name]) for name in free}
        whole = sum(parts.values()) or 1
        share = {name: left * part / whole for name, part in parts.items()}
        full = {name: Fraction(room[name]) for name in free if share[name] > room[name]}
        shares |= full or share
        free = [name for name in free if name not in shares]
    counts = {name: math.floor(shares[name]) for name in room}
    short = total - sum(counts.values())
    for name in sorted(room, key=lambda name: counts[name] - shares[name])[:short]:
        counts[name] += 1
    return counts
