"""The mirror step: the formula, with every optimizer and method; zeros; and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from acdc.engine.engine import Engine
from acdc.errors import InputError
from acdc.hooks.kept_steps import kept_in_last_step
from acdc.hooks.kept_weight import KeptState
from acdc.hooks.mirror import LIMIT, MirrorStep
from acdc.methods.acdc import ACDC
from acdc.methods.base import Method
from acdc.methods.dpf import DPF
from acdc.methods.gmp import GMP
from acdc.methods.rigl import RigL
from acdc.methods.srste import SRSTE
from acdc.methods.str_ import STR
from acdc.methods.topkast import TopKAST
from acdc.pattern import NM, Unstructured
from acdc.schedule import constant
from acdc.sparsifier import Sparsifier
from support.helpers import (
    REVIVAL,
    SCHEDULE,
    TOTAL,
    Net,
    backward,
    build,
    copied,
    dropped,
    is_plus_zero,
    same,
    train,
)

O = torch.optim  # noqa: E741
ALPHA, BETA = 2.0, 0.05
SPARSE = constant("sparse", 3).resolve(3)
WD = {"weight_decay": 1e-2}

# Name -> class, options, and whether the mirror step is the normalised one.
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any], bool]] = {
    "sgd": (O.SGD, {"lr": 0.1}, False),
    "momentum": (O.SGD, {"lr": 0.1, "momentum": 0.9, **WD}, False),
    "nesterov": (O.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, False),
    "maximize": (O.SGD, {"lr": 0.01, "maximize": True}, False),
    "sgd-foreach": (O.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True, **WD}, False),
    "nesterov-foreach": (
        O.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True, **WD},
        False,
    ),
    "sgd-fused": (
        O.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "fused": True},
        False,
    ),
    "rmsprop": (O.RMSprop, {"lr": 0.01, **WD}, False),
    "adam": (O.Adam, {"lr": 0.01, **WD}, True),
    "adam-raw": (O.Adam, {"lr": 0.01, **WD}, False),
    "adam-maximize": (O.Adam, {"lr": 0.001, "maximize": True}, True),
    "adamw": (O.AdamW, {"lr": 0.01, **WD}, True),
    "adamw-amsgrad": (O.AdamW, {"lr": 0.01, "amsgrad": True, **WD}, True),
    "adamw-foreach": (O.AdamW, {"lr": 0.01, "foreach": True, **WD}, True),
    "adamw-fused": (O.AdamW, {"lr": 0.01, "fused": True, **WD}, True),
}
METHODS: dict[str, Method[Any]] = {
    "acdc": ACDC(Unstructured(0.8), SCHEDULE),
    "gmp": GMP(Unstructured(0.8), SPARSE, every="1st", length="5st"),
    "rigl": RigL(Unstructured(0.8, "erk"), SPARSE, every="3st"),
    "topkast": TopKAST(Unstructured(0.8), SPARSE, backward=0.5, every="2st"),
    "dpf": DPF(Unstructured(0.8), SPARSE, every="2st"),
    "srste": SRSTE(NM(2, 4), SPARSE, every="2st"),
    "str": STR(Unstructured(0.8, "global"), SPARSE),
}


def optimizer_of(model: nn.Module, which: str) -> Optimizer:
    """Build the optimizer over two groups with different rates."""
    kind, options, _ = OPTIMIZERS[which]
    params = list(model.parameters())
    groups = [{"params": params[3:]}, {"params": params[:3], "lr": options["lr"] / 2}]
    return kind(groups, **options)  # type: ignore[call-arg]


def mirrored(model: nn.Module, which: str) -> Optimizer:
    optimizer = optimizer_of(model, which)
    MirrorStep(optimizer, ALPHA, BETA, normalized=OPTIMIZERS[which][2])
    return optimizer


def by_hand(optimizer: Optimizer, grads: dict[Tensor, Tensor], normalized: bool) -> None:
    """The mirror step as the paper writes it, a weight at a time."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.ndim < 2 or p not in grads:
                continue
            g = -grads[p] if group.get("maximize") else grads[p]
            if normalized:
                state, (beta1, beta2) = optimizer.state[p], group["betas"]
                step, second = float(state["step"]), state["exp_avg_sq"]
                if group["amsgrad"]:
                    second = state["max_exp_avg_sq"]
                root = (second / (1 - beta2**step)).sqrt() + group["eps"]
                g = state["exp_avg"] / (1 - beta1**step) / root
            power = -group["lr"] * (ALPHA * torch.sign(p) * g + BETA)
            p.mul_(torch.exp(power.clamp(-5, 5)))


# --- the formula --------------------------------------------------------------------------------


@pytest.mark.parametrize("which", OPTIMIZERS)
def test_the_step_is_that_of_the_paper_with_the_rate_of_each_group(which: str) -> None:
    models = [build(Net) for _ in range(2)]
    mine, theirs = mirrored(models[0], which), optimizer_of(models[1], which)
    plain = build(Net)
    train(plain, optimizer_of(plain, which), 0, 4)
    for step in range(4):
        for model, optimizer in zip(models, (mine, theirs), strict=True):
            optimizer.zero_grad()
            backward(model, step)
            grads = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
            optimizer.step()
            if optimizer is theirs:
                with torch.no_grad():
                    by_hand(theirs, grads, OPTIMIZERS[which][2])
    for a, b, c in zip(*(m.parameters() for m in (*models, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert a.ndim < 2 or not torch.allclose(a, c, rtol=1e-3)


def test_no_weight_changes_its_sign_and_the_exponent_is_limited() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -1.0, 0.0, 2.0]]))
    optimizer = O.SGD([weight], lr=1.0)
    MirrorStep(optimizer, 1e6)
    weight.grad = torch.tensor([[1e-4, 1e-4, 0.0, -1e-4]])
    optimizer.step()
    moved = torch.tensor([[1.0 - 1e-4, -1.0 - 1e-4, 0.0, 2.0 + 1e-4]])
    factors = torch.exp(torch.tensor([[-LIMIT, LIMIT, 0.0, LIMIT]]))
    torch.testing.assert_close(weight.detach(), moved * factors)


def test_biases_and_weights_without_a_gradient_stay_as_the_optimizer_left_them() -> None:
    models = [build(Net) for _ in range(2)]
    optimizers = [mirrored(models[0], "sgd"), optimizer_of(models[1], "sgd")]
    for model, optimizer in zip(models, optimizers, strict=True):
        backward(model, 0)
        model.fc1.weight.grad = None
        optimizer.step()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b) == (a.ndim < 2 or name == "fc1.weight"), name


def test_the_step_of_a_closure_has_a_mirror_step_and_so_has_a_step_inside_a_step() -> None:
    class Nested(O.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model, 0)

    found = []
    for kind in (O.SGD, Nested):
        model = build(Net)
        optimizer = kind(model.parameters(), lr=0.1)
        MirrorStep(optimizer, ALPHA)
        optimizer.step(closure)
        found.append(copy.deepcopy(model.state_dict()))
    once = build(Net)
    optimizer = O.SGD(once.parameters(), lr=0.1)
    MirrorStep(optimizer, ALPHA)
    backward(once, 0)
    optimizer.step()
    assert same(found[0], once.state_dict())
    assert same(found[1], once.state_dict())


def test_several_optimizers_and_removal() -> None:
    model = build(Net)
    params = list(model.parameters())
    pair = [O.SGD(params[:3], lr=0.1), O.AdamW(params[3:], lr=0.01)]
    mirror = MirrorStep(pair, ALPHA)
    assert all(len(each._optimizer_step_post_hooks) == 1 for each in pair)
    mirror.remove()
    assert not any(each._optimizer_step_post_hooks for each in pair)


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_multiplies_nothing_and_a_scaled_gradient_is_unscaled(fused: bool) -> None:
    models = [build(Net) for _ in range(2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizers = [O.SGD(m.parameters(), lr=0.1, fused=fused) for m in models]
    for optimizer in optimizers:
        MirrorStep(optimizer, ALPHA, BETA)
    scaled, plain = models
    backward(plain, 0)
    optimizers[1].step()
    scaler.scale(_loss(scaled, 0)).backward()
    scaler.step(optimizers[0])
    scaler.update()
    torch.testing.assert_close(scaled.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)
    before = copied(dict(scaled.named_parameters()))
    optimizers[0].zero_grad()
    scaler.scale(_loss(scaled, 1)).backward()
    scaled.fc1.weight.grad[0, 0] = torch.inf  # type: ignore[index]
    scaler.step(optimizers[0])
    scaler.update()
    assert same(before, dict(scaled.named_parameters()))


def _loss(model: nn.Module, index: int) -> Tensor:
    from support.helpers import batch

    x, y = batch(index)
    return nn.functional.cross_entropy(model(x), y)


# --- with a sparsifier --------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["momentum", "adamw"])
@pytest.mark.parametrize("method", METHODS)
def test_pruned_weights_stay_plus_zero(method: str, which: str) -> None:
    model = build(Net)
    optimizer = mirrored(model, which)
    sparsifier = Sparsifier(METHODS[method], model, optimizer)
    for step in range(TOTAL):
        train(model, optimizer, step, step + 1)
        assert all(is_plus_zero(weight[mask]) for _, weight, mask in dropped(sparsifier))
        assert all(weight.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("method", ["topkast", "dpf", "srste", "str"])
def test_the_dense_weights_behind_a_view_take_the_mirror_step(method: str) -> None:
    dense = []
    for alpha in (0.0, ALPHA):
        model = build(Net)
        optimizer = O.SGD(model.parameters(), lr=0.1)
        if alpha:
            MirrorStep(optimizer, alpha)
        sparsifier = Sparsifier(METHODS[method], model, optimizer)
        before = sparsifier.dense_weights
        train(model, optimizer, 0, 1)
        dense.append(sparsifier.dense_weights)
    for name, plain in dense[0].items():
        grad = model.get_parameter(name).grad
        assert grad is not None
        expected = plain * torch.exp(-0.1 * ALPHA * plain.sign() * grad)
        moved = dense[0][name] != before[name]  # Top-KAST moves set B alone
        torch.testing.assert_close(dense[1][name][moved], expected[moved], rtol=1e-4, atol=1e-6)
        assert torch.equal(dense[1][name][~moved], before[name][~moved])
        assert not torch.equal(dense[0][name], dense[1][name])


def test_a_step_that_a_method_uses_for_growth_multiplies_nothing() -> None:
    model = build(Net)
    optimizer = mirrored(model, "momentum")
    sparsifier = Sparsifier(METHODS["rigl"], model, optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, 0, 1)  # the first update of RigL
    for name, param in model.named_parameters():
        kept = sparsifier.support[name] if name in sparsifier.params else torch.ones_like(param) > 0
        assert torch.equal(param[kept], before[name][kept])


@pytest.mark.parametrize("which", ["momentum", "adamw"])
@pytest.mark.parametrize("stop", [1, REVIVAL + 1, 7])
def test_a_resumed_run_ends_bitwise_where_the_other_ends(which: str, stop: int) -> None:
    def start() -> tuple[nn.Module, Optimizer, Sparsifier]:
        model = build(Net)
        optimizer = mirrored(model, which)
        return model, optimizer, Sparsifier(METHODS["acdc"], model, optimizer)

    whole = start()
    train(*whole[:2])
    first, second = start(), start()
    train(*first[:2], 0, stop)
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(copied(old.state_dict()))
    train(*second[:2], stop)
    assert all(same(a.state_dict(), b.state_dict()) for a, b in zip(whole, second, strict=True))


# --- steps on kept elements ---------------------------------------------------------------------


class Run:
    """AC/DC with an engine, and with or without steps on kept elements."""

    def __init__(self, which: str, kept: bool) -> None:
        self.model = build(Net)
        # Its gradient is nothing but rounding, of which AdamW makes whole steps.
        self.model.conv2.bias.requires_grad_(False)
        self.optimizer = mirrored(self.model, which)
        engine = Engine(self.model, torch.zeros(8, 3, 4, 4), choose=False)
        self.sparsifier = Sparsifier(METHODS["acdc"], self.model, self.optimizer, engine=engine)
        (steps,) = self.sparsifier._masking._kept_steps
        steps._worth = lambda *_: kept

    def parts(self) -> tuple[Any, ...]:
        return self.model, self.optimizer, self.sparsifier


@pytest.mark.parametrize("which", [w for w in OPTIMIZERS if "maximize" not in w])
def test_kept_elements_take_the_step_of_a_masked_dense_one(which: str) -> None:
    kept, plain = Run(which, True), Run(which, False)
    for step in range(TOTAL):
        for run in (kept, plain):
            train(run.model, run.optimizer, step, step + 1)
        if step in (2, 7):  # within a sparse phase
            weights = kept.sparsifier.params.values()
            assert all(kept_in_last_step(kept.optimizer, p) for p in weights)
            assert not any(kept_in_last_step(plain.optimizer, p) for p in plain.model.parameters())
        for a, b in zip(kept.model.parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert all(is_plus_zero(w[mask]) for _, w, mask in dropped(kept.sparsifier))


def test_the_moments_of_kept_elements_stay_vectors() -> None:
    run = Run("adamw", True)
    train(run.model, run.optimizer, 0, 3)
    for param in run.sparsifier.params.values():
        state = run.optimizer.state[param]
        assert isinstance(state, KeptState)
        assert state._are_kept == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("stop", [3, 7])
def test_a_resumed_run_with_kept_steps_ends_bitwise_where_the_other_ends(stop: int) -> None:
    whole, first, second = (Run("adamw", True) for _ in range(3))
    train(whole.model, whole.optimizer)
    train(first.model, first.optimizer, 0, stop)
    for old, new in zip(first.parts(), second.parts(), strict=True):
        new.load_state_dict(copied(old.state_dict()))
    train(second.model, second.optimizer, stop)
    assert same(whole.model.state_dict(), second.model.state_dict())
    assert same(whole.optimizer.state_dict(), second.optimizer.state_dict())


# --- what is refused ----------------------------------------------------------------------------


class Copies(Optimizer):
    """Moves the weights from a copy, as MADGRAD and schedule-free optimizers do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("x0", p.detach().clone())
                state.setdefault("sum", torch.zeros_like(p)).add_(p.grad)
                p.copy_(state["x0"] - group["lr"] * state["sum"])


class NoRate(Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


class LikeAdam(Optimizer):
    """Has the options of Adam, and another state."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            self.state[p]["m"] = torch.zeros_like(p)


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 3))]


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "alpha": (lambda: MirrorStep(O.SGD(params()), -1.0), "alpha is -1.0. It is a number from 0"),
    "nan": (lambda: MirrorStep(O.SGD(params()), float("nan")), "alpha is nan"),
    "beta": (lambda: MirrorStep(O.SGD(params()), 1.0, float("inf")), "beta is inf"),
    "nothing": (lambda: MirrorStep(O.SGD(params()), 0.0), "alpha=0 and beta=0"),
    "lbfgs": (lambda: MirrorStep(O.LBFGS(params()), 1.0), "LBFGS takes several steps"),
    "no rate": (lambda: MirrorStep(NoRate(params()), 1.0), "NoRate has no learning rate"),
    "no moments": (
        lambda: MirrorStep(O.SGD(params()), 1.0, normalized=True),
        "SGD has not the options 'betas' and 'eps'",
    ),
    "complex": (
        lambda: MirrorStep(O.SGD([nn.Parameter(torch.ones(2, 2) * 1j)]), 1.0),
        "A parameter is complex",
    ),
    "copy": (
        lambda: MirrorStep(Copies(params()), 1.0),
        r"Copies keeps a copy of the weights \('x0",
    ),
    "nesterov": (
        lambda: MirrorStep(O.SGD(params(), momentum=0.9, nesterov=True, foreach=True), 1.0),
        "SGD with these options changes the gradients in place",
    ),
    "rprop": (lambda: MirrorStep(O.Rprop(params(), foreach=True), 1.0), "Rprop with these options"),
    "no optimizer": (lambda: MirrorStep(build(Net), 1.0), "is a .*Net, and not an optimizer"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_has_no_mirror_step_is_refused(which: str) -> None:
    make, sentence = REFUSED[which]
    with pytest.raises(InputError, match=sentence):
        make()


def test_an_unknown_state_is_refused_at_the_first_step() -> None:
    (param,) = params()
    optimizer = LikeAdam([param])
    MirrorStep(optimizer, 1.0, normalized=True)
    param.grad = torch.ones(2, 3)
    with pytest.raises(InputError, match=r"LikeAdam keeps no 'step' but \['m'\]"):
        optimizer.step()


def test_a_mirror_step_comes_before_the_sparsifier() -> None:
    model = build(Net)
    optimizer = optimizer_of(model, "sgd")
    sparsifier = Sparsifier(METHODS["topkast"], model, optimizer)
    with pytest.raises(InputError, match="Build the MirrorStep first, then the Sparsifier"):
        MirrorStep(optimizer, 1.0)
    sparsifier.remove()
    MirrorStep(optimizer, 1.0)
