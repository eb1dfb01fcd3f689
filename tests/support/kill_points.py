"""Kills the end of a run before each system call that changes the disk, and resumes it.

It is a process of its own, which forks a child for each attempt: a child costs no imports, and no
thread of the test process is in it. Called by ``test_kills.py`` with an empty folder, the settings
and the stride as arguments; ``tools/soak_kills.py`` uses its functions.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from acdc.errors import InputError
from acdc.runs import train
from acdc.runs.recipe import Recipe
from support.killed import die, end
from support.runs import assert_same_run, tiny

STOP = 24  # the step at which the last third begins: of 28, and of 8 more for the twin
CALLS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR


class Calls:
    """Counts the calls of this process that change the disk below a folder.

    Args:
        folder: The folder. Its ``tensorboard`` is left out: another thread writes there.
        fatal: The process kills itself before the call with this number, from 1; 0: never.
    """

    def __init__(self, folder: Path, fatal: int) -> None:
        self.folder, self.fatal = os.path.realpath(folder), fatal
        self.names: list[str] = []
        fsync = os.fsync

        def counted(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self.count("fsync", path)
            fsync(descriptor)

        os.fsync = counted
        sys.addaudithook(self.heard)  # cannot be removed: for child processes only

    def heard(self, event: str, args: tuple[Any, ...]) -> None:
        """Count an event of Python that changes the disk."""
        if event == "open":
            path, mode, flags = args
            if isinstance(path, str) and (flags & WRITES if mode is None else mode.strip("rbt")):
                self.count("open", path)
        elif event in CALLS:
            self.count(event, os.fspath(args[1] if event == "os.rename" else args[0]))

    def count(self, call: str, path: str) -> None:
        """Count a call that changes a file, and die where it is due."""
        path = os.path.realpath(path)
        name = os.path.relpath(path, self.folder)
        if name.startswith(("..", "tensorboard")):
            return
        self.names.append(f"{call} {name}")
        if len(self.names) == self.fatal:
            die()


def forked(what: Callable[[], object]) -> int:
    """Call a function in a child process and return its exit code; a signal is negative."""
    child = os.fork()
    if not child:
        code = 1
        try:
            what()
            code = 0
        except InputError as error:
            print(error, file=sys.stderr)
            code = 2
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return end(child)


def stopped(recipe: Recipe, folder: Path, step: int) -> None:
    """Train to a step of the main leg, and stop there with a checkpoint."""

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        train.run(recipe, folder, device="cpu", watch=watch)
    except train.Interrupted:
        return
    raise AssertionError("the run was not stopped")


class Trials:
    """A run that was stopped after two thirds, and what it ends as if nothing kills it.

    Args:
        folder: Where everything is written; empty.
        recipe: What is trained; two trainings of it are bitwise the same.
        step: Where it was stopped.
    """

    def __init__(self, folder: Path, recipe: Recipe, step: int = STOP) -> None:
        torch.set_num_threads(1)
        self.folder, self.recipe = folder, recipe
        self.base, self.whole, self.tried = (folder / name for name in ("base", "whole", "tried"))
        assert forked(lambda: train.run(self.recipe, self.whole, device="cpu")) == 0
        assert forked(lambda: stopped(self.recipe, self.base, step)) == 0

    def resume(self, before: Callable[[], object] = lambda: None) -> int:
        """Resume the run that is tried, in a child process that calls ``before`` first."""

        def go_on() -> None:
            before()
            resume = (self.tried / "recipe.json").exists()
            train.run(self.recipe, self.tried, device="cpu", resume=resume)

        return forked(go_on)

    def begin(self) -> None:
        """Put a fresh copy of the stopped run where it is tried."""
        shutil.rmtree(self.tried, ignore_errors=True)
        shutil.copytree(self.base, self.tried)

    def calls(self) -> list[str]:
        """Return the calls that the rest of the run makes, each with its file."""
        self.begin()
        listed = self.folder / "calls.json"

        def count() -> None:
            calls = Calls(self.tried, 0)
            train.run(self.recipe, self.tried, device="cpu", resume=True)
            listed.write_text(json.dumps(calls.names))

        assert forked(count) == 0
        self.check("nothing killed it")
        names: list[str] = json.loads(listed.read_text())
        return names

    def killed_before(self, *calls: int) -> None:
        """Kill the run before the call with each of these numbers, in turn; resume it; compare."""
        self.begin()
        for call in calls:
            code = self.resume(lambda call=call: Calls(self.tried, call))  # type: ignore[misc]
            assert code in (-signal.SIGKILL, 0), f"killed before {calls}: it ended with {code}"
        assert self.resume() == 0, f"killed before {calls}: it cannot be resumed"
        self.check(f"killed before {calls}")

    def limited(self, size: int, kill: bool) -> None:
        """Let no file of the run become larger than ``size`` bytes; resume it; compare.

        The write that reaches the limit writes a part. The next one kills the process, or fails as
        on a full disk, which has to end the run with a sentence.
        """

        def limit() -> None:
            if kill:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        self.begin()
        code = self.resume(limit)
        assert code in (-signal.SIGXFSZ if kill else 2, 0), f"{size} bytes: it ended with {code}"
        assert self.resume() == 0, f"limited to {size} bytes: it cannot be resumed"
        self.check(f"limited to {size} bytes")

    def check(self, what: str) -> None:
        """Assert that the run that was tried ended as the one that nothing interrupted."""
        try:
            assert_same_run(self.whole, self.tried)
        except AssertionError:
            raise AssertionError(f"{what}: it ended differently") from None


def points(calls: Sequence[str], stride: int) -> list[int]:
    """Return every ``stride``-th call, and those that put the last save of the result in place."""
    moves = [n for n, call in enumerate(calls, 1) if call.startswith("os.rename pair/")]
    return sorted({*range(stride, len(calls) + 1, stride), *moves[-2:]})


def main() -> None:
    """Try every point; print the calls, those that were tried, and what went wrong."""
    folder, settings, stride = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    trials = Trials(folder, tiny(**settings))
    calls = trials.calls()
    tried, wrong = points(calls, stride), []
    random.shuffle(tried)
    for call in tried:
        try:
            trials.killed_before(call)
        except AssertionError as error:
            wrong.append(f"{calls[call - 1]}: {error}")
    print(json.dumps({"calls": calls, "tried": len(tried), "wrong": wrong}))


if __name__ == "__main__":
    main()
