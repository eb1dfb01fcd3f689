"""Differences between methods on the same seeds, with intervals.

Two methods that are trained with one seed start from the same weights and see the same batches, so
their difference varies less than either of them. The interval is that of Student's t for the mean
of the differences, one for each seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from acdc.compare.grid import Budget, Grid
from acdc.compare.results import Outcome
from acdc.errors import need
from acdc.index import Twin

LEVEL = 0.95


@dataclass(frozen=True)
class Paired:
    """One network minus another one, for each seed that both have.

    Args:
        method: Name of the method.
        twin: Which of its networks.
        baseline: Name of the method that it is compared with.
        of_baseline: Which of the baseline's networks.
        sparsity: The sparsity asked for.
        budget: Unit of the length of the runs.
        differences: Quality minus the baseline's, in the order of the seeds.
    """

    method: str
    twin: Twin
    baseline: str
    of_baseline: Twin
    sparsity: float
    budget: Budget
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean difference."""
        return fmean(self.differences)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean difference; ``None`` for one seed."""
        half = half_width(self.differences)
        return None if half is None else (self.mean - half, self.mean + half)


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the 95 % interval of a mean; ``None`` for one value.

    >>> round(half_width([1.0, 2.0, 3.0]), 3)  # 4.303 standard errors for three values
    2.484

    Raises:
        MissingDependency: scipy is not installed.
    """
    if len(values) < 2:
        return None
    try:
        from scipy.special import stdtrit
    except ImportError as error:
        raise need("scipy", "lab") from error
    times = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2))
    return times * stdev(values) / math.sqrt(len(values))


def against_baseline(grid: Grid, outcomes: Iterable[Outcome]) -> list[Paired]:
    """Return the sparse network of each method minus that of the grid's baseline.

    Sparsities are compared one by one. Without a baseline there is nothing.
    """
    if grid.baseline is None:
        return []
    found = _qualities(outcomes)
    return [
        Paired(method, "sparse", grid.baseline, "sparse", sparsity, budget, differences)
        for (budget, sparsity, method, twin), mine in found.items()
        if twin == "sparse" and method != grid.baseline
        if (differences := _minus(mine, found.get((budget, sparsity, grid.baseline, "sparse"), {})))
    ]


def against_dense(grid: Grid, outcomes: Iterable[Outcome]) -> list[Paired]:
    """Return each dense twin minus each network that was trained dense.

    Without a baseline there is nothing.
    """
    if grid.baseline is None:
        return []
    found = _qualities(outcomes)
    twins = {(b, s, m) for b, s, m, twin in found if twin == "sparse"}
    return [
        Paired(method, "dense", other, "dense", sparsity, budget, differences)
        for (budget, sparsity, method, twin), mine in found.items()
        if twin == "dense" and (budget, sparsity, method) in twins
        for (other_budget, other_sparsity, other, other_twin), theirs in found.items()
        if (other_budget, other_sparsity, other_twin) == (budget, 0.0, "dense")
        if (differences := _minus(mine, theirs))
    ]


_Key = tuple[Budget, float, str, Twin]


def _qualities(outcomes: Iterable[Outcome]) -> dict[_Key, dict[int, float]]:
    """Return the quality of every network of the cells, by seed."""
    found: dict[_Key, dict[int, float]] = {}
    for outcome in outcomes:
        cell, row = outcome.cell, outcome.row
        if row is None or cell.budget == "beforehand":
            continue
        twins: tuple[Twin, ...] = ("sparse", "dense")
        for twin in twins:
            value = row[f"{twin}_quality"]
            if value is not None:
                key = cell.budget, cell.sparsity, cell.method, twin
                found.setdefault(key, {})[cell.seed] = float(value)
    return found


def _minus(mine: dict[int, float], theirs: dict[int, float]) -> tuple[float, ...]:
    return tuple(mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys()))
