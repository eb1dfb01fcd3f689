"""What a GPU needs, on a CPU: one launch for all weights, CUDA graphs, precisions, compiled steps.

Triton's interpreter runs the kernel on the CPU. What only a GPU can tell is measured by
``benchmarks/gpu/check.py``, which runs here in miniature.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from acdc.errors import InputError
from acdc.hooks import flat
from acdc.hooks.flat import Flat
from acdc.methods.acdc import ACDC
from acdc.pattern import Unstructured
from acdc.runs.data.augment import Augment
from acdc.runs.data.base import Data, Images
from acdc.runs.data.sources import Digits
from acdc.runs.data.tensors import Tensors
from acdc.runs.record import Folder
from acdc.runs.rounding import computed, moved
from acdc.runs.setup import make_fabric, set_up
from acdc.schedule import Kind, constant, phases
from acdc.sparsifier import Sparsifier
from support.helpers import is_plus_zero
from support.runs import tiny

PLAN = phases(1, [("dense", "2st"), ("sparse", "3st"), ("dense", "2st"), ("sparse", "3st")])
SCHEDULE = PLAN.resolve(10)
METHOD = ACDC(Unstructured(0.8), SCHEDULE)


def build(seed: int = 0, width: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, width), nn.Linear(width, 5)
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 3, 8, 8, generator=generator)
    return x, torch.randint(0, 5, (4,), generator=generator)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    step: Callable[[], Any] | None = None,
) -> None:
    for index in steps:
        optimizer.zero_grad()
        x, y = batch(index)
        nn.functional.cross_entropy(model(x), y).backward()
        (step or optimizer.step)()


def check_zeros(sparsifier: Sparsifier, model: nn.Module) -> None:
    """Check that pruned weights and their gradients are +0.0, if the support is sparse."""
    for name, mask in sparsifier.support.items():
        param = model.get_parameter(name)
        assert is_plus_zero(param.detach()[~mask]), name
        if param.grad is not None and not sparsifier.support.is_full:
            assert int((param.detach() != 0).sum()) <= int(mask.sum())


# --- one launch for all weights ------------------------------------------------------------------


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the kernel run on the CPU, by Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    importlib.reload(importlib.import_module("acdc.hooks.flat_kernel"))
    monkeypatch.setattr(flat, "DEVICES", ("cpu",))
    cached = flat.runs_on
    cached.cache_clear()
    yield
    cached.cache_clear()


WORST = (-0.0, -1.5, math.inf, -math.inf, math.nan, 0.0, 3.0)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.complex64]


def worst(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor of values that a product with a mask would not clear."""
    numel = math.prod(shape)
    values = torch.tensor(WORST).repeat(numel // len(WORST) + 1)[:numel]
    return (
        (values.nan_to_num(posinf=1, neginf=1) if dtype == torch.int8 else values)
        .to(dtype)
        .view(shape)
    )


@pytest.mark.usefixtures("interpreted")
def test_flat_clears_many_tensors_to_plus_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (flat.BLOCK,), (2, flat.BLOCK + 1), (4, 3, 2, 2), (1, 1), (0, 5)]
    pairs, expected = [], []
    for i, dtype in enumerate(DTYPES):
        for shape in shapes[i % 2 :]:
            tensor = worst(shape, dtype)
            kept = torch.rand(shape, generator=generator) < 0.4
            if tensor.dim() == 4:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
                kept = kept.contiguous(memory_format=torch.channels_last)
            pairs.append((tensor, kept))
            expected.append(tensor.clone().masked_fill_(~kept, 0))
    clear = Flat()
    assert all(clear.takes(tensor, kept) for tensor, kept in pairs)
    versions = [tensor._version for tensor, _ in pairs]
    clear.clear(pairs)
    for (tensor, _), wanted, version in zip(pairs, expected, versions, strict=True):
        assert torch.equal(bits(tensor), bits(wanted))
        assert tensor._version > version or not tensor.numel()


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.numel() else tensor


@pytest.mark.usefixtures("interpreted")
def test_flat_follows_tensors_that_move() -> None:
    clear, kept = Flat(), torch.tensor([True, False, True])
    for _ in range(20):  # more than there are tables
        tensor, other = torch.ones(3), torch.ones(3)
        alive = [tensor, other]
        clear.clear([(tensor, kept)])
        assert tensor.tolist() == [1, 0, 1]
        clear.clear([(other, kept)])
        assert other.tolist() == [1, 0, 1]
        clear.clear([(tensor.fill_(2), ~kept)])
        assert tensor.tolist() == [0, 2, 0]
        del alive


@pytest.mark.usefixtures("interpreted")
def test_flat_leaves_what_it_cannot_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    clear, tensor = Flat(), torch.ones(4, 6)
    kept = torch.ones(4, 6, dtype=torch.bool)
    assert clear.takes(tensor, kept)
    assert not clear.takes(tensor[:, ::2], kept[:, ::2].contiguous())  # other strides
    assert not clear.takes(tensor[:, ::2], kept[:, ::2])  # gaps
    assert not clear.takes(tensor.t(), kept.t().contiguous())
    assert not clear.takes(torch._neg_view(tensor), kept)  # its zero bits are read as -0.0
    assert not clear.takes(nn.Parameter(tensor), kept)  # autograd would not see it
    with torch.no_grad():
        assert clear.takes(nn.Parameter(tensor), kept)
    assert not clear.takes(tensor.to_sparse(), kept)
    assert not clear.takes(tensor.to("meta"), kept)
    monkeypatch.setattr(flat, "runs_on", lambda device: False)
    assert not clear.takes(tensor, kept)


@pytest.mark.usefixtures("interpreted")
def test_training_with_flat_is_bitwise_training_without(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared = []
    before = Flat.clear
    monkeypatch.setattr(
        Flat, "clear", lambda self, pairs: cleared.append(len(pairs)) or before(self, pairs)
    )
    weights = []
    for devices in (("cpu",), ("cuda",)):
        monkeypatch.setattr(flat, "DEVICES", devices)
        model = build().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        sparsifier = Sparsifier(METHOD, model, optimizer)
        for step in range(10):
            train(model, optimizer, range(step, step + 1))
            check_zeros(sparsifier, model)
        weights.append(copy.deepcopy(list(model.parameters())))
        assert max(cleared) == (3 if devices == ("cpu",) else 0)
        cleared.clear()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*weights, strict=True))


def no_compiler(table: object) -> None:
    raise RuntimeError("Failed to find C compiler")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("missing", ["triton", "a C compiler"])
def test_where_the_kernel_does_not_run_every_weight_is_cleared_by_itself(
    missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if missing == "triton":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(flat._Table, "clear", no_compiler)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = Sparsifier(METHOD, model, optimizer)
    train(model, optimizer, range(4))
    assert not sparsifier.support.is_full
    check_zeros(sparsifier, model)
    # Once, and not at every step.
    assert caplog.text.count("Failed to find C compiler") == (missing != "triton")


# --- CUDA graphs ---------------------------------------------------------------------------------


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Return what says that a CUDA graph is being captured, or no more."""

    def captures(now: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now)

    return captures


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "foreach": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "fused sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_in_a_capture_is_refused(
    kind: Kind, name: str, capture: Callable[[bool], None]
) -> None:
    model = build()
    optimizer = OPTIMIZERS[name](model.parameters())
    method = ACDC(Unstructured(0.8), constant(kind, 1).resolve(10))
    sparsifier = Sparsifier(method, model, optimizer)
    train(model, optimizer, range(2))
    capture(True)
    with pytest.raises(InputError, match="The optimizer steps while a CUDA graph is captured"):
        optimizer.step()
    assert sparsifier.step == 2
    capture(False)
    train(model, optimizer, range(2, 3))
    assert sparsifier.step == 3


def test_a_masked_gradient_in_a_capture_is_refused(capture: Callable[[bool], None]) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Sparsifier(METHOD, model, optimizer)
    x, y = batch(0)
    capture(True)
    nn.functional.cross_entropy(model(x), y).backward()  # nothing is masked in a dense phase
    capture(False)
    train(model, optimizer, range(2))
    capture(True)
    with pytest.raises(InputError, match="A gradient is masked while a CUDA graph is captured"):
        nn.functional.cross_entropy(model(x), y).backward()


def replay(model: nn.Module, step: int) -> None:
    """Put gradients in place without a backward pass that accumulates them, as a graph does."""
    x, y = batch(step)
    loss = nn.functional.cross_entropy(model(x), y)
    params = list(model.parameters())
    for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
        param.grad = grad


@pytest.mark.parametrize("cuda", [True, False])
def test_a_replay_of_an_old_backward_pass_is_warned_of_once(
    cuda: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: cuda)  # else no graph is replayed
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = Sparsifier(METHOD, model, optimizer)
    found = []
    for step in range(10):
        replayed = step in (1, 3, 8)  # in the dense phase nothing is cleared
        optimizer.zero_grad()
        if replayed:
            replay(model, step)
        else:
            x, y = batch(step)
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        check_zeros(sparsifier, model)
        found.append(sum("no backward pass accumulated" in str(w.message) for w in recwarn))
    assert found == ([0, 0, 0] + [1] * 7 if cuda else [0] * 10)


def test_several_optimizers_in_a_capture_are_refused(capture: Callable[[bool], None]) -> None:
    model = build()
    params = list(model.parameters())
    optimizers = [torch.optim.SGD(part, lr=0.1) for part in (params[:2], params[2:])]
    sparsifier = Sparsifier(METHOD, model, optimizers)
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    capture(True)
    with pytest.raises(InputError, match=r"make_graphed_callables.* outside of the capture"):
        optimizers[0].step()
    assert sparsifier.step == 0


# --- precisions and compiled steps ---------------------------------------------------------------


def half(dtype: torch.dtype) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: torch.autocast("cpu", dtype)


PRECISIONS = {
    "float32": (nullcontext, False),
    "bfloat16": (half(torch.bfloat16), False),
    "float16": (half(torch.float16), True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_zeros_are_exact_in_every_precision(precision: str, name: str) -> None:
    context, scaled = PRECISIONS[precision]
    model = build()
    optimizer = OPTIMIZERS[name](model.parameters())
    sparsifier = Sparsifier(METHOD, model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    executed = 0
    for attempt in range(13 if scaled else 10):
        overflow = scaled and attempt in (1, 3, 4)  # in a dense and in a sparse phase
        x, y = batch(attempt)
        optimizer.zero_grad()
        with context():
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss * (math.inf if overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        executed += not overflow
        assert sparsifier.step == executed
        check_zeros(sparsifier, model)
        if not sparsifier.support.is_full and executed not in (2, 7):  # cut after this step
            for key, mask in sparsifier.support.items():
                grad = model.get_parameter(key).grad
                assert grad is not None
                assert is_plus_zero(grad[~mask])
    assert executed == 10
    assert [change.step for change in sparsifier.changes] == [2, 5, 7]


def test_a_compiled_step_runs_the_hooks_and_is_not_compiled_at_every_step() -> None:
    models = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = build()
        optimizer = OPTIMIZERS["foreach"](model.parameters())
        sparsifier = Sparsifier(METHOD, model, optimizer)
        step = optimizer.step
        if compiled:
            counters.clear()
            step = torch.compile(optimizer.step, backend="eager")
        train(model, optimizer, range(6), step)  # with a cut, and a reset of the state
        models.append(copy.deepcopy(model))
        train(model, optimizer, range(6, 8), step)
        assert sparsifier.step == 8
        assert [change.step for change in sparsifier.changes] == [2, 5, 7]
        check_zeros(sparsifier, model)
    frames = counters["stats"]["unique_graphs"]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert frames <= 3  # of a step that makes state, of one that finds state


# --- a run on a GPU ------------------------------------------------------------------------------


class OneDevice(TorchDispatchMode):
    """Fails an operation whose tensors lie on several devices. Copies may."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        devices = {t.device.type for t in tensors if t.dim()}
        assert len(devices) < 2 or "copy" in str(func), func
        return func(*args, **(kwargs or {}))


def pictures() -> Images:
    x = torch.randint(0, 256, (20, 2, 6, 6), dtype=torch.uint8)
    y, rows = torch.arange(20) % 3, torch.tensor([1, 5])
    moved = (rows, torch.tensor([0, 2]))
    means = [0.5, 0.25]
    return Images("toy", (x, y), (x, y), 3, means, means, Augment(2, flip=True), moved)


def vectors() -> Tensors:
    part = torch.rand(20, 3), torch.arange(20) % 3
    return Tensors("toy", part, part, 3)


@pytest.mark.parametrize("build_data", [pictures, vectors])
def test_batches_are_made_on_the_device_of_the_data(build_data: Callable[[], Data]) -> None:
    data = build_data()
    before = [data.train_batch(1, index, 8, seed=0) for index in range(3)]
    data.keep_on(torch.device("meta"))  # in the place of a GPU
    with OneDevice():
        after = [data.train_batch(1, index, 8, seed=0) for index in range(3)]
        after += list(data.eval_batches("test", 8))
        after += [(x, y) for x, y, _ in data.relabelled_batches(8)]
    assert {part.device.type for pair in after for part in pair} == {"meta"}
    for old, new in zip(before, after, strict=False):
        assert [(t.shape, t.dtype) for t in old] == [(t.shape, t.dtype) for t in new]


def test_a_run_keeps_its_data_on_its_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data, devices = Digits().load(), []
    monkeypatch.setattr(data, "keep_on", devices.append)
    recipe, files = tiny(), Folder(tmp_path)
    set_up(recipe, files, make_fabric(recipe, "cpu", tmp_path), data)
    assert devices == [torch.device("cpu")]


def test_a_run_that_goes_on_on_another_card_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")

    def on(device: str) -> dict[str, Any]:
        run = SimpleNamespace(
            fabric=SimpleNamespace(device=torch.device(device)), engine_start={"kind": "off"}
        )
        return computed(run)  # type: ignore[arg-type]

    assert "card" not in on("cpu")
    assert "the card was 'Card 0' and is 'Card 1'." in str(moved(on("cuda:0"), on("cuda:1")))
    assert moved(on("cuda:1"), on("cuda:1")) is None
    text = str(moved(on("cpu"), on("cuda:0")))
    assert "the device was 'cpu' and is 'cuda'" in text
    assert "the device was 'cuda' and is 'cpu'" in str(moved(on("cuda:0"), on("cpu")))


# --- the check -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_check_of_a_gpu_runs_in_miniature(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    if not benchmarks.exists():
        pytest.skip("the source distribution has no benchmarks")
    monkeypatch.syspath_prepend(str(benchmarks / "gpu"))
    import check

    out = tmp_path / "folder" / "gpu.json"
    assert check.main(["--device", "cpu", "--quick", "--out", str(out)]) == 0, capsys.readouterr()
    found = json.loads(out.read_text())
    assert list(found["sections"]) == list(check.SECTIONS)
    assert all(section["rows"] for section in found["sections"].values())
    assert found["card"]
    assert found["versions"]["torch"] == torch.__version__
    assert sum(section.seconds for section in check.SECTIONS.values()) + 50 < 8 * 60

    # A section that fails, and one that takes too long, say so, and the next one goes on.
    def fails(bench: Any) -> Iterator[Any]:
        yield check.Row("first", ok=True)
        raise ValueError("a reason")

    def sleeps(bench: Any) -> Iterator[Any]:
        yield check.Row("second", ok=True)
        time.sleep(60)

    sections = {"fails": check.Section(fails, 5), "sleeps": check.Section(sleeps, -9.9)}
    monkeypatch.setattr(check, "SECTIONS", sections)
    assert check.main(["--device", "cpu", "--out", str(out)]) == 1
    rows = {n: part["rows"] for n, part in json.loads(out.read_text())["sections"].items()}
    assert [row["ok"] for part in rows.values() for row in part] == [True, False, True, False]
    assert rows["fails"][1]["note"] == "ValueError: a reason"
    assert "TimeoutError: stopped after 0.1 s" in rows["sleeps"][1]["note"]
    sys.modules.pop("check")
