"""The cells of a grid, and the run of each cell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from acdc.compare.grid import Budget, Candidate, Grid
from acdc.errors import AcdcError
from acdc.methods.dense import Dense
from acdc.runs.recipe import Recipe, encode, label
from acdc.schedule import Constant


@dataclass(frozen=True)
class Cell:
    """One cell of a grid.

    Args:
        method: Name of the method in the grid; ``"dense"`` for dense training beforehand.
        sparsity: Asked fraction of zeros.
        seed: Of the run.
        budget: What decides its length; ``"beforehand"``: a dense network that other cells start
            from.
        epochs: Of dense training beforehand; 0 for all other cells.
    """

    method: str
    sparsity: float
    seed: int
    budget: Budget | Literal["beforehand"] = "epochs"
    epochs: int = 0

    def __str__(self) -> str:
        what = f"{self.method} {100 * self.sparsity:g} %" if self.sparsity else self.method
        more = {
            "epochs": "",
            "flops": ", equal FLOPs",
            "seconds": ", equal seconds",
            "beforehand": f", {self.epochs} epochs",
        }
        return f"{what}, seed {self.seed}{more[self.budget]}"


@dataclass(frozen=True)
class Prepared:
    """The run of a cell.

    Args:
        cell: The cell.
        recipe: The recipe; ``recipe.start`` names the folder of ``before``.
        changed: Values that differ from the task's dense run, path → value as text.
        label: Name of its folder: that of the grid, and the hash of ``changed``.
        before: The run that it starts from.
    """

    cell: Cell
    recipe: Recipe
    changed: dict[str, str]
    label: str
    before: Prepared | None = None

    @property
    def epochs(self) -> int:
        """Epochs of the cell, those beforehand included."""
        return self.recipe.epochs + (self.before.epochs if self.before else 0)


def cells(grid: Grid) -> Iterator[Cell]:
    """Yield the cells of a grid, all methods of one seed and sparsity next to each other."""
    for budget in grid.budgets:
        for seed in grid.seeds:
            seen = set()
            for sparsity in grid.sparsities:
                for method in grid.methods:
                    for own in method.sparsities or (sparsity,):
                        cell = Cell(method.name, own, seed, budget)
                        if cell not in seen:
                            seen.add(cell)
                            yield cell


def measured_cell(grid: Grid, cell: Cell) -> Cell:
    """Return the cell of equal epochs whose measured cost decides the length of this one."""
    return replace(cell, budget="epochs", seed=grid.seeds[0])


def dense_cell(grid: Grid) -> Cell:
    """Return the cell whose measured seconds are the budget of all."""
    return Cell("dense", (grid.method("dense").sparsities or (0.0,))[0], grid.seeds[0])


def epochs_at_equal_cost(grid: Grid, ratio: float) -> int:
    """Return the epochs in which a method costs as much as the task's dense run.

    Args:
        grid: The grid.
        ratio: The method's cost over that of the dense run, for the same epochs: training FLOPs, or
            seconds.

    >>> from types import SimpleNamespace as Like
    >>> grid = Like(task=Like(epochs=100), longest=5.0)
    >>> [epochs_at_equal_cost(grid, ratio) for ratio in (1.0, 0.4173, 0.02)]  # RigL ERK 80 %
    [100, 240, 500]
    """
    most = int(grid.longest * grid.task.epochs)
    return max(1, min(most, round(grid.task.epochs / ratio)))


def base_recipe(grid: Grid) -> Recipe:
    """Return the task's recipe under the name of the grid, before a method changes it."""
    return replace(grid.task.recipe, name=grid.name)


def prepare(grid: Grid, cell: Cell, epochs: int) -> Prepared:
    """Return the run of a cell.

    Args:
        grid: The grid.
        cell: One of its cells.
        epochs: Length of the cell, dense training beforehand included.

    Raises:
        InputError: The method cannot train this cell.
    """
    if cell.budget == "beforehand":
        candidate = Candidate(Dense(Constant(cell.epochs)))
    else:
        build = grid.method(cell.method).build
        candidate = build(grid.task, cell.sparsity, epochs, cell.seed)
    before = None
    if candidate.dense_epochs:
        first = Cell("dense", 0.0, cell.seed, "beforehand", candidate.dense_epochs)
        before = prepare(grid, first, candidate.dense_epochs)
    base = base_recipe(grid)
    recipe = replace(
        base,
        method=candidate.method,
        seed=cell.seed,
        start=before.label if before else base.start,
        **candidate.changes,
    )
    changed = differences(encode(base), encode(recipe))
    return Prepared(cell, recipe, changed, label(grid.name, changed), before)


def explain(error: Exception) -> str:
    """Return an error as a sentence; an unexpected error with the name of its type."""
    return str(error) if isinstance(error, AcdcError) else f"{type(error).__name__}: {error}"


def differences(old: Any, new: Any, path: str = "") -> dict[str, str]:
    """Return the values in which an encoded recipe differs from another, path → text.

    >>> differences({"a": 1, "b": {"type": "X", "c": 2}}, {"a": 1, "b": {"type": "X", "c": 3}})
    {'b.c': '3'}
    >>> differences({"b": {"type": "X", "c": 2}}, {"b": {"type": "Y", "d": 3}})
    {'b': 'Y', 'b.d': '3'}
    """
    if not isinstance(new, dict):
        return {} if old == new else {path: _text(new)}
    found: dict[str, str] = {}
    old = old if isinstance(old, dict) else {}
    if old.get("type") != new.get("type"):
        old, found = {}, {path: str(new.get("type"))}
    for key, value in new.items():
        if key != "type" and (key not in old or old[key] != value):
            found |= differences(old.get(key, _NOTHING), value, f"{path}.{key}".lstrip("."))
    return found


_NOTHING = object()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
