"""The contract of the sparsifier, each line over one table of methods, patterns and optimizers.

A class missing from the table fails the suite. A letter such as (A1) names a bug of a peer that the
test shows to be absent. The file takes about two minutes on one thread.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
import os
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import acdc.methods
from acdc.errors import InputError
from acdc.layers import Layers, unwrapped
from acdc.methods.acdc import ACDC
from acdc.methods.base import RESETS, Method
from acdc.methods.dense import Dense
from acdc.methods.dpf import DPF
from acdc.methods.dsd import DSD
from acdc.methods.families import Phased, Rising
from acdc.methods.gmp import GMP
from acdc.methods.gradual import Gradual
from acdc.methods.granet import GraNet
from acdc.methods.imp import IMP
from acdc.methods.oneshot import OneShot
from acdc.methods.partial import PartialACDC
from acdc.methods.rigl import RigL
from acdc.methods.set_ import SET
from acdc.methods.snfs import SNFS
from acdc.methods.snip import SNIP
from acdc.methods.srste import SRSTE
from acdc.methods.static import Static
from acdc.methods.str_ import STR
from acdc.methods.topkast import TopKAST
from acdc.methods.woodfisher import WoodFisher
from acdc.pattern import NM, Block, Pattern, Unstructured
from acdc.schedule import Phase, Schedule, alternate, constant
from acdc.sparsifier import Sparsifier
from acdc.support import Support
from support.helpers import (
    CUTS,
    REVIVAL,
    SCHEDULE,
    TOTAL,
    Factory,
    Flat,
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
    steps,
    train,
)

# --- the table -----------------------------------------------------------------------------------


class Eager(torch.optim.Optimizer):
    """A third-party optimizer: its constructor builds the state, and a step without state fails."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": 0, "slow": torch.zeros_like(p), "sum": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] += 1
                    state["slow"].mul_(0.9).add_(p.grad)
                    state["sum"].add_(p.grad.abs())
                    rate = group["lr"] / (1 + 0.1 * state["step"])
                    p.sub_(rate * state["slow"] / (0.1 + state["sum"].sqrt()))
        return loss


@dataclass(frozen=True)
class Row:
    """An optimizer, its arguments, and the network that it can train."""

    kind: type[torch.optim.Optimizer]
    fields: tuple[tuple[str, Any], ...]
    network: type[nn.Module] = Net

    def __call__(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.kind(model.parameters(), **dict(self.fields))


def row(kind: type[torch.optim.Optimizer], network: type[nn.Module] = Net, **fields: Any) -> Row:
    return Row(kind, tuple(fields.items()), network)


O = torch.optim  # noqa: E741
WD = {"weight_decay": 1e-2}
OPTIMIZERS = {
    "sgd": row(O.SGD, lr=0.1),
    "momentum": row(O.SGD, lr=0.1, momentum=0.9, dampening=0.1),
    "nesterov": row(O.SGD, lr=0.1, momentum=0.9, nesterov=True, **WD),
    "sgd-foreach": row(O.SGD, lr=0.1, momentum=0.9, foreach=True, **WD),
    "sgd-fused": row(O.SGD, lr=0.1, momentum=0.9, fused=True, **WD),
    "adam": row(O.Adam, lr=0.01, **WD),
    "adam-foreach": row(O.Adam, lr=0.01, foreach=True, **WD),
    "adam-fused": row(O.Adam, lr=0.01, fused=True, **WD),
    "adamw": row(O.AdamW, lr=0.01, **WD),
    "adamw-amsgrad": row(O.AdamW, lr=0.01, amsgrad=True, **WD),
    "adamw-fused": row(O.AdamW, lr=0.01, fused=True, amsgrad=True, **WD),
    "rmsprop": row(O.RMSprop, lr=0.01, momentum=0.9, centered=True, **WD),
    "adagrad": row(O.Adagrad, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.1, **WD),
    "nadam": row(O.NAdam, lr=0.01, **WD),
    "radam": row(O.RAdam, lr=0.01, **WD),
    "adamax": row(O.Adamax, lr=0.01, **WD),
    "adadelta": row(O.Adadelta, lr=1.0, **WD),
    "asgd": row(O.ASGD, lr=0.05, t0=2, **WD),
    "rprop": row(O.Rprop, lr=0.01),
    "adafactor": row(O.Adafactor, lr=0.01, **WD),
    "muon": row(O.Muon, Flat, lr=0.02, **WD),
    "stranger": row(Eager),
}
REFUSED_OPTIMIZERS = {O.LBFGS, O.SparseAdam}  # one flat history; takes no dense gradient

PATTERNS: dict[str, Pattern] = {
    "global": Unstructured(0.8),
    "uniform": Unstructured(0.75, "uniform"),
    "erk": Unstructured(0.8, "erk"),
    "overrides": Unstructured(0.85, overrides={"fc1": 0.5}, floor=3),
    "2:4": NM(2, 4),
    "block": Block((4, 1), 0.75),
}

METHODS: dict[str, Callable[[Any, Schedule], Method]] = {
    "acdc": lambda pattern, schedule: ACDC(pattern, schedule),
    "dense": lambda pattern, schedule: Dense(schedule),
    "static": lambda pattern, schedule: Static(pattern, schedule, seed=3),
    "snip": lambda pattern, schedule: SNIP(pattern, schedule),
    "set": lambda pattern, schedule: SET(pattern, schedule, every="1st", until="100%"),
    "snfs": lambda pattern, schedule: SNFS(pattern, schedule, every="1st"),
    "rigl": lambda pattern, schedule: RigL(pattern, schedule, every="2st", until="100%"),
    "gmp": lambda pattern, schedule: GMP(pattern, schedule, every="1st", length="1st"),
    "str": lambda pattern, schedule: STR(pattern, schedule, first=0.4, every="1st", length="1st"),
    "topkast": lambda pattern, schedule: TopKAST(pattern, schedule, 0.4, every="1st"),
    "dpf": lambda pattern, schedule: DPF(pattern, schedule, every="1st", length="1st"),
    "srste": lambda pattern, schedule: SRSTE(pattern, schedule, every="1st"),
    "dsd": lambda pattern, schedule: DSD(pattern, schedule),
    "oneshot": lambda pattern, schedule: OneShot(pattern, schedule),
    "gradual": lambda pattern, schedule: Gradual(pattern, schedule, every="1st", length="1st"),
    "woodfisher": lambda pattern, schedule: WoodFisher(
        pattern, schedule, every="1st", length="1st", gradients=2, block=30
    ),
    "granet": lambda pattern, schedule: GraNet(pattern, schedule, every="1st", length="1st"),
    "imp": lambda pattern, schedule: IMP(pattern, schedule, share=0.9, rewind="1st"),
    # From step 2 to 8 the sparsity rises; at 7 the layers grow.
    "acdc_partial": lambda pattern, schedule: PartialACDC(
        pattern, schedule, every="1st", length="6st", period="5st", width="1st", factor=1.5
    ),
}
# One sparsity is all that 2:4 has, and who exchanges weights does so one by one.
NOT_SERVED = {(m, "2:4") for m in ("set", "snfs", "rigl", "gmp", "gradual", "topkast", "dpf")}
NOT_SERVED |= {("woodfisher", "2:4"), ("imp", "2:4")}
NOT_SERVED |= {("srste", p) for p in PATTERNS if p != "2:4"}  # it is for N:M alone
NOT_SERVED |= {(m, p) for m in ("granet", "acdc_partial") for p in ("2:4", "block")}
NOT_SERVED |= {(m, "block") for m in ("set", "snfs", "rigl")}
NOT_SERVED |= {("str", p) for p in ("uniform", "erk", "2:4", "block")}  # it learns the layers' own


def entry(m: str, p: str, o: str) -> Any:
    method = METHODS[m](PATTERNS[p], SCHEDULE)
    if o == "adafactor" and method.reset == "entered":  # which it refuses
        method = replace(method, reset="none")
    return pytest.param(method, OPTIMIZERS[o], id=f"{m}-{p}-{o}")


# A pattern can change what an optimizer does only where the state of dropped weights is reset. So
# every method with every pattern meets two optimizers, one without state and one with, and every
# method with one pattern meets every optimizer. ACDC_FULL=1 runs the full product.
FULL = os.environ.get("ACDC_FULL") == "1"
FOR_EVERY_PATTERN = {"sgd", "adam"}
SERVED = [  # "dense" has no pattern
    (m, p)
    for m, p in itertools.product(METHODS, PATTERNS)
    if (m, p) not in NOT_SERVED and (m != "dense" or p == "global")
]
FOR_EVERY_OPTIMIZER = dict(reversed(SERVED))  # the first pattern that a method serves
TABLE = [
    entry(m, p, o)
    for (m, p), o in itertools.product(SERVED, OPTIMIZERS)
    if FULL or o in FOR_EVERY_PATTERN or p == FOR_EVERY_OPTIMIZER[m]
]
whole_table = pytest.mark.parametrize(("method", "row"), TABLE)
# Where a pattern can make no difference: every optimizer under the paper's method.
OVER_OPTIMIZERS = [
    pytest.param(ACDC(PATTERNS["global"], SCHEDULE), row, id=name)
    for name, row in OPTIMIZERS.items()
]
every_optimizer = pytest.mark.parametrize(("method", "row"), OVER_OPTIMIZERS)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


def final(base: type) -> set[type]:
    """Return the final subclasses that the library itself defines."""
    below = set(base.__subclasses__())
    found = set().union(*(final(cls) or {cls} for cls in below)) if below else set()
    return {cls for cls in found if cls.__module__.startswith(("acdc.", "torch.optim."))}


def test_every_method_pattern_and_optimizer_is_in_the_table() -> None:
    for module in pkgutil.iter_modules(acdc.methods.__path__):
        importlib.import_module(f"acdc.methods.{module.name}")
    # Given takes a support, which no pattern chooses: tests/test_given.py has its contract.
    assert final(Method) == {*acdc.methods.METHODS.values(), acdc.methods.Given}
    assert set(METHODS) == set(acdc.methods.METHODS)
    for name, make in METHODS.items():
        pattern = next(p for p in PATTERNS if (name, p) not in NOT_SERVED)
        assert type(make(PATTERNS[pattern], SCHEDULE)) is acdc.methods.METHODS[name]
    assert final(Pattern) == {type(pattern) for pattern in PATTERNS.values()}
    public = {cls for _, cls in inspect.getmembers(torch.optim, inspect.isclass)}
    known = {row.kind for row in OPTIMIZERS.values()} | REFUSED_OPTIMIZERS | {O.Optimizer}
    assert public <= known, f"not in the table: {public - known}"
    rows = {row.id for row in TABLE}
    assert rows >= {f"{m}-{p}-{o}" for m, p in SERVED for o in FOR_EVERY_PATTERN}
    assert all(any(f"{m}-{p}-{o}" in rows for p in PATTERNS) for m in METHODS for o in OPTIMIZERS)
    # One of the two has no state and one has, or the half table would find less than the full one.
    stateful = set()
    for name in FOR_EVERY_PATTERN:
        model, optimizer, _ = bind(METHODS["dense"](None, SCHEDULE), OPTIMIZERS[name])
        train(model, optimizer, 0, 1)
        stateful |= {bool(optimizer.state)}
    assert stateful == {True, False}


@pytest.mark.parametrize(("m", "p"), sorted(NOT_SERVED))
def test_a_pattern_that_a_method_cannot_keep_is_refused(m: str, p: str) -> None:
    with pytest.raises(
        InputError, match=r"pattern=...\) is .*, which this method cannot keep. Giv"
    ):
        METHODS[m](PATTERNS[p], SCHEDULE)


def is_sparse(step: int) -> bool:
    return SCHEDULE.phase_at(step).kind == "sparse"


# --- 1: in a sparse phase exactly the kept weights are there -------------------------------------


def pattern_of(method: Method, step: int) -> Pattern | None:
    """Return the support after ``step`` executed steps, or None if all weights are kept."""
    if not is_sparse(step) or not isinstance(method, Phased):
        return None
    if isinstance(method, SNIP) and step == SCHEDULE.phase_at(step).start:
        return None  # it measures first
    return method._at(step) if isinstance(method, Rising) else method.pattern


def is_grown(method: Method, step: int) -> bool:
    """Whether the layers have more weights after a step than the pattern says."""
    return isinstance(method, PartialACDC) and any(a <= step < b for a, b in method.decompressions)


@whole_table
def test_outside_the_support_weights_and_gradients_are_zero_bit_for_bit(
    method: Method, row: Row
) -> None:
    model, optimizer, sparsifier = bind(method, row, row.network)
    shapes = {name: tuple(p.shape) for name, p in sparsifier.params.items()}
    moved = False
    for step in steps(model, optimizer):
        assert sparsifier.step == step
        pattern = pattern_of(method, step)
        if pattern is None or pattern.target == 0:
            assert sparsifier.support.is_full
            continue
        counts, nnz = sparsifier.support.counts(), sparsifier.support.nnz
        if is_grown(method, step):
            assert pattern.total(shapes) < nnz < sparsifier.support.numel
        else:
            assert nnz == pattern.total(shapes) < sparsifier.support.numel
            assert isinstance(method, SNFS) or pattern.counts(shapes) in (None, counts)
        assert all(counts.values())  # no layer dies
        for name, weight, mask in dropped(sparsifier):
            assert is_plus_zero(weight[mask]), name
            assert weight.grad is not None
            assert method.training.wants_dense_gradient(step) or is_plus_zero(weight.grad[mask]), (
                name
            )
            moved |= bool(weight.any())
    assert sparsifier.step == TOTAL
    assert moved == isinstance(method, Phased)
    changes = {c.step for c in sparsifier.changes}
    assert changes >= {2, 4, 6} if moved else not changes
    assert not isinstance(method, ACDC) or changes == {2, 4, 6}


@every_pattern
def test_at_the_compression_the_largest_dense_weights_stay_as_they_are(pattern: Pattern) -> None:
    model, optimizer, sparsifier = bind(ACDC(pattern, SCHEDULE), sgd)
    plain_model = build()
    plain_optimizer = sgd(plain_model)
    train(model, optimizer, 0, CUTS[0])
    train(plain_model, plain_optimizer, 0, CUTS[0])
    expected = pattern.select({n: plain_model.get_parameter(n).abs() for n in sparsifier.params})
    assert sparsifier.support == expected
    for name, value in plain_model.state_dict().items():  # biases and batch norms included
        if name in expected:
            value = value.masked_fill(~expected[name], 0)
        assert same(model.state_dict()[name], value), name
    assert same(optimizer.state_dict(), plain_optimizer.state_dict())  # nothing reset on the way


def test_dropped_weights_are_plus_zero_whatever_a_step_left_there() -> None:
    # (A19) Multiplying by the mask leaves -0.0 for a negative weight and NaN for NaN and infinity.
    long = ACDC(Unstructured(0.5), constant("sparse", 1).resolve(TOTAL))
    model, optimizer, sparsifier = bind(long, sgd)
    train(model, optimizer, 0, 2)
    for poison in (float("nan"), float("inf"), -float("inf"), -1.0, -0.0):
        with torch.no_grad():
            for _, weight, mask in dropped(sparsifier):
                weight[mask] = poison
        optimizer.zero_grad()
        optimizer.step()  # no gradient anywhere: the step moves nothing, the projection must
        for _, weight, mask in dropped(sparsifier):
            assert is_plus_zero(weight[mask])
            assert torch.isfinite(weight).all()


@every_optimizer
def test_a_poisoned_gradient_outside_the_support_never_arrives(method: Method, row: Row) -> None:
    model, optimizer, sparsifier = bind(method, row, row.network)
    train(model, optimizer, 0, 2)
    optimizer.zero_grad()
    for _, weight, mask in dropped(sparsifier):
        bad = torch.zeros_like(weight)
        bad[mask] = float("nan")
        weight.register_hook(lambda grad, bad=bad: grad + bad)  # before it is accumulated
    backward(model, 2)
    assert all(torch.isfinite(p.grad).all() for p in sparsifier.params.values())  # type: ignore[arg-type]
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


@every_optimizer
def test_accumulated_and_clipped_gradients_see_only_kept_weights(method: Method, row: Row) -> None:
    model, optimizer, sparsifier = bind(method, row, row.network)
    train(model, optimizer, 0, 2)
    for step in range(2, 4):
        twin = copy.deepcopy(model)  # copies carry no hooks, so it has the whole gradients
        optimizer.zero_grad()
        for micro in range(3):
            backward(model, 10 * step + micro)
            backward(twin, 10 * step + micro)
        support = sparsifier.support
        for name, p in twin.named_parameters():
            if name in support:
                assert p.grad is not None
                assert p.grad[~support[name]].any()
                p.grad.masked_fill_(~support[name], 0)
        expected = nn.utils.get_total_norm([p.grad for p in twin.parameters()])
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        assert torch.equal(norm, expected)
        assert sparsifier.step == step  # three backward passes are no step
        optimizer.step()
        assert sparsifier.step == step + 1
        assert all(is_plus_zero(w[mask]) for _, w, mask in dropped(sparsifier))


@every_optimizer
def test_a_step_that_the_grad_scaler_skips_is_no_step(method: Method, row: Row) -> None:
    model, optimizer, sparsifier = bind(method, row, row.network)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    executed = 0
    for attempt in range(12):
        overflow = attempt in (1, 4, 5)  # in a dense and in a sparse phase
        optimizer.zero_grad()
        x, y = batch(attempt)
        loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss * (float("inf") if overflow else 1.0)).backward()
        before = copy.deepcopy((list(model.parameters()), optimizer.state_dict()))
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert same((list(model.parameters()), optimizer.state_dict()), before)
        executed += not overflow
        assert sparsifier.step == executed
        assert sparsifier.support.is_full != is_sparse(executed)
        assert all(is_plus_zero(w[mask]) for _, w, mask in dropped(sparsifier))
    assert executed == TOTAL


@every_optimizer
def test_closures_are_called_once_and_their_loss_comes_back(method: Method, row: Row) -> None:
    # (A15) A replaced optimizer.step that takes no closure, or never calls it.
    model, optimizer, sparsifier = bind(method, row, row.network)
    reference, other, _ = bind(method, row, row.network)
    losses: list[Tensor] = []
    step = 0

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses.append(backward(model, step))
        return losses[-1]

    for step in range(TOTAL):  # noqa: B007  (the closure reads it)
        assert optimizer.step(closure) is losses[-1]
    assert len(losses) == TOTAL == sparsifier.step
    train(reference, other)
    assert same(model.state_dict(), reference.state_dict())


# --- 2: entering a dense phase -------------------------------------------------------------------


def state_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, str, Any]]:
    for p, state in optimizer.state.items():
        for key, value in state.items():
            yield p, key, value


@pytest.mark.parametrize("set_to_none", [True, False])
@every_optimizer
def test_first_dense_step_is_that_of_a_fresh_optimizer(
    method: Method, row: Row, set_to_none: bool
) -> None:
    # (A1) A reset that skips parameters whose gradient is None resets nothing since torch 2.0.
    # (A2) A reset after the first dense step, or of the momentum alone, moves revived weights by
    # old moments. (A6) exp_avg_sq and max_exp_avg_sq left as they were.
    model, optimizer, sparsifier = bind(method, row, row.network)
    for step in range(REVIVAL):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert sparsifier.step == REVIVAL
    assert sparsifier.support.is_full

    for p, key, value in state_of(optimizer):  # before the first dense step, everything is as new
        fresh = row(build(row.network)).state if row.kind in (O.Adagrad, Eager) else {}
        assert fresh, f"{key} of shape {tuple(p.shape)} was kept"
        start = 0.1 if (row.kind, key) == (O.Adagrad, "sum") else 0.0
        assert bool(torch.as_tensor(value == torch.tensor(start)).all()), key

    twin = copy.deepcopy(model)
    fresh_optimizer = row(twin)
    for net, opt in ((model, optimizer), (twin, fresh_optimizer)):
        backward(net, REVIVAL)
        opt.step()
    assert same(model.state_dict(), twin.state_dict())
    assert same(optimizer.state_dict()["state"], fresh_optimizer.state_dict()["state"])


def test_momentum_of_a_weight_without_a_gradient_is_reset_too() -> None:
    # (A1) once more: a branch that the last sparse step did not use.
    model, optimizer, _ = bind(ACDC(Unstructured(0.8), SCHEDULE), sgd)
    train(model, optimizer, 0, REVIVAL - 1)
    optimizer.zero_grad()
    backward(model, REVIVAL - 1)
    model.fc1.weight.grad = None
    assert optimizer.state[model.fc1.weight]["momentum_buffer"].any()
    optimizer.step()
    assert not optimizer.state.get(model.fc1.weight)


@pytest.mark.parametrize("set_to_none", [True, False])
@every_pattern
def test_first_dense_step_under_every_pattern(pattern: Pattern, set_to_none: bool) -> None:
    test_first_dense_step_is_that_of_a_fresh_optimizer(
        ACDC(pattern, SCHEDULE), OPTIMIZERS["adam"], set_to_none
    )


@pytest.mark.parametrize(("method", "row"), [p for p in OVER_OPTIMIZERS if p.id != "sgd"])
def test_without_the_reset_the_first_dense_step_is_another(method: ACDC, row: Row) -> None:
    # So that the test above cannot pass by accident: all of these have state to reset.
    model, optimizer, _ = bind(replace(method, reset="none"), row, row.network)
    train(model, optimizer, 0, REVIVAL)
    twin = copy.deepcopy(model)
    for net, opt in ((model, optimizer), (twin, row(twin))):
        net.zero_grad()
        backward(net, REVIVAL)
        opt.step()
    assert not same(model.state_dict(), twin.state_dict())


def last_sparse_step_by_hand(
    model: nn.Module, optimizer: torch.optim.Optimizer, row: Row, support: Support
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Take the step on a copy without a sparsifier, with gradients outside the support cleared."""
    twin = copy.deepcopy(model)
    other = row(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin.zero_grad()
    backward(twin, REVIVAL - 1)
    for name, mask in support.items():
        twin.get_parameter(name).grad.masked_fill_(~mask, 0)  # type: ignore[union-attr]
    other.step()
    return twin, other


def shaped_state(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    return {
        key: value
        for key, value in optimizer.state[p].items()
        if isinstance(value, Tensor) and value.shape == p.shape and key != "step"
    }


@every_optimizer
def test_reset_of_the_entered_weights_alone(method: ACDC, row: Row) -> None:
    method = replace(method, reset="entered")
    if row.kind is O.Adafactor:
        with pytest.raises(
            InputError, match=r"Adafactor keeps the state 'row_var'.*reset=\"none\""
        ):
            train(*bind(method, row, row.network)[:2], 0, 1)
        return
    model, optimizer, sparsifier = bind(method, row, row.network)
    train(model, optimizer, 0, REVIVAL - 1)
    support = sparsifier.support
    twin, other = last_sparse_step_by_hand(model, optimizer, row, support)
    train(model, optimizer, REVIVAL - 1, REVIVAL)

    compared = 0
    for name, p in model.named_parameters():
        was = shaped_state(other, twin.get_parameter(name))
        for key, value in shaped_state(optimizer, p).items():
            fresh = {"sum": 0.1 if row.kind is O.Adagrad else 0.0, "step_size": 0.01}.get(key, 0.0)
            expected = was[key]
            if name in support:
                expected = expected.masked_fill(~support[name], fresh)
            assert torch.equal(value, expected), (name, key)
            compared += 1
    assert compared or row.fields == OPTIMIZERS["sgd"].fields


@every_optimizer
def test_reset_none_touches_nothing(method: ACDC, row: Row) -> None:
    model, optimizer, sparsifier = bind(replace(method, reset="none"), row, row.network)
    train(model, optimizer, 0, REVIVAL - 1)
    _, other = last_sparse_step_by_hand(model, optimizer, row, sparsifier.support)
    train(model, optimizer, REVIVAL - 1, REVIVAL)
    assert same(optimizer.state_dict(), other.state_dict())


def test_state_is_reset_once_a_decompression_and_never_at_a_compression() -> None:
    schedule = alternate(8, "1ep", "1ep", "1ep").resolve(2)
    model, optimizer, sparsifier = bind(ACDC(Unstructured(0.8), schedule), adam)
    ages = []
    for _ in steps(model, optimizer, 0, schedule.total):
        ages.append({int(state["step"]) for state in optimizer.state.values()})
    # Reset after steps 4, 8 and 12, where dense phases begin; older at every other step.
    assert ages == [{1}, {2}, {3}, set()] * 3 + [{1}, {2}, {3}, {4}]
    assert [c.to for c in sparsifier.changes] == ["sparse", "dense"] * 3 + ["sparse"]


@every_pattern
def test_revived_weights_start_at_zero_and_can_move(pattern: Pattern) -> None:
    # (A8) Weights that come back must not bring their old value along.
    model, optimizer, sparsifier = bind(ACDC(pattern, SCHEDULE), sgd)
    train(model, optimizer, 0, REVIVAL - 1)
    was = {name: ~mask for name, mask in sparsifier.support.items()}
    train(model, optimizer, REVIVAL - 1, REVIVAL)
    seen: dict[str, Tensor] = {}
    hook = model.register_forward_pre_hook(
        lambda module, _: seen.update({n: module.get_parameter(n).detach().clone() for n in was})
    )
    train(model, optimizer, REVIVAL, REVIVAL + 1)
    hook.remove()
    moved = 0
    for name, mask in was.items():
        assert is_plus_zero(seen[name][mask])
        grad = model.get_parameter(name).grad
        assert grad is not None
        moves = grad[mask] != 0
        assert torch.equal(model.get_parameter(name)[mask] != 0, moves)
        moved += int(moves.sum())
    assert moved > 0


def test_state_that_cannot_be_reset_is_refused_before_the_first_step() -> None:
    class Strange(Eager):
        def __init__(self, params: Any, value: Any) -> None:
            super().__init__(params)
            for state in self.state.values():
                state["history"] = value

    method = ACDC(Unstructured(0.8), SCHEDULE)
    for value in (torch.zeros(7), [torch.zeros(3)], {"left": torch.zeros(2, 2)}):
        for reset in RESETS:
            model = build()
            optimizer = Strange(model.parameters(), value)
            if reset == "none":
                Sparsifier(replace(method, reset=reset), model, optimizer)
                train(model, optimizer)
            else:
                sentence = r"Strange keeps the state 'history'.*'conv1.weight'.*reset=\"none\""
                with pytest.raises(InputError, match=sentence):
                    Sparsifier(replace(method, reset=reset), model, optimizer)


# --- 3: stop and resume --------------------------------------------------------------------------


@whole_table
def test_stopping_and_resuming_after_every_step_is_the_run_that_did_not_stop(
    method: Method, row: Row
) -> None:
    # (A4, A9, A10) Resuming brings back phase, masks and the twin, not the weights alone. All is
    # built anew from a checkpoint after every single step. For one pattern these are the bytes of a
    # file, which must hold plain data only (torch.load with weights_only=True).
    through_a_file = getattr(method, "pattern", None) in (None, PATTERNS["global"])
    hold = copied if through_a_file else copy.deepcopy

    def everything(model: nn.Module, optimizer: Any, sparsifier: Sparsifier) -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "sparsifier": sparsifier.state_dict(),
        }

    whole = bind(method, row, row.network)
    parts = bind(method, row, row.network)
    for step, _ in enumerate(steps(*whole[:2])):
        train(*parts[:2], step, step + 1)
        checkpoint = hold(everything(*parts))
        assert same(checkpoint, everything(*whole)), f"after {step + 1} steps"
        model = build(row.network, seed=99)  # another start: nothing but the checkpoint counts
        optimizer = row(model)
        sparsifier = Sparsifier(method, model, optimizer)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        sparsifier.load_state_dict(checkpoint["sparsifier"])
        parts = model, optimizer, sparsifier
        assert sparsifier.support == whole[2].support
        assert sparsifier.phase == whole[2].phase
        assert sparsifier.changes == whole[2].changes
    assert same(everything(*parts), everything(*whole))


@pytest.mark.parametrize(
    "names", list(itertools.permutations(("model", "optimizer", "sparsifier")))
)
@pytest.mark.parametrize("first", ["dense", "sparse"])
def test_the_order_of_loading_does_not_matter(names: tuple[str, ...], first: str) -> None:
    schedule = SCHEDULE
    if first == "sparse":
        schedule = Schedule(
            (Phase("sparse", 0, 3), Phase("dense", 3, 6), Phase("sparse", 6, 9)), (9,)
        )
    method = ACDC(Unstructured(0.8), schedule)
    model, optimizer, sparsifier = bind(method, sgd)
    train(model, optimizer, 0, 5)
    parts = {"model": model, "optimizer": optimizer, "sparsifier": sparsifier}
    checkpoint = copied({name: part.state_dict() for name, part in parts.items()})
    train(model, optimizer, 5)

    other = bind(method, sgd)
    for name in names:
        dict(zip(("model", "optimizer", "sparsifier"), other, strict=True))[name].load_state_dict(
            checkpoint[name]
        )
    train(*other[:2], 5)
    assert same(other[0].state_dict(), model.state_dict())


def other_run(what: str) -> Sparsifier:
    model, schedule = build(), SCHEDULE
    method: Method = ACDC(Unstructured(0.8), schedule)
    if what == "layers":
        method = ACDC(Unstructured(0.8), schedule, layers=Layers(exclude=("fc1",)))
    if what == "shape":
        model.fc1 = nn.Linear(8, 6)
        model.fc2 = nn.Linear(6, 4)
    if what == "pattern":
        method = ACDC(Unstructured(0.9), schedule)
    if what == "reset":
        method = ACDC(Unstructured(0.8), schedule, reset="none")
    if what == "schedule":
        method = ACDC(Unstructured(0.8), alternate(9, "3ep", "1ep", "1ep", "1ep", "2ep").resolve(1))
    if what == "method":
        method = Dense(schedule)
    return Sparsifier(method, model, sgd(model))


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("layers", "1 weights differ, 'fc1.weight' first.*absent here"),
        ("shape", r"2 weights differ, 'fc1.weight' first \(\(8, 8\) there, \(6, 8\) here\)"),
        ("pattern", r"another run.*sparsity=0.8.*sparsity=0.9"),
        ("reset", r"another run.*reset='all'.*reset='none'"),
        ("schedule", r"another run.*a sparse phase at step 2 where this one has a sparse"),
        ("method", "another model, or other layers"),
        ("format", "has format 99, and this version of acdc reads format"),
    ],
)
def test_the_state_of_another_run_is_refused_and_nothing_changes(what: str, sentence: str) -> None:
    model, optimizer, sparsifier = bind(ACDC(Unstructured(0.8), SCHEDULE), sgd)
    train(model, optimizer, 0, 7)
    state = sparsifier.state_dict()
    other = other_run(what)
    if what == "format":
        state["format"] = 99
    before = copy.deepcopy((other.state_dict(), other.model.state_dict()))
    with pytest.raises(InputError, match=sentence):
        other.load_state_dict(state)
    assert same((other.state_dict(), other.model.state_dict()), before)


def test_a_damaged_state_is_refused_and_nothing_changes() -> None:
    model, optimizer, sparsifier = bind(ACDC(Unstructured(0.8), SCHEDULE), sgd)
    train(model, optimizer, 0, 7)
    other = bind(ACDC(Unstructured(0.8), SCHEDULE), sgd)[2]
    before = copy.deepcopy((other.state_dict(), other.model.state_dict()))
    state = sparsifier.state_dict()
    state["support"]["fc1.weight"] = state["support"]["fc1.weight"][:-1]
    with pytest.raises(InputError, match="belongs to another model, or the file is damaged"):
        other.load_state_dict(state)
    assert same((other.state_dict(), other.model.state_dict()), before)


def test_a_dense_run_of_the_same_schedule_does_not_take_a_sparse_state() -> None:
    model, optimizer, sparsifier = bind(ACDC(Unstructured(0.8), SCHEDULE), sgd)
    train(model, optimizer, 0, 3)
    dense = other_run("method")
    with pytest.raises(InputError):
        dense.load_state_dict(sparsifier.state_dict())
    with pytest.raises(InputError):
        sparsifier.load_state_dict(dense.state_dict())


# --- 4: the model stays the user's own -----------------------------------------------------------


@every_pattern
def test_keys_copies_and_pickles(pattern: Pattern) -> None:
    keys = list(build().state_dict())
    model, optimizer, sparsifier = bind(ACDC(pattern, SCHEDULE), sgd)
    for step in steps(model, optimizer):
        assert list(model.state_dict()) == keys
        assert [n for n, _ in model.named_parameters()] == [
            n for n, _ in build().named_parameters()
        ]
        assert type(model) is Net
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert same(clone.state_dict(), model.state_dict())
            if is_sparse(step):
                for name, mask in sparsifier.support.items():
                    assert is_plus_zero(clone.get_parameter(name)[~mask])


def test_a_copy_does_not_follow_and_is_not_followed() -> None:
    model, optimizer, sparsifier = bind(ACDC(Unstructured(0.8), SCHEDULE), sgd)
    train(model, optimizer, 0, 3)
    clone = copy.deepcopy(model)
    clone.zero_grad()
    backward(clone, 3)
    name, mask = next(iter(sparsifier.support.items()))
    assert clone.get_parameter(name).grad[~mask].any()  # type: ignore[index]
    sgd(clone).step()
    assert sparsifier.step == 3
    assert clone.get_parameter(name)[~mask].any()


def test_averages_are_projected() -> None:
    # An average mixes weights from before the compression: without project() it is dense.
    for average in (
        lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
        lambda m: AveragedModel(m),
    ):
        model, optimizer, sparsifier = bind(ACDC(Unstructured(0.8), SCHEDULE), sgd)
        ema = average(model)
        for step in steps(model, optimizer):
            ema.update_parameters(model)
            inner = dict(ema.module.named_parameters())
            if step in CUTS:
                assert any(inner[n][~m].any() for n, m in sparsifier.support.items())
            sparsifier.project(ema)
            assert all(is_plus_zero(inner[n][~m]) for n, m in sparsifier.support.items())
            assert all(inner[n].any() for n in sparsifier.support)
    sparsifier.project(model)
    sparsifier.project(nn.DataParallel(copy.deepcopy(model)))
    sparsifier.project(AveragedModel(nn.DataParallel(copy.deepcopy(model))))
    with pytest.raises(InputError, match=r"has no parameter 'conv1.weight'. Give a copy"):
        sparsifier.project(Flat())


ONE_PATTERN_EACH = [
    pytest.param(make(PATTERNS[pattern], SCHEDULE), id=f"{name}-{pattern}")
    for name, make in METHODS.items()
    for pattern in ("global", "2:4")
    if (name, pattern) not in NOT_SERVED and (name, pattern) != ("dense", "2:4")
]


@pytest.mark.parametrize("method", ONE_PATTERN_EACH)
def test_compiled_models_keep_the_zeros(method: Method) -> None:
    torch._dynamo.reset()
    reference, other, _ = bind(method, sgd)
    model = build()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = sgd(model)
    sparsifier = Sparsifier(method, compiled, optimizer)
    assert sparsifier.model is model
    for step in range(TOTAL):
        optimizer.zero_grad()
        backward(compiled, step)
        optimizer.step()
        for _, weight, mask in dropped(sparsifier):
            assert is_plus_zero(weight[mask])
            assert weight.grad is not None
            assert method.name != "acdc" or is_plus_zero(weight.grad[mask])
    train(reference, other)
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_two_models_in_one_process() -> None:
    # (A13) Class-global state allows one model per process.
    methods = (ACDC(Unstructured(0.8), SCHEDULE), ACDC(NM(2, 4), SCHEDULE))
    alone = [bind(method, factory) for method, factory in zip(methods, (sgd, adam), strict=True)]
    for model, optimizer, _ in alone:
        train(model, optimizer)
    both = [bind(method, factory) for method, factory in zip(methods, (sgd, adam), strict=True)]
    for step in range(TOTAL):
        for model, optimizer, _ in both:
            train(model, optimizer, step, step + 1)
    for (a, _, s), (b, _, t) in zip(alone, both, strict=True):
        assert same(a.state_dict(), b.state_dict())
        assert s.support == t.support


def test_wrappers_are_seen_through() -> None:
    model = build()
    wrapped = nn.DataParallel(model)
    optimizer = sgd(model)
    sparsifier = Sparsifier(ACDC(Unstructured(0.8), SCHEDULE), wrapped, optimizer)
    assert sparsifier.model is model
    assert list(sparsifier.params) == ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]
    train(wrapped, optimizer)
    reference, other, _ = bind(ACDC(Unstructured(0.8), SCHEDULE), sgd)
    train(reference, other)
    assert same(model.state_dict(), reference.state_dict())
    assert list(sparsifier.pair().sparse) == list(reference.state_dict())
    assert unwrapped(torch.compile(nn.DataParallel(model), backend="eager")) is model
    assert unwrapped(model) is model


# --- 5: attached but dense is plain PyTorch; removed leaves a plain model ------------------------


@pytest.mark.parametrize("row", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("which", ["warm-up", "dense"])
def test_attached_but_dense_is_bitwise_plain(which: str, row: Row) -> None:
    dense: Method = Dense(constant("dense", 1).resolve(TOTAL))
    warm = ACDC(Unstructured(0.8), Schedule((Phase("dense", 0, 9), Phase("sparse", 9, 10)), (10,)))
    state = torch.get_rng_state()
    model, optimizer, sparsifier = bind(dense if which == "dense" else warm, row, row.network)
    assert torch.equal(torch.get_rng_state(), state)
    plain_model = build(row.network)
    plain_optimizer = row(plain_model)
    stop = TOTAL if which == "dense" else TOTAL - 1
    for a, b in zip(
        steps(model, optimizer, 0, stop), steps(plain_model, plain_optimizer, 0, stop), strict=True
    ):
        assert a == b == sparsifier.step
        assert same(model.state_dict(), plain_model.state_dict())
        assert same(optimizer.state_dict(), plain_optimizer.state_dict())
        assert all(
            p._post_accumulate_grad_hooks is None or not p._post_accumulate_grad_hooks
            for p in model.parameters()
        )
    assert sparsifier.changes == ()


@every_optimizer
def test_removed_leaves_a_plain_model_with_exact_zeros(method: Method, row: Row) -> None:
    model, optimizer, sparsifier = bind(method, row, row.network)
    train(model, optimizer, 0, 3)
    support = sparsifier.support
    sparsifier.remove()
    sparsifier.remove()  # twice is once
    assert all(is_plus_zero(model.get_parameter(n)[~m]) for n, m in support.items())
    twin = copy.deepcopy(model)
    other = row(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 3)
    train(twin, other, 3)
    assert same(model.state_dict(), twin.state_dict())
    assert sparsifier.step == 3
    assert any(model.get_parameter(n)[~m].any() for n, m in support.items())


# --- the twins -----------------------------------------------------------------------------------


def long_dense_end() -> Schedule:
    return replace(SCHEDULE, phases=(*SCHEDULE.phases[:2], Phase("dense", 4, 9)))


@pytest.mark.parametrize("factory", [sgd, adam], ids=["sgd", "adam"])
def test_dense_twin_is_the_network_at_the_end_of_the_last_dense_phase(factory: Factory) -> None:
    model = build()
    optimizer = factory(model)
    seen: list[Any] = []
    optimizer.register_step_post_hook(  # before the sparsifier's, so it sees what a step left
        lambda *_: seen.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
    )
    sparsifier = Sparsifier(ACDC(Unstructured(0.8), SCHEDULE), model, optimizer)
    for step in steps(model, optimizer):
        assert (sparsifier.dense_twin is not None) == (step >= CUTS[-1])
    twin = sparsifier.dense_twin
    assert twin is not None
    assert twin.step == CUTS[-1]
    assert same(twin.model, dict(seen[CUTS[-1] - 1][0]))  # running statistics included
    assert "bn1.running_mean" in twin.model
    assert int(twin.model["bn1.num_batches_tracked"]) == CUTS[-1]
    assert same(twin.optimizer, seen[CUTS[-1] - 1][1])
    assert all((twin.model[n] != 0).double().mean() > 0.6 for n in sparsifier.params)  # not cut

    pair = sparsifier.pair(note="x")
    assert same(pair.dense, twin.model)
    assert same(pair.sparse, dict(model.state_dict()))
    assert pair.support == sparsifier.support
    assert pair.facts["dense_step"] == 6
    assert pair.facts["step"] == TOTAL
    assert pair.facts["note"] == "x"


@pytest.mark.parametrize("factory", [sgd, adam], ids=["sgd", "adam"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_restored_twin_trains_on_as_if_nothing_had_been_cut(
    factory: Factory, resumed: bool
) -> None:
    model, optimizer, sparsifier = bind(ACDC(Unstructured(0.8), SCHEDULE), factory)
    train(model, optimizer)
    if resumed:
        state = copied(sparsifier.state_dict())
        model, optimizer, sparsifier = bind(ACDC(Unstructured(0.8), SCHEDULE), factory)
        sparsifier.load_state_dict(state)
    sparsifier.remove()
    twin = sparsifier.dense_twin
    assert twin is not None
    kept_for_later = copy.deepcopy(twin)
    twin.restore(model, optimizer)
    train(model, optimizer, CUTS[-1])

    uncut, other, _ = bind(ACDC(Unstructured(0.8), long_dense_end()), factory)
    train(uncut, other)
    assert same(model.state_dict(), uncut.state_dict())
    assert same(optimizer.state_dict(), other.state_dict())
    assert same(twin.model, kept_for_later.model)  # training on does not touch the twin
    assert same(twin.optimizer, kept_for_later.optimizer)


def test_no_pair_before_there_is_one() -> None:
    model, optimizer, sparsifier = bind(ACDC(Unstructured(0.8), SCHEDULE), sgd)
    for step in steps(model, optimizer):
        if step < CUTS[-1]:
            with pytest.raises(InputError, match=rf"after {step} of 9 steps.*at step 6"):
                sparsifier.pair()
        else:
            assert sparsifier.pair().facts["step"] == step
    never = bind(ACDC(Unstructured(0.8), constant("sparse", 1).resolve(9)), sgd)[2]
    with pytest.raises(InputError, match="this schedule has none"):
        never.pair()
    with pytest.raises(InputError, match="network is dense"):
        bind(Dense(SCHEDULE), sgd)[2].pair()


# --- the record of changes -----------------------------------------------------------------------


@every_pattern
def test_changes_say_what_happened(pattern: Pattern) -> None:
    model, optimizer, sparsifier = bind(
        ACDC(pattern, SCHEDULE), lambda m: O.SGD(m.parameters(), lr=1.0, momentum=0.9)
    )
    supports = []
    for step in steps(model, optimizer):
        if step in CUTS:
            supports.append(sparsifier.support)
    first, back, second = sparsifier.changes
    old, new = supports
    assert (first.step, first.to, first.nnz) == (2, "sparse", old.nnz)
    assert (first.churn, first.regrown) == (None, None)
    assert first.counts == old.counts()
    assert (back.step, back.to, back.nnz) == (4, "dense", old.numel)
    assert (back.churn, back.regrown, back.counts) == (None, None, None)
    regrown = sum(int((new[n] & ~old[n]).sum()) for n in new)
    differ = sum(int((new[n] != old[n]).sum()) for n in new)
    assert (second.step, second.to, second.nnz, second.regrown) == (6, "sparse", new.nnz, regrown)
    assert second.churn == differ / new.numel
    if old.nnz == new.nnz:  # the authors' mask similarity: twice the regrown positions
        assert second.churn == 2 * regrown / new.numel
    assert regrown > 0


def test_a_sparse_phase_that_keeps_everything_is_still_a_sparse_phase() -> None:
    model, optimizer, sparsifier = bind(ACDC(Unstructured(0.0), SCHEDULE), sgd)
    reference = build()
    train(model, optimizer)
    train(reference, sgd(reference))
    assert same(model.state_dict(), reference.state_dict())
    assert [(c.step, c.to) for c in sparsifier.changes] == [(2, "sparse"), (6, "sparse")]
    assert sparsifier.changes[0].counts == sparsifier.support.counts()
    assert sparsifier.dense_twin is not None


def test_the_repr_says_where_it_stands() -> None:
    model, optimizer, sparsifier = bind(ACDC(Unstructured(0.8), SCHEDULE), sgd)
    train(model, optimizer, 0, 3)
    assert repr(sparsifier).startswith("Sparsifier(acdc, step 3 of 9, sparse, Support(4 tensors")


# --- around it: schedulers, frozen and tied weights, other optimizers ----------------------------


def test_learning_rates_are_those_of_the_scheduler_alone() -> None:
    def rates(attached: bool) -> list[float]:
        model = build()
        optimizer = sgd(model)
        if attached:
            Sparsifier(ACDC(Unstructured(0.8), SCHEDULE), model, optimizer)
        scheduler = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL - 3),
            ],
            [3],
        )
        seen = []
        for _ in steps(model, optimizer):
            seen.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
        return seen

    assert rates(attached=True) == rates(attached=False)


def test_frozen_layers_stay_frozen() -> None:
    model = build()
    model.conv2.weight.requires_grad_(False)
    before = model.conv2.weight.clone()
    optimizer = sgd(model)
    sparsifier = Sparsifier(ACDC(Unstructured(0.8), SCHEDULE), model, optimizer)
    assert list(sparsifier.params) == ["conv1.weight", "fc1.weight", "fc2.weight"]
    train(model, optimizer)
    assert torch.equal(model.conv2.weight, before)


def test_a_layer_frozen_on_the_way_is_cut_like_the_others_and_can_thaw() -> None:
    model, optimizer, sparsifier = bind(ACDC(Unstructured(0.8), SCHEDULE), sgd)
    train(model, optimizer, 0, 1)
    model.conv2.weight.requires_grad_(False)
    train(model, optimizer, 1, 3)
    cut = sparsifier.support["conv2.weight"]
    assert not model.conv2.weight.requires_grad
    assert is_plus_zero(model.conv2.weight[~cut])
    model.conv2.weight.requires_grad_(True)
    train(model, optimizer, 3, 7)
    mask = ~sparsifier.support["conv2.weight"]
    assert is_plus_zero(model.conv2.weight[mask])
    assert model.conv2.weight.grad is not None
    assert is_plus_zero(model.conv2.weight.grad[mask])


def test_tied_weights_are_one_weight() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.twice = nn.Linear(8, 8)
            self.twice.weight = self.fc1.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn1(self.conv1(x)).relu()
            x = self.bn2(self.conv2(x)).relu().mean((2, 3))
            return self.fc2(self.twice(self.fc1(x).relu()).relu())

    model, optimizer, sparsifier = bind(ACDC(Unstructured(0.8), SCHEDULE), sgd, Tied)
    assert list(sparsifier.params) == ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]
    train(model, optimizer)
    assert model.twice.weight is model.fc1.weight
    mask = ~sparsifier.support["fc1.weight"]
    assert is_plus_zero(model.state_dict()["twice.weight"][mask])
    assert is_plus_zero(model.fc1.weight.grad[mask])


def test_channels_last_changes_nothing() -> None:
    model = build().to(memory_format=torch.channels_last)
    optimizer = sgd(model)
    sparsifier = Sparsifier(ACDC(Unstructured(0.8), SCHEDULE), model, optimizer)
    train(model, optimizer)
    for _, weight, mask in dropped(sparsifier):
        assert is_plus_zero(weight[mask])
    assert sparsifier.support.nnz == Unstructured(0.8).total(
        {n: tuple(p.shape) for n, p in sparsifier.params.items()}
    )


def test_the_wrong_optimizer_is_refused() -> None:
    method = ACDC(Unstructured(0.8), SCHEDULE)
    model = build()
    with pytest.raises(InputError, match=r"does not hold 4 of the 4 weights.*'conv1.weight' first"):
        Sparsifier(method, model, sgd(build()))
    partial = torch.optim.SGD(model.fc1.parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"does not hold 3 of the 4 weights"):
        Sparsifier(method, model, partial)
    with pytest.raises(InputError, match=r"LBFGS keeps one flat history.*Use SGD, Adam"):
        Sparsifier(method, model, torch.optim.LBFGS(model.parameters()))


def test_a_refused_sparsifier_leaves_no_hook_behind() -> None:
    model = build()
    optimizer = sgd(model)
    with torch.no_grad():
        model.fc1.weight[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"'fc1.weight' holds NaN"):
        Sparsifier(ACDC(Unstructured(0.8), constant("sparse", 1).resolve(9)), model, optimizer)
    assert not optimizer._optimizer_step_post_hooks
    assert same(model.state_dict(), before)


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "pattern": (lambda: ACDC(0.9, SCHEDULE), r"ACDC\(pattern=...\) is 0.9. Give a pattern"),  # type: ignore[arg-type]
    "schedule": (lambda: ACDC(Unstructured(0.9), 100), r"schedule=...\) is 100. Give a plan"),  # type: ignore[arg-type]
    "reset": (
        lambda: ACDC(Unstructured(0.9), SCHEDULE, "some"),  # type: ignore[arg-type]
        "reset is 'some'. It is one of all, entered, none",
    ),
    "layers": (
        lambda: ACDC(Unstructured(0.9), SCHEDULE, layers="fc"),  # type: ignore[arg-type]
        r"layers=...\) is 'fc'. Give acdc.Layers",
    ),
    "dense": (lambda: Dense("10ep"), r"Dense\(schedule=...\) is '10ep'. Give a plan"),  # type: ignore[arg-type]
    "a plan": (
        lambda: bind(ACDC(Unstructured(0.9), alternate(45)), sgd),
        r"holds a plan in epochs.*plan.resolve\(steps_per_epoch=len\(loader\)\)",
    ),
    "swapped": (
        lambda: Sparsifier(build(), ACDC(Unstructured(0.9), SCHEDULE), sgd(build())),  # type: ignore[arg-type]
        r"Sparsifier\(method, model, optimizer\) takes a method as its first.*given a Net",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_sentences(case: str) -> None:
    call, sentence = BAD[case]
    with pytest.raises(InputError, match=sentence):
        call()


def test_methods_resolve_once() -> None:
    method = ACDC(Unstructured(0.9), alternate(45), reset="entered")
    resolved = method.resolve(3)
    assert resolved.resolved.total == 135
    assert resolved.resolve(99) is resolved
    assert (resolved.pattern, resolved.reset) == (method.pattern, method.reset)
    assert method.sparsity == 0.9
    assert Dense(alternate(45)).sparsity is None
    assert "peste2021acdc" in ACDC.citation


def test_no_output_and_no_global_random_numbers(capfd: pytest.CaptureFixture[str]) -> None:
    # (A23) A step that logs to a tracker.
    model, optimizer, _ = bind(ACDC(Unstructured(0.8), SCHEDULE), sgd)
    state = torch.get_rng_state()
    train(model, optimizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")
