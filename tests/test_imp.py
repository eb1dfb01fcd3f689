"""IMP with rewinding: rounds, what is rewound, the learning rate, cost, resuming."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import acdc
from acdc.engine.reference import Reference
from acdc.errors import InputError
from acdc.methods.imp import IMP
from acdc.pattern import NM, Block, Unstructured
from acdc.runs import train as runs
from acdc.runs.optim import Cosine, StepDecay
from acdc.runs.preview import Preview
from acdc.schedule import Schedule, constant, phases
from acdc.sparsifier import Sparsifier
from support.helpers import adam, batch, bind, build, is_plus_zero, same, sgd, train
from support.method_runs import assert_forecast, assert_resumes
from support.runs import record, tiny

# The first round is [0,6), the others [6,10), [10,14) and [14,18): weights go back to step 2.
PLAN = phases(3, [("dense", "6st"), ("sparse", "12st")]).resolve(6)
ROUNDS = (6, 10, 14)
ERK = Unstructured(0.8, "erk")


def imp(pattern: Any = ERK, **more: Any) -> IMP:
    return IMP(pattern, **{"schedule": PLAN, "share": 0.5, "rewind": "2st"} | more)


def test_every_cut_takes_its_share_and_the_last_one_what_is_left() -> None:
    assert imp().sparsities == (0.5, 0.75, 0.8)
    assert imp(Unstructured(0.9), share=0.2).cuts == 11  # .8^10 is .107
    assert imp(Unstructured(0.36), share=0.2).cuts == 2  # .8^2 is .64, but for rounding
    assert imp(Unstructured(0.3), share=0.5).sparsities == (0.3,)


@pytest.mark.parametrize("pattern", [Unstructured(0.8), ERK, Block((4, 1), 0.8)])
def test_a_round_begins_with_the_kept_weights_and_all_else_of_the_early_step(pattern: Any) -> None:
    method = imp(pattern)
    model, optimizer, sparsifier = bind(method, sgd)
    early: dict[str, torch.Tensor] = {}
    for step in range(18):
        old = sparsifier.support
        trained = copy.deepcopy(model)  # hooks do not come along: kept weights alone are compared
        twin_optimizer = sgd(trained)
        twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(trained, twin_optimizer, step, step + 1)
        train(model, optimizer, step, step + 1)
        now = step + 1
        if now == 2:
            early = copy.deepcopy(dict(model.state_dict()))
        if now not in ROUNDS:
            assert sparsifier.support is old
            continue
        sparsity = method.sparsities[ROUNDS.index(now)]
        size = {n: trained.get_parameter(n).abs().masked_fill(~m, -1) for n, m in old.items()}
        assert sparsifier.support == pattern.at(sparsity).select(size)  # by the trained weights
        assert not optimizer.state
        for name, value in model.state_dict().items():  # biases and statistics included
            if name in sparsifier.support:
                mask = ~sparsifier.support[name]
                assert is_plus_zero(value[mask])
                assert same(value, early[name].masked_fill(mask, 0.0)), name
            else:
                assert same(value, early[name]), name
    assert sparsifier.support.sparsity == pytest.approx(pattern.target, abs=0.01)
    assert sparsifier.dense_twin is not None
    assert sparsifier.dense_twin.step == 6


def test_the_dense_twin_is_the_end_of_the_first_round_not_rewound() -> None:
    model, optimizer, sparsifier = bind(imp(), sgd)
    plain = build()
    train(plain, sgd(plain), 0, 6)
    train(model, optimizer, 0, 6)
    assert sparsifier.dense_twin is not None
    assert same(sparsifier.dense_twin.model, dict(plain.state_dict()))


def test_weights_of_before_training_can_be_gone_back_to() -> None:
    model, optimizer, _ = bind(imp(rewind="0st"), sgd)
    train(model, optimizer, 0, 6)
    first = build().state_dict()
    assert all(same(v, first[n]) for n, v in model.state_dict().items() if "fc1.bias" in n)
    assert int(model.bn1.num_batches_tracked) == 0


def test_reset_none_keeps_what_the_optimizer_knows() -> None:
    model, optimizer, _ = bind(imp(reset="none"), adam)
    train(model, optimizer, 0, 6)
    assert all(int(state["step"]) == 6 for state in optimizer.state.values())


@pytest.mark.parametrize("factory", [sgd, adam], ids=["sgd", "adam"])
def test_it_resumes_after_every_step_and_its_forecast_is_what_it_does(factory: Any) -> None:
    assert_resumes(imp(Unstructured(0.8)), factory)
    assert_resumes(imp(rewind="0st", reset="none"), factory)
    assert_forecast(imp(), factory)


def test_a_state_of_another_network_is_refused() -> None:
    model, optimizer, sparsifier = bind(imp(), sgd)
    train(model, optimizer, 0, 3)
    state = copy.deepcopy(sparsifier.state_dict())
    del state["mean"]["network"]["bn1.running_mean"]
    with pytest.raises(InputError, match=r"holds the mean of another network.*Resume with the"):
        bind(imp(), sgd)[2].load_state_dict(state)


def test_only_a_method_that_uses_it_saves_a_mean() -> None:
    assert "mean" not in bind(acdc.ACDC(ERK, PLAN), sgd)[2].state_dict()
    assert bind(imp(), sgd)[2].state_dict()["mean"] == {"noted": -1, "network": {}}


def test_an_engine_trains_every_round() -> None:
    model = build()
    engine = acdc.Engine(model, batch(0)[0], backend=Reference(), choose=False)
    optimizer = sgd(model)
    sparsifier = Sparsifier(imp(), model, optimizer, engine=engine)
    plain, other, reference = bind(imp(), sgd)
    for step in range(18):
        assert engine.active == (step >= 6)
        train(model, optimizer, step, step + 1)
        train(plain, other, step, step + 1)
        assert sparsifier.support == reference.support
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


# --- the learning rate ---------------------------------------------------------------------------


def test_every_round_goes_through_the_curve_of_the_first() -> None:
    method = imp()
    at = [method.on_curve(step)[0] for step in range(18)]
    assert at == [0, 1, 2, 3, 4, 5, *(2, 3, 4, 5) * 3]
    once = method.on_curve(17)[1]
    assert once == Schedule((acdc.Phase("dense", 0, 6),), (6,))
    curve = Cosine(every="step")
    rates = [curve.factor(*method.on_curve(step)) for step in range(18)]
    assert rates[6:10] == rates[10:14] == rates[14:] == rates[2:6]
    assert rates[:6] == [curve.factor(step, once) for step in range(6)]


def test_rounds_of_other_lengths_are_spread_over_the_same_part_of_the_curve() -> None:
    longer = phases(4, [("dense", "6st"), ("sparse", "18st")]).resolve(6)
    at = [imp(schedule=longer, share=0.6).on_curve(step)[0] for step in range(6, 24)]
    assert at == [2, 2, 2, 3, 3, 4, 4, 5, 5] * 2
    # A first round of an epoch and a half is a schedule of two epochs, the second of them short.
    half = phases(5, [("dense", "1.5ep"), ("sparse", "3.5ep")]).resolve(4)
    once = imp(schedule=half, rewind="1st").on_curve(19)[1]
    assert (once.total, once.steps_per_epoch) == (6, (4, 2))
    assert StepDecay(at=(0,)).factor(5, once) == 0.1


def test_other_methods_read_the_curve_of_the_run() -> None:
    method = acdc.ACDC(ERK, PLAN)
    assert method.on_curve(7) == (7, PLAN)


def test_a_run_costs_all_its_rounds_and_repeats_the_learning_rate(tmp_path: Path) -> None:
    plan = phases(4, [("dense", "1ep"), ("sparse", "3ep")])
    recipe = replace(
        tiny(),
        method=IMP(Unstructured(0.8, "erk"), plan, share=0.5, rewind="1st"),
        lr=Cosine(every="step"),
        dense_finetune=False,
    )
    runs.run(recipe, tmp_path / "run", device="cpu")
    found = record(tmp_path / "run")
    ledger = Preview(recipe).ledger
    assert ledger.exact
    assert found["details"]["ledger"] == ledger.to_dict()
    dense, sparse = ledger.phases
    assert sparse.dense_flops == 3 * dense.flops  # three trainings more
    assert 0 < sparse.flops < sparse.dense_flops
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    rates = [line["lr"] for line in lines if line["event"] == "step"]
    assert len(rates) == 16
    assert rates[4:8] == rates[8:12] == rates[12:]
    assert rates[4] == rates[1]
    assert max(rates) == rates[0]


WRONG: dict[str, tuple[Any, str]] = {
    "share": (lambda: imp(share=1.0), r"IMP\(share=...\) is 1.0. It is the share.*below 1"),
    "text": (lambda: imp(share="20%"), r"IMP\(share=...\) is '20%'"),
    "rewind": (lambda: imp(rewind="early"), "The duration of rewind is 'early'"),
    "2:4": (lambda: imp(NM(2, 4)), "which this method cannot keep. Give Unstructured or Block"),
    "late": (lambda: bind(imp(rewind="6st"), sgd), r"to step 6 \(rewind is '6st'\).*longer"),
    "sparse": (
        lambda: bind(imp(schedule=constant("sparse", 2).resolve(9)), sgd),
        "begins with a sparse phase until step 18. Begin with a dense phase",
    ),
    "short": (lambda: bind(imp(share=0.05), sgd), r"makes 32 cuts of 5 % each.*from step 6 to 18"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_sentences(case: str) -> None:
    call, sentence = WRONG[case]
    with pytest.raises(InputError, match=sentence):
        call()
