"""Trials of ``acdc compare --jobs 2``: commands and workers that are killed again and again.

A process that imports torch costs seconds, and a thousand kills need thousands of processes. So
``kill_compare`` forks each command from this process, which has imported everything, and the
command forks its workers from itself. It draws no page, which takes longer than the training.
``kill_started_compare`` starts the command as a user does.
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
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch

from acdc import cli
from acdc.compare import work, worker
from acdc.pages import comparison
from support import compare_grids
from support.runs import assert_same_run

KILLS = 10  # of the command or of a worker, in one try
PATIENCE = 120.0  # seconds that a command may take to end
GRID = "slow"
ADDRESS = f"{compare_grids.__file__}:{GRID}"


def _words(out: Path, resume: bool) -> list[str]:
    return ["compare", ADDRESS, "--jobs", "2", "--out", str(out), *(["--resume"] * resume)]


# --- commands -----------------------------------------------------------------------------------


class Started:
    """A command as a user starts it."""

    def __init__(self, out: Path, resume: bool, errors: Path) -> None:
        tests = str(Path(compare_grids.__file__).parent.parent)
        with errors.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "acdc", *_words(out, resume)],
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": tests},
                stdout=subprocess.DEVNULL,
                stderr=file,
                start_new_session=True,
            )
        self.pid = self.process.pid

    def poll(self) -> int | None:
        """Return how the command ended; ``None``: it has not."""
        return self.process.poll()


class Forked:
    """A command in a process that is forked from this one, as are its workers."""

    def __init__(self, out: Path, resume: bool, errors: Path) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        with _leaving():
            os.setsid()
            silent = os.open(os.devnull, os.O_RDWR)
            written = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            _only((silent, silent, written))
            work.subprocess = ForkedWorker  # type: ignore[assignment]
            comparison.render = lambda *_: out  # type: ignore[assignment]
            code = cli.main(_words(out, resume))
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        """Return how the command ended; ``None``: it has not."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code


class ForkedWorker:
    """What a command uses of the module ``subprocess``, with a fork instead of a new program."""

    PIPE = subprocess.PIPE

    class Popen:
        """A worker."""

        stdin: IO[bytes]
        stdout: IO[bytes]

        def __init__(
            self, words: list[str], *, stderr: IO[bytes], pass_fds: tuple[int, ...], **_: Any
        ) -> None:
            ends_in, sends_in = os.pipe()
            reads_out, ends_out = os.pipe()
            self.pid = os.fork()
            if not self.pid:
                with _leaving():
                    os.setsid()
                    _only((ends_in, ends_out, stderr.fileno()), pass_fds)
                    for number in (signal.SIGTERM, signal.SIGINT):
                        signal.signal(number, signal.SIG_DFL)  # as a new program has them
                    worker.main(json.loads(words[-1]))
                    os._exit(0)
            os.close(ends_in)
            os.close(ends_out)
            self.stdin, self.stdout = os.fdopen(sends_in, "wb"), os.fdopen(reads_out, "rb")

        def wait(self) -> int:
            """Return how the worker ended, when it has."""
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

        def terminate(self) -> None:
            """Ask the worker to stop."""
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)


@contextmanager
def _leaving() -> Iterator[None]:
    """Never return into the code of the process that was forked."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


def _only(streams: tuple[int, int, int], kept: tuple[int, ...] = ()) -> None:
    """Make these the three standard streams, and close every other file but those in ``kept``."""
    for number, descriptor in enumerate([os.dup(descriptor) for descriptor in streams]):
        os.dup2(descriptor, number)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


# --- kills --------------------------------------------------------------------------------------


def _workers(command: int) -> list[int]:
    """Return the processes that a command has started."""
    try:
        children = Path(f"/proc/{command}/task/{command}/children").read_text().split()
    except OSError:  # it has ended
        return []
    return list(map(int, children))


def _state(process: int) -> str:
    """Return the letter that Linux has for the state of a process; ``""``: it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _kill(process: int) -> bool:
    """Kill a process, and return whether it was alive: it is stopped first, so that it is known."""
    try:
        os.kill(process, signal.SIGSTOP)
        while _state(process) not in ("T", "Z", "X", ""):
            time.sleep(0.0002)
        alive = _state(process) == "T"
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return alive


def _ended(command: Started | Forked) -> int:
    """Wait for the end of a command."""
    began = time.monotonic()
    while (code := command.poll()) is None:
        if time.monotonic() - began > PATIENCE:
            os.killpg(command.pid, signal.SIGKILL)
            raise AssertionError(f"The command did not end within {PATIENCE:.0f} seconds.")
        time.sleep(0.002)
    return code


@cache
def _straight() -> Path:
    """Return the folder of a grid that the command of a user trained, and that nothing killed."""
    out = Path(tempfile.mkdtemp(prefix="acdc-soak-"))
    code = _ended(Started(out, False, out / "errors"))
    if code:
        raise RuntimeError(f"The grid cannot be trained: {(out / 'errors').read_text()[-500:]}")
    return out / GRID


@cache
def _warm() -> None:
    """Train a grid in this process: what torch imports and builds late is there for the forks."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="acdc-soak-") as out:
        work.compare(f"{compare_grids.__file__}:small", Path(out))


Start = Callable[[Path, bool, Path], Started | Forked]


def _killed(start: Start, rng: random.Random, kills: int, longest: float) -> str | None:
    """Train grids; kill commands and workers that are alive; finish each grid and compare it.

    Args:
        start: Starts a command.
        rng: Chooses the moments and the processes.
        kills: How many.
        longest: Seconds between two kills, at most.

    Returns:
        What went wrong.
    """
    while kills > 0:
        with tempfile.TemporaryDirectory(prefix="acdc-soak-") as name:
            out, errors, resume, finished = Path(name), Path(name) / "errors", False, False
            while not finished:
                command = start(out, resume, errors)
                if kills:
                    kills -= _killed_once(command, rng, longest)
                code = _ended(command)
                resume = any((out / GRID / part).exists() for part in ("runs", "results.jsonl"))
                if code not in (0, -signal.SIGKILL, 128 + signal.SIGTERM):
                    return f"A command ended with {code}: {errors.read_text()[-500:]}"
                finished = code == 0 and not (out / GRID / "failed.jsonl").read_text()
            if difference := _difference(_straight(), out / GRID):
                return difference
    return None


def _killed_once(command: Started | Forked, rng: random.Random, longest: float) -> bool:
    """Kill the command or one of its workers at a random moment; return whether it was alive."""
    moment = time.monotonic() + rng.uniform(0, longest)
    worker = rng.random() < 0.6
    while command.poll() is None:
        found = _workers(command.pid) if worker else [command.pid]
        if time.monotonic() >= moment and found:
            alive = _kill(rng.choice(found))
            if worker and rng.random() < 0.3:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(command.pid, signal.SIGTERM)  # a user who stops what is left
            return alive
        time.sleep(0.002)
    return False


def kill_compare(seed: int) -> str | None:
    """Kill commands and workers of `acdc compare --jobs 2` ten times while they are alive.

    Every grid is finished with ``--resume``. Its runs and results must be bitwise those of a grid
    that was not killed.
    """
    _warm()
    _straight()
    return _killed(Forked, random.Random(seed), KILLS, longest=0.8)


def kill_started_compare(seed: int) -> str | None:
    """Kill such a command, or one of its workers, once, with everything started as a user does."""
    _straight()
    return _killed(Started, random.Random(seed), 1, longest=20.0)


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


TRIALS = {"kill_compare": kill_compare, "kill_started_compare": kill_started_compare}
