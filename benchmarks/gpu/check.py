"""What only a GPU can tell, in less than eight minutes: is it right there, and what does it cost?

    python benchmarks/gpu/check.py [--only SECTION ...] [--out FILE]
    python benchmarks/gpu/check.py --device cpu --quick

It needs PyTorch and this package; on a machine where that is not installed, set PYTHONPATH=src. The
file is written anew after every section, so that nothing is lost where one is stopped. A section
that fails, or takes longer than its time, says so, and the next one goes on. ``--quick`` takes tiny
sizes: it shows that the script works, and its figures mean nothing.

A row has ``ok``: whether the figure is what is wanted; ``None`` where nothing is wanted of it, or
where it needs a GPU that is not there.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import acdc
import cifar
import correctness
import graphs
import kernels
import overhead
from acdc.processor import processor_name
from measuring import Bench, Row

OUT = Path(__file__).parents[1] / "results" / "gpu.json"


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Args:
        rows: Yields the rows, one as soon as it is known.
        seconds: Its time. It looks at the time itself, and is stopped ten seconds later.
    """

    rows: Callable[[Bench], Iterator[Row]]
    seconds: int


SECTIONS = {
    "correctness": Section(correctness.rows, 130),
    "overhead": Section(overhead.rows, 110),
    "kernels": Section(kernels.rows, 110),
    "cifar": Section(cifar.rows, 50),
    "graphs": Section(graphs.rows, 20),
}


def facts(device: torch.device) -> dict[str, Any]:
    """Return the card, and what computes on it."""
    cuda = device.type == "cuda"
    sparse = torch.backends.cusparselt
    return {
        "card": torch.cuda.get_device_name(device) if cuda else processor_name(),
        "device": device.type,
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
        if cuda
        else None,
        "versions": {
            "acdc": acdc.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if cuda else None,
            "cusparselt": sparse.version() if cuda and sparse.is_available() else None,
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block when the time is over, where the system has alarms."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"stopped after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(section: Section, device: torch.device, quick: bool) -> Iterator[Row]:
    """Yield the rows of a section; a failure is a row as well."""
    bench = Bench(device, quick, time.monotonic() + section.seconds)
    try:
        with stopped_after(section.seconds + 10):
            yield from section.rows(bench)
    except Exception as error:  # whatever it is, the other sections go on
        yield Row("the section itself", ok=False, note=f"{type(error).__name__}: {error}"[:500])


def line(row: Row) -> str:
    """Return a row as a line of the table."""
    verdict = {True: "ok", False: "NOT OK", None: "-"}[row.ok]
    value = "" if row.value is None else f"{row.value:.4g} {row.unit}"
    return f"{row.case[:58]:58} {verdict:>6}  {value:>14}  {row.note[:90]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections, print a table, write the file; return 1 if something is not ok."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch finds no GPU; give --device cpu --quick to try the script")
    began = time.monotonic()
    record: dict[str, Any] = {
        "command": " ".join(["python benchmarks/gpu/check.py", *(arguments or sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        **facts(device),
        "quick": args.quick,
        "sections": {},
    }
    print(f"{record['card']}, torch {torch.__version__}")
    for name in args.only:
        print(f"\n{name}")
        start, rows = time.monotonic(), []
        for row in run(SECTIONS[name], device, args.quick):
            rows.append(row)
            print(line(row), flush=True)
        seconds = round(time.monotonic() - start, 1)
        record["sections"][name] = {"seconds": seconds, "rows": [vars(row) for row in rows]}
        record["seconds"] = round(time.monotonic() - began, 1)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    found = [row["ok"] for part in record["sections"].values() for row in part["rows"]]
    print(f"\n{found.count(True)} ok, {found.count(False)} not ok, in {record['seconds']} s")
    print(args.out)
    return int(False in found)


if __name__ == "__main__":
    sys.exit(main())
