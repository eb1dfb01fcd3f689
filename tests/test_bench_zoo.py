"""``acdc bench zoo``: networks of other libraries, a row for each, also for one that fails."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acdc.bench import run as bench_run
from acdc.bench import zoo, zoo_step
from acdc.bench.step import OPTIMIZERS, Peaks
from acdc.bench.zoo import OWN, ZOO, ZooNetwork
from acdc.cli import main
from acdc.engine.choice import Choice
from acdc.engine.engine import Engine
from acdc.engine.verdict import Verdict
from acdc.errors import InputError

Capture = pytest.CaptureFixture[str]
KEYS = {
    "case", "sparsity", "optimizer", "ratio", "dense_ms", "engine_ms", "dense_setting",
    "dense_settings_ms", "quartiles", "rounds", "dense_peak_mb", "engine_peak_mb",
    "engine_start_peak_mb", "sparse_percent", "layers", "not_sparse", "verdicts", "notes",
}  # fmt: skip


class Small(nn.Module):
    """Convolutions and a head; for the transposed one the engine has no kernels."""

    def __init__(self, sample: int = 8, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails
        self.first, self.up = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 3)
        self.last, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 100)

    def forward(self, x: Tensor) -> Any:
        if self.fails:
            raise RuntimeError("this network is broken")
        hidden = self.last(self.up(self.first(x).relu()).relu()).relu()
        return self.head(hidden.mean((2, 3)))


class OnlyDense(Small):
    """Cannot be attached: no parameter is left to prune."""

    def __init__(self) -> None:
        super().__init__()
        for param in self.parameters():
            if param.ndim > 1:
                param.requires_grad_(False)


def entry(name: str, build: Any, library: str = "torch") -> ZooNetwork:
    return ZooNetwork(name, build, 4, True, None, library, 8)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put tiny networks into the list, and measure no memory: a fresh process has another list."""
    table = {
        "small": entry("small", Small),
        "broken": entry("broken", partial(Small, fails=True)),
        "frozen": entry("frozen", OnlyDense),
        "absent": entry("absent", Small, "timm"),
    }
    monkeypatch.setattr(zoo, "ZOO", table)
    monkeypatch.setattr(zoo, "OWN", ())
    monkeypatch.setattr(zoo, "find_spec", lambda name: None)
    monkeypatch.setattr(zoo_step, "peaks_mb", lambda *_, **__: Peaks(1.5, 2.5))


def run(*args: str) -> int:
    return main(["bench", "zoo", "--repeats", "2", "--threads", "1", *args])


def test_a_row_for_every_network_and_sparsity_and_the_reasons_below(
    tiny: None, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "zoo.json"
    assert run("--sparsity", "0.5", "--sparsity", "0.9", "--json", str(file)) == 0
    out = capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert [(row["case"], row["sparsity"]) for row in rows] == [
        (name, sparsity) for name in ("small", "broken", "frozen") for sparsity in (0.5, 0.9)
    ]
    assert all(row.keys() == KEYS for row in rows)
    good, broken, frozen = rows[0], rows[2], rows[4]
    assert good["ratio"] == pytest.approx(good["dense_ms"] / good["engine_ms"])
    assert good["quartiles"].keys() == {"dense_ms", "engine_ms", "ratio"}
    assert set(good["dense_settings_ms"]) == {"nchw", "channels_last"}
    assert 0 <= good["sparse_percent"] <= 100
    sparse = {f"{name}.weight" for name, how in good["layers"].items() if how == "sparse"}
    assert {"up.weight", "last.weight"} <= sparse | good["not_sparse"].keys()
    whole = {w for w, why in good["not_sparse"].items() if why == zoo_step.SLOWER_AS_A_WHOLE}
    assert sparse & good["not_sparse"].keys() == whole  # a layer is faster, and whole steps are not
    assert broken["dense_ms"] is None
    assert broken["notes"] == {"dense": "RuntimeError: this network is broken"}
    assert frozen["dense_ms"] > 0
    assert frozen["engine_ms"] is None
    assert "broken at 50 %: dense failed: RuntimeError: this network is broken" in out
    assert "frozen at 90 %: engine failed: InputError: Nothing to prune" in out
    assert all(f"small at 50 %: {line}" in out for line in zoo_step._grouped(good["not_sparse"]))
    assert good["not_sparse"]["up.weight"] == "the engine has no kernels for such a layer"
    assert "Not timed: absent (needs timm, which is not installed: pip install timm)." in out


def test_what_whole_steps_have_switched_off_runs_dense(
    tiny: None, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled: list[bool] = []
    monkeypatch.setattr(zoo_step.OnEngine, "settle", lambda self: settled.append(True))
    off = Verdict("training", ("the engine",), True, 1.25, 1.0)
    monkeypatch.setattr(Engine, "verdicts", property(lambda self: (off,)))
    monkeypatch.setattr(
        Engine, "choices", property(lambda self: {"last": Choice(sparse=True, density=0.5)})
    )
    file = tmp_path / "zoo.json"
    assert run("--network", "small", "--sparsity", "0.5", "--json", str(file)) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert settled == [True]  # before anything is timed
    assert row["sparse_percent"] == 0.0
    assert row["not_sparse"]["last.weight"] == zoo_step.SLOWER_AS_A_WHOLE
    assert f"small at 50 %: {off}" in capsys.readouterr().out


def test_further_columns_and_optimizers(tiny: None, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "zoo.json"
    options = ["--columns", "bf16", "--optimizer", "adamw", "--batch", "2"]
    assert run("--network", "small", *options, "--json", str(file), "--sparsity", "0.5") == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row.keys() == KEYS | {"bf16_ms"}
    assert row["bf16_ms"] > 0
    assert row["case"] == "small@2"
    assert row["optimizer"] == "adamw"
    assert "bf16" in capsys.readouterr().out.splitlines()[0]


def test_each_competitor_is_what_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    network = entry("small", Small)
    training = zoo_step.Bf16(network, torch.contiguous_format, "adam")
    assert isinstance(training.optimizer, torch.optim.Adam)
    seen: list[torch.dtype] = []
    training.net.last.register_forward_hook(lambda _m, _x, out: seen.append(out.dtype))
    training.step()
    assert seen == [torch.bfloat16]
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    other = zoo_step.Compiled(network, torch.contiguous_format, "sgd")
    other.step()
    assert compiled == [other.net]


def test_a_column_that_fails_is_a_note(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(_: nn.Module) -> nn.Module:
        raise RuntimeError("there is no compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    settings = zoo_step.Settings((0.5,), 1, columns=("compile",))
    (row,) = zoo_step.measure([ZOO_SMALL], settings)
    assert row["compile_ms"] is None
    assert row["engine_ms"] > 0
    assert row["notes"] == {"compile": "RuntimeError: there is no compiler"}


ZOO_SMALL = entry("small", Small)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--network", "nothing"], "--network nothing is no network of the list, and spells none"),
        (["--network", "absent"], "--network absent needs timm, which is not installed: pip insta"),
        (["--network", "small@0"], "--network small@0 is no network"),
        (["--batch", "0"], "--batch is 0. It is a whole number from 1 up"),
        (["--columns", "fp8"], "--columns holds 'fp8'. The columns are bf16, compile"),
        (["--sparsity", "2"], "sparsity"),
    ],
)
def test_bad_options_are_sentences(
    tiny: None, args: list[str], sentence: str, capsys: Capture
) -> None:
    assert run(*args) == 2
    assert sentence in capsys.readouterr().err


def test_the_list_shows_every_network(capsys: Capture) -> None:
    assert run("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*ZOO, *OWN]
    assert all("pip install" in line for line in lines if "not installed" in line)
    for name in (*ZOO, *OWN):
        assert zoo.find(name) is not None


@pytest.mark.parametrize("name", [n for n in ZOO if n.startswith(("hf", "torch"))])
def test_networks_of_the_list_can_be_built_and_their_batches_have_a_loss(name: str) -> None:
    network = ZOO[name]
    if network.missing:
        pytest.skip(network.missing)
    small = zoo.find(f"{name}@1")
    assert small is not None
    with torch.no_grad():
        loss = small.loss(small.build().eval(), *small.data())
    assert loss.isfinite()
    assert small.data()[0].shape[0] == small.data()[1].shape[0] == 1


def test_reasons_are_grouped_the_most_frequent_first() -> None:
    found = {"a": "grouped", "b": "slow", "c": "slow"}
    assert zoo_step._grouped(found) == [
        "2 weights run dense, b first: slow", "1 weight runs dense, a: grouped",
    ]  # fmt: skip


def test_choose_wants_what_exists() -> None:
    with pytest.raises(InputError, match="is no network of the list"):
        zoo.choose(["hf_nothing"], None)
    chosen, missing = zoo.choose(["resnet8_w4_n8", "resnet8_w4_n8"], None)
    assert [network.name for network in chosen] == ["resnet8_w4_n8"]
    assert missing == []
    assert set(OPTIMIZERS) == {"sgd", "adam", "adamw"}


@pytest.mark.slow
def test_our_own_network_with_its_memory_from_the_command(tmp_path: Path) -> None:
    file = tmp_path / "zoo.json"
    args = ["--network", "resnet8_w4_n8", "--sparsity", "0.9", "--optimizer", "adam"]
    assert run(*args, "--json", str(file)) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["dense_peak_mb"] is None or row["dense_peak_mb"] > 0
    assert row["notes"] == {}


# --- whole runs and their parts -------------------------------------------------------------------


def test_a_whole_run_of_a_network_of_the_list(tiny: None, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "run.json"
    words = ["--case", "small", "--samples", "16", "--epochs", "1", "--sparsity", "0.9"]
    assert main(["bench", "run", *words, "--threads", "1", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert set(row["dense_settings_ms"]) == {"nchw", "channels_last"}
    assert (row["case"], row["samples"], row["test_samples"]) == ("small", 16, 3)
    assert row["share_of_dense"] == pytest.approx(row["engine_ms"] / row["dense_ms"])
    assert "last" in row["layers"]


def test_a_whole_run_of_a_text_network_takes_no_images() -> None:
    encoder = ZooNetwork("texts", zoo._encoder, 4, False, zoo._PRUNED, "torch", 5)
    data = bench_run.samples_of(encoder, 20)
    ((x, y),) = data.eval_batches("test", 10)
    assert (tuple(x.shape), x.dtype, tuple(y.shape)) == ((4, 5), torch.int64, (4,))
    (row,) = bench_run.measure([encoder], [0.9], 1, epochs=1, samples=20, scope="uniform")
    assert row["dense_setting"] == "plain"


def test_the_parts_of_a_step_of_a_network_of_the_list(tiny: None, capsys: Capture) -> None:
    words = ["--case", "small", "--sparsity", "0.9", "--repeats", "1", "--threads", "1"]
    assert main(["bench", "where", *words]) == 0
    assert "small" in capsys.readouterr().out


@pytest.mark.parametrize("bench", ["run", "where"])
def test_a_network_without_its_library_is_refused(bench: str, tiny: None, capsys: Capture) -> None:
    assert main(["bench", bench, "--case", "absent"]) == 2
    assert "absent needs timm" in " ".join(capsys.readouterr().err.split())
