"""Repeats long trials (random kills, fuzzed files, threads) for some minutes, and counts them.

    python tools/soak.py --minutes 10          # every trial has the same share of the time
    python tools/soak.py kill fuzz             # the trials with one of these words in their name
    python tools/soak.py --list
    python tools/soak.py kill_run --seed 4711 --tries 1     # one try again

A trial is a function from a seed to ``None``, or to a sentence that says what went wrong. The
trials are those in ``TRIALS`` of every ``tools/soak_*.py``. Each runs in a process of its own, so
that a crash of the interpreter counts as a failure of the seed that caused it, as does a try that
takes longer than ten minutes. The exit status is 1 if a try failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
PATIENCE = 600.0  # seconds that one try may take
SHOWN = 5  # failures of a trial that are printed and stored

Trial = Callable[[int], str | None]


@dataclass
class Count:
    """The tries of one trial.

    Args:
        trial: Its name.
        tries: How often it was tried.
        failed: How many of the tries failed.
        seconds: The time that all tries took.
        failures: Seed and reason of the first failures.
    """

    trial: str
    tries: int = 0
    failed: int = 0
    seconds: float = 0.0
    failures: list[tuple[int, str]] = field(default_factory=list)

    def add(self, seed: int, reason: str | None) -> None:
        """Count one try."""
        self.tries += 1
        if reason is not None:
            self.failed += 1
            if len(self.failures) < SHOWN:
                self.failures.append((seed, reason))


def trials() -> dict[str, Trial]:
    """Return every trial by its name."""
    for folder in (TOOLS, ROOT / "tests"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    found: dict[str, Trial] = {}
    for path in sorted(TOOLS.glob("soak_*.py")):
        module = importlib.import_module(path.stem)
        for name, trial in module.TRIALS.items():
            if name in found:
                raise SystemExit(f"Two trials have the name {name!r}. Rename the one in {path}.")
            found[name] = trial
    return found


def work(name: str, first: int, tries: int | None, seconds: float) -> None:
    """Try one trial again and again, and write a line of JSON before and after each try."""
    trial, began, seed = trials()[name], time.monotonic(), first
    while True:
        print(json.dumps({"seed": seed}), flush=True)
        try:
            reason = trial(seed)
        except Exception:
            reason = traceback.format_exc(limit=-3)
        print(json.dumps({"seed": seed, "reason": reason}), flush=True)
        seed += 1
        if tries is not None and seed - first >= tries:
            return
        if tries is None and time.monotonic() - began > seconds:
            return


def soak(name: str, first: int, tries: int | None, seconds: float) -> Count:
    """Run one trial in processes of its own until its time, or its number of tries, is used up."""
    count, began = Count(name), time.monotonic()
    while True:
        left = seconds - (time.monotonic() - began)
        rest = None if tries is None else tries - count.tries
        if count.tries and (left <= 0 if rest is None else rest <= 0):
            break
        for seed, reason in _tries(name, first + count.tries, rest, left):
            count.add(seed, reason)
    count.seconds = round(time.monotonic() - began, 1)
    return count


def _tries(
    name: str, first: int, tries: int | None, seconds: float
) -> Iterator[tuple[int, str | None]]:
    """Yield seed and reason of each try of one process, and of the try in which it died."""
    command = [sys.executable, __file__, "--worker", name, "--seed", str(first)]
    command += ["--seconds", str(seconds)] + ([] if tries is None else ["--tries", str(tries)])
    folder = tempfile.mkdtemp(prefix="acdc-soak-")  # a process that is killed leaves its files
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"TMPDIR": folder},
    )  # fmt: skip
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    errors: list[str] = []
    assert process.stdout is not None
    assert process.stderr is not None
    readers = [
        threading.Thread(target=_forward, args=(process.stdout, lines.put)),
        threading.Thread(target=_forward, args=(process.stderr, errors.append)),
    ]
    for reader in readers:
        reader.start()
    at: int | None = first
    try:
        while (line := lines.get(timeout=PATIENCE)) is not None:
            try:
                found = json.loads(line)
                seed = found["seed"]
            except (ValueError, TypeError, KeyError):
                continue  # printed by the trial itself
            if "reason" in found:
                at = None
                yield seed, found["reason"]
            else:
                at = seed
        process.wait()
        if process.returncode and at is not None:
            last = "".join(line for line in errors[-5:] if line is not None).strip()
            yield at, f"The process ended with {process.returncode}. {last}"
    except queue.Empty:
        yield (first if at is None else at), f"The try took longer than {PATIENCE:.0f} seconds."
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _forward(lines: Any, put: Callable[[Any], object]) -> None:
    for line in lines:
        put(line)
    put(None)


def table(counts: list[dict[str, Any]]) -> str:
    """Return the counts as a table of docs/reliability.md: the first line of each docstring."""
    lines = ["| trial | one try | tries | failed |", "|---|---|---|---|"]
    known = trials()
    for count in counts:
        text = (known[count["trial"]].__doc__ or "").strip().split("\n\n")[0]
        what = " ".join(text.split()).rstrip(".")
        lines.append(f"| `{count['trial']}` | {what} | {count['tries']:,} | {count['failed']} |")
    return "\n".join(lines)


def store(path: Path, counts: list[Count]) -> None:
    """Write counts into a file, in place of older counts of the same trials."""
    from acdc.runs.record import machine, versions

    origin = {
        "command": f"python tools/soak.py {' '.join(sys.argv[1:])}",
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": machine(),
        "versions": versions(),
    }
    known = json.loads(path.read_text())["trials"] if path.exists() else []
    stored = {count["trial"]: count for count in known}
    stored |= {count.trial: asdict(count) | origin for count in counts}
    in_order = [stored[name] for name in trials() if name in stored]
    path.write_text(json.dumps({"trials": in_order}, indent=1) + "\n")


def main() -> int:
    """Run the trials and print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="parts of the names of trials")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all trials together")
    parser.add_argument("--tries", type=int, help="tries of each trial, instead of minutes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first try")
    parser.add_argument("--json", type=Path, help="store the counts in this file")
    parser.add_argument("--table", type=Path, help="print the counts in this file as Markdown")
    parser.add_argument("--list", action="store_true", help="print the names of the trials")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.seed, args.tries, args.seconds)
        return 0
    if args.table is not None:
        print(table(json.loads(args.table.read_text())["trials"]))
        return 0
    chosen = [n for n in trials() if not args.words or any(word in n for word in args.words)]
    if args.list or not chosen:
        print("\n".join(chosen) or f"No trial has one of {args.words} in its name. See --list.")
        return 0 if chosen else 2
    counts = []
    width = max(map(len, chosen))
    for name in chosen:
        count = soak(name, args.seed, args.tries, 60 * args.minutes / len(chosen))
        counts.append(count)
        print(f"{name:<{width}}  {count.tries:>6} tries  {count.failed:>4} failed  "
              f"{count.seconds:>7.1f} s", flush=True)  # fmt: skip
        for seed, reason in count.failures:
            print(f"    --seed {seed}: {reason}", flush=True)
    if args.json is not None:
        store(args.json, counts)
    return int(any(count.failed for count in counts))


if __name__ == "__main__":
    sys.exit(main())
