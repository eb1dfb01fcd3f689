"""AC/DC with partial decompressions: counts, growth, resuming, forecast, cost."""

from __future__ import annotations

import copy
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from acdc.errors import InputError
from acdc.methods.gmp import GMP
from acdc.methods.partial import PartialACDC
from acdc.pattern import NM, Unstructured
from acdc.recipes import methods as recipes
from acdc.runs import train as runs
from acdc.runs.preview import Preview
from acdc.runs.recipe import change
from acdc.schedule import constant, phases, ramp
from support.helpers import adam, backward, bind, is_plus_zero, sgd, steps, train
from support.method_runs import assert_forecast, assert_resumes, supports_of
from support.runs import record

# S[0,16) D[16,18) S[18,26) in steps; the sparsity rises until step 20.
PLAN = phases(2, [("sparse", "16st"), ("dense", "2st"), ("sparse", "8st")]).resolve(13)
ERK = Unstructured(0.8, "erk")


def partial(pattern: Unstructured = ERK, **more: Any) -> PartialACDC:
    given = {"first": 0.3, "every": "2st", "length": "20st", "period": "5st", "width": "2st"}
    return PartialACDC(pattern, **{"schedule": PLAN, "factor": 1.5} | given | more)


def at(step: int) -> Unstructured:
    return ERK.at(ramp(step, 0, 20, 0.3, 0.8))


def test_layers_grow_by_gradient_from_zero_and_are_cut_to_the_cubic() -> None:
    method = partial()
    assert method.decompressions == ((5, 7), (10, 12))  # [15, 17) meets the dense phase
    model, optimizer, sparsifier = bind(method, sgd)
    shapes = {n: tuple(p.shape) for n, p in sparsifier.params.items()}
    found = {0: sparsifier.support.counts()}
    for step in range(26):
        old, twin = sparsifier.support, copy.deepcopy(model)
        backward(twin, step)  # hooks do not come along: its gradients are dense
        train(model, optimizer, step, step + 1)
        new, now = sparsifier.support, step + 1
        if new is old:
            continue
        found[now] = new.counts()
        if now not in (5, 10):
            continue
        assert old.entered(new).nnz == 0  # nothing leaves
        for name, grown in new.entered(old).items():
            count = int(old[name].sum())
            assert int(grown.sum()) == min(int(Fraction(3, 2) * count), grown.numel()) - count
            gradient = twin.get_parameter(name).grad
            assert gradient is not None
            size = gradient.abs()
            if grown.any() and not new[name].all():
                assert size[grown].min() >= size[~new[name]].max()
            assert is_plus_zero(sparsifier.params[name][grown])
    assert list(found) == [0, 2, 4, 5, 7, 8, 10, 12, 14, 16, 18, 20]
    for step in (0, 2, 4, 7, 8, 12, 14, 18, 20):
        assert found[step] == at(step).counts(shapes)
    assert sum(found[16].values()) == sparsifier.support.numel
    assert sparsifier.dense_twin is not None
    assert sparsifier.dense_twin.step == 18


def test_what_is_cut_leaves_no_trace_and_momentum_of_what_grows_is_fresh() -> None:
    supports_of(partial(), sgd)  # checks every step
    model, optimizer, sparsifier = bind(partial(), adam)
    before = sparsifier.support
    for step in steps(model, optimizer, 0, 12):
        if step in (5, 10):
            for name, grown in sparsifier.support.entered(before).items():
                state = optimizer.state[sparsifier.params[name]]
                assert is_plus_zero(state["exp_avg"][grown])
                assert is_plus_zero(state["exp_avg_sq"][grown])
        before = sparsifier.support


@pytest.mark.parametrize("factory", [sgd, adam], ids=["sgd", "adam"])
def test_it_resumes_after_every_step_and_its_forecast_is_what_it_does(factory: Any) -> None:
    assert_resumes(partial(Unstructured(0.8)), factory)
    assert_forecast(partial(), factory)
    assert_forecast(partial(factor=100.0, period="4st", width="1st"), factory)


def test_until_the_first_growth_it_is_gmp() -> None:
    plan = constant("sparse", 2).resolve(10)
    ours = partial(schedule=plan, length="12st")
    model, optimizer, sparsifier = bind(ours, sgd)
    other, its, gmp = bind(GMP(ERK, plan, 0.3, "2st", "12st"), sgd)
    train(model, optimizer, 0, 4)
    train(other, its, 0, 4)
    assert sparsifier.support == gmp.support
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_a_run_costs_what_was_forecast(tmp_path: Path) -> None:
    small = {"method.schedule.epochs": "3", "data.train_examples": "400", "batch_size": "25",
             "threads": "1", "engine": "off", "model.width": "8"}  # fmt: skip
    recipe = change(recipes.RECIPES["digits_acdc_partial"](), small)
    recipe = replace(recipe, dense_finetune=False)
    runs.run(recipe, tmp_path / "run", device="cpu")
    found = record(tmp_path / "run")
    preview = Preview(recipe)
    assert preview.ledger.exact
    assert found["details"]["ledger"] == preview.ledger.to_dict()
    assert found["sparse"]["nnz"] == preview.kept
    smaller = replace(recipe, method=replace(recipe.method, factor=1.5))  # type: ignore[type-var]
    assert Preview(smaller).ledger.flops < preview.ledger.flops < preview.ledger.dense_flops


WRONG: dict[str, tuple[Any, str]] = {
    "factor": (lambda: partial(factor=1.0), r"factor=...\) is 1.0. It says how many.*above 1"),
    "text": (lambda: partial(factor="4"), r"PartialACDC\(factor=...\) is '4'"),
    "period": (lambda: partial(period="often"), "The duration of period is 'often'"),
    "width": (lambda: partial(width="0ep"), "The duration of width is '0ep', which is none"),
    "first": (lambda: partial(first=0.9), r"PartialACDC\(first=...\) is 0.9.*ends at 0.8"),
    "2:4": (lambda: partial(NM(2, 4)), r"which this method cannot keep. Give Unstructured"),  # type: ignore[arg-type]
    "length": (lambda: bind(partial(length="26st"), sgd), "last cut '26st' after its first.*shor"),
    "dense": (
        lambda: bind(partial(schedule=constant("dense", 2).resolve(13)), sgd),
        "the schedule has no sparse phase that lasts longer",
    ),
    "none": (lambda: bind(partial(period="19st"), sgd), r"No partial decompression fits.*or use G"),
    "wide": (
        lambda: bind(partial(period="3st", width="3st"), sgd),
        r"width=...\) is '3st', and the next partial decompression begins '3st' after",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_sentences(case: str) -> None:
    call, sentence = WRONG[case]
    with pytest.raises(InputError, match=sentence):
        call()
