"""SNIP: single-shot pruning before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from acdc import score
from acdc.layers import Layers
from acdc.methods.base import Forecast, Reset
from acdc.methods.families import Phased
from acdc.methods.training import Masked
from acdc.methods.weights import Weights
from acdc.pattern import Pattern
from acdc.schedule import Phase, Plan, Schedule
from acdc.support import Support


@final
@dataclass(frozen=True)
class SNIP(Phased[None]):
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
    label: ClassVar[str] = "SNIP"
    citation: ClassVar[str] = """\
@inproceedings{lee2019snip,
  title     = {{SNIP}: Single-shot Network Pruning based on Connection Sensitivity},
  author    = {Lee, Namhoon and Ajanthan, Thalaiyasingam and Torr, Philip H. S.},
  booktitle = {International Conference on Learning Representations},
  year      = {2019},
  note      = {arXiv:1810.02340}
}
"""

    pattern: Pattern
    schedule: Plan | Schedule
    reset: Reset = "all"
    layers: Layers | None = None

    @property
    def training(self) -> Masked:
        """Kept weights alone; the measurement replaces the first step of a sparse phase."""
        return Masked(dense_gradient=self._measures, instead=True)

    def _measures(self, step: int) -> bool:
        phase = self.resolved.phase_at(step)
        return phase.kind == "sparse" and step == phase.start

    def begin(self, step: int, weights: Weights, state: None) -> Support:
        """Keep all weights for the measurement."""
        return Support.full(weights)

    def go_on(
        self, step: int, phase: Phase, weights: Weights, support: Support, state: None
    ) -> Support:
        """Cut once the gradient is there."""
        if step != phase.start + 1:
            return support
        return self.pattern.select(score.saliency(weights))

    def forecast(self, weights: Mapping[str, Tensor]) -> Forecast:
        """Return the supports of a run: in the measurement all weights are kept."""
        forecast = super().forecast(weights)
        full = {name: weight.numel() for name, weight in weights.items()}
        supports: list[tuple[int, dict[str, int] | None]] = []
        for step, counts in forecast.supports:
            supports += [(step, None)] if counts is None else [(step, full), (step + 1, counts)]
        return Forecast(tuple(supports), forecast.exact)
