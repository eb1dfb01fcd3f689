"""The study of memorisation: accuracy on random labels, and on the true ones of the same images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acdc.errors import InputError
from acdc.pages.history import Run, read
from acdc.schedule import Phase

Json = dict[str, Any]


def study(paths: Sequence[Path]) -> Json:
    """Return everything that the page shows.

    Args:
        paths: Runs on data with random labels.

    Raises:
        InputError: A folder is not that of a run, or its data has no random labels.
    """
    return {"runs": [_run(path) for path in paths]}


def _run(path: Path) -> Json:
    run = read(path)
    evals = [event for event in run.evals if "random_accuracy" in event]
    if not evals or run.schedule is None:
        raise InputError(
            f"{path} has no evaluation on random labels. Train a run with random labels, such as "
            f"--set data.random_labels=1000 of a recipe on CIFAR-10."
        )
    data = run.recipe["values"].get("data") or {}
    return {
        "run": path.absolute().name,
        "sparsity": _sparsity(run),
        "labels": data.get("random_labels"),
        "phases": [
            [p.kind, *map(float, run.epochs([p.start, p.stop]))] for p in run.schedule.phases
        ],
        "epochs": [float(epoch) for epoch in run.epochs([event["step"] for event in evals])],
        "kinds": [event["phase"] for event in evals],
        "random": [event["random_accuracy"] for event in evals],
        "true": [event["true_accuracy"] for event in evals],
        "test": [event["accuracy"] for event in evals],
        "ends": _ends(run, evals),
    }


def _sparsity(run: Run) -> float:
    """Return the sparsity of the last support; 0 for a run that was dense throughout."""
    if not run.compressions or not run.prunable:
        return 0.0
    return 1 - int(run.compressions[-1]["nnz"]) / run.prunable


def _ends(run: Run, evals: Sequence[Json]) -> list[Json]:
    """Return the last evaluation of each phase that has one."""
    assert run.schedule is not None

    def last(phase: Phase) -> Json | None:
        inside = [event for event in evals if phase.start < event["step"] <= phase.stop]
        return inside[-1] if inside else None

    return [
        {
            "kind": phase.kind,
            "epoch": float(run.epochs([event["step"]])[0]),
            "random": event["random_accuracy"],
            "true": event["true_accuracy"],
            "test": event["accuracy"],
        }
        for phase in run.schedule.phases
        if (event := last(phase)) is not None
    ]
