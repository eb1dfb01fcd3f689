"""A run resumes bitwise after any kill, and follows its recipe.

The file takes about 90 seconds on one thread.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from acdc import ACDC, Pair, Unstructured, constant, phases
from acdc.engine import choice, judge, verdict
from acdc.engine.backends import kernels
from acdc.engine.choice import Choice
from acdc.engine.engine import Engine
from acdc.errors import InputError
from acdc.methods import DPF, Static, TopKAST
from acdc.pages import run as report
from acdc.result import DenseNetwork, SparseNetwork
from acdc.runs import train
from acdc.runs.engine import why_off
from acdc.runs.models import Model
from acdc.runs.optim import Rewarm
from acdc.runs.recipe import Recipe
from acdc.runs.record import Metrics
from support.helpers import same
from support.runs import BRANCH, STEPS, TINY, assert_same_run, events, files, record, tiny, words

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train.run(tiny(), folder, device="cpu")
    return folder


def different(one: Path, other: Path) -> float:
    """Return the largest difference of the trained parameters of two pairs."""
    a, b = Pair.load(one / "pair"), Pair.load(other / "pair")
    own = [name for name in a.dense if not re.search("running|tracked", name)]
    return max(
        float((x[name] - y[name]).abs().max())
        for x, y in ((a.sparse, b.sparse), (a.dense, b.dense))
        for name in own
    )


# --- stopping and going on ----------------------------------------------------------------------

DEATHS: list[dict[str, Any]] = [
    {"at": "event", "like": {"event": "start"}},
    {"at": "event", "like": {"event": "step", "step": 2}},  # before the first checkpoint
    {"at": "rename", "count": 2},  # the second checkpoint is written, and is not in place
    {"at": "event", "like": {"event": "change", "step": 8}},
    {"at": "event", "like": {"event": "eval", "step": 16}},
    {"at": "event", "like": {"event": "change", "step": BRANCH}},
    {"at": "paired", "count": 1},  # the main leg is over, the second has not begun
    {"at": "event", "like": {"event": "step", "step": 22, "twin": "dense"}},
    {"at": "event", "like": {"event": "step", "step": STEPS, "twin": "dense"}},
    {"at": "paired", "count": 1},  # the final pair is there, the record is not
    {"at": "record"},
    {"at": "recorded"},  # events that were said before it have to be on the disk
]


def killed(folder: Path, settings: dict[str, str], deaths: list[dict[str, Any]]) -> list[int]:
    """Run ``killed.py`` and return how each attempt ended."""
    program = [sys.executable, "-m", "support.killed"]
    words = [*program, str(folder), json.dumps(settings), json.dumps(deaths)]
    done = subprocess.run(words, cwd=TESTS, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    ends: list[int] = json.loads(done.stdout.splitlines()[-1])
    return ends


@pytest.mark.slow
def test_killed_at_every_kind_of_moment_it_ends_bitwise_the_same(tmp_path: Path) -> None:
    settings = {"bn_batches": "2"}
    train.run(tiny(**settings), tmp_path / "whole", device="cpu")
    ends = killed(tmp_path / "killed", settings, DEATHS)
    assert ends == [-signal.SIGKILL] * len(DEATHS) + [0]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_bitwise_the_same(whole: Path, tmp_path: Path) -> None:
    deaths = [{"at": "time", "between": (0.05, 0.5)} for _ in range(4)]
    ends = killed(tmp_path / "killed", {}, deaths)
    assert ends[-1] == 0
    assert -signal.SIGKILL in ends
    assert set(ends[:-1]) <= {-signal.SIGKILL, 0}
    assert_same_run(whole, tmp_path / "killed")


def stop_at(step: int, number: signal.Signals) -> train.Watch:
    """Send this process a signal when a step has been taken."""

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step:
            os.kill(os.getpid(), number)

    return watch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_of_that_very_step(
    whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    recipe, folder = tiny(), tmp_path / "run"
    before = signal.getsignal(number)
    with pytest.raises(train.Interrupted, match=f"step 5 of {STEPS}") as stopped:
        train.run(recipe, folder, device="cpu", watch=stop_at(5, number))
    assert stopped.value.signal == number
    assert torch.load(folder / "checkpoint" / "last.ckpt", weights_only=True)["step"] == 5
    assert signal.getsignal(number) == before
    train.run(recipe, folder, device="cpu", resume=True)
    assert_same_run(whole, folder)


@pytest.mark.parametrize(("optimizer", "step"), [("sgd", 6), ("adamw", 14), ("sgd", 23)])
def test_with_a_mirror_step_scaled_rows_and_a_curve_by_phase_it_ends_as_if_it_had_not_stopped(
    tmp_path: Path, optimizer: str, step: int
) -> None:
    recipe = tiny(
        optimizer=optimizer,
        optimizer__mirror_alpha="5",
        optimizer__scale_rows="true",
        lr="rewarm",
        lr__sparse="0.5",
    )
    train.run(recipe, tmp_path / "whole", device="cpu")
    with pytest.raises(train.Interrupted):
        train.run(recipe, tmp_path / "run", device="cpu", watch=stop_at(step, signal.SIGTERM))
    train.run(recipe, tmp_path / "run", device="cpu", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert isinstance(recipe.lr, Rewarm)
    usual = recipe.lr.curve.factor(BRANCH, recipe.method.schedule.resolve(4))
    rates = [e["lr"] for e in events(tmp_path / "run", "step") if e["step"] == BRANCH + 1]
    # Those of the sparse network, and of the dense twin that is trained on.
    assert rates == pytest.approx([0.5 * usual * recipe.optimizer.lr] * 2)


def test_a_resumed_run_gives_its_start_event_to_the_watcher_and_not_to_the_file(
    tmp_path: Path,
) -> None:
    seen: list[dict[str, Any]] = []
    with pytest.raises(train.Interrupted):
        train.run(tiny(), tmp_path / "run", device="cpu", watch=stop_at(4, signal.SIGTERM))
    train.run(tiny(), tmp_path / "run", device="cpu", resume=True, watch=seen.append)
    assert [event["event"] for event in seen].count("start") == 1
    assert len(events(tmp_path / "run", "start")) == 1
    assert [e["step"] for e in events(tmp_path / "run", "step")] == [
        *range(1, STEPS + 1),
        *range(BRANCH + 1, STEPS + 1),
    ]


def test_a_finished_run_is_not_trained_again(whole: Path) -> None:
    before = files(whole)
    assert train.run(
        tiny(), whole, device="cpu", resume=True, watch=lambda _: pytest.fail("it trained")
    )
    assert files(whole) == before


# --- what a recipe says -------------------------------------------------------------------------


def test_the_test_data_chooses_nothing(whole: Path, tmp_path: Path) -> None:
    train.run(tiny(data__test_examples="7"), tmp_path / "run", device="cpu")
    assert files(tmp_path / "run") == files(whole)
    accuracies = [[e["accuracy"] for e in events(run, "eval")] for run in (whole, tmp_path / "run")]
    assert accuracies[0] != accuracies[1]


def test_the_dense_method_leaves_one_network(tmp_path: Path) -> None:
    made = train.run(
        tiny(method="dense", method__schedule__epochs="2"), tmp_path / "run", device="cpu"
    )
    assert made["sparse"] is None
    assert made["train_flops_ratio"] == made["inference_flops_ratio"] == 1
    assert list(files(tmp_path / "run")) == ["dense.json", "dense.safetensors"]
    assert DenseNetwork.load(tmp_path / "run" / "pair").facts["seed"] == 0
    assert made["dense"]["bytes"] == len(files(tmp_path / "run")["dense.safetensors"])
    assert made["dense"]["accuracy"] == events(tmp_path / "run", "eval")[-1]["accuracy"]
    assert not events(tmp_path / "run", "change")


def test_a_switch_of_phase_does_not_touch_the_learning_rate(whole: Path, tmp_path: Path) -> None:
    main = [e["lr"] for e in events(whole, "step") if "twin" not in e]
    tail = [e["lr"] for e in events(whole, "step") if "twin" in e]
    epochs = [math.floor(step / 4) for step in range(STEPS)]
    assert main == pytest.approx([0.05 * (1 + math.cos(math.pi * t / 7)) for t in epochs])
    assert tail == main[BRANCH:]


def test_the_twin_is_the_network_of_the_last_dense_step_trained_on(
    whole: Path, tmp_path: Path
) -> None:
    train.run(tiny(dense_finetune="false"), tmp_path / "run", device="cpu")
    left, tuned = Pair.load(tmp_path / "run" / "pair"), Pair.load(whole / "pair")
    assert left.facts["dense_step"] == BRANCH
    assert tuned.facts["dense_step"] == STEPS
    assert all(torch.equal(left.sparse[name], tuned.sparse[name]) for name in left.sparse)
    assert not torch.equal(left.dense["fc.weight"], tuned.dense["fc.weight"])
    # It goes on with the batch after the last that the twin had seen.
    x, y = tiny().data.load().train_batch(BRANCH // 4, 0, 32, seed=0)
    first = nn.functional.cross_entropy(left.dense_model(tiny().model.build())(x), y)
    tail = [e["loss"] for e in events(whole, "step") if "twin" in e]
    assert tail[0] == pytest.approx(first.item(), rel=1e-4)
    at_branch = next(e["accuracy"] for e in events(whole, "eval") if e["step"] == BRANCH)
    assert record(tmp_path / "run")["dense"]["accuracy"] == at_branch
    assert not [e for e in events(tmp_path / "run") if "twin" in e]


def test_fine_tuning_costs_the_samples_it_saw(tmp_path: Path) -> None:
    # The last of four batches has 24 of 32 images: no step is counted for more than it has.
    train.run(tiny(data__train_examples="120"), tmp_path / "run", device="cpu")
    details = record(tmp_path / "run")["details"]
    assert details["finetune_flops"] == 3 * details["dense_flops"] * 120 * 2
    assert details["train_flops_dense"] == 3 * details["dense_flops"] * 120 * 7


def test_batchnorm_statistics_are_averages_over_the_batches_asked_for(tmp_path: Path) -> None:
    recipe = tiny(bn_batches="2", dense_finetune="false", method__schedule__epochs="7")
    train.run(recipe, tmp_path / "run", device="cpu")
    pair = Pair.load(tmp_path / "run" / "pair")
    data = recipe.data.load()
    for state in (pair.sparse, pair.dense):
        conv = recipe.model.build().conv1
        conv.load_state_dict({"weight": state["conv1.weight"]})
        outputs = [
            conv(data.train_batch(0, index, recipe.batch_size, recipe.seed)[0]) for index in (0, 1)
        ]
        mean = torch.stack([x.mean((0, 2, 3)) for x in outputs]).mean(0)
        var = torch.stack([x.var((0, 2, 3)) for x in outputs]).mean(0)
        torch.testing.assert_close(state["bn1.running_mean"], mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(state["bn1.running_var"], var, atol=1e-5, rtol=1e-4)


@dataclass(frozen=True)
class Plain(Model):
    """A network without BatchNorm, for which the parts of a batch are independent."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return (1, 8, 8)

    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10), nn.Flatten()
        )


@dataclass(frozen=True)
class Dropping(Plain):
    """A network whose steps draw random numbers."""

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.5), super().build())


class Draw(nn.Module):
    """Returns its input, and notes a random number."""

    drawn: ClassVar[list[float]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.drawn.append(torch.rand(()).item())
        return x


@dataclass(frozen=True)
class Drawing(Plain):
    """A network that notes the random numbers of its steps."""

    def build(self) -> nn.Module:
        return nn.Sequential(Draw(), super().build())


def test_dropout_draws_anew_in_every_step_and_by_the_seed(tmp_path: Path) -> None:
    drawn = []
    for number, seed in enumerate(("0", "0", "1")):
        Draw.drawn.clear()
        recipe = tiny(method="dense", method__schedule__epochs="2", seed=seed)
        train.run(replace(recipe, model=Drawing()), tmp_path / str(number), device="cpu")
        drawn.append(list(Draw.drawn))
    assert drawn[0] == drawn[1]
    assert len({*drawn[0], *drawn[2]}) == 16  # two epochs of four steps, and two seeds


def test_dropout_draws_the_same_after_a_stop(tmp_path: Path) -> None:
    recipe = replace(tiny(), model=Dropping())
    train.run(recipe, tmp_path / "whole", device="cpu")
    with pytest.raises(train.Interrupted):
        train.run(recipe, tmp_path / "run", device="cpu", watch=stop_at(5, signal.SIGTERM))
    torch.rand(7)  # the generator of the process is elsewhere by then
    train.run(recipe, tmp_path / "run", device="cpu", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_batch_in_parts_is_the_same_step(tmp_path: Path) -> None:
    # 118 images in batches of 32: the last batch has 22, in parts of 6, 6, 6 and 4.
    recipe = replace(tiny(data__train_examples="118", label_smoothing="0.1"), model=Plain())
    train.run(recipe, tmp_path / "1", device="cpu")
    train.run(replace(recipe, accumulate=4), tmp_path / "4", device="cpu")
    assert different(tmp_path / "1", tmp_path / "4") < 1e-5
    losses = [[e["loss"] for e in events(tmp_path / n, "step")] for n in "14"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_two_processes_train_what_one_trains_in_two_parts(tmp_path: Path) -> None:
    """Two processes train on the halves of a batch, and BatchNorm sees each half separately."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    settings = {**TINY, "devices": "2"}
    command = [sys.executable, "-m", "acdc", "run", "digits", *words(settings)]
    command += ["--device", "cpu", "--out", str(tmp_path), "--json"]
    # Stopped once on its way: both processes have to agree to it.
    first = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=env,
                             text=True)  # fmt: skip
    assert first.stderr is not None
    for line in first.stderr:
        if line.startswith("epoch 2"):
            first.send_signal(signal.SIGTERM)
            break
    log = first.stderr.read()
    assert first.wait(timeout=60) == 128 + signal.SIGTERM, log
    assert "Nothing is lost" in log
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=env,
                          timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1  # the helper said nothing
    assert done.stderr.count("Report: ") == 1
    assert "Initializing" not in log + done.stderr
    run = Path(json.loads(done.stdout)["run"])
    train.run(tiny(accumulate="2"), tmp_path / "one", device="cpu")
    assert different(run, tmp_path / "one") < 1e-4
    one, two = events(tmp_path / "one", "step"), events(run, "step")
    assert [e["loss"] for e in two] == pytest.approx([e["loss"] for e in one], rel=1e-3)


def test_tensorboard_holds_the_numbers_of_the_metrics(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(whole / "tensorboard"), {"scalars": 0}).Reload()
    for twin, group in ((False, "sparse"), (True, "dense")):
        for kind, number in (("step", "loss"), ("step", "lr"), ("eval", "accuracy")):
            logged = [(e.step, e.value) for e in seen.Scalars(f"{kind}/{group}/{number}")]
            own = [(e["step"], e[number]) for e in events(whole, kind) if ("twin" in e) == twin]
            assert [step for step, _ in logged] == [step for step, _ in own]
            assert [v for _, v in logged] == pytest.approx([v for _, v in own], rel=1e-6)


def test_a_run_without_tensorboard_is_the_same_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    missing = "tensorboard"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == missing else find(name)
    )
    train.run(tiny(), tmp_path / "run", device="cpu")
    assert_same_run(whole, tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_the_generator_and_the_threads_of_the_process_are_left_as_they_were(
    tmp_path: Path,
) -> None:
    torch.manual_seed(7)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(7)
    recipe = tiny(method="dense", method__schedule__epochs="1", threads=str(threads + 1))
    train.run(recipe, tmp_path / "run", device="cpu")
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


# --- the engine ---------------------------------------------------------------------------------


def sparse_by(choose: Callable[[str], bool]) -> Callable[..., Choice]:
    """Return a measurement without timing, with a fixed outcome."""
    return lambda site, *given: Choice(choose(site.name), given[2], 2.0, 1.0, 0.25)


def pinned(monkeypatch: pytest.MonkeyPatch, choose: Callable[[str], bool]) -> None:
    """Let the engine choose by name and not by the clock."""
    monkeypatch.setattr(choice, "measure", sparse_by(choose))
    monkeypatch.setattr(choice, "segment_pays", lambda *_: True)
    monkeypatch.setattr(judge, "clock", lambda: 0.0)


def checkpoint(folder: Path) -> dict[str, Any]:
    """Return the last checkpoint."""
    state: dict[str, Any] = torch.load(folder / "checkpoint" / "last.ckpt", weights_only=True)
    return state


class Death(Exception):
    """Ends a run as a crash does, without a checkpoint."""


def die_at(step: int) -> train.Watch:
    """Raise when a step has been taken."""

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step:
            raise Death

    return watch


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_the_engine_trains_what_pytorch_trains(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    pinned(monkeypatch, lambda _: True)
    firsts = []
    for mode in ("off", engine):
        recipe = tiny(engine=mode)
        with pytest.raises(train.Interrupted):
            train.run(recipe, tmp_path / mode, device="cpu", watch=stop_at(4, signal.SIGTERM))
        firsts.append(checkpoint(tmp_path / mode))
    # Up to the first compression nothing is computed by it, and nothing else is touched either.
    for name in ("model", "optimizer", "batches"):
        assert same(firsts[0][name], firsts[1][name])
    assert same(firsts[0]["sparsifier"]["support"], firsts[1]["sparsifier"]["support"])
    train.run(tiny(engine=engine), tmp_path / engine, device="cpu", resume=True)
    mine, dense = events(tmp_path / engine, "step"), events(whole, "step")
    assert [e["step"] for e in mine] == [e["step"] for e in dense]
    assert [e["loss"] for e in mine[:8]] == pytest.approx([e["loss"] for e in dense[:8]], rel=1e-4)
    assert [e["loss"] for e in mine] == pytest.approx([e["loss"] for e in dense], rel=0.02)
    assert files(tmp_path / engine) != files(whole)  # it was not PyTorch that computed


def test_stopped_in_a_sparse_phase_it_goes_on_with_what_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(engine="auto")
    pinned(monkeypatch, lambda name: "layer2" not in name)
    train.run(recipe, tmp_path / "whole", device="cpu")
    with pytest.raises(train.Interrupted):
        train.run(recipe, tmp_path / "run", device="cpu", watch=stop_at(6, signal.SIGTERM))
    monkeypatch.setattr(choice, "measure", lambda *_: pytest.fail("it chose again"))
    train.run(recipe, tmp_path / "run", device="cpu", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    chosen = {
        c["name"]: c["sparse"] for c in record(tmp_path / "run")["details"]["engine"]["choices"]
    }
    assert len(chosen) == 10
    assert chosen == {name: "layer2" not in name for name in chosen}


def test_what_was_chosen_is_on_the_disk_before_a_step_is_computed_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(engine="auto", checkpoint_steps="100")
    pinned(monkeypatch, lambda name: name == "conv1")
    with pytest.raises(Death):
        train.run(recipe, tmp_path / "run", device="cpu", watch=die_at(5))
    state = checkpoint(tmp_path / "run")
    assert state["step"] == 4
    choices = state["sparsifier"]["engine"]["choices"]
    assert [name for name, choice in choices.items() if choice["sparse"]] == ["conv1"]


def test_a_verdict_is_on_the_disk_before_a_step_is_computed_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps take no time here, so everything stays on after two blocks: 6 sparse steps."""
    monkeypatch.setattr(verdict, "IGNORED", 1)
    monkeypatch.setattr(verdict, "COUNTED", 2)
    pinned(monkeypatch, lambda _: True)
    recipe, folder = tiny(engine="auto", checkpoint_steps="100"), tmp_path / "run"
    train.run(recipe, tmp_path / "whole", device="cpu")
    steps = [e["step"] for e in events(tmp_path / "whole", "step") if e["phase"] == "sparse"]
    last = steps[5]
    with pytest.raises(Death):
        train.run(recipe, folder, device="cpu", watch=die_at(last + 1))
    assert checkpoint(folder)["step"] == last
    trials = checkpoint(folder)["sparsifier"]["engine"]["trials"]
    (kind,) = [kind for kind in trials if kind.startswith("training")]
    assert len(trials[kind]["blocks"]) == 2
    train.run(recipe, folder, device="cpu", resume=True)
    assert_same_run(tmp_path / "whole", folder)
    found = [v for e in events(folder, "verdict") for v in e["verdicts"]]
    assert kind in [v["kind"] for v in found]
    assert all(v["off"] == [] and not v["dense"] for v in found)
    assert record(folder)["details"]["engine"]["verdicts"] == found
    page = report.render(folder).read_text("utf-8")
    assert "Judged by whole steps: training, about" in page


@pytest.mark.slow
def test_killed_while_the_engine_computes_it_ends_bitwise_the_same(tmp_path: Path) -> None:
    settings = {"engine": "reference"}  # which chooses nothing, so that two fresh runs are the same
    deaths: list[dict[str, Any]] = [
        {"at": "event", "like": {"event": "engine", "step": 4}},
        {"at": "event", "like": {"event": "step", "step": 7}},
        {"at": "event", "like": {"event": "engine", "step": 12}},
        {"at": "event", "like": {"event": "eval", "step": 16}},
        {"at": "event", "like": {"event": "step", "step": 22, "twin": "dense"}},
    ]
    train.run(tiny(**settings), tmp_path / "whole", device="cpu")
    ends = killed(tmp_path / "killed", settings, deaths)
    assert ends == [-signal.SIGKILL] * len(deaths) + [0]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_the_choices_are_told_once_and_kept_in_the_record(tmp_path: Path) -> None:
    train.run(tiny(engine="auto"), tmp_path / "run", device="cpu")
    first, *later = events(tmp_path / "run", "engine")
    assert [first["step"], *(e["step"] for e in later)] == [4, 12, 20]
    assert all("choices" not in event for event in later)
    kept = record(tmp_path / "run")["details"]["engine"]
    verdicts = kept.pop("verdicts")
    assert verdicts == [v for e in events(tmp_path / "run", "verdict") for v in e["verdicts"]]
    assert kept == {key: first[key] for key in ("kind", "reason", "choices", "refused")}
    assert kept["kind"] == kernels().isa
    assert len(kept["choices"]) + len(kept["refused"]) == 10
    assert all(choice["dense_ms"] > 0 for choice in kept["choices"])
    assert {e["event"]: e for e in events(tmp_path / "run")}["start"]["engine"]["kind"] != "off"


def test_a_schedule_that_begins_sparse_says_its_first_support(tmp_path: Path) -> None:
    spans = phases(4, [("sparse", "1ep"), ("dense", "1ep"), ("sparse", "2ep")])
    recipe = replace(tiny(engine="reference"), method=ACDC(Unstructured(0.9), spans))
    with pytest.raises(Death):
        train.run(recipe, tmp_path / "run", device="cpu", watch=die_at(1))
    train.run(recipe, tmp_path / "run", device="cpu", resume=True)
    names = [e["event"] for e in events(tmp_path / "run")]
    assert names[:4] == ["start", "change", "engine", "step"]
    assert [e["step"] for e in events(tmp_path / "run", "change")] == [0, 4, 8]
    assert len(events(tmp_path / "run", "start")) == 1


@pytest.mark.parametrize(
    ("device", "precision", "reason"),
    [
        ("cpu", "32-true", None),
        ("cuda:1", "32-true", "the run is on cuda:1, and the kernels are for CPUs"),
        ("mps", "32-true", "the run is on mps, and the kernels are for CPUs"),
        ("cpu", "bf16-mixed", "the run computes in bf16-mixed, and the kernels in 32-true"),
    ],
)
def test_why_a_run_has_no_engine(device: str, precision: str, reason: str | None) -> None:
    assert why_off(torch.device(device), precision) == reason


def test_an_engine_that_stays_off_says_so(tmp_path: Path) -> None:
    recipe = tiny(engine="auto", precision="bf16-mixed")
    with pytest.raises(train.Interrupted):
        train.run(recipe, tmp_path / "run", device="cpu", watch=stop_at(5, signal.SIGTERM))
    (start,) = events(tmp_path / "run", "start")
    assert start["engine"]["kind"] == "off"
    assert "bf16-mixed" in start["engine"]["reason"]
    assert not events(tmp_path / "run", "engine")


@pytest.mark.parametrize("settings", [{"engine": "off"}, {"engine": "auto", "method": "dense"}])
def test_who_needs_no_engine_has_none(
    whole: Path, tmp_path: Path, settings: dict[str, str]
) -> None:
    more = {} if "method" not in settings else {"method__schedule__epochs": "1"}
    train.run(tiny(**settings, **more), tmp_path / "run", device="cpu")
    assert record(tmp_path / "run")["details"]["engine"] == {"kind": "off", "reason": None}


def test_a_run_that_began_before_there_was_an_engine_goes_on_without(
    whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(train.Interrupted):
        train.run(tiny(), folder, device="cpu", watch=stop_at(6, signal.SIGTERM))
    values = json.loads((folder / "recipe.json").read_text())
    del values["values"]["engine"]
    (folder / "recipe.json").write_text(json.dumps(values))
    state = checkpoint(folder)
    del state["recipe"]["engine"], state["sparsifier"]["engine"], state["pair"]
    state["format"] = 1  # which had no checksum either
    torch.save(state, folder / "checkpoint" / "last.ckpt")
    train.run(tiny(engine="auto"), folder, device="cpu", resume=True)
    assert files(folder) == files(whole)
    assert record(folder)["details"]["engine"]["kind"] == "off"


def test_the_time_of_a_step_is_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress, evaluate = Engine.compress, train.evaluate

    def slow_compress(self: Engine, support: Any) -> None:
        time.sleep(0.5)
        compress(self, support)

    def slow_evaluate(run: Any) -> dict[str, float]:
        time.sleep(0.5)  # no work: the processors are not asked
        return evaluate(run)

    monkeypatch.setattr(Engine, "compress", slow_compress)
    monkeypatch.setattr(train, "evaluate", slow_evaluate)
    made = train.run(tiny(engine="auto"), tmp_path / "run", device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    steps = [e for e in lines if e["event"] == "step"]
    assert max(e["seconds"] for e in steps) < 0.5
    assert all(e["seconds"] > 0.5 for e in lines if e["event"] in ("engine", "eval"))
    spent = json.loads((tmp_path / "run/record.json").read_text())["details"]["time"]
    assert spent == made["details"]["time"]
    worked = [e for e in lines if e["event"] in ("step", "engine") and "twin" not in e]
    assert spent["cpu"] == pytest.approx(sum(e["cpu_seconds"] for e in worked), abs=1e-3)
    assert all(e["cpu_seconds"] >= 0 for e in lines if "cpu_seconds" in e)
    asleep = [e for e in lines if e["event"] in ("engine", "eval")]
    assert all(e["seconds"] - e["cpu_seconds"] > 0.3 for e in asleep)
    for phase, count in (("dense", 12), ("sparse", 16)):
        mine = [e["seconds"] for e in steps if e["phase"] == phase and "twin" not in e]
        assert len(mine) == count
        assert spent[phase] == pytest.approx(sum(mine), abs=1e-3)
        assert spent[f"{phase}_step_ms"] == pytest.approx(1e3 * sum(mine) / count, abs=1e-2)
    tail = [e["seconds"] for e in steps if "twin" in e]
    assert spent["finetune"] == pytest.approx(sum(tail), abs=1e-3)
    for part, kind, count in (("engine", "engine", 3), ("evaluation", "eval", 9)):
        mine = [e["seconds"] for e in lines if e["event"] == kind]
        assert len(mine) == count
        assert spent[part] == pytest.approx(sum(mine), abs=1e-3)
    assert made["details"]["peak_memory"] > 1e8


# --- what can go wrong --------------------------------------------------------------------------


def test_a_full_disk_under_the_metrics_is_a_sentence_and_the_run_goes_on_later(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, calls = Metrics.sync, []

    def full(self: Metrics) -> int:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return sync(self)

    monkeypatch.setattr(Metrics, "sync", full)
    with pytest.raises(InputError, match=r"No space left on device.*last checkpoint.*--resume"):
        train.run(tiny(), tmp_path / "run", device="cpu")
    assert torch.load(tmp_path / "run/checkpoint/last.ckpt", weights_only=True)["step"] == 6
    train.run(tiny(), tmp_path / "run", device="cpu", resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    recipe = tiny(optimizer__lr="1e30", checkpoint_steps="1")
    with pytest.raises(InputError, match=r"training diverged.*last checkpoint.*optimizer\.lr"):
        train.run(recipe, tmp_path / "run", device="cpu")
    state = torch.load(tmp_path / "run/checkpoint/last.ckpt", weights_only=True)
    assert state["step"] == events(tmp_path / "run", "step")[-1]["step"]


def test_a_schedule_that_makes_no_pair_is_refused_before_training(tmp_path: Path) -> None:
    recipe = tiny()
    spans = phases(2, [("sparse", "1ep"), ("dense", "1ep")])
    recipe = replace(recipe, method=ACDC(Unstructured(0.9), spans))
    with pytest.raises(InputError, match=r"ends sparse and dense\. A pair needs"):
        train.run(recipe, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_other_data_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny()
    with pytest.raises(train.Interrupted):
        train.run(recipe, tmp_path / "run", device="cpu", watch=stop_at(4, signal.SIGTERM))
    kind = type(recipe.data.load())
    monkeypatch.setattr(kind, "digest", lambda _: "another")
    with pytest.raises(InputError, match="other data"):
        train.run(recipe, tmp_path / "run", device="cpu", resume=True)


# --- sparse from the first step -----------------------------------------------------------------


def _sparse_only(method: type, **more: Any) -> Recipe:
    plan = constant("sparse", epochs=3)
    return replace(tiny(), method=method(Unstructured(0.75), plan, **more), dense_finetune=False)


def test_a_run_that_is_sparse_throughout_leaves_a_sparse_network_alone(tmp_path: Path) -> None:
    result = train.run(_sparse_only(Static), tmp_path / "run", device="cpu")
    assert result["dense"] is None
    assert result["sparse"]["sparsity"] == pytest.approx(0.75, abs=1e-3)
    assert result["train_flops_ratio"] == pytest.approx(result["inference_flops_ratio"])
    left = SparseNetwork.load(tmp_path / "run" / "pair")
    state, support = left.sparse, left.support
    assert support.nnz == result["sparse"]["nnz"]
    assert all(not state[name][~mask].any() for name, mask in support.items())
    with pytest.raises(InputError, match="left no dense network"):
        train.run(replace(tiny(), start="run"), tmp_path / "next", device="cpu")


def test_the_dense_weights_behind_a_sparse_network_outlive_an_evaluation(tmp_path: Path) -> None:
    """The last step ends an epoch: its evaluation is sparse, and the dense weights are kept."""
    recipe = _sparse_only(DPF)
    result = train.run(recipe, tmp_path / "run", device="cpu")
    pair = Pair.load(tmp_path / "run" / "pair")
    grown = sum(int(pair.dense[name][~mask].count_nonzero()) for name, mask in pair.support.items())
    assert grown > pair.support.nnz / 2
    assert all(not pair.sparse[name][~mask].any() for name, mask in pair.support.items())
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    last = [event for event in lines if event["event"] == "eval"][-1]
    assert last["accuracy"] == result["sparse"]["accuracy"]


@pytest.mark.parametrize("method", [Static, TopKAST])
def test_a_sparse_run_that_stopped_ends_as_if_it_had_not(tmp_path: Path, method: type) -> None:
    recipe = _sparse_only(method)
    train.run(recipe, tmp_path / "straight", device="cpu")

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.run(recipe, tmp_path / "stopped", device="cpu", watch=watch)
    train.run(recipe, tmp_path / "stopped", device="cpu", resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
