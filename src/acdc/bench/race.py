"""Who is faster: everybody takes a turn in every round, so that all meet the same machine.

The order rotates from round to round. Medians are compared; a ratio's spread is that of the
rounds, because a round's turns lie next to each other in time.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from acdc.errors import InputError

Key = TypeVar("Key", bound=Hashable)
Pass = Callable[[], object]
Row = dict[str, Any]

# More than the last-level caches of most machines hold.
SWEPT_BYTES = 2**27
PAUSE = 0.02  # seconds
OMP = "OMP_NUM_THREADS"  # a library with threads of its own reads it when it is loaded


def nothing() -> None:
    """Do nothing before a pass."""


@dataclass(frozen=True)
class Turn:
    """What a contender does in a turn.

    Args:
        passes: Timed one by one, and summed.
        before: Called before every pass, untimed.
        rehearse: Go through all once before, untimed: the caches then hold what the passes left.
    """

    passes: Sequence[Pass]
    before: Pass = nothing
    rehearse: bool = False

    def seconds(self) -> float:
        """Take the turn and return its seconds."""
        if self.rehearse:
            for part in self.passes:
                part()
        return sum(self._timed(part) for part in self.passes)

    def _timed(self, part: Pass) -> float:
        self.before()
        began = time.perf_counter()
        part()
        return time.perf_counter() - began


def race(turns: Mapping[Key, Turn], rounds: int) -> dict[Key, list[float]]:
    """Return the seconds of every contender in every round."""
    seconds: dict[Key, list[float]] = {key: [] for key in turns}
    order = list(turns)
    for _ in range(rounds):
        for key in order:
            seconds[key].append(turns[key].seconds())
        order = order[1:] + order[:1]
    return seconds


class Sweep:
    """What happens to the caches before a pass. Torch's threads stay awake.

    Args:
        caches: ``"left"``: nothing, they hold what the passes before left. ``"emptied"``: they are
            emptied, as by the other layers of a large network.
    """

    def __init__(self, caches: str) -> None:
        self.caches = caches
        # Read, not written: what was written would still be on its way to memory when the
        # clock runs.
        self._memory = torch.ones(SWEPT_BYTES // 4) if caches == "emptied" else None

    def __call__(self) -> None:
        """Read more than the caches hold, if they are to be empty."""
        if self._memory is not None:
            self._memory.sum()

    def and_pause(self) -> None:
        """Do so, and wait until torch's threads sleep: for a library that has threads of its own.

        OpenMP's threads go on spinning for some milliseconds after their work.
        """
        self()
        time.sleep(PAUSE)

    def turn(self, *passes: Pass, own_threads: bool = False) -> Turn:
        """Return the turn of a contender, who may have threads of its own."""
        before = self.and_pause if own_threads else self
        return Turn(passes, before, rehearse=self._memory is None)


def summary(
    dense: Mapping[str, Sequence[float]],
    sparse: Mapping[str, Sequence[float]],
    peers: Iterable[str],
) -> Row:
    """Return the columns that every table has.

    Args:
        dense: Seconds of dense PyTorch, by setting; the fastest counts.
        sparse: Seconds at one sparsity: of ``"engine"`` and of peers, as far as they took part.
        peers: All who could have taken part.
    """
    best = min(dense, key=lambda setting: statistics.median(dense[setting]))
    seconds = {"dense": dense[best], **sparse}
    row: Row = {"dense_setting": best, "rounds": len(dense[best]), "ratio": None}
    row |= {f"{name}_ms": None for name in ("dense", "engine", *peers)}
    row |= {f"{name}_ms": median_ms(values) for name, values in seconds.items()}
    spread = {f"{name}_ms": quartiles(values, 1000) for name, values in seconds.items()}
    if "engine" in sparse:
        row["ratio"] = row["dense_ms"] / row["engine_ms"]
        by_round = [d / e for d, e in zip(dense[best], sparse["engine"], strict=True)]
        spread["ratio"] = quartiles(by_round)
    row["quartiles"] = spread
    row["dense_settings_ms"] = {setting: median_ms(values) for setting, values in dense.items()}
    return row


def median_ms(seconds: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    return 1000 * statistics.median(seconds)


def quartiles(values: Sequence[float], scale: float = 1) -> list[float]:
    """Return the first and the third quartile, scaled; of a single value, that value twice."""
    if len(values) == 1:
        return [scale * values[0]] * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [scale * low, scale * high]


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch, and all others with it, use so many threads; ``None``: as many as torch does.

    Raises:
        InputError: Fewer than one.
    """
    if count is not None and count < 1:
        raise InputError(f"--threads is {count}. It is a whole number from 1 up.")
    before, variable = torch.get_num_threads(), os.environ.get(OMP)
    torch.set_num_threads(count or before)
    os.environ[OMP] = str(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if variable is None:
            del os.environ[OMP]
        else:
            os.environ[OMP] = variable
