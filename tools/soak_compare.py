"""Trials of ``acdc compare``: commands and workers that are killed again and again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from support import compare_grids
from support.runs import assert_same_run

KILLS = 4  # of the command or of a worker, in one try
GRID = "slow"


def _start(out: Path, *more: str) -> subprocess.Popen[bytes]:
    address = f"{compare_grids.__file__}:{GRID}"
    words = [sys.executable, "-m", "acdc", "compare", address]
    tests = str(Path(compare_grids.__file__).parent.parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": tests}
    return subprocess.Popen(
        [*words, "--jobs", "2", "--out", str(out), *more],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@cache
def _straight() -> tuple[Path, float]:
    """Return the folder of an uninterrupted grid, and the seconds that it took."""
    out = Path(tempfile.mkdtemp(prefix="acdc-soak-"))
    began = time.monotonic()
    _, errors = (process := _start(out)).communicate()
    if process.returncode:
        raise RuntimeError(f"The grid cannot be trained at all: {errors.decode()[-500:]}")
    return out / GRID, time.monotonic() - began


def _workers(command: int) -> list[int]:
    """Return the processes that a command has started."""
    try:
        children = Path(f"/proc/{command}/task/{command}/children").read_text().split()
    except OSError:  # it has ended
        return []
    return list(map(int, children))


def kill_compare(seed: int) -> str | None:
    """Kill the command or one of its workers at random moments; then finish the grid.

    Runs and results must be those of a grid that was not killed.
    """
    straight, seconds = _straight()
    rng = random.Random(seed)
    out = Path(tempfile.mkdtemp(prefix="acdc-soak-"))
    try:
        for kill in range(KILLS):
            process = _start(out, *(["--resume"] if kill else []))
            time.sleep(rng.uniform(0.2, 1.2 * seconds))
            workers = _workers(process.pid)
            victim = rng.choice([process.pid, *workers])
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            if victim != process.pid and rng.random() < 0.5:
                process.send_signal(signal.SIGTERM)  # a user who stops what is left
            process.communicate(timeout=300)
        process = _start(out, "--resume")
        _, errors = process.communicate(timeout=300)
        if process.returncode:
            return f"--resume ended with {process.returncode}: {errors.decode()[-500:]}"
        return _difference(straight, out / GRID)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _difference(straight: Path, killed: Path) -> str | None:
    """Return in what a grid that was killed differs from one that was not."""
    if (a := _rows(straight)) != (b := _rows(killed)):
        return f"results.jsonl differs: {a} and {b}"
    for folder in sorted((straight / "runs").iterdir()):
        try:
            assert_same_run(folder, killed / "runs" / folder.name)
        except AssertionError as error:
            return f"{folder.name} differs: {str(error)[:300]}"
    return None


def _rows(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    passing = ("seconds", "cpu_seconds", "finished", "origin")  # no two runs share them
    return [{k: v for k, v in row.items() if k not in passing} for row in rows]


TRIALS = {"kill_compare": kill_compare}
