"""A sparsifier attached from a saved state, plans that change at resume, averages, extra state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import acdc
from acdc.errors import InputError

Spans = list[tuple[Any, int]]
PLAN: Spans = [("dense", 2), ("sparse", 2), ("dense", 2), ("sparse", 3)]


def schedule(spans: Spans) -> acdc.Schedule:
    phases, start = [], 0
    for kind, length in spans:
        phases.append(acdc.Phase(kind, start, start + length))
        start += length
    return acdc.Schedule(tuple(phases), (start,))


class Run:
    """A small network under AC/DC, step by step."""

    def __init__(self, spans: Spans, saved: dict[str, Any] | None = None) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 5))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        state = None
        if saved is not None:
            self.net.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            state = saved["sparsifier"]
        method = acdc.ACDC(acdc.Unstructured(0.9), schedule(spans))
        self.sparsifier = acdc.Sparsifier(method, self.net, self.optimizer, state=state)

    def train(self, until: int) -> Run:
        while self.sparsifier.step < until:
            draw = torch.Generator().manual_seed(self.sparsifier.step)
            self.net(torch.randn(8, 12, generator=draw)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def saved(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "model": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "sparsifier": self.sparsifier.state_dict(),
            }
        )


def same(one: Run, other: Run) -> bool:
    a, b = one.net.state_dict(), other.net.state_dict()
    twins = (one.sparsifier.pair(), other.sparsifier.pair())
    return all(torch.equal(a[name], b[name]) for name in a) and twins[0] == twins[1]


# --- state= ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [PLAN, [("sparse", 3), ("dense", 2), ("sparse", 4)]])
@pytest.mark.parametrize("at", range(1, 9))
def test_a_sparsifier_attached_from_a_state_cuts_nothing(plan: Spans, at: int) -> None:
    """Also where the model was loaded before, and the schedule begins sparse."""
    straight = Run(plan).train(9)
    saved = Run(plan).train(at).saved()
    resumed = Run(plan, saved)
    assert all(torch.equal(resumed.net.state_dict()[n], w) for n, w in saved["model"].items())
    assert same(resumed.train(9), straight)


def test_a_model_loaded_before_attaching_without_the_state_would_be_cut() -> None:
    plan: Spans = [("sparse", 3), ("dense", 2), ("sparse", 4)]
    saved = Run(plan).train(4).saved()
    without = saved | {"sparsifier": None}
    assert not torch.equal(Run(plan, without).net[0].weight, saved["model"]["0.weight"])


# --- plans that change ----------------------------------------------------------------------------

LONGER: list[Spans] = [
    [*PLAN[:3], ("sparse", 7)],  # the last phase grows
    [*PLAN, ("dense", 2), ("sparse", 2)],  # phases follow
    [*PLAN[:3], ("sparse", 5), ("dense", 3), ("sparse", 1)],
]


@pytest.mark.parametrize("longer", LONGER)
@pytest.mark.parametrize("at", [1, 4, 6, 7, 9])
def test_a_plan_may_grow_at_resume(longer: Spans, at: int) -> None:
    """Also that of a run that was finished: it goes on as if it had had the long plan all along."""
    total = schedule(longer).total
    straight = Run(longer).train(total)
    resumed = Run(longer, Run(PLAN).train(at).saved()).train(total)
    assert same(resumed, straight)
    assert resumed.sparsifier.changes == straight.sparsifier.changes


def test_a_plan_may_shrink_where_it_lies_ahead() -> None:
    shorter: Spans = [*PLAN[:3], ("sparse", 2)]
    resumed = Run(shorter, Run(PLAN).train(7).saved()).train(8)
    assert same(resumed, Run(shorter).train(8))


@pytest.mark.parametrize(
    ("other", "at", "match"),
    [
        ([("dense", 3), *PLAN[1:]], 4, "a sparse phase at step 2 where this one has a sparse"),
        ([("dense", 9)], 4, "where this one has no phase"),
        ([*PLAN[:2], ("dense", 5)], 9, "where this one has no phase"),
        ([*PLAN[:3], ("sparse", 1)], 9, "ends at 7"),
        ([*PLAN[:2]], 5, "ends at 4"),
    ],
)
def test_another_past_is_refused(other: Spans, at: int, match: str) -> None:
    saved = Run(PLAN).train(at).saved()
    with pytest.raises(InputError, match=match):
        Run(other, saved)


def test_a_plan_whose_last_dense_phase_has_passed_without_a_twin_is_refused() -> None:
    """The dense twin is captured at the end of the last dense phase alone."""
    saved = Run(PLAN).train(3).saved()
    with pytest.raises(InputError, match="was not kept"):
        Run(PLAN[:2], saved)


# --- averages -------------------------------------------------------------------------------------


def ema(net: nn.Module) -> AveragedModel:
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))


def averaged_run(register: bool = True) -> tuple[Run, AveragedModel, dict[int, dict[str, Tensor]]]:
    run = Run(PLAN)
    average = ema(run.net)
    if register:
        run.sparsifier.register_average(average)
    seen = {}
    for step in range(1, 10):
        run.train(step)
        average.update_parameters(run.net)
        seen[step] = copy.deepcopy(average.module.state_dict())
    return run, average, seen


def test_a_pair_of_averages(tmp_path: Path) -> None:
    run, average, seen = averaged_run()
    pair = run.sparsifier.pair(average=average, note="ema")
    for name, mask in pair.support.items():
        assert not pair.sparse[name][~mask].any()
        assert torch.equal(pair.sparse[name][mask], seen[9][name][mask])
        assert average.module.state_dict()[name][~mask].any()  # the average itself is left alone
    # The dense phase ends with step 6; the average was last updated after step 5.
    assert all(torch.equal(pair.dense[name], seen[5][name]) for name in pair.dense)
    assert pair.facts["average"]
    assert pair.facts["note"] == "ema"
    pair.save(tmp_path)
    assert acdc.Pair.load(tmp_path) == pair
    assert run.sparsifier.pair() != pair


def test_a_pair_of_averages_survives_a_resume() -> None:
    run, average, _ = averaged_run()
    resumed = Run(PLAN, run.saved())
    assert resumed.sparsifier.pair(average=average) == run.sparsifier.pair(average=average)


def test_an_average_that_was_not_registered_or_is_of_another_model_is_refused() -> None:
    run, average, _ = averaged_run(register=False)
    with pytest.raises(InputError, match="was not captured"):
        run.sparsifier.pair(average=average)
    run, _, _ = averaged_run()
    with pytest.raises(InputError, match="The average has no weight"):
        run.sparsifier.pair(average=AveragedModel(nn.Linear(3, 3)))


# --- extra state ----------------------------------------------------------------------------------


class Counting(nn.Linear):
    def get_extra_state(self) -> object:
        return {"version": 1, "calls": [1, 2]}

    def set_extra_state(self, state: object) -> None:
        self.loaded = state


def test_extra_state_of_a_module_is_left_out_and_the_model_keeps_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(PLAN)
    run.net.append(Counting(5, 5))
    run.optimizer.add_param_group({"params": list(run.net[3].parameters())})
    pair = run.train(9).sparsifier.pair()
    assert "'3._extra_state'" in caplog.text
    assert "3._extra_state" not in pair.sparse
    pair.save(tmp_path)
    fresh = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 5), Counting(5, 5))
    acdc.Pair.load(tmp_path).sparse_model(fresh)
    assert torch.equal(fresh[3].weight, run.net[3].weight)
    assert fresh[3].loaded == {"version": 1, "calls": [1, 2]}
