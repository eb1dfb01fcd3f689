"""A method with a new kind of state touches one file: this one.

It keeps a running average of the squared gradients of all kept weights, and at every change drops
the weights with the smallest ``|w| · sqrt(average)``. No other part of the package knows it.
"""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from typing import Any, ClassVar, final

import pytest
import torch
from torch import Tensor

import acdc
from acdc import score
from acdc.layers import Layers
from acdc.methods.base import Reset, Weights
from acdc.methods.families import Phased
from acdc.methods.training import Masked
from acdc.pattern import Unstructured
from acdc.schedule import Phase, Plan, Schedule, phases
from acdc.score import Scores
from acdc.support import Support
from support.helpers import backward, build, is_plus_zero, same, sgd

Averages = dict[str, Tensor]


@final
@dataclass(frozen=True)
class Averaged(Phased[Averages]):
    name: ClassVar[str] = "averaged"
    label: ClassVar[str] = "Averaged"
    citation: ClassVar[str] = ""

    pattern: Unstructured
    schedule: Plan | Schedule
    decay: float = 0.9
    reset: Reset = "entered"
    layers: Layers | None = None

    def init(self, weights: Weights) -> Averages:
        return {name: torch.zeros_like(weight) for name, weight in weights.items()}

    def observe(self, step: int, weights: Weights, support: Support, state: Averages) -> Averages:
        gradients = {name: weights.gradient(name) for name in weights}
        return {
            name: old if (g := gradients[name]) is None else self.decay * old + g.square()
            for name, old in state.items()
        }

    def begin(self, step: int, weights: Weights, state: Averages) -> Support:
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        scores = Scores(shapes, lambda name: weights[name].abs() * state[name].sqrt())
        return self.pattern.select(scores)

    def go_on(
        self, step: int, phase: Phase, weights: Weights, support: Support, state: Averages
    ) -> Support:
        return self.begin(step, weights, state) if step == phase.start + 2 else support


SCHEDULE = phases(2, [("dense", "3st"), ("sparse", "5st")]).resolve(4)


def attach(skip: Any = None) -> tuple[Any, torch.optim.Optimizer, acdc.Sparsifier]:
    model = build()
    optimizer = sgd(model) if skip is None else skip(model)
    return (
        model,
        optimizer,
        acdc.Sparsifier(Averaged(Unstructured(0.8), SCHEDULE), model, optimizer),
    )


def test_its_memory_is_kept_and_decides() -> None:
    model, optimizer, sparsifier = attach()
    averages = {name: torch.zeros_like(p) for name, p in sparsifier.params.items()}
    for step in range(8):
        optimizer.zero_grad()
        backward(model, step)
        for name, param in sparsifier.params.items():
            assert param.grad is not None
            averages[name] = 0.9 * averages[name] + param.grad.square()
        optimizer.step()
        assert same(sparsifier.state_dict()["method_state"], averages)
    assert [change.step for change in sparsifier.changes] == [3, 5]
    assert sparsifier.support.nnz == acdc.kept(sparsifier.support.numel, 0.8)
    model_before = attach()[0]
    magnitude = score.magnitude(dict(model_before.named_parameters()))
    by_magnitude = Unstructured(0.8).select(magnitude.subset(sparsifier.params))
    assert sparsifier.support != by_magnitude
    for name, mask in sparsifier.support.items():
        assert is_plus_zero(model.get_parameter(name)[~mask])
    assert sparsifier.pair().support == sparsifier.support


@pytest.mark.parametrize("stop", [2, 3, 4, 6])
def test_a_resumed_run_ends_as_the_one_that_was_not_stopped(stop: int) -> None:
    def steps(model: Any, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()

    whole = attach()
    steps(*whole[:2], 0, 8)
    stopped = attach()
    steps(*stopped[:2], 0, stop)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in stopped], file)
    file.seek(0)
    resumed = attach()
    for part, state in zip(resumed, torch.load(file), strict=True):
        part.load_state_dict(state)
    steps(*resumed[:2], stop, 8)
    assert same(resumed[0].state_dict(), whole[0].state_dict())
    assert same(resumed[2].state_dict(), whole[2].state_dict())


def test_a_step_that_a_scaler_skips_leaves_no_trace_in_the_memory() -> None:
    def fused(model: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, fused=True)

    model, optimizer, sparsifier = attach(fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for overflow in (False, True):
        before = copy.deepcopy(sparsifier.state_dict())
        optimizer.zero_grad()
        x = torch.full((2, 3, 4, 4), float("inf") if overflow else 1.0)
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert same(sparsifier.state_dict(), before) == overflow


def test_its_forecast_and_its_ledger_come_with_the_family() -> None:
    method = Averaged(Unstructured(0.8, "erk"), SCHEDULE)
    weights = dict(build().named_parameters())
    pruned = {name: weights[name] for name in method.select(build())[0]}
    forecast = method.forecast(pruned)
    assert forecast.exact
    assert [step for step, _ in forecast.supports] == [0, 3]
    assert isinstance(method.training, Masked)
