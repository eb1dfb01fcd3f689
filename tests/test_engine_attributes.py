"""Something that a graph was traced from is changed between two calls of a sparse phase.

A traced forward has the values of attributes in it. Every call must give what plain PyTorch gives
with the values that the network has then.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.utils.checkpoint import checkpoint

import acdc
from acdc.engine.guards import CALLS, VARIANTS
from support.engine_nets import Written

Change = Callable[[Any], None]


def x_of(seed: int = 0) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))


def on_engine(model: nn.Module, example: Tensor | None = None) -> tuple[nn.Module, nn.Module]:
    """Return a network in a sparse phase, and a plain copy."""
    torch.manual_seed(0)
    masks = {}
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            masks[name] = torch.rand(weight.shape) < 0.3
            weight.data[~masks[name]] = 0
    plain = copy.deepcopy(model)
    engine = acdc.Engine(model, x_of() if example is None else example, choose=False)
    engine.compress(masks)
    return model, plain


def agree(model: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Check results and gradients, with the same random numbers."""
    found = []
    for network in (model, plain):
        torch.manual_seed(3)
        network.zero_grad()
        given = x.clone().requires_grad_()
        out = network(given)
        out.square().sum().backward()
        grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        found.append((out, given.grad, grads))
    (got, dx, grads), (want, want_dx, wanted) = found
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dx, want_dx, rtol=1e-4, atol=1e-5)
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        kept = 1 if grad.dim() == 1 else (model.get_parameter(name) != 0)
        torch.testing.assert_close(grad * kept, wanted[name] * kept, rtol=1e-4, atol=1e-5)


def net(forward: Callable[..., Any], **attributes: Any) -> nn.Module:
    """Return two linear layers with a forward of the test, and these attributes."""
    model = Written(forward, one=nn.Linear(8, 12), two=nn.Linear(12, 8))
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def chain(middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), middle, nn.Linear(12, 8))


def attribute(name: str, value: Any, of: str = "") -> Change:
    return lambda model: setattr(model.get_submodule(of), name, value)


def replaced(name: str, value: nn.Module) -> Change:
    path, _, last = name.rpartition(".")
    return lambda model: setattr(model.get_submodule(path), last, value)


@dataclass(slots=True)
class Slots:
    """An object without a dictionary."""

    scale: float


class Masked(nn.Module):
    """A buffer that may be None."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 12), nn.Linear(12, 8)
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(x if self.mask is None else x * self.mask)


class Drops(nn.Module):
    """A dropout by the function of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.p = 0.1

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)


class Scales(nn.Module):
    """Multiplies by what a method reads, or a property of another object."""

    def __init__(self) -> None:
        super().__init__()
        self.config = argparse.Namespace(scale=2.0)
        self.settings = {"scale": [1.0, 2.0]}

    @property
    def scale(self) -> float:
        return float(self.config.scale * self.settings["scale"][-1])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def grow(model: Any) -> None:
    model[1].settings["scale"].append(5.0)


CASES: dict[str, tuple[Callable[[], nn.Module], Change]] = {
    "nn.Dropout": (lambda: chain(nn.Dropout(0.1)), attribute("p", 0.7, "1")),
    "nn.Dropout off": (lambda: chain(nn.Dropout(0.1)), attribute("p", 0.0, "1")),
    "nn.Dropout on": (lambda: chain(nn.Dropout(0.0)), attribute("p", 0.5, "1")),
    "nn.Dropout of everything": (lambda: chain(nn.Dropout(0.1)), attribute("p", 1.0, "1")),
    "F.dropout": (lambda: chain(Drops()), attribute("p", 0.7, "1")),
    "F.dropout off": (lambda: chain(Drops()), attribute("p", 0.0, "1")),
    "a factor": (
        lambda: net(lambda m, x: m.two(m.one(x) * m.scale), scale=2.0), attribute("scale", 3.0)
    ),
    "None": (
        lambda: net(lambda m, x: m.two(m.one(x) * (m.scale or 1.0)), scale=None),
        attribute("scale", 3.0),
    ),
    "a branch": (
        lambda: net(lambda m, x: m.two(m.one(x).relu() if m.kind == "relu" else m.one(x)),
                    kind="relu"),
        attribute("kind", "none"),
    ),
    "a function": (
        lambda: net(lambda m, x: m.two(m.act(m.one(x))), act=F.gelu), attribute("act", F.silu)
    ),
    "an object": (lambda: chain(Scales()), lambda m: setattr(m[1].config, "scale", 7.0)),
    "another object": (
        lambda: chain(Scales()), lambda m: setattr(m[1], "config", argparse.Namespace(scale=7.0))
    ),
    "a list in a dictionary": (lambda: chain(Scales()), grow),
    "an object in an object": (
        lambda: net(lambda m, x: m.two(m.one(x) * m.cfg.model.scale),
                    cfg=argparse.Namespace(model=argparse.Namespace(scale=2.0))),
        lambda m: setattr(m.cfg.model, "scale", 7.0),
    ),
    "an object in a list": (
        lambda: net(lambda m, x: m.two(m.one(x) * m.cfg[0].scale),
                    cfg=[argparse.Namespace(scale=2.0)]),
        lambda m: setattr(m.cfg[0], "scale", 7.0),
    ),
    "an object with slots": (
        lambda: net(lambda m, x: m.two(m.one(x) * m.cfg.scale), cfg=Slots(2.0)),
        lambda m: setattr(m.cfg, "scale", 7.0),
    ),
    "True for 1": (
        lambda: net(lambda m, x: m.two(m.one(x) * (3 if m.flag is True else 2)), flag=1),
        attribute("flag", True),
    ),
    "a float for an integer": (
        lambda: net(lambda m, x: m.two(m.one(x) * (3 if isinstance(m.n, float) else 2)), n=2),
        attribute("n", 2.0),
    ),
    "a buffer that was None": (
        lambda: Masked(), lambda m: setattr(m, "mask", torch.linspace(0, 1, 12))
    ),
    "a buffer that is new": (
        lambda: net(lambda m, x: m.two(m.one(x) * (3 if hasattr(m, "extra") else 2))),
        lambda m: m.register_buffer("extra", torch.ones(1)),
    ),
    "nn.Dropout from nothing to all": (
        lambda: chain(nn.Dropout(0.0)), attribute("p", 1.0, "1")
    ),
    "another class": (lambda: chain(nn.ReLU()), attribute("__class__", nn.Tanh, "1")),
    "an attribute is deleted": (
        lambda: net(lambda m, x: m.two(m.one(x) * getattr(m, "scale", 1.0)), scale=2.0),
        lambda m: delattr(m, "scale"),
    ),
    "an attribute is new": (
        lambda: net(lambda m, x: m.two(m.one(x) * getattr(m, "scale", 1.0))),
        attribute("scale", 2.0),
    ),
    "an activation is replaced": (lambda: chain(nn.ReLU()), replaced("1", nn.GELU())),
    "a dropout is replaced": (lambda: chain(nn.Dropout(0.1)), replaced("1", nn.Dropout(0.7))),
    "an activation goes": (lambda: chain(nn.ReLU()), replaced("1", nn.Identity())),
    "the kind of an activation": (lambda: chain(nn.GELU()), attribute("approximate", "tanh", "1")),
    "a norm": (lambda: chain(nn.LayerNorm(12)), attribute("eps", 3.0, "1")),
    "a module is appended": (
        lambda: chain(nn.ReLU()), lambda m: m.add_module("3", nn.Tanh())  # type: ignore[operator]
    ),
    "a module is deleted": (lambda: chain(nn.ReLU()), lambda m: m.__delitem__(1)),
    "a list of modules": (
        lambda: net(lambda m, x: m.two(m.held[0](m.one(x))), held=[nn.ReLU()]),
        lambda m: m.held.__setitem__(0, nn.Tanh()),
    ),
    "a layer that is replaced": (lambda: chain(nn.ReLU()), replaced("2", nn.Linear(12, 8))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_change_between_two_calls(name: str, ran: list[int]) -> None:
    make, change = CASES[name]
    model, plain = on_engine(make().train())
    agree(model, plain, x_of(1))
    assert ran
    for network in (model, plain):
        torch.manual_seed(5)
        change(network)
    if name == "a layer that is replaced":
        plain[2].load_state_dict(model[2].state_dict())  # type: ignore[index]
    ran.clear()
    for seed in (2, 3):
        agree(model, plain, x_of(seed))
    # The support knows nothing of a new weight.
    assert bool(ran) == (name != "a layer that is replaced")


def test_the_memory_of_weights_is_channels_last_in_the_middle_of_a_phase(ran: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    x, masks, plain = torch.randn(4, 3, 8, 8), {}, copy.deepcopy(model)
    for number in ("0", "2"):
        weight = model[int(number)].weight.data
        masks[f"{number}.weight"] = torch.rand(weight.shape) < 0.3
        for network in (model, plain):
            network[int(number)].weight.data[~masks[f"{number}.weight"]] = 0
    engine = acdc.Engine(model, x, choose=False)
    engine.compress(masks)
    agree(model, plain, x)
    for network in (model, plain):
        network.to(memory_format=torch.channels_last)
    agree(model, plain, x)  # on plain PyTorch
    ran.clear()
    engine.compress(masks)
    agree(model, plain, x)
    assert ran


@pytest.mark.parametrize("kind", ["kernel", "stride", "pool", "p of images"])
def test_a_change_of_a_network_for_images(kind: str, ran: list[int]) -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Dropout(0.2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        )  # fmt: skip

    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model, plain = on_engine(make(), x)
    agree(model, plain, x)
    for network in (model, plain):
        layers: Any = network
        if kind == "kernel":
            layers[5].padding = (0, 0)
        elif kind == "stride":
            layers[5].stride = (2, 2)
        elif kind == "pool":
            layers[3].kernel_size = 4
        else:
            layers[4].p = 0.6
    ran.clear()
    agree(model, plain, x)
    assert ran


def test_the_forward_of_a_class_is_replaced(
    ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As notebooks do it, where a cell with the class is executed again."""
    model, plain = on_engine(chain(Scales()))
    agree(model, plain, x_of(1))
    monkeypatch.setattr(Scales, "forward", lambda self, x: x * 7)
    ran.clear()
    agree(model, plain, x_of(2))
    assert ran


def test_a_batch_norm_that_leaves_its_statistics(ran: list[int]) -> None:
    model, plain = on_engine(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)),
        torch.randn(4, 3, 8, 8),
    )
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    agree(model, plain, x)
    for network in (model, plain):
        network[1].track_running_stats = False  # type: ignore[index]
    ran.clear()
    for _ in range(2):
        agree(model, plain, x)
    assert ran
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer)


@pytest.mark.parametrize("when", ["before the phase", "in the phase"])
def test_a_forward_that_somebody_has_wrapped(when: str) -> None:
    """As accelerate wraps it for autocast: the wrapper is called, and stays when the phase ends."""
    model = chain(nn.ReLU())
    masks = {"0.weight": torch.rand(12, 8) < 0.3}
    model[0].weight.data[~masks["0.weight"]] = 0  # type: ignore[index]
    engine = acdc.Engine(model, x_of(), choose=False)
    if when == "in the phase":
        engine.compress(masks)
    wanted = 2 * model(x_of(1))
    inner = model.forward
    wrapper = model.forward = lambda x: 2 * inner(x)  # type: ignore[assignment, method-assign]
    for _ in range(2):
        engine.compress(masks)
        torch.testing.assert_close(model(x_of(1)), wanted)
        engine.decompress()
        torch.testing.assert_close(model(x_of(1)), wanted)
    assert model.forward is wrapper


def test_the_example_fits_no_longer(ran: list[int], caplog: pytest.LogCaptureFixture) -> None:
    """A call in parts needs to know what the parts are called with, from the example."""

    def forward(m: Any, x: Any) -> Tensor:
        if m.pairs:
            x, _ = x
        return m.two(m.one(x))

    model, plain = on_engine(net(forward, pairs=False))
    agree(model, plain, x_of(1))
    for network in (model, plain):
        network.pairs = True  # type: ignore[assignment]
    torch.testing.assert_close(model((x_of(1), object())), plain((x_of(1), object())))
    assert "the example of the engine" in caplog.text


def test_a_single_layer(ran: list[int]) -> None:
    """The graph of a layer by itself holds a copy of the layer."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.one(x) if x.sum() > 1e9 else m.two(m.one(x))  # no fixed graph

    model, plain = on_engine(net(forward))
    agree(model, plain, x_of(1))
    assert ran
    for network in (model, plain):
        network.one.bias = None  # type: ignore[assignment]
    agree(model, plain, x_of(2))


def test_what_the_forward_does_not_read_may_change(ran: list[int], traces: list[str]) -> None:
    model, plain = on_engine(net(lambda m, x: m.two(m.one(x)), calls=0))
    agree(model, plain, x_of())
    traces.clear()
    for step in range(10):
        model.calls = step  # type: ignore[assignment]
        model.new = step  # type: ignore[assignment]
        agree(model, plain, x_of(step))
    assert not traces


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that were traced."""
    from acdc.engine import host

    found: list[str] = []
    trace = host.trace
    monkeypatch.setattr(
        host, "trace", lambda root, *a: found.append(type(root).__name__) or trace(root, *a)
    )
    return found


def test_a_value_that_comes_back_is_not_traced_again(ran: list[int], traces: list[str]) -> None:
    """Several tasks take turns: each has a graph."""
    model, plain = on_engine(net(lambda m, x: m.two(m.one(x) * m.task), task=1.0))
    traces.clear()
    for step in range(12):
        for network in (model, plain):
            network.task = float(step % 3)  # type: ignore[assignment]
        ran.clear()
        agree(model, plain, x_of(step))
        assert ran
    assert len(traces) == 3 - 1  # the first one was traced with the example


def test_a_value_that_changes_with_every_call(
    ran: list[int], traces: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The module is not traced forever: its parts run sparse."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.two(m.one(x) * m.scale)

    model, plain = on_engine(net(forward, scale=1.0))
    traces.clear()
    with caplog.at_level(logging.INFO):
        for step in range(3 * VARIANTS):
            for network in (model, plain):
                network.scale = 1.0 + step  # type: ignore[assignment]
            ran.clear()
            agree(model, plain, x_of(step))
            assert ran
    assert traces.count("Written") <= VARIANTS
    assert "'scale'" in caplog.text


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_asks_whether_gradients_are_computed(
    training: bool, ran: list[int], traces: list[str]
) -> None:
    factor = {True: 2.0, False: 3.0}
    made = net(lambda m, x: m.two(m.one(x) * factor[torch.is_grad_enabled()]))
    model, plain = on_engine(made.train(training))
    traced = []
    for seed in range(3):
        agree(model, plain, x_of(seed))
        ran.clear()
        with torch.no_grad():
            torch.testing.assert_close(model(x_of(seed)), plain(x_of(seed)))
        assert ran
        traced.append(len(traces))
    assert traced[0] == traced[-1]


def test_a_value_that_changes_now_and_then(
    ran: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Such as a factor that a schedule changes after each epoch."""
    model, plain = on_engine(net(lambda m, x: m.two(m.one(x) * m.scale), scale=1.0))
    for epoch in range(2 * VARIANTS):
        for network in (model, plain):
            network.scale = 1.0 + epoch  # type: ignore[assignment]
        with torch.no_grad():
            for _ in range(CALLS):
                model(x_of())
        ran.clear()
        agree(model, plain, x_of(epoch))
        assert ran
    assert "in parts" not in caplog.text


def test_a_dropout_with_a_schedule_is_not_traced_again(traces: list[str]) -> None:
    model, plain = on_engine(chain(nn.Dropout(0.1)))
    agree(model, plain, x_of())
    traces.clear()
    for step in range(20):
        for network in (model, plain):
            network[1].p = 0.04 * (step + 1)  # type: ignore[index]
        agree(model, plain, x_of(step))
    assert not traces


# --- hooks of all modules -------------------------------------------------------------------------


@pytest.fixture
def seen() -> Iterator[list[str]]:
    """The modules that a hook of all modules has seen."""
    found: list[str] = []
    handle = hooks_of_all.register_module_forward_hook(
        lambda module, args, out: found.append(type(module).__name__)
    )
    yield found
    handle.remove()


def test_a_hook_of_all_modules_sees_every_call(seen: list[str], ran: list[int]) -> None:
    model, plain = on_engine(chain(nn.Dropout(0.1)))
    seen.clear()
    agree(model, plain, x_of())
    assert seen == 2 * ["Linear", "Dropout", "Linear", "Sequential"]


def test_without_hooks_the_kernels_compute_again(ran: list[int]) -> None:
    model, plain = on_engine(chain(nn.ReLU()))
    seen: list[str] = []
    for register in (
        hooks_of_all.register_module_forward_hook,
        hooks_of_all.register_module_forward_pre_hook,
        hooks_of_all.register_module_full_backward_hook,
        hooks_of_all.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda module, *_: seen.append(type(module).__name__))
        ran.clear()
        seen.clear()
        agree(model, plain, x_of())
        handle.remove()
        assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
        assert not ran
        agree(model, plain, x_of())
        assert ran


# --- parameters that no kernel reads --------------------------------------------------------------


class Positions(nn.Module):
    """Parameters of its own between layers, as in a ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 12), nn.Linear(12, 8)
        self.positions = nn.Parameter(torch.randn(12))
        self.gain = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.two((self.one(x) + self.positions).relu())) * self.gain


@pytest.mark.parametrize("names", [("gain",), ("positions", "gain"), ("gain", "one.bias")])
@pytest.mark.parametrize("as_parameter", [False, True])
def test_functional_call(names: tuple[str, ...], as_parameter: bool, ran: list[int]) -> None:
    model, plain = on_engine(Positions())
    x = x_of(1)
    agree(model, plain, x)
    found = []
    for network in (model, plain):
        given = {name: 2 * network.get_parameter(name).detach() for name in names}
        if as_parameter:
            given = {name: nn.Parameter(value) for name, value in given.items()}
        for value in given.values():
            value.requires_grad_()
        out = torch.func.functional_call(network, given, (x,))
        found.append((out, *torch.autograd.grad(out.sum(), list(given.values()))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    ran.clear()
    agree(model, plain, x)
    assert ran
    assert dict(model.named_parameters()).keys() == dict(plain.named_parameters()).keys()


def test_a_parameter_is_assigned(ran: list[int]) -> None:
    model, plain = on_engine(Positions())
    agree(model, plain, x_of(1))
    for network in (model, plain):
        network.gain = nn.Parameter(torch.full((8,), 3.0))
    ran.clear()
    agree(model, plain, x_of(1))
    assert ran  # the layers have their weights still
    for network in (model, plain):
        network.gain = nn.Parameter(torch.full((), 2.0))  # of another shape
    agree(model, plain, x_of(1))


# --- a part that is called once more in the backward pass -----------------------------------------


class Checkpointed(nn.Module):
    """Blocks that may be put under checkpoints, and an argument that no graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.reentrant: bool | None = None
        self.blocks = nn.ModuleList(chain(nn.Dropout(0.2)) for _ in range(3))

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("calls", [1, 2])
def test_checkpoints_where_the_parts_run_sparse(
    reentrant: bool, calls: int, ran: list[int]
) -> None:
    """A call with an object runs in parts, and the backward pass calls the parts once more."""
    model, plain = on_engine(Checkpointed())
    found = []
    for network in (model, plain):
        network.reentrant = reentrant  # type: ignore[assignment]
        torch.manual_seed(1)
        x = x_of(2).requires_grad_()
        loss = sum(network(x, object()).square().sum() for _ in range(calls))
        loss.backward()
        found.append((loss, x.grad))
    assert len(ran) == 2 * 3 * calls
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    ran.clear()
    agree(model, plain, x_of(4))  # a call that a graph could hold, if it had no checkpoints
    assert ran


# --- models of transformers -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_model_of_transformers_is_traced_in_the_first_step_only(
    kind: str, traces: list[str]
) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64,
    }  # fmt: skip
    if kind == "bert":
        model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, use_cache=False))
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids, "labels": ids}
    masks = {
        name: torch.rand(p.shape) < 0.3
        for name, p in model.named_parameters()
        if "layer" in name and p.dim() == 2
    }
    engine = acdc.Engine(model, example, choose=False)
    engine.compress(masks)
    for step in range(3):
        traces.clear()
        for mode in (True, False):
            model.train(mode)(**example).loss.backward()
        assert bool(traces) == (step == 0)
