"""``acdc bench infer``: contenders in processes of their own; one that fails is a row, too."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import acdc
from acdc.bench.infer import cases, contender, measure, table
from acdc.bench.infer.cases import Asked, Case
from acdc.bench.infer.files import Files
from acdc.bench.infer.measure import Peer, Settings, Turns
from acdc.bench.peers import Unable
from acdc.cli import main
from acdc.errors import InputError
from support.runs import TINY, words

Capture = pytest.CaptureFixture[str]
KEYS = {
    "case", "sparsity", "batch", "contender", "precision", "scenario", "streams", "threads", "why",
    "setting", "version", "cold_ms", "import_ms", "memory_mb", "network_mb", "file_mb", "error",
    "note", "p50_ms", "p90_ms", "p99_ms", "mean_ms", "items_per_second", "requests", "ratio",
    "quartiles",
}  # fmt: skip

# What 'acdc bench infer' calls of DeepSparse 1.8.
FAKE_DEEPSPARSE = """
import numpy as np
class Engine:
    fraction_of_supported_ops = 0.75
    def __init__(self, model, batch_size, num_cores, num_streams, scheduler):
        assert model.endswith(".onnx") and batch_size == 2 and num_cores == 1, (model, num_cores)
        assert (num_streams, scheduler) == (1, "single_stream")
    def run(self, arrays):
        return [np.zeros((len(arrays[0]), 4), np.float32)]
"""


def network() -> nn.Module:
    """Return a small network without zeros: the callable of ``--model``."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def sparse_network() -> nn.Module:
    net = network().eval()
    with torch.no_grad():
        for layer in (net[0], net[3], net[7]):
            layer.weight.masked_fill_(torch.rand_like(layer.weight) > 0.2, 0.0)
    return net


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A pair in a folder of its own, without the recipe of a run."""
    dense, sparse = network().state_dict(), sparse_network().state_dict()
    pruned = ("0.weight", "3.weight", "7.weight")
    support = acdc.Support({name: sparse[name] != 0 for name in pruned})
    acdc.Pair(sparse, dense, support).save(tmp_path / "pair")
    return tmp_path / "pair"


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    return acdc.Runtime(sparse_network(), torch.randn(1, 3, 8, 8)).save(tmp_path / "net.acdcrt")


def run(*args: object) -> int:
    few = ["--repeats", "2", "--threads", "1", "--seconds", "0.01"]
    return main(["bench", "infer", *few, *map(str, args)])


def rows_of(file: Path) -> dict[tuple[str, int], dict[str, Any]]:
    rows = json.loads(file.read_text())["rows"]
    return {(row["contender"], row["batch"]): row for row in rows}


def interpreter(folder: Path, code: str) -> Path:
    """Return an interpreter of its own, in which ``deepsparse`` is this code."""
    package = folder / "site" / "deepsparse"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    info = folder / "site" / "deepsparse-1.8.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deepsparse\nVersion: 1.8.0\n")
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={folder / "site"} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


def test_a_pair_beside_other_runtimes(pair: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "infer.json"
    model = ("--model", f"{__name__}:network", "--shape", "3,8,8")
    against = "torch,onnxruntime,openvino,deepsparse,onnxruntime-int8"
    python = interpreter(tmp_path / "own", FAKE_DEEPSPARSE)
    options = ("--batch", "2", "--against", against, "--python", f"deepsparse={python}")
    assert run(pair, *model, *options, "--json", file) == 0
    out = capsys.readouterr().out
    found = rows_of(file)
    assert all(row.keys() == KEYS for row in found.values())
    assert list(found) == [(name, 2) for name in ("acdc", *against.split(","))]
    for name in ("acdc", "torch", "onnxruntime"):
        row = found[name, 2]
        assert row["why"] is None
        assert row["error"] < 1e-5
        assert row["sparsity"] == pytest.approx(0.8, abs=0.05)
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["items_per_second"] > 0
        assert row["requests"] >= 2
        assert row["cold_ms"] > 0
        assert row["file_mb"] > 0
        assert (row["ratio"] is None) == (name == "acdc")
    assert found["acdc", 2]["setting"] == "frozen file"
    assert found["torch", 2]["setting"] in ("contiguous", "channels last")
    assert found["torch", 2]["version"] == torch.__version__
    int8 = found["onnxruntime-int8", 2]
    assert int8["precision"] == "int8"
    assert 1e-5 < int8["error"] < 0.5
    assert "onnxruntime-int8: another precision than float32." in out
    if find_openvino():
        assert found["openvino", 2]["error"] < 1e-5
    else:
        assert "No module named 'openvino'" in found["openvino", 2]["why"]
    deepsparse = found["deepsparse", 2]
    assert (deepsparse["setting"], deepsparse["version"]) == ("75% of operations", "1.8.0")
    assert deepsparse["error"] == pytest.approx(1.0)  # it returns zeros, and that is seen


def find_openvino() -> bool:
    try:
        import openvino  # noqa: F401
    except ImportError:
        return False
    return True


def test_a_frozen_file_alone_has_no_model_for_the_others(
    frozen: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "infer.json"
    onnx = acdc.export.to_onnx(sparse_network(), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    options = ("--batch", "1,3", "--against", "torch,onnxruntime", "--scenario", "async")
    assert run(frozen, *options, "--json", file) == 0
    found = rows_of(file)
    assert found["acdc", 1]["requests"] >= 2
    assert found["acdc", 3]["error"] is None
    for name in ("torch", "onnxruntime"):
        assert "a frozen file holds no model" in found[name, 3]["why"]
    assert run(frozen, *options, "--onnx", onnx, "--json", file) == 0
    found = rows_of(file)
    assert found["onnxruntime", 3]["why"] is None
    assert found["onnxruntime", 3]["ratio"] > 0
    assert "acdc is" in capsys.readouterr().out


def test_streams_compute_at_the_same_time(
    frozen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "infer.json"
    options = ("--batch", "1", "--against", "", "--scenario", "async", "--streams", "2")
    assert run(frozen, *options, "--threads", "2", "--json", file) == 0
    row = rows_of(file)["acdc", 1]
    assert (row["streams"], row["threads"]) == (2, 2)
    assert row["requests"] >= 4  # each stream at least once in each turn


def test_a_network_by_name_keeps_the_largest_weights() -> None:
    case = Asked("mobilenet_v1", 0.9).case()
    assert case.build is not None
    net, again = case.build(), case.build()
    assert not net.training
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    zeros = [float((layer.weight == 0).float().mean()) for layer in layers]
    assert zeros[0] == zeros[-1] == 0.0
    assert all(share == pytest.approx(0.9, abs=0.02) for share in zeros[1:-1])
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    norm = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.running_var is not None
    assert float(norm.running_var.std()) > 0
    assert norm.momentum == 0.1


def test_a_network_of_the_zoo_and_of_transformers_by_name() -> None:
    case = Asked("hf_bert", 0.5).case()
    assert case.build is not None
    (words,) = case.inputs(3).values()
    assert words.shape == (3, 64)
    assert words.dtype == torch.int64
    with torch.no_grad():
        assert case.build()(words).logits.shape == (3, 100)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["nothing"], "nothing is no file, no folder and no network"),
        (["resnet50", "--against", "tensorrt"], "--against holds 'tensorrt'"),
        (["resnet50", "--python", "deepsparse"], "write KIND=PATH"),
        (["resnet50", "--python", "tvm=/bin/sh"], "kinds are acdc, torch"),
        (["resnet50", "--python", "deepsparse=/nowhere"], "/nowhere is no interpreter"),
        (["resnet50", "--batch", "0"], "--batch holds 0"),
        (["resnet50", "--seconds", "0"], "--seconds is 0"),
        (["resnet50", "--streams", "2"], "--streams is for --scenario async"),
        (["resnet50", "--scenario", "async", "--streams", "9"], "--streams is 9, with 1 threads"),
        (["resnet50", "--onnx", "/nowhere.onnx"], "there is no such file"),
        (["resnet50", "--repeats", "0"], "--repeats is 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], sentence: str, capsys: Capture
) -> None:
    assert run(*options) == 2
    assert sentence in capsys.readouterr().err


def test_a_pair_needs_its_model(pair: Path, capsys: Capture) -> None:
    assert run(pair) == 2
    assert "give the folder of its run, or the model by --model" in capsys.readouterr().err
    for model in ("no.such:thing", f"{__name__}:nothing", f"{__name__}:KEYS", f"{__name__}"):
        assert run(pair, "--model", model, "--shape", "3,8,8") == 2
        assert f"--model {model}" in capsys.readouterr().err
    assert run(pair, "--model", f"{__name__}:network", "--shape", "4,8,8") == 2
    assert "does not compute inputs of the shape (1, 4, 8, 8)" in capsys.readouterr().err


def test_a_process_that_ends_or_hangs_costs_its_row_alone(
    frozen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = interpreter(tmp_path / "ends", "import os; os._exit(3)")
    monkeypatch.setattr(measure, "LIMIT", 20.0)
    onnx = tmp_path / "any.onnx"
    onnx.write_bytes(b"")
    settings = Settings(
        [1], ["deepsparse"], seconds=0.01, rounds=1, pythons={"deepsparse": str(ends)}, onnx=onnx
    )
    ours, theirs = measure.measure([Asked(str(frozen))], settings)
    assert ours["p50_ms"] > 0
    assert theirs["why"] == "its process ended with exit code 3"
    monkeypatch.setattr(measure, "LIMIT", 0.5)
    peer = Peer(sys.executable, 1)
    try:
        with pytest.raises(Unable, match="ended with exit code -9"):
            peer.ask(do="load", kind="torch", inputs="/dev/stdin", cpus=None)
    finally:
        peer.close()


def test_a_model_that_cannot_be_frozen_is_built_from_the_model(tmp_path: Path) -> None:
    case = Case("part", None, _with_an_unknown_activation, lambda n: {"x": torch.randn(n, 3, 8, 8)})
    files = Files(case, tmp_path)
    settings = Settings([2], ["torch"], seconds=0.01, rounds=1)
    ours, theirs = measure._rows(files, 2, settings)
    assert ours["setting"] == "from the model"
    assert "A frozen file holds no code" in ours["note"]
    assert ours["file_mb"] is None
    assert ours["error"] < 1e-5
    assert theirs["why"] is None


def _with_an_unknown_activation() -> nn.Module:
    return nn.Sequential(*sparse_network(), nn.Hardshrink()).eval()


def test_ratios_are_those_of_turns() -> None:
    ours = Turns([[0.01, 0.01], [0.02, 0.02]], [0.02, 0.04])
    theirs = Turns([[0.03], [0.03]], [0.03, 0.03])
    sync = measure._summary(theirs, ours, 4, Settings([4]))
    assert sync["ratio"] == pytest.approx((3.0 + 1.5) / 2)
    assert sync["p50_ms"] == pytest.approx(30.0)
    assert sync["items_per_second"] == pytest.approx(4 / 0.03)
    streams = measure._summary(theirs, ours, 4, Settings([4], scenario="async"))
    assert streams["ratio"] == pytest.approx((3.0 + 1.5) / 2)
    assert measure._summary(ours, ours, 4, Settings([4])).keys() >= {"p50_ms"}
    assert measure._percentile(list(range(100)), 0.99) == 99
    assert measure._percentile(list(range(100)), 0.9) == 90


def test_an_error_is_relative_to_the_largest_output(tmp_path: Path) -> None:
    file = str(tmp_path / "answer.npz")
    np.savez(file, a=np.array([1.0, -8.0]))
    assert contender.error_of([np.array([1.0, -8.4], np.float32)], file) == pytest.approx(0.05)
    assert math.isnan(contender.error_of([np.array([np.nan, 1.0])], file) or 0.0)
    assert contender.error_of([], None) is None
    with pytest.raises(RuntimeError, match="outputs have the shapes"):
        contender.error_of([np.zeros(3)], file)


def test_the_lines_say_what_is_missing() -> None:
    row = dict.fromkeys(KEYS) | {"case": "net", "batch": 1, "contender": "acdc", "why": "it fails"}
    assert table.Table(["net"], ["acdc"]).line(row).endswith("acdc       it fails")
    row |= {"note": "a reason", "precision": "float32"}
    assert "net: no frozen file: a reason" in table.notes([row, row])[0]


def test_what_names_a_run_or_its_pair(tmp_path: Path, capsys: Capture) -> None:
    settings = words({**TINY, "method.pattern.sparsity": "0.9"})
    assert main(["run", "digits", "--out", str(tmp_path), "--device", "cpu", *settings]) == 0
    capsys.readouterr()
    (run_folder,) = tmp_path.iterdir()
    whole, inner = Asked(str(run_folder)).case(), Asked(str(run_folder / "pair")).case()
    assert whole.name == inner.name == run_folder.name
    assert whole.sparsity == pytest.approx(0.9, abs=0.02)
    assert whole.build is not None
    (x,) = whole.inputs(2).values()
    assert whole.build()(x).shape == (2, 10)
    with pytest.raises(InputError, match="is no file, no folder and no network"):
        Asked(str(tmp_path / "other")).case()
    assert cases.is_name("resnet50")
