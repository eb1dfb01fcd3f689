"""AC/DC: alternating compressed and decompressed training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar, final

from torch import nn

from acdc.errors import InputError
from acdc.layers import Layers
from acdc.methods.base import Reset, is_number
from acdc.methods.families import Norms, Rising, norms_to_restore, restoring
from acdc.methods.training import Masked, Mean, When
from acdc.methods.weights import Weights
from acdc.pattern import Block, Pattern, Unstructured
from acdc.schedule import Phase, Plan, Schedule, ramp
from acdc.support import Support


@final
@dataclass(frozen=True)
class ACDC(Rising[Norms | None]):
    """Train dense, cut to the largest weights, train only those, bring all back, and again.

    At the first step of a sparse phase the pattern selects the largest magnitudes of the dense
    weights, to the full sparsity at once; the support then stays until the phase ends. At the first
    step of a dense phase every weight is free again: pruned ones start from zero, and momentum is
    cleared before the first dense update.

    With ``ramp`` a compression is gradual, which is not in the paper: the sparsity rises on a cubic
    from ``first`` to that of the pattern over the first part of every sparse phase. Both are met
    exactly, and a weight that is cut stays zero until the phase ends.

    With ``average``, which is not in the paper either, the mean of the network over the last part
    of every dense phase takes the network's place before it is cut: the support is chosen on the
    mean, training goes on from the mean, and the dense twin is the mean. A mean of weights is close
    to what a lower learning rate would have left.

    With ``restore_norms``, which is ours, every filter that a BatchNorm follows gets the norm back
    that it had before the cut, when all weights come back. BatchNorm hides the norm of a filter
    from the network's outputs, and the step that a learning rate takes grows as the norm falls:
    after the sparse phase it would be too large for the dense one.

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
        average: Share of every dense phase, at its end, over whose steps the network is averaged,
            above 0, up to 1; ``None``: the network itself is cut. All parameters and buffers count,
            so BatchNorm has the means of its running statistics. The optimizer's state is reset as
            ``reset`` says. The mean takes the memory of one more network.
        restore_norms: Whether filters get their norms back at the start of a dense phase: those of
            convolutions and linear layers whose outputs a BatchNorm reads. The layer's bias and the
            running statistics are multiplied, too, so that the network computes the same. Exclude a
            layer whose outputs something else reads as well.
        taper: How many times as many weights a sparse phase keeps as the next one, from 1 up, but
            never more than all; the last one keeps what the pattern says. 1: all keep the same.
            Above 1 it needs ``Unstructured`` or ``Block``.

    Source: Peste, Iofinova, Vladu, Alistarh, NeurIPS 2021, algorithm 1 and section 3.2. For
    ``ramp``: the cubic is that of Zhu and Gupta, 2017; Yasuda et al., SequentialAttention++,
    NeurIPS 2024, section 4.2 and appendix D.1, cut gradually between the dense and the sparse
    phases of AC/DC, on an exponential curve. For ``average``: Izmailov et al., UAI 2018, average
    weights along a run; to cut the mean is ours. ``taper`` is ours.
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
    average: float | None = field(default=None, metadata={"added": True})
    restore_norms: bool = field(default=False, metadata={"added": True})
    taper: float = field(default=1.0, metadata={"added": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ramp is None:
            self._check_one_cut()
        elif not is_number(self.ramp) or not 0 < self.ramp < 1:
            raise InputError(
                f"ACDC(ramp=...) is {self.ramp!r}. It is the share of every sparse phase over "
                f"which the sparsity rises: a number above 0 and below 1, such as 0.6; or None for "
                f"one cut."
            )
        else:
            self._check_rise()
        average = self.average
        if average is not None and (not is_number(average) or not 0 < average <= 1):
            raise InputError(
                f"ACDC(average=...) is {average!r}. It is the share of every dense phase over "
                f"which the network is averaged: a number above 0, up to 1, such as 0.4; or None."
            )
        if not is_number(self.taper) or not 1 <= self.taper < math.inf:
            raise InputError(
                f"ACDC(taper=...) is {self.taper!r}. It says how many times as many weights a "
                f"sparse phase keeps as the next one: a number from 1 up, such as 2."
            )

    def _check_pattern(self) -> None:
        super()._check_pattern()
        rises = self.ramp is not None or self.taper != 1
        if rises and not isinstance(self.pattern, Unstructured | Block):
            raise InputError(
                f"ACDC(pattern=...) is {self.pattern!r}, whose sparsity cannot rise, and ramp is "
                f"{self.ramp!r} and taper {self.taper!r}. Give Unstructured or Block, or leave out "
                f"ramp and taper."
            )

    def _check_one_cut(self) -> None:
        for name in ("first", "every"):
            if (value := getattr(self, name)) != getattr(ACDC, name):
                raise InputError(
                    f"ACDC({name}=...) is {value!r}, and without ramp every sparse phase has one "
                    f"cut. Set ramp, too; on the command line set it before {name}."
                )

    @property
    def training(self) -> Masked:
        """Kept weights alone; with ``average`` the mean of a dense phase is what is cut."""
        mean = Mean(nth=self._place_in_mean, use=self._uses_mean)
        return Masked(
            mean=None if self.average is None else mean,
            rescale=restoring if self.restore_norms else None,
        )

    def _place_in_mean(self, step: int) -> int:
        """Return the place of the network after a step in the mean of its dense phase, from 1."""
        phase = self.resolved.phase_at(step - 1)
        if not step or phase.kind == "sparse":
            return 0
        assert self.average is not None
        return max(0, step - phase.stop + max(1, round(self.average * len(phase))))

    def _uses_mean(self, step: int) -> When | None:
        phase = self.resolved.phase_at(step)
        return "before" if phase.kind == "sparse" and 0 < step == phase.start else None

    def init(self, weights: Weights) -> Norms | None:
        """Return no norms, if they are to be restored later."""
        return {} if self.restore_norms else None

    def settle(self, weights: Weights, support: Support, state: Norms | None) -> Norms | None:
        """Remember the norms at the first cut of a sparse phase, and forget them at its end."""
        return state if state is None else norms_to_restore(weights, support, state)

    def select(self, model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        """Return the weights that are pruned; refuse a phase that is too short for its ramp."""
        phases = () if self.ramp is None else self.resolved.phases
        for phase in phases:
            if phase.kind == "sparse" and not self._fits(phase):
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
        phase = self.resolved.phase_at(step)
        end = self._end_of(phase)
        if self.ramp is None:
            return end
        first = min(self.first, end.target)
        return end.at(ramp(step, phase.start, self._stop(phase), first, end.target))

    def _end_of(self, phase: Phase) -> Pattern:
        """Return the pattern that a sparse phase ends with."""
        phases = self.resolved.phases
        later = sum(other.kind == "sparse" and other.start > phase.start for other in phases)
        if self.taper == 1 or not later:
            return self.pattern
        taper, sparsity = (Fraction(repr(float(x))) for x in (self.taper, self.pattern.target))
        return self.pattern.at(float(max(Fraction(0), 1 - taper**later * (1 - sparsity))))
