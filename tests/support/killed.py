"""A program that trains, is killed and resumed many times, and then trains to the end.

It is a process of its own, which forks one child for each attempt: a child costs no imports, and no
thread of the test process is in it. Called by ``test_train.py`` with the folder of the run, the
settings and the list of deaths as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from acdc.files import Staging
from acdc.pair import Pair
from acdc.runs import record, train
from acdc.runs.recipe import Recipe
from support.runs import tiny


def die() -> None:
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def attempt(recipe: Recipe, folder: Path, death: dict[str, Any] | None) -> None:
    """Train in a child process, and die at the given moment."""
    moment = (death or {}).get("at")
    if moment == "rename":  # the n-th set of files is written, and not yet in place
        commit, left = Staging.commit, [death["count"]]

        def commit_or_die(self: Staging) -> None:
            left[0] -= 1
            if not left[0]:
                die()
            commit(self)

        Staging.commit = commit_or_die
    elif moment == "paired":  # the n-th pair is saved, and nothing after it
        save, left = Pair.save, [death["count"]]

        def save_and_die(self: Pair, target: Path) -> Path:
            saved = save(self, target)
            left[0] -= 1
            if not left[0]:
                die()
            return saved

        Pair.save = save_and_die
    elif moment in ("record", "recorded"):  # before the record is there, and after
        write = record.Folder.write

        def write_or_die(self: record.Folder, file: Path, data: Any) -> None:
            if file.name == "record.json" and moment == "record":
                die()
            write(self, file, data)
            if file.name == "record.json":
                die()

        record.Folder.write = write_or_die

    def watch(event: dict[str, Any]) -> None:
        if moment == "event" and all(event.get(k) == v for k, v in death["like"].items()):
            die()

    train.run(recipe, folder, resume=(folder / "recipe.json").exists(), device="cpu", watch=watch)


def start(recipe: Recipe, folder: Path, death: dict[str, Any] | None) -> int:
    """Begin an attempt in a child process and return the number of the process."""
    child = os.fork()
    if not child:
        attempt(recipe, folder, death)
        os._exit(0)
    return child


def end(child: int) -> int:
    """Wait for a child process and return its exit code; a signal is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def seconds(recipe: Recipe, folder: Path) -> float:
    """Return how long an attempt takes that nothing interrupts."""
    began = time.monotonic()
    assert end(start(recipe, folder, None)) == 0
    return time.monotonic() - began


def main() -> None:
    """Die every death, in order, then train to the end; print how each attempt ended.

    The moment of a death ``{"at": "time", "between": (a, b)}`` is a random share, from a to b, of
    the time that a whole run takes on this machine now.
    """
    folder, settings, deaths = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    recipe = tiny(**settings)
    timed = any(death["at"] == "time" for death in deaths)
    whole = seconds(recipe, folder.with_name(f"{folder.name}-timed")) if timed else 0.0
    ends = []
    for death in [*deaths, None]:
        child = start(recipe, folder, death)
        if death is not None and death["at"] == "time":
            time.sleep(random.uniform(*death["between"]) * whole)
            os.kill(child, signal.SIGKILL)
        ends.append(end(child))
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
