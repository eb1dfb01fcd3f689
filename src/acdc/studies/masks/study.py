"""The study of the supports of a run: how much changes, what stays, and what comes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acdc.errors import InputError
from acdc.pages.history import Run, read
from acdc.runs.record import Folder, events
from acdc.runs.supports import saved

Json = dict[str, Any]
Masks = Sequence[Mapping[str, Tensor]]


def study(path: Path) -> Json:
    """Return everything that the page shows.

    Raises:
        InputError: The folder is not that of a run, or the run kept fewer than two supports.
    """
    run, folder = read(path), Folder(path)
    found = saved(folder, _shapes(run))
    if len(found) < 2:
        raise InputError(
            f"{path} holds {len(found)} supports, and this study compares two at least. Train the "
            f"run with --set supports=true, by a method that compresses more than once."
        )
    steps, masks = [step for step, _ in found], [support for _, support in found]
    layers = list(masks[0])
    return {
        "run": str(run.recipe.get("name", path.name)),
        "steps": steps,
        "epochs": [float(epoch) for epoch in run.epochs(steps)],
        "phases": [[p.kind, *map(float, run.epochs([p.start, p.stop]))] for p in _phases(run)],
        "numel": masks[0].numel,
        "whole": dynamics(masks),
        "layers": {name: dynamics([{name: mask[name]} for mask in masks]) for name in layers},
        "norms": _norms(folder, steps[1:], layers),
    }


def _shapes(run: Run) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that were pruned, in order."""
    counts: Json = next((c["counts"] for c in run.compressions if c["counts"]), {})
    shapes = {layer.name: layer.shape for layer in run.layers}
    if missing := [name for name in counts if name not in shapes]:
        raise InputError(f"The run did not record the shape of {missing[0]}. Train it again.")
    return {name: shapes[name] for name in counts}


def _phases(run: Run) -> Sequence[Any]:
    return () if run.schedule is None else run.schedule.phases


def dynamics(masks: Masks) -> Json:
    """Return how supports of the same weights follow one another.

    Args:
        masks: The supports, in order: name -> bool tensor.

    Returns:
        ``kept``: weights of each support. ``entered``: for each support but the first, the share of
        its weights that the one before did not keep. ``first`` and ``last``: the share of each
        support that the first and the last one keep, too. ``always`` and ``ever``: weights in all
        supports, and in one at least. ``returns``: for each number of times that a weight left and
        came back, how many of the weights that were ever kept did so.
    """
    rows = [torch.cat([mask.flatten().cpu() for mask in support.values()]) for support in masks]
    kept = [int(row.sum()) for row in rows]
    every = torch.stack(rows)
    count = every.sum(0)
    entries = (every[1:] & ~every[:-1]).sum(0) + every[0].long()
    returns = Counter((entries[count > 0] - 1).tolist())
    return {
        "kept": kept,
        "entered": [_share(two & ~one, two) for one, two in pairwise(rows)],
        "first": [_share(row & rows[0], row) for row in rows],
        "last": [_share(row & rows[-1], row) for row in rows],
        "always": int((count == len(rows)).sum()),
        "ever": int((count > 0).sum()),
        "returns": {str(times): returns[times] for times in sorted(returns)},
    }


def _share(part: Tensor, whole: Tensor) -> float:
    total = int(whole.sum())
    return int(part.sum()) / total if total else 0.0


def _norms(folder: Folder, steps: Sequence[int], layers: Sequence[str]) -> list[Json]:
    """Return, for each compression but the first, the size of weights that came back.

    Sizes are root mean squares after the cut: of the weights that the support before did not keep,
    and of the others.
    """
    recorded = {
        e["step"]: e["layers"] for e in events(folder.metrics)[0] if e["event"] == "revived"
    }
    return [
        {"step": step, "layers": {name: recorded[step].get(name) for name in layers}}
        for step in steps
        if step in recorded
    ]
