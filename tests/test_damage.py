"""Runs whose files were damaged while they were stopped, and two runs in one folder."""

from __future__ import annotations

import html
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from acdc.errors import InputError
from acdc.files import alone
from acdc.pages import run as report
from acdc.runs import checkpoint, record, sealed, train
from acdc.runs.models import Model
from acdc.runs.sealed import Damaged
from support.helpers import same
from support.runs import BRANCH, assert_same_run, events, tiny

STOPPED = 24  # in the fine-tuning of the dense twin; the checkpoint before is of step 21
Change = Callable[[dict[str, Any]], object]


def stop_at(step: int, twin: bool = True) -> train.Watch:
    """Ask this process to stop when a step has been taken."""

    def watch(event: dict[str, Any]) -> None:
        if (event["event"], event["step"], "twin" in event) == ("step", step, twin):
            os.kill(os.getpid(), signal.SIGTERM)

    return watch


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train.run(tiny(), folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped while its dense twin was trained on."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(train.Interrupted):
        train.run(tiny(), folder, device="cpu", watch=stop_at(STOPPED))
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def resume(run: Path) -> list[str]:
    """Resume a run to its end, and return the warnings that it showed."""
    said: list[str] = []

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "warning":
            said.append(event["text"])

    train.run(tiny(), run, device="cpu", resume=True, watch=watch)
    return said


# --- checkpoints ---------------------------------------------------------------------------------


def test_every_bit_of_a_checkpoint_is_covered(stopped: Path) -> None:
    data = (stopped / "checkpoint" / "last.ckpt").read_bytes()
    state, has_hash = sealed.load(data)
    assert has_hash
    assert same(state, torch.load(stopped / "checkpoint" / "last.ckpt", weights_only=True))
    draw = random.Random(0)
    bits = {draw.randrange(8 * len(data)) for _ in range(200)}
    bits |= {*range(8 * 40), *range(8 * (len(data) - 110), 8 * len(data))}  # the ends, in full
    for bit in bits:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damaged):
            sealed.load(bytes(damaged))
    for size in (0, 1, 22, 1000, len(data) // 2, len(data) - 76, len(data) - 1):
        with pytest.raises(Damaged):
            sealed.load(data[:size])
    with pytest.raises(Damaged):
        sealed.load(data + b"\0")


@pytest.mark.parametrize("damage", ["flipped", "removed"])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before_it(
    whole: Path, run: Path, damage: str
) -> None:
    last = run / "checkpoint" / "last.ckpt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 4
    left = bytes(data) if damage == "flipped" else None
    if left is None:
        last.unlink()
    else:
        last.write_bytes(left)
    (warning,) = resume(run)
    assert "last.ckpt cannot be read" in warning
    assert f"previous.ckpt, at step {STOPPED - 3}" in warning
    assert_same_run(whole, run)
    aside = run / "checkpoint" / "damaged.ckpt"
    assert (aside.read_bytes() if aside.exists() else None) == left
    # The damaged one has not taken the place of the one before it.
    for path in (last, last.with_name("previous.ckpt")):
        assert sealed.load(path.read_bytes())[1]


def test_a_run_that_was_killed_after_it_set_a_damaged_checkpoint_aside_goes_on(
    whole: Path, run: Path
) -> None:
    (run / "checkpoint" / "last.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(train.Interrupted):
        train.run(tiny(), run, device="cpu", resume=True, watch=stop_at(STOPPED - 2))
    assert resume(run) == []
    assert_same_run(whole, run)


def without(*path: str) -> Change:
    """Return a change that removes an entry."""

    def change(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


def put(value: Any, *path: Any) -> Change:
    """Return a change that replaces an entry."""

    def change(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


ENTRIES = ("recipe", "data", "leg", "step", "batches", "batches_at_twin", "seconds", "metrics",
           "model", "optimizer", "sparsifier", "precision", "pair")  # fmt: skip
TWIN = ("sparsifier", "dense_twin")
FORGED: dict[str, Change] = {
    **{f"no {name}": without(name) for name in ENTRIES},
    **{f"null for {name}": put(None, name) for name in ENTRIES},
    **{f"a list for {name}": put([], name) for name in ENTRIES},
    "step is true": put(True, "step"),
    "step is below zero": put(-1, "step"),
    "step is too large": put(10**9, "step"),
    "seconds are not finite": put(float("nan"), "seconds"),
    "metrics below zero": put(-5, "metrics"),
    "an unknown leg": put("third", "leg"),
    "no such tensor": without("model", "conv1.weight"),
    "one tensor more": put(torch.zeros(2), "model", "more"),
    "another shape": put(torch.zeros(3), "model", "conv1.weight"),
    "another type": put(torch.zeros((8, 1, 3, 3), dtype=torch.int8), "model", "conv1.weight"),
    "no tensor": put("text", "model", "conv1.weight"),
    "optimizer: no state": without("optimizer", "state"),
    "optimizer: another shape": put({"momentum_buffer": torch.zeros(3)}, "optimizer", "state", 0),
    "optimizer: no momentum": put({"other": torch.zeros(3)}, "optimizer", "state", 0),
    "optimizer: momentum is text": put({"momentum_buffer": "x"}, "optimizer", "state", 0),
    "optimizer: one parameter more": put({}, "optimizer", "state", 10**6),
    "optimizer: keys are text": put({"a": {}}, "optimizer", "state"),
    **{
        f"sparsifier: no {name}": without("sparsifier", name)
        for name in (
            "format",
            "step",
            "support",
            "changes",
            "dense_twin",
            "engine",
            "schedule",
            "shapes",
            "method",
            "method_state",
            "dense_weights",
            "trained",
        )
    },
    "sparsifier: another step": put(3, "sparsifier", "step"),
    "sparsifier: a mask of another size": put(
        torch.zeros(1, dtype=torch.uint8), "sparsifier", "support", "layer1.0.conv1.weight"
    ),
    "sparsifier: no mask": put({}, "sparsifier", "support"),
    "sparsifier: a change without step": put([{"to": "dense"}], "sparsifier", "changes"),
    "sparsifier: a schedule of text": put("x", "sparsifier", "schedule"),
    "no dense twin": put(None, *TWIN),
    "the twin has another shape": put(torch.zeros(3), *TWIN, "model", "conv1.weight"),
    "the twin's optimizer is another": put({"x": 1}, *TWIN, "optimizer", "state", 0),
    "the pair lacks a tensor": without("pair", "sparse", "conv1.weight"),
    "the pair is dense": lambda state: state["pair"].update(sparse=state["model"]),
    "facts of the pair are a list": put([1], "pair", "facts"),
    "what computed it is text": put("x", "computed"),
    "warnings are text": put("x", "warnings"),
    "a warning without step": put([{"text": "x"}], "warnings"),
    "dense weights of another shape": put(
        {"conv1.weight": torch.zeros(1)}, "sparsifier", "dense_weights"
    ),
}


@pytest.fixture(scope="module")
def loop(stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> train._Loop:
    """A run that is set up, and whose checkpoint is to be loaded."""
    folder = Path(shutil.copytree(stopped, tmp_path_factory.mktemp("forged") / "run"))
    recipe = tiny()
    fabric = train.make_fabric(recipe, "cpu", folder)
    fabric.launch()
    return train._Loop(
        recipe, record.Folder(folder), fabric, recipe.data.load(), [], lambda _: None
    )


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_a_whole_checkpoint_with_wrong_content_is_refused_with_its_name(
    stopped: Path, loop: train._Loop, change: Change
) -> None:
    run = loop.run.folder.path
    last = run / "checkpoint" / "last.ckpt"
    state = torch.load(stopped / "checkpoint" / "last.ckpt", weights_only=True)
    change(state)
    last.write_bytes(sealed.dump(state))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    model = {name: tensor.clone() for name, tensor in loop.run.net.state_dict().items()}
    with pytest.raises(InputError, match=r"last\.ckpt.* or remove it") as caught:
        checkpoint.load(loop.run)
    assert "  " not in str(caught.value)
    assert same(model, dict(loop.run.net.state_dict()))  # nothing was loaded
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_checkpoint_that_acdc_did_not_write_is_refused(whole: Path, run: Path) -> None:
    last = run / "checkpoint" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    torch.save(state, last)
    with pytest.raises(InputError, match="format 2 and no checksum: acdc did not write it"):
        resume(run)
    torch.save([1, 2], last)
    with pytest.raises(InputError, match="format None and no checksum"):
        resume(run)
    last.write_bytes(sealed.dump(state | {"format": 3}))
    with pytest.raises(InputError, match=r"has format 3.* Upgrade acdc"):
        resume(run)
    last.unlink()  # as the sentence says
    (warning,) = resume(run)
    assert "it is missing" in warning
    assert_same_run(whole, run)


def test_a_checkpoint_of_the_first_format_is_read(whole: Path, run: Path) -> None:
    """It had no checksum, and the pair was in the folder of the run alone."""
    last = run / "checkpoint" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    del state["pair"]
    torch.save(state | {"format": 1}, last)
    assert resume(run) == []
    assert_same_run(whole, run)


class Counting(nn.Linear):
    """A layer with extra state: how often it was called."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return super().forward(x)

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


@dataclass(frozen=True)
class WithExtraState(Model):
    """A network with such a layer."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return (1, 8, 8)

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), Counting(144, 10))


def test_a_checkpoint_with_extra_state_of_a_module_is_read(tmp_path: Path) -> None:
    recipe = replace(tiny(), model=WithExtraState())
    train.run(recipe, tmp_path / "whole", device="cpu")
    with pytest.raises(train.Interrupted):
        train.run(recipe, tmp_path / "run", device="cpu", watch=stop_at(STOPPED))
    train.run(recipe, tmp_path / "run", device="cpu", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# --- metrics -------------------------------------------------------------------------------------


def test_damaged_lines_are_named_when_the_run_is_resumed_and_the_rest_is_kept(
    whole: Path, run: Path
) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    changed = list(lines)
    bad = [n for n, line in enumerate(lines) if b'"seconds"' in line][3:6]
    changed[bad[0]] = b"\xff" + changed[bad[0]][1:]
    changed[bad[1]] = changed[bad[1]].replace(b'"event"', b'"evint"')
    changed[bad[2]] = changed[bad[2]].replace(b'"seconds": 0', b'"seconds": x')
    path.write_bytes(b"".join(changed))
    (warning,) = resume(run)
    numbers = [n + 1 for n in bad]
    assert f"no event can be read from line {', '.join(map(str, numbers))}." in warning
    found, damaged = record.events(path)
    assert damaged == numbers
    after = path.read_bytes().splitlines(keepends=True)
    assert after[: len(lines)] == changed  # left as they were
    made = json.loads((run / "record.json").read_text())
    assert made["details"]["time"]["sparse"] > 0
    assert len(found) == len(events(whole)) - 3
    assert "3 lines" in report.render(run).read_text()


@pytest.mark.parametrize("left", ["nothing", "a third", "no line end", "a folder"])
def test_metrics_that_were_cut_do_not_keep_a_run_from_its_end(
    whole: Path, run: Path, left: str
) -> None:
    path = run / "metrics.jsonl"
    data = path.read_bytes()
    if left == "nothing":
        path.unlink()
    elif left == "a third":
        path.write_bytes(data[: len(data) // 3])
    elif left == "no line end":
        size = torch.load(run / "checkpoint/last.ckpt", weights_only=True)["metrics"]
        path.write_bytes(data[: size - 1] + b"?" + data[size:])
    else:
        path.unlink()
        path.mkdir()
        with pytest.raises(InputError, match=r"metrics\.jsonl cannot be read|Is a directory"):
            resume(run)
        return
    (warning,) = resume(run)
    assert "bytes are gone" in warning
    assert (run / "pair" / "dense.safetensors").read_bytes() == (
        whole / "pair" / "dense.safetensors"
    ).read_bytes()
    found, damaged = record.events(path)
    assert not damaged
    assert [event["event"] for event in found].count("start") == 1


SHAPES: list[Any] = [
    None, [], 3, "step", {}, {"event": None}, {"event": []}, {"event": "step"},
    {"event": "step", "step": True, "phase": "dense"},
    {"event": "step", "step": "3", "phase": "dense"},
    {"event": "step", "step": -3, "phase": "dense"},
    {"event": "step", "step": 10**400, "phase": "dense"},
    {"event": "step", "step": 3},
    {"event": "step", "step": 3, "phase": "warm"},
    {"event": "step", "step": 3, "phase": ["dense"]},
    {"event": "step", "step": 3, "phase": "dense", "seconds": None},
    {"event": "step", "step": 3, "phase": "dense", "seconds": float("inf")},
    {"event": "step", "step": 3, "phase": "dense", "seconds": "1"},
    {"event": "step", "step": 3, "phase": "dense", "loss": "low"},
    {"event": "step", "step": 3, "phase": "dense", "lr": {}},
    {"event": "step", "step": 3, "phase": "dense", "twin": "sparse"},
    {"event": "step", "step": 3, "phase": "dense", "cpu_seconds": []},
    {"event": "eval", "step": 3, "phase": "dense"},
    {"event": "eval", "step": 3, "phase": "dense", "accuracy": None},
    {"event": "eval", "step": 3, "phase": "dense", "accuracy": 1e300},
    {"event": "change", "step": 3, "to": "sparse"},
    {"event": "change", "step": 3, "to": "sparse", "nnz": 3, "churn": 0.1, "counts": [3]},
    {"event": "change", "step": 3, "to": "sparse", "nnz": 3, "churn": 0.1, "counts": {"a": "b"}},
    {"event": "engine", "step": 3, "choices": [{"name": "a"}]},
    {"event": "engine", "step": 3, "choices": 3},
    {"event": "engine", "step": 3, "refused": {"a": 3}},
    {"event": "ledger", "step": 3, "exact": True, "phases": [{"kind": "dense"}]},
    {"event": "ledger", "step": 3, "phases": []},
    {"event": "start", "step": 0},
    {"event": "start", "step": 0, "total_steps": 3, "phases": [], "steps_per_epoch": []},
    {"event": "start", "step": 0, "total_steps": 4, "steps_per_epoch": [4, "4"],
     "phases": [{"kind": "dense", "start": 0, "stop": 4}]},
    {"event": "start", "step": 0, "total_steps": 4, "steps_per_epoch": [3],
     "phases": [{"kind": "dense", "start": 0, "stop": 4}]},
]  # fmt: skip


def test_lines_of_any_shape_are_no_events_and_break_nothing(whole: Path, run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_bytes((whole / "metrics.jsonl").read_bytes())
    expected = record.times(path)
    lines = [json.dumps(shape).encode() for shape in SHAPES]
    lines += [b"[" * 100_000, b'{"a":' * 100_000, b"\x00", b"\xff\xfe{}", b"9" * 10_000, b"nan"]
    count = len(record.events(path)[0])
    with path.open("ab") as file:
        file.writelines(line + b"\n" for line in lines)
    found, damaged = record.events(path)
    assert len(found) == count
    assert damaged == [*range(count + 1, count + 1 + len(lines))]
    assert record.times(path) == expected
    assert report.render(run).stat().st_size > 10_000


def test_events_of_later_versions_are_let_through(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "new", "step": 3, "what": null}\n\n')
    assert record.events(path) == ([{"event": "new", "step": 3, "what": None}], [])
    assert record.times(path)["dense"] == 0
    assert record.events(tmp_path / "none") == ([], [])


# --- two in one folder ---------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused_at_once(run: Path) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    with alone(run, "taken"), pytest.raises(InputError, match="Another process trains the run in"):
        resume(run)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_two_fresh_runs_at_once_are_one_run_and_one_refusal(whole: Path, tmp_path: Path) -> None:
    """In threads, as two processes: a lock is of an open file."""
    ends: list[str] = []
    together = threading.Barrier(2)

    def begin() -> None:
        together.wait()
        try:
            train.run(tiny(), tmp_path / "run", device="cpu")
            ends.append("done")
        except InputError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends)[1] == "done"
    assert "Another process trains the run" in sorted(ends)[0] or "already holds" in sorted(ends)[0]
    assert_same_run(whole, tmp_path / "run")


def test_a_run_beside_the_worker_of_a_comparison_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from acdc.compare import pool
    from acdc.compare.cells import Cell, prepare
    from support import compare_grids

    grid = compare_grids.small()
    cell = prepare(grid, Cell("acdc", 0.5, 0), grid.task.epochs)
    refused: list[str] = []

    def watch(_: float) -> None:
        if not refused:
            with pytest.raises(InputError) as caught:
                train.run(cell.recipe, tmp_path / "runs" / cell.label, device="cpu", resume=True)
            refused.append(str(caught.value))

    assert pool.train_cell(cell, tmp_path, "cpu", "", watch) is None
    assert "Another process trains the run" in refused[0]


def test_a_run_that_does_not_start_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny()
    monkeypatch.setattr(
        type(recipe.data), "load", lambda *_: (_ for _ in ()).throw(InputError("no"))
    )
    with pytest.raises(InputError, match="no"):
        train.run(recipe, tmp_path / "a" / "run", device="cpu")
    assert not (tmp_path / "a").exists()


# --- clocks, threads -----------------------------------------------------------------------------


def test_a_clock_that_jumps_changes_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: jumps.uniform(0, 2e9))
    monkeypatch.setattr(time, "time_ns", lambda: jumps.randrange(2 * 10**18))
    with pytest.raises(train.Interrupted):
        train.run(tiny(), tmp_path / "run", device="cpu", watch=stop_at(BRANCH + 2))
    made = train.run(tiny(), tmp_path / "run", device="cpu", resume=True)
    assert_same_run(whole, tmp_path / "run")
    assert 0 < made["seconds"] < 600
    assert all(seconds >= 0 for seconds in made["details"]["time"].values())


def test_another_number_of_threads_at_resume_ends_the_run_as_well(
    whole: Path, tmp_path: Path
) -> None:
    """The last bits may differ then; with the same number they do not."""
    recipe = tiny(threads="none", engine="auto")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with pytest.raises(train.Interrupted):
            train.run(recipe, tmp_path / "run", device="cpu", watch=stop_at(14, twin=False))
        torch.set_num_threads(2)
        train.run(recipe, tmp_path / "run", device="cpu", resume=True)
    finally:
        torch.set_num_threads(before)
    losses = [[e["loss"] for e in events(one, "step")] for one in (whole, tmp_path / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    (warning,) = warnings_of(tmp_path / "run")
    assert warning["step"] == 14
    assert "the number of threads was 1 and is 2." in warning["text"]


def warnings_of(run: Path) -> list[dict[str, Any]]:
    """Return the warnings in the record of a run; its page shows them, too."""
    found: list[dict[str, Any]] = json.loads((run / "record.json").read_text())["details"][
        "warnings"
    ]
    page = html.unescape(report.page(report.read(run)))
    for warning in found:
        assert warning["text"] in page
    assert str(run) not in page
    return found


def test_a_warning_is_in_the_record_however_often_the_run_is_stopped(run: Path) -> None:
    path = record.Folder(run).checkpoint
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(train.Interrupted):
        train.run(tiny(), run, device="cpu", resume=True, watch=stop_at(STOPPED))
    assert resume(run) == []
    (warning,) = warnings_of(run)
    assert warning["step"] == STOPPED - 3
    assert warning["text"].startswith("The checkpoint checkpoint/last.ckpt cannot be read")


def test_a_run_without_warnings_says_so_in_its_record(whole: Path) -> None:
    assert warnings_of(whole) == []


OTHER_CPU = """
import sys
from pathlib import Path
import torch
from acdc.runs import train
from support.runs import tiny
print(torch.backends.cpu.get_cpu_capability())
train.run(tiny(), Path(sys.argv[1]), device="cpu", resume=True)
"""


def test_another_cpu_at_resume_is_said(run: Path, whole: Path) -> None:
    """torch computes as on a CPU without AVX. Its sums have other last bits."""
    done = subprocess.run(
        [sys.executable, "-c", OTHER_CPU, str(run)],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
    )  # fmt: skip
    here, there = torch.backends.cpu.get_cpu_capability(), done.stdout.split()[0]
    if here == there:
        pytest.skip(f"This CPU has no more than {here}.")
    (warning,) = warnings_of(run)
    assert f"the instruction set of torch was '{here}' and is '{there}'" in warning["text"]
    losses = [[e["loss"] for e in events(one, "step")] for one in (whole, run)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize(
    ("place", "name", "what"),
    [
        ("acdc.runs.rounding.processor_name", lambda: "Abacus 3", "the processor"),
        ("torch.__version__", "3.0", "the version of torch"),
    ],
)
def test_another_machine_at_resume_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch, place: str, name: object, what: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(place, name)
        with pytest.raises(train.Interrupted):
            train.run(tiny(), run, device="cpu", resume=True, watch=stop_at(STOPPED + 1))
    assert len(resume(run)) == 1  # and back again
    there, back = warnings_of(run)
    assert f"{what} was " in there["text"]
    assert f"{what} was " in back["text"]
    assert [there["step"], back["step"]] == [STOPPED, STOPPED + 1]


def test_a_checkpoint_that_does_not_say_what_computed_it_is_resumed(run: Path) -> None:
    path = record.Folder(run).checkpoint
    state = torch.load(path, weights_only=True)
    del state["computed"], state["warnings"]
    path.write_bytes(sealed.dump(state))
    assert resume(run) == []
