"""Tiles follow from the caches of the machine, and from what was measured on it and kept. A resumed
run computes bitwise the same.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import acdc
from acdc.engine import choice, native, tuning
from acdc.engine.caches import Caches, caches, read
from acdc.engine.choice import Choice
from acdc.engine.geometry import ConvGeometry
from acdc.engine.layout import Buffer, Shape
from acdc.engine.native import Native
from acdc.engine.tile import Tile, Tiling
from acdc.engine.tuning import OutOfTime, Store, Tilings, class_of, fastest
from acdc.errors import InputError

KIB = 2**10
compiled = pytest.mark.skipif(not native.available(), reason="installed without a compiler")
every_isa = pytest.mark.parametrize("isa", native.instruction_sets())


# --- the caches -----------------------------------------------------------------------------------


def describe(system: Path, cpu: int, *found: tuple[int, str, str, str]) -> None:
    """Write the caches of a CPU as Linux does: level, type, size, the CPUs that share it."""
    for i, values in enumerate(found):
        folder = system / f"cpu{cpu}" / "cache" / f"index{i}"
        folder.mkdir(parents=True)
        for name, value in zip(("level", "type", "size", "shared_cpu_list"), values, strict=True):
            (folder / name).write_text(f"{value}\n")


def test_the_caches_are_those_of_the_cpus_that_the_process_has(tmp_path: Path) -> None:
    data, code = (1, "Data", "48K"), (1, "Instruction", "16K")
    for cpu in range(4):
        group = "0-1" if cpu < 2 else "2-3"
        describe(
            tmp_path, cpu, (*data, str(cpu)), (*code, str(cpu)), (2, "Unified", "2048K", str(cpu)),
            (3, "Unified", "16M", group),
        )  # fmt: skip
    assert read([0], tmp_path) == Caches(48 * KIB, 16 * KIB * KIB)
    assert read([0, 1], tmp_path) == Caches(48 * KIB, 16 * KIB * KIB), "shared by both"
    assert read(range(4), tmp_path) == Caches(48 * KIB, 32 * KIB * KIB), "two of them"
    # Beside a large core a small one, whose caches end at the second level.
    describe(tmp_path, 4, (1, "Data", "32768", "4"), (2, "Unified", "512K", "4"))
    assert read([0, 4], tmp_path) == Caches(32 * KIB, 16 * KIB * KIB + 512 * KIB)


@pytest.mark.parametrize(
    "found",
    [
        [],
        [(1, "Data", "0K", "0"), (3, "Unified", "0K", "0")],
        [(1, "Data", "", "0"), (3, "Unified", "large", "0")],
        [(1, "Data", "64G", "0"), (2, "Unified", "1K", "0")],
        [(1, "Instruction", "48K", "0")],
    ],
)
def test_what_the_system_does_not_tell_has_a_default(
    tmp_path: Path, found: list[tuple[int, str, str, str]]
) -> None:
    describe(tmp_path, 0, *found)
    assert read([0, 7], tmp_path) == Caches()
    assert read([0], tmp_path / "missing") == Caches()


# --- the rule -------------------------------------------------------------------------------------


def tiles(g: ConvGeometry, size: int, lanes: int, density: float, tiling: Tiling) -> list[Tile]:
    x = Shape(1, g.in_channels, size, size, lanes, g.halo)
    out = g.out_size(size, size)
    dy = Shape(1, g.out_channels, *out, lanes, g.grad_halo(size, size))
    forward = Tile.forward(g, dy, density, tiling)
    return [
        forward,
        Tile.input_grad(g, x, density, tiling),
        forward.weight_grad(g, tiling),
    ]


FEW = ConvGeometry(16, 16, (3, 3), padding=(1, 1))
MANY = ConvGeometry(64, 64, (3, 3), padding=(1, 1))
STRIDE = ConvGeometry(64, 128, (3, 3), (2, 2), (1, 1))
POINT = ConvGeometry(256, 64, (1, 1))


@pytest.mark.parametrize(
    ("geometry", "size", "lanes", "density", "found"),
    [
        (FEW, 32, 8, 0.1, [(3, 4, 32), (3, 4, 32), (4, 4, 32)]),
        (MANY, 32, 16, 0.1, [(2, 4, 16), (2, 4, 16), (4, 4, 16)]),
        (STRIDE, 32, 8, 0.05, [(2, 4, 32), (1, 8, 64), (4, 4, 32)]),
        (POINT, 14, 16, 0.1, [(1, 7, 128), (1, 7, 128), (1, 7, 128)]),
    ],
)
def test_with_32_kib_the_tiles_are_those_that_were_found_by_measuring(
    geometry: ConvGeometry, size: int, lanes: int, density: float, found: list[tuple[int, ...]]
) -> None:
    """Checkpoints from before there were tilings go on with these rows, bitwise the same."""
    made = tiles(geometry, size, lanes, density, Tiling(32 * KIB))
    assert [(t.rows, t.columns, t.channels) for t in made] == found


def test_a_tiling_bounds_panels_and_rows() -> None:
    small, large = (tiles(MANY, 32, 16, 0.1, Tiling(n * KIB)) for n in (16, 128))
    assert [t.channels for t in small] == [16, 16, 16], "8 fit, and rows would be too short"
    assert [t.channels for t in large] == [64, 64, 64]
    assert [t.rows for t in tiles(MANY, 32, 16, 0.1, Tiling(32 * KIB, 1, 3))] == [1, 1, 3]
    assert [t.rows for t in tiles(POINT, 14, 16, 0.1, Tiling(32 * KIB, 2, 4))] == [2, 2, 4]
    assert Tiling.of_caches() == Tiling(caches().first)


def results(isa: str, tiling: Tiling) -> dict[str, torch.Tensor]:
    """Return what the passes of a layer compute with a tiling."""
    k, g = Native(isa), ConvGeometry(40, 24, (3, 3), padding=(1, 1))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 40, 9, 11, generator=generator)
    grad = torch.randn(37, 24, 9, 11, generator=generator)
    weight = torch.randn(g.weight_shape, generator=generator)
    kept = (torch.rand(g.weight_shape, generator=generator) < 0.2).reshape(-1).nonzero()[:, 0]
    x_shape = Shape.of_images(x.shape, k.lanes, g.halo)
    y_shape = Shape.of_images(grad.shape, k.lanes, g.grad_halo(9, 11))
    plan = k.plan(g, kept, x_shape, y_shape, tiling=tiling)
    plan.refresh(weight)
    plan.refresh(weight, True)
    b_x, b_dy = k.to_layout(x, Buffer.zeros(x_shape)), k.to_layout(grad, Buffer.zeros(y_shape))
    y, dx, dw = Buffer.zeros(y_shape), Buffer.zeros(x_shape), torch.zeros_like(weight)
    sums = k.conv(plan, b_x, y, statistics=True)
    assert sums is not None
    k.conv_input_grad(plan, b_dy, dx)
    k.conv_weight_grad(plan, b_x, b_dy, dw)
    return {"y": k.from_layout(y), "dx": k.from_layout(dx), "dw": dw, "sums": sums}


@every_isa
def test_the_size_of_a_panel_changes_no_result(isa: str) -> None:
    wanted = results(isa, Tiling(32 * KIB))
    for panel_bytes in (1 * KIB, 8 * KIB, 2**20):
        found = results(isa, Tiling(panel_bytes))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@every_isa
def test_the_rows_of_a_tile_change_the_rounding_of_sums_over_pixels_alone(isa: str) -> None:
    wanted = results(isa, Tiling(32 * KIB))
    for rows in (1, 2, 3, 4):
        found = results(isa, Tiling(32 * KIB, rows, rows))
        assert all(torch.equal(found[name], wanted[name]) for name in ("y", "dx"))
        torch.testing.assert_close(found["dw"], wanted["dw"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["sums"], wanted["sums"], rtol=1e-4, atol=1e-2)
    assert not torch.equal(results(isa, Tiling(32 * KIB, 1, 1))["dw"], wanted["dw"])


# --- measuring ------------------------------------------------------------------------------------


class Clock:
    """A clock that moves when something is computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(tuning, "clock", lambda: self.now)

    def passes(self, seconds: Callable[[Tiling], float]) -> Callable[[Tiling], Callable[[], None]]:
        def of(tiling: Tiling) -> Callable[[], None]:
            def run() -> None:
                self.now += seconds(tiling)

            return run

        return of


RULE, OTHERS = Tiling(32), [Tiling(16), Tiling(64)]


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        ({32: 1.0, 16: 0.9, 64: 0.95}, Tiling(16)),
        ({32: 1.0, 16: 0.99, 64: 0.98}, RULE),  # not clearly faster
        ({32: 1.0, 16: 2.0, 64: 3.0}, RULE),
    ],
)
def test_another_tiling_has_to_be_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], found: Tiling
) -> None:
    clock = Clock(monkeypatch)
    passes = clock.passes(lambda tiling: seconds[tiling.panel_bytes])
    assert fastest(RULE, OTHERS, passes, until=1e9) == found


def test_the_fastest_time_of_a_tiling_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other work of the machine makes single times longer, and never shorter."""
    clock, calls = Clock(monkeypatch), 0

    def disturbed(tiling: Tiling) -> float:
        nonlocal calls
        calls += 1
        return (1.0 if tiling == RULE else 0.5) + (10.0 if calls in (5, 9) else 0.0)

    assert fastest(RULE, OTHERS[:1], clock.passes(disturbed), until=1e9) == OTHERS[0]


def test_a_measurement_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with pytest.raises(OutOfTime):
        fastest(RULE, OTHERS, clock.passes(lambda _: 1.0), until=5.0)
    assert clock.now <= 7.0


@compiled
@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("name", tuning._LAYERS)
def test_every_class_can_be_measured(monkeypatch: pytest.MonkeyPatch, isa: str, name: str) -> None:
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    tiling = tuning.measure(f"{name} at 0.02", Native(isa), until=1e300)
    assert tiling.panel_bytes in {int(caches().first * share) for share in tuning.PANELS}


def test_layers_are_sorted_into_classes_that_have_a_layer() -> None:
    for geometry, tokens in ((FEW, False), (MANY, False), (POINT, False), (POINT, True)):
        for density in (1.0, 0.2, 0.07, 0.001):
            name = class_of(geometry, tokens, density)
            assert name is not None
            assert name.rpartition(" at ")[0] in tuning._LAYERS
    assert class_of(FEW, False, 0.0) is None
    assert class_of(FEW, False, 0.9) == "3x3, few channels at 0.2"
    assert class_of(POINT, True, 0.001) == "linear at 0.02"


# --- the file -------------------------------------------------------------------------------------

MACHINE = {"processor": "a CPU", "kernels": "abc"}
GOOD = Tiling(32 * KIB, 2, None)


def test_tilings_are_kept_in_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "acdc"
    assert Store(folder, MACHINE).read() == {}
    Store(folder, MACHINE).add("3x3 at 0.1", GOOD)
    Store(folder, MACHINE).add("1x1 at 0.1", Tiling(1024))
    assert Store(folder, MACHINE).read() == {"3x3 at 0.1": GOOD, "1x1 at 0.1": Tiling(1024)}
    Store(folder, MACHINE).add("3x3 at 0.1", Tiling(2048))
    assert Store(folder, MACHINE).read()["3x3 at 0.1"] == GOOD, "the first one stays"
    assert Store(folder, MACHINE | {"kernels": "abd"}).read() == {}, "other kernels"
    assert [path.name for path in folder.iterdir()] == [Store(folder, MACHINE).name]


def broken(**tiling: Any) -> bytes:
    value = {"machine": MACHINE, "tilings": {"3x3 at 0.1": {**asdict(GOOD), **tiling}}}
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"[]",
        b'{"machine": {}}',
        b"[" * 100_000,
        broken()[:-10],
        broken(panel_bytes=0),
        broken(panel_bytes=10**12),
        broken(panel_bytes="32K"),
        broken(rows=5),
        broken(grad_rows=1.5),
        broken().replace(b"a CPU", b"another CPU"),
    ],
)
def test_a_file_that_is_broken_or_foreign_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    caplog.set_level(logging.INFO, "acdc.engine")
    store = Store(tmp_path, MACHINE)
    (tmp_path / store.name).write_bytes(content)
    assert store.read() == {}
    assert "measured again" in caplog.text
    store.add("3x3 at 0.1", GOOD)
    assert store.read() == {"3x3 at 0.1": GOOD}


def test_a_file_that_cannot_be_written_or_read_costs_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "acdc.engine")
    (tmp_path / "file").write_text("no folder")
    store = Store(tmp_path / "file" / "acdc", MACHINE)
    store.add("3x3 at 0.1", GOOD)
    assert "Cannot write the tiles of this machine" in caplog.text
    assert store.read() == {}
    store = Store(tmp_path, MACHINE)
    (tmp_path / store.name).mkdir()
    store.add("3x3 at 0.1", GOOD)
    assert store.read() == {}
    nowhere = Store(None, MACHINE)  # a user without a home folder
    nowhere.add("3x3 at 0.1", GOOD)
    assert nowhere.read() == {}


def write(folder: Path, writer: int) -> None:
    for i in range(10):
        Store(folder, MACHINE).add(f"class {writer}, {i}", GOOD)
        assert set(Store(folder, MACHINE).read().values()) <= {GOOD}


def test_several_processes_may_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write, args=(tmp_path, n)) for n in range(3)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(120)
        assert process.exitcode == 0
    assert set(Store(tmp_path, MACHINE).read().values()) == {GOOD}
    assert [path.name for path in tmp_path.iterdir()] == [Store(tmp_path, MACHINE).name]


# --- on the engine --------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache folder of a user who lets tiles be measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ACDC_TILES", "measured")
    monkeypatch.setattr(choice, "WORK", 0)
    return tmp_path / "acdc"


class Measured:
    """Stands for the measurement: it notes the classes, and takes its time of a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.1) -> None:
        self.classes: list[str] = []
        self.clock, self.seconds = Clock(monkeypatch), seconds
        monkeypatch.setattr(tuning, "measure", self)

    def __call__(self, name: str, kernels: Native, until: float) -> Tiling:
        self.classes.append(name)
        self.clock.now += self.seconds
        if self.clock.now > until:
            raise OutOfTime
        return Tiling(16 * KIB, 1, 2)


@compiled
def test_a_class_is_measured_once_on_a_machine(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(monkeypatch)
    first = Tilings(Native())
    for _ in range(2):
        assert first.of("3x3, few channels at 0.1") == Tiling(16 * KIB, 1, 2)
    again = Tilings(Native())  # another process
    assert again.of("3x3, few channels at 0.1") == Tiling(16 * KIB, 1, 2)
    assert measured.classes == ["3x3, few channels at 0.1"]
    assert again.of("3x3 at 0.1") is not None
    assert measured.classes[1:] == ["3x3 at 0.1"]
    (path,) = cache.iterdir()
    value = json.loads(path.read_text())
    assert value["machine"] == tuning.machine(Native())
    assert set(value["tilings"]) == set(measured.classes)
    other = native.instruction_sets()[0]
    if other != Native().isa:
        assert Tilings(Native(other)).of("3x3, few channels at 0.1") is not None
        assert measured.classes[2:] == ["3x3, few channels at 0.1"]


@compiled
def test_a_network_measures_for_a_bounded_time(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(monkeypatch, seconds=0.7 * tuning.BUDGET)
    tilings = Tilings(Native())
    assert tilings.of("3x3, few channels at 0.1") is not None
    assert tilings.of("3x3 at 0.1") is None, "the time was over"
    assert tilings.of("1x1 at 0.1") is None
    assert len(measured.classes) == 2
    assert tilings.of("3x3, few channels at 0.1") is not None
    assert "_known" not in vars(Tilings(Native())), "nothing is read before it is asked for"
    (path,) = cache.iterdir()
    assert list(json.loads(path.read_text())["tilings"]) == ["3x3, few channels at 0.1"]


def test_nothing_is_measured_if_the_user_says_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(monkeypatch)
    monkeypatch.setenv("ACDC_TILES", "rule")
    if native.available():
        assert Tilings(Native()).of("3x3, few channels at 0.1") is None
    monkeypatch.setenv("ACDC_TILES", "fast")
    with pytest.raises(InputError, match=r"ACDC_TILES is 'fast'\. It can be 'measured'"):
        tuning.measures()
    assert not measured.classes
    assert not cache.exists()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(p.shape, generator=generator) < 0.3
        for name, p in model.named_parameters()
        if p.dim() > 1
    }


def step(model: nn.Module) -> list[torch.Tensor]:
    """Return the gradients of a step."""
    model.zero_grad()
    x = torch.randn(37, 3, 9, 11, generator=torch.Generator().manual_seed(1))
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def sparse_choice(*given: Any) -> Choice:
    return Choice(True, given[3], 1e6, 1.0, 0.1)


def started(monkeypatch: pytest.MonkeyPatch, state: dict[str, Any] | None = None) -> Any:
    """Return a network that runs sparse, and its engine."""
    monkeypatch.setattr(choice, "measure", sparse_choice)
    model = network()
    engine = acdc.Engine(model, torch.randn(37, 3, 9, 11))
    engine._judge.judges = False
    if state is not None:
        engine.load_state_dict(state)
    engine.compress(masks(model))
    assert engine.active
    return model, engine


@compiled
def test_a_resumed_run_has_the_tiles_of_its_state(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(monkeypatch)
    model, engine = started(monkeypatch)
    assert {c.tiling for c in engine.choices.values()} == {Tiling(16 * KIB, 1, 2)}
    wanted, state = step(model), engine.state_dict()
    asked = len(measured.classes)
    assert asked == 2, "one class of convolutions, one of linear layers"

    # Elsewhere other tiles would be faster, and compute other last bits.
    monkeypatch.setenv("ACDC_TILES", "rule")
    by_rule, _ = started(monkeypatch)
    assert any(not torch.equal(a, b) for a, b in zip(step(by_rule), wanted, strict=True))
    resumed, engine = started(monkeypatch, json.loads(json.dumps(state)))
    assert all(torch.equal(a, b) for a, b in zip(step(resumed), wanted, strict=True))
    assert {c.tiling for c in engine.choices.values()} == {Tiling(16 * KIB, 1, 2)}
    assert len(measured.classes) == asked


@compiled
def test_states_from_before_there_were_tilings_go_on_by_the_rule(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(monkeypatch)
    monkeypatch.setenv("ACDC_TILES", "rule")
    model, engine = started(monkeypatch)
    wanted, state = step(model), engine.state_dict()
    for values in state["choices"].values():
        del values["tiling"]
    monkeypatch.setenv("ACDC_TILES", "measured")
    resumed, engine = started(monkeypatch, state)
    assert all(torch.equal(a, b) for a, b in zip(step(resumed), wanted, strict=True))
    assert {c.tiling for c in engine.choices.values()} == {None}
    assert not measured.classes


@compiled
def test_small_classes_and_an_engine_that_chooses_nothing_measure_no_tiles(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(monkeypatch)
    monkeypatch.setattr(choice, "WORK", 1e12)
    started(monkeypatch)
    assert not measured.classes
    monkeypatch.setattr(choice, "WORK", 1e5)  # so much only the convolutions do
    started(monkeypatch)
    assert measured.classes == ["3x3, few channels at 0.2"]
    measured.classes.clear()
    for path in cache.iterdir():
        path.unlink()
    monkeypatch.setattr(choice, "WORK", 0)
    model = network()
    acdc.Engine(model, torch.randn(3, 3, 9, 11), choose=False).compress(masks(model))
    assert not measured.classes
    assert not list(cache.iterdir())


def test_the_tests_of_this_suite_measure_nothing_by_default() -> None:
    assert os.environ["ACDC_TILES"] == "rule"
