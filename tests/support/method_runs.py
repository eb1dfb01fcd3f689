"""Shared code of the tests of single methods: what a run's supports were, and resuming it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from acdc.methods.base import Method
from acdc.sparsifier import Sparsifier
from support.helpers import (
    Factory,
    backward,
    bind,
    build,
    copied,
    dropped,
    is_plus_zero,
    same,
    steps,
)


def supports_of(method: Method, factory: Factory) -> tuple[list[tuple[int, Any]], Sparsifier]:
    """Train a small network and return ``(step, kept weights or None)`` of every change.

    Every step is checked: weights outside the support are +0.0, and so are their gradients unless
    the step has the dense gradient.
    """
    model, optimizer, sparsifier = bind(method, factory)
    total = method.resolved.total
    for step in steps(model, optimizer, 0, total):
        for name, weight, mask in dropped(sparsifier):
            assert is_plus_zero(weight[mask]), (step, name)
            if not method.training.wants_dense_gradient(step):
                assert weight.grad is None or is_plus_zero(weight.grad[mask]), (step, name)
    return [(c.step, c.counts) for c in sparsifier.changes], sparsifier


def assert_forecast(method: Method, factory: Factory) -> None:
    """Assert that the forecast of an exact method is what a run does."""
    forecast = method.forecast(dict(bind(method, factory)[2].params))
    changes, _ = supports_of(method, factory)
    assert forecast.exact
    assert _differing(forecast.supports) == _differing(changes)


def _differing(supports: Iterable[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """Leave out what changes no count, such as an exchange of weights."""
    found: list[tuple[int, Any]] = [(-1, None)]
    for step, counts in supports:
        if counts != found[-1][1]:
            found.append((step, counts))
    return found[1:]


def assert_resumes(
    method: Method, factory: Factory, attach: Callable[..., Sparsifier] = Sparsifier
) -> None:
    """Assert that a run that is stopped after every step, and saved, ends as one that was not."""
    whole, parts = bind(method, factory), bind(method, factory)
    for step, _ in enumerate(steps(*whole[:2], 0, method.resolved.total)):
        optimizer = parts[1]
        optimizer.zero_grad()
        backward(parts[0], step)
        optimizer.step()
        saved = copied([part.state_dict() for part in parts])
        assert same(saved, [part.state_dict() for part in whole]), f"after {step + 1} steps"
        model = build(seed=99)  # another start: nothing but the checkpoint counts
        optimizer = factory(model)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        parts = model, optimizer, attach(method, model, optimizer, state=saved[2])
        assert parts[2].support == whole[2].support
    assert same([part.state_dict() for part in parts], [part.state_dict() for part in whole])
