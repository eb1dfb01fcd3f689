"""Comparisons: training, files, and recovery from a kill, an error, a full disk.

The file takes about 80 seconds on one thread.
"""

from __future__ import annotations

import errno
import html
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from acdc.cli import main
from acdc.cli.output import without_folder
from acdc.compare import cluster, pool, results, work
from acdc.compare.cells import Cell, base_recipe, cells, epochs_at_equal_cost, prepare
from acdc.compare.grid import Grid, Task, locate
from acdc.compare.results import Outcome
from acdc.compare.work import Progress
from acdc.console import GridWatcher
from acdc.errors import InputError
from acdc.files import alone
from acdc.pages import comparison as page
from acdc.pages.paired import against_baseline, against_dense
from acdc.recipes import grids
from acdc.runs import record, train
from support import compare_grids
from support.compare_grids import EPOCHS
from support.reader import Reader
from support.runs import assert_same_run

ROOT = Path(__file__).parent.parent
GRIDS = str(Path(compare_grids.__file__))
FIELDS = ["method", "sparsity", "seed", "sparse_quality", "dense_quality", "train_flops_ratio",
          "inference_flops_ratio", "seconds"]  # fmt: skip
Capture = pytest.CaptureFixture[str]


def compare(address: str, out: Path, **more: Any) -> list[Outcome]:
    """Train a grid and draw its page, as the command does."""
    return work.compare(address, out, draw=lambda *given: page.render(*given), **more)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def grid_of(name: str) -> str:
    return f"{GRIDS}:{name}"


def rows(folder: Path, name: str = "results.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete grid with both budgets."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    compare(grid_of("whole"), out, device="cpu", command="acdc compare whole")
    return out / "whole"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete small grid."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("small")
    compare(grid_of("small"), out, device="cpu")
    return out / "small"


# --- what is trained ----------------------------------------------------------------------------


def test_every_cell_has_its_row(whole: Path) -> None:
    found = rows(whole)
    grid = compare_grids.whole()
    assert len(found) == len(list(cells(grid))) == 2 * 2 * (1 + 2 + 2)
    assert all(list(row)[:8] == FIELDS for row in found)
    assert not rows(whole, "failed.jsonl")
    asked = [(c.budget, c.seed, c.sparsity, c.method) for c in cells(grid)]
    assert [(r["budget"], r["seed"], r["sparsity"], r["method"]) for r in found] == asked
    for row in found:
        kind = row["method"]
        assert (row["sparse_quality"] is None) == (kind == "dense")
        assert (row["dense_quality"] is None) == (kind == "one_shot")
        best = row["dense_quality"] if kind == "dense" else row["sparse_quality"]
        assert best > 60  # a third is chance
        assert row["sparsity_reached"] == pytest.approx(row["sparsity"], abs=0.02)


def test_cells_are_trained_in_the_order_of_the_grid(whole: Path) -> None:
    """A stopped grid has whole seeds, even if a cell waits for the network that it starts from."""
    runs = dict.fromkeys(row["cell"] for row in rows(whole))
    written = [(whole / "runs" / run / "record.json").stat().st_mtime_ns for run in runs]
    assert written == sorted(written)


def test_flops_are_those_of_the_formula_and_epochs_exact(whole: Path) -> None:
    """At uniform sparsity the count of every layer is exact, and therefore the FLOPs."""
    sizes = [3 * 16, 16 * 16, 16 * 3]
    for row in rows(whole):
        share = sum(n - round(n * row["sparsity"]) for n in sizes) / sum(sizes)
        epochs = row["epochs"]
        one = {
            "dense": 1.0,
            "acdc": 0.6 + 0.4 * share,
            "one_shot": (epochs // 2 + (epochs - epochs // 2) * share) / epochs,
        }[row["method"]]
        at_equal = {
            "dense": 1.0,
            "acdc": 0.6 + 0.4 * share,
            "one_shot": 0.5 + 0.5 * share,
        }[row["method"]]
        expected = EPOCHS if row["budget"] == "epochs" else round(EPOCHS / at_equal)
        assert epochs == expected
        # Phases of tenths: whole steps, where the epochs are not ten.
        assert row["train_flops_ratio"] == pytest.approx(epochs * one / EPOCHS, rel=0.02)
        if row["budget"] == "epochs":
            assert row["train_flops_ratio"] == pytest.approx(one, rel=1e-9)
        inference = 1.0 if row["method"] == "dense" else share
        assert row["inference_flops_ratio"] == pytest.approx(inference)


def test_equal_flops_are_no_longer_than_allowed() -> None:
    grid = replace(compare_grids.whole(), longest=2.5)
    assert [epochs_at_equal_cost(grid, r) for r in (1.0, 0.4173, 0.9, 0.01, 30.0)] == [
        10, 24, 11, 25, 1
    ]  # fmt: skip


def test_at_equal_seconds_a_cell_is_as_long_as_its_measured_time_says(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows stand for their runs, and lengths follow from the seconds of the first seed."""
    found = rows(whole)
    for row in found:
        slow = {"dense": 8.0, "acdc": 5.0, "one_shot": 4.0}[row["method"]]
        row["cpu_seconds"] = slow if row["seed"] == 0 else 1.0
    shutil.copytree(whole, tmp_path / "whole", ignore=shutil.ignore_patterns("runs"))
    lines = "".join(json.dumps(row) + "\n" for row in found)
    (tmp_path / "whole" / "results.jsonl").write_text(lines)
    grid = replace(compare_grids.whole(), budgets=("epochs", "seconds"))
    board = work._Board(grid, tmp_path / "whole", lambda _: None, None)
    board.update()
    waiting = {str(job.run.cell): job.run.epochs for job in board.jobs.values()
               if job.state == "ready"}  # fmt: skip
    for cell, epochs in waiting.items():
        assert "equal seconds" in cell or "beforehand" in cell or cell.startswith("dense")
        if "acdc" in cell:
            assert epochs == 16
    assert sum("acdc" in cell for cell in waiting) == 4
    (dense,) = {o.row["epochs"] for o in board.outcomes()
                if o.row and o.cell.method == "dense" and o.cell.budget == "seconds"}  # fmt: skip
    assert dense == EPOCHS


def test_what_is_trained_beforehand_is_a_run_shared_and_counted(whole: Path) -> None:
    found = [row for row in rows(whole) if row["method"] == "one_shot" and row["seed"] == 0]
    equal = [row for row in found if row["budget"] == "epochs"]
    (label,) = {row["beforehand"] for row in equal}  # both sparsities start from the same network
    before = json.loads((whole / "runs" / label / "record.json").read_text())
    assert before["details"]["epochs"] == EPOCHS // 2
    for row in equal:
        values = json.loads((whole / "runs" / row["cell"] / "recipe.json").read_text())["values"]
        assert values["start"] == label
        after = json.loads((whole / "runs" / row["cell"] / "record.json").read_text())
        dense = after["details"]["train_flops_dense"] / (EPOCHS - EPOCHS // 2) * EPOCHS
        spent = before["details"]["train_flops"] + after["details"]["train_flops"]
        assert row["train_flops_ratio"] == pytest.approx(spent / dense)
        time = [r["details"]["time"][part] for r in (before, after)
                for part in ("dense", "sparse", "engine")]  # fmt: skip
        assert row["seconds"] == pytest.approx(sum(time), abs=1e-3)
        worked = [r["details"]["time"]["cpu"] for r in (before, after)]
        assert row["cpu_seconds"] == pytest.approx(sum(worked), abs=1e-3)
        assert row["cpu_seconds"] > 0


def test_a_run_begins_with_the_network_it_starts_from(whole: Path) -> None:
    """Its first loss is that of the trained network after the cut, not that of a fresh network."""
    row = next(r for r in rows(whole) if r["method"] == "one_shot")
    lines = (whole / "runs" / row["cell"] / "metrics.jsonl").read_text().splitlines()
    first = next(e for e in map(json.loads, lines) if e["event"] == "step")
    fresh = (whole / "runs" / "whole" / "metrics.jsonl").read_text().splitlines()
    other = next(e for e in map(json.loads, fresh) if e["event"] == "step")
    assert first["loss"] < other["loss"] - 0.2


def test_a_cell_is_a_normal_run(whole: Path, capsys: Capture) -> None:
    for row in rows(whole):
        assert main(["report", str(whole / "runs" / row["cell"])]) == 0
        break
    sparse = next(r for r in rows(whole) if r["method"] == "one_shot")
    assert main(["report", str(whole / "runs" / sparse["cell"])]) == 0
    text = (whole / "runs" / sparse["cell"] / "report.html").read_text()
    assert "The trained network." in text
    assert f"{sparse['sparse_quality']:.2f}" in text


# --- names --------------------------------------------------------------------------------------


def test_a_cell_is_named_by_what_differs_and_by_nothing_else() -> None:
    """These names are in users' folders: with other names all runs would be trained again."""
    grid = compare_grids.whole()
    names = {str(cell): prepare(grid, cell, EPOCHS).label for cell in cells(grid)
             if cell.budget == "epochs"}  # fmt: skip
    assert names["dense, seed 0"] == "whole"
    assert names["acdc 50 %, seed 0"] == "whole-d586736b"
    assert names["one_shot 75 %, seed 1"] == "whole-dedc21b4"
    assert len(set(names.values())) == len(names)
    fewer = replace(grid, methods=grid.methods[::-1], seeds=(1,), sparsities=(0.75,), about="x")
    for cell in cells(fewer):
        if cell.budget == "epochs":
            assert prepare(fewer, cell, EPOCHS).label == names[str(cell)]


def test_the_same_recipe_is_trained_once(whole: Path) -> None:
    dense = [row for row in rows(whole) if row["method"] == "dense" and row["seed"] == 0]
    assert [row["budget"] for row in dense] == ["epochs", "flops"]
    assert dense[0]["cell"] == dense[1]["cell"]
    assert dense[0]["seconds"] == dense[1]["seconds"]


# --- stopped, and gone on -----------------------------------------------------------------------


def test_resuming_a_finished_grid_trains_nothing(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows(whole)
    monkeypatch.setattr(train, "run", lambda *_, **__: pytest.fail("something was trained"))
    compare(grid_of("whole"), whole.parent, resume=True)
    assert rows(whole) == before


KILL = """
import os, signal, sys
from pathlib import Path
import torch
from acdc.compare.work import compare
torch.set_num_threads(1)
def watch(progress):
    if progress.done == 1 and any(share > 0.5 for _, share in progress.running):
        os.kill(os.getpid(), signal.SIGKILL)
compare(sys.argv[1], Path(sys.argv[2]), device="cpu", watch=watch)
"""


@pytest.mark.slow
def test_a_grid_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    words = [sys.executable, "-c", KILL, grid_of("slow"), str(killed)]
    assert subprocess.run(words, env=_environment()).returncode == -signal.SIGKILL
    runs = killed / "slow" / "runs"
    finished = [path.parent for path in runs.glob("*/record.json")]
    begun = [path.parent for path in runs.glob("*/recipe.json")]
    assert len(finished) == 1
    assert len(begun) == 2
    stamp = (finished[0] / "record.json").stat().st_mtime_ns
    with pytest.raises(InputError, match="already holds runs or results of this grid"):
        compare(grid_of("slow"), killed)
    seen: list[float] = []

    def watch(progress: Progress) -> None:
        seen.extend(share for _, share in progress.running)

    outcomes = compare(grid_of("slow"), killed, resume=True, device="cpu", watch=watch)
    assert all(outcome.row for outcome in outcomes)
    assert (finished[0] / "record.json").stat().st_mtime_ns == stamp
    compare(grid_of("slow"), straight, device="cpu")
    for folder in runs.iterdir():
        assert_same_run(folder, straight / "slow" / "runs" / folder.name)


def _environment(**more: str) -> dict[str, str]:
    tests = str(Path(__file__).parent)
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": tests} | more


def test_rows_stand_for_runs_that_are_gone(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone of a repository holds the results and not the runs."""
    folder = tmp_path / "whole"
    folder.mkdir()
    for name in ("results.jsonl", "origins.json"):
        shutil.copy(whole / name, folder)
    with pytest.raises(InputError, match="already holds runs or results"):
        compare(grid_of("whole"), tmp_path, device="cpu")
    trained: list[str] = []

    def refuse(run: Any, *args: Any) -> str:
        trained.append(run.label)
        return "Not today."

    monkeypatch.setattr(pool, "train_cell", refuse)
    compare(grid_of("whole"), tmp_path, resume=True, device="cpu")
    assert not trained
    assert rows(folder) == rows(whole)
    origin = re.compile(r'<dl id="origin">.*?</dl>', re.DOTALL)
    pages = [(path / "report.html").read_text() for path in (folder, whole)]
    assert origin.findall(pages[0]) == origin.findall(pages[1]) != []

    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    lost = next(row["cell"] for row in rows(whole) if row["method"] == "acdc")
    (folder / "results.jsonl").write_text("".join(line for line in lines if lost not in line))
    compare(grid_of("whole"), tmp_path, resume=True, device="cpu")
    assert set(trained) == {lost}


def test_the_page_says_first_where_the_data_are_not_the_published(
    whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("runs"))
    assert "All figures here are of" not in (whole / "report.html").read_text()
    origins = json.loads((folder / "origins.json").read_text())
    for origin in origins.values():
        origin["data"] += " (not the published files)"
    (folder / "origins.json").write_text(json.dumps(origins))
    compare(grid_of("whole"), tmp_path, resume=True, device="cpu")
    name = next(iter(origins.values()))["data"]
    notice = f'<p class="notice" role="note">All figures here are of {html.escape(name)}.</p>'
    assert notice in (folder / "report.html").read_text()


@pytest.mark.parametrize("kind", ["another task", "no origin", "unreadable"])
def test_rows_that_cannot_be_trusted_are_trained_again(
    whole: Path, tmp_path: Path, kind: str
) -> None:
    for name in ("results.jsonl", "origins.json"):
        shutil.copy(whole / name, tmp_path)
    origins = json.loads((tmp_path / "origins.json").read_text())
    assert len(results.read(tmp_path, base_recipe(compare_grids.whole()))) > 0
    if kind == "another task":
        for origin in origins.values():
            origin["task"]["batch_size"] += 1
    elif kind == "no origin":
        origins = {}
    text = json.dumps(origins)
    (tmp_path / "origins.json").write_text(text[: len(text) // 2] if kind == "unreadable" else text)
    if kind == "unreadable":
        with pytest.raises(InputError, match=r"cannot be read.*Restore results\.jsonl"):
            results.read(tmp_path, base_recipe(compare_grids.whole()))
    else:
        assert results.read(tmp_path, base_recipe(compare_grids.whole())) == {}


def test_the_page_of_a_long_grid_is_there_before_its_end(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "whole"
    folder.mkdir()
    for name in ("results.jsonl", "origins.json"):
        shutil.copy(whole / name, folder)
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(lines[4:]))
    pages: list[bool] = []

    def fails(*_: Any) -> str:
        pages.append((folder / "report.html").exists())
        return "Not today."

    monkeypatch.setattr(pool, "train_cell", fails)
    monkeypatch.setattr(work, "DRAWN_EVERY", 0.0)
    compare(grid_of("whole"), tmp_path, resume=True, device="cpu")
    assert pages[0] is False
    assert len(pages) > 1
    assert all(pages[1:])

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(page, "render", full)
    caplog.clear()
    before = len(pages)
    with pytest.raises(InputError, match="with --resume writes it"):
        compare(grid_of("whole"), tmp_path, resume=True, device="cpu")
    assert len(pages) - before == before  # none was kept from being trained
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize("file", ["report.html", "results.jsonl"])
def test_a_disk_that_fills_while_results_are_written(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """The error is a sentence, and files written before do not change."""
    folder = tmp_path / "whole"
    folder.mkdir()
    for name in ("results.jsonl", "origins.json", "report.html"):
        shutil.copy(whole / name, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace_file = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left on device") as caught:
        compare(grid_of("whole"), tmp_path, resume=True, device="cpu")
    assert "Errno" not in str(caught.value)
    if file == "report.html":
        assert "with --resume writes it" in str(caught.value)
    for name, content in before.items():
        assert (folder / name).read_bytes() == content
    if file == "report.html":
        assert {path.name for path in folder.iterdir()} - {".lock", "failed.jsonl"} == set(before)
        return
    # All results were written, and one could not be put in place: the next command does that.
    assert (folder / ".acdc-saved" / file).exists()
    monkeypatch.undo()
    compare(grid_of("whole"), tmp_path, resume=True, device="cpu")
    assert {path.name for path in folder.iterdir()} - {".lock", "failed.jsonl"} == set(before)


def test_two_commands_do_not_train_the_same_cells(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    with (
        alone(tmp_path / "small", ""),
        pytest.raises(InputError, match="Another acdc compare is at work"),
    ):
        compare(grid_of("small"), tmp_path)


# --- failed cells --------------------------------------------------------------------------------


def test_a_failed_cell_has_a_reason_and_the_others_go_on(tmp_path: Path) -> None:
    compare(grid_of("failing"), tmp_path, device="cpu")
    folder = tmp_path / "failing"
    reasons = {(f["method"], f["budget"]): f["reason"] for f in rows(folder, "failed.jsonl")}
    assert "its 3 inputs do not divide into groups of 4" in reasons["nm24", "epochs"]
    assert "training diverged" in reasons["wild", "epochs"]
    assert reasons["refuses", "epochs"] == "Not on Sundays."
    assert reasons["broken", "epochs"] == "KeyError: 'a slip'"
    for method in ("nm24", "wild", "refuses", "broken"):
        assert reasons[method, "flops"].startswith(f"Its length follows from {method} 50 %")
    assert [row["method"] for row in rows(folder)] == ["dense", "acdc"] * 2
    text = (folder / "report.html").read_text()
    assert "8 cells of 12 without results" in text
    assert text.count('class="failed"') == 8
    assert "Not on Sundays." in text
    assert str(tmp_path) not in text
    assert str(tmp_path) not in (folder / "failed.jsonl").read_text()


def test_an_error_without_a_sentence_leaves_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slips(*_: Any) -> None:
        raise RecursionError("a slip")

    with monkeypatch.context() as patch:
        patch.setattr(train, "agreed", slips)  # called in every step
        outcomes = compare(grid_of("small"), tmp_path, device="cpu")
    assert all("RecursionError: a slip" in outcome.reason for outcome in outcomes)
    runs = list((tmp_path / "small" / "runs").iterdir())
    assert runs
    assert all("in slips" in (run / "error.txt").read_text() for run in runs)
    outcomes = compare(grid_of("small"), tmp_path, device="cpu", resume=True)
    assert all(outcome.row for outcome in outcomes)
    assert not list(tmp_path.rglob("error.txt"))


def test_a_full_disk_fails_a_cell_that_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = prepare(compare_grids.small(), Cell("acdc", 0.5, 0), EPOCHS).label
    sync = record.Metrics.sync

    def full(self: record.Metrics) -> int:
        if label in self._file.name and sync(self) > 4000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return sync(self)

    monkeypatch.setattr(record.Metrics, "sync", full)
    compare(grid_of("small"), tmp_path, device="cpu")
    (failed,) = rows(tmp_path / "small", "failed.jsonl")
    assert "No space left on device" in failed["reason"]
    assert [row["method"] for row in rows(tmp_path / "small")] == ["dense", "one_shot"]
    monkeypatch.undo()
    compare(grid_of("small"), tmp_path, resume=True, device="cpu")
    assert len(rows(tmp_path / "small")) == 3
    assert not rows(tmp_path / "small", "failed.jsonl")


@pytest.mark.parametrize("jobs", [0, 1])
def test_warnings_of_runs_are_in_the_results_and_on_the_page(
    small: Path, tmp_path: Path, jobs: int
) -> None:
    """A worker logs them where nobody reads."""
    folder = Path(shutil.copytree(small, tmp_path / "small"))
    label = rows(folder)[1]["cell"]
    run = record.Folder(folder / "runs" / label)
    for path in (run.record, folder / "results.jsonl", folder / "origins.json"):
        path.unlink()
    run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:-1])
    for _ in range(2):
        compare(grid_of("small"), tmp_path, resume=True, device="cpu", jobs=jobs)
        found = [row.get("warnings") for row in rows(folder)]
        assert found[0] is found[2] is None
        assert found[1] is not None
        (warning,) = found[1]
        assert "Step 42: The checkpoint checkpoint/last.ckpt cannot be read" in warning
        text = html.unescape((folder / "report.html").read_text())
        assert f"{label}: {warning}" in text
        shutil.rmtree(run.path, ignore_errors=True)  # its row takes its place


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r["details"].update(train_flops=0), "train_flops_ratio is 0"),
        (lambda r: r["details"].update(train_flops=10**29), "train_flops_ratio is "),
        (lambda r: r.update(inference_flops_ratio=1e300), "inference_flops_ratio is 1e"),
        (lambda r: r["sparse"].pop("loss"), "sparse has no 'loss'"),
        (lambda r: r["sparse"].update(loss="a text"), 'sparse.loss is "a text"'),
        (lambda r: r["sparse"].update(loss=float("inf")), "sparse_quality is -Infinity"),
    ],
)
def test_a_record_with_results_out_of_bounds_is_a_failed_cell_and_stops_no_other(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any], Any],
    reason: str,
) -> None:
    """The results are read again by the next command: what it would refuse is not written."""
    monkeypatch.setattr(results, "quality", lambda _: "bits")  # as of a text, judged by its loss
    folder = Path(shutil.copytree(small, tmp_path / "small"))
    path = record.Folder(folder / "runs" / rows(folder)[1]["cell"]).record
    healthy = path.read_text()
    damaged = json.loads(healthy)
    change(damaged)
    path.write_text(json.dumps(damaged))
    for _ in range(2):
        compare(grid_of("small"), tmp_path, resume=True, device="cpu")
        (failed,) = rows(folder, "failed.jsonl")
        assert reason in failed["reason"]
        assert "Remove" in failed["reason"]
        assert len(rows(folder)) == 2
    path.write_text(healthy)
    compare(grid_of("small"), tmp_path, resume=True, device="cpu")
    assert len(rows(folder)) == 3


def test_what_starts_from_a_run_that_failed_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train.run

    def fails(recipe: Any, *args: Any, **more: Any) -> Any:
        if recipe.epochs == EPOCHS // 2 and recipe.start is None:
            raise MemoryError("too little")
        return run(recipe, *args, **more)

    monkeypatch.setattr(train, "run", fails)
    outcomes = compare(grid_of("small"), tmp_path, device="cpu")
    reasons = {str(outcome.cell): outcome.reason for outcome in outcomes if outcome.row is None}
    assert reasons == {
        "dense, seed 0, 5 epochs": "MemoryError: too little",
        "one_shot 50 %, seed 0": (
            "It starts from dense, seed 0, 5 epochs, which failed: MemoryError: too little"
        ),
    }


def test_runs_of_another_version_of_the_grid_are_no_results(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    (folder / "runs").mkdir(parents=True)
    source = whole / "runs" / "whole"
    shutil.copytree(source, folder / "runs" / "small")
    recipe = json.loads((source / "recipe.json").read_text())
    recipe["values"]["optimizer"]["lr"] = 0.7
    (folder / "runs" / "small" / "recipe.json").write_text(json.dumps(recipe))
    outcomes = compare(grid_of("small"), tmp_path, resume=True, device="cpu")
    dense = next(outcome for outcome in outcomes if outcome.cell == Cell("dense", 0.0, 0))
    assert dense.row is None
    assert "has another recipe" in dense.reason


# --- the page -----------------------------------------------------------------------------------


def test_the_page_is_self_contained(whole: Path) -> None:
    text = (whole / "report.html").read_text()
    read = Reader(text)
    assert read.loads == []
    assert not read.tags & {"script", "link", "iframe", "object", "embed", "img", "base"}
    assert not re.search(r"@import|@font-face|url\((?!#)", text)
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    assert len(read.ids) == len(set(read.ids))
    assert "default-src 'none'" in text
    assert str(whole.parent) not in text


def test_the_page_shows_every_cell_and_what_is_needed(whole: Path) -> None:
    text = (whole / "report.html").read_text()
    assert text.count("data-figure") == 5  # sparsity for each budget, and three costs
    body = text[text.index('id="cells"') :]
    beforehand = {row["beforehand"] for row in rows(whole)} - {None}
    assert body.count('<tr><th scope="row">') == len(rows(whole)) + len(beforehand)
    for row in rows(whole):
        assert row["cell"].rpartition("-")[2] in body
    needs = text[text.index('id="needs"') :]
    assert "A dense network trained for 5 epochs with the same seed" in needs
    assert needs.count("Nothing: it starts from fresh weights.") == 2
    assert "20 of 20 cells have finished" in text
    assert "<dt>Data</dt><dd>blobs</dd>" in text


def test_a_page_says_what_is_needed_before_it_was_trained(tmp_path: Path) -> None:
    grid = compare_grids.whole()
    board = work._Board(grid, tmp_path, lambda _: None, None)
    board.update()
    text = page.page(grid, board.outcomes())
    assert "A dense network trained for 5 epochs with the same seed" in text


def mean(quality: float, cost: float) -> page.Mean:
    costs = dict.fromkeys(page.COSTS, cost)
    return page.Mean("acdc", 0.9, "epochs", True, (quality,), (), 1, costs)


def test_the_front_holds_what_nothing_beats() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        found = [
            mean(float(q), float(c)) for q, c in torch.randint(0, 6, (9, 2), generator=generator)
        ]
        front = page.front(found, "seconds")
        for one in found:
            pairs = [(o.quality - one.quality, one.costs["seconds"] - o.costs["seconds"])
                     for o in found]  # fmt: skip
            beaten = any(min(pair) >= 0 and max(pair) > 0 for pair in pairs)
            assert (one in front) != beaten
        cheap = [m.costs["seconds"] for m in front]
        assert cheap == sorted(cheap)


def test_what_collapsed_lies_below_the_axis() -> None:
    low, high, hidden = page.window([mean(q, 1.0) for q in (90.0, 92.0, 11.0)])
    assert hidden == 1
    assert low == pytest.approx(90 - 0.16)
    assert high == pytest.approx(92 + 0.16)
    low, high, hidden = page.window([mean(q, 1.0) for q in (-2.0, -2.4, -4.5)])  # bits
    assert hidden == 1
    assert low < -2.4 < -2.0 < high


def test_where_ours_does_not_win_the_page_says_so(whole: Path) -> None:
    grid = compare_grids.small()
    found = rows(whole)

    def outcome(method: str, quality: float) -> Outcome:
        row = next(r for r in found if r["method"] == method and r["sparsity"] in (0.0, 0.5))
        which = "dense_quality" if method == "dense" else "sparse_quality"
        return Outcome(Cell(method, row["sparsity"], 0), row | {which: quality})

    shown = page.page(grid, [outcome("dense", 99), outcome("acdc", 91), outcome("one_shot", 92)])
    assert "One-shot is best with 92.00, before AC/DC with 91.00." in shown
    assert "AC/DC does not win here: it has 91.00, place 2 of 2." in shown
    shown = page.page(grid, [outcome("dense", 99), outcome("acdc", 93), outcome("one_shot", 92)])
    assert "AC/DC is best with 93.00" in shown
    assert "does not win" not in shown
    shown = page.page(grid, [outcome("acdc", 92.001), outcome("one_shot", 92.004)])
    assert "One-shot and AC/DC are best, level at 92.00." in shown
    assert "does not win" not in shown


def test_methods_are_compared_seed_by_seed_with_an_interval(whole: Path) -> None:
    grid = replace(compare_grids.whole(), sparsities=(0.5,), seeds=(0, 1, 2), baseline="acdc")
    row = rows(whole)[0]

    def outcome(method: str, seed: int, sparse: float | None, dense: float | None) -> Outcome:
        cell = Cell(method, 0.5 if sparse else 0.0, seed)
        more = {"method": method, "sparse_quality": sparse, "dense_quality": dense}
        return Outcome(cell, row | more)

    outcomes = [
        *(outcome("dense", seed, None, 95.0) for seed in (0, 1, 2)),
        *(outcome("acdc", seed, 90.0 + seed, 95.0 + seed) for seed in (0, 1, 2)),
        *(outcome("one_shot", seed, 89.0 + seed + 0.1 * seed, None) for seed in (0, 1, 2)),
    ]
    (found,) = against_baseline(grid, outcomes)
    assert found.differences == pytest.approx((-1.0, -0.9, -0.8))
    # Two degrees of freedom: 4.3027 standard errors of 0.1 / sqrt(3).
    assert found.interval == pytest.approx((-0.9 - 0.24841, -0.9 + 0.24841), abs=1e-4)
    (twin,) = against_dense(grid, outcomes)
    assert (twin.method, twin.baseline, twin.differences) == ("acdc", "dense", (0.0, 1.0, 2.0))
    shown = page.page(grid, outcomes)
    assert "Against AC/DC, seed by seed" in shown
    for text in ("<td>−0.90</td>", "<td>−1.15 to −0.65</td>", "<td>worse</td>"):
        assert text in shown
    for text in ("<td>+1.00</td>", "<td>−1.48 to +3.48</td>", "<td>not told apart</td>"):
        assert text in shown
    # A seed that the baseline lacks is left out; one seed has no interval.
    fewer = [o for o in outcomes if o.cell.seed or o.cell.method != "acdc"]
    (found,) = against_baseline(grid, fewer)
    assert len(found.differences) == 2
    (found,) = against_baseline(grid, [o for o in outcomes if o.cell.seed == 1])
    assert found.interval is None
    assert "<td>1</td><td>−0.90</td><td>–</td><td>–</td>" in page.page(
        grid, [o for o in outcomes if o.cell.seed == 1]
    )
    plain = replace(grid, baseline=None)
    assert against_baseline(plain, outcomes) == against_dense(plain, outcomes) == []
    assert "seed by seed" not in page.page(plain, outcomes)


def test_remarks_beside_the_results_are_on_the_page(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("runs"))
    (folder / "remarks.md").write_text("Because of\nthe <weather>.\n\nSee `acdc list`.\n")
    compare(grid_of("whole"), tmp_path, resume=True, device="cpu")
    text = (folder / "report.html").read_text()
    assert "<p>Because of the &lt;weather&gt;.</p>" in text
    assert '<p>See <span class="name">acdc list</span>.</p>' in text
    assert (folder / "remarks.md").exists()


def test_without_a_drawing_there_is_no_page(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    folder.mkdir()
    for name in ("results.jsonl", "origins.json"):
        shutil.copy(whole / name, folder)
    outcomes = work.compare(grid_of("whole"), tmp_path, resume=True, device="cpu")
    assert all(outcome.row for outcome in outcomes)
    assert not (folder / "report.html").exists()


def test_a_method_that_ends_dense_is_shown_as_a_dense_network(tmp_path: Path) -> None:
    compare(grid_of("ends_dense"), tmp_path, device="cpu")
    _, dsd, _ = rows(tmp_path / "ends_dense")
    assert (dsd["method"], dsd["sparsity"], dsd["sparse_quality"]) == ("dsd", 0.3, None)
    assert dsd["dense_quality"] > 60
    assert (dsd["inference_flops_ratio"], dsd["sparsity_reached"]) == (1.0, 0.0)
    assert 0.5 < dsd["train_flops_ratio"] < 1
    grid = compare_grids.ends_dense()
    outcomes = [Outcome(Cell(r["method"], r["sparsity"], 0), r) for r in rows(tmp_path / grid.name)]
    one, two, ours = page.means(grid, outcomes)
    assert (one.sparse, two.sparse, ours.sparse) == (False, False, True)
    assert two.qualities == (dsd["dense_quality"],)
    assert two.dense == ()  # it has no twin
    text = (tmp_path / grid.name / "report.html").read_text()
    assert "30\u202f%, then dense" in text
    assert "A line across is a dense network" in text
    assert "DSD is best" not in text
    assert "before DSD" not in text


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"methods": ()}, "methods="),
        ({"seeds": (1, 1)}, "seeds="),
        ({"sparsities": (1.5,)}, "fraction of zeros"),
        ({"budgets": ("flops",)}, "Put 'epochs' first"),
        ({"budgets": ("epochs", "watts")}, "the budget 'watts'"),
        ({"longest": 0.5}, "longest is 0.5"),
        ({"baseline": "gmp"}, "has the baseline 'gmp', which is none of its methods"),
        (
            {"budgets": ("epochs", "seconds"), "methods": (compare_grids.ACDC_,)},
            "has the budget 'seconds', and no method named 'dense'",
        ),
    ],
)
def test_a_grid_that_cannot_be_is_a_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        replace(compare_grids.small(), **change)


def test_a_task_is_a_dense_run() -> None:
    recipe = prepare(compare_grids.small(), Cell("acdc", 0.5, 0), EPOCHS).recipe
    with pytest.raises(InputError, match="Give the dense run of the task"):
        Task("blobs", recipe)


@pytest.mark.parametrize(
    ("grid", "sentence"),
    [
        ("compare_digit", "Did you mean compare_digits"),
        ("nothing", "There are: compare_digits"),
        ("nowhere.py:grid", "There is no file 'nowhere.py'"),
        (grid_of("nothing"), "has no function 'nothing'. It has:"),
        (grid_of("no_grid"), "returned a int"),
    ],
)
def test_no_such_grid_is_a_sentence(grid: str, sentence: str, capsys: Capture) -> None:
    assert main(["compare", grid]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("def g(): return 1 / 0", "ended with ZeroDivisionError: division by zero (mine.py, line"),
        ("import beside", "ended with NameError: name 'x' is not defined (beside.py, line 2)."),
        ("import no_module", "Error: No module named 'no_module' (mine.py, line 1)."),
        ("def g(:", "mine.py is no Python that can be read: invalid syntax (mine.py, line 1)."),
        ("import acdc\n\ndef g(): return acdc.GMP(acdc.Unstructured(2.0))", "error: Sparsity"),
    ],
)  # fmt: skip
def test_an_error_in_the_file_of_a_grid_is_a_sentence(
    code: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("mine.py").write_text(code + "\n")
    Path("beside.py").write_text("\nx\n")
    assert main(["compare", "mine.py:g"]) == 2
    assert sentence.lower() in " ".join(capsys.readouterr().err.split()).lower()


def test_numbers_of_jobs_that_cannot_be_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--jobs is -1"):
        compare(grid_of("small"), tmp_path, jobs=-1)
    for option, elsewhere in (("--on", {"on": "tcp://127.0.0.1:1"}), ("--slurm", {"slurm": ()})):
        with pytest.raises(InputError, match=f"--jobs 0 trains .* and {option} trains them"):
            compare(grid_of("small"), tmp_path, jobs=0, **elsewhere)
    assert not list(tmp_path.iterdir())


def test_no_more_workers_than_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def embedded(order: Any, jobs: int) -> None:
        raise InputError(f"{jobs} workers")

    monkeypatch.setattr(cluster, "Embedded", embedded)
    count = len(list(cells(compare_grids.small())))
    for jobs, workers in ((1, 1), (count, count), (99, count)):
        with pytest.raises(InputError, match=f"^{workers} workers$"):
            compare(grid_of("small"), tmp_path, jobs=jobs)


@pytest.mark.parametrize(
    ("command", "out", "wanted"),
    [
        (
            "acdc compare a.py:grid --out . --jobs 2",
            ".",
            "acdc compare a.py:grid --out {} --jobs 2",
        ),
        ("acdc compare p --out /long/way/p", "/long/way/p", "acdc compare p --out p"),
        ("acdc compare p --out=/long/way/p", "/long/way/p", "acdc compare p --out=p"),
        ("acdc compare p --out /long/way/p/", "/long/way/p", "acdc compare p --out p"),
        ("acdc compare p.py:p --out p", "p", "acdc compare p.py:p --out p"),
        ("acdc bench --json d/x.json --case x", "d/x.json", "acdc bench --json x.json --case x"),
    ],
)
def test_the_recorded_command_names_the_folder_alone(command: str, out: str, wanted: str) -> None:
    assert without_folder(command, Path(out)) == wanted.format(Path.cwd().name)


@pytest.mark.parametrize("device", ["no such", "mps"])
def test_a_device_that_is_not_there_ends_the_command_and_not_every_cell(
    tmp_path: Path, capsys: Capture, device: str
) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("This machine has mps.")
    words = ["compare", grid_of("small"), "--out", str(tmp_path / "out"), "--device", device]
    assert main(words) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert f"cannot be set up on device '{device}'" in err
    assert not list(tmp_path.iterdir())


def test_the_device_reaches_the_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(run: Any, folder: Path, device: str, *_: Any) -> str:
        asked.append(device)
        return "Not today."

    monkeypatch.setattr(pool, "train_cell", refuse)
    words = ["compare", grid_of("small"), "--jobs", "0", "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert set(asked) == {"cpu"}


# --- the worked example -------------------------------------------------------------------------


def test_the_example_of_a_model_of_ones_own_runs(tmp_path: Path, capsys: Capture) -> None:
    """The example of the documentation, shortened."""
    text = (Path(__file__).parent.parent / "docs" / "compare.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for long, short in (
        ("epochs=10)", "epochs=2)"),
        ("sparsities=(0.8, 0.9)", "sparsities=(0.8,)"),
        ("seeds=(0, 1)", "seeds=(0,)"),
    ):
        assert code.count(long) == 1
        code = code.replace(long, short)
    file = tmp_path / "mine.py"
    file.write_text(code)
    assert main(["show", f"{file}:grid"]) == 0
    assert "three spirals, perceptron, 2 epochs dense" in capsys.readouterr().out
    assert main(["compare", f"{file}:grid", "--out", str(tmp_path)]) == 0
    found = rows(tmp_path / "spirals")
    assert [row["method"] for row in found] == ["dense", "acdc", "mine"]
    assert all((row["sparse_quality"] or row["dense_quality"]) > 40 for row in found)
    (example,) = re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)
    assert list(json.loads(example)) == list(found[0])


# --- the command line ---------------------------------------------------------------------------


def test_every_grid_is_listed_and_shown(capsys: Capture) -> None:
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    for name in grids.names():
        grid: Grid = locate(grids.find(name))
        assert grid.name == name
        assert grid.about in listed
        assert main(["show", name]) == 0
        shown = capsys.readouterr().out
        for cell in cells(grid):
            if cell.budget == "epochs":
                assert prepare(grid, cell, grid.task.epochs).label in shown
        for method in grid.methods:
            assert f"  {method.name} " in shown


def test_show_names_cells_that_fail_and_what_comes_first(capsys: Capture) -> None:
    assert main(["show", grid_of("failing")]) == 0
    assert "none: Not on Sundays." in capsys.readouterr().out
    assert main(["show", grid_of("small")]) == 0
    assert re.search(r"one_shot +50 % .* after small-\w{8}", capsys.readouterr().out)
    assert main(["show", grid_of("small"), "--set", "seed=1"]) == 2


def test_a_terminal_shows_what_runs_and_the_time_left() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    cell = Cell("acdc", 0.9, 0)
    with GridWatcher(console) as watcher:
        watcher(Progress(3, 9, 0, ((cell, 0.25),), 130.0))
        watcher._progress.refresh()
        watcher(Progress(4, 9, 1, (), 42.0, Outcome(cell, reason="A [b]slip[/b].")))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    assert "3 of 9 cells" in shown
    assert "acdc 90 %, seed 0 25 %" in shown
    assert "2 min left" in shown
    assert "4/9  acdc 90 %, seed 0: no result: A [b]slip[/b].  42 s left" in shown


def test_the_command_line_tells_each_cell(tmp_path: Path, capsys: Capture) -> None:
    assert main(["compare", grid_of("small"), "--jobs", "0", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "small" / "report.html")
    assert re.search(r"1/3  dense, seed 0: dense \d+\.\d{3}", printed.err)
    assert re.search(r"3/3  one_shot 50 %, seed 0: sparse \d+\.\d{3}", printed.err)


def test_the_table_in_the_readme_is_what_its_command_prints() -> None:
    script = ROOT / "experiments" / "compared.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert len(run.stdout.splitlines()) == 11
    assert run.stdout in (ROOT / "README.md").read_text(encoding="utf-8")
