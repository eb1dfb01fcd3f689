"""Optimizers and curves of recipes: the options, their defaults, and the curves by phase."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from acdc.errors import InputError
from acdc.recipes import get
from acdc.runs.optim import SGD, AdamW, Cosine, Curve, Optimizer, Rewarm, StepDecay, Tail
from acdc.runs.recipe import change, encode
from acdc.schedule import Schedule, phases

# Dense 20, sparse 10, dense 10, sparse 60.
SCHEDULE: Schedule = phases(
    10, [("dense", "20%"), ("sparse", "10%"), ("dense", "10%"), ("sparse", "60%")]
).resolve(10)
CONSTANT = StepDecay()  # 1 at every step


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 3))]


# --- optimizers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [SGD(), AdamW(), SGD(nesterov=True, weight_decay=0.0)])
def test_an_option_at_its_default_leaves_no_trace(optimizer: Optimizer) -> None:
    built = optimizer.build(weights())
    assert not built._optimizer_step_post_hooks
    assert built.param_groups[0]["foreach"] is None
    added = {"scale_rows", "mirror_alpha", "mirror_beta"}
    assert not added & encode(optimizer).keys()
    changed = replace(optimizer, scale_rows=True, mirror_alpha=1.0, mirror_beta=0.1)
    assert added <= encode(changed).keys()


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(lr=0.1, mirror_alpha=2.0),
        SGD(lr=0.1, mirror_beta=2.0),
        SGD(lr=0.1, nesterov=True, weight_decay=0.0, mirror_alpha=2.0),
        AdamW(lr=0.1, mirror_alpha=2.0),
    ],
)
def test_the_mirror_step_is_taken(optimizer: SGD | AdamW) -> None:
    ends = []
    for each in (replace(optimizer, mirror_alpha=0.0, mirror_beta=0.0), optimizer):
        (weight,) = weights()
        built = each.build([weight])
        weight.grad = torch.full_like(weight, 0.5)
        built.step()
        ends.append(weight.detach())
    g = 1.0 if isinstance(optimizer, AdamW) else 0.5
    factor = torch.exp(torch.tensor(-0.1 * (optimizer.mirror_alpha * g + optimizer.mirror_beta)))
    torch.testing.assert_close(ends[1], ends[0] * factor)


def test_the_options_are_set_on_the_command_line() -> None:
    settings = {"optimizer.mirror_alpha": "50", "optimizer.scale_rows": "true", "lr": "rewarm"}
    recipe = change(get("digits"), {**settings, "lr.low": "0.5", "lr.curve.warmup": "2"})
    assert recipe.optimizer == replace(get("digits").optimizer, mirror_alpha=50.0, scale_rows=True)
    assert recipe.lr == Rewarm(replace(get("digits").lr, warmup=2), low=0.5)
    assert change(recipe, {"lr": "tail"}).lr == Tail(recipe.lr)


# --- curves -------------------------------------------------------------------------------------


def at(curve: Curve, *steps: int) -> list[float]:
    return [pytest.approx(curve.factor(step, SCHEDULE)) for step in steps]


def test_a_dense_phase_after_a_sparse_one_is_warmed_up() -> None:
    curve = Rewarm(CONSTANT, low=0.2, share=0.5)
    assert at(curve, 0, 19, 20, 29) == [1, 1, 1, 1]
    assert at(curve, 30, 31, 34, 35, 39) == [0.2, 0.36, 0.84, 1, 1]
    assert at(curve, 40, 99) == [1, 1]
    assert at(Rewarm(CONSTANT, low=0.2), 35) == [0.6]


def test_a_curve_is_scaled_in_sparse_phases() -> None:
    cosine = Cosine(every="step")
    curve = Rewarm(cosine, low=1.0, sparse=2.0)
    for step in range(100):
        double = SCHEDULE.phase_at(step).kind == "sparse"
        expected = cosine.factor(step, SCHEDULE) * (2 if double else 1)
        assert curve.factor(step, SCHEDULE) == pytest.approx(expected)


def test_the_last_sparse_phase_has_a_tail_of_its_own() -> None:
    curve = Tail(CONSTANT, peak=0.5)
    assert at(curve, 0, 25, 39) == [1, 1, 1]
    # 60 steps, six of them warm-up: the first is not wasted, and the last is not zero.
    assert at(curve, 40, 46, 73, 99) == [0.5 / 7, 0.5, 0.25, 0.5 / 54]
    factors = [curve.factor(step, SCHEDULE) for step in range(40, 100)]
    assert factors[:7] == sorted(factors[:7])
    assert factors[6:] == sorted(factors[6:], reverse=True)
    assert at(Tail(CONSTANT, peak=0.5, warmup=0.0), 40, 70) == [0.5, 0.25]


@pytest.mark.parametrize("kinds", [("sparse",), ("sparse", "dense"), ("dense",)])
def test_runs_without_a_last_sparse_phase_keep_their_curve(kinds: tuple[str, ...]) -> None:
    share = f"{100 // len(kinds)}%"
    schedule = phases(10, [(kind, share) for kind in kinds]).resolve(10)  # type: ignore[misc]
    cosine = Cosine(every="step")
    for step in range(100):
        assert Tail(cosine).factor(step, schedule) == cosine.factor(step, schedule)


@pytest.mark.parametrize(
    ("kind", "fields", "sentence"),
    [
        (Rewarm, {"low": 0.0}, r"lr.low is 0.0. It is in \(0, 1\]"),
        (Rewarm, {"share": 1.5}, r"lr.share is 1.5. It is in \(0, 1\]"),
        (Rewarm, {"sparse": 0.0}, "lr.sparse is 0.0. It is a positive number"),
        (Tail, {"peak": -1.0}, "lr.peak is -1.0. It is a positive number"),
        (Tail, {"warmup": 1.0}, r"lr.warmup is 1.0. It is in \[0, 1\)"),
        (SGD, {"mirror_alpha": -1.0}, "optimizer.mirror_alpha is -1.0. It is a number from 0"),
        (AdamW, {"mirror_beta": float("nan")}, "optimizer.mirror_beta is nan"),
    ],
)
def test_values_out_of_bounds_are_refused(
    kind: type, fields: dict[str, float], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        kind(**fields)
