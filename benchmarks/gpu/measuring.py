"""What the sections of the check share: a row, the time that is left, times of the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_FLUSHED = 256 << 20  # bytes: more than any cache of a card holds


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        case: What was looked at.
        ok: Whether it is as wanted; ``None``: nothing is wanted, or it needs a GPU.
        value: The figure, if there is one.
        unit: Its unit.
        note: What else there is to say: what is wanted, or what went wrong.
    """

    case: str
    ok: bool | None = None
    value: float | None = None
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """Where a section runs.

    Args:
        device: The device.
        quick: Whether sizes are tiny.
        until: When the section has to end, on the monotonic clock.
    """

    device: torch.device
    quick: bool
    until: float

    @property
    def cuda(self) -> bool:
        """Whether this is a GPU of NVIDIA (or AMD, which PyTorch calls the same)."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.until - time.monotonic()

    def milliseconds(self, function: Callable[[], object]) -> float:
        """Return the milliseconds that one call takes on the device."""
        if not self.cuda:
            began = time.perf_counter()
            function()
            return 1000 * (time.perf_counter() - began)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def interleaved(
        self, functions: dict[str, Callable[[], object]], rounds: int
    ) -> dict[str, float]:
        """Return the median milliseconds of each function; they take turns, with cold caches."""
        cache = torch.empty(_FLUSHED if self.cuda else 1, dtype=torch.uint8, device=self.device)
        times: dict[str, list[float]] = {name: [] for name in functions}
        for number in range(rounds + 1):
            for name, function in functions.items():
                cache.zero_()
                taken = self.milliseconds(function)
                if number:  # the first round warms up
                    times[name].append(taken)
        return {name: statistics.median(each) for name, each in times.items()}
