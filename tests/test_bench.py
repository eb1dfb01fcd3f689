"""``acdc bench``: all competitors compute the same and take turns; a failing one is reported."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from acdc.bench import layers, networks, peers, race, run, step, table
from acdc.bench.layers import CASES, Layer
from acdc.bench.peers import Dense, Engine, Entrant, Problem, TorchCsr
from acdc.bench.race import Workload
from acdc.cli import main
from acdc.errors import InputError
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
    """Flush no cache, and wait for no thread."""
    monkeypatch.setattr(race, "FLUSH_BYTES", 4)
    monkeypatch.setattr(race, "PAUSE", 0.0)


def problem(name: str, sparsity: float = 0.8) -> Problem:
    layer = Layer.parse(name)
    assert layer is not None
    return layers._masked(layer.problem(), sparsity)


# --- turns --------------------------------------------------------------------------------------


def test_every_round_times_every_workload_and_the_sequence_rotates() -> None:
    calls: list[str] = []

    def workload(name: str) -> Workload:
        return Workload(
            (lambda: calls.append(f"{name}1"), lambda: calls.append(f"{name}2")),
            before=lambda: calls.append("-"),
        )

    seconds = race.race({name: workload(name) for name in "abc"}, rounds=3)
    rounds = [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    assert calls == [x for names in rounds for n in names for x in ("-", f"{n}1", "-", f"{n}2")]
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 3)
    assert all(second > 0 for times in seconds.values() for second in times)


def test_caches_are_left_as_the_same_passes_left_them_or_emptied_before_each() -> None:
    calls: list[str] = []
    passes = (lambda: calls.append("forward"), lambda: calls.append("backward"))
    left = race.Caches("left").workload(*passes)
    left.seconds()
    assert calls == ["forward", "backward"] * 2, "the first time is a warm-up"
    calls.clear()
    emptied = race.Caches("emptied")
    emptied._memory = Mock(sum=lambda: calls.append("-"))
    emptied.workload(*passes).seconds()
    assert calls == ["-", "forward", "-", "backward"]


def test_the_passes_are_timed_and_what_comes_before_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(race.time, "perf_counter", lambda: now)
    workload = Workload((lambda: wait(2), lambda: wait(3)), before=lambda: wait(100))
    assert race.race({"it": workload}, rounds=2) == {"it": [5, 5]}


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
def test_the_contenders_compute_what_dense_pytorch_does(
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


# --- a training step ----------------------------------------------------------------------------

STEP = "resnet8_w4_n8"


def test_networks_are_chosen_by_a_part_of_their_name_or_spelled() -> None:
    chosen = networks.choose(["w64", "gpt_d64_l1_t256", STEP], step.CASES)
    assert [network.name for network in chosen] == ["resnet14_w64_n64", "gpt_d64_l1_t256", STEP]
    resnet, gpt, small = (sum(p.numel() for p in n.build().parameters()) for n in chosen)
    assert (resnet, small) == (2_777_674, 5_214)
    assert gpt == 64 * (256 + 128) + 12 * 64 * 64 + 13 * 64 + 2 * 64 + 256 * 64
    x, y = chosen[1].data()
    assert (tuple(x.shape), tuple(y.shape)) == ((2, 128), (256,))
    assert tuple(chosen[1].build()(x).shape) == (256, 256)
    pruned = step.OnEngine(chosen[1], 0.75, "uniform").sparsifier.support.counts()
    assert set(pruned) == {f"blocks.0.{name}.weight" for name in ("qkv", "proj", "up", "down")}
    assert pruned["blocks.0.qkv.weight"] == 64 * 64 * 3 / 4
    with pytest.raises(InputError, match=r"--case vgg is in the name of no network"):
        networks.choose(["vgg"], step.CASES)


def test_the_engine_and_dense_pytorch_train_the_same_masked_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (network,) = networks.choose([STEP], step.CASES)
    engine, masked = step.OnEngine(network, 0.8, "uniform"), step.Training(network)
    support = engine.sparsifier.support
    assert support.counts()["layer1.0.conv1.weight"] == kept(4 * 4 * 9, 0.8)
    params = dict(masked.net.named_parameters())
    compress = Mock(wraps=engine.engine.compress)
    monkeypatch.setattr(engine.engine, "compress", compress)
    for number in range(4):
        with torch.no_grad():
            for name, mask in support.items():
                params[name].masked_fill_(~mask, 0.0)
        loss = masked.step()
        if number == 2:
            assert engine.again() > 0  # compresses anew, and takes a step
            compress.assert_called_once_with(support)
        else:
            assert (engine.step() if number else engine.loss) == pytest.approx(loss, rel=1e-5)


def test_bench_step_writes_a_row_for_every_sparsity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    asked: list[tuple[object, ...]] = []

    def peaks(*how: object) -> step.Peaks:
        asked.append(how)
        return step.Peaks(100.0 + len(asked), 200.0 + len(asked))

    monkeypatch.setattr(step, "peaks_mb", peaks)
    file = tmp_path / "step.json"
    words = ["bench", "step", "--case", STEP, "--sparsity", "0.5", "--sparsity", "0.9"]
    assert main([*words, "--repeats", "2", "--scope", "erk", "--json", str(file)]) == 0
    half, tenth = json.loads(file.read_text())["rows"]
    more = {"flops_share", "compression_steps", "recompression_steps", "layers", "verdicts"}
    more |= {"dense_peak_mb", "engine_peak_mb", "engine_start_peak_mb"}
    assert set(half) == set(tenth) == COLUMNS | more
    assert set(half["dense_settings_ms"]) == {"nchw", "channels_last"}
    assert half["ratio"] == half["dense_ms"] / half["engine_ms"]
    assert 1 > half["flops_share"] > tenth["flops_share"] > 0
    assert half["compression_steps"] > half["recompression_steps"]  # which times no layer
    assert set(half["notes"]) == set(step.PEERS)
    assert "layer1.0.conv1" in half["layers"]
    # The verdict is the clock's, and there is none where no layer gains.
    assert all(text.startswith("training, about ") for text in half["verdicts"])
    formats = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
    assert asked == [
        (STEP, formats[half["dense_setting"]]),
        (STEP, 0.5, "erk"),
        (STEP, 0.9, "erk"),
    ]
    assert [row["dense_peak_mb"] for row in (half, tenth)] == [101, 101]
    assert [row["engine_peak_mb"] for row in (half, tenth)] == [102, 103]
    assert [row["engine_start_peak_mb"] for row in (half, tenth)] == [202, 203]
    out, _ = capsys.readouterr()
    assert "SparseLab: single layers only" in out


@pytest.mark.skipif(not step.FORGET.exists(), reason="only Linux tells the peak of a process")
def test_the_peak_of_a_step_is_that_of_its_activations_and_weights() -> None:
    # The first stage of resnet8 has 3 convolutions; each keeps its output for the backward pass,
    # and so does BatchNorm: 6 tensors at least.
    least = 6 * 128 * 16 * 32 * 32 * 4 / 1e6
    peaks = step.peaks_mb("resnet8_w16_n128", torch.channels_last)
    assert peaks is not None
    assert least < peaks.step < 6 * least
    assert least < peaks.start < 6 * least


@pytest.mark.skipif(not step.FORGET.exists(), reason="only Linux tells the peak of a process")
def test_the_memory_of_a_step_is_measured_when_the_engine_has_decided() -> None:
    """Dense steps, with which the sparse ones are compared, need more than those."""
    peaks = step.peaks_mb("resnet20_w16_n32", 0.95, "uniform")
    assert peaks is not None
    assert 0 < peaks.step < peaks.start


@pytest.mark.skipif(not step.FORGET.exists(), reason="only Linux tells the peak of a process")
def test_a_peak_is_seen_after_it_has_passed_and_forgotten_before_the_next() -> None:
    now, large = step.peak_during(lambda: None), 200
    assert step.peak_during(lambda: torch.ones(large * 250_000)) == pytest.approx(
        now + large, abs=9
    )
    assert step.peak_during(lambda: None) == pytest.approx(now, abs=9)


def test_without_proc_there_is_no_peak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(step, "FORGET", tmp_path / "missing")
    assert step.peaks_mb(STEP, torch.channels_last) is None


FAKE_MODULES = """
import torch

def swapped(layer):
    return layer

class SparseConv2d:
    @staticmethod
    def from_dense(layer):
        return swapped(layer)

class SparseLinear(SparseConv2d):
    pass

def sparsify_conv2d_auto(layer, shape):
    assert shape[1] == layer.in_channels and shape[0] == 8
    return swapped(layer)
"""
FAKE_UTILS = """
def swap_module(net, name, module):
    net.set_submodule(name, module)
"""


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.usefixtures("installed")
def test_sparseprop_trains_the_network_if_its_loss_is_right(
    right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "peaks_mb", lambda *how: None)
    ones = "return torch.nn.init.ones_(layer.weight) is None or layer"
    fake = FAKE_MODULES if right else FAKE_MODULES.replace("return layer", ones)
    (tmp_path / "sparseprop/modules.py").write_text(fake)
    (tmp_path / "sparseprop/utils.py").write_text(FAKE_UTILS)
    (row,) = step.measure(networks.choose([STEP], step.CASES), [0.9], 1, "uniform")
    assert row["dense_peak_mb"] is row["engine_peak_mb"] is None
    if right:
        assert row["sparseprop_ms"] > 0
        assert "sparseprop" not in row["notes"]
    else:
        assert row["sparseprop_ms"] is None
        assert row["notes"]["sparseprop"].startswith("its loss is ")


# --- a whole run --------------------------------------------------------------------------------


def test_a_run_is_half_sparse_and_its_epochs_lie_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    epochs: list[tuple[str | float, int]] = []
    phases: list[list[tuple[str, int]]] = []

    class Watched(run.Run):
        def __init__(self, *how: Any) -> None:
            super().__init__(*how)
            self.key = how[3]
            if self.key != "channels_last":
                schedule = self.sparsifier.schedule
                phases.append([(phase.kind, len(phase)) for phase in schedule.phases])

        def epoch(self, number: int) -> None:
            epochs.append((self.key, number))
            super().epoch(number)

    monkeypatch.setattr(run, "Run", Watched)
    (network,) = networks.choose(["resnet8_w2_n8"], run.CASES)
    first, second = run.measure([network], [0.5, 0.9], 2, epochs=2, samples=32, scope="uniform")
    dense = "channels_last"
    warm, once = [(dense, 0), (0.5, 0), (0.9, 0)], [(0.5, 1), (0.9, 1), (dense, 1)]
    assert epochs == warm + 2 * (warm + once)
    assert phases[2:] == 4 * [[("dense", 2), ("sparse", 2), ("dense", 2), ("sparse", 2)]]
    assert (first["samples"], first["test_samples"], first["epochs"]) == (32, 6, 2)
    for row in (first, second):
        for name in ("dense", "engine"):
            totals = [sum(taken) for taken in row[f"{name}_epochs_ms"]]
            assert len(totals) == 2
            assert row[f"{name}_ms"] == pytest.approx(sum(totals) / 2, abs=1)
        assert row["share_of_dense"] == pytest.approx(row["engine_ms"] / row["dense_ms"])
    assert first["dense_epochs_ms"] == second["dense_epochs_ms"]
    assert first["engine_epochs_ms"] != second["engine_epochs_ms"]


def test_an_epoch_sees_every_image_and_evaluates(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, int]] = []
    data = run.images(20)
    (network,) = networks.choose(["resnet8_w2_n8"], run.CASES)
    trained = run.Run(network, data, 1, "channels_last", "uniform")
    before = {name: p.clone() for name, p in trained.net.named_parameters()}
    trained.net.register_forward_hook(
        lambda net, args, _: seen.append((net.training, len(args[0])))
    )
    trained.epoch(0)
    assert seen == [(True, 8), (True, 8), (True, 4), (False, 4)]
    assert all(not torch.equal(p, before[name]) for name, p in trained.net.named_parameters())


def test_bench_run_prints_the_share_of_dense(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "run.json"
    words = ["--case", "resnet8_w2_n8", "--samples", "32", "--epochs", "1", "--sparsity", "0.9"]
    assert main(["bench", "run", *words, "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    more = {"share_of_dense", "epochs", "phases", "samples", "test_samples", "layers"}
    more.add("verdicts")
    assert set(row) == COLUMNS | more | {"dense_epochs_ms", "engine_epochs_ms"}
    out, _ = capsys.readouterr()
    assert out.splitlines()[1].split()[-1] == table.number(row["share_of_dense"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--epochs", "0"], "--epochs is 0"),
        (["--samples", "4"], "--samples is 4"),
        (["--case", "gpt_d64_l1_t128"], "a whole run is one of a ResNet"),
    ],
)
def test_a_run_that_cannot_be_is_refused(words: list[str], sentence: str, capsys: Capture) -> None:
    assert main(["bench", "run", *words]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


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
        assert set(row) == COLUMNS | {"caches", "convert_ms"}
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
