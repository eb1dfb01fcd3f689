"""Paths through a problem: IHT, stochastic IHT and AC/DC, cut by the library's own sparsifier.

All three are AC/DC with phases of a few steps. A step of IHT is a dense phase of one step and the
cut after it. A phase has one step at least: the sparse phase of IHT is one step with the learning
rate 0, which moves nothing and is not part of the path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from acdc.methods.acdc import ACDC
from acdc.pattern import Unstructured
from acdc.random import stream
from acdc.schedule import Phase, Schedule
from acdc.sparsifier import Sparsifier
from acdc.studies.convergence.problems import Problem, flat

After = Literal["start", "dense", "cut", "masked"]


@dataclass(frozen=True)
class Point:
    """A point of a path: what came before it, its weights ``[N]``, and ``f`` there."""

    after: After
    weights: Tensor
    value: float


@dataclass(frozen=True)
class Walk:
    """How a path is walked.

    Args:
        kept: k: weights that are kept at each cut.
        rate: η: the learning rate.
        cycles: Number of cuts.
        dense: Steps of each dense phase.
        masked: Steps of each sparse phase; 0 with ``dense=1`` is IHT.
        noise: Standard deviation of normal noise in each entry of the gradient.
        seed: Seed of the noise.
    """

    kept: int
    rate: float
    cycles: int
    dense: int = 1
    masked: int = 0
    noise: float = 0.0
    seed: int = 0


def walk(problem: Problem, how: Walk) -> list[Point]:
    """Return the points of a path: the first one, and one after each step and each cut."""
    model = problem.build()
    numel = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=how.rate)
    method = ACDC(Unstructured(1 - how.kept / numel, floor=0), _schedule(how))
    sparsifier = Sparsifier(method, model, optimizer, automatic=False)
    draw = stream("gradient noise", how.seed)

    def point(after: After) -> Point:
        with torch.no_grad():
            return Point(after, flat(model), float(problem.loss(model)))

    points = [point("start")]
    for _ in range(sparsifier.schedule.total):
        sparse = sparsifier.phase.kind == "sparse"
        idle = sparse and not how.masked
        optimizer.param_groups[0]["lr"] = 0.0 if idle else how.rate
        optimizer.zero_grad()
        if not idle:
            problem.loss(model).backward()
        for p in model.parameters() if how.noise and not idle else ():
            assert p.grad is not None
            p.grad += how.noise * torch.randn(p.shape, generator=draw, dtype=p.dtype)
        optimizer.step()
        if not idle:
            points.append(point("masked" if sparse else "dense"))
        sparsifier.advance()
        if not sparse and sparsifier.phase.kind == "sparse":
            points.append(point("cut"))
    sparsifier.remove()
    return points


def _schedule(how: Walk) -> Schedule:
    length = how.dense + max(how.masked, 1)
    phases = [
        phase
        for start in range(0, how.cycles * length, length)
        for phase in (
            Phase("dense", start, start + how.dense),
            Phase("sparse", start + how.dense, start + length),
        )
    ]
    return Schedule(tuple(phases), (length,) * how.cycles)


def cuts(points: list[Point]) -> list[Point]:
    """Return the points after a cut."""
    return [point for point in points if point.after == "cut"]


def gaps(problem: Problem, points: list[Point]) -> list[float]:
    """Return f - f(θ*) at the first point and after each cut."""
    lowest = problem.lowest
    return [point.value - lowest for point in (points[0], *cuts(points))]


def recovered(problem: Problem, points: list[Point]) -> bool:
    """Return whether the k* largest weights of the last point are those of θ*."""
    assert problem.best is not None
    last = points[-1].weights.abs()
    chosen = torch.zeros(len(last), dtype=torch.bool)
    chosen[last.topk(problem.wanted).indices] = True
    return bool(torch.equal(chosen & (last > 0), problem.best != 0))
