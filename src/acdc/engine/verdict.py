"""Whether whole steps gain by the engine, and what to switch off where they do not.

Layers are timed one by one, warm and alone (``timing.py``). Their times do not add up to the time
of a step. So whole steps are timed as well, in blocks of a few steps: with everything switched on,
with everything switched off, and with some parts switched off.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

IGNORED = 2  # steps after a change: they trace, allocate memory, and fill caches
COUNTED = 5  # steps whose times count
CLEAR = 1.25  # with this ratio of dense to sparse, one block of each is enough
ALLOWED = 0.05  # the most that noise may count for, as a share of the dense time

Off = frozenset[str]
"""The names of the parts that are switched off."""


@dataclass(frozen=True)
class Block:
    """The times of a block of equal steps.

    Args:
        times: In any unit, in any order; at least one.

    """

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median. A few steps that waited for something else do not change it."""
        return sorted(self.times)[len(self.times) // 2]

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles."""
        ranked, quarter = sorted(self.times), len(self.times) // 4
        return (ranked[-1 - quarter] - ranked[quarter]) / 2

    def is_slower_than(self, dense: Block) -> bool:
        """Return whether the median is above that of dense steps by more than the noise.

        The noise is the larger spread, but at most ``ALLOWED`` of the dense time.

        >>> dense = Block((10.0, 10.0, 10.1, 9.9, 10.0))
        >>> [Block((ms,) * 5).is_slower_than(dense) for ms in (9.0, 10.0, 10.2, 12.0)]
        [False, False, True, True]
        """
        noise = min(max(self.spread, dense.spread), ALLOWED * dense.median)
        return self.median > dense.median + noise


def faster(*blocks: Block) -> Block:
    """Return the block of the shortest median."""
    return min(blocks, key=lambda block: block.median)


def groups(parts: Sequence[str]) -> Iterator[Off]:
    """Yield 1, 2, 4, ... of the parts, in their order: many parts need few rounds.

    >>> [sorted(group) for group in groups("abcdef")]
    [['a'], ['b', 'c'], ['d', 'e', 'f']]
    """
    start, size = 0, 1
    while start < len(parts):
        yield frozenset(parts[start : start + size])
        start, size = start + size, 2 * size


def judged(parts: Sequence[str]) -> Generator[Off, Block, Off]:
    """Yield what the next block of steps switches off, receive its times, return what stays off.

    Args:
        parts: All parts, the most doubtful first.

    """
    everything = frozenset(parts)
    best, off = (yield frozenset()), frozenset[str]()
    dense = yield everything
    if best.median * CLEAR > dense.median:  # close, or slower: other work may have disturbed one
        best = faster(best, (yield frozenset()))
        dense = faster(dense, (yield everything))
    for group in groups(parts):
        if not best.is_slower_than(dense):
            return off
        if off | group == everything:
            break
        without = yield off | group
        if without.median < best.median:
            best, off = without, off | group
    return off if not best.is_slower_than(dense) else everything


class Trial:
    """The judgement of one kind of steps: what the next step switches off, and later the verdict.

    It follows from the recorded times alone. So a trial that is saved and loaded goes on where it
    was.

    Args:
        parts: The parts that can be switched off, the most doubtful first.
        blocks: The times of each block that is complete.
        times: The times of the block that is not.

    Attributes:
        off: What the next step switches off.
        settled: Whether ``off`` is the verdict.

    """

    def __init__(
        self,
        parts: Iterable[str],
        blocks: Iterable[Sequence[float]] = (),
        times: Iterable[float] = (),
    ) -> None:
        self.parts = tuple(parts)
        self.blocks = [tuple(block) for block in blocks]
        self.times = list(times)
        self._replay()

    def _replay(self) -> None:
        self._by_off: dict[Off, list[Block]] = {}
        judging = judged(self.parts)
        self.settled, self.off = False, next(judging)
        for block in map(Block, self.blocks):
            self._by_off.setdefault(self.off, []).append(block)
            try:
                self.off = judging.send(block)
            except StopIteration as end:
                self.settled, self.off = True, end.value
                return

    def add(self, time: float) -> bool:
        """Note the time of a step. Return whether it completes a block."""
        if self.settled:
            return False
        self.times.append(time)
        if len(self.times) < IGNORED + COUNTED:
            return False
        self.blocks.append(tuple(self.times[IGNORED:]))
        self.times = []
        self._replay()
        return True

    @property
    def is_dense(self) -> bool:
        """Whether the next step switches everything off."""
        return self.off == frozenset(self.parts)

    def share(self, off: Off) -> float | None:
        """Return the time of steps that switch this off, as a share of the dense time."""
        mine, dense = self._by_off.get(off), self._by_off.get(frozenset(self.parts))
        if mine is None or dense is None or faster(*dense).median == 0:
            return None
        return faster(*mine).median / faster(*dense).median

    def state(self) -> dict[str, Any]:
        """Return what :meth:`of` makes the same trial of."""
        blocks = [list(block) for block in self.blocks]
        return {"parts": list(self.parts), "blocks": blocks, "times": list(self.times)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Trial:
        """Return the trial of a state."""
        return cls(state["parts"], state["blocks"], state["times"])


@dataclass(frozen=True)
class Verdict:
    """What whole steps of one kind decided.

    Args:
        kind: The steps: their mode and size.
        off: The parts that are switched off, the most doubtful first.
        dense: Everything is switched off.
        sparse_share: The time of a step with everything on, as a share of a dense step.
        share: That of a step as it is now.

    """

    kind: str
    off: tuple[str, ...]
    dense: bool
    sparse_share: float | None
    share: float | None

    @classmethod
    def of(cls, kind: str, trial: Trial) -> Verdict:
        """Return the verdict of a trial that is settled."""
        off = tuple(part for part in trial.parts if part in trial.off)
        shares = trial.share(frozenset()), trial.share(trial.off)
        return cls(kind, off, trial.is_dense, *shares)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Verdict:
        """Return the verdict of its fields in a dictionary, which may hold other entries."""
        own = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**own | {"off": tuple(own["off"])})

    def __str__(self) -> str:
        def of_dense(share: float | None) -> str:
            return "-" if share is None else f"{share:.2f}"

        took = f"{self.kind}: sparse takes {of_dense(self.sparse_share)} of the dense time"
        if self.dense:
            return f"{took}; PyTorch computes it"
        if not self.off:
            return took
        return f"{took}, {of_dense(self.share)} without {', '.join(self.off)}"
