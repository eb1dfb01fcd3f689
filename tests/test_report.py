"""The report page shows the values of the record, and a browser shows it without a network."""

from __future__ import annotations

import html
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from acdc.errors import InputError, MissingDependency
from acdc.pages import history, plots
from acdc.pages import run as report
from acdc.runs import train
from support.browser import CHROMIUM, SKIP, Browser
from support.reader import Reader
from support.runs import tiny

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=SKIP)

FIGURES = ["accuracy", "loss", "churn", "density"]


# --- A run that never ran ------------------------------------------------------------------------


def resnet20() -> list[dict[str, Any]]:
    """The 22 layers of a CIFAR ResNet-20 with 1x1 shortcuts."""
    layers = [("conv1", (16, 3, 3, 3), 1024)]
    inputs = 16
    for stage, width in enumerate((16, 32, 64), 1):
        for block in range(3):
            at, area = f"layer{stage}.{block}", (32 >> (stage - 1)) ** 2
            layers.append((f"{at}.conv1", (width, inputs, 3, 3), area))
            layers.append((f"{at}.conv2", (width, width, 3, 3), area))
            if inputs != width:
                layers.append((f"{at}.downsample.0", (width, inputs, 1, 1), area))
            inputs = width
    layers.append(("fc", (10, 64), 1))
    return [
        {"name": f"{name}.weight", "shape": list(shape), "numel": math.prod(shape),
         "positions": positions, "prunable": True}
        for name, shape, positions in layers
    ]  # fmt: skip


def resnet50() -> list[dict[str, Any]]:
    """The 54 layers of ResNet-50."""
    layers = [("conv1", (64, 3, 7, 7), 112 * 112)]
    inputs = 64
    for stage, (width, blocks, side) in enumerate(
        [(64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)], 1
    ):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            layers.append((f"{at}.conv1", (width, inputs, 1, 1), side * side))
            layers.append((f"{at}.conv2", (width, width, 3, 3), side * side))
            layers.append((f"{at}.conv3", (4 * width, width, 1, 1), side * side))
            if block == 0:
                layers.append((f"{at}.downsample.0", (4 * width, inputs, 1, 1), side * side))
            inputs = 4 * width
    layers.append(("fc", (1000, 2048), 1))
    return [
        {"name": f"{name}.weight", "shape": list(shape), "numel": math.prod(shape),
         "positions": positions, "prunable": True}
        for name, shape, positions in layers
    ]  # fmt: skip


def write_run(
    folder: Path,
    *,
    layers: list[dict[str, Any]] | None = None,
    cuts: tuple[int, ...] = (2, 4, 6, 8, 10),
    epochs: int = 12,
    per_epoch: int = 40,
    sparsity: float = 0.9,
    finetune: bool = True,
    method: str = "ACDC",
    stop: int | None = None,
    step_down: bool = False,
) -> dict[str, Any]:
    """Write the folder of an invented run and return its record.

    ``cuts`` are the epochs at which the phases change, the first phase being dense; ``stop`` is the
    step of the last event that was written.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    layers = resnet20() if layers is None else layers
    dense_run = method == "Dense"
    edges = [0, epochs] if dense_run else [0, *cuts, epochs]
    total = epochs * per_epoch
    phases = [
        {"kind": ("dense", "sparse")[i % 2], "start": a * per_epoch, "stop": b * per_epoch}
        for i, (a, b) in enumerate(itertools.pairwise(edges))
    ]
    prunable = sum(layer["numel"] for layer in layers if layer["prunable"])
    if dense_run:  # it prunes no layer
        layers = [{**layer, "prunable": False} for layer in layers]
    changes: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    for phase in phases[1:]:
        if phase["kind"] == "dense":
            change = {"nnz": prunable, "churn": None, "regrown": None, "counts": None}
        else:
            # Large layers end up sparser, as with one threshold for all.
            for layer in layers:
                if layer["prunable"]:
                    density = (1 - sparsity) * (prunable / len(layers) / layer["numel"]) ** 0.45
                    density = min(1.0, density * float(rng.uniform(0.7, 1.4)))
                    counts[layer["name"]] = max(1, round(layer["numel"] * density))
            # The largest layer takes up the difference to the exact count.
            most = max((x for x in layers if x["prunable"]), key=lambda x: x["numel"])["name"]
            kept = prunable - round(sparsity * prunable)
            counts[most] += kept - sum(counts.values())
            assert all(0 < counts[x["name"]] <= x["numel"] for x in layers if x["prunable"])
            first = not any(c["to"] == "sparse" for c in changes)
            churn = None if first else 0.11 * math.exp(-0.5 * len(changes)) + 0.012
            regrown = None if first else round((churn or 0) * prunable / 2)
            nnz = sum(counts.values())
            change = {"nnz": nnz, "churn": churn, "regrown": regrown, "counts": dict(counts)}
        changes.append({"event": "change", "step": phase["start"], "to": phase["kind"], **change})

    def accuracy(epoch: float, kind: str) -> float:
        base = 92.6 - 45 * math.exp(-0.9 * epoch) - (1.4 if kind == "sparse" else 0.0)
        return float(base - 2.5 * (1 - epoch / epochs) * rng.random())

    def rate(step: int) -> float:
        if step_down:
            return 0.1 * 0.1 ** (4 * step // total)
        return 0.05 * (1 + math.cos(math.pi * step / total))

    def loss(step: int, kind: str) -> float:
        smooth = 0.12 + 2.1 * math.exp(-6 * step / total) + (0.05 if kind == "sparse" else 0)
        return float(smooth * rng.lognormal(0, 0.25))

    events: list[dict[str, Any]] = [
        {"event": "start", "step": 0, "total_steps": total, "steps_per_epoch": [per_epoch] * epochs,
         "phases": phases, "layers": layers}
    ]  # fmt: skip
    fork = max(p["stop"] for p in phases if p["kind"] == "dense")
    for twin in (None, "dense") if finetune and not dense_run else (None,):
        for step in range(fork if twin else 0, total):
            phase = next(p for p in phases if p["start"] <= step < p["stop"])
            kind = "dense" if twin else phase["kind"]
            mark = {"twin": twin} if twin else {}
            if not twin:
                events += [c for c in changes if c["step"] == step]
            events.append(
                {"event": "step", "step": step + 1, "epoch": step // per_epoch, "phase": kind,
                 "loss": loss(step, kind), "lr": rate(step), "seconds": 0.031 + 0.004
                 * (kind == "dense") * rng.random(), **mark}
            )  # fmt: skip
            if (step + 1) % per_epoch == 0:
                nnz = sum(counts.values()) if kind == "sparse" else prunable
                events.append(
                    {"event": "eval", "step": step + 1, "epoch": (step + 1) // per_epoch,
                     "phase": kind, "split": "test", "accuracy": accuracy((step + 1) / per_epoch,
                     kind), "loss": 0.3, "nnz": nnz, "sparsity": 1 - nnz / prunable,
                     "seconds": 0.4, **mark}
                )  # fmt: skip
    written = events
    if stop is not None:
        written = [e for e in events if e["step"] <= stop and "twin" not in e]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in written))

    values = {
        "type": "Recipe",
        "model": {"type": "ResNetCifar", "depth": 20, "width": 16, "classes": 10},
        "data": {"type": "FashionMNIST"},
        "method": {"type": "ACDC", "pattern": {"type": "Unstructured", "sparsity": sparsity,
                   "scope": "global", "overrides": [], "floor": 1}, "reset": "all"},
        "plan": {"type": "Alternate", "epochs": epochs, "warmup": "2ep", "sparse": "2ep"},
        "optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": False,
                      "weight_decay": 5e-4},
        "batch_size": 128, "dense_finetune": finetune, "precision": "32-true",
    }  # fmt: skip
    if dense_run:
        values["method"] = {"type": "Dense"}
    recipe = {
        "name": "fashion_mnist", "seed": 3, "values": values,
        "changed": {} if dense_run else {"method.pattern.sparsity": sparsity},
    }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe))

    samples = total * 128
    dense_flops = sum(2 * layer["numel"] * layer["positions"] for layer in layers)
    final = [
        {**layer, "macs": layer["numel"] * layer["positions"],
         "nnz": counts.get(layer["name"], layer["numel"]),
         "density": counts.get(layer["name"], layer["numel"]) / layer["numel"]}
        for layer in layers
    ]  # fmt: skip
    sparse_flops = sum(2 * layer["nnz"] * layer["positions"] for layer in final)
    worth, costs = 0.0, []
    for phase in phases:
        share = 1.0
        if phase["kind"] == "sparse":
            kept = next(c["counts"] for c in changes if c["step"] == phase["start"])
            share = sum(2 * kept.get(layer["name"], layer["numel"]) * layer["positions"]
                        for layer in layers) / dense_flops  # fmt: skip
        length = phase["stop"] - phase["start"]
        worth += share * length
        costs.append({**phase, "samples": 128 * length,
                      "flops": round(3 * dense_flops * 128 * length * share),
                      "dense_flops": 3 * dense_flops * 128 * length})  # fmt: skip
    nnz = sum(counts.values())
    evals = [e for e in events if e["event"] == "eval"]
    twin = [e for e in evals if e.get("twin")] or [e for e in evals if e["step"] <= fork]
    record = {
        "sparse": None if dense_run else {
            "accuracy": [e for e in evals if not e.get("twin")][-1]["accuracy"],
            "sparsity": 1 - nnz / prunable, "nnz": nnz, "bytes": 4 * nnz + prunable // 8 + 9_000},
        "dense": {"accuracy": twin[-1]["accuracy"], "bytes": 4 * prunable + 11_016},
        "inference_flops_ratio": sparse_flops / dense_flops,
        "train_flops_ratio": worth / total,
        "seconds": 61.25, "run": str(folder),
        "details": {
            "recipe": "fashion_mnist", "seed": 3, "finished": "2026-05-04T09:30:00+00:00",
            "machine": {"cpu": "Example CPU 9000", "cores": 2, "threads": 2, "platform": "Linux"},
            "versions": {"python": "3.11.2", "torch": "2.13.0", "acdc": "0.1.0"},
            "sparsity_asked": sparsity, "sparsity_all_parameters": (prunable - nnz) /
            (prunable + 1386), "parameters": prunable + 1386, "prunable": prunable,
            "dense_flops": dense_flops, "sparse_flops": sparse_flops,
            "train_flops": sum(cost["flops"] for cost in costs),
            "train_flops_dense": 3 * dense_flops * samples, "phases": phases, "layers": final,
            "ledger": {"exact": True, "phases": costs},
            "finetune_flops": costs[-1]["dense_flops"] if finetune and not dense_run else 0,
            "dense_finetuned": finetune, "bn_reestimated": False,
            "command": "acdc run fashion_mnist --set method.pattern.sparsity=0.9 --seed 3",
        },
    }  # fmt: skip
    if dense_run:
        record["details"] |= {"sparsity_asked": None, "prunable": 0}
    if stop is None:
        (folder / "record.json").write_text(json.dumps(record))
    return record


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """Folder, record and page of a complete run."""
    folder = tmp_path_factory.mktemp("runs") / "complete"
    record = write_run(folder)
    return folder, record, report.render(folder).read_text(encoding="utf-8")


# --- Reading the page ----------------------------------------------------------------------------


def test_twins_table_says_the_record(run: tuple[Path, dict[str, Any], str]) -> None:
    _, record, text = run
    read = Reader(text)
    sparse, dense, details = record["sparse"], record["dense"], record["details"]
    gap = sparse["accuracy"] - dense["accuracy"]
    assert gap < 0
    accuracy = [f"{sparse['accuracy']:.2f}", f"{dense['accuracy']:.2f}", f"−{-gap:.2f} points"]
    assert read.row("twins", "Test accuracy, %") == accuracy
    assert read.row("twins", "Sparsity asked for") == ["90.00%", "–", "–"]
    assert read.row("twins", "Prunable weights kept")[:2] == ["27,090", "270,896"]
    assert read.row("twins", "Size on disk, bytes")[:2] == [
        f"{sparse['bytes']:,}", f"{dense['bytes']:,}"
    ]  # fmt: skip
    ratio = f"{100 * record['inference_flops_ratio']:.2f}%"
    assert read.row("twins", "FLOPs of one inference")[2] == ratio
    # Behind the rounded text stand the exact numbers.
    for value in (sparse["accuracy"], sparse["sparsity"], sparse["nnz"], dense["bytes"],
                  record["inference_flops_ratio"], record["train_flops_ratio"],
                  details["sparse_flops"], details["dense_flops"], details["train_flops"],
                  details["sparsity_all_parameters"]):  # fmt: skip
        assert value in read.exact["twins"]


def test_ledger_adds_up_to_the_record(run: tuple[Path, dict[str, Any], str]) -> None:
    folder, record, text = run
    read, details = Reader(text), record["details"]
    dense, sparse = read.row("ledger", "Dense phases"), read.row("ledger", "Sparse phases")
    total = read.row("ledger", "Training")
    assert [dense[0], sparse[0], total[0]] == ["240", "240", "480"]
    assert dense[2] == "100.0%"
    assert total[2] == f"{100 * record['train_flops_ratio']:.1f}%"
    exact = read.exact["ledger"]
    flops = [value for value in exact if value > 1e9]
    assert flops[0] + flops[1] == flops[2] == details["train_flops"]
    assert flops[0] == details["train_flops_dense"] / 2
    # Fine-tuning: two dense epochs of twelve, beside the total and not in it.
    assert flops[3] == details["train_flops_dense"] / 6
    assert "not included" in text
    events = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    steps = [e for e in events if e["event"] == "step" and "twin" not in e]
    seconds = sum(e["seconds"] for e in steps if e["phase"] == "sparse")
    assert sparse[3] == f"{seconds:.1f}"
    assert any(value == pytest.approx(seconds, abs=1e-5) for value in exact)
    assert read.row("ledger", "Whole run, by the clock")[3] == "61.2"


def with_engine(folder: Path, start: dict[str, Any], *events: dict[str, Any]) -> Reader:
    """Write a run with these events of the engine, and return its page."""
    write_run(folder)
    path = folder / "metrics.jsonl"
    first, *rest = path.read_text().splitlines()
    lines = [json.dumps({**json.loads(first), "engine": start}), *map(json.dumps, events), *rest]
    path.write_text("".join(f"{line}\n" for line in lines))
    return Reader(report.render(folder).read_text())


def test_the_engine_s_choices_and_what_they_gained(tmp_path: Path) -> None:
    timed = {"name": "conv1", "density": 0.125, "sparse": True, "dense_ms": 2.5,
             "sparse_ms": 0.625, "convert_ms": 0.25}  # fmt: skip
    choices = [timed, {**timed, "name": "layer1.0.conv1", "sparse": False, "sparse_ms": None}]
    start = {"kind": "avx512", "reason": None}
    first = {"event": "engine", "step": 80, **start, "choices": choices, "seconds": 1.5}
    later = {"event": "engine", "step": 240, **start, "seconds": 0.25}
    page = with_engine(tmp_path / "run", start, {**first, "refused": {"fc": "too <odd>"}}, later)
    assert page.row("engine", "conv1") == ["12.50%", "2.50", "0.62", "0.25", "sparse"]
    assert page.row("engine", "layer1.0.conv1")[2:] == ["–", "0.25", "dense"]
    assert page.row("ledger", "Building of the engine") == ["–", "–", "–", "1.8", "–"]
    steps = [page.row("ledger", f"{kind} phases")[4] for kind in ("Sparse", "Dense")]
    text = (tmp_path / "run/report.html").read_text()
    assert "In sparse phases 1 of 3 layers ran on the engine (avx512)." in text
    assert "A step took {}\u202fms in them and {}\u202fms in dense ones.".format(*steps) in text
    assert "The layer fc was left to PyTorch: too &lt;odd&gt;." in text


def test_an_engine_that_was_off_says_why(tmp_path: Path) -> None:
    reason = "the run is on cuda:0, and the kernels are for CPUs"
    with_engine(tmp_path / "off", {"kind": "off", "reason": reason})
    assert f"The engine stayed off: {reason}." in (tmp_path / "off/report.html").read_text()
    with_engine(tmp_path / "asked", {"kind": "off", "reason": None})
    assert "The engine" not in (tmp_path / "asked/report.html").read_text()


def test_schedule_and_compressions(run: tuple[Path, dict[str, Any], str]) -> None:
    read = Reader(run[2])
    phases = read.rows["schedule"][1:]
    assert [row[0] for row in phases] == ["dense", "sparse"] * 3
    assert [row[1] for row in phases][:3] == ["[0, 2)", "[2, 4)", "[4, 6)"]
    assert [row[4].replace("\u202f", "") for row in phases] == ["100.00%", "10.00%"] * 3
    first, second, _ = read.rows["compressions"][1:]
    assert first[1:] == ["2", "80", "27,090", "–", "–"]
    assert second[2] == "240"
    assert second[4].replace("\u202f", "") == f"{100 * (0.11 * math.exp(-1) + 0.012):.3f}%"
    assert len(read.rows["layers"]) == 1 + 22


def test_figures_hold_what_was_measured(run: tuple[Path, dict[str, Any], str]) -> None:
    _, _, text = run
    assert Reader(text).figures == FIGURES
    assert [int(n) for n in re.findall(r"<b>Figure (\d)\.", text)] == [1, 2, 3, 4]
    # The labels at the dots of figure 3 are the churn of the record, in percent.
    churn = text[text.index('<figure id="churn"') : text.index('<figure id="density"')]
    wide, narrow = churn.split('<div class="narrow">')
    for drawing in (wide, narrow):
        assert f">{100 * (0.11 * math.exp(-1) + 0.012):.2g}</text>" in drawing
    density = text[text.index('<figure id="density"') :]
    for layer in resnet20():
        assert f">{layer['name'].removesuffix('.weight')}</text>" in density


def test_every_value_of_the_recipe_with_the_changed_marked(
    run: tuple[Path, dict[str, Any], str],
) -> None:
    read = Reader(run[2])
    values = {row[0]: row[1] for row in read.rows["recipe"][1:]}
    assert values["optimizer.weight_decay"] == "0.0005"
    assert values["method.pattern"] == "Unstructured"
    assert values["method.pattern.sparsity"] == "0.9 ◆"
    assert [path for path, value in values.items() if "◆" in value] == ["method.pattern.sparsity"]
    assert "acdc run fashion_mnist --set method.pattern.sparsity=0.9 --seed 3" in run[2]
    assert "Example CPU 9000" in run[2]
    assert "torch 2.13.0" in run[2]
    assert "2026-05-04 09:30 UTC" in run[2]
    # The page may be published: it names the folder of the run, not where it lay.
    assert str(run[0].parent) not in run[2]
    assert "<dd>complete</dd>" in run[2]


def test_page_is_self_contained(run: tuple[Path, dict[str, Any], str]) -> None:
    text = run[2]
    read = Reader(text)
    assert read.loads == []
    assert not read.tags & {"script", "link", "iframe", "object", "embed", "img", "base"}
    assert not re.search(r"@import|@font-face|url\((?!#)", text)
    assert len(read.ids) == len(set(read.ids))
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    assert used, "matplotlib cuts lines off at the frame, so something must be referred to"
    assert used <= set(read.ids)
    assert "default-src 'none'" in text


def test_reader_finds_what_loads() -> None:
    read = Reader('<img src="https://a.example/x.png"><a href="#here"></a><script src="y.js">')
    assert read.loads == ["img src=https://a.example/x.png", "script src=y.js"]


def test_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    write_run(tmp_path, method="Dense")
    first = report.render(tmp_path).read_bytes()
    assert report.render(tmp_path).read_bytes() == first


# --- Runs that are not complete, or not friendly -------------------------------------------------


def test_dense_run_has_no_sparse_column(tmp_path: Path) -> None:
    record = write_run(tmp_path, method="Dense")
    text = report.render(tmp_path).read_text(encoding="utf-8")
    read = Reader(text)
    assert read.rows["twins"][0][1:] == ["Dense"]
    assert read.row("twins", "Test accuracy, %") == [f"{record['dense']['accuracy']:.2f}"]
    weights = sum(layer["numel"] for layer in record["details"]["layers"])
    assert read.row("twins", "Weights of convolutions and linear layers") == [f"{weights:,}"]
    assert f"parameters ({weights:,} weights in 22 layers) was trained" in text
    assert read.figures == ["accuracy", "loss"]
    assert "Change of the support: no figure." in text
    assert "Density of the layers: no figure." in text
    assert "sparse phase" not in text.lower().replace("sparse phases are", "")
    assert "compressions" not in read.rows
    assert "Fine-tuning" not in text


def test_stopped_run_shows_what_there_is(tmp_path: Path) -> None:
    write_run(tmp_path, stop=250)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event":"step","step":251,"lo')  # killed in the middle of a line
    text = report.render(tmp_path).read_text(encoding="utf-8")
    read = Reader(text)
    assert "stopped before its end at step 250 of 480" in text
    assert "1 line of metrics.jsonl could not be read and was left out." in text
    assert read.figures == FIGURES
    assert "twins" not in read.rows
    assert read.row("ledger", "Training")[:3] == ["250", "–", "–"]  # no evaluation counted FLOPs


def test_a_stopped_run_has_the_flops_of_its_last_evaluation(tmp_path: Path) -> None:
    """The trainer counts them after every epoch, for a run that is killed writes no record."""

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 14:  # epochs have 4 steps
            raise KeyboardInterrupt

    train.run(tiny(), tmp_path / "whole", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train.run(tiny(), tmp_path / "stopped", device="cpu", watch=watch)
    whole, stopped = (history.read(tmp_path / name).ledger for name in ("whole", "stopped"))
    assert whole is not None
    assert stopped is not None
    assert [phase.stop for phase in stopped.phases] == [4, 8, 12]
    assert stopped.phases == whole.phases[:3]
    text = report.render(tmp_path / "stopped").read_text(encoding="utf-8")
    assert "The FLOPs of training are those of the first 12 steps." in text
    assert Reader(text).row("ledger", "Sparse phases")[2] != "–"


@pytest.mark.parametrize(
    ("stop", "figures"), [(0, []), (30, ["loss"]), (100, ["accuracy", "loss", "density"])]
)
def test_stopped_early(tmp_path: Path, stop: int, figures: list[str]) -> None:
    write_run(tmp_path, stop=stop)
    text = report.render(tmp_path).read_text(encoding="utf-8")
    assert Reader(text).figures == figures
    assert text.count(": no figure.</b>") == 4 - len(figures)


def test_run_without_metrics(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    text = report.render(tmp_path).read_text(encoding="utf-8")
    # The record alone still knows the layers of the sparse twin.
    assert Reader(text).figures == ["density"]
    assert "no clock to draw against" in text


def test_resumed_run_counts_a_step_once(tmp_path: Path) -> None:
    write_run(tmp_path, stop=250)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    once = history.read(tmp_path)
    again = [line for line in lines if json.loads(line)["step"] > 200]
    (tmp_path / "metrics.jsonl").write_text("".join(lines + again))
    twice = history.read(tmp_path)
    assert len(twice.steps) == len(once.steps) == 250
    assert np.array_equal(twice.steps.seconds, once.steps.seconds)
    assert (twice.evals, twice.changes) == (once.evals, once.changes)


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('&\"')</script>$x^2$"
    layers = resnet20()
    layers[0]["name"] = evil
    write_run(tmp_path, layers=layers)
    for name, change in {
        "recipe.json": lambda d: d["values"].update({"note": evil, evil: 1}) or d.update(name=evil),
        "record.json": lambda d: d["details"].update(
            command=evil, finished=evil, machine={evil: evil}, versions={evil: evil}
        ),
    }.items():
        data = json.loads((tmp_path / name).read_text())
        change(data)
        (tmp_path / name).write_text(json.dumps(data))
    text = report.render(tmp_path).read_text(encoding="utf-8")
    assert "script" not in Reader(text).tags
    assert "<script" not in text
    # The layer's name in figure and table, the recipe's in title and caption, and the rest.
    assert html.unescape(text).count(evil) >= 10
    # In the figure it stands as it is: a dollar sign in a name is not mathematics.
    density = text[text.index('<figure id="density"') :]
    assert html.unescape(density[: density.index("</figure>")]).count(evil) == 2


def test_losses_that_are_not_finite(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    events = [json.loads(line) for line in path.open()]
    for event in events:
        if event["event"] == "step" and event["step"] in (100, 101, 300):
            event["loss"] = float("nan" if event["step"] < 300 else "inf")
    path.write_text("".join(json.dumps(e) + "\n" for e in events))
    text = report.render(tmp_path).read_text(encoding="utf-8")
    assert Reader(text).figures == FIGURES
    assert "The loss of 3 steps is not finite and is not drawn." in text
    assert "nan" not in "".join(re.findall(r' d="([^"]*)"', text)).lower()


@pytest.mark.parametrize("bits", ["nan", "inf"])
def test_a_text_network_whose_loss_is_not_finite_has_its_page(tmp_path: Path, bits: str) -> None:
    """The last evaluation may overflow where no loss of training did; the record says so."""
    record = write_run(tmp_path)
    for twin in ("sparse", "dense"):
        record[twin]["bits"] = float(bits)
    (tmp_path / "record.json").write_text(json.dumps(record))
    read = Reader(report.render(tmp_path).read_text(encoding="utf-8"))
    assert read.row("twins", "Bits of a character") == [bits, bits, "–"]


def test_layers_that_are_not_pruned(tmp_path: Path) -> None:
    layers = resnet20()
    layers[0]["prunable"] = layers[-1]["prunable"] = False
    record = write_run(tmp_path, layers=layers)
    path = tmp_path / "metrics.jsonl"
    start, *others = path.read_text().splitlines(keepends=True)
    refused = {"conv1.weight": "its rows have 27 weights, no multiple of 4."}
    path.write_text(json.dumps(json.loads(start) | {"refused": refused}) + "\n" + "".join(others))
    text = report.render(tmp_path).read_text(encoding="utf-8")
    read = Reader(text)
    assert "Open dots: layers that are not pruned." in text
    assert "The layer conv1 stayed dense: its rows have 27 weights, no multiple of 4." in text
    assert read.row("layers", "conv1°")[3] == "100.00%"
    ratio = f"{100 * record['train_flops_ratio']:.1f}%"
    assert read.row("ledger", "Training")[2] == ratio
    (tmp_path / "record.json").unlink()  # as of a run that stopped: from the metrics alone
    first, second = history.read(tmp_path).layers[:2]
    assert (first.nnz, first.density) == (first.numel, 1.0)
    assert second.nnz is not None
    assert second.nnz < second.numel


@pytest.mark.parametrize("broken", ["folder", "recipe", "record", "list"])
def test_bad_folders_are_refused(tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "run"
    sentence = "There is no folder"
    if broken != "folder":
        write_run(folder)
    if broken == "recipe":
        (folder / "recipe.json").unlink()
        sentence = "holds no recipe.json"
    if broken == "record":
        (folder / "record.json").write_text('{"sparse": {"accura')
        sentence = "record.json' is damaged"
    if broken == "list":
        (folder / "recipe.json").write_text("[]")
        sentence = "holds no JSON object"
    with pytest.raises(InputError, match=sentence):
        report.render(folder)
    assert not (folder / "report.html").exists()


# What the page shows of a record's details, and a number, a text or a list of another type.
WRONG_DETAILS = {
    **dict.fromkeys(("finished", "command", "device"), (float("inf"), ["a text"], {}, True)),
    **dict.fromkeys(("machine", "versions"), ("a text", 1, [])),
    **dict.fromkeys(("dense_finetuned", "bn_reestimated"), ("a text", 1, [])),
}


@pytest.mark.parametrize("name", WRONG_DETAILS)
def test_a_record_with_details_of_another_type_is_refused(tmp_path: Path, name: str) -> None:
    record = write_run(tmp_path)
    for value in WRONG_DETAILS[name]:
        record["details"][name] = value
        (tmp_path / "record.json").write_text(json.dumps(record))
        with pytest.raises(InputError, match=rf"record.json' is damaged \(details.{name} is "):
            report.render(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_record_without_the_details_that_a_page_can_leave_out_is_shown(tmp_path: Path) -> None:
    record = write_run(tmp_path)
    for name in WRONG_DETAILS:
        record["details"].pop(name, None)
    (tmp_path / "record.json").write_text(json.dumps(record))
    page = report.render(tmp_path).read_text(encoding="utf-8")
    assert "Example CPU" not in page
    assert "2026-05-04" not in page


def test_page_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, method="Dense")
    (tmp_path / "report.html").write_text("the page before")

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space"):
        report.render(tmp_path)
    assert (tmp_path / "report.html").read_text() == "the page before"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "metrics.jsonl", "recipe.json", "record.json", "report.html"
    ]  # fmt: skip


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_missing_package_says_the_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    write_run(tmp_path, method="Dense")
    for name in list(sys.modules):
        if name == package or name.startswith(f"{package}."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=rf"'{package}'.*pip install \"acdc-train\[lab\]\""):
        report.render(tmp_path)


def test_plotting_is_imported_late_and_leaves_no_trace(tmp_path: Path) -> None:
    write_run(tmp_path, method="Dense")
    code = (
        "import sys, pathlib, acdc.pages.run as report\n"
        "assert 'matplotlib' not in sys.modules and 'jinja2' not in sys.modules\n"
        "import matplotlib\n"
        "matplotlib.rcParams['axes.facecolor'] = '#123456'\n"  # a user's own style
        "rc = matplotlib.rcParams\n"
        "def state(): return {k: rc[k] for k in rc.keys() if 'backend' not in k}\n"
        "before = state()\n"
        "page = report.render(pathlib.Path(sys.argv[1])).read_text()\n"
        "assert state() == before\n"
        "assert '#123456' not in page\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], check=True)


# --- Long runs -----------------------------------------------------------------------------------


def test_long_run_is_quick_and_small(tmp_path: Path) -> None:
    write_run(tmp_path, epochs=100, cuts=(10, 40, 50, 75, 85), per_epoch=1000, finetune=False)
    start = time.process_time()
    text = report.render(tmp_path).read_text(encoding="utf-8")
    seconds = time.process_time() - start
    assert Reader(text).row("ledger", "Training")[0] == "100,000"
    assert len(text) < 1_000_000
    assert max(path.count("L ") for path in re.findall(r' d="([^"]*)"', text)) <= plots.POINTS
    assert seconds < 15  # of processor time; about 2 on an idle core


def test_decimate_keeps_every_spike() -> None:
    x = np.arange(100_000.0)
    y = np.sin(x / 5000)
    y[12_345], y[67_890] = 9.0, -9.0
    y[50_000:60_000] = np.nan
    thin_x, thin_y = plots.decimate(x, y, 1500)
    assert len(thin_x) <= 1500
    assert np.all(np.diff(thin_x) >= 0)
    assert np.nanmax(thin_y) == 9.0
    assert np.nanmin(thin_y) == -9.0
    assert np.isnan(thin_y[(thin_x > 50_100) & (thin_x < 59_900)]).all()
    same_x, same_y = plots.decimate(x[:1500], y[:1500], 1500)
    assert np.array_equal(same_x, x[:1500])
    assert np.array_equal(same_y, y[:1500])


def test_smooth_is_the_mean_of_the_window() -> None:
    y = np.array([1.0, 2.0, np.nan, 4.0, 5.0, 6.0])
    expected = [1.5, 1.5, np.nan, 4.5, 5.0, 5.5]
    np.testing.assert_allclose(plots.smooth(y, 3), expected)
    np.testing.assert_array_equal(plots.smooth(y, 1), y)


# --- In a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Any:
    with Browser() as opened:
        yield opened


@needs_chromium
@pytest.mark.parametrize("width", [1200, 420])
def test_browser_draws_every_figure(
    run: tuple[Path, dict[str, Any], str], browser: Browser, width: int
) -> None:
    seen = browser.look(run[0] / "report.html", width)
    assert seen.problems() == []
    assert [figure["id"] for figure in seen.figures] == FIGURES
    for figure in seen.figures:
        assert figure["overhang"] < 1, f"{figure['id']} is cut off at the right"
    # Nothing but the tables in their own frames may scroll sideways.
    assert seen.width <= width
    assert f"{run[1]['sparse']['accuracy']:.2f}" in seen.text


@needs_chromium
def test_browser_shows_folded_tables_in_print(
    run: tuple[Path, dict[str, Any], str], browser: Browser
) -> None:
    page = run[0] / "report.html"
    assert "layer3.2.conv2" not in browser.look(page).text.split("Density of the layers")[1]
    printed = browser.look(page, 643, media="print")  # A4 less the margins
    assert printed.problems() == []
    assert "layer3.2.conv2" in printed.text.split("Density of the layers")[1]
    assert printed.width <= 643


@needs_chromium
@pytest.mark.parametrize("case", ["dense", "stopped", "resnet50"])
def test_browser_draws_other_runs(tmp_path: Path, browser: Browser, case: str) -> None:
    if case == "dense":
        write_run(tmp_path, method="Dense")
    elif case == "stopped":
        write_run(tmp_path, stop=250)
    else:
        write_run(tmp_path, layers=resnet50(), finetune=False, step_down=True)
    page = report.render(tmp_path)
    for width in (1200, 420):
        seen = browser.look(page, width)
        assert seen.problems() == []
        assert len(seen.figures) == (2 if case == "dense" else 4)
        assert all(figure["overhang"] < 1 for figure in seen.figures)
        assert seen.width <= width


DRAWN = '<svg width="200" height="100">' + "<path d='M0 0L200 100'/>" * 6 + "</svg>"


@needs_chromium
@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("<script>throw new Error('broken on purpose')</script>", "broken on purpose"),
        ("<script>console.error('said aloud')</script>", "said aloud"),
        ("<script>Promise.reject(new Error('unheeded'))</script>", "unheeded"),
        ("<img src='https://images.example/x.png'>", "asks for https://images.example/x.png"),
        ("<img src='http://127.0.0.1:9/x.png'>", "asks for http://127.0.0.1:9/x.png"),
        ("<img src='missing.png'>", "load failed"),
        ("<style>@import 'https://fonts.example/a.css'</style>", "asks for https://fonts.example"),
        ("<figure data-figure id=f><svg width=200 height=100></svg></figure>", "f is empty"),
        (f"<figure data-figure id=f>{DRAWN.replace('100', '0')}</figure>", "f has no size"),
        (f"<figure data-figure id=f hidden>{DRAWN}</figure>", "f shows 0 drawings"),
        (f"<figure data-figure id=f>{DRAWN}{DRAWN}</figure>", "f shows 2 drawings"),
    ],
)
def test_browser_finds_what_is_broken(
    tmp_path: Path, browser: Browser, body: str, problem: str
) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<!DOCTYPE html><meta charset=utf-8><title>x</title><body>{body}")
    assert problem in "; ".join(browser.look(page).problems())


@needs_chromium
def test_browser_finds_nothing_wrong_with_a_good_page(tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<!DOCTYPE html><title>x</title><figure data-figure id=f>{DRAWN}</figure>")
    assert browser.look(page).problems() == []
