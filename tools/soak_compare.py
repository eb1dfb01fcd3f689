"""Trials of ``acdc compare --jobs 2``: commands and workers that are killed again and again.

A command imports torch, which costs seconds, and so does the server from which its workers are
forked. ``kill_workers`` trains its grids in this process, which starts that server once.
``kill_compare`` starts each command as a user does. Neither draws a page in this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from acdc.compare import work
from acdc.errors import InputError
from support import compare_grids
from support.runs import assert_same_run

KILLS = 5  # of workers, in one try
PATIENCE = 240.0  # seconds that a command may take to end
GRID = "slow"
ADDRESS = f"{compare_grids.__file__}:{GRID}"


def _start(out: Path, resume: bool) -> subprocess.Popen[bytes]:
    """Start a command as a user does."""
    words = ["compare", ADDRESS, "--jobs", "2", "--out", str(out), *(["--resume"] * resume)]
    tests = str(Path(compare_grids.__file__).parent.parent)
    with (out / "errors").open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "acdc", *words],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": tests},
            stdout=subprocess.DEVNULL,
            stderr=file,
        )


def _ended(command: subprocess.Popen[bytes]) -> int:
    """Wait for the end of a command."""
    try:
        return command.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        command.kill()
        raise AssertionError(f"The command did not end within {PATIENCE:.0f} seconds.") from None


def _workers(command: int) -> list[psutil.Process]:
    """Return the workers of a command: the children of the server that forks them."""
    with contextlib.suppress(psutil.Error):
        servers = [
            child
            for child in psutil.Process(command).children()
            if any("forkserver" in word for word in child.cmdline())
        ]
        return [worker for server in servers for worker in server.children()]
    return []


def _resumable(out: Path) -> bool:
    return any((out / GRID / part).exists() for part in ("runs", "results.jsonl"))


@cache
def _straight() -> Path:
    """Return the folder of a grid that nothing killed."""
    torch.set_num_threads(1)
    out = Path(tempfile.mkdtemp(prefix="acdc-soak-"))
    work.compare(ADDRESS, out, jobs=2)
    return out / GRID


def _kill(process: psutil.Process) -> bool:
    """Kill a process, and return whether it was alive."""
    with contextlib.suppress(psutil.Error):
        alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        process.kill()
        return alive
    return False


def kill_workers(seed: int) -> str | None:
    """Kill workers of grids in this process five times while they are alive.

    Every grid is gone on with until no cell has failed. Its runs and results must be bitwise those
    of a grid that was not killed.
    """
    straight, rng, left = _straight(), random.Random(seed), KILLS
    ended = threading.Event()

    def kill() -> None:
        nonlocal left
        while left and not ended.wait(rng.uniform(0, 2.0)):
            if found := _workers(os.getpid()):
                left -= _kill(rng.choice(found))

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        while left:
            with tempfile.TemporaryDirectory(prefix="acdc-soak-") as name:
                out, failed = Path(name), True
                while failed:
                    with contextlib.suppress(InputError):  # one was killed while it was started
                        outcomes = work.compare(ADDRESS, out, jobs=2, resume=_resumable(out))
                        failed = any(outcome.row is None for outcome in outcomes)
                if difference := _difference(straight, out / GRID):
                    return difference
    finally:
        ended.set()
        killer.join()
    return None


def kill_compare(seed: int) -> str | None:
    """Kill a command as a user starts it, or one of its workers; then finish its grid."""
    rng = random.Random(seed)
    straight = _straight()
    with tempfile.TemporaryDirectory(prefix="acdc-soak-") as name:
        out, killed, finished = Path(name), False, False
        while not finished:
            command = _start(out, _resumable(out))
            if not killed:
                killed = _killed_once(command, rng)
            code = _ended(command)
            if code not in (0, -signal.SIGKILL, 128 + signal.SIGTERM):
                return f"A command ended with {code}: {(out / 'errors').read_text()[-500:]}"
            finished = code == 0 and not (out / GRID / "failed.jsonl").read_text()
        return _difference(straight, out / GRID)


def _killed_once(command: subprocess.Popen[bytes], rng: random.Random) -> bool:
    """Kill the command or one of its workers at a random moment; return whether it was alive."""
    worker = rng.random() < 0.5
    while command.poll() is None and worker and not _workers(command.pid):
        time.sleep(0.1)
    moment = time.monotonic() + rng.uniform(0, 10.0 if worker else 20.0)
    while command.poll() is None:
        found = _workers(command.pid) if worker else [psutil.Process(command.pid)]
        if time.monotonic() >= moment and found:
            alive = _kill(rng.choice(found))
            if worker and rng.random() < 0.3:
                command.terminate()  # a user who stops what is left
            return alive
        time.sleep(0.01)
    return False


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


TRIALS = {"kill_workers": kill_workers, "kill_compare": kill_compare}
