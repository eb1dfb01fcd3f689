"""The study: every bound on every seed, what breaks without its assumptions, and the figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from statistics import fmean
from typing import Any

from acdc.studies.convergence import bounds, checks
from acdc.studies.convergence.paths import Point, Walk, cuts, gaps, recovered, walk
from acdc.studies.convergence.problems import (
    Problem,
    conditioned,
    isotropic,
    logistic,
    network,
    toeplitz,
    two_weights,
)

Json = dict[str, Any]
Make = Callable[[int], Problem]  # from a seed
Watch = Callable[[str], None]

NUMEL, WANTED = 400, 4


def study(seed: int = 0, seeds: int = 20, watch: Watch = lambda _: None) -> Json:
    """Return everything that the page shows.

    Args:
        seed: The first seed.
        seeds: How many seeds there are: ``seed``, ``seed + 1``, and so on.
        watch: Called with the name of each part before it is computed.
    """
    chosen = range(seed, seed + seeds)
    parts: dict[str, Callable[[], Any]] = {
        "iht": lambda: [iht(make, chosen) for make in _IHT],
        "stochastic": lambda: [stochastic(_noisy, noise, chosen) for noise in (0.01, 0.1)],
        "floors": lambda: floors(seed),
        "cycles": lambda: [cycles(make, chosen) for make in _CYCLES],
        "violations": lambda: violations(seed),
        "paths": lambda: paths(seed),
        "recovery": lambda: recovery(chosen),
        "dense_phase": lambda: dense_phase(chosen),
        "network": lambda: small_network(seed),
    }
    found: Json = {"seed": seed, "seeds": seeds}
    for number, (name, part) in enumerate(parts.items(), start=1):
        watch(f"part {number} of {len(parts)}: {_TITLES[name]}")
        found[name] = part()
    return found


_TITLES = {
    "iht": "T0 and T1, IHT",
    "stochastic": "T2, stochastic IHT",
    "floors": "the floor of stochastic IHT",
    "cycles": "T0' and T3, AC/DC",
    "violations": "what breaks without an assumption",
    "paths": "the gap over steps",
    "recovery": "recovery of the support",
    "dense_phase": "the length of the dense phase",
    "network": "a small network",
}

# --- the bounds -----------------------------------------------------------------------------------

_IHT: tuple[Make, ...] = (
    lambda seed: conditioned(1.0, NUMEL, WANTED, seed),
    lambda seed: conditioned(1.5, NUMEL, WANTED, seed),
    lambda seed: conditioned(2.0, NUMEL, WANTED, seed),
    lambda seed: isotropic(40 * NUMEL, NUMEL, 2, seed),
    lambda seed: toeplitz(0.1, 40 * NUMEL, NUMEL, 2, seed),
    lambda seed: logistic(0.5, 4 * NUMEL, NUMEL, 2, seed),
)


def iht(make: Make, seeds: Iterable[int], steps: int = 20) -> Json:
    """Return T0 and T1 on every seed of a problem, k and η as T1 asks."""
    rows = []
    for seed in seeds:
        problem = make(seed)
        kept = bounds.iht_kept(problem.kappa, problem.wanted)
        how = Walk(kept, 1 / problem.smooth, steps)
        points = walk(problem, how)
        rows.append(
            {
                "seed": seed,
                "kappa": problem.kappa,
                "kept": kept,
                "bound": bounds.iht_rate(problem.kappa),
                "ratio": checks.ratio(problem, points),
                "descent": checks.descent(problem, how, points, problem.smooth),
                "recovered": recovered(problem, points),
            }
        )
    return {"problem": problem.name, "wanted": problem.wanted, "numel": NUMEL, "rows": rows}


def _noisy(seed: int) -> Problem:
    return conditioned(1.5, NUMEL, 2, seed)


def stochastic(
    make: Make, noise: float, seeds: Iterable[int], steps: int = 25, draws: int = 3
) -> Json:
    """Return T2 on every seed: the gap, its mean over draws of the noise, beside the bound."""
    rows = []
    for seed in seeds:
        problem = make(seed)
        kept = bounds.stochastic_kept(problem.kappa, problem.wanted)
        how = Walk(kept, 1 / (2 * problem.smooth), steps, noise=noise)
        runs = [gaps(problem, walk(problem, replace(how, seed=draw))) for draw in range(draws)]
        means = [fmean(values) for values in zip(*runs, strict=True)]
        allowed = stochastic_bounds(problem, noise, means)
        shares = [mean / bound for mean, bound in zip(means[1:], allowed[1:], strict=True)]
        row = {"seed": seed, "kept": kept, "worst": max(shares), "gaps": means, "bounds": allowed}
        rows.append(row)
    return {"problem": problem.name, "noise": noise, "steps": steps, "draws": draws, "rows": rows}


def stochastic_bounds(problem: Problem, noise: float, means: list[float]) -> list[float]:
    """Return the bound of T2 at the first point and after each step."""
    numel = 0 if problem.best is None else len(problem.best)
    variance = noise**2 * numel
    return [
        bounds.stochastic_gap(problem.kappa, problem.convex, variance, means[0], step)
        for step in range(len(means))
    ]


def floors(seed: int) -> list[Json]:
    """Return where stochastic IHT levels off, for two noises and three learning rates."""
    problem = isotropic(8 * NUMEL, NUMEL, WANTED, seed)
    found = []
    for share in (1.0, 0.5, 0.125):
        for noise in (0.003, 0.03):
            how = Walk(10 * WANTED, share / problem.smooth, 200, noise=noise)
            last = gaps(problem, walk(problem, how))[100:]
            found.append({"rate": share, "noise": noise, "floor": fmean(last) / noise**2})
    return found


_CYCLES: tuple[Make, ...] = (
    lambda seed: conditioned(2.0, NUMEL, WANTED, seed),
    lambda seed: conditioned(5.0, NUMEL, WANTED, seed),
)


def cycles(make: Make, seeds: Iterable[int], count: int = 10, masked: int = 5) -> Json:
    """Return T0' and T3 on every seed, with the shortest dense phase that T3 allows."""
    rows = []
    for seed in seeds:
        problem = make(seed)
        assert problem.best is not None
        kept = 4 * problem.wanted
        ratio = bounds.nu(kept, problem.wanted, len(problem.best))
        dense = bounds.dense_steps(problem.kappa, ratio)
        points = walk(problem, Walk(kept, 1 / problem.smooth, count, dense, masked))
        rows.append(
            {
                "seed": seed,
                "ratio": checks.ratio(problem, points),
                "truncation": checks.truncation(problem, points, problem.smooth),
                "recovered": recovered(problem, points),
            }
        )
    return {
        "problem": problem.name,
        "kappa": problem.kappa,
        "kept": kept,
        "nu": ratio,
        "dense": dense,
        "masked": masked,
        "bound": bounds.cycle_rate(problem.kappa, ratio, dense),
        "rows": rows,
    }


# --- without the assumptions ----------------------------------------------------------------------


def violations(seed: int) -> list[Json]:
    """Return, for each bound, a path on which an assumption is violated, and what it breaks."""
    easy = conditioned(2.0, NUMEL, WANTED, seed)
    noisy = _noisy(seed)
    narrow = two_weights(0.9)
    return [
        _broken("T0", "η = 2.5/β", easy, Walk(256, 2.5 / easy.smooth, 10)),
        _broken("T1", "η = 2.5/β", easy, Walk(256, 2.5 / easy.smooth, 10)),
        _broken("T1", "k = k*/2", easy, Walk(2, 1 / easy.smooth, 30)),
        _broken("T1", "k = k*", narrow, Walk(1, 1 / narrow.smooth, 30)),
        _broken("T2", "η = 2.5/β", noisy, Walk(288, 2.5 / noisy.smooth, 40, noise=0.01)),
        _broken("T2", "k = k*/2", noisy, Walk(1, 0.5 / noisy.smooth, 40, noise=0.01)),
        _broken("T3", "a dense phase of 11 steps", narrow, Walk(1, 1 / narrow.smooth, 30, 11, 5)),
        _broken("T3", "η = 2.5/β", easy, Walk(16, 2.5 / easy.smooth, 10, 8, 5)),
        _broken("T3", "k = k*/2", easy, Walk(2, 1 / easy.smooth, 30, 8, 5)),
    ]


def _broken(bound: str, violated: str, problem: Problem, how: Walk) -> Json:
    """Return what a path without an assumption measures beside what the bound would allow."""
    points = walk(problem, how)
    found = gaps(problem, points)
    row = {"bound": bound, "violated": violated, "problem": problem.name}
    if bound == "T0":
        margin = checks.descent(problem, how, points, problem.smooth)
        return row | {"measured": margin, "allowed": 0.0, "breaks": margin < 0}
    if bound == "T2":
        allowed = stochastic_bounds(problem, how.noise, found)
        worst = max(range(1, len(found)), key=lambda step: found[step] / allowed[step])
        measured, limit = found[worst], allowed[worst]
    elif bound == "T1":
        measured, limit = checks.ratio(problem, points), bounds.iht_rate(problem.kappa)
    else:  # what T3 promises for a phase that is long enough: the gap shrinks in every cycle
        measured, limit = checks.ratio(problem, points), 1.0
    breaks = measured > limit or (bound == "T3" and measured > 1 - 1e-9)
    return row | {"measured": measured, "allowed": limit, "breaks": breaks}


# --- figures --------------------------------------------------------------------------------------


def paths(seed: int) -> list[Json]:
    """Return the gap after each cut for the three ways to walk, beside their bounds."""
    found = []
    problem = conditioned(2.0, NUMEL, WANTED, seed)
    kappa, beta = problem.kappa, problem.smooth
    values = gaps(problem, walk(problem, Walk(bounds.iht_kept(kappa, WANTED), 1 / beta, 40)))
    allowed = [values[0] * bounds.iht_rate(kappa) ** t for t in range(len(values))]
    found.append(_line("IHT", "T1", problem, values, allowed, 1))

    noisy = _noisy(seed)
    how = Walk(bounds.stochastic_kept(noisy.kappa, 2), 0.5 / noisy.smooth, 80, noise=0.01)
    values = gaps(noisy, walk(noisy, how))
    found.append(
        _line("stochastic IHT", "T2", noisy, values, stochastic_bounds(noisy, 0.01, values), 1)
    )

    problem = conditioned(5.0, NUMEL, WANTED, seed)
    ratio = bounds.nu(4 * WANTED, WANTED, NUMEL)
    dense = bounds.dense_steps(problem.kappa, ratio)
    how = Walk(4 * WANTED, 1 / problem.smooth, 8, dense, 5)
    values = gaps(problem, walk(problem, how))[1:]
    factor = bounds.cycle_rate(problem.kappa, ratio, dense)
    allowed = [values[0] * factor**t for t in range(len(values))]
    found.append(_line("AC/DC", "T3", problem, values, allowed, dense + 5))
    return found


def _line(
    method: str, bound: str, problem: Problem, values: list[float], allowed: list[float], every: int
) -> Json:
    return {
        "method": method,
        "bound": bound,
        "problem": problem.name,
        "steps": [every * t for t in range(len(values))],
        "gaps": values,
        "bounds": allowed,
    }


_HARD: dict[str, Make] = {
    "isotropic, 160 rows": lambda seed: isotropic(160, NUMEL, 8, seed),
    "Toeplitz, ρ = 0.9, 512 rows": lambda seed: toeplitz(0.9, 512, 256, 8, seed),
}


def recovery(seeds: range) -> list[Json]:
    """Return on how many seeds each way to walk finds the support, for k = k*, 2k*, 4k*."""
    found = []
    for name, make in _HARD.items():
        hits = {"IHT": dict.fromkeys(_SHARES, 0), "AC/DC": dict.fromkeys(_SHARES, 0)}
        for seed in seeds:
            problem = make(seed)
            rate = 1 / problem.smooth
            for share in _SHARES:
                kept = share * problem.wanted
                iht_walk = Walk(kept, rate, 90)
                acdc_walk = Walk(kept, rate, 3, dense=20, masked=10)  # 90 steps, too
                hits["IHT"][share] += recovered(problem, walk(problem, iht_walk))
                hits["AC/DC"][share] += recovered(problem, walk(problem, acdc_walk))
        for method, shares in hits.items():
            row = {"problem": name, "method": method, "found": list(shares.values())}
            found.append(row | {"shares": list(_SHARES), "seeds": len(seeds)})
    return found


_SHARES = (1, 2, 4)


def dense_phase(seeds: range) -> Json:
    """Return what the length of the dense phase decides: exactly, and on random problems."""
    narrow = two_weights(0.9)
    ratio = bounds.nu(1, 1, 2)
    exact = []
    for dense in (1, 4, 8, 11, 12, 16, bounds.dense_steps(narrow.kappa, ratio)):
        points = walk(narrow, Walk(1, 1 / narrow.smooth, 20, dense, 5))
        exact.append({"dense": dense, "gap": gaps(narrow, points)[-1]})
    hits = []
    for dense in (1, 2, 5, 10, 20):
        problems = [isotropic(160, NUMEL, 8, seed) for seed in seeds]
        hits.append(
            {
                "dense": dense,
                "found": sum(
                    recovered(p, walk(p, Walk(8, 1 / p.smooth, 180 // (dense + 10), dense, 10)))
                    for p in problems
                ),
            }
        )
    return {
        "kappa": narrow.kappa,
        "needed": bounds.dense_steps(narrow.kappa, ratio),
        "exact": exact,
        "random": hits,
        "seeds": len(seeds),
    }


def small_network(seed: int) -> Json:
    """Return IHT on a network beside T0, and AC/DC on it with what each phase gains and costs."""
    problem = network(seed)
    kept = 64
    how, points, smooth = descending(problem, kept, 100)
    alternating = walk(problem, Walk(kept, how.rate, 10, 20, 20))
    return {
        "kept": kept,
        "numel": len(points[0].weights),
        "rate": how.rate,
        "smooth": smooth,
        "descent": checks.descent(problem, how, points, smooth),
        "iht": [point.value for point in cuts(points)],
        "acdc": [{"after": point.after, "value": point.value} for point in alternating],
        "ledger": ledger(alternating),
    }


def descending(problem: Problem, kept: int, steps: int) -> tuple[Walk, list[Point], float]:
    """Return IHT with the largest learning rate 1, 1/2, 1/4, ... that is at most 1/β.

    β is the smallest number for which f is smooth along the moves of the path itself. That is all
    that the proof of T0 asks for.
    """
    rate = 1.0
    while True:
        how = Walk(kept, rate, steps)
        points = walk(problem, how)
        smooth = checks.smoothness(problem, points)
        if math.isfinite(smooth) and rate * smooth <= 1:
            return how, points, smooth
        rate /= 2


def ledger(points: list[Point]) -> list[Json]:
    """Return for each cycle what the dense phase gained, the cut cost and the sparse phase gained.

    Args:
        points: The path of AC/DC, from its first point.
    """
    rows: list[Json] = []
    start = before = points[0].value
    for point in points[1:]:
        if point.after == "dense":
            if rows and "masked" not in rows[-1]:
                rows[-1]["masked"] = start - before
                start = before
        elif point.after == "cut":
            rows.append({"dense": start - before, "cut": point.value - before})
            start = point.value
        before = point.value
    rows[-1]["masked"] = start - before
    return rows
