"""What every benchmark shares: the machine it ran on, medians with their spread, one JSON file."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from acdc.bench.race import Workload, quartiles, race
from acdc.runs.record import machine, versions

RESULTS = Path(__file__).parent / "results"

Contenders = dict[str, Callable[[], object]]


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles and number of timings; times in milliseconds."""
    low, middle, high = statistics.quantiles([1000 * s for s in seconds], n=4)
    return {"median_ms": middle, "q1_ms": low, "q3_ms": high, "timings": len(seconds)}


def measure(contenders: Contenders, rounds: int, seconds: float) -> dict[str, Any]:
    """Time all in turn, and return the medians and the ratios to the first."""
    once = {name: Workload((call,)) for name, call in contenders.items()}
    race(once, 1)  # to warm up
    mean = statistics.mean(found[0] for found in race(once, 1).values())
    calls = max(1, round(seconds / mean))
    turns = race({name: Workload((call,) * calls) for name, call in contenders.items()}, rounds)
    times = {name: [turn / calls for turn in found] for name, found in turns.items()}
    row: dict[str, Any] = {name: spread(found) for name, found in times.items()}
    first, *others = times
    for name in others:
        ratios = [a / b for a, b in zip(times[first], times[name], strict=True)]
        row[f"{name}_ratio"] = statistics.median(ratios)
        row[f"{name}_ratio_q1_q3"] = quartiles(ratios)
    return row


def save(name: str, rows: list[dict[str, Any]], **facts: Any) -> Path:
    """Write ``results/NAME.json``: rows, command, date, machine, versions."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    command = "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    record = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": machine(),
        "versions": versions(),
        **facts,
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
