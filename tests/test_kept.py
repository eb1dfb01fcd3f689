"""Steps on kept elements alone, against masked dense steps: the same numbers and objects."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from acdc.engine import native
from acdc.engine.engine import Engine
from acdc.engine.gradients import LARGE
from acdc.engine.kept import clear, expand, gather
from acdc.hooks.kept_rules import stepped
from acdc.hooks.kept_steps import ELEMENTWISE, pays
from acdc.hooks.kept_weight import KeptState, KeptWeight
from acdc.methods.acdc import ACDC
from acdc.methods.base import Method, Reset
from acdc.methods.gmp import GMP
from acdc.methods.rigl import RigL
from acdc.methods.set_ import SET
from acdc.pattern import Unstructured
from acdc.schedule import constant
from acdc.sparsifier import Sparsifier
from support.helpers import (
    CUTS,
    SCHEDULE,
    TOTAL,
    Net,
    backward,
    batch,
    build,
    copied,
    dropped,
    is_plus_zero,
    same,
)

O = torch.optim  # noqa: E741
WD = {"weight_decay": 1e-2}
Factory = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (O.SGD, {"lr": 0.1}),
    "momentum": (O.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
    "nesterov": (O.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, **WD}),
    "sgd-foreach": (O.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True, **WD}),
    "adam": (O.Adam, {"lr": 0.01, **WD}),
    "adam-foreach": (O.Adam, {"lr": 0.01, "foreach": True, **WD}),
    "adamw": (O.AdamW, {"lr": 0.01, "amsgrad": True, "maximize": True, **WD}),
    "sgd-fused": (O.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "fused": True, **WD}),
    "adam-fused": (O.Adam, {"lr": 0.01, "fused": True, **WD}),
    "adamw-fused": (O.AdamW, {"lr": 0.01, "amsgrad": True, "fused": True, **WD}),
    "nadam": (O.NAdam, {"lr": 0.01, **WD}),
    "radam": (O.RAdam, {"lr": 0.01, **WD}),
    "adamax": (O.Adamax, {"lr": 0.01, **WD}),
    "rmsprop": (O.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True, **WD}),
    "adadelta": (O.Adadelta, {"lr": 1.0, **WD}),
}
every_optimizer = pytest.mark.parametrize("which", OPTIMIZERS)
# Single operations round otherwise.
CLOSE = {"rtol": 1e-5, "atol": 5e-6}


def factory(which: str) -> Factory:
    """Build the optimizer over two parameter groups with different options."""
    kind, options = OPTIMIZERS[which]

    def make(model: nn.Module) -> torch.optim.Optimizer:
        params = list(model.parameters())
        lr = options["lr"]
        groups = [{"params": params[3:]}, {"params": params[:3], "lr": lr / 2}]
        return kind(groups, **options)  # type: ignore[call-arg]

    return make


class Run:
    """A network, its optimizer and its sparsifier, with or without steps on kept elements."""

    def __init__(
        self,
        make: Factory,
        kept: bool,
        reset: Reset = "all",
        change: Callable[[nn.Module], nn.Module] = lambda model: model,
    ) -> None:
        self.model = change(build(Net))
        self.optimizer = make(self.model)
        self.engine = Engine(self.model, torch.zeros(8, 3, 4, 4), choose=False)
        method = ACDC(Unstructured(0.8), SCHEDULE, reset=reset)
        self.sparsifier = Sparsifier(method, self.model, self.optimizer, engine=self.engine)
        (self.steps,) = self.sparsifier._masking._kept_steps
        self.steps._worth = lambda *_: kept

    def states(self) -> tuple[Any, Any, Any]:
        parts = self.model, self.optimizer, self.sparsifier
        return tuple(copied(part.state_dict()) for part in parts)  # type: ignore[return-value]

    def load(self, states: tuple[Any, Any, Any]) -> None:
        for part, state in zip((self.model, self.optimizer, self.sparsifier), states, strict=True):
            part.load_state_dict(state)

    def step(self, index: int, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)
        backward(self.model, index)
        self.optimizer.step()

    @property
    def is_kept(self) -> bool:
        """Whether the last step was on kept elements alone."""
        params = self.sparsifier.params.values()
        return bool(self.steps._weights) and all(self.steps.left_zeros(p) for p in params)


def compare(kept: Run, plain: Run) -> None:
    """Assert that all weights are equal, and the state inside the support."""
    for (name, a), b in zip(
        kept.model.state_dict().items(), plain.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    names = {id(p): name for name, p in kept.sparsifier.params.items()}
    for a, b in zip(kept.model.parameters(), plain.model.parameters(), strict=True):
        mine, other = kept.optimizer.state.get(a, {}), plain.optimizer.state.get(b, {})
        assert mine.keys() == other.keys()
        mask = kept.sparsifier.support[names[id(a)]] if id(a) in names else torch.ones_like(a) > 0
        for key, value in mine.items():
            if isinstance(value, Tensor) and value.shape == a.shape:
                assert value.stride() == other[key].stride()
                torch.testing.assert_close(value[mask], other[key][mask], **CLOSE)
                assert kept.sparsifier.phase.kind == "dense" or is_plus_zero(value[~mask])
            else:
                assert same(value, other[key])


def without_noise(model: nn.Module) -> nn.Module:
    """Freeze a bias before a BatchNorm: its gradient is nothing but rounding, which differs from
    CPU to CPU, and AdamW makes steps of the learning rate of it.
    """
    model.conv2.bias.requires_grad_(False)
    return model


def both(which: str, **options: Any) -> tuple[Run, Run]:
    return Run(factory(which), True, **options), Run(factory(which), False, **options)


@every_optimizer
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_run_has_the_numbers_of_masked_dense(which: str, set_to_none: bool) -> None:
    kept, plain = both(which, change=without_noise)
    for index in range(TOTAL):
        sparse = not kept.sparsifier.support.is_full
        for run in (kept, plain):
            run.step(index, set_to_none)
        for _, weight, mask in dropped(kept.sparsifier):
            assert is_plus_zero(weight[mask])
            assert weight.grad is not None
            assert weight.grad.shape == weight.shape
        if sparse and index + 1 not in (4,):  # the decompression stopped it
            assert kept.is_kept
        if sparse:
            compare(kept, plain)
        else:
            torch.testing.assert_close(kept.model.state_dict(), plain.model.state_dict(), **CLOSE)
        assert not plain.is_kept


def test_every_kind_is_in_the_table() -> None:
    assert {kind for kind, _ in OPTIMIZERS.values()} == ELEMENTWISE


RULED = {
    "sgd": (O.SGD, {"lr": 0.1}),
    "sgd, decay": (O.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd, dampening": (O.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "sgd, nesterov": (O.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": (O.Adam, {"lr": 0.1, "betas": (0.7, 0.95), "eps": 0.1}),
    "adam, decay": (O.Adam, {"lr": 0.1, "weight_decay": 0.5, "maximize": True}),
    "adamw": (O.AdamW, {"lr": 0.1, "weight_decay": 0.5}),
}


@pytest.mark.parametrize("which", RULED)
def test_a_step_in_one_pass_has_the_numbers_of_pytorch(which: str) -> None:
    if not native.available():
        pytest.skip("the compiled kernels are missing")
    kind, options = RULED[which]
    generator = torch.Generator().manual_seed(0)
    for shape, density in (((7, 5), 0.5), ((64, 33), 0.1), ((300, 1000), 0.05), ((64, 64), 0.0)):
        start, mask = torch.randn(shape, generator=generator), torch.rand(shape) < density
        plain, kept = (nn.Parameter(start * mask) for _ in range(2))
        other, mine = (kind([param], **options) for param in (plain, kept))
        weight, state = KeptWeight(kept, mask), {}
        for step in range(4):
            for param in (plain, kept):
                param.grad = torch.randn(shape, generator=generator.manual_seed(step)) * mask
            other.step()
            plain.detach().mul_(mask)
            if step == 0:  # makes the state
                kept.detach().copy_(plain)
                first = KeptState(weight, other.state[plain]).of_kept()
                state = {key: value.clone() for key, value in first.items()}
                continue
            kept.detach()[~mask] = 5.0  # what is not kept becomes zero
            assert stepped(kind, weight, state, mine.param_groups[0])
            torch.testing.assert_close(kept, plain, rtol=1e-6, atol=1e-6)
            assert is_plus_zero(kept[~mask])
            for key, value in state.items():
                expected = other.state[plain][key]
                expected = expected if value.dim() == 0 else expected[mask]
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@every_optimizer
@pytest.mark.parametrize("stop", [CUTS[0] + 1, CUTS[1] + 2])
def test_resuming_inside_a_sparse_phase_is_the_run_that_did_not_stop(which: str, stop: int) -> None:
    whole, first, second = (Run(factory(which), True) for _ in range(3))
    for index in range(stop):
        first.step(index)
    second.load(first.states())
    for index in range(TOTAL):
        whole.step(index)
    for index in range(stop, TOTAL):
        second.step(index)
    assert same(whole.model.state_dict(), second.model.state_dict())
    assert same(whole.optimizer.state_dict(), second.optimizer.state_dict())


@every_optimizer
def test_the_first_dense_step_is_that_of_a_fresh_optimizer(which: str) -> None:
    run = Run(factory(which), True)
    for index in range(4):
        run.step(index)
    model = copy.deepcopy(run.model)
    fresh = factory(which)(model)
    assert run.sparsifier.support.is_full
    run.step(4)
    backward(model, 4)
    fresh.step()
    assert same(run.model.state_dict(), model.state_dict())
    assert same(run.optimizer.state_dict()["state"], fresh.state_dict()["state"])


READERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "index": lambda state: {key: state[key] for key in state.keys()},  # noqa: SIM118
    "get": lambda state: {key: state.get(key) for key in state},
    "items": lambda state: dict(state.items()),
    "values": lambda state: dict(zip(state, state.values(), strict=True)),
    "dict": dict,
    "unpacked": lambda state: {**state},
    "copy": lambda state: state.copy(),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "or": lambda state: state | {},
    "pop": lambda state: {key: state.pop(key) for key in list(state)},
}


@pytest.mark.parametrize("how", READERS)
@pytest.mark.parametrize("which", ["momentum", "adamw"])
def test_whoever_reads_the_state_finds_tensors_of_the_weights_shape(which: str, how: str) -> None:
    kept, plain = both(which)
    for index in range(3):
        kept.step(index)
        plain.step(index)
    for name, param in kept.sparsifier.params.items():
        mask = kept.sparsifier.support[name]
        state = kept.optimizer.state[param]  # type: ignore[index]
        stored = [v.shape for v in dict.values(state) if v.numel() > 1]
        assert stored == [(int(mask.sum()),)] * len(stored) != []
        found, other = READERS[how](state), plain.optimizer.state[plain.sparsifier.params[name]]  # type: ignore[index]
        assert type(found) is dict
        assert found.keys() == other.keys()
        for key, value in found.items():
            if value.shape == param.shape:
                torch.testing.assert_close(value, other[key] * mask, **CLOSE)
                assert value.stride() == param.stride()
            else:
                assert torch.equal(value, other[key])


def test_a_saved_optimizer_holds_plain_dictionaries(tmp_path: Path) -> None:
    run = Run(factory("adamw"), True)
    for index in range(2):
        run.step(index)
    saved = run.optimizer.state_dict()
    assert {type(each) for each in saved["state"].values()} == {dict}
    torch.save(saved, tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert same(loaded, saved)
    run.step(2)  # of kept elements again
    assert run.is_kept


def test_a_write_through_data_into_the_state_counts() -> None:
    kept, plain = both("momentum")
    for index in range(4):
        for run in (kept, plain):
            run.step(index)
            for state in run.optimizer.state.values():
                state["momentum_buffer"].data.mul_(0.5)
    compare(kept, plain)


def test_a_scaler_that_leaves_unscaling_to_the_step_finds_a_dense_step() -> None:
    kept, plain = both("sgd-fused")
    for run in (kept, plain):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for index in range(3):
            x, y = batch(index)
            run.optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(run.model(x), y)).backward()
            scaler.step(run.optimizer)
            scaler.update()
            assert not run.is_kept
    assert same(kept.model.state_dict(), plain.model.state_dict())
    assert same(kept.optimizer.state_dict(), plain.optimizer.state_dict())


@pytest.mark.parametrize("which", ["nesterov", "adamw"])
def test_with_reset_of_what_enters_all_later_steps_are_the_same(which: str) -> None:
    kept, plain = both(which, reset="entered")
    for index in range(6):
        for run in (kept, plain):
            run.step(index)
        torch.testing.assert_close(kept.model.state_dict(), plain.model.state_dict(), **CLOSE)


def test_without_a_reset_steps_stay_dense() -> None:
    run = Run(factory("momentum"), True, reset="none")
    for index in range(3):
        run.step(index)
    assert not run.steps._weights
    # because the momentum of a pruned weight must be there when it comes back
    other = Run(factory("momentum"), False, reset="none")
    for index in range(3):
        other.step(index)
    assert same(run.optimizer.state_dict(), other.optimizer.state_dict())


@pytest.mark.parametrize(
    "make",
    [
        lambda model: O.Adagrad(model.parameters(), lr=0.1),
        lambda model: type("Mine", (O.SGD,), {})(model.parameters(), lr=0.1),
    ],
    ids=["adagrad", "subclass"],
)
def test_what_is_not_plain_arithmetic_stays_dense(make: Factory) -> None:
    run, other = Run(make, True), Run(make, False)
    for index in range(TOTAL):
        run.step(index)
        other.step(index)
        assert not run.is_kept
    assert same(run.model.state_dict(), other.model.state_dict())


def test_a_closure_runs_once_and_its_loss_comes_back() -> None:
    run, plain = both("momentum")
    calls = []
    for index in range(TOTAL):

        def closure(index: int = index) -> Tensor:
            calls.append(torch.is_grad_enabled())
            run.optimizer.zero_grad()
            return backward(run.model, index)

        loss = run.optimizer.step(closure) if index % 2 else run.optimizer.step(closure=closure)
        assert isinstance(loss, Tensor)
        plain.step(index)
    assert calls == [True] * TOTAL
    assert run.is_kept
    compare(run, plain)


def test_a_later_hook_before_the_step_still_finds_the_gradients() -> None:
    run, plain = both("momentum")
    for index in range(3):
        run.step(index)
        plain.step(index)
    assert run.is_kept

    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        norms.append(nn.utils.clip_grad_norm_(params, 1e-3))
        seen.append(all(p.grad is not None for p in params))

    norms: list[Tensor] = []
    seen: list[bool] = []
    for each in (run, plain):
        each.optimizer.register_step_pre_hook(clip)
    for index in range(3, TOTAL):
        run.step(index)
        plain.step(index)
        torch.testing.assert_close(norms[-1], norms[-2], **CLOSE)
    assert all(seen)
    assert run.is_kept  # after one dense step it was the last again
    compare(run, plain)


@pytest.mark.parametrize("which", ["momentum", "adamw"])
def test_a_gradient_scaler_unscales_and_skips_as_in_masked_dense(which: str) -> None:
    kept, plain = both(which)
    skip = 3  # inside the first sparse phase, which ends a call later for it
    for run in (kept, plain):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for index in range(5):
            x, y = batch(index)
            run.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(run.model(x), y)
            scaler.scale(loss * (torch.inf if index == skip else 1.0)).backward()
            before = copied(run.model.state_dict()), copied(run.optimizer.state_dict()["state"])
            scaler.step(run.optimizer)
            scaler.update()
            if index == skip:
                after = run.model.state_dict(), run.optimizer.state_dict()["state"]
                assert all(map(same, before, after))
                assert scaler.get_scale() == 128.0
            if index in (skip - 1, skip):
                assert run.is_kept is (run is kept)
    compare(kept, plain)


def test_hooks_of_all_optimizers_count_one_step() -> None:
    run, counted, grads = Run(factory("adam"), True), [], []
    every = register_optimizer_step_post_hook(lambda *_: counted.append(1))
    run.optimizer.register_step_post_hook(
        lambda *_: grads.append(all(p.grad is not None for p in run.model.parameters()))
    )
    try:
        for index in range(TOTAL):
            run.step(index)
    finally:
        every.remove()
    assert len(counted) == TOTAL
    assert grads == [True] * TOTAL


def test_what_a_user_writes_into_weights_state_and_gradients_counts() -> None:
    kept, plain = both("momentum")
    for index in range(TOTAL):
        for run in (kept, plain):
            run.optimizer.zero_grad()
            backward(run.model, index)
            for name, param in run.sparsifier.params.items():
                mask = run.sparsifier.support[name]
                with torch.no_grad():
                    param.add_(0.1 * mask)
                    param.grad.add_(0.1 * mask)  # type: ignore[union-attr]
                for value in run.optimizer.state[param].values():
                    value.mul_(0.5)
            run.optimizer.step()
    assert kept.is_kept
    compare(kept, plain)


def test_a_frozen_weight_and_a_new_rate_are_followed() -> None:
    kept, plain = both("adamw")
    for run in (kept, plain):
        rates = O.lr_scheduler.StepLR(run.optimizer, 1, 0.5)
        for index in range(TOTAL):
            run.model.get_parameter("conv2.weight").requires_grad_(index % 2 == 0)
            run.step(index)
            rates.step()
    compare(kept, plain)


def test_channels_last_weights_are_kept_in_their_order() -> None:
    kept, plain = both("adam", change=lambda model: model.to(memory_format=torch.channels_last))
    for index in range(TOTAL):
        kept.step(index)
        plain.step(index)
    assert kept.is_kept
    compare(kept, plain)


def test_gradients_of_the_kernels_need_no_mask_and_others_do() -> None:
    run = Run(factory("sgd"), True)
    for index in range(3):
        run.step(index)
    weight = run.sparsifier.params["conv2.weight"]
    run.optimizer.zero_grad()
    backward(run.model, 3)
    assert weight.grad is not None
    if run.engine.backend.isa != "reference":
        assert weight.grad._version == 0  # no mask was laid over it
    (weight * 1.0).sum().backward()  # outside the kernels
    gone = ~run.sparsifier.support["conv2.weight"]
    assert is_plus_zero(weight.grad[gone])
    run.optimizer.zero_grad()
    x, y = batch(3)
    (nn.functional.cross_entropy(run.model(x), y) + weight.sum()).backward()  # in one pass
    assert is_plus_zero(weight.grad[gone])
    run.optimizer.zero_grad()
    poison = weight.register_hook(lambda grad: grad.add_(1.0))
    backward(run.model, 3)
    assert is_plus_zero(weight.grad[gone])
    poison.remove()


def test_on_the_engine_no_mask_of_what_is_dropped_stays_and_no_momentum() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 300), nn.ReLU(), nn.Linear(300, 256))
    optimizer, x = O.SGD(model.parameters(), lr=0.1, momentum=0.9), torch.randn(8, 256)
    engine = Engine(model, x, choose=False)
    method = ACDC(Unstructured(0.9), constant("sparse", epochs=1).resolve(100))
    sparsifier = Sparsifier(method, model, optimizer, engine=engine)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert not sparsifier._masking._dropped._masks
    for name, mask in sparsifier.support.items():
        state = optimizer.state[sparsifier.params[name]]  # type: ignore[index]
        (stored,) = dict.values(state)  # as it is stored: reading makes it dense
        assert stored.shape == (int(mask.sum()),)


@pytest.mark.parametrize(
    "method",
    [
        GMP(Unstructured(0.95), constant("sparse", 1).resolve(8), 0.8, "2st", "6st"),
        SET(Unstructured(0.9, "erk"), constant("sparse", 1).resolve(8), every="2st", until="100%"),
        RigL(Unstructured(0.9, "erk"), constant("sparse", 1).resolve(8), every="2st", until="100%"),
    ],
    ids=lambda method: method.name,
)
def test_a_change_within_a_sparse_phase_leaves_no_weight_outside_the_new_support(
    method: Method[Any],
) -> None:
    # Steps of kept elements leave zeros outside of the support that they began with. The weights
    # that a change drops are not among these zeros.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 300), nn.ReLU(), nn.Linear(300, 256))
    optimizer, x = O.SGD(model.parameters(), lr=0.1, momentum=0.9), torch.randn(8, 256)
    sparsifier = Sparsifier(method, model, optimizer, engine=Engine(model, x, choose=False))
    for _ in range(8):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        for name, mask in sparsifier.support.items():
            assert is_plus_zero(model.get_parameter(name)[~mask]), (sparsifier.step, name)
    assert len(sparsifier.changes) > 3


def test_a_gradient_lies_where_the_last_one_did_unless_somebody_holds_that() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 256), torch.randn(8, 256)
    engine = Engine(layer, x, choose=False)
    mask = torch.rand(256, 256) < 0.1
    engine.compress({"weight": mask})

    def gradient(scale: float) -> Tensor:
        layer.weight.grad = None
        (scale * layer(x)).sum().backward()
        assert layer.weight.grad is not None
        return layer.weight.grad

    gradient(1.0).fill_(5.0)  # as a user may
    places = [gradient(1.0).data_ptr() for _ in range(3)]
    assert len(set(places)) == 1
    held = gradient(1.0)
    kept = held.clone()
    assert is_plus_zero(kept[~mask])
    other = gradient(2.0)
    assert torch.equal(held, kept)
    torch.testing.assert_close(other, 2 * kept)


def test_removing_leaves_the_optimizer_as_it_was() -> None:
    run = Run(factory("momentum"), True)
    before = len(run.optimizer._optimizer_step_pre_hooks)
    run.sparsifier.remove()
    assert before == 1
    assert not run.optimizer._optimizer_step_pre_hooks
    assert not run.optimizer._optimizer_step_post_hooks


def test_small_and_dense_weights_are_not_worth_it() -> None:
    large, small = torch.empty(LARGE), torch.empty(LARGE - 1)
    assert pays(large, LARGE // 10)
    assert not pays(large, LARGE // 2)
    assert not pays(small, 1)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8])
def test_elements_are_gathered_and_expanded_as_by_pytorch(dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        for size in (1, 7, 1023, 1024, 1025, 4096, 70_001):
            for density in (0.0, 0.03, 0.5, 1.0):
                for offset in (0, 1):
                    whole = torch.randn(size + offset, generator=generator) * 50
                    dense = whole.to(dtype)[offset:]
                    mask = torch.rand(size, generator=generator) < density
                    index = mask.nonzero()[:, 0].int()
                    vector = gather(dense, index)
                    assert torch.equal(vector, dense[mask])
                    found = torch.full_like(whole.to(dtype), 7)[offset:]
                    version = found._version
                    expand(vector, index, found)
                    assert torch.equal(found, torch.where(mask, dense, torch.zeros_like(dense)))
                    assert found._version > version
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_a_tensor_that_is_larger_than_the_caches_is_expanded_too(offset: int) -> None:
    size = 5_000_003  # 20 MB; odd, and aligned to 4 or 16 bytes
    index = torch.arange(3, size, 1001, dtype=torch.int32)
    vector = torch.arange(1.0, 1.0 + index.numel())
    found = torch.full((size + offset + 5,), 7.0)
    expand(vector, index, found[offset : offset + size])
    assert torch.equal(found[offset : offset + size][index.long()], vector)
    assert int((found[offset : offset + size] != 0).sum()) == index.numel()
    assert (found[:offset] == 7).all()
    assert (found[offset + size :] == 7).all()


CLEARED: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "double": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "bytes": lambda x: x.to(torch.int8),
    "complex": lambda x: torch.complex(x, -x),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1),
    "with gaps": lambda x: x[:, ::2],
    "lazily negated": lambda x: torch._neg_view(x),
    "parameter": lambda x: nn.Parameter(x, requires_grad=False),
    "small": lambda x: x[:2],
}


BY_KERNEL = {"plain", "double", "bfloat16", "channels last", "parameter"}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("form", CLEARED)
@pytest.mark.parametrize("where", [True, False])
def test_what_is_cleared_is_plus_zero_and_the_rest_is_as_it_was(
    where: bool, form: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared, called = native.clear, []
    monkeypatch.setattr(native, "clear", lambda *args: called.append(cleared(*args)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values = torch.randn(60, 30, 7, 7, generator=torch.Generator().manual_seed(0)) * 50
        values.view(-1)[::97] = torch.inf
        values.view(-1)[::89] = torch.nan
        tensor = CLEARED[form](values)
        dropped = torch.empty_like(tensor, dtype=torch.bool)
        dropped.copy_(torch.rand(tensor.shape) < 0.9)
        expected, version = tensor.clone().masked_fill_(dropped, 0.0), tensor._version
        clear(tensor, dropped if where else ~dropped, where)
        assert same(tensor.resolve_neg(), expected)
        assert tensor._version > version
        assert bool(called) is (native.available() and form in BY_KERNEL)
    finally:
        torch.set_num_threads(before)


def test_what_is_cleared_within_a_graph_is_differentiated() -> None:
    start = torch.ones(256, 256, requires_grad=True)
    gradient, dropped = start * 2, torch.rand(256, 256) < 0.5
    clear(gradient, dropped)
    gradient.sum().backward()
    assert torch.equal(start.grad, 2.0 * ~dropped)  # type: ignore[arg-type]
