"""``acdc bench``: everybody computes the same, takes turns, and nobody's failure ends it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from acdc.cli import main
from acdc.errors import InputError
from acdc.lab.bench import layers, peers, race, table
from acdc.lab.bench.layers import CASES, Layer
from acdc.lab.bench.peers import Dense, Engine, Entrant, Problem, TorchCsr
from acdc.lab.bench.race import Turn
from acdc.support import kept

Capture = pytest.CaptureFixture[str]
TINY = ("conv3x3_8x4_h6_n8", "linear_24x16_t16")
COLUMNS = {
    "case",
    "sparsity",
    "dense_ms",
    "dense_setting",
    "dense_settings_ms",
    "engine_ms",
    "ratio",
    "torch_csr_ms",
    "sparseprop_ms",
    "sparselab_ms",
    "quartiles",
    "rounds",
    "notes",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweep nothing, and wait for nobody."""
    monkeypatch.setattr(race, "SWEPT_BYTES", 4)
    monkeypatch.setattr(race, "PAUSE", 0.0)


def problem(name: str, sparsity: float = 0.8) -> Problem:
    layer = Layer.parse(name)
    assert layer is not None
    return layers._masked(layer.problem(), sparsity)


# --- turns --------------------------------------------------------------------------------------


def test_everybody_takes_a_turn_in_every_round_and_the_order_rotates() -> None:
    calls: list[str] = []

    def turn(name: str) -> Turn:
        return Turn(
            (lambda: calls.append(f"{name}1"), lambda: calls.append(f"{name}2")),
            before=lambda: calls.append("-"),
        )

    seconds = race.race({name: turn(name) for name in "abc"}, rounds=3)
    rounds = [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    assert calls == [x for order in rounds for n in order for x in ("-", f"{n}1", "-", f"{n}2")]
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 3)
    assert all(second > 0 for times in seconds.values() for second in times)


def test_the_passes_are_timed_and_what_comes_before_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(race.time, "perf_counter", lambda: now)
    turn = Turn((lambda: wait(2), lambda: wait(3)), before=lambda: wait(100))
    assert race.race({"it": turn}, rounds=2) == {"it": [5, 5]}


def test_the_best_dense_setting_counts_and_the_spread_is_that_of_the_rounds() -> None:
    dense = {"nchw": [3.0, 3.0, 3.0], "channels_last": [2.0, 1.0, 4.0]}
    row = race.summary(dense, {"engine": [1.0, 0.5, 0.25]}, ["torch_csr"])
    assert (row["dense_setting"], row["dense_ms"], row["engine_ms"]) == ("channels_last", 2e3, 500)
    assert row["ratio"] == 4
    assert row["dense_settings_ms"] == {"nchw": 3e3, "channels_last": 2e3}
    assert row["quartiles"]["ratio"] == [2, 9]  # of 2, 2 and 16
    assert row["quartiles"]["dense_ms"] == [1.5e3, 3e3]
    assert row["torch_csr_ms"] is None
    alone = race.summary({"plain": [1.0]}, {}, [])
    assert (alone["ratio"], alone["engine_ms"]) == (None, None)
    assert alone["quartiles"] == {"dense_ms": [1000, 1000]}


def test_threads_are_set_for_all_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with race.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        assert os.environ["OMP_NUM_THREADS"] == str(before + 1)
    assert torch.get_num_threads() == before
    assert "OMP_NUM_THREADS" not in os.environ
    with pytest.raises(InputError, match="whole number from 1 up"), race.threads(0):
        pass


# --- layers -------------------------------------------------------------------------------------


def test_the_layers_are_those_of_the_issue() -> None:
    sizes = {name: Layer.parse(name) for name in CASES}
    assert sizes["conv3x3_128x64_s2_h32_n64"] == Layer(
        "conv3x3_128x64_s2_h32_n64", (64, 64, 32, 32), (128, 64, 3, 3), 2
    )
    assert sizes["linear_3072x768_t512"] == Layer(
        "linear_3072x768_t512", (512, 768), (3072, 768), 1
    )
    assert None not in sizes.values()
    assert [layer.name for layer in layers.choose([])] == list(CASES)


def test_layers_are_chosen_by_a_part_of_their_name_or_spelled() -> None:
    chosen = layers.choose(["linear", "conv1x1_64", "conv5x5_8x4_h7_n3", "linear"])
    assert [layer.name for layer in chosen] == [
        "linear_3072x768_t512",
        "linear_768x3072_t512",
        "conv1x1_64x256_h32_n64",
        "conv5x5_8x4_h7_n3",
    ]
    with pytest.raises(InputError, match=r"--case conv3x2_8x4.* no layer, and spells none"):
        layers.choose(["linear", "conv3x2_8x4_h7_n3"])


@pytest.mark.parametrize("way", [Engine, TorchCsr])
@pytest.mark.parametrize(
    "name", [*TINY, "conv3x3_8x4_s2_h7_n3", "conv1x1_8x4_s2_h6_n9", "conv5x5_4x8_h9_n2"]
)
def test_everybody_computes_the_same(
    way: type[peers.Contender], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "TOLERANCE", 2e-6)
    task = problem(name)
    expected = peers.answer(Dense(task, torch.contiguous_format))
    contender = way(task)  # type: ignore[call-arg]
    found = peers.answer(contender)
    assert set(found) == {"y", "dx", "dw"}
    peers.check(found, expected)
    assert torch.equal(found["dw"] != 0, task.weight != 0)


def test_the_largest_weights_stay_and_exactly_as_many_as_asked_for() -> None:
    layer = Layer.parse(TINY[1])
    assert layer is not None
    dense, sparse = layer.problem().weight, problem(TINY[1], 0.9).weight
    assert int((sparse != 0).sum()) == kept(24 * 16, 0.9) == 38
    assert torch.equal(sparse, torch.where(sparse != 0, dense, 0.0))
    assert dense[sparse == 0].abs().max() <= sparse[sparse != 0].abs().min()


def test_a_wrong_result_is_found() -> None:
    expected = {"y": torch.ones(3), "dx": torch.zeros(3)}
    peers.check({"y": torch.ones(3)}, expected)
    for y in (torch.tensor([1, 1, 1.01]), torch.tensor([1, 1, float("nan")])):
        with pytest.raises(peers.Unable, match="its y is wrong"):
            peers.check({"y": y}, expected)


def test_a_peer_that_fails_is_reported_and_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Wrong(TorchCsr):
        def answer(self) -> peers.Answer:
            return super().answer() | {"dx": torch.zeros_like(self.problem.x)}

    def broken(task: Problem) -> list[object]:
        def way() -> object:
            raise OSError("no such\n instruction")

        return [way]

    entrants = {
        "engine": peers.ENTRANTS["engine"],
        "torch_csr": Entrant("torch", lambda task: [lambda: Wrong(task)]),
        "sparseprop": Entrant("torch", broken),  # type: ignore[arg-type]
        "sparselab": Entrant("no_package_of_this_name", broken),  # type: ignore[arg-type]
    }
    monkeypatch.setattr(layers, "ENTRANTS", entrants)
    (row,) = layers.measure(layers.choose(TINY[:1]), [0.75], rounds=1)
    assert row["notes"] == {
        "torch_csr": "its dx is wrong: it differs from dense PyTorch's by 1e+00",
        "sparseprop": "OSError: no such instruction",
        "sparselab": "not installed",
    }
    assert row["torch_csr_ms"] is row["sparseprop_ms"] is row["sparselab_ms"] is None
    assert row["ratio"] == row["dense_ms"] / row["engine_ms"]


def test_of_several_ways_the_fastest_right_one_stands_for_its_library() -> None:
    task = problem(TINY[0])
    expected = peers.answer(Dense(task, torch.contiguous_format))

    class Slow(TorchCsr):
        pass

    class Wrong(TorchCsr):
        def answer(self) -> peers.Answer:
            return {"y": torch.zeros(1)}

    seconds = {TorchCsr: 2.0, Slow: 3.0, Wrong: 1.0}
    entrant = Entrant(
        "torch", lambda task: [lambda: Slow(task), lambda: TorchCsr(task), lambda: Wrong(task)]
    )
    won = peers.enter(entrant, task, expected, lambda contender: seconds[type(contender)])  # type: ignore[index]
    assert type(won) is TorchCsr


FAKE_SPARSEPROP = """
import torch

class _Layer(torch.nn.Module):
    def __init__(self, dense_weight, padding=0, stride=1, vectorizing_over_on=False):
        super().__init__()
        self.mask, self.padding, self.stride = dense_weight != 0, padding, stride
        self.weight = torch.nn.Parameter(dense_weight[self.mask])
        self.wrong = vectorizing_over_on and stride == 2

    def forward(self, x):
        dense = torch.zeros(self.mask.shape).masked_scatter(self.mask, self.weight)
        if dense.dim() == 2:
            return torch.nn.functional.linear(x, dense)
        y = torch.nn.functional.conv2d(x, dense, None, self.stride, self.padding)
        return 2 * y if self.wrong else y

SparseConv2d = SparseLinear = _Layer
"""
FAKE_SPARSELAB = """
class PaddedCSR:
    @staticmethod
    def from_dense(dense):
        return dense

def spmm(weight, x):
    return weight @ x
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins for the two libraries, with the functions that we call."""
    sources = {"sparseprop/modules.py": FAKE_SPARSEPROP, "sparselab/__init__.py": FAKE_SPARSELAB}
    for name, source in {"sparseprop/__init__.py": "", **sources}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    stale = {name for name in sys.modules if name.startswith(("sparseprop", "sparselab"))}
    for name in stale:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.startswith(("sparseprop", "sparselab"))]:
        del sys.modules[name]


@pytest.mark.usefixtures("installed")
def test_installed_libraries_take_part() -> None:
    conv, strided, linear = layers.measure(
        layers.choose(["conv3x3_8x4_h6_n8", "conv3x3_8x4_s2_h6_n8", "linear_24x16_t16"]), [0.8], 1
    )
    assert conv["notes"] == strided["notes"] == {"sparselab": "it has no convolution"}
    assert linear["notes"] == {}
    assert all(row["sparseprop_ms"] > 0 for row in (conv, strided, linear))
    assert linear["sparselab_ms"] > 0


# --- the command --------------------------------------------------------------------------------


def test_bench_layers_prints_a_table_and_writes_every_figure(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "layers.json"
    cases = [word for name in TINY for word in ("--case", name)]
    threads = torch.get_num_threads()
    words = ["bench", "layers", *cases, "--sparsity", "0.5", "--sparsity", "0.9"]
    assert main([*words, "--repeats", "3", "--threads", "1", "--json", str(file)]) == 0
    assert torch.get_num_threads() == threads
    record = json.loads(file.read_text())
    assert record["machine"]["threads"] == 1
    assert {"cpu", "cores"} <= set(record["machine"])
    assert {"torch", "acdc"} <= set(record["versions"])
    assert record["command"].startswith("acdc bench layers --case")
    assert record["date"].endswith("+00:00")
    rows = record["rows"]
    assert [(row["case"], row["sparsity"]) for row in rows] == [
        (name, sparsity) for name in TINY for sparsity in (0.5, 0.9)
    ]
    for row in rows:
        assert set(row) == COLUMNS | {"convert_ms"}
        assert row["rounds"] == 3
        assert row["dense_ms"] == min(row["dense_settings_ms"].values())
        assert row["ratio"] == row["dense_ms"] / row["engine_ms"]
        for key in ("dense_ms", "engine_ms", "torch_csr_ms"):
            low, high = row["quartiles"][key]
            assert low <= row[key] <= high
        assert row["convert_ms"] > 0
    assert set(rows[0]["dense_settings_ms"]) == {"nchw", "channels_last"}
    assert set(rows[2]["dense_settings_ms"]) == {"plain"}
    out, _ = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["case", "zeros", "dense"]
    assert [line.split()[:3] for line in lines[1:5]] == [
        [name, str(zeros), "%"] for name in TINY for zeros in (50, 90)
    ]
    assert lines[-1] == str(file)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--case", "resnet"], "--case resnet is in the name of no layer"),
        (["--sparsity", "90"], "write 0.9 for 90 %"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--repeats", "1", "--case", TINY[0], "--json", "/proc/x/y.json"], "/proc/x"),
    ],
)
def test_what_cannot_be_measured_is_said(words: list[str], sentence: str, capsys: Capture) -> None:
    assert main(["bench", "layers", *words]) == 2
    _, err = capsys.readouterr()
    assert sentence in " ".join(err.split())


def test_notes_name_the_cases_they_hold_for() -> None:
    def row(case: str, **notes: str) -> race.Row:
        return {"case": case, "notes": notes}

    few = [row("a", sparselab="no"), row("b", sparselab="no", sparseprop="not installed")]
    few += [row("a", sparselab="no"), row("c", sparselab="no"), row("d", sparseprop="gone")]
    assert table.notes(few) == [
        "SparseLab: no (a, b, c)",
        "SparseProp: not installed (b)",
        "SparseProp: gone (d)",
    ]
    many = [row(case, sparseprop="x", sparselab="y") for case in "abcd"] + [row("e", sparselab="y")]
    assert table.notes(many) == ["SparseProp: x (4 of 5 cases)", "SparseLab: y"]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.126, "0.13"), (12.34, "12.3"), (1234.5, "1,234")]
)
def test_milliseconds_have_three_digits(value: float | None, text: str) -> None:
    assert table.number(value) == text
