"""Options of AC/DC that are not in the paper. With each at its default nothing changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import acdc
from acdc.engine.reference import Reference
from acdc.errors import InputError
from acdc.methods.acdc import ACDC
from acdc.pattern import NM, Block, Pattern, Unstructured
from acdc.runs import train as runs
from acdc.runs.preview import Preview
from acdc.runs.recipe import encode
from acdc.schedule import phases, ramp
from acdc.sparsifier import Sparsifier
from support.helpers import adam, batch, bind, build, sgd, steps, train
from support.method_runs import assert_forecast, assert_resumes, supports_of
from support.runs import record, tiny

# D[0,2) S[2,12) D[12,14) S[14,24) in steps.
PLAN = phases(4, [("dense", "2st"), ("sparse", "10st"), ("dense", "2st"), ("sparse", "10st")])
SCHEDULE = PLAN.resolve(6)
ERK = Unstructured(0.8, "erk")


def ramped(pattern: Pattern = ERK, **more: Any) -> ACDC:
    return ACDC(pattern, SCHEDULE, **{"ramp": 0.6, "first": 0.4, "every": "3st"} | more)


# --- gradual compressions ------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [Unstructured(0.8), ERK, Block((4, 1), 0.75)])
def test_every_compression_rises_to_the_pattern_over_its_share_of_the_phase(
    pattern: Unstructured | Block,
) -> None:
    model, optimizer, sparsifier = bind(ramped(pattern), sgd)
    shapes = {name: tuple(p.shape) for name, p in sparsifier.params.items()}
    before, found = sparsifier.support, {}
    for step in steps(model, optimizer, 0, 24):
        if sparsifier.support is before:
            continue
        if SCHEDULE.phase_at(step).kind == "sparse":
            assert sparsifier.support.entered(before).nnz == 0  # what is cut stays cut
        before = sparsifier.support
        found[step] = before.nnz
    assert list(found) == [2, 5, 8, 12, 14, 17, 20]
    for start in (2, 14):
        for step in (start, start + 3, start + 6):
            now = ramp(step, start, start + 6, 0.4, pattern.sparsity)
            assert found[step] == pattern.at(now).total(shapes)
        assert found[start + 6] == pattern.total(shapes)
    assert found[12] == sparsifier.support.numel
    assert sparsifier.dense_twin is not None
    assert sparsifier.dense_twin.step == 14


def test_a_cut_that_is_due_between_two_intervals_is_made() -> None:
    changes, _ = supports_of(ramped(every="4st"), sgd)
    assert [step for step, _ in changes] == [2, 6, 8, 12, 14, 18, 20]


@pytest.mark.parametrize("factory", [sgd, adam], ids=["sgd", "adam"])
def test_the_forecast_of_a_ramp_is_what_the_run_does(factory: Any) -> None:
    assert_forecast(ramped(), factory)
    assert_forecast(ramped(Block((4, 1), 0.75, "uniform")), factory)
    # Global counts of layers depend on the weights, and their total does not.
    method = ramped(Unstructured(0.8))
    forecast = method.forecast(dict(bind(method, factory)[2].params))
    assert not forecast.exact
    changes, _ = supports_of(method, factory)
    totals = [(step, counts and sum(counts.values())) for step, counts in forecast.supports[1:]]
    assert totals == [(step, counts and sum(counts.values())) for step, counts in changes]


@pytest.mark.parametrize("factory", [sgd, adam], ids=["sgd", "adam"])
def test_a_ramp_resumes_after_every_step(factory: Any) -> None:
    assert_resumes(ramped(Unstructured(0.8)), factory)


def test_an_engine_runs_every_support_of_a_ramp() -> None:
    model = build()
    engine = acdc.Engine(model, batch(0)[0], backend=Reference(), choose=False)
    optimizer = sgd(model)
    sparsifier = Sparsifier(ramped(), model, optimizer, engine=engine)
    active = []
    for step in range(24):
        active.append(engine.active)
        train(model, optimizer, step, step + 1)
    assert active == [SCHEDULE.phase_at(step).kind == "sparse" for step in range(24)]
    changes, _ = supports_of(ramped(), sgd)
    assert [(c.step, c.counts) for c in sparsifier.changes] == changes


def test_a_run_with_a_ramp_costs_what_was_forecast(tmp_path: Path) -> None:
    settings = {"method__pattern__scope": "erk", "method__ramp": "0.6", "method__every": "1st"}
    recipe = replace(tiny(**settings), dense_finetune=False)
    runs.run(recipe, tmp_path / "run", device="cpu")
    found = record(tmp_path / "run")["details"]
    ledger = Preview(recipe).ledger
    assert ledger.exact
    assert found["ledger"] == ledger.to_dict()
    plain = Preview(replace(recipe, method=replace(recipe.method, ramp=None, every="1%")))
    assert plain.ledger.flops < ledger.flops < ledger.dense_flops


def test_without_a_ramp_recipes_and_checkpoints_have_the_values_that_they_had() -> None:
    method = ACDC(ERK, SCHEDULE)
    assert set(encode(method)) == {"type", "pattern", "schedule", "reset", "layers"}
    assert bind(method, sgd)[2].state_dict()["method"] == (f"acdc(pattern={ERK!r}, reset='all')")
    assert "ramp=0.6, first=0.4, every='3st'" in bind(ramped(), sgd)[2].state_dict()["method"]
    assert encode(ramped())["ramp"] == 0.6


def test_a_checkpoint_that_names_every_option_is_resumed() -> None:
    # As versions before this one wrote it, with options that have their defaults.
    method = acdc.GMP(ERK, SCHEDULE, length="4st")
    sparsifier = bind(method, sgd)[2]
    saved = sparsifier.state_dict()
    assert "keep_zeros" not in saved["method"]
    saved["method"] = saved["method"][:-1] + ", keep_zeros=False)"
    sparsifier.load_state_dict(saved)
    saved["method"] = saved["method"].replace("False", "True")
    with pytest.raises(InputError, match="The state is of another run: its method is"):
        sparsifier.load_state_dict(saved)


WRONG: dict[str, tuple[Any, str]] = {
    "text": (lambda: ramped(ramp="60%"), r"ACDC\(ramp=...\) is '60%'. It is the share of every"),
    "all": (lambda: ramped(ramp=1), r"ACDC\(ramp=...\) is 1. .*above 0 and below 1"),
    "none": (lambda: ramped(ramp=0.0), r"ACDC\(ramp=...\) is 0.0. .*or None for one cut"),
    "nan": (lambda: ramped(ramp=float("nan")), r"ACDC\(ramp=...\) is nan"),
    "first": (lambda: ramped(first=0.9), r"ACDC\(first=...\) is 0.9.*ends at 0.8.*lower first"),
    "every": (lambda: ramped(every="0st"), r"The duration of every is '0st', which is none"),
    "2:4": (lambda: ramped(NM(2, 4)), r"NM\(n=2, m=4\), whose sparsity cannot rise, and ramp is"),
    "alone": (lambda: ramped(ramp=None), r"ACDC\(first=...\) is 0.4, and without ramp.*Set ramp"),
    "short": (
        lambda: bind(ramped(ramp=0.04), sgd),
        r"ramp=...\) is 0.04, and the sparse phase from step 2 to 12 is too short.*at step 2",
    ),
    "long": (lambda: bind(ramped(ramp=0.96), sgd), r"is 0.96.*too short.*at step 12. Make the"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_of_a_ramp_are_sentences(case: str) -> None:
    call, sentence = WRONG[case]
    with pytest.raises(InputError, match=sentence):
        call()


def test_the_command_line_sets_a_ramp() -> None:
    method = tiny(method__ramp="0.5", method__first="0.3", method__every="2st").method
    assert (method.ramp, method.first, method.every) == (0.5, 0.3, "2st")  # type: ignore[attr-defined]
    assert tiny(method__ramp="none").method.ramp is None  # type: ignore[attr-defined]
