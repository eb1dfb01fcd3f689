"""A finished run of every method: all networks of its result can be exported and used.

About 30 seconds on an idle core: nineteen runs are trained once for all tests of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from acdc import NM, Unstructured, constant, cost, phases
from acdc.cli import main
from acdc.index import FILES, Twin
from acdc.methods import METHODS, Method
from acdc.pages import history, tables
from acdc.pair import Pair
from acdc.result import DenseNetwork, Result, SparseNetwork, load
from acdc.runs import models, train
from acdc.runs.models import Model
from acdc.runs.record import Folder
from support.runs import tiny

PATTERN, PLAN = Unstructured(0.75), constant("sparse", epochs=2)
TWICE = phases(4, [("dense", "1ep"), ("sparse", "1ep"), ("dense", "1ep"), ("sparse", "1ep")])

# What each method is given beside its pattern and its plan, and what it leaves.
GIVEN: dict[str, tuple[dict[str, Any], type[Result]]] = {
    "acdc": ({"schedule": TWICE}, Pair),
    "dense": ({}, DenseNetwork),
    "static": ({}, SparseNetwork),
    "snip": ({}, SparseNetwork),
    "set": ({"every": "2st"}, SparseNetwork),
    "snfs": ({"every": "2st"}, SparseNetwork),
    "rigl": ({"every": "2st"}, SparseNetwork),
    "gmp": ({"every": "1st", "length": "4st"}, SparseNetwork),
    "str": ({"first": 0.4, "every": "1st", "length": "4st"}, SparseNetwork),
    "topkast": ({"backward": 0.4, "every": "2st"}, Pair),
    "dpf": ({"every": "1st", "length": "4st"}, Pair),
    "srste": ({"pattern": NM(2, 4), "every": "1st"}, Pair),
    "dsd": (
        {"schedule": phases(3, [("dense", "1ep"), ("sparse", "1ep"), ("dense", "1ep")])},
        DenseNetwork,
    ),
    "oneshot": ({}, SparseNetwork),
    "gradual": ({"every": "2st", "length": "4st"}, SparseNetwork),
    "woodfisher": (
        {"every": "2st", "length": "4st", "gradients": 2, "block": 30},
        SparseNetwork,
    ),
    "granet": ({"every": "1st", "length": "4st"}, SparseNetwork),
    "imp": (
        {
            "schedule": phases(4, [("dense", "1ep"), ("sparse", "3ep")]),
            "share": 0.5,
            "rewind": "1st",
        },
        Pair,
    ),
    "acdc_partial": (
        {
            "schedule": phases(3, [("sparse", "1ep"), ("dense", "1ep"), ("sparse", "1ep")]),
            "every": "1st",
            "length": "9st",
            "period": "2st",
            "width": "1st",
        },
        Pair,
    ),
}


@dataclass(frozen=True)
class Small(Model):
    """A network that is exported in half a second."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return (1, 8, 8)

    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
            nn.Linear(288, 10),
        )  # fmt: skip


every_method = pytest.mark.parametrize("name", METHODS)


def method(name: str) -> Method:
    """Return the method for a run of two to four epochs."""
    if name == "dense":
        return METHODS[name](constant("dense", epochs=2))  # type: ignore[call-arg]
    given = {"pattern": PATTERN, "schedule": PLAN} | GIVEN[name][0]
    return METHODS[name](**given)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Return the folder of a finished run of a method, which is trained once."""
    out, records = tmp_path_factory.mktemp("methods"), {}
    patch = pytest.MonkeyPatch()
    patch.setattr(models, "Small", Small, raising=False)  # where 'acdc export' looks for it

    def folder(name: str) -> Path:
        if name not in records:
            recipe = replace(tiny(), model=Small(), method=method(name), dense_finetune=False)
            records[name] = train.run(recipe, out / name, device="cpu")
        return out / name

    yield folder
    patch.undo()


def accuracy(predict: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Return the accuracy on the test data, in percent."""
    right, seen = 0, 0
    for x, y in tiny().data.load().eval_batches("test", 100):
        right += int((predict(x).argmax(1) == y).sum())
        seen += len(y)
    return 100 * right / seen


def test_every_method_is_here() -> None:
    assert set(GIVEN) == set(METHODS)


@every_method
def test_the_record_speaks_of_the_networks_that_are_there(
    finished: Callable[[str], Path], name: str
) -> None:
    folder = finished(name)
    result, record = load(folder / "pair"), Folder(folder).read(folder / "record.json")
    assert type(result) is GIVEN[name][1]
    assert [twin for twin in FILES if record[twin] is not None] == list(result.networks())
    assert result.facts["method"] == name


@every_method
def test_every_network_of_every_method_is_exported_as_safetensors(
    finished: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = finished(name)
    result, record = load(folder / "pair"), Folder(folder).read(folder / "record.json")
    for twin, state in result.networks().items():
        path = tmp_path / f"{twin}.safetensors"
        words = ["export", str(folder), "--to", "safetensors", "--twin", twin, "--out", str(path)]
        assert main(words) == 0
        written = load_file(path)
        assert written.keys() == state.keys()
        assert all(torch.equal(state[key], value) for key, value in written.items())
        model = Small().build()
        model.load_state_dict(written)
        assert accuracy(model.eval()) == record[twin]["accuracy"]


@every_method
def test_every_network_of_every_method_is_exported_as_onnx(
    finished: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = finished(name)
    record = Folder(folder).read(folder / "record.json")
    for twin in load(folder / "pair").networks():
        path = tmp_path / f"{twin}.onnx"
        words = ["export", str(folder), "--to", "onnx", "--twin", twin, "--out", str(path)]
        assert main(words) == 0
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()

        def predict(x: torch.Tensor, session: Any = session, key: str = given.name) -> torch.Tensor:
            (outputs,) = session.run(None, {key: np.ascontiguousarray(x.numpy())})
            return torch.from_numpy(outputs)

        assert accuracy(predict) == record[twin]["accuracy"]


@every_method
def test_a_network_that_a_method_does_not_leave_is_refused_in_a_sentence(
    finished: Callable[[str], Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = load(finished(name) / "pair")
    twins: tuple[Twin, ...] = ("sparse", "dense")
    for twin in twins:
        if twin in result.networks():
            continue
        for form in ("safetensors", "onnx"):
            words = ["export", str(finished(name)), "--to", form, "--twin", twin]
            assert main([*words, "--out", str(tmp_path / "file")]) == 2
            error = " ".join(capsys.readouterr().err.split())
            assert f"no {twin} network: the run left a {result.index.noun} alone" in error
            assert "--twin" in error
    assert not (tmp_path / "file").exists()


@every_method
def test_the_page_the_record_and_the_ledger_have_one_number(
    finished: Callable[[str], Path], name: str
) -> None:
    folder = finished(name)
    record = Folder(folder).read(folder / "record.json")
    details, ledger = record["details"], cost.Ledger.from_dict(record["details"]["ledger"])
    assert (ledger.flops, ledger.dense_flops) == (
        details["train_flops"],
        details["train_flops_dense"],
    )
    assert record["train_flops_ratio"] == ledger.ratio
    run = history.read(folder)
    rows = {row.label: [cell.value for cell in row.cells] for row in tables.ledger(run)}
    assert rows["Training"][1:3] == [ledger.flops, ledger.ratio]
    parts = [rows[f"{kind} phases"][1] for kind in ("Dense", "Sparse") if f"{kind} phases" in rows]
    assert sum(parts) == ledger.flops
    assert sum(row.cells[4].value for row in tables.phases(run)) == ledger.flops
    assert tables.training(run)[0].value == ledger.flops  # type: ignore[index]
    (folder / "record.json").rename(folder / "kept")  # as of a run that stopped just before
    try:
        assert history.read(folder).ledger == ledger
    finally:
        (folder / "kept").rename(folder / "record.json")
