"""What every benchmark shares: the machine it ran on, medians with their spread, one JSON file."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from acdc.runs.record import machine, versions

RESULTS = Path(__file__).parent / "results"


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles and number of timings; times in milliseconds."""
    low, middle, high = statistics.quantiles([1000 * s for s in seconds], n=4)
    return {"median_ms": middle, "q1_ms": low, "q3_ms": high, "timings": len(seconds)}


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
