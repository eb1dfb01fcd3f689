"""The command line: a frozen surface, errors as sentences, and no loss of trained networks."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import acdc
from acdc import ACDC, Pair, Unstructured, console, constant, phases, recipes
from acdc.cli import main, parser
from acdc.console import Watcher
from acdc.errors import InputError
from acdc.methods import METHODS, Dense, RigL, Static
from acdc.pages import run as report
from acdc.recipes import grids
from acdc.runs import train
from acdc.runs.data import FashionMNIST, TinyShakespeare
from acdc.runs.models import SmallGPT
from acdc.runs.record import SUMMARY
from support.runs import (
    STEPS,
    TINY,
    assert_same_run,
    events,
    files,
    text_of_shakespeares_size,
    tiny,
    words,
)

Capture = pytest.CaptureFixture[str]


def typed(out: Path, *more: str, **changed: str) -> list[str]:
    """Return the words of a tiny run; ``__`` in a name stands for a dot."""
    changed = {path.replace("__", "."): value for path, value in changed.items()}
    settings = words({**TINY, **changed})
    return ["run", "digits", "--out", str(out), "--device", "cpu", *more, *settings]


def only_run(out: Path) -> Path:
    """Return the folder of the one run in ``out``."""
    (folder,) = out.iterdir()
    return folder


def printed(capture: Capture) -> tuple[str, str]:
    """Return standard output, and standard error without its line breaks."""
    out, err = capture.readouterr()
    return out, " ".join(err.split())


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ``acdc run`` finished."""
    out = tmp_path_factory.mktemp("done")
    assert main(typed(out)) == 0
    return only_run(out)


# --- the surface --------------------------------------------------------------------------------

RECIPE = ("RECIPE", "required")
SET = ("--set PATH=VALUE", "any number")
RUN = ("RUN", "required")
JSON = ("--json", "flag")
SCOPE = ("--scope uniform|erk|global", "default uniform")


def bench(repeats: str) -> list[tuple[str, str]]:
    """Return the options of every benchmark."""
    return [
        ("--case TEXT", "default []"),
        ("--sparsity S", "default None"),
        ("--repeats N", repeats),
        ("--threads N", "default None"),
        ("--json FILE", "default None"),
    ]


SURFACE = {
    "": [("COMMAND", "required"), ("--version", "flag")],
    "list": [],
    "show": [RECIPE, SET],
    "run": [
        RECIPE,
        SET,
        ("--out DIR", "default runs"),
        ("--resume", "flag"),
        ("--seed N", "default None"),
        ("--devices N", "default None"),
        ("--device D", "default auto"),
        ("--download", "flag"),
        JSON,
    ],
    "report": [RUN],
    "cost": [RECIPE, SET, JSON],
    "export": [
        RUN,
        ("--to safetensors|onnx|runtime", "required"),
        ("--twin sparse|dense", "default sparse"),
        ("--out FILE", "default None"),
        ("--sparse", "flag"),
        ("--dynamic INPUT:DIM=NAME", "any number"),
    ],
    "infer": [
        ("FILE", "required"),
        ("--input X.npy", "any number"),
        ("--output Y.npy", "any number"),
        ("--threads N", "default None"),
    ],
    "doctor": [("--with MODULE", "any number"), ("--json", "flag")],
    "cite": [("METHOD", "optional")],
    "compare": [
        ("GRID", "required"),
        ("--jobs N", "default None"),
        ("--device D", "default auto"),
        ("--on ADDRESS", "default None"),
        ("--slurm KEY=VALUE", "any number, or none"),
        ("--resume", "flag"),
        ("--out DIR", "default runs"),
    ],
    "study": [("WHAT", "required")],
    "study convergence": [
        ("--out FOLDER", "default None"),
        ("--seed N", "default 0"),
        ("--seeds N", "default 20"),
    ],
    "study twins": [
        RUN,
        ("--against RUN", "any number"),
        ("--out FOLDER", "default None"),
        ("--seed N", "default 0"),
        ("--samples N", "default 512"),
        ("--bn-batches N", "default 20"),
        ("--teach EPOCHS", "default 0"),
    ],
    "study masks": [RUN, ("--out FOLDER", "default None")],
    "study memorisation": [("RUN", "any number"), ("--out FOLDER", "default None")],
    "bench": [("WHAT", "required")],
    "bench layers": [*bench("default 9"), ("--caches left|emptied", "default left")],
    "bench step": [*bench("default 9"), SCOPE],
    "bench where": [*bench("default 9"), SCOPE],
    "bench zoo": [
        *bench("default 5")[1:],
        SCOPE,
        ("--network NAME", "default []"),
        ("--list", "flag"),
        ("--batch N", "default None"),
        ("--optimizer sgd|adam|adamw", "default sgd"),
        ("--columns NAMES", "default "),
    ],
    "bench infer": [
        *bench("default 5")[1:],
        SCOPE,
        ("WHAT", "any number, or none"),
        ("--batch N[,N]", "default [1, 16]"),
        ("--against NAMES", "default None"),
        ("--python KIND=PATH", "default []"),
        ("--scenario sync|async", "default sync"),
        ("--streams N", "default None"),
        ("--seconds S", "default 1.0"),
        ("--onnx FILE", "default None"),
        ("--model MODULE:CALLABLE", "default None"),
        ("--shape N[,N]", "default None"),
    ],
    "bench run": [
        *bench("default 1"),
        SCOPE,
        ("--epochs N", "default 4"),
        ("--samples N", "default None"),
    ],
}


def surface(commands: argparse.ArgumentParser) -> dict[str, list[tuple[str, str]]]:
    """Return the surface of the command line: the words of every command, and their arity."""

    def described(action: argparse.Action) -> tuple[str, str]:
        name = " ".join(action.option_strings)
        value = "|".join(action.choices) if action.choices else action.metavar
        if action.nargs != 0 and not isinstance(action, argparse._SubParsersAction):
            name = f"{name} {value}".strip()
        if action.nargs == 0:
            return name, "flag"
        if action.nargs == "+":
            return name, "any number"
        if action.nargs == "*":
            return name or str(action.metavar), "any number, or none"
        if action.nargs == "?":
            return str(action.metavar), "optional"
        required = action.required or not action.option_strings
        return name or str(action.metavar), "required" if required else f"default {action.default}"

    found = {}

    def explore(name: str, command: argparse.ArgumentParser) -> None:
        actions = [a for a in command._actions if "--help" not in a.option_strings]
        found[name] = sorted((described(a) for a in actions), key=str)
        for action in actions:
            if isinstance(action, argparse._SubParsersAction):
                for word, sub in action.choices.items():
                    explore(f"{name} {word}".strip(), sub)

    explore("", commands)
    return found


def test_the_surface_is_frozen() -> None:
    """Users have these words in their scripts: change them only for a good reason."""
    assert surface(parser()) == {name: sorted(rows, key=str) for name, rows in SURFACE.items()}


def test_help_and_version_need_nothing_but_the_library(capsys: Capture) -> None:
    for argv in (["--version"], ["--help"], ["run", "--help"]):
        with pytest.raises(SystemExit) as left:
            main(argv)
        assert left.value.code == 0
    out, _ = capsys.readouterr()
    assert out.startswith(f"acdc {acdc.__version__}\n")
    assert all(name.split()[0] in out for name in SURFACE if name)


def test_help_and_version_do_not_load_torch() -> None:
    code = "import sys; from acdc.cli import main; main(sys.argv[1:])"
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    for argv in (["--version"], ["--help"], ["bench", "step", "--help"], ["compare", "--help"]):
        words = [sys.executable, "-c", code, *argv]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    "argv", [[], ["nothing"], ["run"], ["run", "digits", "--res"], ["export", "x", "--to", "pdf"]]
)
def test_words_that_are_none_exit_with_2(argv: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    assert "usage: acdc" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error() -> None:
    shell = f"{sys.executable} -m acdc list | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.returncode in (0, 128 + signal.SIGPIPE)


# --- list, show, cost: no training, no data -----------------------------------------------------


def test_cite_prints_bibtex_and_without_a_method_lists_them(capsys: Capture) -> None:
    assert main(["cite", "rigl"]) == 0
    assert capsys.readouterr().out == RigL.citation
    assert main(["cite"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(METHODS)
    assert main(["cite", "lottery"]) == 2
    assert "no method 'lottery'. The methods are: acdc, dense," in " ".join(
        capsys.readouterr().err.split()
    )
    assert main(["cite", "dense"]) == 2
    assert "Dense training has no paper to cite." in " ".join(capsys.readouterr().err.split())


def test_list_names_every_recipe(capsys: Capture) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipes.names() + grids.names()
    assert all(
        recipes.get(name).about in line for name, line in zip(recipes.names(), lines, strict=False)
    )


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_can_be_shown(
    name: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes.get(name)
    kind = type(recipe.data)
    monkeypatch.setattr(kind, "load", lambda *_: pytest.fail("data was loaded"))
    if "imagenet" in name or "wrn" in name:  # their weights would take a second each
        monkeypatch.setattr("torch.nn.init.kaiming_normal_", lambda x, **_: x)
    assert main(["show", name]) == 0
    out = capsys.readouterr().out
    steps = recipe.data.steps_per_epoch(recipe.batch_size)
    for line in recipe.method.resolve(steps).resolved.table().splitlines():
        assert line in out
    with torch.device("meta"):
        pruned, _ = recipe.method.resolve(steps).select(recipe.model.build())
    assert out.count(" yes\n") == len(pruned)


def test_show_says_what_would_happen(capsys: Capture) -> None:
    argv = ["show", "imagenet_resnet50_uniform", "--set", "method.pattern.sparsity=0.95"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert re.search(r"method\.pattern\.sparsity +0\.95 +\(changed\)", out)
    assert re.search(r"optimizer\.lr +0\.256\n", out)
    assert re.search(r"dense +\[75, 85\) +\[375,375, 425,425\) +10\.0 %", out)
    assert re.search(r"conv1 +64×3×7×7 +9,408  no: the first layer", out)
    assert re.search(r"fc +1000×2048 +2,048,000  no: the last layer", out)
    assert re.search(r"parameters +25,557,032\n", out)
    assert re.search(r"prunable weights +23,445,504 +in 52 layers", out)
    assert "estimated" not in out  # uniform counts are known beforehand


def test_show_says_why_a_layer_stays_dense(capsys: Capture) -> None:
    assert main(["show", "digits", "--set", "method.pattern=nm"]) == 0
    assert "no: its 1 inputs do not divide into groups of 4" in capsys.readouterr().out
    assert main(["show", "cifar10_resnet20"]) == 0
    out = capsys.readouterr().out
    assert out.count("no: excluded by name") == 2
    assert "estimated on untrained weights" in out
    assert main(["show", "digits", "--set", "method=dense"]) == 0
    assert capsys.readouterr().out.count("no: the method dense prunes nothing") == 10


def test_every_path_that_is_shown_can_be_set(capsys: Capture) -> None:
    assert main(["show", "cifar10_resnet20"]) == 0
    shown = re.findall(r"^  ([a-z_.]+[a-z]) +(\S+)$", capsys.readouterr().out, re.MULTILINE)
    values = {path: value for path, value in shown if value[0].islower() or not value[0].isalpha()}
    assert len(values) > 35
    given = {k: v for k, v in values.items() if v != "()" and k not in ("parameters",)}
    assert main(["show", "cifar10_resnet20", *words(given)]) == 0
    again = capsys.readouterr().out
    assert again.count("(changed)") >= len(given)
    for path, value in given.items():
        assert re.search(rf"^  {re.escape(path)} +{re.escape(value)} +\(changed\)", again, re.M)


def test_cost_adds_up(capsys: Capture) -> None:
    name = "cifar10_resnet20_s50"
    assert main(["cost", name, "--json", "--set", "method.pattern.scope=uniform"]) == 0
    out, err = capsys.readouterr()
    assert "multiply-add" in err
    assert "Training, by phase" in err
    data = json.loads(out)  # and nothing else on standard output
    assert not data["estimated"]
    assert sum(phase["flops"] for phase in data["phases"]) == data["train_flops"]
    assert data["train_flops_dense"] == 3 * data["dense_flops"] * 50_000 * 200
    assert data["inference_flops_ratio"] == data["sparse_flops"] / data["dense_flops"]
    # Half of every layer but the first and the last, in 110 of 200 epochs.
    assert data["sparse_flops"] == sum(
        2 * layer["macs"] * layer["kept"] // layer["weights"] for layer in data["layers"]
    )
    expected = 0.45 + 0.55 * data["inference_flops_ratio"]
    assert data["train_flops_ratio"] == pytest.approx(expected)
    assert data["train_flops"] / data["train_flops_dense"] == pytest.approx(expected)


def test_cost_prints_the_same_for_people(capsys: Capture) -> None:
    assert main(["cost", "digits"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "estimated on untrained" in " ".join(out.split())
    assert re.search(r"total +40 +920 ", out)
    assert "layer3.0.downsample.0" in out


# --- run ----------------------------------------------------------------------------------------


def test_a_run_ends_with_a_table_and_a_page(tmp_path: Path, capsys: Capture) -> None:
    assert main(typed(tmp_path)) == 0
    out, err = capsys.readouterr()
    folder = only_run(tmp_path)
    kept = json.loads((folder / "record.json").read_text())
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    for label, values in {
        "test accuracy": (kept["sparse"]["accuracy"], kept["dense"]["accuracy"]),
        "sparsity asked": (90.0,),
        "sparsity reached": (100 * kept["sparse"]["sparsity"], 0.0),
        "inference FLOPs, share of dense": (100 * kept["inference_flops_ratio"], 100.0),
        "training FLOPs, share of dense": (100 * kept["train_flops_ratio"], 100 * 8 / 28),
    }.items():
        numbers = re.findall(r"([\d.]+) %", rows[label])
        assert numbers == [f"{value:.2f}" for value in values]
    spent = kept["details"]["time"]
    times = re.findall(r"([\d.]+) ms", rows["time of a training step"])
    assert times == [f"{spent[f'{kind}_step_ms']:.1f}" for kind in ("sparse", "dense")]
    assert f"{kept['sparse']['bytes']:,}" in rows["bytes on disk"]
    assert f"{kept['dense']['bytes']:,}" in rows["bytes on disk"]
    assert f"Took {kept['seconds']:.1f} s." in out
    assert out.splitlines()[-1] == f"Report: {folder / 'report.html'}"
    assert (folder / "report.html").stat().st_size > 10_000
    lines = err.splitlines()  # no terminal: a line an epoch
    assert lines[0].endswith(f"7 epochs, {STEPS} steps")
    assert [line.split()[0] for line in lines[1:]] == ["epoch"] * 9
    assert [line for line in lines if "dense twin" in line] == lines[-2:]


def test_a_terminal_shows_where_the_run_is() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    phases = [{"kind": "dense", "stop": 8}, {"kind": "sparse", "stop": 16}]
    start = {"event": "start", "total_steps": 16, "steps_per_epoch": [4] * 4, "phases": phases}
    step = {"event": "step", "step": 9, "epoch": 2, "phase": "sparse", "loss": 0.5, "seconds": 0.05}
    with Watcher("it", True, terminal) as watcher:
        for event in (start, step, {"event": "eval", "accuracy": 91.25}, step):
            watcher(event)
        (bar,) = watcher._progress.tasks
        assert (bar.completed, bar.total) == (9, 16 + 8)  # the twin is trained on over 8 steps
        assert "sparse" in bar.description
        assert "epoch 3/4" in bar.description
        assert bar.fields["numbers"] == "loss 0.500  test 91.25 %  20 steps/s"
        watcher({**step, "phase": "dense", "twin": "dense", "step": 10})
        assert bar.completed == 16 + 2
        assert "dense twin" in bar.description
    assert terminal.file.getvalue().count("it: 4 epochs, 16 steps") == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("start", "event", "line"),
    [
        (
            {"kind": "off", "reason": "the run is on mps, and the kernels are for CPUs"},
            {},
            "engine: off (the run is on mps, and the kernels are for CPUs)",
        ),
        (
            {"kind": "avx2", "reason": None},
            {"choices": [{"sparse": True}, {"sparse": False}], "refused": {"head": "why"}},
            "engine: 1 of 3 layers run sparse (avx2)",
        ),
        ({"kind": "avx2", "reason": None}, {}, ""),  # a later compression: nothing new
        ({"kind": "off", "reason": None}, {}, ""),  # as it was asked for
    ],
)
def test_what_the_engine_does_is_one_line(
    start: dict[str, Any], event: dict[str, Any], line: str
) -> None:
    plain = Console(file=io.StringIO(), width=40)
    first = {"event": "start", "total_steps": 8, "steps_per_epoch": [4] * 2, "phases": []}
    with Watcher("it", False, plain) as watcher:
        watcher({**first, "engine": start})
        watcher({"event": "engine", **start, **event})
    lines = plain.file.getvalue().splitlines()[1:]  # type: ignore[attr-defined]
    assert lines == ([line] if line else [])


def test_a_verdict_of_the_engine_is_one_line() -> None:
    plain = Console(file=io.StringIO(), width=40)
    verdict = {"kind": "evaluation", "off": ["the engine"], "dense": True, "share": 1.0}
    with Watcher("it", False, plain) as watcher:
        watcher({"event": "verdict", "verdicts": [verdict | {"sparse_share": 1.125}]})
    assert plain.file.getvalue() == (  # type: ignore[attr-defined]
        "engine: evaluation: sparse takes 1.12 of the dense time; PyTorch computes it\n"
    )


def test_json_is_the_only_line_on_standard_output(
    done: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(typed(tmp_path, "--json")) == 0
    out, err = capsys.readouterr()
    folder = only_run(tmp_path)
    data = json.loads(out)
    assert out.count("\n") == 1
    assert list(data) == [*SUMMARY]
    assert set(data["sparse"]) == {"accuracy", "loss", "sparsity", "nnz", "bytes"}
    assert set(data["dense"]) == {"accuracy", "loss", "bytes"}
    assert data["run"] == str(folder)
    assert "test accuracy" in err
    assert f"Report: {folder / 'report.html'}" in err
    assert files(folder) == files(done)


def test_a_dense_run_has_one_column(tmp_path: Path, capsys: Capture) -> None:
    argv = ["run", "digits", "--out", str(tmp_path), "--device", "cpu", "--json", "--set"]
    argv += ["method=dense", "method.schedule.epochs=1", "data.train_examples=64", "threads=1"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["sparse"] is None
    assert "dense network" in err
    assert "sparse twin" not in err
    folder = only_run(tmp_path)
    assert main(["export", str(folder), "--to", "safetensors"]) == 2
    assert "--twin dense" in printed(capsys)[1]
    assert main(["export", str(folder), "--to", "safetensors", "--twin", "dense"]) == 0
    assert (folder / "dense.safetensors").read_bytes() == files(folder)["dense.safetensors"]


def test_a_method_without_a_sparsity_has_a_dash_in_the_table(done: Path) -> None:
    """Such as a method of a user that keeps what it finds: ``Method.sparsity`` may be None."""
    record = json.loads((done / "record.json").read_text())
    record["details"]["sparsity_asked"] = None
    text = io.StringIO()
    Console(file=text, width=100).print(console.outcome(record))
    assert re.search("sparsity asked +– *\n", text.getvalue())


def test_a_text_is_judged_in_bits_of_a_character(tmp_path: Path) -> None:
    text_of_shakespeares_size(tmp_path)
    task = replace(
        grids.compare_tinyshakespeare().task.recipe,
        model=SmallGPT(width=16, depth=1, heads=2, context=8),
        data=TinyShakespeare(train_examples=64, test_examples=32, context=8),
        threads=1,
    )
    plan = phases(3, [("dense", "1ep"), ("sparse", "2ep")])
    methods = (ACDC(Unstructured(0.5), plan), Static(Unstructured(0.5), constant("sparse", 3)))
    for method in (*methods, Dense(constant("dense", epochs=3))):
        plain, folder = Console(file=io.StringIO(), width=100), tmp_path / method.name
        recipe = replace(task, method=method)
        with Watcher("it", False, plain) as watcher:
            made = train.run(recipe, folder, root=tmp_path, device="cpu", watch=watcher)
        plain.print(console.outcome(made))
        page = report.render(folder).read_text(encoding="utf-8")
        for network in filter(None, (made["sparse"], made["dense"])):
            bits = f"{network['loss'] / math.log(2):.3f}"
            assert re.search(rf"bits of a character .*{bits}", plain.file.getvalue())
            assert f"({bits} bits a character)" in page
            assert re.search(rf"Bits of a character.*{bits}", page)
        last = events(folder, "eval")[-1]
        assert re.search(rf"epoch 3/3 .* % +{last['bits']:.3f} bits ", plain.file.getvalue())


def test_a_seed_and_a_setting_give_a_folder_of_their_own(tmp_path: Path) -> None:
    settings = {"method.schedule.epochs": "1", "method": "dense", "threads": "1"}
    settings = {"method": "dense", **settings, "data.train_examples": "64"}
    base = ["run", "digits", "--out", str(tmp_path), "--device", "cpu", *words(settings)]
    assert main(base) == 0
    assert main([*base, "--seed", "5"]) == 0
    seeds = {json.loads((f / "recipe.json").read_text())["seed"] for f in tmp_path.iterdir()}
    assert seeds == {0, 5}


def test_a_run_that_is_there_is_not_overwritten(done: Path, capsys: Capture) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    assert main(typed(done.parent)) == 2
    out, err = printed(capsys)
    assert re.match(r"error: .* already holds a run\. Go on with it by --resume", err)
    assert out == ""
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == before


def test_resuming_a_finished_run_shows_it_again(done: Path, capsys: Capture) -> None:
    before = files(done)
    assert main(typed(done.parent, "--resume", "--json")) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        key: json.loads((done / "record.json").read_text())[key] for key in SUMMARY
    }
    assert "nothing was trained" in err
    assert "epoch" not in err
    assert files(done) == before


def signal_at(step: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next run send itself a signal."""
    run = train.run

    def signalled(*args: Any, watch: Callable[[dict[str, Any]], None], **more: Any) -> Any:
        def both(event: dict[str, Any]) -> None:
            watch(event)
            if event["event"] == "step" and event["step"] == step:
                os.kill(os.getpid(), number)

        return run(*args, watch=both, **more)

    monkeypatch.setattr(train, "run", signalled)


def test_a_run_that_is_told_to_stop_says_how_to_go_on(
    done: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_at(10, signal.SIGTERM, monkeypatch)
    assert main(typed(tmp_path)) == 143
    _, err = printed(capsys)
    assert f"Stopped at step 10 of {STEPS} (SIGTERM). Nothing is lost: go on with --resume." in err
    assert "error:" not in err
    monkeypatch.undo()
    assert main(typed(tmp_path, "--resume")) == 0
    folder = only_run(tmp_path)
    assert_same_run(done, folder)
    assert "Going on with digits" in printed(capsys)[1]


# --- what can go wrong --------------------------------------------------------------------------

WRONG: dict[str, tuple[list[str], str]] = {
    "recipe": (["run", "fashion_mist"], "Did you mean fashion_mnist?"),
    "show": (["show", "imagenet_resnet5"], "Did you mean imagenet_resnet50"),
    "field": (["run", "digits", "--set", "momentum=0"], "has no field 'momentum'"),
    "deep field": (["run", "digits", "--set", "lr.decay=1"], "Its fields are: warmup, every"),
    "no value": (["run", "digits", "--set", "seed"], "write PATH=VALUE"),
    "order": (["run", "--set", "seed=1", "digits"], "required"),
    "value": (["run", "digits", "--set", "batch_size=64.5"], "not of the type whole number"),
    "choice": (["run", "digits", "--set", "lr.every=week"], "not of the type"),
    "range": (["run", "digits", "--set", "batch_size=0"], "from 1 up"),
    "layer": (
        ["run", "digits", "--set", "method.layers.exclude=conv9,fc"],
        "No layer is called 'conv9'. The model's layers whose weights can be pruned are: conv1,",
    ),
    "sparsity 1": (["run", "digits", "--set", "method.pattern.sparsity=1.0"], "but without, 1"),
    "sparsity 90": (["run", "digits", "--set", "method.pattern.sparsity=90"], "0.9 for 90 %"),
    "sparsity -1": (["run", "digits", "--set", "method.pattern.sparsity=-0.1"], "from 0 (dense)"),
    "too sparse": (["run", "digits", "--set", "method.pattern.sparsity=0.99999"], "lower floor"),
    "long phase": (
        ["run", "digits", "--set", "method.schedule.last_sparse=50ep"],
        "longer than the run",
    ),
    "misfit": (["run", "digits", "--set", "method.schedule.epochs=39"], "Set epochs to"),
    "cost": (["cost", "digits", "--set", "method.schedule.epochs=39"], "Set epochs to"),
    "engine": (["run", "digits", "--set", "engine=on"], "type auto, off or reference"),
    "device": (["run", "digits", "--device", "toaster"], "toaster"),
    "precision": (["run", "digits", "--set", "precision=3-bit"], "precision"),
    "no data": (["run", "cifar10_resnet20"], "set ACDC_DATA"),
    "no ImageNet": (["run", "imagenet_resnet50"], "imagenet"),
    "no resume": (["run", "digits", "--resume"], "There is no run to resume in"),
    "no report": (["report", "nowhere"], "There is no folder"),
    "sparse what": (["export", "r", "--to", "safetensors", "--sparse"], "are for --to onnx"),
    "dynamic what": (
        ["export", "r", "--to", "safetensors", "--dynamic", "x:1=n"],
        "are for --to onnx",
    ),
    "dynamic": (["export", "r", "--to", "onnx", "--dynamic", "x=n"], "write INPUT:DIM=NAME"),
    "dynamic name": (["export", "r", "--to", "onnx", "--dynamic", "x:a=n"], "INPUT:DIM=NAME"),
    "no network": (
        ["infer", "nowhere", "--input", "x.npy", "--output", "y.npy"],
        "nowhere cannot be read",
    ),
    "no export": (["export", "nowhere", "--to", "onnx"], "not the folder of a"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_a_sentence_and_leaves_nothing(
    case: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv, sentence = WRONG[case]
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACDC_DATA", str(empty))
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty))
    try:
        code = main(argv)
    except SystemExit as left:  # argparse's own
        code = int(str(left.code))
    out, err = printed(capsys)
    assert code == 2
    assert out == ""
    assert sentence.lower() in err.lower()  # without torchvision, ImageNet is an extra's name
    assert "error: " in err
    assert "Traceback" not in err
    # A run that could not start is not in the way of the next try.
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_no_data_names_all_three_ways_and_the_next_try_works(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACDC_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(FashionMNIST, "installed", tmp_path / "debian")
    argv = ["run", "fashion_mnist", "--out", str(tmp_path / "runs")]
    for _ in range(2):  # the second time it is not "already a run"
        assert main(argv) == 2
        _, err = printed(capsys)
        for way in ("ACDC_DATA", "dataset-fashion-mnist", "--download"):
            assert way in err
    assert not (tmp_path / "runs").exists()


def test_a_missing_extra_is_its_install_line(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import acdc.runs

    for name in ("train", "setup"):
        monkeypatch.delattr(acdc.runs, name)
        monkeypatch.delitem(sys.modules, f"acdc.runs.{name}")
    monkeypatch.setitem(sys.modules, "lightning.fabric", None)
    assert main(typed(tmp_path)) == 2
    assert 'pip install "acdc-train[lab]"' in printed(capsys)[1]


def test_a_loss_that_diverges_keeps_the_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    argv = typed(tmp_path, optimizer__lr="1e30", checkpoint_steps="1")
    assert main(argv) == 2
    _, err = printed(capsys)
    checkpoint = only_run(tmp_path) / "checkpoint" / "last.ckpt"
    assert "training diverged" in err
    assert str(checkpoint) in err
    assert "Lower optimizer.lr" in err
    assert torch.load(checkpoint, weights_only=True)["step"] >= 1


def test_a_checkpoint_of_another_model_is_refused(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_at(4, signal.SIGTERM, monkeypatch)
    for width in ("8", "12"):
        assert main(typed(tmp_path / width, model__width=width)) == 143
    monkeypatch.undo()
    mine, other = (only_run(tmp_path / width) / "checkpoint/last.ckpt" for width in ("8", "12"))
    own = mine.read_bytes()
    shutil.copy(other, mine)
    capsys.readouterr()
    assert main(typed(tmp_path / "8", "--resume", model__width="8")) == 2
    _, err = printed(capsys)
    assert "is of another recipe: model.width was 12 and is 8" in err
    assert mine.read_bytes() == other.read_bytes()  # left as it was
    mine.write_bytes(own)
    assert main(typed(tmp_path / "8", "--resume", model__width="8")) == 0


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_is_taken(
    done: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_at(7, signal.SIGTERM, monkeypatch)
    assert main(typed(tmp_path)) == 143
    monkeypatch.undo()
    folder = only_run(tmp_path) / "checkpoint"
    last, previous = folder / "last.ckpt", folder / "previous.ckpt"
    damaged, before = last.read_bytes()[:-100], previous.read_bytes()
    last.write_bytes(damaged)
    previous.write_bytes(before[:-100])
    capsys.readouterr()
    assert main(typed(tmp_path, "--resume")) == 2
    _, err = printed(capsys)
    assert "last.ckpt cannot be read: its end is damaged or missing" in err
    assert "Nor can the one before it, previous.ckpt" in err
    assert last.read_bytes() == damaged  # left as it was
    previous.write_bytes(before)
    assert main(typed(tmp_path, "--resume")) == 0
    _, err = printed(capsys)
    assert "Warning: The checkpoint" in err
    assert "goes on from the one before it, previous.ckpt, at step 6" in err
    assert (folder / "damaged.ckpt").read_bytes() == damaged
    assert_same_run(done, folder.parent)


def test_a_full_disk_keeps_the_last_checkpoint(
    done: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit on the size of files, a write fails as on a full disk."""
    signal_at(7, signal.SIGTERM, monkeypatch)
    assert main(typed(tmp_path)) == 143
    monkeypatch.undo()
    folder = only_run(tmp_path)
    checkpoint = folder / "checkpoint" / "last.ckpt"
    before = checkpoint.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        code = main(typed(tmp_path, "--resume"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    _, err = printed(capsys)
    assert code == 2
    assert "Cannot write the checkpoint" in err
    assert "Free some space" in err
    assert checkpoint.read_bytes() == before
    assert {path.name for path in checkpoint.parent.iterdir()} == {"last.ckpt", "previous.ckpt"}
    assert main(typed(tmp_path, "--resume")) == 0
    assert_same_run(done, folder)


def test_a_report_that_fails_does_not_lose_the_run(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> Path:
        assert (only_run(tmp_path) / "record.json").exists()
        raise InputError("No ink.")

    def break_down(_: Path) -> Path:
        raise ZeroDivisionError

    monkeypatch.setattr(report, "render", refuse)
    assert main(typed(tmp_path, "--json")) == 2
    out, err = printed(capsys)
    folder = only_run(tmp_path)
    assert json.loads(out)["run"] == str(folder)
    assert "test accuracy" in err
    assert "could not be written: No ink. Once the cause is removed: acdc report" in err
    monkeypatch.setattr(report, "render", break_down)
    with pytest.raises(ZeroDivisionError):
        main(typed(tmp_path, "--resume", "--json"))
    assert json.loads(printed(capsys)[0])["run"] == str(folder)
    monkeypatch.undo()
    assert main(["report", str(folder)]) == 0
    assert printed(capsys)[0] == f"{folder / 'report.html'}\n"


# --- export -------------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", ["sparse", "dense"])
def test_a_twin_is_exported_as_safetensors(done: Path, capsys: Capture, twin: str) -> None:
    assert main(["export", str(done), "--to", "safetensors", "--twin", twin]) == 0
    path = done / f"{twin}.safetensors"
    assert capsys.readouterr().out == f"{path} ({path.stat().st_size:,} bytes)\n"
    pair = Pair.load(done / "pair")
    state, written = getattr(pair, twin), load_file(path)
    assert state.keys() == written.keys()
    assert all(torch.equal(state[name], written[name]) for name in state)


def test_a_twin_is_exported_as_onnx(done: Path, tmp_path: Path, capsys: Capture) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "twin.onnx"
    assert main(["export", str(done), "--to", "onnx", "--out", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    recipe = tiny()
    model = Pair.load(done / "pair").sparse_model(recipe.model.build()).eval()
    x = torch.randn(3, *recipe.model.input_shape)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(outputs), model(x), atol=1e-4, rtol=1e-4)


def test_a_twin_is_exported_for_the_runtime_and_computed(
    done: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["export", str(done), "--to", "runtime"]) == 0
    frozen = done / "sparse.acdcrt"
    assert capsys.readouterr().out == f"{frozen} ({frozen.stat().st_size:,} bytes)\n"
    recipe = tiny()
    model = Pair.load(done / "pair").sparse_model(recipe.model.build()).eval()
    x = torch.randn(3, *recipe.model.input_shape)
    given, made = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(given, x.numpy())
    argv = ["infer", str(frozen), "--input", str(given), "--output", str(made)]
    assert main(argv) == 0
    assert capsys.readouterr().out == f"{made} (3x10)\n"
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(np.load(made)), model(x), atol=1e-5, rtol=0)
    assert main([*argv, str(tmp_path / "z.npy")]) == 2
    assert "takes a file for each of output, got 2 files" in printed(capsys)[1]
    given.write_bytes(b"no array")
    assert main(argv) == 2
    assert "cannot be read as an array of numpy" in printed(capsys)[1]
    np.save(given, x.double().numpy())
    assert main(argv) == 2
    assert "torch.float64, and the example's is torch.float32" in printed(capsys)[1]
    assert main(["export", str(done), "--to", "runtime", "--twin", "dense"]) == 2
    assert "its weights are not zero, and PyTorch is faster" in printed(capsys)[1]


def test_an_onnx_file_may_be_sparse_and_take_images_of_any_size(
    done: Path, tmp_path: Path, capsys: Capture
) -> None:
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "twin.onnx"
    argv = ["export", str(done), "--to", "onnx", "--out", str(path)]
    assert main([*argv, "--sparse", "--dynamic", "x:2=height", "x:3=width"]) == 0
    graph = onnx.load(path).graph
    dims = [dim.dim_param for dim in graph.input[0].type.tensor_type.shape.dim]
    assert (dims[0], *dims[2:]) == ("batch", "height", "width")
    assert len(graph.sparse_initializer)
    assert main([*argv, "--sparse", "--twin", "dense"]) == 2
    assert "makes nothing smaller" in printed(capsys)[1]
    assert main([*argv, "--dynamic", "y:2=height"]) == 2
    assert "names 'y', which is no input of the example. Its inputs: 'x'" in printed(capsys)[1]


def test_a_model_that_is_not_known_is_a_sentence(
    done: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["values"]["model"]["type"] = "Perceptron"
    (folder / "recipe.json").write_text(json.dumps(recipe))
    assert main(["export", str(folder), "--to", "onnx"]) == 2
    assert "'Perceptron' is not known" in printed(capsys)[1]
    assert events(folder) == events(done)
