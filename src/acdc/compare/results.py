"""The results of a grid: a row for every finished cell, and a reason for every other cell.

A row replaces its run when the run's folder is gone. It names its origin, and ``origins.json``
describes each origin: the task, the data, the machine. So a grid whose results were copied or
committed trains the missing cells only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from acdc.compare.cells import Cell, Prepared
from acdc.compare.grid import Grid, Task
from acdc.errors import InputError
from acdc.files import Staging, latest
from acdc.runs.recipe import Recipe, complete, encode
from acdc.runs.record import Folder, bits
from acdc.runs.shapes import check_compared
from acdc.schema import (
    COUNT,
    POSITIVE,
    SECONDS,
    SHARE,
    Each,
    Maybe,
    Misfit,
    Number,
    check,
    parse,
)

Json = dict[str, Any]
Quality = Literal["accuracy", "bits"]

NOT_YET = "Not trained yet."


@dataclass(frozen=True)
class Outcome:
    """The outcome of a cell.

    Args:
        cell: The cell.
        row: Its results; ``None`` for a failed cell, and for a cell that is not trained yet.
        reason: Why there are no results.
        run: Its run, if it is known.
        origin: What was trained, and on what: :func:`origin`.
    """

    cell: Cell
    row: Json | None = None
    reason: str = ""
    run: Prepared | None = None
    origin: Json | None = None


def row(task: Task, origin: Json, run: Prepared, record: Json, before: Json | None) -> Json:
    """Return the results of a finished cell.

    Training FLOPs are those of the sparse network, what was trained beforehand included, as a share
    of the task's dense run of ``task.epochs`` epochs. Seconds are the measured steps and the
    building of the engine, without evaluation and without the fine-tuning of a dense twin; what was
    trained beforehand is included, too. ``cpu_seconds`` are those of the processors: cells that are
    trained side by side, or beside other work, wait for one another, and wall time counts that.

    Args:
        task: What was trained.
        origin: What the row names as its origin: :func:`origin`.
        run: The run.
        record: Its record.
        before: The record of the run that it started from.

    Raises:
        InputError: A number is out of the bounds that :func:`read` accepts. A record that was
            altered gives such numbers, and a text network whose loss on the test data is infinite.
    """
    cell, parts = run.cell, [record] if before is None else [before, record]
    found = {
        "method": cell.method,
        "sparsity": cell.sparsity,
        "seed": cell.seed,
        "sparse_quality": judged(task, record["sparse"]) if record["sparse"] else None,
        "dense_quality": judged(task, record["dense"]) if record["dense"] else None,
        "train_flops_ratio": sum(map(_spent, parts)) / _dense_run(task, record),
        "inference_flops_ratio": record["inference_flops_ratio"],
        "seconds": round(sum(map(_seconds, parts)), 3),
        "cpu_seconds": round(sum(part["details"]["time"]["cpu"] for part in parts), 3),
        "budget": cell.budget,
        "epochs": run.epochs,
        "sparsity_reached": record["sparse"]["sparsity"] if record["sparse"] else 0.0,
        "beforehand": run.before.label if run.before else None,
        "cell": run.label,
        "prunable": record["details"]["prunable"],
        "finished": record["details"]["finished"],
        "origin": digest(origin),
    } | _warned(parts)
    try:
        _check_row(found)
    except Misfit as error:
        raise InputError(
            f"The results of {run.label} are out of bounds ({error}). Its network diverged, or its "
            f"record.json was altered. Remove the file: the run writes it anew."
        ) from error
    return found


def record_in(folder: Folder) -> Json:
    """Return the record of a run, with everything that :func:`row` and :func:`origin` read.

    Raises:
        InputError: The record is damaged, or of a version that did not write all of that.
    """
    record = folder.read(folder.record)
    try:
        check_compared(record)
    except Misfit as error:
        raise InputError(
            f"{str(folder.record)!r} lacks what a comparison shows ({error}). Remove the file: the "
            f"run writes it anew."
        ) from error
    return record


def origin(base: Recipe, record: Json) -> Json:
    """Return an origin: the task, the data, the machine and the versions that rows share.

    Args:
        base: The task's recipe, from :func:`~acdc.compare.cells.base_recipe`.
        record: The record of a run.
    """
    details = record["details"]
    shared = ("data", "device", "machine", "versions", "command")
    return {"task": encode(base)} | {name: details[name] for name in shared}


def digest(origin: Json) -> str:
    """Return the short name of an origin."""
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:8]


def judged(task: Task, evaluation: Json) -> float:
    """Return test accuracy in percent, or minus the bits per character of the test text."""
    if quality(task) == "bits":
        return -bits(float(evaluation["loss"]))
    return float(evaluation["accuracy"])


def seconds(row: Json, origin: Json | None) -> float:
    """Return the processor time of a cell on a CPU, and the wall time on another device."""
    on_cpu = origin is None or origin["device"] == "cpu"
    return float(row["cpu_seconds" if on_cpu else "seconds"])


def quality(task: Task) -> Quality:
    """Return how networks of this task are judged."""
    return task.recipe.data.quality


def _spent(record: Json) -> int:
    return int(record["details"]["train_flops"])


def _warned(records: Iterable[Json]) -> Json:
    """Return the warnings of runs as a field of a row, if there are any."""
    warnings = [
        f"Step {warning['step']}: {warning['text']}"
        for record in records
        for warning in record["details"].get("warnings") or ()
    ]
    return {"warnings": warnings} if warnings else {}


def _dense_epoch(record: Json) -> float:
    details = record["details"]
    return int(details["train_flops_dense"]) / int(details["epochs"])


def _dense_run(task: Task, record: Json) -> float:
    return task.epochs * _dense_epoch(record)


def _seconds(record: Json) -> float:
    time = record["details"]["time"]
    return float(time["dense"] + time["sparse"] + time["engine"])


# What is read of a row and of an origin.
_QUALITY = Number(float, -1e6, 1e6)
_ROW = {
    **dict.fromkeys(("method", "cell", "origin", "finished"), str),
    "sparsity": SHARE,
    "seed": int,
    "sparse_quality": Maybe(_QUALITY),
    "dense_quality": Maybe(_QUALITY),
    # The length of a run of equal FLOPs is divided by it.
    "train_flops_ratio": Number(float, 1e-9, 1e9),
    "inference_flops_ratio": Number(float, 0, 1e9),
    "seconds": SECONDS,
    "cpu_seconds": SECONDS,
    "epochs": POSITIVE,
    "sparsity_reached": SHARE,
    "prunable": COUNT,
    "warnings?": [str],
}
_ORIGIN = {
    "task": dict,
    **dict.fromkeys(("data", "device", "command"), str),
    **dict.fromkeys(("machine", "versions"), dict),
}


def _check_row(row: Any) -> None:
    """See that a value is a row of the results.

    Raises:
        Misfit: It is none.
    """
    check(row, _ROW, "it")
    if row["sparse_quality"] is row["dense_quality"] is None:
        raise Misfit("sparse_quality and dense_quality are both null")


# --- files --------------------------------------------------------------------------------------


def write(folder: Path, outcomes: Iterable[Outcome]) -> None:
    """Write ``origins.json``, ``results.jsonl`` and ``failed.jsonl``, each whole or not at all.

    Raises:
        InputError: The disk is full, or the folder cannot be written.
    """
    outcomes = list(outcomes)
    rows = [o.row for o in outcomes if o.row is not None and o.cell.budget != "beforehand"]
    failed = [failure(o) for o in outcomes if o.row is None]
    origins = {o.row["origin"]: o.origin for o in outcomes if o.row is not None}
    with Staging(folder, "the results") as staging:
        staging.add("origins.json", (json.dumps(origins, indent=1) + "\n").encode())
        staging.add("results.jsonl", _lines(rows))
        staging.add("failed.jsonl", _lines(failed))
        staging.commit()


def read(folder: Path, base: Recipe) -> dict[str, tuple[Json, Json]]:
    """Return the rows that can replace their runs, by the label of the run, each with its origin.

    Rows are used only if their task's recipe, with defaults filled in, equals this one. Rows that
    name no origin, as older versions wrote them, are left out.

    Args:
        folder: Of the grid.
        base: The task's recipe, from :func:`~acdc.compare.cells.base_recipe`.

    Raises:
        InputError: A file is there and cannot be read.
    """
    results, origins = latest(folder / "results.jsonl"), latest(folder / "origins.json")
    if not (results.exists() and origins.exists()):
        return {}
    try:
        with _named(origins):
            known = parse(origins.read_bytes())
            check(known, Each(str, _ORIGIN), "it")
        same = {name for name, one in known.items() if complete(one["task"]) == encode(base)}
        found = {}
        for number, line in enumerate(results.read_bytes().splitlines(), 1):
            with _named(f"{results.name}, line {number}"):
                row = parse(line)
                check(row, {"origin?": str}, "it")
                if row.get("origin") in same:
                    _check_row(row)
                    found[row["cell"]] = (row, known[row["origin"]])
        return found
    except (OSError, Misfit) as error:
        raise InputError(
            f"The results in {folder} cannot be read ({error}). Restore {results.name} and "
            f"{origins.name} from a copy, or choose another folder with --out."
        ) from error


@contextmanager
def _named(where: object) -> Iterator[None]:
    """Put the place into the message of what cannot be read.

    Raises:
        Misfit: The value there is no JSON, or has another shape.
    """
    try:
        yield
    except ValueError as error:  # a Misfit is one
        raise Misfit(f"{where}: {error}") from error


def failure(outcome: Outcome) -> Json:
    """Return the line of ``failed.jsonl`` for a cell without results."""
    cell = outcome.cell
    return {
        "method": cell.method,
        "sparsity": cell.sparsity,
        "seed": cell.seed,
        "budget": cell.budget,
        "reason": outcome.reason,
        "cell": outcome.run.label if outcome.run else None,
    }


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def needs(grid: Grid, outcomes: Iterable[Outcome]) -> dict[str, Json]:
    """Return the epochs and the cost of that network, for each method that starts from a dense one.

    The cost is a share of the task's dense training FLOPs, exact for whole epochs.
    """
    found: dict[str, Json] = {}
    for outcome in outcomes:
        run = outcome.run
        if run is not None and run.before is not None and run.cell.budget == "epochs":
            epochs = run.before.epochs
            found[run.cell.method] = {"epochs": epochs, "ratio": epochs / grid.task.epochs}
    return found
