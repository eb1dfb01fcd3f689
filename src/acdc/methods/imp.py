"""IMP: iterative magnitude pruning with rewinding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, takewhile
from typing import ClassVar, final

from torch import nn

from acdc import score
from acdc.errors import InputError
from acdc.layers import Layers
from acdc.methods.base import Reset, is_number
from acdc.methods.families import Phased
from acdc.methods.training import Masked, Mean, When
from acdc.methods.weights import Weights
from acdc.pattern import Block, Pattern, Unstructured
from acdc.schedule import Phase, Plan, Schedule, check_duration
from acdc.support import Support


@final
@dataclass(frozen=True)
class IMP(Phased[None]):
    """Train, cut the smallest of the kept weights, rewind the others to an early step, train again.

    The first round trains the dense network: it is the dense phase of the schedule. Its end is the
    dense twin. The sparse phase has as many rounds as it takes to reach the pattern's sparsity, all
    of one length. Each begins with a cut by magnitude. The whole network, biases and BatchNorm
    included, then goes back to its values after step ``rewind`` of the first round, without the
    weights that are cut, and the optimizer starts afresh.

    **Every round is a training of its own.** With n cuts IMP costs n + 1 times the training of a
    dense network, less what the kept weights save: all rounds are steps of the run, and its FLOPs
    are theirs. The learning rate goes through its whole curve in the first round, and through the
    curve from the step ``rewind`` on in each of the others: :meth:`on_curve`.

    Args:
        pattern: What is kept in the end. The paper's scope is ``"global"``.
        schedule: A dense phase, the first round, then a sparse one for the others. With rounds of
            10 epochs and :attr:`cuts` of 11, ``phases(120, [("dense", "10ep"), ("sparse",
            "110ep")])``.
        share: Share of the kept weights that a cut removes; the last cut removes what is left to
            remove.
        rewind: Time from the start of the run to the step whose weights are gone back to; ``"0st"``
            for the weights before training.
        reset: Optimizer state that is cleared at the start of a round: ``"all"``, ``"entered"``:
            that of the layers that are pruned, ``"none"``.
        layers: Which layers are pruned; ``None``: the pattern's default.

    Source: Frankle, Dziugaite, Roy, Carbin, ICML 2020, algorithm 2 (rewinding to step k, 20 % a
    cut, k = 2,000 of 63,000 steps for ResNet-20); Frankle and Carbin, ICLR 2019, for ``"0st"``.
    Each round there has T - k steps. Here it has the length that the schedule gives it, and its
    steps are spread evenly over that part of the curve.
    """

    name: ClassVar[str] = "imp"
    label: ClassVar[str] = "IMP, rewinding"
    patterns: ClassVar[tuple[type[Pattern], ...]] = (Unstructured, Block)
    citation: ClassVar[str] = """\
@inproceedings{frankle2020lmc,
  title     = {Linear Mode Connectivity and the Lottery Ticket Hypothesis},
  author    = {Frankle, Jonathan and Dziugaite, Gintare Karolina and Roy, Daniel M. and
               Carbin, Michael},
  booktitle = {International Conference on Machine Learning},
  year      = {2020},
  note      = {arXiv:1912.05671}
}
"""

    pattern: Unstructured | Block
    schedule: Plan | Schedule
    share: float = 0.2
    rewind: str = "1ep"
    reset: Reset = "all"
    layers: Layers | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.share) or not 0 < self.share < 1:
            raise InputError(
                f"IMP(share=...) is {self.share!r}. It is the share of the kept weights that a cut "
                f"removes: a number above 0 and below 1, such as 0.2."
            )
        check_duration(self.rewind, "rewind", may_be_none=True)

    @cached_property
    def sparsities(self) -> tuple[float, ...]:
        """The sparsity of every round after the first."""
        target = self.pattern.target
        cuts = (1 - (1 - self.share) ** n for n in range(1, 10**6))
        # What is a rounding error away from the end is the end.
        return (*takewhile(lambda sparsity: sparsity < target - 1e-9, cuts), target)

    @property
    def cuts(self) -> int:
        """The number of cuts, and of rounds after the first."""
        return len(self.sparsities)

    @property
    def training(self) -> Masked:
        """Kept weights alone; after a cut the network is that of an early step again."""
        return Masked(mean=Mean(nth=lambda step: int(step == self._early), use=self._rewinds))

    def _rewinds(self, step: int) -> When | None:
        phase = self.resolved.phase_at(step)
        begins = step > self._early and step in self._rounds.get(phase.start, ())
        return "after" if begins else None

    def begin(self, step: int, weights: Weights, state: None) -> Support:
        """Make the first cut."""
        return self.pattern.at(self.sparsities[0]).select(score.magnitude(weights))

    def go_on(
        self, step: int, phase: Phase, weights: Weights, support: Support, state: None
    ) -> Support:
        """Cut again at the start of a round."""
        pattern = self._rounds[phase.start].get(step)
        if pattern is None:
            return support
        return pattern.select(score.among(score.magnitude(weights), support))

    def kept_in(self, phase: Phase) -> Iterator[tuple[int, Pattern]]:
        """Yield the first step of every round of a sparse phase, and its pattern."""
        yield from self._rounds[phase.start].items()

    def on_curve(self, step: int) -> tuple[int, Schedule]:
        """Return where on the learning-rate curve of one round a step is.

        The first round is at its own steps. A later one goes from the step that was rewound to up
        to the end of the first.
        """
        once, phase = self._first_round, self.resolved.phase_at(step)
        starts = self._rounds.get(phase.start, [phase.start])
        start = max(at for at in starts if at <= step)
        if start == 0:
            return step, once
        stop = min((at for at in starts if at > step), default=phase.stop)
        ahead = (step - start) * (once.total - self._early) // (stop - start)
        return self._early + ahead, once

    def select(self, model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        """Return the weights that are pruned; refuse a schedule without a first, dense round."""
        first = self.resolved.phases[0]
        if first.kind == "sparse" or self._early >= first.stop:
            raise InputError(
                f"IMP rewinds to step {self._early} (rewind is {self.rewind!r}), which is no step "
                f"of a dense first phase: the schedule begins with a {first.kind} phase until step "
                f"{first.stop}. Begin with a dense phase that lasts longer."
            )
        for phase in self.resolved.phases:
            if phase.kind == "sparse" and len(phase) < self.cuts:
                raise InputError(
                    f"IMP makes {self.cuts} cuts of {100 * self.share:g} % each, and the sparse "
                    f"phase from step {phase.start} to {phase.stop} has fewer steps. Make it "
                    f"longer, or raise share."
                )
        return super().select(model)

    @cached_property
    def _early(self) -> int:
        return self.resolved.after(self.rewind)

    @cached_property
    def _first_round(self) -> Schedule:
        """The first phase as a schedule by itself. Its last epoch may be cut short."""
        stop, lengths = self.resolved.phases[0].stop, self.resolved.steps_per_epoch
        starts = (0, *accumulate(lengths))
        epochs = tuple(
            min(n, stop - at) for at, n in zip(starts, lengths, strict=False) if at < stop
        )
        return Schedule((Phase("dense", 0, stop),), epochs)

    @cached_property
    def _rounds(self) -> dict[int, dict[int, Pattern]]:
        """The start of every sparse phase → the first steps of its rounds, and what they keep."""
        patterns = [self.pattern.at(sparsity) for sparsity in self.sparsities]
        return {
            phase.start: {
                phase.start + number * len(phase) // self.cuts: pattern
                for number, pattern in enumerate(patterns)
            }
            for phase in self.resolved.phases
            if phase.kind == "sparse"
        }
