"""What a run leaves behind: its folder, its metrics, its record.

=====================  ==================================================================
``recipe.json``        every value of the recipe, and which ones were changed
``metrics.jsonl``      one event a line: start, step, change, revived, engine, verdict, eval, ledger
``supports/``          the support of each compression, where the recipe asks for them
``checkpoint/``        ``last.ckpt``, and ``previous.ckpt``, the one before it
``pair/``              the trained networks and their index (:mod:`acdc.result`)
``record.json``        what came out, written last
``report.html``        the page
``tensorboard/``       the same numbers for TensorBoard, where the package is installed
=====================  ==================================================================
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from acdc import __version__
from acdc.errors import InputError
from acdc.index import Twin
from acdc.outfile import write
from acdc.processor import processor_name
from acdc.runs.shapes import check_event, check_recipe, check_record
from acdc.schema import Misfit, parse

Event = dict[str, Any]

# The entries of a record that 'acdc run --json' prints; the rest is in the record's "details".
SUMMARY = ("sparse", "dense", "inference_flops_ratio", "train_flops_ratio", "seconds", "run")


def bits(loss: float) -> float:
    """Return a cross-entropy in bits: what a character of a text takes, by this network."""
    return loss / math.log(2)


class Clocks(NamedTuple):
    """Seconds by the clock on the wall, and of the processors that this process was given.

    The second tells what a step costs where other work shares the machine.
    """

    wall: float = 0.0
    cpu: float = 0.0

    @classmethod
    def now(cls) -> Clocks:
        """Return both clocks. Only differences mean something."""
        return cls(time.perf_counter(), time.process_time())

    def plus(self, other: Clocks) -> Clocks:
        """Return the sum."""
        return Clocks(self.wall + other.wall, self.cpu + other.cpu)

    def minus(self, other: Clocks) -> Clocks:
        """Return the difference."""
        return Clocks(self.wall - other.wall, self.cpu - other.cpu)

    def event(self) -> Event:
        """Return them as an event holds them, in microseconds at the finest."""
        return {"seconds": round(self.wall, 6), "cpu_seconds": round(self.cpu, 6)}


@dataclass(frozen=True)
class Folder:
    """The folder of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        """Every value of the recipe."""
        return self.path / "recipe.json"

    @property
    def metrics(self) -> Path:
        """One event a line."""
        return self.path / "metrics.jsonl"

    @property
    def supports(self) -> Path:
        """The support of each compression."""
        return self.path / "supports"

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint."""
        return self.path / "checkpoint" / "last.ckpt"

    @property
    def previous_checkpoint(self) -> Path:
        """The checkpoint before the last one."""
        return self.checkpoint.with_name("previous.ckpt")

    @property
    def damaged_checkpoint(self) -> Path:
        """A checkpoint that could not be read when the run was resumed."""
        return self.checkpoint.with_name("damaged.ckpt")

    @property
    def result(self) -> Path:
        """The folder of the trained networks."""
        return self.path / "pair"

    @property
    def record(self) -> Path:
        """What came out."""
        return self.path / "record.json"

    @property
    def error(self) -> Path:
        """The traceback of an error that nobody expected, when a cell of a grid failed by it."""
        return self.path / "error.txt"

    def find(self, file: Path) -> dict[str, Any] | None:
        """Return one of the JSON files, or ``None`` if the run has not written it.

        Raises:
            InputError: The file is damaged.
        """
        try:
            data = parse(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise InputError(
                f"{str(file)!r} cannot be read: {error.strerror or error}. Check the path, the "
                f"disk and the permissions."
            ) from error
        except ValueError as error:
            raise _damaged(file, error) from error
        if not isinstance(data, dict):
            raise InputError(f"{str(file)!r} holds no JSON object. Is this the folder of a run?")
        try:
            (check_record if file == self.record else check_recipe)(data)
        except Misfit as error:
            raise _damaged(file, error) from error
        return data

    def read(self, file: Path) -> dict[str, Any]:
        """Return one of the JSON files.

        Raises:
            InputError: The file is missing or damaged.
        """
        data = self.find(file)
        if data is None:
            raise InputError(
                f"{self.path} is not the folder of a finished run: it has no {file.name}. Name "
                f"the folder that 'acdc run' printed, or finish the run with --resume."
            )
        return data

    def write(self, file: Path, data: Mapping[str, Any]) -> None:
        """Write one of the JSON files, as a whole or not at all."""
        write(file, (json.dumps(data, indent=1) + "\n").encode())


def _damaged(file: Path, error: ValueError) -> InputError:
    return InputError(
        f"{str(file)!r} is damaged ({error}). Restore the file from a copy. A damaged record.json "
        f"can be removed: the run writes it anew with --resume."
    )


class Metrics:
    """Appends events to ``metrics.jsonl``; a resumed run continues where its checkpoint was.

    Args:
        path: The file.
        size: Bytes that count, from the checkpoint; what was written after it is cut off, because
            the resumed run writes it again. A file that is shorter keeps its whole lines.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        whole = _whole_lines(path, size) if size else 0
        self.lost = size - whole  # bytes that the checkpoint knew, and that are no whole line now
        self._file = path.open("ab")
        self._file.truncate(whole)
        self._file.seek(whole)

    def write(self, event: Event) -> None:
        """Append one event."""
        self._file.write((json.dumps(event) + "\n").encode())

    def sync(self) -> int:
        """Return the size of the file, once every event in it is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


def _whole_lines(path: Path, size: int) -> int:
    """Return how many of the first ``size`` bytes of a file are whole lines."""
    try:
        with path.open("rb") as file:
            return file.read(size).rfind(b"\n") + 1
    except FileNotFoundError:
        return 0


def events(path: Path) -> tuple[list[Event], list[int]]:
    """Return the events of a run, and the numbers of the lines that are no events, from 1.

    A run that was killed may leave half a line at the end. A run without the file has no events.
    Every event has the shape that :mod:`acdc.runs.shapes` says.

    Raises:
        InputError: The file cannot be read at all.
    """
    found: list[Event] = []
    damaged: list[int] = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    event = parse(line)
                    check_event(event)
                except ValueError:  # a Misfit is one
                    damaged.append(number)
                else:
                    found.append(event)
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror or error}. Check the disk and its permissions."
        ) from error
    return found, damaged


def networks(record: Mapping[str, Any]) -> dict[Twin, dict[str, Any]]:
    """Return the numbers of the networks that a run left, from its record: one or two of them."""
    twins: tuple[Twin, ...] = ("sparse", "dense")
    return {twin: record[twin] for twin in twins if record[twin] is not None}


def times(path: Path) -> dict[str, float | None]:
    """Return where the seconds of a run went, from its metrics, and what a step took on average.

    A step is forward, loss, backward and the optimizer. What is not in it: loading of data,
    evaluation, building of the engine, checkpoints. ``cpu`` has the seconds of the processors for
    all steps and the building of the engine, but not for the fine-tuning of a dense twin.
    """
    seconds = dict.fromkeys(("dense", "sparse", "finetune", "evaluation", "engine"), 0.0)
    steps = {"dense": 0, "sparse": 0}
    parts = {"eval": "evaluation", "engine": "engine"}
    cpu = 0.0
    for event in events(path)[0]:
        taken = event.get("seconds", 0.0)
        if event["event"] == "step":
            part = "finetune" if "twin" in event else event["phase"]
            seconds[part] += taken
            if part in steps:
                steps[part] += 1
        elif event["event"] in parts:
            seconds[parts[event["event"]]] += taken
        if event["event"] in ("step", "engine") and "twin" not in event:
            cpu += event.get("cpu_seconds", 0.0)  # runs of older versions have none
    means = {
        f"{k}_step_ms": round(1e3 * seconds[k] / n, 3) if n else None for k, n in steps.items()
    }
    return {name: round(value, 3) for name, value in (seconds | {"cpu": cpu}).items()} | means


def peak_memory() -> int | None:
    """Return the most memory this process has held so far, in bytes, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Return what the figures were computed with."""
    from importlib.metadata import version

    names = ("torch", "lightning", "numpy", "safetensors")
    own = {"python": sys.version.split()[0], "acdc": __version__}
    return own | {name: version(name) for name in names}
