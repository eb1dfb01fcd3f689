"""Gradients of the rows of sparse layers are scaled for the optimizer, and for nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acdc.engine.engine import Engine
from acdc.hooks.rows import row_factors
from acdc.methods.acdc import ACDC
from acdc.methods.base import Method
from acdc.methods.rigl import RigL
from acdc.methods.topkast import TopKAST
from acdc.methods.woodfisher import WoodFisher
from acdc.pattern import NM, Unstructured
from acdc.schedule import constant
from acdc.shape import Shape
from acdc.sparsifier import Sparsifier
from support.helpers import (
    CUTS,
    SCHEDULE,
    TOTAL,
    Net,
    backward,
    build,
    copied,
    dropped,
    is_plus_zero,
    same,
    sgd,
    train,
)

ALTERNATING = ACDC(Unstructured(0.8), SCHEDULE)
SPARSE = constant("sparse", 3).resolve(3)


def bound(
    method: Method[Any], scale_rows: bool = True, **more: Any
) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
    model = build(Net)
    optimizer = sgd(model)
    if more.pop("engine", False):
        more["engine"] = Engine(model, torch.zeros(8, 3, 4, 4), choose=False)
    return model, optimizer, Sparsifier(method, model, optimizer, scale_rows=scale_rows, **more)


# --- the factors --------------------------------------------------------------------------------


def mask_of(*sizes: int) -> Tensor:
    return torch.rand(sizes, generator=torch.Generator().manual_seed(0)) < 0.4


def by_hand(rows: list[Tensor]) -> Tensor:
    """The factors of the rows of one layer."""
    density = torch.stack([row.float().mean() for row in rows])
    return (density / density.mean()).sqrt()


def test_the_factors_of_layers_of_all_kinds() -> None:
    linear = mask_of(4, 6)
    found = row_factors(linear, Shape(linear.shape))
    assert found is not None
    assert torch.allclose(found.flatten(), by_hand(list(linear)))

    conv = mask_of(4, 6, 3, 3)
    found = row_factors(conv, Shape(conv.shape))
    assert found is not None
    assert found.shape == (4, 1, 1, 1)
    assert torch.allclose(found.flatten(), by_hand(list(conv)))

    turned = mask_of(6, 4)  # Conv1D of GPT-2
    found = row_factors(turned, Shape(turned.shape, outputs=1, inputs=0))
    assert found is not None
    assert torch.allclose(found, by_hand(list(turned.T))[None])

    stacked = mask_of(6, 5)  # three matrices of two rows
    found = row_factors(stacked, Shape(stacked.shape, stack=3))
    assert found is not None
    each = [by_hand(list(part)) for part in stacked.split(2)]
    assert torch.allclose(found.flatten(), torch.cat(each))

    experts = mask_of(3, 4, 5)
    found = row_factors(experts, Shape(experts.shape, outputs=2, inputs=1))
    assert found is not None
    assert found.shape == (3, 1, 5)
    assert torch.allclose(found[1, 0], by_hand(list(experts[1].T)))

    groups = mask_of(6, 2, 3)  # a transposed convolution: two groups of three inputs, two outputs
    found = row_factors(groups, Shape(groups.shape, outputs=1, inputs=0, groups=2))
    assert found is not None
    rows = [groups[3 * g : 3 * g + 3, out] for g in range(2) for out in range(2)]
    expected = by_hand(rows).view(2, 1, 2, 1).expand(2, 3, 2, 1).reshape(6, 2, 1)
    assert torch.allclose(found.expand_as(expected), expected)


def test_the_mean_square_of_the_factors_is_one() -> None:
    mask = mask_of(8, 10)
    found = row_factors(mask, Shape(mask.shape))
    assert found is not None
    assert torch.isclose(found.square().mean(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("mask", "shape"),
    [
        (torch.ones(3, 4) > 0, Shape((3, 4))),
        (torch.zeros(3, 4) > 0, Shape((3, 4))),
        (torch.eye(4) > 0, Shape((4, 4))),
        (mask_of(3, 4, 5), Shape((3, 4, 5), outputs=1, inputs=None)),
    ],
    ids=["full", "empty", "even", "unknown"],
)
def test_layers_that_are_not_scaled(mask: Tensor, shape: Shape) -> None:
    assert row_factors(mask, shape) is None


def test_a_matrix_without_a_kept_weight_beside_others() -> None:
    mask = torch.tensor([[False, False], [False, False], [True, True], [True, False]])
    found = row_factors(mask, Shape(mask.shape, stack=2))
    assert found is not None
    assert found.isfinite().all()


# --- the step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [False, True])
def test_the_optimizer_finds_scaled_gradients_and_all_others_those_of_the_loss(
    engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, sparsifier = bound(ALTERNATING, engine=engine)
    train(model, optimizer, 0, CUTS[0])
    support = sparsifier.support
    optimizer.zero_grad()
    backward(model, 5)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    seen: dict[str, Tensor] = {}

    def look(*_: Any) -> None:
        seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def advance() -> None:  # here a method grows weights
        assert all(same(p.grad, grads[n]) for n, p in model.named_parameters())

    monkeypatch.setattr(sparsifier, "advance", advance)
    optimizer.register_step_pre_hook(look)
    optimizer.step()
    scaled = 0
    for name, param in model.named_parameters():
        assert param.grad is not None
        assert same(param.grad, grads[name])
        factors = None
        if name in sparsifier.params:
            mask = support[name]
            factors = row_factors(mask, Shape(mask.shape))
        scaled += factors is not None
        torch.testing.assert_close(seen[name], grads[name] * (1 if factors is None else factors))
    assert scaled >= 3


def test_dense_phases_and_other_layers_are_bitwise_as_without() -> None:
    ends = []
    for scale_rows in (False, True):
        model, optimizer, _ = bound(ALTERNATING, scale_rows)
        train(model, optimizer, 0, CUTS[0])
        ends.append(copied(model.state_dict()))
        train(model, optimizer, CUTS[0])
        ends.append(copied(model.state_dict()))
    assert same(ends[0], ends[2])
    assert not same(ends[1], ends[3])


def test_rows_of_equal_density_are_bitwise_as_without() -> None:
    ends = []
    for scale_rows in (False, True):
        model, optimizer, _ = bound(ACDC(NM(2, 4), SCHEDULE), scale_rows)
        train(model, optimizer)
        ends.append(copied(model.state_dict()))
    assert same(*ends)


def test_weights_grow_by_gradients_that_are_not_scaled() -> None:
    found = []
    for scale_rows in (False, True):
        method = RigL(Unstructured(0.8, "erk"), SPARSE, every="3st", drop=0.5)
        model, optimizer, sparsifier = bound(method, scale_rows)
        before = sparsifier.support
        train(model, optimizer, 0, 1)
        found.append(sparsifier.support)
        assert not same(dict(before), dict(found[-1]))
    assert same(dict(found[0]), dict(found[1]))


def test_a_method_that_looks_at_gradients_sees_those_of_the_loss() -> None:
    states = []
    for scale_rows in (False, True):
        method = WoodFisher(Unstructured(0.8), SPARSE, first=0.5, every="3st", length="6st")
        model, optimizer, sparsifier = bound(method, scale_rows)
        train(model, optimizer, 0, 1)
        states.append(sparsifier.state_dict()["method_state"])
    assert states[0]
    assert same(*states)


@pytest.mark.parametrize("kept", [False, True])
def test_steps_on_kept_elements_are_scaled_too(kept: bool) -> None:
    model, optimizer, sparsifier = bound(ALTERNATING, engine=True)
    (steps,) = sparsifier._masking._kept_steps
    steps._worth = lambda *_: kept
    plain, plainly, _ = bound(ALTERNATING)
    for step in range(TOTAL):
        train(model, optimizer, step, step + 1)
        train(plain, plainly, step, step + 1)
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert all(is_plus_zero(w[mask]) for _, w, mask in dropped(sparsifier))


def test_a_closure_and_a_step_inside_a_step_are_scaled_once() -> None:
    class Nested(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model, 0)

    ends = []
    for kind in (torch.optim.SGD, Nested):
        for by_closure in (False, True):
            model = build(Net)
            optimizer = kind(model.parameters(), lr=0.1)
            method = TopKAST(Unstructured(0.8), SPARSE, backward=0.5, every="2st")
            Sparsifier(method, model, optimizer, scale_rows=True)
            if by_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            ends.append(copied(model.state_dict()))
    assert all(same(ends[0], end) for end in ends[1:])


@pytest.mark.parametrize("stop", [3, 5])
def test_a_resumed_run_ends_bitwise_where_the_other_ends(stop: int) -> None:
    whole, first, second = (bound(ALTERNATING) for _ in range(3))
    train(*whole[:2])
    train(*first[:2], 0, stop)
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(copied(old.state_dict()))
    train(*second[:2], stop)
    assert same(whole[0].state_dict(), second[0].state_dict())


def test_several_optimizers_are_scaled_and_removal_ends_it() -> None:
    ends = []
    for several in (False, True):
        model = build(Net)
        params = list(model.parameters())
        parts = [params[:5], params[5:]] if several else [params]
        optimizers = [torch.optim.SGD(part, lr=0.1) for part in parts]
        sparsifier = Sparsifier(ALTERNATING, model, optimizers, scale_rows=True)
        for step in range(4):
            for each in optimizers:
                each.zero_grad()
            backward(model, step)
            for each in optimizers:
                each.step()
        ends.append(copied(model.state_dict()))
        sparsifier.remove()
        assert not any(each._optimizer_step_pre_hooks for each in optimizers)
    assert same(*ends)
