"""Options of AC/DC that are not in the paper. With each at its default nothing changes."""

from __future__ import annotations

import copy
import os
import pickle
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import acdc
from acdc import score
from acdc.engine.reference import Reference
from acdc.errors import InputError
from acdc.methods.acdc import ACDC
from acdc.methods.dsd import DSD
from acdc.pattern import NM, Block, Pattern, Unstructured
from acdc.runs import train as runs
from acdc.runs.preview import Preview
from acdc.runs.recipe import encode
from acdc.schedule import phases, ramp
from acdc.sparsifier import Sparsifier
from support.helpers import Net, adam, batch, bind, build, is_plus_zero, same, sgd, steps, train
from support.method_runs import assert_forecast, assert_resumes, supports_of
from support.runs import assert_same_run, record, tiny

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
            assert sparsifier.support.entered(before).nnz == 0  # no weight comes back
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


# --- deeper from cycle to cycle ------------------------------------------------------------------

THREE = phases(
    3, [(kind, "2st") for kind in ("dense", "sparse", "dense", "sparse", "dense", "sparse")]
).resolve(4)


@pytest.mark.parametrize("pattern", [Unstructured(0.95), ERK, Block((4, 1), 0.9)])
def test_every_sparse_phase_keeps_so_many_times_the_weights_of_the_next(
    pattern: Unstructured | Block,
) -> None:
    method = ACDC(pattern, THREE, taper=2)
    changes, sparsifier = supports_of(method, sgd)
    shapes = {name: tuple(p.shape) for name, p in sparsifier.params.items()}
    nnz = {step: counts and sum(counts.values()) for step, counts in changes}
    density = round(1 - pattern.target, 6)
    assert nnz == {
        2: pattern.at(round(1 - 4 * density, 6)).total(shapes),
        4: None,
        6: pattern.at(round(1 - 2 * density, 6)).total(shapes),
        8: None,
        10: pattern.total(shapes),
    }
    assert list(nnz) == [2, 4, 6, 8, 10]


def test_a_tapered_run_resumes_and_its_forecast_is_what_it_does() -> None:
    assert_resumes(ACDC(ERK, THREE, taper=1.5), adam)
    assert_forecast(ACDC(ERK, THREE, taper=1.5), sgd)
    # A ramp starts no higher than its phase ends: .5 is more than the 20 % of the first.
    method = ACDC(ERK, SCHEDULE, taper=4.0, ramp=0.6, first=0.5, every="3st")
    assert_forecast(method, sgd)
    changes, sparsifier = supports_of(method, sgd)
    kept = [sum((counts or {}).values()) / sparsifier.support.numel for _, counts in changes]
    assert kept == pytest.approx([0.8, 0.8, 0.8, 0.0, 0.5, 0.24, 0.2], abs=0.01)  # 0: dense


@pytest.mark.parametrize("taper", [0.5, "2", float("inf"), True])
def test_a_wrong_taper_is_a_sentence(taper: Any) -> None:
    with pytest.raises(InputError, match=r"ACDC\(taper=...\) is .*a number from 1 up, such as 2"):
        ACDC(ERK, THREE, taper=taper)
    with pytest.raises(InputError, match=r"sparsity cannot rise, and ramp is None and taper 2"):
        ACDC(NM(2, 4), THREE, taper=2)


# --- the mean of a dense phase -------------------------------------------------------------------


def averaged(**more: Any) -> ACDC:
    return ACDC(ERK, LONG, **{"average": 0.5} | more)


# D[0,6) S[6,9) D[9,14) S[14,18): means over the last 3 steps of the first dense phase and the last
# 2 of the second (half of 5, rounded to even).
SPANS = [("dense", "6st"), ("sparse", "3st"), ("dense", "5st"), ("sparse", "4st")]
LONG = phases(3, SPANS).resolve(6)
MEANS = {6: (4, 5, 6), 14: (13, 14)}


def test_what_is_cut_is_the_mean_of_the_end_of_the_dense_phase() -> None:
    model, optimizer, sparsifier = bind(averaged(), sgd)
    for start, cut in ((0, 6), (9, 14)):
        plain = copy.deepcopy(model)
        its = sgd(plain)
        its.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        networks = {}
        for step in steps(plain, its, start, cut):
            networks[step] = copy.deepcopy(dict(plain.state_dict()))
        train(model, optimizer, start, cut)
        mean = {
            name: sum(networks[s][name].double() for s in MEANS[cut]) / len(MEANS[cut])
            for name in networks[cut]
        }
        assert not optimizer.state
        weights = {n: mean[n] for n in sparsifier.params}
        assert sparsifier.support == ERK.select(score.magnitude(weights))
        for name, value in model.state_dict().items():
            expected = mean[name]
            if name in sparsifier.support:
                expected = expected.masked_fill(~sparsifier.support[name], 0.0)
            if name.endswith("num_batches_tracked"):
                assert int(value) == cut
            else:
                torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
        assert sparsifier.state_dict()["mean"]["network"] == {}  # used up, and freed
        if cut == 14:
            assert sparsifier.dense_twin is not None
            assert sparsifier.dense_twin.step == 14
            for name, value in sparsifier.dense_twin.model.items():
                if not name.endswith("num_batches_tracked"):
                    torch.testing.assert_close(value.double(), mean[name], rtol=1e-5, atol=1e-7)
        train(model, optimizer, cut, min(cut + 3, 18))


def test_a_mean_over_one_step_is_the_network_itself() -> None:
    model, optimizer, sparsifier = bind(averaged(average=0.01), adam)
    plain, its, reference = bind(ACDC(ERK, LONG), adam)
    train(model, optimizer, 0, 6)
    train(plain, its, 0, 6)
    assert sparsifier.support == reference.support
    assert same(model.state_dict(), plain.state_dict())
    assert not optimizer.state
    assert its.state  # without a mean, what the optimizer knows stays at a cut


@pytest.mark.parametrize("factory", [sgd, adam], ids=["sgd", "adam"])
@pytest.mark.parametrize("reset", ["all", "entered", "none"])
def test_a_run_with_means_resumes_after_every_step(factory: Any, reset: Any) -> None:
    assert_resumes(averaged(reset=reset), factory)


def test_means_change_no_count_and_every_step_is_sparse() -> None:
    assert_forecast(averaged(), sgd)
    assert_forecast(averaged(ramp=0.7, first=0.4, every="1st"), adam)


def test_an_advance_that_is_called_again_takes_no_step_twice() -> None:
    model, plain = build(), build()
    optimizer, its = sgd(model), sgd(plain)
    sparsifier = Sparsifier(averaged(), model, optimizer, automatic=False)
    reference = Sparsifier(averaged(), plain, its, automatic=False)
    for step in range(18):
        train(model, optimizer, step, step + 1)
        train(plain, its, step, step + 1)
        sparsifier.advance()
        sparsifier.advance()  # as after a step that a GradScaler skipped
        reference.advance()
        assert same(model.state_dict(), plain.state_dict())


def test_a_run_with_means_is_stopped_and_resumed(tmp_path: Path) -> None:
    recipe = tiny(method__average="0.5")
    runs.run(recipe, tmp_path / "whole", device="cpu")
    for step in (3, 11, 18):  # in the middle of a mean, in a sparse phase, in the last mean
        other = tmp_path / str(step)

        def stop(event: dict[str, Any], step: int = step) -> None:
            if event["event"] == "step" and event["step"] == step:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(runs.Interrupted):
            runs.run(recipe, other, device="cpu", watch=stop)
        runs.run(recipe, other, device="cpu", resume=True)
        assert_same_run(tmp_path / "whole", other)


@pytest.mark.parametrize("average", [0.0, 1.5, "40%", True])
def test_a_wrong_share_to_average_is_a_sentence(average: Any) -> None:
    with pytest.raises(InputError, match=r"ACDC\(average=...\) is .*share of every dense"):
        averaged(average=average)


# --- the norms of filters under BatchNorm --------------------------------------------------------


def restoring(**more: Any) -> ACDC:
    return ACDC(ERK, LONG, **{"restore_norms": True} | more)


def norms(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().flatten(1).norm(dim=1)


def outputs(model: nn.Module, training: bool) -> torch.Tensor:
    """Return the outputs of a copy of the model, whose statistics may move."""
    twin = copy.deepcopy(model).train(training)
    with torch.no_grad():
        return twin(batch(77)[0])  # type: ignore[no-any-return]


def test_filters_that_batchnorm_follows_get_their_norms_back_and_outputs_stay() -> None:
    model, optimizer, sparsifier = bind(restoring(), sgd)
    plain, its, _ = bind(ACDC(ERK, LONG), sgd)
    train(plain, its, 0, 6)
    before = {name: norms(p) for name, p in last_dense(6).items() if name in sparsifier.params}
    train(model, optimizer, 0, 8)
    train(plain, its, 6, 8)
    assert same(model.state_dict(), plain.state_dict())  # until the weights come back
    old = sparsifier.support
    train(model, optimizer, 8, 9)
    train(plain, its, 8, 9)
    assert sparsifier.support.is_full
    for name in ("conv1.weight", "conv2.weight"):
        now, weight = norms(model.get_parameter(name)), plain.get_parameter(name)
        living = norms(weight) > 0
        torch.testing.assert_close(now[living], before[name][living])
        assert (now[living] - norms(weight)[living]).abs().max() > 0.01
        assert is_plus_zero(model.get_parameter(name)[~old[name]])
    for name in ("fc1.weight", "fc2.weight"):  # no BatchNorm follows
        assert same(model.get_parameter(name), plain.get_parameter(name))
    # The bias of conv2 and both running statistics are multiplied with it.
    assert not torch.equal(model.conv2.bias, plain.conv2.bias)
    for training in (True, False):
        torch.testing.assert_close(
            outputs(model, training), outputs(plain, training), rtol=1e-3, atol=1e-4
        )
    assert sparsifier.state_dict()["method_state"] == {}


def last_dense(step: int) -> dict[str, torch.Tensor]:
    """Return the weights of plain training at a step."""
    plain = build()
    train(plain, sgd(plain), 0, step)
    return dict(plain.named_parameters())


@pytest.mark.parametrize("factory", [sgd, adam], ids=["sgd", "adam"])
def test_a_run_that_restores_norms_resumes_after_every_step(factory: Any) -> None:
    assert_resumes(restoring(), factory)
    assert_resumes(restoring(ramp=0.7, first=0.4, every="1st", average=0.5), factory)


def test_norms_are_those_of_before_the_first_cut_of_a_ramp() -> None:
    model, optimizer, sparsifier = bind(restoring(ramp=0.7, first=0.4, every="1st"), sgd)
    train(model, optimizer, 0, 8)  # cuts at 6, 7 and 8
    remembered = sparsifier.state_dict()["method_state"]
    assert [c.step for c in sparsifier.changes] == [6, 7, 8]
    for name, weight in last_dense(6).items():
        if name in remembered:
            assert same(remembered[name], norms(weight))
    assert set(remembered) == set(sparsifier.params)


def test_dsd_restores_norms_too() -> None:
    plan = phases(3, [("dense", "6st"), ("sparse", "3st"), ("dense", "9st")]).resolve(6)
    method = DSD(Unstructured(0.5, "uniform"), plan, restore_norms=True)
    before = norms(last_dense(6)["conv2.weight"])
    model, optimizer, _ = bind(method, sgd)
    train(model, optimizer, 0, 9)
    torch.testing.assert_close(norms(model.conv2.weight), before)
    assert_resumes(method, sgd)
    assert "restore_norms" not in bind(DSD(ERK, plan), sgd)[2].state_dict()["method"]


def test_an_engine_trains_with_means_and_restored_norms_alike() -> None:
    method = restoring(average=0.5)
    model = build()
    engine = acdc.Engine(model, batch(0)[0], backend=Reference(), choose=False)
    optimizer = sgd(model)
    Sparsifier(method, model, optimizer, engine=engine)
    plain, other, _ = bind(method, sgd)
    for step in range(18):
        assert engine.active == (LONG.phase_at(step).kind == "sparse")
        train(model, optimizer, step, step + 1)
        train(plain, other, step, step + 1)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_restored_norms_change_no_count() -> None:
    assert_forecast(restoring(), sgd)


def test_who_reads_whom_is_seen_once_and_then_there_is_no_hook() -> None:
    model, optimizer, sparsifier = bind(restoring(), sgd)

    def hooks() -> int:
        parts = list(model.modules())
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in parts)

    assert hooks() == 6  # four layers that BatchNorm may follow, and two BatchNorms
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    twin(batch(0)[0])  # its hooks do nothing
    train(model, optimizer, 0, 1)
    assert hooks() == 0
    found = {"conv1.weight": "bn1", "conv2.weight": "bn2"}
    assert sparsifier.state_dict()["followers"] == found
    assert "followers" not in bind(ACDC(ERK, LONG), sgd)[2].state_dict()


class Doubtful(Net):
    """``conv1`` is read by BatchNorm after a change, and ``bn2`` reads ``conv2`` twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x).add_(1.0)).relu()
        x = self.bn2(self.conv2(x)).relu() + self.bn2(self.conv2(-x)).relu()
        return self.fc2(self.fc1(x.mean((2, 3))).relu())  # type: ignore[no-any-return]


class Elsewhere(Net):
    """``bn1`` reads the input first, and ``conv2`` is called once without a BatchNorm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.bn1(x.repeat(1, 3, 1, 1)[:, :8])
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu() + self.conv2(-x)
        return self.fc2(self.fc1(x.mean((2, 3))).relu())  # type: ignore[no-any-return]


class Bare(Net):
    """BatchNorm reads no layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x).relu())
        x = self.bn2(self.conv2(x).relu())
        return self.fc2(self.fc1(x.mean((2, 3))).relu())  # type: ignore[no-any-return]


def test_only_what_batchnorm_reads_as_it_is_can_be_rescaled() -> None:
    model, optimizer, sparsifier = bind(restoring(), sgd, Doubtful)
    train(model, optimizer, 0, 1)
    # The same layer twice, by the same BatchNorm: both see the same factors.
    assert sparsifier.state_dict()["followers"] == {"conv2.weight": "bn2"}
    model, optimizer, sparsifier = bind(restoring(), sgd, Elsewhere)
    train(model, optimizer, 0, 1)
    assert sparsifier.state_dict()["followers"] == {}
    model, optimizer, _ = bind(restoring(), sgd, Bare)
    train(model, optimizer, 0, 8)
    with pytest.raises(InputError, match=r"no BatchNorm was seen that reads.*restore_norms=False"):
        train(model, optimizer, 8, 9)
