"""AC/DC: alternating compressed and decompressed training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

from torch import nn

from acdc.errors import InputError
from acdc.layers import Layers
from acdc.methods.base import Reset
from acdc.methods.families import Rising
from acdc.pattern import Block, Pattern, Unstructured
from acdc.schedule import Phase, Plan, Schedule


@final
@dataclass(frozen=True)
class ACDC(Rising[None]):
    """Train dense, cut to the largest weights, train only those, bring all back, and again.

    At the first step of a sparse phase the pattern selects the largest magnitudes of the dense
    weights, to the full sparsity at once; the support then stays until the phase ends. At the first
    step of a dense phase every weight is free again: pruned ones start from zero, and momentum is
    cleared before the first dense update.

    With ``ramp`` a compression is gradual, which is not in the paper: the sparsity rises on a cubic
    from ``first`` to that of the pattern over the first part of every sparse phase. Both are met
    exactly, and what is cut stays cut until the phase ends.

    Args:
        pattern: What is kept in a sparse phase.
        schedule: The phases; a plan is resolved with :meth:`resolve`.
        reset: Optimizer state cleared when pruned weights come back: ``"all"`` of every parameter
            (the paper), ``"entered"``: only of the weights that come back, ``"none"``.
        layers: Which layers are pruned; ``None``: the pattern's default, which is the paper's.
        ramp: Share of every sparse phase from its first cut to its last, above 0 and below 1, such
            as 0.6; ``None``: one cut. Needs a pattern whose sparsity can change: ``Unstructured``
            or ``Block``.
        first: With ``ramp``: the sparsity of the first cut of a phase.
        every: With ``ramp``: the time between cuts, a duration such as ``"1%"`` (of the run).

    Source: Peste, Iofinova, Vladu, Alistarh, NeurIPS 2021, algorithm 1 and section 3.2. For
    ``ramp``: the cubic is that of Zhu and Gupta, 2017; Yasuda et al., SequentialAttention++,
    NeurIPS 2024, section 4.2 and appendix D.1, cut gradually between the dense and the sparse
    phases of AC/DC, on an exponential curve.
    """

    name: ClassVar[str] = "acdc"
    label: ClassVar[str] = "AC/DC"
    patterns: ClassVar[tuple[type[Pattern], ...]] = (Pattern,)  # all of them, for one cut
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

    pattern: Pattern
    schedule: Plan | Schedule
    reset: Reset = "all"
    layers: Layers | None = None
    ramp: float | None = field(default=None, metadata={"added": True})
    first: float = field(default=0.5, metadata={"added": True})
    every: str = field(default="1%", metadata={"added": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ramp is None:
            self._check_one_cut()
            return
        number = isinstance(self.ramp, int | float) and not isinstance(self.ramp, bool)
        if not number or not 0 < self.ramp < 1:
            raise InputError(
                f"ACDC(ramp=...) is {self.ramp!r}. It is the share of every sparse phase over "
                f"which the sparsity rises: a number above 0 and below 1, such as 0.6; or None for "
                f"one cut."
            )
        self._check_rise()

    def _check_pattern(self) -> None:
        super()._check_pattern()
        if self.ramp is not None and not isinstance(self.pattern, Unstructured | Block):
            raise InputError(
                f"ACDC(pattern=...) is {self.pattern!r}, whose sparsity cannot rise, and ramp is "
                f"{self.ramp!r}. Give Unstructured or Block, or leave out ramp."
            )

    def _check_one_cut(self) -> None:
        for name in ("first", "every"):
            if (value := getattr(self, name)) != getattr(ACDC, name):
                raise InputError(
                    f"ACDC({name}=...) is {value!r}, and without ramp every sparse phase has one "
                    f"cut. Set ramp, too; on the command line set it before {name}."
                )

    def select(self, model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        """Return the weights that are pruned; refuse a phase that is too short for its ramp."""
        for phase in self.resolved.phases:
            if phase.kind == "sparse" and self.ramp is not None and not self._fits(phase):
                raise InputError(
                    f"ACDC(ramp=...) is {self.ramp!r}, and the sparse phase from step "
                    f"{phase.start} to {phase.stop} is too short for it: its last cut would be at "
                    f"step {self._stop(phase)}. Make the phase longer, or set another ramp."
                )
        return super().select(model)

    def _fits(self, phase: Phase) -> bool:
        return phase.start < self._stop(phase) < phase.stop

    def _stop(self, phase: Phase) -> int:
        return phase.start + round((self.ramp or 0) * len(phase))

    def _at(self, step: int) -> Pattern:
        return self.pattern if self.ramp is None else super()._at(step)
