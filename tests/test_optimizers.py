"""Optimizers of all kinds: of other packages, with state of every sort, wrapped, and several."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from acdc.errors import InputError
from acdc.methods.acdc import ACDC
from acdc.methods.gmp import GMP
from acdc.methods.rigl import RigL
from acdc.methods.set_ import SET
from acdc.methods.snip import SNIP
from acdc.methods.topkast import TopKAST
from acdc.pattern import Unstructured
from acdc.schedule import constant
from acdc.sparsifier import Sparsifier
from support.helpers import (
    CUTS,
    REVIVAL,
    SCHEDULE,
    TOTAL,
    Net,
    adam,
    backward,
    batch,
    bind,
    build,
    copied,
    dropped,
    is_plus_zero,
    same,
    sgd,
    train,
)

METHOD = ACDC(Unstructured(0.8), SCHEDULE)
O = torch.optim  # noqa: E741


class Simple(Optimizer):
    """A loop over parameters with a gradient; a subclass moves one."""

    def __init__(self, params: Any, lr: float = 0.05, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, p.grad + group["weight_decay"] * p, self.state[p], group)
        return loss

    def move(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class MADGRAD(Simple):
    """As of timm: the state holds where the weight began."""

    def move(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            zeros = torch.zeros_like(p)
            state.update(step=0, grad_sum_sq=zeros, s=zeros.clone(), x0=p.clone())
        state["step"] += 1
        rate = group["lr"] * math.sqrt(state["step"])
        state["grad_sum_sq"].addcmul_(grad, grad, value=rate)
        state["s"].add_(grad, alpha=rate)
        rms = state["grad_sum_sq"].pow(1 / 3).add_(1e-6)
        p.mul_(0.9).add_(state["x0"].addcdiv(state["s"], rms, value=-1), alpha=0.1)


class RMSpropTF(Simple):
    """As of timm: the average of squares starts at one."""

    def move(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["square_avg"] = torch.ones_like(p)
        state["square_avg"].lerp_(grad * grad, 0.1)
        p.addcdiv_(grad, (state["square_avg"] + 1e-10).sqrt(), value=-group["lr"])


class Lamb(Simple):
    """As of timm: the number of steps is an option of the group, in a tensor, from the first on."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        for group in self.param_groups:
            group.setdefault("step", torch.zeros(())).add_(1)
        return super().step(closure)

    def move(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["exp_avg"].lerp_(grad, 0.1)
        state["exp_avg_sq"].lerp_(grad * grad, 0.01)
        update = state["exp_avg"] / (1 - 0.9 ** group["step"].item())
        update = update / ((state["exp_avg_sq"] / (1 - 0.99 ** group["step"].item())).sqrt() + 1e-6)
        p.sub_(update * group["lr"] * p.norm().clamp(0.1, 1) / update.norm().clamp_min(1e-6))


class EightBit(Simple):
    """As of bitsandbytes: bytes with a table and the largest value of each block."""

    def move(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state.update(
                step=0,
                state1=torch.full(p.shape, 128, dtype=torch.uint8),
                qmap1=torch.linspace(-1, 1, 256),
                absmax1=torch.zeros(-(-p.numel() // 16)),
            )
        state["step"] += 1
        largest = state["absmax1"].repeat_interleave(16)[: p.numel()].reshape(p.shape)
        momentum = state["qmap1"][state["state1"].long()] * largest * 0.9 + grad
        blocks = nn.functional.pad(momentum.flatten(), (0, -p.numel() % 16)).reshape(-1, 16)
        state["absmax1"] = blocks.abs().amax(1)
        largest = state["absmax1"].repeat_interleave(16)[: p.numel()].reshape(p.shape)
        share = momentum / largest.clamp_min(1e-12)
        state["state1"] = ((share + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        p.sub_(momentum, alpha=group["lr"])


class ApexLike(Simple):
    """State for all from the start, a step count among the options, one among the attributes."""

    def __init__(self, params: Any, lr: float = 0.05, weight_decay: float = 0.01) -> None:
        super().__init__(params, lr, weight_decay)
        self.seen = 0
        for group in self.param_groups:
            group["step"] = 0
            for p in group["params"]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["scale"] = torch.full_like(p, 0.5)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        self.seen += 1
        for group in self.param_groups:
            group["step"] += 1
        return super().step(closure)

    def move(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["exp_avg"].mul_(0.9).add_(grad)
        state["scale"].mul_(1.01)
        p.addcmul_(
            state["exp_avg"], state["scale"], value=-group["lr"] / (group["step"] + self.seen)
        )


class Averaging(Simple):
    """Schedule-free in short: the model holds y, an average; the state holds z."""

    def move(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "z" not in state:
            state["z"] = p.clone()
            state["k"] = 0
        state["k"] += 1
        p.lerp_(state["z"], 1 / state["k"]).add_(grad, alpha=-0.5 * group["lr"])
        state["z"].sub_(grad, alpha=group["lr"])

    @torch.no_grad()
    def eval(self) -> None:
        for p, state in self.state.items():
            p.lerp_(state["z"], 1 - 1 / 0.9)


class Nested(O.SGD):
    """A class whose step calls that of its base class, whose hooks are called as well."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def nested(model: nn.Module) -> Optimizer:
    O.SGD(model.parameters(), lr=0.1)  # torch wraps the step of a class when it makes an object
    return Nested(model.parameters(), lr=0.1, momentum=0.9, dampening=0.1)


class Lookahead(Optimizer):
    """As of timm: it does not call ``__init__`` of its base, and acts after the inner step."""

    def __init__(self, base: Optimizer, k: int = 2) -> None:
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._base_optimizer, self.param_groups, self.defaults = (
            base,
            base.param_groups,
            base.defaults,
        )
        self.state = defaultdict(dict)
        self.k, self.count = k, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self._base_optimizer.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for p in (p for group in self.param_groups for p in group["params"]):
                state = self._base_optimizer.state[p]
                slow = state.setdefault("lookahead_slow_buff", p.detach().clone())
                slow.add_(p - slow, alpha=0.5)
                p.copy_(slow)
        return loss

    def state_dict(self) -> Any:
        return self._base_optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self._base_optimizer.load_state_dict(state_dict)
        self.param_groups = self._base_optimizer.param_groups


def slow_sgd(model: nn.Module) -> Lookahead:
    return Lookahead(O.SGD(model.parameters(), lr=0.1, momentum=0.9))


def slow_lamb(model: nn.Module) -> Lookahead:
    return Lookahead(Lamb(model.parameters()))


FACTORIES: dict[str, Callable[[nn.Module], Any]] = {
    cls.__name__: (lambda model, cls=cls: cls(model.parameters()))
    for cls in (MADGRAD, RMSpropTF, Lamb, EightBit, ApexLike, Averaging)
}
FACTORIES |= {
    "Nested": nested,
    "Lookahead": slow_sgd,
    "Lookahead-Lamb": slow_lamb,
    "copied": lambda model: type("Mine", (O.AdamW,), {})(model.parameters(), lr=0.01),
}
if importlib.util.find_spec("schedulefree"):
    import schedulefree

    def schedule_free(name: str) -> Callable[[nn.Module], Any]:
        def make(model: nn.Module) -> Any:
            optimizer = getattr(schedulefree, name)(model.parameters(), lr=0.01)
            optimizer.train()
            return optimizer

        return make

    for each in ("AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"):
        FACTORIES[each] = schedule_free(each)

every_optimizer = pytest.mark.parametrize("name", FACTORIES)


class NeedsClosure(Optimizer):
    """As SGDScheduleFreeClosure: the gradient is that of other weights than the parameters hold."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"]]
        for p in params:
            z = self.state[p].setdefault("z", p.detach().clone())
            p.lerp_(z, 0.25)
        with torch.enable_grad():
            loss = closure()
        for p in params:
            z = self.state[p]["z"]
            p.lerp_(z, 1 - 1 / 0.75)
            z.sub_(p.grad, alpha=self.param_groups[0]["lr"])
            p.lerp_(z, 0.5)
        return loss


@pytest.mark.parametrize("reset", ["all", "entered"])
def test_an_optimizer_that_needs_a_closure_is_followed(reset: Any) -> None:
    model = build()
    optimizer = NeedsClosure(model.parameters())
    sparsifier = Sparsifier(replace(METHOD, reset=reset), model, optimizer)
    for step in range(TOTAL):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            return backward(model, step)

        optimizer.step(closure)
        assert sparsifier.step == step + 1
        assert is_exact(sparsifier)


def is_exact(sparsifier: Sparsifier) -> bool:
    return all(is_plus_zero(weight[mask]) for _, weight, mask in dropped(sparsifier))


# --- four phases, exact at every step ------------------------------------------------------------


@every_optimizer
def test_counts_and_zeros_are_exact_and_the_first_dense_step_is_fresh(name: str) -> None:
    make = FACTORIES[name]
    model = build()
    optimizer = make(model)
    state = torch.get_rng_state()
    sparsifier = Sparsifier(METHOD, model, optimizer)
    assert torch.equal(torch.get_rng_state(), state)
    for step in range(TOTAL):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        assert sparsifier.step == step + 1
        assert sparsifier.support.is_full != (SCHEDULE.phase_at(step + 1).kind == "sparse")
        if not sparsifier.support.is_full:
            shapes = {n: tuple(p.shape) for n, p in sparsifier.params.items()}
            assert sparsifier.support.nnz == METHOD.pattern.total(shapes)
        assert is_exact(sparsifier)
        if step + 1 == REVIVAL:
            twin = copy.deepcopy(model)
            fresh = make(twin)
        if step == REVIVAL:
            fresh.zero_grad()
            backward(twin, step)
            fresh.step()
            if not isinstance(optimizer, Lookahead):  # its own count goes on
                assert same(optimizer.state_dict()["state"], fresh.state_dict()["state"])
                assert same(model.state_dict(), twin.state_dict())
    assert sparsifier.pair().facts["step"] == TOTAL
    pruned = sum(int(mask.sum()) for _, _, mask in dropped(sparsifier))
    assert pruned > 0


@every_optimizer
def test_attached_but_dense_is_bitwise_plain(name: str) -> None:
    model, plain = build(), build()
    optimizer, other = FACTORIES[name](model), FACTORIES[name](plain)
    Sparsifier(METHOD, model, optimizer)
    train(model, optimizer, 0, CUTS[0] - 1)
    train(plain, other, 0, CUTS[0] - 1)
    assert same(model.state_dict(), plain.state_dict())
    assert same(optimizer.state_dict(), other.state_dict())


@every_optimizer
def test_a_resumed_run_is_the_same_run(name: str) -> None:
    make = FACTORIES[name]
    if name in ("Lookahead", "Lookahead-Lamb", "ApexLike"):
        pytest.skip("its state dict leaves out its own count, without acdc too")
    whole = bind(METHOD, make)
    train(*whole[:2])
    for stop in (1, CUTS[0], CUTS[0] + 1, REVIVAL, CUTS[1] + 1):
        model, optimizer, sparsifier = bind(METHOD, make)
        train(model, optimizer, 0, stop)
        saved = [copied(each.state_dict()) for each in (model, optimizer, sparsifier)]
        model = build(seed=9)
        optimizer = make(model)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        sparsifier = Sparsifier(METHOD, model, optimizer, state=saved[2])
        train(model, optimizer, stop)
        assert same(model.state_dict(), whole[0].state_dict()), stop


@pytest.mark.parametrize("name", [n for n in FACTORIES if "Free" in n or n == "Averaging"])
@pytest.mark.parametrize("reset", ["all", "entered", "none"])
def test_an_average_inside_an_optimizer_holds_no_pruned_weight(name: str, reset: Any) -> None:
    model, optimizer, sparsifier = bind(replace(METHOD, reset=reset), FACTORIES[name])
    looked = 0
    for step in range(TOTAL):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        before = copy.deepcopy(model.state_dict())
        optimizer.eval()
        assert is_exact(sparsifier)
        looked += not sparsifier.support.is_full
        if step + 1 == TOTAL:
            pair = sparsifier.pair()
            assert all(is_plus_zero(pair.sparse[n][~m]) for n, m in pair.support.items())
            if name != "RAdamScheduleFree":  # whose first steps are too small to be seen
                assert not same(before, model.state_dict())  # there was something to average
        if hasattr(optimizer, "train"):
            optimizer.train()
        model.load_state_dict(before)
    assert looked == 6


@pytest.mark.parametrize(
    "method", [METHOD, GMP(Unstructured(0.8), SCHEDULE, every="1st", length="1st")]
)
def test_biases_do_not_shrink_by_a_state_that_copies_weights(method: Any) -> None:
    # The fault that was seen: x0 set to zero, and every parameter then shrank by a tenth a step.
    model = build()
    optimizer = MADGRAD(model.parameters(), lr=1e-4, weight_decay=0.0)
    Sparsifier(method, model, optimizer)
    before = model.fc2.bias.norm()
    train(model, optimizer)
    assert model.fc2.bias.norm() > 0.95 * before


def test_a_grown_weight_starts_from_its_declared_state() -> None:
    method = SET(Unstructured(0.8), constant("sparse", 1).resolve(TOTAL), every="1st", until="100%")
    model = build()
    refused = RMSpropTF(model.parameters())
    sparsifier = Sparsifier(method, model, refused)
    with pytest.raises(InputError, match=r"RMSpropTF keeps the state 'square_avg'.*reset="):
        train(model, refused, 0, 1)
    sparsifier.remove()

    model = build()
    optimizer = RMSpropTF(model.parameters())
    method = replace(method, reset={"square_avg": 1.0})
    assert method.reset_rule == "entered"
    sparsifier = Sparsifier(method, model, optimizer)
    before = sparsifier.support
    train(model, optimizer, 0, 1)
    entered = sparsifier.support.entered(before)
    assert entered.nnz
    for name, mask in entered.items():
        value = optimizer.state[sparsifier.params[name]]["square_avg"]
        assert bool((value[mask] == 1.0).all())
        assert not bool((value[before[name]] == 1.0).all())


# --- what cannot be reset is refused -------------------------------------------------------------


class Hidden(Simple):
    """Keeps momentum where nobody finds it."""

    def __init__(self, params: Any, lr: float = 0.05, weight_decay: float = 0.01) -> None:
        super().__init__(params, lr, weight_decay)
        self.buffers: dict[int, Tensor] = {}

    def move(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        buffer = self.buffers.setdefault(id(p), torch.zeros_like(p))
        p.sub_(buffer.mul_(0.9).add_(grad), alpha=group["lr"])


class Needy(Simple):
    """Cannot be built by anybody else, and finds no state where it did not make it."""

    def __init__(self, params: Any, secret: float) -> None:
        super().__init__(params)
        self.secret = secret
        self.all = list(self.param_groups[0]["params"])

    def move(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["m"] = state.get("m", torch.full_like(p, self.secret)) * 0.9 + grad
        p.sub_(state["m"], alpha=group["lr"])


@pytest.mark.parametrize(
    "make", [lambda m: Hidden(m.parameters()), lambda m: Needy(m.parameters(), 0.1)],
    ids=["hidden", "needy"],
)  # fmt: skip
def test_an_unknown_fresh_state_is_refused_before_anything_is_touched(make: Any) -> None:
    model = build()
    optimizer = make(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        InputError, match=r"starts its state is not known.*reset=\{.*reset=\"none\""
    ):
        Sparsifier(METHOD, model, optimizer)
    assert same(model.state_dict(), before)
    assert not optimizer._optimizer_step_post_hooks
    Sparsifier(replace(METHOD, reset="none"), model, optimizer)
    train(model, optimizer)


def test_declared_values_are_used() -> None:
    def make(model: nn.Module) -> Needy:
        return Needy(model.parameters(), 0.1)

    model, optimizer, _ = bind(replace(METHOD, reset={"m": 0.1}), make)
    train(model, optimizer, 0, REVIVAL)
    assert all(bool((state["m"] == 0.1).all()) for state in optimizer.state.values())
    model, optimizer, _ = bind(replace(METHOD, reset={"other": 0.1}), make)
    with pytest.raises(InputError, match="Needy keeps the state 'm'"):
        train(model, optimizer, 0, 1)


@pytest.mark.parametrize(
    "value", [{"x0": "weights"}, {"x0": None}, {1: 0.0}, {"x0": True}, "some", None]
)
def test_bad_declarations_are_sentences(value: Any) -> None:
    with pytest.raises(InputError, match="reset"):
        replace(METHOD, reset=value)


def test_copies_of_weights_and_dense_weights_behind_do_not_go_together() -> None:
    method = TopKAST(Unstructured(0.8), SCHEDULE, 0.4, every="1st")
    with pytest.raises(InputError, match=r"MADGRAD keeps a copy of the weights \('x0'\)"):
        bind(method, FACTORIES["MADGRAD"])


# --- wrappers ------------------------------------------------------------------------------------


class Wrapper:
    """A stranger's wrapper that is no optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer


class Subclass(Optimizer):
    """A wrapper that is an optimizer by its class alone, as that of Accelerate."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class Unhooked(Optimizer):
    def __init__(self, params: Any) -> None:
        self.param_groups, self.state = [{"params": list(params), "lr": 0.1}], defaultdict(dict)

    def step(self, closure: Any = None) -> Any: ...


class SAM(Optimizer):
    """Ascends, looks at a second gradient there, and lets another optimizer step."""

    def __init__(self, params: Any, base: Any, **options: Any) -> None:
        super().__init__(params, options)
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.grad is not None:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(p.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


@pytest.mark.parametrize("wrap", [Wrapper, Subclass, lambda o: Wrapper(Subclass(o))])
def test_wrappers_of_optimizers_are_seen_through(wrap: Any) -> None:
    model = build()
    optimizer = sgd(model)
    sparsifier = Sparsifier(METHOD, model, wrap(optimizer))
    assert sparsifier.optimizers == (optimizer,)
    train(model, optimizer)
    reference, other, _ = bind(METHOD, sgd)
    train(reference, other)
    assert same(model.state_dict(), reference.state_dict())


@pytest.mark.parametrize("by_closure", [True, False])
def test_an_optimizer_that_looks_at_two_gradients_is_followed(by_closure: bool) -> None:
    model = build()
    optimizer = SAM(model.parameters(), O.SGD, lr=0.1, momentum=0.9)
    sparsifier = Sparsifier(METHOD, model, optimizer)
    for step in range(TOTAL):
        backward(model, step)
        if by_closure:
            optimizer.step(lambda step=step: backward(model, step))
        else:
            optimizer.first_step()
            backward(model, step)
            optimizer.second_step()
        assert sparsifier.step == step + 1
        assert is_exact(sparsifier)


@pytest.mark.parametrize("ascents", [2, 5])
def test_an_optimizer_that_ascends_several_times_is_followed(ascents: int) -> None:
    model = build()
    optimizer = SAM(model.parameters(), O.SGD, lr=0.1, momentum=0.9)
    sparsifier = Sparsifier(METHOD, model, optimizer)
    for step in range(TOTAL):
        start = {p: p.detach().clone() for p in model.parameters()}
        for _ in range(ascents):
            backward(model, step)
            optimizer.first_step()
        for p, old in start.items():
            optimizer.state[p]["old_p"] = old
        backward(model, step)
        optimizer.second_step()
        assert sparsifier.step == step + 1
        assert is_exact(sparsifier)


def test_a_wrapper_whose_step_is_never_called_is_noticed_too() -> None:
    model = build()
    optimizer = SAM(model.parameters(), O.SGD, lr=0.1)
    Sparsifier(METHOD, model, optimizer)
    for step in range(17):
        backward(model, step)
        optimizer.first_step()
    with pytest.raises(InputError, match="between 18 backward passes, and the optimizer that"):
        backward(model, 17)


def test_a_loop_that_ascends_several_times_by_itself_is_told_what_to_do() -> None:
    model, _, _sparsifier = bind(METHOD, sgd)
    words = r"SAM with several ascents.*holds the other one as its attribute base_optimizer"
    for step in range(2):
        backward(model, step)
        for p in model.parameters():
            p.data.add_(p.grad, alpha=0.05)
    with pytest.raises(InputError, match=words):
        backward(model, 2)


class FreeWrapper:
    """As ScheduleFreeWrapper: the model holds an average of the weights that are stepped inside."""

    def __init__(self, base: Optimizer) -> None:
        self.base, self.count = base, 0

    @torch.no_grad()
    def step(self) -> None:
        params = [p for group in self.base.param_groups for p in group["params"]]
        for p in params:
            state = self.base.state[p]
            state.setdefault("x", p.detach().clone())
            p.copy_(state.setdefault("z", p.detach().clone()))
        self.base.step()
        self.count += 1
        for p in params:
            state = self.base.state[p]
            state["z"].copy_(p)
            p.copy_(state["x"].lerp_(state["z"], 1 / self.count))


@pytest.mark.parametrize("reset", ["all", "entered", "none"])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_wrapper_that_moves_weights_after_the_optimizer_is_refused(
    reset: Any, steps_before: int
) -> None:
    # The fault that was seen: the optimizer inside was given, and pruned weights came back.
    model = build()
    base = O.SGD(model.parameters(), lr=0.1)
    wrapper = FreeWrapper(base)
    with pytest.raises(InputError, match=r"FreeWrapper, which is no .*after that of the SGD insi"):
        Sparsifier(METHOD, model, wrapper)  # type: ignore[arg-type]
    for step in range(steps_before):
        backward(model, step)
        wrapper.step()

    def attach_and_step() -> None:
        Sparsifier(replace(METHOD, reset=reset), model, base)
        backward(model, 0)
        wrapper.step()

    with pytest.raises(InputError, match=r"holds 'x', which SGD does not make: a wrapper"):
        attach_and_step()
    assert all(bool(p.all()) for n, p in model.named_parameters() if p.ndim > 1)  # nothing is cut


def test_state_of_the_users_own_is_kept_if_it_is_declared() -> None:
    model = build()
    optimizer = O.SGD(model.parameters(), lr=0.1, momentum=0.9)
    Sparsifier(replace(METHOD, reset={"ema": "weight"}), model, optimizer)
    for step in range(TOTAL):
        for p in model.parameters():
            optimizer.state[p]["ema"] = p.detach().clone()
        train(model, optimizer, step, step + 1)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop",
                                  "Adadelta", "ASGD", "Rprop", "Adafactor"])  # fmt: skip
def test_all_that_torchs_optimizers_keep_is_known_as_theirs(name: str) -> None:
    options: dict[str, Any] = {
        "SGD": {"momentum": 0.9}, "Adam": {"amsgrad": True}, "AdamW": {"amsgrad": True},
        "RMSprop": {"momentum": 0.9, "centered": True},
    }.get(name, {})  # fmt: skip
    model = build()
    optimizer = getattr(O, name)(model.parameters(), lr=0.01, **options)
    Sparsifier(METHOD, model, optimizer)
    train(model, optimizer)


def deepspeed_like() -> object:
    return type("FP16_Optimizer", (), {"__module__": "deepspeed.runtime.fp16"})()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda m: Unhooked(m.parameters()), r"Unhooked, which does not call the hooks.*Give the"),
        (lambda m: O.lr_scheduler.StepLR(sgd(m), 1), None),
        (lambda m: "sgd", r"The optimizer is a str, and not an optimizer. Give a torch.optim"),
        (lambda m: [], "list of optimizers is empty"),
        (lambda m: [sgd(m), 3], r"Optimizer 2 of 2 is a int, and not an optimizer"),
        (lambda m: [(o := sgd(m)), o], "same optimizer is given twice"),
        (
            lambda m: [sgd(m), adam(m)],
            r"weights are held by more than one of the 2.*'conv1.weight'",
        ),
        (lambda m: deepspeed_like(), r"is DeepSpeed's.*Train without DeepSpeed"),
        (
            lambda m: [O.SGD(m.fc1.parameters()), O.SGD(m.fc2.parameters())],
            r"The 2 optimizers do not hold 2 of the 4 weights to prune, 'conv1.weight' first. "
            r"If another optimizer .*\[first, second\]",
        ),
    ],
)
def test_what_is_no_optimizer_of_these_weights_is_refused(make: Any, sentence: str | None) -> None:
    model = build()
    if sentence is None:  # a scheduler holds its optimizer
        assert Sparsifier(METHOD, model, make(model)).optimizers[0].param_groups
        return
    with pytest.raises(InputError, match=sentence):
        Sparsifier(METHOD, model, make(model))


@pytest.mark.parametrize("through_data", [True, False])
def test_steps_that_are_not_seen_are_noticed_within_three_backward_passes(
    through_data: bool,
) -> None:
    model, _, sparsifier = bind(METHOD, sgd)
    other = sgd(model)  # not the one that the sparsifier was given
    for step in range(2):
        backward(model, step)
        if through_data:
            for p in model.parameters():
                p.data.sub_(0.1 * p.grad)
        else:
            other.step()
    with pytest.raises(InputError, match="optimizer that the sparsifier was given has taken no"):
        backward(model, 2)
    assert sparsifier.step == 0


def test_accumulation_and_loading_are_no_unseen_steps() -> None:
    model, optimizer, sparsifier = bind(METHOD, sgd)
    state = build(seed=3).state_dict()
    for step in range(6):
        backward(model, step)
        if step == 2:
            model.load_state_dict(state)
    optimizer.step()
    assert sparsifier.step == 1
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


# --- several optimizers --------------------------------------------------------------------------


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    return [O.Muon(matrices, lr=0.02), O.AdamW(rest, lr=0.01)]


def halves(model: nn.Module) -> list[Optimizer]:
    params = list(model.parameters())
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}
    return [O.SGD(params[:4], **options), O.SGD(params[4:], **options)]


def train_all(
    model: nn.Module, optimizers: list[Optimizer], start: int = 0, stop: int = TOTAL
) -> None:
    for step in range(start, stop):
        model.zero_grad()
        backward(model, step)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("make", [muon_and_adamw, halves])
def test_several_optimizers_have_one_clock(make: Any) -> None:
    model = build()
    optimizers = make(model)
    sparsifier = Sparsifier(METHOD, model, optimizers)
    assert sparsifier.optimizers == tuple(optimizers)
    for step in range(TOTAL):
        model.zero_grad()
        backward(model, step)
        for index, optimizer in enumerate(optimizers):
            optimizer.step()
            assert is_exact(sparsifier)  # also between the two
            assert sparsifier.step == step + index
        if step + 1 == REVIVAL:
            assert not any(optimizer.state for optimizer in optimizers)
            twin = copy.deepcopy(model)
            fresh = make(twin)
        if step == REVIVAL:
            train_all(twin, fresh, step, step + 1)
            assert same(model.state_dict(), twin.state_dict())
    twin_state = sparsifier.dense_twin.optimizer
    assert isinstance(twin_state, list)
    assert len(twin_state) == 2
    sparsifier.dense_twin.restore(model, optimizers)
    assert same([o.state_dict() for o in optimizers], twin_state)
    with pytest.raises(InputError, match="state is that of 2 optimizers, and 1 are given"):
        sparsifier.dense_twin.restore(model, optimizers[0])


METHODS: dict[str, Any] = {
    "acdc": METHOD,
    "rigl": RigL(Unstructured(0.8), SCHEDULE, every="2st", until="100%"),
    "snip": SNIP(Unstructured(0.8), SCHEDULE),
    "gmp": GMP(Unstructured(0.8), SCHEDULE, every="1st", length="1st"),
    "set": SET(Unstructured(0.8), SCHEDULE, every="1st", until="100%"),
}


@pytest.mark.parametrize("which", METHODS)
def test_two_halves_do_what_one_optimizer_does(which: str) -> None:
    model, optimizer, sparsifier = bind(METHODS[which], sgd)
    other = build()
    several = halves(other)
    second = Sparsifier(METHODS[which], other, several)
    train(model, optimizer)
    train_all(other, several)
    assert second.support == sparsifier.support
    assert second.step == sparsifier.step == TOTAL
    assert same(model.state_dict(), other.state_dict())
    states = [o.state_dict()["state"] for o in several]
    assert same(
        list(optimizer.state_dict()["state"].values()),
        [*states[0].values(), *states[1].values()],
    )


def test_several_optimizers_with_an_engine_step_kept_elements() -> None:
    from acdc.engine.engine import Engine

    runs = []
    for make in (halves, lambda m: [sgd(m)]):
        model = build()
        optimizers = make(model)
        engine = Engine(model, torch.zeros(8, 3, 4, 4), choose=False)
        sparsifier = Sparsifier(METHOD, model, optimizers, engine=engine)
        for steps in sparsifier._masking._kept_steps:
            steps._worth = lambda *_: True
        train_all(model, optimizers, 0, 3)
        held = [len(steps._weights) for steps in sparsifier._masking._kept_steps]
        assert sum(held) == 4
        assert all(held)
        train_all(model, optimizers, 3)
        assert is_exact(sparsifier)
        runs.append(model.state_dict())
    assert same(*runs)


def test_a_resumed_run_of_several_is_the_same_run() -> None:
    whole = build()
    optimizers = muon_and_adamw(whole)
    Sparsifier(METHOD, whole, optimizers)
    train_all(whole, optimizers)
    for stop in range(1, TOTAL):
        model = build()
        optimizers = muon_and_adamw(model)
        sparsifier = Sparsifier(METHOD, model, optimizers)
        train_all(model, optimizers, 0, stop)
        parts = (model, *optimizers, sparsifier)
        saved = [copied(each.state_dict()) for each in parts]
        model = build(seed=5)
        optimizers = muon_and_adamw(model)
        sparsifier = Sparsifier(METHOD, model, optimizers)
        for each, state in zip((model, *optimizers, sparsifier), saved, strict=True):
            each.load_state_dict(state)
        train_all(model, optimizers, stop)
        assert same(model.state_dict(), whole.state_dict()), stop


def test_a_scaler_that_skips_one_of_two_ends_the_step_at_the_next_one() -> None:
    model = build()
    optimizers = halves(model)
    sparsifier = Sparsifier(METHOD, model, optimizers)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    expected = 0
    for attempt in range(8):
        model.zero_grad()
        x, y = batch(attempt)
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if attempt in (2, 3, 5):  # the first, the second, and both
            for index in {2: (0,), 3: (1,), 5: (0, 1)}[attempt]:
                optimizers[index].param_groups[0]["params"][0].grad.fill_(float("inf"))
        for optimizer in optimizers:
            scaler.step(optimizer)
            assert is_exact(sparsifier)
        scaler.update()
        expected += attempt != 5
        # A step of one optimizer alone is counted when the next begins.
        assert expected - sparsifier.step in (0, 1)
    assert sparsifier.step == expected == 7


def test_one_called_twice_ends_the_step() -> None:
    model = build()
    first, second = optimizers = halves(model)
    sparsifier = Sparsifier(METHOD, model, optimizers)
    for _ in range(3):  # as a critic, three times for one step of the generator
        model.zero_grad()
        backward(model, 0)
        first.step()
        assert is_exact(sparsifier)
    assert sparsifier.step == 2
    assert not sparsifier.support.is_full
    second.step()
    assert sparsifier.step == 3
    assert is_exact(sparsifier)


def test_the_order_of_calls_is_free() -> None:
    model = build()
    optimizers = halves(model)
    sparsifier = Sparsifier(METHOD, model, optimizers)
    for step in range(TOTAL):
        model.zero_grad()
        backward(model, step)
        for optimizer in optimizers if step % 2 else reversed(optimizers):
            optimizer.step()
        assert sparsifier.step == step + 1


def test_dense_weights_behind_want_one_optimizer() -> None:
    model = build()
    method = TopKAST(Unstructured(0.8), SCHEDULE, 0.4, every="1st")
    with pytest.raises(InputError, match=r"TopKAST trains dense weights behind.*2 optimizers"):
        Sparsifier(method, model, halves(model))


# --- steps that only make state: torch.distributed.checkpoint ------------------------------------


@pytest.mark.parametrize(
    "make", [sgd, adam, FACTORIES["ApexLike"], lambda m: O.NAdam(m.parameters())]
)
@pytest.mark.parametrize("which", ["acdc", "rigl", "snip"])
def test_saving_by_torch_distributed_is_no_step(make: Any, which: str) -> None:
    runs = []
    for saves in (False, True):
        model, optimizer, sparsifier = bind(METHODS[which], make)
        if saves:
            get_optimizer_state_dict(model, optimizer)
            assert sparsifier.step == 0
        else:  # what torch does to the optimizer is torch's own
            plain = build()
            other = make(plain)
            get_optimizer_state_dict(plain, other)
            optimizer.load_state_dict(other.state_dict())
        for step in range(TOTAL):
            train(model, optimizer, step, step + 1)
            optimizer.zero_grad()
            if saves:
                before = copy.deepcopy(model.state_dict())
                get_optimizer_state_dict(model, optimizer)
                assert same(model.state_dict(), before)
            assert sparsifier.step == step + 1
            assert is_exact(sparsifier)
        runs.append(model.state_dict())
    assert same(*runs)


@pytest.mark.parametrize("make", [sgd, adam, lambda m: O.NAdam(m.parameters())])
@pytest.mark.parametrize("stop", [1, 3, REVIVAL, 7])
def test_a_run_resumed_by_torch_distributed_is_the_same_run(make: Any, stop: int) -> None:
    whole = bind(METHOD, make)
    train(*whole[:2])
    model, optimizer, sparsifier = bind(METHOD, make)
    train(model, optimizer, 0, stop)
    optimizer.zero_grad()
    saved = copy.deepcopy(
        (model.state_dict(), get_optimizer_state_dict(model, optimizer), sparsifier.state_dict())
    )
    model = build(seed=4)
    optimizer = make(model)
    model.load_state_dict(saved[0])
    sparsifier = Sparsifier(METHOD, model, optimizer, state=saved[2])
    set_optimizer_state_dict(model, optimizer, saved[1])
    assert sparsifier.step == stop
    train(model, optimizer, stop)
    assert same(model.state_dict(), whole[0].state_dict())


def test_a_warm_up_from_zero_is_a_step() -> None:
    model, optimizer, sparsifier = bind(METHOD, sgd)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 0, 2)
    assert sparsifier.step == 2


# --- wrappers of models --------------------------------------------------------------------------


class Renaming(nn.Module):
    """A stranger's wrapper, whose state dict is that of the module inside: as Fabric's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._forward_module = inner

    def forward(self, x: Tensor) -> Any:
        return self._forward_module(x)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward_module.state_dict(*args, **kwargs)


class Lying(Net):
    """No module inside has these parameters, and the state dict has other names."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"net/{k}": v for k, v in super().state_dict(*args, **kwargs).items()}


class Inside(nn.Module):
    """A network of the user's own, which happens to hold another in an attribute ``module``."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Net()

    def forward(self, x: Tensor) -> Any:
        return self.module(x)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        Renaming,
        lambda m: Renaming(nn.DataParallel(m)),
        lambda m: torch.compile(m, backend="eager"),
        lambda m: Renaming(torch.compile(m, backend="eager")),
    ],
)
def test_wrappers_of_models_are_seen_through(wrap: Any) -> None:
    model = build()
    wrapped = wrap(model)
    optimizer = sgd(wrapped)
    sparsifier = Sparsifier(METHOD, wrapped, optimizer)
    assert sparsifier.model is model
    train(model, optimizer)
    assert list(sparsifier.pair().sparse) == list(model.state_dict())


def test_a_module_of_the_users_own_is_no_wrapper() -> None:
    model = build(Inside)
    optimizer = sgd(model)
    sparsifier = Sparsifier(METHOD, model, optimizer)
    assert next(iter(sparsifier.params)) == "module.conv1.weight"
    train(model, optimizer)
    average = copy.deepcopy(model)
    nn.init.ones_(average.module.fc1.weight)
    sparsifier.project(average)
    mask = ~sparsifier.support["module.fc1.weight"]
    assert is_plus_zero(average.module.fc1.weight[mask])
    assert list(sparsifier.pair().sparse) == list(model.state_dict())


class ModelEmaV3(nn.Module):
    """As of timm."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)


class FlatParameter(nn.Parameter):
    """As of FullyShardedDataParallel, by its name."""


def flattened() -> nn.Module:
    model = build()
    model.fc1.weight = FlatParameter(model.fc1.weight.detach())
    return model


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: AveragedModel(build()), r"is an average of weights \(AveragedModel\).*project"),
        (lambda: ModelEmaV3(build()), r"is an average of weights \(ModelEmaV3\)"),
        (lambda: build(Lying), r"parameters of the Lying have other names in its state_dict"),
        (flattened, r"sharded over processes.*fully_shard.*DistributedDataParallel"),
    ],
)
def test_models_that_are_not_trained_or_not_named_are_refused(make: Any, sentence: str) -> None:
    model = make()
    with pytest.raises(InputError, match=sentence):
        Sparsifier(METHOD, model, sgd(model))


@pytest.mark.parametrize(
    "wrap", [AveragedModel, ModelEmaV3, lambda m: ModelEmaV3(nn.DataParallel(m))]
)
def test_averages_are_projected_through_their_wrappers(wrap: Any) -> None:
    model, optimizer, sparsifier = bind(METHOD, sgd)
    average = wrap(model)
    train(model, optimizer)
    sparsifier.project(average)
    params = dict(average.named_parameters())
    for name, mask in sparsifier.support.items():
        (value,) = [p for n, p in params.items() if n.endswith(name)]
        assert is_plus_zero(value[~mask])


def test_lightning_fabric_from_setup_to_pair() -> None:
    lightning = pytest.importorskip("lightning")
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    net = build()
    model, optimizer = fabric.setup(net, sgd(net))
    sparsifier = Sparsifier(METHOD, model, optimizer)
    assert sparsifier.model is net
    for step in range(TOTAL):
        optimizer.zero_grad()
        x, y = batch(step)
        fabric.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()
        assert sparsifier.step == step + 1
        assert is_exact(sparsifier)
    reference, other, _ = bind(METHOD, sgd)
    train(reference, other)
    assert same(net.state_dict(), reference.state_dict())
    assert list(sparsifier.pair().sparse) == list(net.state_dict())


def test_accelerate_from_prepare_to_pair() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = build()
    model, optimizer = accelerator.prepare(net, sgd(net))
    sparsifier = Sparsifier(METHOD, model, optimizer)
    for micro in range(2 * TOTAL):
        with accelerator.accumulate(model):
            x, y = batch(micro)
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        assert sparsifier.step == (micro + 1) // 2
        assert is_exact(sparsifier)
    assert list(sparsifier.pair().sparse) == list(net.state_dict())
