"""The inequalities of a path: each function returns by how much the worst one is kept.

A margin is what the bound allows minus what was measured, relative to the scale of the problem. It
is negative where an inequality is broken by more than rounding.
"""

from __future__ import annotations

from itertools import pairwise

from acdc.studies.convergence import bounds
from acdc.studies.convergence.paths import Point, Walk, cuts, gaps
from acdc.studies.convergence.problems import Problem

ROUNDING = 1e-12  # of the largest value of f: sums of float64


def descent(problem: Problem, how: Walk, points: list[Point], smooth: float) -> float:
    """Return the worst margin of T0 over the steps of IHT.

    Args:
        problem: What was minimised.
        how: How.
        points: The path.
        smooth: β.
    """
    steps = [points[0], *cuts(points)]
    scale = max(abs(point.value) for point in steps)
    if problem.best is None:
        steps = steps[1:]  # the first point of a network is dense
    margins = [
        one.value - bounds.fall(smooth, how.rate, _distance(one, two)) - two.value
        for one, two in pairwise(steps)
    ]
    return min(margins) / scale + ROUNDING


def truncation(problem: Problem, points: list[Point], smooth: float) -> float:
    """Return the worst margin of T0' over all cuts."""
    margins = [
        bounds.price(smooth, _slope(problem, one, two), _distance(one, two))
        - (two.value - one.value)
        for one, two in pairwise(points)
        if two.after == "cut"
    ]
    return min(margins) / max(abs(point.value) for point in points) + ROUNDING


def ratio(problem: Problem, points: list[Point]) -> float:
    """Return the largest factor of the gap from one cut to the next, T1 and T3.

    Gaps below rounding are left out.
    """
    found = gaps(problem, points)
    smallest = 1e-13 * abs(found[0])
    pairs = [(one, two) for one, two in pairwise(found) if one > smallest and two > smallest]
    return max((two / one for one, two in pairs), default=0.0)


def smoothness(problem: Problem, points: list[Point]) -> float:
    """Return the smallest β for which f is smooth along the moves of IHT, cut to cut."""
    found = 0.0
    for one, two in pairwise(cuts(points)):
        if moved := _distance(one, two):
            rise = two.value - one.value - _slope(problem, one, two)
            found = max(found, 2 * rise / moved)
    return found


def _distance(one: Point, two: Point) -> float:
    return float((two.weights - one.weights).square().sum())


def _slope(problem: Problem, one: Point, two: Point) -> float:
    return float(problem.gradient(one.weights) @ (two.weights - one.weights))
