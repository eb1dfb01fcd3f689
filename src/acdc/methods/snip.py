"""SNIP: single-shot pruning before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, final

from torch import Tensor

from acdc import score
from acdc.layers import Layers
from acdc.methods.base import Reset, Weights
from acdc.methods.families import Phased
from acdc.pattern import Pattern
from acdc.schedule import Phase, Plan, Schedule
from acdc.support import Support


@final
@dataclass(frozen=True)
class SNIP(Phased):
    """Keep the weights whose removal would change the loss of one batch most; train only those.

    The first step of a sparse phase is a measurement: gradients are computed on all weights, the
    optimizer moves none, and the support of the largest ``|w · ∂loss/∂w|`` holds from then on. For
    scores over many samples, accumulate their gradients in that step: the paper takes one batch,
    the authors of AC/DC add up ``|w · ∂loss/∂w|`` over batches of 64 instead.

    Args:
        pattern: What is kept. The paper ranks globally; google-research/rigl ranks within each
            layer, with a uniform or ERK budget.
        schedule: Usually one sparse phase.
        reset: As for :class:`~acdc.ACDC`, where a dense phase follows a sparse one.
        layers: Which layers are pruned; ``None``: the pattern's default.

    Source: Lee, Ajanthan, Torr, ICLR 2019, algorithm 1. The measurement is a step of the clock and
    of the learning-rate schedule, as in google-research/rigl.
    """

    name: ClassVar[str] = "snip"
    citation: ClassVar[str] = """\
@inproceedings{lee2019snip,
  title     = {{SNIP}: Single-shot Network Pruning based on Connection Sensitivity},
  author    = {Lee, Namhoon and Ajanthan, Thalaiyasingam and Torr, Philip H. S.},
  booktitle = {International Conference on Learning Representations},
  year      = {2019},
  note      = {arXiv:1810.02340}
}
"""
    skips_steps: ClassVar[bool] = True

    pattern: Pattern
    schedule: Plan | Schedule
    reset: Reset = "all"
    layers: Layers | None = None

    def wants_gradient(self, step: int) -> bool:
        """Whether this is the first step of a sparse phase."""
        phase = self.resolved.phase_at(step)
        return phase.kind == "sparse" and step == phase.start

    def step_flops(self, sparse: int, dense: int) -> Fraction:
        """Return the FLOPs of a step; in the measurement all weights are kept."""
        return Fraction(3 * sparse)

    def begin(self, step: int, params: Mapping[str, Tensor]) -> Support:
        """Keep all weights for the measurement."""
        return Support.full(params)

    def go_on(self, step: int, phase: Phase, params: Weights, support: Support) -> Support:
        """Cut once the gradient is there."""
        if step != phase.start + 1:
            return support
        return self.pattern.select(score.saliency(params))
