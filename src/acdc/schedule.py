"""When the network is dense and when it is sparse.

A *plan* is what a person writes: named phases with durations such as ``"10ep"`` (epochs), ``"25%"``
(of the run) or ``"500st"`` (optimizer steps). Resolved once against the number of steps in an epoch
it becomes a *schedule*: half-open runs of executed optimizer steps that touch and leave no gap.

>>> plan = alternate(epochs=8, warmup="2ep", sparse="1ep", dense="1ep", last_sparse="2ep")
>>> schedule = plan.resolve(steps_per_epoch=10)
>>> [(p.kind, p.start, p.stop) for p in schedule.phases]  # doctest: +NORMALIZE_WHITESPACE
[('dense', 0, 20), ('sparse', 20, 30), ('dense', 30, 40), ('sparse', 40, 50),
 ('dense', 50, 60), ('sparse', 60, 80)]
>>> [schedule.phase_at(step).kind for step in (0, 19, 20, 29, 30, 79, 80)]
['dense', 'dense', 'sparse', 'sparse', 'dense', 'sparse', 'sparse']

Only the standard library is used here.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate, cycle
from typing import Any, Literal, cast

from acdc.errors import InputError

Kind = Literal["dense", "sparse"]
KINDS: tuple[Kind, ...] = ("dense", "sparse")

# A run with more of them would wait longer for its tables and figures than for its steps.
MOST_PHASES, MOST_EPOCHS = 2_000, 1_000_000

_DURATION = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*(ep|st|%)\s*")


def _parse(text: str, what: str) -> tuple[Fraction, str]:
    """Split a duration such as ``"2.5ep"`` into its number and its unit."""
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise InputError(
            f"The duration of {what} is {text!r}. Write a number and a unit: '10ep' (epochs), "
            f"'500st' (optimizer steps) or '25%' (of the run)."
        )
    return Fraction(match[1]), match[2]


def check_duration(text: str, what: str, may_be_none: bool = False) -> None:
    """Raise InputError unless ``text`` is a duration with some length, such as ``"100st"``.

    Args:
        text: The duration.
        what: What lasts so long, for the message.
        may_be_none: Whether a duration without length, such as ``"0st"``, is allowed.
    """
    if not _parse(text, what)[0] and not may_be_none:
        raise InputError(f"The duration of {what} is {text!r}, which is none. Make it longer.")


def _check_phases(count: int) -> None:
    if count > MOST_PHASES:
        raise InputError(
            f"The schedule has more than {MOST_PHASES:,} phases, which is the limit. Make the "
            f"phases longer, or the run shorter."
        )


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise InputError(f"A phase is 'dense' or 'sparse', not {kind!r}.")


@dataclass(frozen=True)
class Phase:
    """The half-open run of executed optimizer steps ``[start, stop)``, dense or sparse."""

    kind: Kind
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Schedule:
    """Phases that touch, from step 0 to the end of the run.

    Args:
        phases: Touching phases, the first starting at 0, neighbours of different kinds.
        steps_per_epoch: Executed optimizer steps of every epoch; their sum is the last ``stop``.

    Raises:
        InputError: The phases leave a gap, overlap, are empty, or do not add up to the epochs.
    """

    phases: tuple[Phase, ...]
    steps_per_epoch: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.phases:
            raise InputError("A schedule needs at least one phase, and none was given.")
        _check_phases(len(self.phases))
        end = 0
        for before, phase in zip((None, *self.phases), self.phases, strict=False):
            _check_kind(phase.kind)
            if phase.start != end:
                raise InputError(
                    f"The phases must touch: a phase starts at step {phase.start}, "
                    f"and the one before it stops at {end}."
                )
            if phase.stop <= phase.start:
                raise InputError(
                    f"A {phase.kind} phase at step {phase.start} has no step. Make it longer, "
                    f"or leave it out."
                )
            if before is not None and before.kind == phase.kind:
                raise InputError(
                    f"Two {phase.kind} phases follow each other at step {phase.start}. "
                    f"Write them as one phase."
                )
            end = phase.stop
        if any(steps < 1 for steps in self.steps_per_epoch):
            raise InputError(
                f"Every epoch has at least one step, and steps_per_epoch is {self.steps_per_epoch}."
            )
        if end != sum(self.steps_per_epoch):
            raise InputError(
                f"The phases end at step {end}, but the epochs have "
                f"{sum(self.steps_per_epoch)} steps. Both must be the length of the run."
            )

    @property
    def total(self) -> int:
        """Executed optimizer steps of the whole run."""
        return self.phases[-1].stop

    @property
    def epochs(self) -> int:
        """Passes over the training data."""
        return len(self.steps_per_epoch)

    def phase_at(self, step: int) -> Phase:
        """Return the phase that the step after ``step`` executed steps belongs to.

        At and after the end of the run this is the last phase.
        """
        return self.phases[max(0, bisect_right(self._starts, step) - 1)]

    # Asked for in every step. A frozen dataclass can keep them: they are no fields of it.
    @cached_property
    def _starts(self) -> list[int]:
        return [phase.start for phase in self.phases]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.steps_per_epoch))

    def last(self, kind: Kind) -> Phase | None:
        """Return the last phase of this kind, or ``None`` where there is none."""
        return next((p for p in reversed(self.phases) if p.kind == kind), None)

    def share(self, kind: Kind) -> Fraction:
        """Return the share of all steps that are in phases of this kind."""
        return Fraction(sum(len(p) for p in self.phases if p.kind == kind), self.total)

    def epoch_at(self, step: int) -> Fraction:
        """Return the epoch, with its fraction, that ``step`` executed steps amount to."""
        epoch = bisect_right(self._ends, step)
        if epoch == self.epochs:
            return Fraction(epoch)
        begin = self._ends[epoch] - self.steps_per_epoch[epoch]
        return epoch + Fraction(step - begin, self.steps_per_epoch[epoch])

    def after(self, duration: str, start: int = 0) -> int:
        """Return the step that lies ``duration`` after ``start``; also beyond the end of the run.

        >>> schedule = constant("sparse", 10).resolve(8)
        >>> schedule.after("2.5ep"), schedule.after("75%"), schedule.after("5st", start=20)
        (20, 60, 25)
        """
        return _after(self.steps_per_epoch, duration, start)

    def every(self, duration: str, start: int, stop: int) -> frozenset[int]:
        """Return the steps ``start``, a duration later, two durations later, ... before ``stop``.

        >>> sorted(constant("sparse", 10).resolve(8).every("1.25ep", 0, 33))
        [0, 10, 20, 30]
        """
        return _every(self.steps_per_epoch, duration, start, stop)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return the phases as text: kind, epochs, steps, share of the run."""

        def number(epoch: Fraction) -> str:
            return f"{float(epoch):.2f}".rstrip("0").rstrip(".")

        return [
            (
                phase.kind,
                f"[{number(self.epoch_at(phase.start))}, {number(self.epoch_at(phase.stop))})",
                f"[{phase.start:,}, {phase.stop:,})",
                f"{100 * len(phase) / self.total:.1f} %",
            )
            for phase in self.phases
        ]

    def table(self) -> str:
        """Return the phases as a table of plain text, a line each, totals last."""
        head = ("phase", "epochs", "steps", "of the run")
        total = (
            "total",
            f"{self.epochs}",
            f"{self.total:,}",
            f"{100 * float(self.share('sparse')):.1f} % sparse",
        )
        lines = [head, *self.rows(), total]
        width = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)).rstrip()
            for line in lines
        )

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; ``Schedule.from_dict`` is the inverse."""
        return {
            "phases": [{"kind": p.kind, "start": p.start, "stop": p.stop} for p in self.phases],
            "steps_per_epoch": list(self.steps_per_epoch),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Schedule:
        """Rebuild a schedule from what ``to_dict`` returned."""
        return cls(
            tuple(Phase(p["kind"], p["start"], p["stop"]) for p in data["phases"]),
            tuple(data["steps_per_epoch"]),
        )


def _count(number: int) -> str:
    """Write a number, unless it has more digits than a person reads."""
    return f"{number:,}" if number < 10**15 else "too many"


def _epoch_lengths(steps_per_epoch: int | Sequence[int], epochs: int) -> tuple[int, ...]:
    given = steps_per_epoch
    lengths = tuple(given) if isinstance(given, Sequence) else (given,) * epochs
    if len(lengths) != epochs or any(not isinstance(n, int) or n < 1 for n in lengths):
        raise InputError(
            f"The plan has {epochs} epochs and steps_per_epoch is "
            f"{lengths if isinstance(given, Sequence) else given}. Give one positive whole number "
            f"for all epochs, or {epochs} of them."
        )
    return lengths


@dataclass(frozen=True)
class Plan(ABC):
    """Phases with durations, before the number of steps in an epoch is known.

    Args:
        epochs: Passes over the training data, the length of the run.
    """

    epochs: int

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, int) or self.epochs < 1:
            raise InputError(f"A plan has {self.epochs!r} epochs. Give a whole number from 1 up.")
        if self.epochs > MOST_EPOCHS:
            raise InputError(
                f"A plan has {_count(self.epochs)} epochs, and {MOST_EPOCHS:,} is the limit. Give "
                f"fewer."
            )

    @abstractmethod
    def boundaries(self, lengths: tuple[int, ...]) -> list[tuple[Kind, int]]:
        """Return (kind, stop step) of every phase for epochs of these lengths."""

    def resolve(self, steps_per_epoch: int | Sequence[int]) -> Schedule:
        """Return the schedule for epochs of ``steps_per_epoch`` *executed optimizer* steps.

        Args:
            steps_per_epoch: One number, or one per epoch. With gradient accumulation over ``a``
                batches this is the number of batches divided by ``a``.

        Raises:
            InputError: A phase is longer than the run, or has no step.
        """
        lengths = _epoch_lengths(steps_per_epoch, self.epochs)
        stops = self.boundaries(lengths)
        starts = [0, *(stop for _, stop in stops)]
        return Schedule(
            tuple(Phase(k, a, b) for a, (k, b) in zip(starts, stops, strict=False)), lengths
        )


class _Clock:
    """Turns durations into steps for one run. A duration in epochs is a difference of positions
    on the epoch axis, so that epochs of unequal lengths are met exactly."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths
        self.ends = [0, *accumulate(lengths)]
        self.total = self.ends[-1]

    def step_at(self, epoch: Fraction) -> Fraction:
        """The step at which the (fractional) ``epoch`` begins; beyond the run, extrapolated."""
        whole = min(int(epoch), len(self.lengths) - 1)
        return self.ends[whole] + (epoch - whole) * self.lengths[whole]

    def epoch_at(self, step: Fraction) -> Fraction:
        """Inverse of ``step_at``."""
        whole = min(max(0, bisect_right(self.ends, step) - 1), len(self.lengths) - 1)
        return whole + (step - self.ends[whole]) / Fraction(self.lengths[whole])

    def after(self, step: Fraction, duration: str, what: str) -> Fraction:
        """The step that lies ``duration`` after ``step``."""
        number, unit = _parse(duration, what)
        if unit == "st":
            return step + number
        if unit == "%":
            return step + number * self.total / 100
        return self.step_at(self.epoch_at(step) + number)

    def before(self, step: Fraction, duration: str, what: str) -> Fraction:
        """The step that lies ``duration`` before ``step``; before the run it is negative."""
        number, unit = _parse(duration, what)
        if unit == "st":
            return step - number
        if unit == "%":
            return step - number * self.total / 100
        epoch = self.epoch_at(step) - number
        return self.step_at(epoch) if epoch >= 0 else epoch * self.lengths[0]


@lru_cache(maxsize=256)  # a method asks in every step
def _after(lengths: tuple[int, ...], duration: str, start: int) -> int:
    return round(_Clock(lengths).after(Fraction(start), duration, "an event"))


@lru_cache(maxsize=256)
def _every(lengths: tuple[int, ...], duration: str, start: int, stop: int) -> frozenset[int]:
    check_duration(duration, "what comes again and again")
    clock, now = _Clock(lengths), Fraction(start)
    steps = []
    while round(now) < stop:
        steps.append(round(now))
        now = clock.after(now, duration, "what comes again and again")
    return frozenset(steps)


@dataclass(frozen=True)
class Alternate(Plan):
    """AC/DC: a dense warm-up, sparse and dense phases in turn, a longer last pair.

    The middle of the run, between the warm-up and the last dense phase, is filled with
    ``sparse, dense, sparse, ..., sparse``, as many as fit exactly.

    Args:
        epochs: Length of the run.
        warmup: First dense phase.
        sparse: Every sparse phase but the last.
        dense: Every dense phase between two sparse ones.
        last_dense: The last dense phase; ``None``: as ``dense``. The dense twin is its end.
        last_sparse: The last sparse phase; ``None``: as ``sparse``. The sparse model is its end.

    Source: Peste et al., NeurIPS 2021, section 4, and the published configurations.
    """

    warmup: str = "10ep"
    sparse: str = "5ep"
    dense: str = "5ep"
    last_dense: str | None = None
    last_sparse: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for what in ("warmup", "sparse", "dense", "last_dense", "last_sparse"):
            duration = getattr(self, what)
            if duration is not None or what in ("warmup", "sparse", "dense"):
                _parse(duration, what)

    def boundaries(self, lengths: tuple[int, ...]) -> list[tuple[Kind, int]]:
        """Return (kind, stop step) of every phase for epochs of these lengths."""
        clock = _Clock(lengths)
        end = Fraction(clock.total)
        last_sparse = clock.before(end, self.last_sparse or self.sparse, "last_sparse")
        last_dense = clock.before(last_sparse, self.last_dense or self.dense, "last_dense")
        now = clock.after(Fraction(0), self.warmup, "warmup")
        if last_dense < now:
            raise InputError(
                f"The phases are longer than the run: warmup={self.warmup!r}, "
                f"last_dense={self.last_dense or self.dense!r} and "
                f"last_sparse={self.last_sparse or self.sparse!r} together exceed "
                f"{self.epochs} epochs ({clock.total} steps). Shorten them or raise epochs."
            )
        stop = round(last_dense)
        stops: list[tuple[Kind, int]] = [("dense", round(now))] if now else []
        turns = cycle((("sparse", self.sparse), ("dense", self.dense)))
        while round(now) < stop:
            kind, duration = next(turns)
            begin, now = now, clock.after(now, duration, kind)
            if round(now) == round(begin):
                raise InputError(f"A {kind} phase of {duration!r} has no step in this run.")
            stops.append((cast(Kind, kind), round(now)))
            _check_phases(len(stops) + 2)
        if len(stops) == 1 and stops[0] == ("dense", stop):
            stops.clear()  # nothing in the middle: warm-up and last dense phase are one phase
        elif round(now) != stop or (stops and stops[-1][0] == "dense"):
            raise InputError(self._misfit(clock, last_dense))
        return [*stops, ("dense", round(last_sparse)), ("sparse", clock.total)]

    def _misfit(self, clock: _Clock, last_dense: Fraction) -> str:
        """Say which lengths of the run, near the one asked for, the phases would fill."""
        mean = Fraction(clock.total, self.epochs)
        begin = clock.after(Fraction(0), self.warmup, "warmup")
        sparse = clock.after(begin, self.sparse, "sparse") - begin
        turn = clock.after(begin + sparse, self.dense, "dense") - begin
        room = last_dense - begin
        turns = max(0, (room - sparse) // turn)
        fits = [sparse + n * turn for n in (turns, turns + 1)]

        def epochs(steps: Iterable[Fraction]) -> str:
            return " or ".join(f"{float(s / mean):.4g}" for s in steps)

        # A share of the run grows with the run, and half an epoch cannot be asked for.
        durations = (self.warmup, self.sparse, self.dense, self.last_dense, self.last_sparse)
        shares = any(duration and "%" in duration for duration in durations)
        longer = [clock.total + fit - room for fit in fits]
        whole = [] if shares else [steps for steps in longer if (steps / mean).denominator == 1]
        advice = f"Set epochs to {epochs(whole)}, or change" if whole else "Change"
        return (
            f"The phases do not fit into {self.epochs} epochs. Between warmup={self.warmup!r} and "
            f"last_dense={self.last_dense or self.dense!r}, "
            f"last_sparse={self.last_sparse or self.sparse!r} there are {epochs([room])} epochs; "
            f"sparse={self.sparse!r}, dense={self.dense!r} in turn, starting and ending sparse, "
            f"fill {epochs(fits)}. {advice} a duration by the difference."
        )


@dataclass(frozen=True)
class Constant(Plan):
    """One phase from the first step to the last."""

    kind: Kind = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_kind(self.kind)

    def boundaries(self, lengths: tuple[int, ...]) -> list[tuple[Kind, int]]:
        """Return (kind, stop step) of the only phase."""
        return [(self.kind, sum(lengths))]


@dataclass(frozen=True)
class Spans(Plan):
    """Phases written out one by one.

    Args:
        epochs: Length of the run.
        spans: ``(kind, duration)`` in order. The durations add up to the run.

    >>> Spans(4, (("dense", "50%"), ("sparse", "2ep"))).resolve(5).phases
    (Phase(kind='dense', start=0, stop=10), Phase(kind='sparse', start=10, stop=20))
    """

    spans: tuple[tuple[Kind, str], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.spans:
            raise InputError("A plan needs at least one phase, and no spans were given.")
        _check_phases(len(self.spans))
        for number, (kind, duration) in enumerate(self.spans):
            _check_kind(kind)
            _parse(duration, f"phase {number} ({kind})")

    def boundaries(self, lengths: tuple[int, ...]) -> list[tuple[Kind, int]]:
        """Return (kind, stop step) of every phase for epochs of these lengths."""
        clock = _Clock(lengths)
        now = Fraction(0)
        stops: list[tuple[Kind, int]] = []
        for number, (kind, duration) in enumerate(self.spans):
            now = clock.after(now, duration, f"phase {number} ({kind})")
            if now > clock.total:
                raise InputError(
                    f"Phase {number} ({kind}, {duration!r}) is longer than the run: it would stop "
                    f"at step {round(now)} of {clock.total}. Shorten it or raise epochs."
                )
            stops.append((kind, round(now)))
        return stops


def alternate(
    epochs: int,
    warmup: str = "10ep",
    sparse: str = "5ep",
    dense: str = "5ep",
    last_dense: str | None = None,
    last_sparse: str | None = None,
) -> Alternate:
    """Return the AC/DC plan; see :class:`Alternate` for the arguments."""
    return Alternate(epochs, warmup, sparse, dense, last_dense, last_sparse)


def constant(kind: Kind, epochs: int) -> Constant:
    """Return the plan with one phase."""
    return Constant(epochs, kind)


def phases(epochs: int, spans: Iterable[tuple[str, str]]) -> Spans:
    """Return the plan with these ``(kind, duration)`` phases in order."""
    return Spans(epochs, tuple((cast(Kind, kind), duration) for kind, duration in spans))


# --- what changes gradually ----------------------------------------------------------------------


def ramp(step: int, start: int, stop: int, first: float, last: float) -> float:
    """Return the sparsity at ``step`` on the cubic from ``first`` to ``last``, met exactly.

    >>> [ramp(step, 10, 20, 0.5, 0.9) for step in (0, 10, 15, 19, 20, 99)]
    [0.5, 0.5, 0.85, 0.8996, 0.9, 0.9]

    Source: Zhu and Gupta, 2017, arXiv:1710.01878, equation 1.
    """
    past = Fraction(step - start, stop - start) if stop > start else Fraction(step >= stop)
    left = 1 - min(max(past, Fraction(0)), Fraction(1))
    begin, end = (Fraction(repr(float(sparsity))) for sparsity in (first, last))
    return float(end + (begin - end) * left**3)


def cosine(step: int, start: int, stop: int) -> float:
    """Return half a cosine: 1 at ``start`` and before, 0 at ``stop`` and after.

    >>> [round(cosine(step, 10, 20), 6) for step in (0, 10, 15, 20, 99)]
    [1.0, 1.0, 0.5, 0.0, 0.0]
    """
    past = (step - start) / (stop - start) if stop > start else float(step >= stop)
    return (1 + math.cos(math.pi * min(max(past, 0.0), 1.0))) / 2
