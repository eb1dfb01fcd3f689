"""The bounds T0 to T3 as functions. ``docs/convergence.md`` states and proves them.

β: smoothness; α: strong convexity; κ = β/α; k: kept weights; k*: weights of the sparse point θ*; N:
all weights; gap: f(θ) - f(θ*).
"""

from __future__ import annotations

import math


def fall(smooth: float, rate: float, moved: float) -> float:
    """Return T0: how much ``f`` falls at least in a step of IHT with η = ``rate`` <= 1/β.

    Args:
        smooth: β.
        rate: η.
        moved: Squared distance between the two points.
    """
    return max(0.0, (1 / rate - smooth) / 2) * moved


def price(smooth: float, slope: float, moved: float) -> float:
    """Return T0': how much ``f`` rises at most in a cut.

    Args:
        smooth: β.
        slope: Inner product of the gradient before the cut and the move.
        moved: Squared norm of what is cut off.
    """
    return slope + smooth / 2 * moved


def iht_kept(kappa: float, wanted: int) -> int:
    """Return the k that T1 asks for: 16 κ² k*."""
    return math.ceil(16 * kappa**2 * wanted)


def iht_rate(kappa: float) -> float:
    """Return T1: the factor by which the gap shrinks at least in a step with η = 1/β."""
    return 1 - 1 / (4 * kappa)


def stochastic_kept(kappa: float, wanted: int) -> int:
    """Return the k that T2 asks for: 64 κ² k*."""
    return math.ceil(64 * kappa**2 * wanted)


def stochastic_gap(kappa: float, convex: float, variance: float, gap: float, steps: int) -> float:
    """Return T2: the expected gap at most after steps with η = 1/(2β), from ``gap``.

    Args:
        kappa: κ.
        convex: α.
        variance: σ²: the expected squared norm of the noise of a gradient.
        gap: The gap before.
        steps: The steps.
    """
    return (1 - 1 / (8 * kappa)) ** steps * gap + 4 * variance / convex


def nu(kept: int, wanted: int, numel: int) -> float:
    """Return ν: by how much a cut increases the squared distance to θ* at most.

    Source: Shen and Li, A Tight Bound of Hard Thresholding, JMLR 2018.
    """
    most = min(wanted, numel - kept)
    rho = most / (kept - wanted + most)
    return 1 + (rho + math.sqrt((4 + rho) * rho)) / 2


def cycle_rate(kappa: float, ratio: float, dense: int) -> float:
    """Return T3: the factor of the gap in a cycle at most, from one cut to the next.

    Args:
        kappa: κ.
        ratio: ν.
        dense: Gradient steps of the dense phase, with η = 1/β.
    """
    return ratio * kappa * (1 - 1 / kappa) ** dense


def dense_steps(kappa: float, ratio: float) -> int:
    """Return the length of the shortest dense phase for which T3 promises that the gap shrinks."""
    if kappa <= 1:
        return 1  # the first step reaches θ*
    return math.floor(math.log(ratio * kappa) / -math.log1p(-1 / kappa)) + 1
