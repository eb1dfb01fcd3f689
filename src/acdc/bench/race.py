"""Interleaved timing: every round times every competitor once, so that all meet the same machine.

The sequence of the competitors rotates from round to round. Medians are compared. The spread of a
ratio is its spread over the rounds, because the timings of one round are close together in time.
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
FLUSH_BYTES = 2**27
PAUSE = 0.02  # seconds
OMP = "OMP_NUM_THREADS"  # a library with its own threads reads the variable when it is loaded


def nothing() -> None:
    """Do nothing before a pass."""


@dataclass(frozen=True)
class Workload:
    """What is timed of a competitor in one round.

    Args:
        passes: Timed one by one, and summed.
        before: Called before every pass, untimed.
        warm_up: Run all passes once before, untimed. The caches then hold what the passes left.
    """

    passes: Sequence[Pass]
    before: Pass = nothing
    warm_up: bool = False

    def seconds(self) -> float:
        """Run the passes and return their seconds."""
        if self.warm_up:
            for part in self.passes:
                part()
        return sum(self._timed(part) for part in self.passes)

    def _timed(self, part: Pass) -> float:
        self.before()
        began = time.perf_counter()
        part()
        return time.perf_counter() - began


def race(workloads: Mapping[Key, Workload], rounds: int) -> dict[Key, list[float]]:
    """Return the seconds of every competitor in every round."""
    seconds: dict[Key, list[float]] = {key: [] for key in workloads}
    sequence = list(workloads)
    for _ in range(rounds):
        for key in sequence:
            seconds[key].append(workloads[key].seconds())
        sequence = sequence[1:] + sequence[:1]
    return seconds


class Caches:
    """State of the processor caches before a pass. Torch's threads stay awake.

    Args:
        state: ``"left"``: the caches hold what the passes before left. ``"emptied"``: they are
            flushed, as the other layers of a large network would.
    """

    def __init__(self, state: str) -> None:
        self.state = state
        # The memory is read, not written. Written cache lines would still be on their way to
        # memory when the clock runs.
        self._memory = torch.ones(FLUSH_BYTES // 4) if state == "emptied" else None

    def flush(self) -> None:
        """Read more than the caches hold, if they are to be empty."""
        if self._memory is not None:
            self._memory.sum()

    def flush_and_pause(self) -> None:
        """Flush, and wait until torch's threads sleep: for a library that has its own threads.

        OpenMP's threads go on spinning for some milliseconds after their work.
        """
        self.flush()
        time.sleep(PAUSE)

    def workload(self, *passes: Pass, own_threads: bool = False) -> Workload:
        """Return the workload of a competitor, which may have its own threads."""
        before = self.flush_and_pause if own_threads else self.flush
        return Workload(passes, before, warm_up=self._memory is None)


def summary(
    dense: Mapping[str, Sequence[float]],
    sparse: Mapping[str, Sequence[float]],
    peers: Iterable[str],
) -> Row:
    """Return the columns that every table has.

    Args:
        dense: Seconds of dense PyTorch, by setting; the fastest counts.
        sparse: Seconds at one sparsity, of ``"engine"`` and of the peers that were timed.
        peers: All peers, timed or not.
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
    """Set the number of threads of torch and of other libraries; ``None``: torch's present number.

    Raises:
        InputError: The number is below one.
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
