"""A forward that does more than compute its result: it writes buffers, and keeps or counts values.

A traced graph would do these things once, while it is traced. Each network here is compared with
the same network in plain PyTorch: outputs, gradients, buffers and attributes, step by step.
"""

from __future__ import annotations

import copy
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import acdc
from acdc.engine import segment
from support.engine_nets import cut, support_of


class Meter:
    """An object that is no module, and counts and keeps."""

    def __init__(self) -> None:
        self.count, self.kept = 0, []  # type: ignore[var-annotated]


class Noting(nn.Module):
    """A network whose forward also calls ``note``, which each case writes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.register_buffer("n", torch.zeros(()))
        self.register_buffer("ema", torch.zeros(8))
        self.register_buffer("view", self.ema.view(2, 4), persistent=False)
        self.free = torch.zeros(8, dtype=torch.float64)  # a tensor that is no buffer
        self.last: Any = None
        self.seen: list[Any] = []
        self.by_name: dict[str, Any] = {"nested": [0]}
        self.meter = Meter()

    def note(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.note(self.norm(self.a(x)).relu())
        return self.fc(self.b(x).relu().mean((2, 3)))


def mean(x: Tensor) -> Tensor:
    return x.detach().mean((0, 2, 3))


class AddInPlace(Noting):
    def note(self, x: Tensor) -> Tensor:
        if self.training:
            self.n.add_(1)
        return x


class AddAndAssign(Noting):
    def note(self, x: Tensor) -> Tensor:
        if self.training:
            self.n += 1
        return x


class AddAndUse(Noting):
    def note(self, x: Tensor) -> Tensor:
        if self.training:
            self.n += 1
        return x * (1 + 0.01 * self.n)


class UseAndAdd(Noting):
    def note(self, x: Tensor) -> Tensor:
        y = x * (1 + 0.01 * self.n)
        self.n += 1
        return y


class UseOfView(Noting):
    def note(self, x: Tensor) -> Tensor:
        y = x * (1 + self.view.view(8, 1, 1))
        self.ema.add_(0.1)
        return y


class Replace(Noting):
    def note(self, x: Tensor) -> Tensor:
        if self.training:
            self.n = self.n + 1
        return x


class ReplaceByTraced(Noting):
    def note(self, x: Tensor) -> Tensor:
        if self.training:
            self.ema = 0.9 * self.ema + 0.1 * mean(x)
        return x


class Lerp(Noting):
    def note(self, x: Tensor) -> Tensor:
        if self.training:
            self.ema.lerp_(mean(x), 0.1)
        return x


class ScaleThenAdd(Noting):
    def note(self, x: Tensor) -> Tensor:
        if self.training:
            self.ema.mul_(0.9).add_(mean(x), alpha=0.1)
        return x


class ScaleAndUse(Noting):
    def note(self, x: Tensor) -> Tensor:
        y = x * (1 + self.ema.view(8, 1, 1))
        self.ema.mul_(0.9)
        self.ema.add_(mean(x), alpha=0.1)
        return y


class Copy(Noting):
    def note(self, x: Tensor) -> Tensor:
        if self.training:
            self.ema.copy_(mean(x))
        return x


class Item(Noting):
    def note(self, x: Tensor) -> Tensor:
        if self.training:
            self.ema[0] = 1 + self.ema[0]
        return x


class TracedItem(Noting):
    def note(self, x: Tensor) -> Tensor:
        self.ema[0] = mean(x)[0]
        return x


class Data(Noting):
    def note(self, x: Tensor) -> Tensor:
        if self.training:
            self.n.data += 1
        return x


class DataByName(Noting):
    def note(self, x: Tensor) -> Tensor:
        data = self.n.data
        data += 1
        return x


class Fill(Noting):
    def note(self, x: Tensor) -> Tensor:
        self.n.fill_(3.0)
        return x * self.n


class Direct(Noting):
    def note(self, x: Tensor) -> Tensor:
        self._buffers["n"].add_(1)  # type: ignore[union-attr]
        return x


class Free(Noting):
    def note(self, x: Tensor) -> Tensor:
        self.free.add_(1)
        return x


class Branch(Noting):
    def note(self, x: Tensor) -> Tensor:
        self.n.add_(1)
        return x * 2 if float(self.n) > 2 else x


class FreeBranch(Noting):
    def note(self, x: Tensor) -> Tensor:
        return x * 2 if float(self.free[0]) > 2 else x


class Keep(Noting):
    def note(self, x: Tensor) -> Tensor:
        self.last = x
        return x


class KeepShape(Noting):
    def note(self, x: Tensor) -> Tensor:
        self.last = x.shape
        return x


class Append(Noting):
    def note(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x


class AppendNumber(Noting):
    def note(self, x: Tensor) -> Tensor:
        self.seen.append(len(self.seen))
        return x


class KeepNested(Noting):
    def note(self, x: Tensor) -> Tensor:
        self.by_name["nested"][0] += 1
        self.by_name["x"] = x
        return x


class Metered(Noting):
    def note(self, x: Tensor) -> Tensor:
        self.meter.count += 1
        self.meter.kept.append(x)
        return x


class Count(Noting):
    def note(self, x: Tensor) -> Tensor:
        self.last = 1 + (self.last or 0)
        return x


class Clamp(Noting):
    def note(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.fc.weight.clamp_(-0.2, 0.2)
        return x


class ClampData(Noting):
    def note(self, x: Tensor) -> Tensor:
        self.fc.weight.data.clamp_(-0.2, 0.2)
        return x


class ClampAll(Noting):
    def note(self, x: Tensor) -> Tensor:
        for weight in self.parameters():
            weight.data.clamp_(-0.2, 0.2)
        return x


class AssignData(Noting):
    def note(self, x: Tensor) -> Tensor:
        self.fc.weight.data = self.fc.weight.data.clamp(-0.2, 0.2)
        return x


class AssignAllData(Noting):
    def note(self, x: Tensor) -> Tensor:
        for weight in self.parameters():
            weight.data = weight.data.clamp(-0.2, 0.2)
        return x


class WithoutGradients(Noting):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.norm(self.a(x)).relu()
        return self.fc(self.b(x).relu().mean((2, 3)))


class ReadStatistics(Noting):
    def note(self, x: Tensor) -> Tensor:
        return x * self.norm.running_mean.abs().sum().sqrt()


class WriteInsideOfSegment(Noting):
    """The two convolutions are one segment, and the buffer is read under another name."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.ema.add_(mean(x))
        scale = 1 + self.view.sum()
        return self.fc(self.b(x).relu().mean((2, 3)) * scale)


class CountingNorm(nn.BatchNorm2d):
    """As timm writes it: the module counts its batches, and calls a function."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        momentum = self.momentum
        if momentum is None:
            counted = float(self.num_batches_tracked)  # type: ignore[arg-type]
            momentum = 1.0 / counted if self.training else 0.0
        return F.relu(
            F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                momentum, self.eps,
            )
        )  # fmt: skip


class OwnNorm(Noting):
    def __init__(self) -> None:
        super().__init__()
        self.norm = CountingNorm(8)


class OwnNormTwice(OwnNorm):
    def note(self, x: Tensor) -> Tensor:
        return self.norm(x)


class CumulativeNorm(Noting):
    def __init__(self) -> None:
        super().__init__()
        self.norm = CountingNorm(8, momentum=None)


class Subclass(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.0


class SubclassNorm(Noting):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Subclass(8)


class CumulativeSubclassNorm(Noting):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Subclass(8, momentum=None)


CLAMPS = (Clamp, ClampData, ClampAll)
WHOLE = (AddInPlace, AddAndAssign, AddAndUse, Lerp, ScaleThenAdd, Copy, OwnNorm)
IN_PARTS = (
    UseAndAdd, UseOfView, Replace, ReplaceByTraced, ScaleAndUse, Item, TracedItem, Data, DataByName,
    Fill, Direct, Free, Branch, FreeBranch, Keep, KeepShape, Append, AppendNumber, KeepNested,
    Metered, Count, Clamp, ClampData, ClampAll, AssignData, AssignAllData, WithoutGradients,
    ReadStatistics, WriteInsideOfSegment, OwnNormTwice, CumulativeNorm, SubclassNorm,
    CumulativeSubclassNorm,
)  # fmt: skip


def built(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().double()


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 6, 6, generator=generator, dtype=torch.float64)


def attributes(value: Any) -> Any:
    """Return what a module, or an object that it holds, keeps besides parameters and modules."""
    if isinstance(value, nn.Module | Meter):
        hidden = ("_parameters", "_modules", "forward")
        return {k: attributes(v) for k, v in vars(value).items() if k not in hidden}
    if isinstance(value, dict):
        return {k: attributes(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [attributes(v) for v in value]
    return value.detach().clone() if isinstance(value, Tensor) else value


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def compare(model: nn.Module, plain: nn.Module) -> None:
    for (name, mine), other in zip(model.named_modules(), plain.modules(), strict=True):
        got, want = attributes(mine), attributes(other)
        assert got.keys() == want.keys(), name
        for key in want:
            if isinstance(want[key], Tensor | dict | list):
                assert type(got[key]) is type(want[key]), (name, key)
                same(got[key], want[key])
            else:
                assert got[key] == want[key], (name, key)
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        same(mine.detach(), other.detach())
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None:
            same(mine.grad, other.grad)


def step(model: nn.Module, number: int, masks: dict[str, Tensor]) -> Tensor:
    """Return the output, and train as a sparsifier does: only the kept weights have gradients."""
    out: Tensor = model(batch(number))
    model.zero_grad()
    out.square().sum().backward()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                weight.grad *= masks.get(name, True)
                weight -= 0.01 * weight.grad
    return out.detach()


class Pair:
    """A network on the engine, beside a copy in plain PyTorch."""

    def __init__(self, kind: type[nn.Module]) -> None:
        self.model = built(kind)
        self.masks = support_of(self.model, 0.4)
        cut(self.model, self.masks)
        self.plain = copy.deepcopy(self.model)
        if kind in CLAMPS:  # the engine has called the network, in evaluation mode
            with torch.no_grad():
                self.plain.eval()(batch(0))
            self.plain.train()
        self.engine = acdc.Engine(self.model, batch(0), choose=False)

    def steps(self, numbers: range) -> None:
        for number in numbers:
            got, want = (step(m, number, self.masks) for m in (self.model, self.plain))
            same(got, want)
            compare(self.model, self.plain)

    def train(self, training: bool) -> None:
        self.model.train(training)
        self.plain.train(training)


@pytest.mark.parametrize("kind", WHOLE + IN_PARTS, ids=lambda kind: kind.__name__)
def test_every_step_has_the_effects_that_it_has_in_plain_pytorch(kind: type[nn.Module]) -> None:
    pair = Pair(kind)
    compare(pair.model, pair.plain)  # finding what can be traced has no effect
    pair.engine.compress(pair.masks)
    compare(pair.model, pair.plain)
    pair.steps(range(3))
    pair.train(False)
    pair.steps(range(3, 5))
    pair.train(True)
    pair.steps(range(5, 7))
    pair.engine.decompress()
    pair.steps(range(7, 9))
    pair.engine.compress(pair.masks)
    pair.steps(range(9, 11))
    assert sum(choice.sparse for choice in pair.engine.choices.values()) == 3


@pytest.mark.parametrize("kind", WHOLE, ids=lambda kind: kind.__name__)
def test_a_write_to_a_buffer_becomes_a_node_of_the_graph_of_the_whole(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(kind)
    ran: list[int] = []
    compute = segment.compute
    monkeypatch.setattr(segment, "compute", lambda *a: ran.append(1) or compute(*a))
    pair.engine.compress(pair.masks)
    step(pair.model, 0, pair.masks)
    assert ran
    assert [host.module for host in pair.engine._hosts] == [pair.model]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_network_that_is_in_evaluation_when_it_is_given_to_the_engine(training: bool) -> None:
    for kind in (OwnNorm, AddAndUse, Replace, Keep):
        pair = Pair(kind)
        pair.train(False)
        pair.engine = acdc.Engine(pair.model, batch(0), choose=False)
        pair.engine.compress(pair.masks)
        pair.train(training)
        pair.steps(range(3))


class Reads(Noting):
    """A forward that reads a buffer, which is replaced from outside."""

    def note(self, x: Tensor) -> Tensor:
        return x * (1 + self.ema.view(8, 1, 1))


def test_a_buffer_that_was_replaced_is_read_from_then_on() -> None:
    pair = Pair(Reads)
    pair.engine.compress(pair.masks)
    pair.steps(range(2))
    for model in (pair.model, pair.plain):
        model.ema = torch.arange(8, dtype=torch.float64)
    pair.steps(range(2, 4))
    for model in (pair.model, pair.plain):
        model.ema = torch.ones(1, dtype=torch.float64).expand(8)
    pair.steps(range(4, 6))


class Sliced(Noting):
    """The only reader of a layer's result takes a part of it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.a(x)).relu().mean((2, 3)))[:, 1:]


def test_a_layer_of_whose_result_only_a_part_is_read() -> None:
    pair = Pair(Sliced)
    pair.engine.compress(pair.masks)
    pair.steps(range(2))


class Attending(Noting):
    """The graph names a layer that the network has no module for, and sizes are read."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.act = nn.ReLU()
        self.act.register_buffer("scale", torch.ones(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x)).relu().flatten(2).transpose(1, 2)
        self.n += 1
        x = self.attention(x, x, x, need_weights=False)[0]
        x = self.act(x) * self.act.scale
        x = x.reshape(*x.shape[:-1], *self.view.shape).flatten(2)
        return self.fc(x.mean(1))


def test_a_network_with_attention_has_its_effects_and_keeps_its_buffers_as_they_are() -> None:
    pair = Pair(Attending)
    compare(pair.model, pair.plain)
    pair.engine.compress(pair.masks)
    pair.steps(range(3))
    assert pair.engine.choices["attention.in_proj"].sparse
    assert [host.module for host in pair.engine._hosts] == [pair.model]


class ClampInProjection(Attending):
    def forward(self, x: Tensor) -> Tensor:
        self.attention.in_proj_weight.data.clamp_(-0.2, 0.2)
        return super().forward(x)


def test_a_forward_that_changes_the_weight_of_an_in_projection_is_traced_in_parts() -> None:
    pair = Pair(ClampInProjection)
    pair.engine.compress(pair.masks)
    assert pair.model not in [host.module for host in pair.engine._hosts]


SEEN: list[Any] = []


class Global(Noting):
    def note(self, x: Tensor) -> Tensor:
        SEEN.append(x)
        return x


def test_a_value_that_is_kept_outside_of_the_modules_is_kept_in_every_step() -> None:
    pair = Pair(Global)
    pair.engine.compress(pair.masks)
    SEEN.clear()
    step(pair.model, 0, pair.masks)
    step(pair.model, 1, pair.masks)
    assert [type(value) for value in SEEN] == [Tensor, Tensor]


class Caught(Noting):
    def note(self, x: Tensor) -> Tensor:
        try:
            self.free.add_(1)
        except Exception:
            return x * 0
        return x


def test_a_forward_that_catches_the_error_of_tracing_is_not_traced() -> None:
    pair = Pair(Caught)
    pair.engine.compress(pair.masks)
    pair.steps(range(2))


# --- random numbers -----------------------------------------------------------------------------


class DrawsInPython(Noting):
    def note(self, x: Tensor) -> Tensor:
        return x * (1 + random.random())


class DrawsFromRange(Noting):
    def note(self, x: Tensor) -> Tensor:
        return x * random.randint(1, 3)


class DrawsInPyTorch(Noting):
    def note(self, x: Tensor) -> Tensor:
        torch.rand(3)
        return x


class SeedsPyTorch(Noting):
    def note(self, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return x


class LooksAtStates(Noting):
    def note(self, x: Tensor) -> Tensor:
        random.getstate()
        torch.random.get_rng_state()
        return x


@contextmanager
def another_thread_draws() -> Iterator[None]:
    """Let another thread draw all the time, as the heartbeat of a worker of Dask does."""
    ends = threading.Event()

    def draw() -> None:
        while not ends.wait(0.0005):
            random.random()
            torch.rand(1)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize(
    ("kind", "whole"),
    [(Noting, True), (LooksAtStates, True), (DrawsInPython, False), (DrawsFromRange, False),
     (DrawsInPyTorch, False), (SeedsPyTorch, False)],
)  # fmt: skip
def test_a_forward_that_draws_has_no_graph_whatever_other_threads_draw(
    kind: type[nn.Module], whole: bool, busy: bool
) -> None:
    model = built(kind)
    with another_thread_draws() if busy else nullcontext():
        engine = acdc.Engine(model, batch(0), choose=False)
    assert ([host.name for host in engine._hosts] == [""]) == whole
    assert sys.getprofile() is None


def test_a_profiler_sees_the_trace_and_stays() -> None:
    seen: list[str] = []

    def profile(frame: Any, event: str, arg: Any) -> None:
        seen.append(frame.f_code.co_name)

    with another_thread_draws():
        sys.setprofile(profile)
        try:
            acdc.Engine(built(Noting), batch(0), choose=False)
            assert sys.getprofile() is profile
        finally:
            sys.setprofile(None)
    assert "note" in seen
