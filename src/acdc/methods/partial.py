"""AC/DC with partial decompressions below a sparsity that rises over the run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import ClassVar, final

from torch import Tensor, nn

from acdc import score
from acdc.errors import InputError
from acdc.layers import Layers
from acdc.methods.base import Forecast, Reset, is_number
from acdc.methods.families import Rising, grown
from acdc.methods.training import Masked
from acdc.methods.weights import Weights
from acdc.pattern import Pattern, Unstructured
from acdc.schedule import Phase, Plan, Schedule, check_duration
from acdc.support import Support


@final
@dataclass(frozen=True)
class PartialACDC(Rising[None]):
    """Cut little by little, as GMP does, and let every layer grow back in part from time to time.

    In sparse phases the sparsity follows one cubic, from ``first`` at the start of the first of
    them to that of the pattern, ``length`` later. Every ``period`` a partial decompression begins:
    every layer grows to ``factor`` times the weights that it has, or to all. The weights with the
    largest gradients come back, from zero. ``width`` later the largest magnitudes are kept, as many
    as the cubic says by then.

    A dense phase of the schedule is a full decompression. The end of the last one is the dense
    twin, so a plan such as 62 % sparse, 6 % dense and 32 % sparse leaves a pair.

    Args:
        pattern: What is kept in the end.
        schedule: A sparse phase, a short dense one and a sparse one; or one sparse phase, which
            leaves no dense twin.
        first: Sparsity of the first cut.
        every: Time between cuts, where no decompression is under way.
        length: Time from the first cut to the last. What is left of the run is fine-tuning.
        period: Time from the first cut to the first partial decompression, and between the starts
            of two. One that would not end within its sparse phase, and by the last cut, is left
            out.
        width: Length of a partial decompression.
        factor: How many times its weights a layer has during one; above 1.
        reset: Optimizer state cleared when weights come back, as for :class:`~acdc.ACDC`.
        layers: Which layers are pruned; ``None``: the pattern's default.

    Source: ours. The cycles are those of AC/DC, the cubic is that of Zhu and Gupta (2017), and the
    growth is that of RigL. Without growth the method is GMP. With a factor that brings all weights
    back, and a sparsity that does not rise, it is AC/DC.
    """

    name: ClassVar[str] = "acdc_partial"
    label: ClassVar[str] = "AC/DC, partial"
    patterns: ClassVar[tuple[type[Pattern], ...]] = (Unstructured,)
    citation: ClassVar[str] = """\
@inproceedings{peste2021acdc,
  title     = {{AC/DC}: Alternating Compressed/DeCompressed Training of Deep Neural Networks},
  author    = {Peste, Alexandra and Iofinova, Eugenia and Vladu, Adrian and Alistarh, Dan},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {34},
  year      = {2021},
  note      = {arXiv:2106.12379}
}
"""

    pattern: Unstructured
    schedule: Plan | Schedule
    first: float = 0.0
    every: str = "2%"
    length: str = "70%"
    period: str = "20%"
    width: str = "5%"
    factor: float = 4.0
    reset: Reset = "entered"
    layers: Layers | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("length", "period", "width"):
            check_duration(getattr(self, name), name)
        self._check_rise()
        if not is_number(self.factor) or not 1 < self.factor < math.inf:
            raise InputError(
                f"PartialACDC(factor=...) is {self.factor!r}. It says how many times its weights a "
                f"layer has during a partial decompression: give a number above 1, such as 4."
            )

    @property
    def training(self) -> Masked:
        """Kept weights alone; the step before a layer grows has the gradients of all weights."""
        return Masked(dense_gradient=lambda step: self._grows(step + 1))

    @cached_property
    def decompressions(self) -> tuple[tuple[int, int], ...]:
        """The steps at which partial decompressions begin and end."""
        start, stop = self._first_cut, self._last_cut
        begins = sorted(self.resolved.every(self.period, start, stop))
        spans = ((begin, self.resolved.after(self.width, begin)) for begin in begins)
        return tuple(span for span in spans if self._fits(*span))

    def _fits(self, begin: int, end: int) -> bool:
        phase = self.resolved.phase_at(begin)
        inside = phase.start < begin < end < phase.stop
        return inside and phase.kind == "sparse" and end <= self._last_cut

    def _grows(self, step: int) -> bool:
        return any(step == begin for begin, _ in self.decompressions)

    def go_on(
        self, step: int, phase: Phase, weights: Weights, support: Support, state: None
    ) -> Support:
        """Let the layers grow where a partial decompression begins; otherwise cut where due."""
        if not self._grows(step):
            return super().go_on(step, phase, weights, support, state)
        before = support.counts()
        after = self._grown(before, weights)
        return grown(
            support, score.gradient(weights), {name: after[name] - before[name] for name in before}
        )

    def _grown(self, counts: Mapping[str, int], weights: Mapping[str, Tensor]) -> dict[str, int]:
        """Return how many weights the layers have after they have grown."""
        factor = Fraction(repr(float(self.factor)))
        return {name: min(int(factor * k), weights[name].numel()) for name, k in counts.items()}

    def cuts(self, step: int, phase: Phase) -> bool:
        """Whether a cut is due: no decompression is under way, or one ends."""
        if any(begin <= step < end for begin, end in self.decompressions):
            return False
        ends = any(step == end for _, end in self.decompressions)
        return ends or super().cuts(step, phase)

    def kept_in(self, phase: Phase) -> Iterator[tuple[int, Pattern]]:
        """Yield every cut of a sparse phase, with the pattern at its sparsity."""
        steps = {step for step, _ in super().kept_in(phase)}
        steps |= {end for _, end in self.decompressions}
        for step in sorted(steps):
            if step == phase.start or (phase.start < step < phase.stop and self.cuts(step, phase)):
                yield step, self._at(step)

    def forecast(self, weights: Mapping[str, Tensor]) -> Forecast:
        """Return the cuts, and between them the layers as they have grown."""
        cuts = super().forecast(weights)
        supports = dict(cuts.supports)
        for begin, _ in self.decompressions:
            before = supports[max(step for step in supports if step < begin)]
            assert before is not None
            supports[begin] = self._grown(before, weights)
        return Forecast(tuple(sorted(supports.items())), cuts.exact)

    def select(self, model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        """Return the weights that are pruned; refuse a schedule that the cuts do not fit into."""
        last = self.resolved.last("sparse")
        if last is None or self._last_cut >= last.stop:
            raise InputError(
                f"PartialACDC makes its last cut {self.length!r} after its first, and the schedule "
                f"has no sparse phase that lasts longer. Set a shorter length."
            )
        if not self.decompressions:
            raise InputError(
                f"No partial decompression fits into the sparse phases: with "
                f"period={self.period!r} and width={self.width!r} none ends by the last cut, at "
                f"step {self._last_cut}. Set a shorter period or width, or use GMP."
            )
        if any(end >= begin for (_, end), (begin, _) in pairwise(self.decompressions)):
            raise InputError(
                f"PartialACDC(width=...) is {self.width!r}, and the next partial decompression "
                f"begins {self.period!r} after the one before it. Set a shorter width."
            )
        return super().select(model)

    @cached_property
    def _first_cut(self) -> int:
        sparse = (phase.start for phase in self.resolved.phases if phase.kind == "sparse")
        return next(sparse, 0)

    @cached_property
    def _last_cut(self) -> int:
        return self.resolved.after(self.length, self._first_cut)

    def _start(self, phase: Phase) -> int:
        return self._first_cut

    def _stop(self, phase: Phase) -> int:
        return self._last_cut
