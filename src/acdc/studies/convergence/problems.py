"""Sparse problems with known constants, each as a model that a sparsifier can prune.

Everything is float64. ``f`` is the loss, ``N`` the number of weights, ``best`` the sparse point
that a path is compared with, ``wanted`` the number of its weights (k* in the bounds).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from acdc.random import stream

_DOUBLE = torch.float64


@dataclass(frozen=True)
class Problem:
    """A function to minimise over sparse weights.

    Args:
        name: What it is, for tables.
        build: Returns the model at the first point, all of whose parameters may be pruned.
        loss: ``f`` of the model: a scalar with a gradient.
        smooth: β: ``f`` is β-smooth. NaN where no constant is known.
        convex: α: ``f`` is α-strongly convex; 0 where it is not.
        best: θ*, ``[N]``; ``None`` where none is known.
    """

    name: str
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module], Tensor]
    smooth: float = math.nan
    convex: float = 0.0
    best: Tensor | None = None

    @property
    def kappa(self) -> float:
        """The condition number κ = β/α."""
        return self.smooth / self.convex if self.convex else math.inf

    @property
    def wanted(self) -> int:
        """The number of weights of θ* that are not zero."""
        assert self.best is not None
        return int(torch.count_nonzero(self.best))

    @torch.no_grad()
    def at(self, weights: Tensor) -> float:
        """Return ``f`` at a point ``[N]``."""
        return float(self.loss(self._model_at(weights)))

    def gradient(self, weights: Tensor) -> Tensor:
        """Return the gradient of ``f`` at a point, both ``[N]``."""
        model = self._model_at(weights)
        gradients = torch.autograd.grad(self.loss(model), list(model.parameters()))
        return torch.cat([gradient.flatten() for gradient in gradients])

    @property
    def lowest(self) -> float:
        """``f`` at θ*."""
        assert self.best is not None
        return self.at(self.best)

    def _model_at(self, weights: Tensor) -> nn.Module:
        model = self.build()
        nn.utils.vector_to_parameters(weights, model.parameters())
        return model


def flat(model: nn.Module) -> Tensor:
    """Return a copy of all weights of a model, ``[N]``."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _linear(weights: Tensor) -> nn.Module:
    """Return a layer with one output and these weights ``[N]``."""
    layer = nn.Linear(len(weights), 1, bias=False, dtype=_DOUBLE)
    nn.utils.vector_to_parameters(weights.clone(), layer.parameters())
    return layer


def _planted(numel: int, wanted: int, draw: torch.Generator) -> Tensor:
    """Return θ* with ``wanted`` entries ±(1 + U[0, 1)) at random places."""
    best = torch.zeros(numel, dtype=_DOUBLE)
    places = torch.randperm(numel, generator=draw)[:wanted]
    signs = 2.0 * torch.randint(2, (wanted,), generator=draw) - 1
    best[places] = signs * (1 + torch.rand(wanted, generator=draw, dtype=_DOUBLE))
    return best


# --- least squares: f = |A(θ - θ*)|² / 2n ---------------------------------------------------------


def _least_squares(name: str, rows: Tensor, best: Tensor) -> Problem:
    """Return least squares without noise in the targets. Its minimum is 0, at ``best``."""
    hessian = rows.T @ rows / len(rows)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    if len(rows) > len(best):  # the same function of N rows
        rows = math.sqrt(len(best)) * torch.linalg.cholesky(hessian).T
    # Fewer rows than weights: not strongly convex. An eigenvalue of 1e-17 must not pass for one.
    convex = float(eigenvalues[0]) if len(rows) >= len(best) else 0.0
    targets = rows @ best

    def loss(model: nn.Module) -> Tensor:
        residual: Tensor = model(rows).flatten() - targets
        return residual.square().sum() / (2 * len(rows))

    start = torch.zeros_like(best)
    return Problem(name, lambda: _linear(start), loss, float(eigenvalues[-1]), convex, best)


def conditioned(kappa: float, numel: int, wanted: int, seed: int) -> Problem:
    """Return least squares whose Hessian has eigenvalues from 1 to ``kappa`` in a random basis."""
    draw = stream("conditioned", f"{kappa}", numel, wanted, seed)
    basis, _ = torch.linalg.qr(torch.randn(numel, numel, generator=draw, dtype=_DOUBLE))
    roots = torch.linspace(1, kappa, numel, dtype=_DOUBLE).sqrt()
    rows = math.sqrt(numel) * roots[:, None] * basis
    return _least_squares(f"condition number {kappa:g}", rows, _planted(numel, wanted, draw))


def isotropic(rows: int, numel: int, wanted: int, seed: int) -> Problem:
    """Return least squares with rows of independent standard normal numbers."""
    draw = stream("isotropic", rows, numel, wanted, seed)
    design = torch.randn(rows, numel, generator=draw, dtype=_DOUBLE)
    return _least_squares("isotropic", design, _planted(numel, wanted, draw))


def toeplitz(rho: float, rows: int, numel: int, wanted: int, seed: int) -> Problem:
    """Return least squares with normal rows whose entries i and j have the correlation ρ^|i-j|."""
    draw = stream("toeplitz", f"{rho}", rows, numel, wanted, seed)
    index = torch.arange(numel, dtype=_DOUBLE)
    root = torch.linalg.cholesky(rho ** (index[:, None] - index).abs())
    design = torch.randn(rows, numel, generator=draw, dtype=_DOUBLE) @ root.T
    return _least_squares(f"Toeplitz, ρ = {rho:g}", design, _planted(numel, wanted, draw))


def two_weights(correlation: float) -> Problem:
    """Return least squares of two correlated weights, begun at the wrong one.

    θ* = (1, 0), and the first point (0, c) is the best one with the second weight alone. A gradient
    step of the length 1/β followed by a cut stays there for every c > 1/2.
    """
    hessian = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=_DOUBLE)
    rows = math.sqrt(2) * torch.linalg.cholesky(hessian).T
    problem = _least_squares("two weights", rows, torch.tensor([1.0, 0.0], dtype=_DOUBLE))
    start = torch.tensor([0.0, correlation], dtype=_DOUBLE)
    return replace(problem, build=lambda: _linear(start))


# --- logistic regression --------------------------------------------------------------------------


def logistic(ridge: float, rows: int, numel: int, wanted: int, seed: int) -> Problem:
    """Return logistic regression with normal rows and ``ridge``/2 times the squared norm.

    θ* minimises ``f`` over the weights that made the labels.
    """
    draw = stream("logistic", f"{ridge}", rows, numel, wanted, seed)
    design = torch.randn(rows, numel, generator=draw, dtype=_DOUBLE)
    made_by = _planted(numel, wanted, draw)
    likely = torch.sigmoid(design @ made_by)
    signs = 2.0 * (torch.rand(rows, generator=draw, dtype=_DOUBLE) < likely) - 1

    def loss(model: nn.Module) -> Tensor:
        (weights,) = model.parameters()
        margins: Tensor = signs * model(design).flatten()
        return nn.functional.softplus(-margins).mean() + ridge / 2 * weights.square().sum()

    # The second derivative of log(1 + exp(-m)) is 1/4 at most.
    largest = torch.linalg.eigvalsh(design.T @ design / rows)[-1]
    start = torch.zeros_like(made_by)
    smooth = ridge + float(largest) / 4
    problem = Problem("logistic", lambda: _linear(start), loss, smooth, ridge)
    return replace(problem, best=_minimiser(problem, made_by != 0))


def _minimiser(problem: Problem, support: Tensor) -> Tensor:
    """Return the minimiser of ``f`` over the weights of a support ``[N]``, by gradient descent."""
    weights = torch.zeros(len(support), dtype=_DOUBLE)
    for _ in range(math.ceil(40 * problem.kappa)):  # the gap shrinks by exp(-40)
        weights = weights - problem.gradient(weights) * support / problem.smooth
    return weights


# --- a small network ------------------------------------------------------------------------------


def network(seed: int, inputs: int = 20, width: int = 16, samples: int = 256) -> Problem:
    """Return a regression by a network of two layers, which is not convex, onto a sparse teacher.

    Teacher and student have the same shape; one in eight weights of the teacher is not zero. No
    constant is known: ``smooth`` is NaN.
    """
    draw = stream("network", inputs, width, samples, seed)

    def layers() -> nn.Sequential:
        first = nn.Linear(inputs, width, bias=False, dtype=_DOUBLE)
        return nn.Sequential(first, nn.Tanh(), nn.Linear(width, 1, bias=False, dtype=_DOUBLE))

    numel = inputs * width + width
    start = torch.randn(numel, generator=draw, dtype=_DOUBLE) / math.sqrt(inputs)
    teacher = torch.randn(numel, generator=draw, dtype=_DOUBLE)
    teacher *= torch.rand(numel, generator=draw) < 1 / 8
    teacher[-width:] = torch.randn(width, generator=draw, dtype=_DOUBLE)
    x = torch.randn(samples, inputs, generator=draw, dtype=_DOUBLE)

    def with_weights(weights: Tensor) -> nn.Module:
        model = layers()
        nn.utils.vector_to_parameters(weights.clone(), model.parameters())
        return model

    with torch.no_grad():
        targets = with_weights(teacher)(x)

    def loss(model: nn.Module) -> Tensor:
        return nn.functional.mse_loss(model(x), targets) / 2

    return Problem("small network", lambda: with_weights(start), loss)
