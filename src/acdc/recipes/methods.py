"""A recipe for each method, on scikit-learn's digits: seconds to a minute, and no download.

Each recipe is a cell of the grid ``compare_digits``: the same network, data, optimizer and epochs,
with a method of the table ``acdc.recipes.grids.METHODS``. Every method of that table has a recipe.
A method that starts from a trained dense network trains it in the same run, before its sparse
phase.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from fractions import Fraction
from functools import partial
from typing import Any

from acdc.compare.grid import Candidate, GridMethod
from acdc.methods.base import Method
from acdc.recipes.grids import METHODS, compare_digits
from acdc.runs.recipe import Recipe
from acdc.schedule import phases


def _recipe(method: GridMethod) -> Recipe:
    grid = compare_digits()
    sparsity = (method.sparsities or grid.sparsities)[0]
    candidate = method.build(grid.task, sparsity, grid.task.epochs, 0)
    at = f" at {100 * sparsity:g} %" if sparsity else ""
    return replace(
        grid.task.recipe,
        name=f"digits_{method.name}",
        about=f"{method.label}{at} on digits, {grid.task.epochs} epochs, as in {grid.name}",
        method=_in_one_run(candidate),
        **candidate.changes,
    )


def _in_one_run(candidate: Candidate) -> Method[Any]:
    """Return the method with its dense training as the first phase of its plan.

    Durations that are shares of the method's run are shares of the sparse phase: in the whole run
    they become smaller.
    """
    method, before = candidate.method, candidate.dense_epochs
    if not before:
        return method
    epochs = before + method.schedule.epochs
    dense, sparse = Fraction(before, epochs), Fraction(epochs - before, epochs)
    shares = {
        field.name: _percent(sparse * Fraction(value[:-1]) / 100)
        for field in fields(method)  # type: ignore[arg-type]
        if isinstance(value := getattr(method, field.name), str) and value.endswith("%")
    }
    plan = phases(epochs, [("dense", _percent(dense)), ("sparse", _percent(sparse))])
    return replace(method, schedule=plan, **shares)  # type: ignore[type-var]


def _percent(share: Fraction) -> str:
    return f"{float(100 * share):g}%"


RECIPES: dict[str, Callable[[], Recipe]] = {
    f"digits_{method.name}": partial(_recipe, method) for method in METHODS
}
