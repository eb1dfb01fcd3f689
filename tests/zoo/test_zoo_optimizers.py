"""Every optimizer that timm knows and that runs on a CPU; schedulefree; 8-bit optimizers.

`make test-zoo` runs these tests in an environment of its own; elsewhere they are skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from acdc.errors import InputError
from acdc.methods.acdc import ACDC
from acdc.pair import Pair
from acdc.pattern import Unstructured
from acdc.sparsifier import Sparsifier
from support.helpers import (
    REVIVAL,
    SCHEDULE,
    TOTAL,
    backward,
    batch,
    build,
    dropped,
    is_plus_zero,
    same,
    train,
)

METHOD = ACDC(Unstructured(0.8), SCHEDULE)
Factory = Callable[[nn.Module], Any]


def _timm(name: str) -> Factory:
    def make(model: nn.Module) -> Any:
        return import_module("timm.optim").create_optimizer_v2(
            model, name, lr=0.01, weight_decay=1e-3
        )

    return make


def _of_class(path: str, **options: Any) -> Factory:
    module, _, name = path.rpartition(".")

    def make(model: nn.Module) -> Any:
        optimizer = getattr(import_module(module), name)(model.parameters(), lr=0.01, **options)
        if callable(getattr(optimizer, "train", None)):  # schedule-free
            optimizer.train()
        return optimizer

    return make


def _timm_names() -> list[str]:
    """Return the optimizers of timm, without those of bitsandbytes and apex that want CUDA.

    Adahessian has a test of its own.
    """
    names = import_module("timm.optim").list_optimizers()
    return [name for name in names if not name.startswith(("bnb", "fused", "adahess"))]


FACTORIES: dict[str, Factory] = {}
if find_spec("timm"):
    several = [f"lookahead_{name}" for name in ("sgd", "adamw", "madgrad", "lamb", "adamp")]
    FACTORIES |= {f"timm {name}": _timm(name) for name in [*_timm_names(), *several]}
if find_spec("schedulefree"):
    for kind in ("SGD", "AdamW", "RAdam"):
        for more in ("", "Closure"):
            path = f"schedulefree.{kind}ScheduleFree{more}"
            FACTORIES[path] = _of_class(path)
if find_spec("bitsandbytes"):
    for kind in ("Adam", "AdamW", "Lion", "RMSprop", "Adagrad", "LAMB", "AdEMAMix", "PagedAdamW"):
        path = f"bitsandbytes.optim.{kind}8bit"
        FACTORIES[path] = _of_class(path, min_8bit_size=16)
    for kind in ("SGD", "LARS"):
        path = f"bitsandbytes.optim.{kind}8bit"
        FACTORIES[path] = _of_class(path, min_8bit_size=16, momentum=0.9)
if find_spec("torchao"):
    for kind in ("Adam8bit", "AdamW8bit", "Adam4bit", "AdamW4bit", "AdamFp8", "AdamWFp8"):
        FACTORIES[f"torchao.optim.{kind}"] = _of_class(f"torchao.optim.{kind}")

needs_packages = pytest.mark.skipif(
    len({name.partition(" ")[0].partition(".")[0] for name in FACTORIES}) < 4,
    reason="not all of timm, schedulefree, bitsandbytes and torchao are installed: "
    "'make test-zoo' runs these tests in an environment that has them",
)
pytestmark = needs_packages


def step_of(name: str, model: nn.Module, optimizer: Any, index: int) -> None:
    """Take a step as this optimizer wants it to be taken."""
    optimizer.zero_grad()
    if "Closure" in name:
        optimizer.step(lambda: backward(model, index))
        return
    backward(model, index)
    optimizer.step()


@pytest.fixture(autouse=True)
def _nothing_is_compiled() -> Any:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FACTORIES or ["none"])
def test_counts_and_zeros_are_exact_and_the_first_dense_step_is_fresh(
    name: str, tmp_path: Any
) -> None:
    make = FACTORIES[name]
    model = build()
    optimizer = make(model)
    sparsifier = Sparsifier(METHOD, model, optimizer)
    shapes = {n: tuple(p.shape) for n, p in sparsifier.params.items()}
    twin, fresh = model, optimizer
    for step in range(TOTAL):
        random = torch.get_rng_state()
        step_of(name, model, optimizer, step)
        assert sparsifier.step == step + 1
        assert sparsifier.support.is_full != (SCHEDULE.phase_at(step + 1).kind == "sparse")
        if not sparsifier.support.is_full:
            assert sparsifier.support.nnz == METHOD.pattern.total(shapes)
        exact(sparsifier)
        if step == REVIVAL:
            torch.set_rng_state(random)
            step_of(name, twin, fresh, step)
            assert same(model.state_dict(), twin.state_dict())
        if step + 1 == REVIVAL:
            twin = copy.deepcopy(model)
            fresh = make(twin)
        if callable(getattr(optimizer, "eval", None)):
            before = copy.deepcopy(model.state_dict())
            optimizer.eval()
            exact(sparsifier)
            optimizer.train()
            model.load_state_dict(before)
    sparsifier.pair().save(tmp_path / "pair")
    loaded = Pair.load(tmp_path / "pair")
    assert same(loaded.sparse, dict(model.state_dict()))


def exact(sparsifier: Sparsifier) -> None:
    for name, weight, mask in dropped(sparsifier):
        assert is_plus_zero(weight[mask]), name


@pytest.mark.filterwarnings("ignore")
def test_adahessian_wants_to_be_told_how_its_state_starts() -> None:
    def steps(reset: Any) -> Sparsifier:
        model = build()
        optimizer = _timm("adahessian")(model)
        sparsifier = Sparsifier(replace(METHOD, reset=reset), model, optimizer)
        for step in range(TOTAL):
            optimizer.zero_grad()
            x, y = batch(step)
            nn.functional.cross_entropy(model(x), y).backward(create_graph=True)
            optimizer.step()
            exact(sparsifier)
        return sparsifier

    with pytest.raises(InputError, match=r"Adahessian keeps the state 'exp_avg'.*reset="):
        steps("all")
    sparsifier = steps({"exp_avg": 0.0, "exp_hessian_diag_sq": 0.0, "hess": 0.0})
    assert sparsifier.step == TOTAL


@pytest.mark.parametrize("kind", ["ScheduleFreeWrapper", "ScheduleFreeWrapperReference"])
def test_the_wrappers_of_schedulefree_are_refused(kind: str) -> None:
    schedulefree = import_module("schedulefree")
    model = build()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapper = getattr(schedulefree, kind)(base, momentum=0.9)
    wrapper.train()
    with pytest.raises(InputError, match=rf"is a .*{kind}, which is no torch.optim.Optimizer and"):
        Sparsifier(METHOD, model, wrapper)
    Sparsifier(METHOD, model, base)
    backward(model, 0)
    with pytest.raises(InputError, match=r"which SGD does not make: a wrapper around it does"):
        wrapper.step()


def test_the_base_of_lookahead_is_refused_where_lookahead_moves_the_weights() -> None:
    optimizers = import_module("timm.optim")
    model = build()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    lookahead = optimizers.Lookahead(base, k=1)
    Sparsifier(METHOD, model, base)
    with pytest.raises(InputError, match=r"'lookahead_slow_buff', which SGD does not make"):
        train(model, lookahead)
