"""The engine around a step: copies, hooks, fallback to PyTorch, lifetime of graphs, the
choice of layers, and whole cycles under a sparsifier.
"""

from __future__ import annotations

import copy
import logging
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import acdc
from acdc.engine import choice, memory, timing
from acdc.engine.choice import Choice
from acdc.engine.timing import Candidate, LayerTimes
from acdc.errors import InputError
from acdc.runs.models import SmallResNet
from support.engine_nets import cut
from support.helpers import CUTS, SCHEDULE, TOTAL

SHAPE = (1, 8, 8)


def net() -> nn.Module:
    torch.manual_seed(0)
    return SmallResNet(width=8, blocks=1, size=8).build().double()


def batch(samples: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, *SHAPE, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 10, (samples,), generator=g)


def sparse(model: nn.Module, density: float = 0.3, seed: int = 2) -> dict[str, Tensor]:
    """Prune a model at random, and return its masks. The layers before the head are one segment."""
    g = torch.Generator().manual_seed(seed)
    masks = {}
    for name, p in model.named_parameters():
        if p.dim() > 1 and name != "conv1.weight":
            masks[name] = torch.rand(p.shape, generator=g) < density
            p.data[~masks[name]] = 0
    return masks


def on_engine(density: float = 0.3) -> tuple[nn.Module, nn.Module, acdc.Engine]:
    """Return a network in a sparse phase, its copy in plain PyTorch, and the engine."""
    model = net()
    masks = sparse(model, density)
    plain = copy.deepcopy(model)
    engine = acdc.Engine(model, batch()[0], choose=False)
    engine.compress(masks)
    assert engine.active
    return model, plain, engine


def loss_of(model: nn.Module, samples: int = 6) -> Tensor:
    x, y = batch(samples)
    return F.cross_entropy(model(x), y)


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


# --- the model stays what it was ------------------------------------------------------------------


def test_the_state_dict_has_the_keys_of_the_plain_model() -> None:
    model, plain, _ = on_engine()
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_plain_and_may_have_an_engine_of_its_own(
    copied: Callable[[nn.Module], nn.Module], ran: list[int]
) -> None:
    model, plain, _ = on_engine()
    other = copied(model)
    same(loss_of(other), loss_of(plain))
    assert not ran
    engine = acdc.Engine(other, batch()[0], choose=False)
    engine.compress(sparse(other))
    loss_of(other)
    assert ran


def test_decompressed_the_forward_is_the_class_own() -> None:
    model, _, engine = on_engine()
    engine.decompress()
    assert "forward" not in vars(model)
    assert not engine.active


def test_a_hook_inside_is_called_and_numbers_stay(ran: list[int]) -> None:
    model, plain, _ = on_engine()
    seen: list[Tensor] = []
    for m in (model, plain):
        layer = m.get_submodule("layer2.0.conv1")
        layer.register_forward_hook(lambda _m, _x, out: seen.append(out.detach()))
        loss_of(m).backward()
    assert len(seen) == 2
    same(*seen)
    assert ran  # the rest still runs on the kernels
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        mask = p.grad != 0
        same(p.grad, q.grad * mask)


def test_a_compiled_model_has_the_same_numbers_in_both_kinds_of_phase() -> None:
    model, plain, engine = on_engine()
    compiled = torch.compile(model, backend="eager")
    same(loss_of(compiled), loss_of(plain))
    engine.decompress()
    same(loss_of(compiled), loss_of(plain))


def test_an_exported_model_is_plain() -> None:
    model, plain, _ = on_engine()
    x = batch()[0]
    same(torch.export.export(model.eval(), (x,)).module()(x), plain.eval()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_with_pytorch_and_says_so(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    engine = acdc.Engine(model, batch()[0].to(dtype), choose=False)
    engine.compress(sparse(model))
    assert not engine.active
    why = f"its result is {dtype}; the kernels take float32 and float64"
    assert set(engine.refused.values()) == {why}


def test_weights_set_by_hand_are_seen() -> None:
    model, plain, _ = on_engine()
    for m in (model, plain):
        loss_of(m).backward()
        m.get_submodule("layer1.0.conv1").weight.data.mul_(2)
    same(loss_of(model), loss_of(plain))


# --- falling back ---------------------------------------------------------------------------------


def test_a_parameter_that_was_replaced_is_left_to_pytorch_until_the_next_compression(
    ran: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model, plain, engine = on_engine()
    for m in (model, plain):
        layer = m.get_submodule("layer1.0.conv1")
        layer.weight = nn.Parameter(layer.weight.detach() * 2)
    same(loss_of(model), loss_of(plain))
    assert len(ran) == 1  # the linear layer, which is a run of its own
    assert "a parameter was replaced by another" in caplog.text
    engine.compress(sparse(model))
    sparse(plain)
    ran.clear()
    same(loss_of(model), loss_of(plain))
    assert len(ran) == 2


def test_another_image_size_is_computed_by_pytorch_and_said_once(
    ran: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model, plain, _ = on_engine()
    x = torch.randn(3, 1, 12, 12, dtype=torch.float64)
    for _ in range(2):
        same(model(x), plain(x))
    assert len(ran) == 2  # the linear layer, twice
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "its input has become" in warnings[0]


def test_autocast_is_left_to_pytorch(ran: list[int]) -> None:
    model, plain, _ = on_engine()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(model(batch()[0]), plain(batch()[0]))
    assert not ran


def test_without_memory_pytorch_computes(
    ran: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, plain, _ = on_engine()

    def full(*_: object) -> None:
        raise RuntimeError("not enough memory: you tried to allocate 1 byte.")

    monkeypatch.setattr(memory, "allocate", full)
    same(loss_of(model), loss_of(plain))
    assert not ran
    assert "no memory for its buffers" in caplog.text


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_input_gives_a_bad_loss(bad: float, ran: list[int]) -> None:
    model, plain, _ = on_engine()
    x, y = batch()
    x[0, 0, 3, 3] = bad
    losses = [F.cross_entropy(m(x), y) for m in (model, plain)]
    assert ran
    assert [bool(loss.isnan()) for loss in losses] == [True, True]


def test_a_model_elsewhere_leaves_the_engine_off() -> None:
    model = net().to("meta")
    engine = acdc.Engine(model, batch()[0])
    assert engine.off is not None
    assert "the kernels are for CPUs" in engine.off
    engine.compress({})
    assert not engine.active


def test_an_example_that_does_not_fit_is_a_sentence() -> None:
    with pytest.raises(InputError, match=r"does not fit SmallResNet|does not fit .*forward"):
        acdc.Engine(net(), (batch()[0], 1, 2))


class Reached(nn.Module):
    """Layers that the engine refuses, each for another reason."""

    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.traceable = traceable
        self.seen, self.never, self.only_weight = (nn.Linear(8, 8) for _ in range(3))
        self.aside = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Sequential(nn.Linear(8, 8))})
        self.whole = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.whole.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() > 1e9:
            return self.aside["a"](x)
        return self.whole(self.seen(x)) + F.linear(x, self.only_weight.weight)


@pytest.mark.parametrize("traceable", [True, False])
def test_a_layer_that_the_example_does_not_reach_is_named_with_a_reason(traceable: bool) -> None:
    model = Reached(traceable)
    engine = acdc.Engine(model, torch.zeros(2, 8), choose=False)
    unreached = {"never", "aside.a", "aside.b.0"}
    if not traceable:  # then only calls of modules are seen
        unreached.add("only_weight")
    missed = {n for n, why in engine.refused.items() if "the example does not reach it" in why}
    assert missed == unreached
    engine.compress(sparse(model))
    others = set(engine.choices) | unreached
    if traceable:
        assert "only_weight" in engine.choices
        assert (
            "part of whole, which is called as a whole (it has hooks" in engine.refused["whole.0"]
        )
        others.add("whole.0")
    assert {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} == others
    assert set(engine.choices).isdisjoint(engine.refused)
    assert [line.split()[0] for line in engine.table().splitlines()[1:]] == [
        *engine.choices, *engine.refused,
    ]  # fmt: skip


def test_a_layer_that_only_another_mode_reaches_is_refused_no_more_once_it_runs() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return self.head(x.tanh()) if self.training else x

    model = Auxiliary().eval()
    engine = acdc.Engine(model, torch.zeros(2, 8), choose=False)
    assert list(engine.refused) == ["head"]
    model.train()
    engine.compress(sparse(model))
    assert list(engine.choices) == ["body", "head"]
    assert not engine.refused


# --- graphs ---------------------------------------------------------------------------------------


def test_two_forwards_before_their_backwards() -> None:
    model, plain, _ = on_engine()
    for m in (model, plain):
        first, second = loss_of(m, 6), loss_of(m, 9)
        second.backward()
        first.backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        same(p.grad, q.grad * (p.grad != 0))


def test_a_graph_that_is_kept_goes_back_twice_and_one_that_is_not_refuses() -> None:
    model, plain, _ = on_engine()
    for m in (model, plain):
        loss = loss_of(m)
        loss.backward(retain_graph=True)
        loss.backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        same(p.grad, q.grad * (p.grad != 0))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss_of(model).backward(), loss.backward()


def test_a_gradient_penalty_is_pytorchs_and_leaves_the_frame_to_the_next_step(
    ran: list[int],
) -> None:
    """More in ``test_engine_modes.py``."""
    model, plain, _ = on_engine()
    found = []
    for m in (model, plain):
        weight = m.get_submodule("layer1.0.conv1").weight
        (grad,) = torch.autograd.grad(loss_of(m), weight, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), weight)[0] * (weight != 0))
    same(*found)
    assert ran
    same(loss_of(model), loss_of(plain))


def test_weights_that_move_before_the_way_back_raise() -> None:
    model, *_ = on_engine()
    loss = loss_of(model)
    with torch.no_grad():
        model.get_submodule("layer1.0.conv1").weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_that_is_computed_again_for_the_way_back(reentrant: bool, ran: list[int]) -> None:
    model, plain, engine = on_engine()
    x, y = batch()
    for m in (model, plain):
        start = x.clone().requires_grad_()
        out = checkpoint(m, start, use_reentrant=reentrant)
        F.cross_entropy(out, y).backward()
        m.start = start.grad
    assert len(ran) == 4  # two segments, twice
    same(model.start, plain.start)
    assert engine.active
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        mask = sparse(net()).get(name, torch.ones_like(q) > 0)
        same(p.grad, q.grad * mask)
        assert p.grad.any()
    for p, q in zip(model.buffers(), plain.buffers(), strict=True):
        same(p, q)


def test_a_loss_that_is_dropped_gives_its_buffers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    allocate = memory.allocate
    monkeypatch.setattr(memory, "allocate", lambda *a: made.append(1) or allocate(*a))
    model, *_ = on_engine()
    for _ in range(5):
        loss_of(model)
    first, losses = len(made), []
    for _ in range(5):
        loss_of(model)
        losses.append(loss_of(model))  # held on to, as a loop does until its next step
        losses[-1].backward()
    assert len(made) == first


# --- the choice -----------------------------------------------------------------------------------


def measured(dense_ms: float, sparse_ms: float) -> Callable[..., Choice]:
    return lambda *a: Choice(True, a[3], dense_ms, sparse_ms, 0.1)


def test_where_no_layer_gains_nothing_is_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choice, "measure", measured(1.0, 2.0))
    caplog.set_level(logging.INFO, "acdc.engine")
    model = net()
    engine = acdc.Engine(model, batch()[0])
    engine.compress(sparse(model))
    assert not engine.active
    assert "forward" not in vars(model)
    assert not any(c.sparse for c in engine.choices.values())
    assert "layer1.0.conv1" in caplog.text


def test_choices_that_were_loaded_are_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "measure", measured(1e6, 1.0))
    model = net()
    engine = acdc.Engine(model, batch()[0])
    engine.compress(sparse(model))
    assert engine.active
    state = engine.state_dict()

    def never(*_: object) -> None:
        raise AssertionError("it was measured again")

    monkeypatch.setattr(choice, "measure", never)
    other = net()
    resumed = acdc.Engine(other, batch()[0])
    resumed.load_state_dict(state)
    resumed.compress(sparse(other))
    assert resumed.active
    assert resumed.choices == engine.choices


def test_a_network_that_became_much_sparser_is_measured_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A gradual method is nearly dense after its first cut, when no layer gains."""
    seen: list[float] = []

    def gains_below_half(*given: Any) -> Choice:
        seen.append(given[3])
        return Choice(given[3] < 0.5, given[3], 1e6, 1.0 if given[3] < 0.5 else 2e6, 0.1)

    monkeypatch.setattr(choice, "measure", gains_below_half)
    model = net()
    engine = acdc.Engine(model, batch()[0])
    masks = sparse(model)

    def cut_to(density: float) -> None:
        for name, mask in masks.items():
            ranks = torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(0))
            masks[name] = (ranks < density * mask.numel()).reshape(mask.shape)
        engine.compress(masks)

    cut_to(0.9)
    assert seen
    assert not engine.active
    measured_once = len(seen)
    for density in (0.85, 0.7, 0.61):
        cut_to(density)
    assert len(seen) == measured_once
    assert not engine.active
    cut_to(0.4)
    assert len(seen) == 2 * measured_once
    assert engine.active
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).masked_fill_(~mask, 0.0)
        model.eval()
        same(model(batch()[0]), type(model).forward(model, batch()[0]))
    cut_to(0.7)  # a share that grows counts, too
    assert not engine.active


def test_what_was_chosen_stays_when_a_graph_of_another_mode_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A checkpoint may have been written in between: later steps compute by its choices."""

    class Probed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.probe = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return x if self.training else self.probe(x)

    monkeypatch.setattr(choice, "measure", measured(2.0, 1.0))
    monkeypatch.setattr(choice, "segment_pays", lambda *_: model.training)
    model = Probed()
    x = torch.randn(2, 8)
    engine = acdc.Engine(model, x)
    engine.compress(sparse(model))
    written = engine.state_dict()["choices"]
    assert [name for name, c in written.items() if c["sparse"]] == ["body"]
    model.eval()(x)
    later = engine.state_dict()["choices"]
    assert {name: c["sparse"] for name, c in later.items()} == {"body": True, "probe": False}
    assert later["body"] == written["body"]


def test_a_layer_is_really_timed_both_ways() -> None:
    model = net()
    engine = acdc.Engine(model, batch()[0])
    engine.compress(sparse(model))
    assert engine.choices
    for c in engine.choices.values():
        assert min(c.dense_ms, c.sparse_ms, c.convert_ms) > 0
    assert choice.table(engine.choices, engine.refused) == engine.table()
    assert len(engine.table().splitlines()) == 1 + len(engine.choices)


def test_equal_layers_are_timed_once_and_long_only_where_it_is_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def engine_with(ms: dict[str, float]) -> tuple[acdc.Engine, list[tuple[str, int]]]:
        calls: list[tuple[str, int]] = []

        def clock(call: Callable[[], object], repeats: int) -> float:
            calls.append((call.__name__, repeats))
            return ms[call.__name__]

        monkeypatch.setattr(timing, "best_ms", clock)
        model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))
        engine = acdc.Engine(model, torch.randn(64, 8, 6, 6))
        masks = {n: torch.rand_like(p) > 0.7 for n, p in model.named_parameters() if p.dim() == 4}
        masks["1.weight"] = masks["0.weight"]
        masks["2.weight"] = torch.zeros_like(masks["0.weight"])  # equal, but for what is kept
        engine.compress(masks)
        return engine, calls

    far = {"conv": 4.0, "passes": 1.0, "convert": 0.5, "both": 0.1}
    engine, calls = engine_with(far)
    assert [c for c in calls if c[0] != "both"] == [
        ("conv", 1),
        ("passes", 1),
        ("convert", 1),
        ("passes", 1),
    ]
    part = 64 / min(64, 2 * engine.backend.lanes)  # of the batch: what it takes is scaled
    assert {c.dense_ms for c in engine.choices.values()} == {4.0 * part}

    engine, calls = engine_with(far | {"passes": 3.0})
    assert sum(repeats for name, repeats in calls if name == "conv") > 1
    assert {c.dense_ms for c in engine.choices.values()} == {4.0}


# --- under a sparsifier ---------------------------------------------------------------------------


def make(which: str, model: nn.Module) -> torch.optim.Optimizer:
    if which == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    return torch.optim.AdamW(model.parameters(), lr=0.003)


class Run:
    def __init__(self, which: str, engine: bool) -> None:
        self.model = net()
        self.optimizer = make(which, self.model)
        method = acdc.ACDC(acdc.Unstructured(0.7), SCHEDULE)
        self.engine = acdc.Engine(self.model, batch()[0], choose=False) if engine else None
        self.sparsifier = acdc.Sparsifier(method, self.model, self.optimizer, engine=self.engine)
        self.kept: list[acdc.Support] = []

    def step(self, index: int) -> float:
        x, y = batch(6, 10 + index)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.kept.append(self.sparsifier.support)
        return loss.item()

    def states(self) -> list[dict]:
        return copy.deepcopy(
            [s.state_dict() for s in (self.model, self.optimizer, self.sparsifier)]
        )

    def load(self, states: list[dict]) -> None:
        for part, state in zip((self.model, self.optimizer, self.sparsifier), states, strict=True):
            part.load_state_dict(state)


@pytest.mark.parametrize("which", ["sgd", "adamw"])
def test_a_whole_cycle_agrees_with_masked_dense(which: str) -> None:
    on, off = Run(which, True), Run(which, False)
    for index in range(TOTAL):
        dense = on.sparsifier.phase.kind == "dense"
        assert on.engine is not None
        assert on.engine.active is not dense
        assert on.step(index) == pytest.approx(off.step(index), rel=1e-7)
        if index == CUTS[0] - 1:  # the first compression: dense steps until here are plain PyTorch
            for name, mask in on.kept[-1].items():
                assert torch.equal(mask, off.kept[-1][name])
            for p, q in zip(on.model.parameters(), off.model.parameters(), strict=True):
                assert torch.equal(p, q)


def test_resuming_inside_a_sparse_phase_is_bitwise_the_run_that_did_not_stop() -> None:
    stop = CUTS[0] + 1
    whole, first, second = (Run("sgd", True) for _ in range(3))
    for index in range(stop):
        first.step(index)
    second.load(first.states())
    for index in range(TOTAL):
        whole.step(index)
    for index in range(stop, TOTAL):
        second.step(index)
    for p, q in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_support_that_changes_often(ran: list[int]) -> None:
    model, plain, engine = on_engine()
    for seed in range(3, 8):
        model.load_state_dict(net().state_dict())
        plain.load_state_dict(net().state_dict())
        masks = sparse(model, 0.3, seed)
        sparse(plain, 0.3, seed)
        engine.compress(masks)
        model.zero_grad()
        plain.zero_grad()
        ran.clear()
        for m in (model, plain):
            loss_of(m).backward()
        assert ran
        for name, p in model.named_parameters():
            grad = plain.get_parameter(name).grad
            same(p.grad, grad * masks[name] if name in masks else grad)


def test_a_later_compression_computes_in_the_buffers_of_the_first() -> None:
    model, _, engine = on_engine()

    def buffers() -> list[memory.Arena]:
        runs = [run for host in engine._hosts for run in host.segments()]
        return [arena for run in runs for free in run._free.values() for arena in free]

    loss_of(model).backward()
    first, late = buffers(), loss_of(model)  # whose graph lives on
    masks = sparse(model, 0.8, seed=3)
    plain = copy.deepcopy(model)
    engine.compress(masks)
    assert first
    del late
    assert not buffers()  # what was out goes with its old lists
    used = []
    for _ in range(2):
        engine.compress(masks)
        for each in (model, plain):
            each.zero_grad()
            loss_of(each).backward()
        for (name, p), want in zip(model.named_parameters(), plain.parameters(), strict=True):
            same(p.grad, want.grad * masks.get(name, torch.ones_like(p)))
        used.append(buffers())
    assert used[0]
    assert used[1] == used[0]
    engine.decompress()
    assert not buffers()


def test_an_engine_of_another_model_is_refused() -> None:
    model = net()
    method = acdc.ACDC(acdc.Unstructured(0.7), SCHEDULE)
    with pytest.raises(InputError, match="made for another model"):
        acdc.Sparsifier(
            method, model, make("sgd", model), engine=acdc.Engine(net(), batch()[0], choose=False)
        )


# --- what is not timed, and what is freed ---------------------------------------------------------


def test_the_lists_of_layers_that_stay_dense_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        choice,
        "time_layer",
        lambda layer, *_: LayerTimes(1.0, 9.0 if layer.name == "1" else 0.1, 0.01),
    )
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    masks = {f"{i}.weight": torch.rand(8, 8) < 0.4 for i in range(3)}
    cut(net, masks)
    engine = acdc.Engine(net, torch.randn(4, 8))
    engine.compress(masks)
    assert {name: c.sparse for name, c in engine.choices.items()} == {
        "0": True, "1": False, "2": True,
    }  # fmt: skip
    assert {name for name, *_ in engine._plans._made} == {"0", "2"}


def test_a_large_linear_layer_that_is_not_pruned_stays_dense_without_a_timing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed: list[str] = []

    def time_layer(layer: Candidate, *_: Any) -> LayerTimes:
        timed.append(layer.name)
        return LayerTimes(1.0, 0.1, 0.01)

    monkeypatch.setattr(choice, "time_layer", time_layer)
    net = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 8))
    masks = {"0.weight": torch.rand(256, 256) < 0.1}
    cut(net, masks)
    engine = acdc.Engine(net, torch.randn(4, 256))
    engine.compress(masks)
    assert timed == ["0", "2"]  # the last one is small
    assert not engine.choices["1"].sparse
    assert engine.choices["1"].dense_ms is None
    engine.table()


def test_a_module_that_is_no_graph_in_training_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """The engine is made in evaluation mode, in which the forward is a graph."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return x if not self.training or x.sum() > 0 else -x

    caplog.set_level(logging.WARNING, "acdc.engine")
    net = Net().eval()
    engine = acdc.Engine(net, torch.randn(4, 8), choose=False)
    net.train()
    masks = {"layer.weight": torch.rand(8, 8) < 0.4}
    cut(net, masks)
    engine.compress(masks)
    assert not engine.active
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("Net runs on plain PyTorch: Net.forward is no fixed graph")


def test_a_part_with_a_forward_of_its_own_is_called_by_it(caplog: pytest.LogCaptureFixture) -> None:
    """The user replaced it after the parts were found. A call in parts must not take it away."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, given: Any = None) -> Tensor:
            return self.b(self.a(x))

    net, x = Net(), torch.randn(4, 8)
    masks = {f"{name}.weight": torch.rand(8, 8) < 0.4 for name in ("a", "b")}
    cut(net, masks)
    engine = acdc.Engine(net, x, choose=False)
    engine.compress(masks)
    with torch.no_grad():
        before = net(x, object())  # in parts
        net.a.forward = lambda x: 2 * x  # type: ignore[method-assign]
        torch.testing.assert_close(net(x, object()), net.b(2 * x))
        del net.a.forward
        torch.testing.assert_close(net(x, object()), before)
    assert [r.getMessage() for r in caplog.records] == [
        "Net runs in parts: its argument 'given' is a object."
    ]
