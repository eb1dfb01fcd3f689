"""The methods, each against vectors computed by hand or by its authors' formulas.

A letter such as (A7) names a bug of a peer that the test shows to be absent.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import acdc
from acdc import score
from acdc.engine.reference import Reference
from acdc.errors import InputError
from acdc.methods import METHODS
from acdc.methods.base import Method
from acdc.methods.dpf import DPF
from acdc.methods.dsd import DSD
from acdc.methods.families import exchange
from acdc.methods.gmp import GMP
from acdc.methods.gradual import Gradual
from acdc.methods.granet import GraNet
from acdc.methods.oneshot import OneShot
from acdc.methods.rigl import RigL
from acdc.methods.set_ import SET
from acdc.methods.snfs import SNFS, apportion
from acdc.methods.snip import SNIP
from acdc.methods.srste import SRSTE
from acdc.methods.static import Static
from acdc.methods.str_ import STR, SoftThreshold
from acdc.methods.topkast import TopKAST
from acdc.methods.weights import Weights
from acdc.methods.woodfisher import Memory, WoodFisher
from acdc.pattern import NM, Block, Unstructured
from acdc.schedule import constant, phases, ramp
from acdc.score import Scores
from acdc.sparsifier import Sparsifier
from acdc.support import Support, kept
from support.helpers import (
    Net,
    adam,
    backward,
    batch,
    bind,
    build,
    is_plus_zero,
    same,
    sgd,
    steps,
    train,
)
from support.method_runs import assert_forecast, assert_resumes

STEPS = 12
SPARSE = constant("sparse", 3).resolve(4)
ERK = Unstructured(0.8, "erk")


def mask(*bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.bool)


def top(scores: Tensor, k: int) -> Tensor:
    """Return the mask of the ``k`` largest, ties to the lower index, by sorting."""
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.flatten().argsort(descending=True, stable=True)[:k]] = True
    return chosen.view(scores.shape)


# --- drop and grow -------------------------------------------------------------------------------


def test_drop_and_grow_on_eight_weights_by_hand() -> None:
    support = Support({"w": mask(1, 1, 1, 1, 0, 0, 0, 0)})
    w = torch.tensor([4.0, -0.1, 0.2, -3.0, 0, 0, 0, 0])
    g = torch.tensor([9.0, 0.5, 7.0, 9.0, -0.1, -6.0, 0.3, 2.0])
    new = exchange(support, score.magnitude({"w": w}), score.magnitude({"w": g}), 0.5)
    # Weights 1 and 2 leave; of what is not kept then, 2 (again) and 5 have the largest gradients.
    assert torch.equal(new["w"], mask(1, 0, 1, 1, 0, 1, 0, 0))
    assert int(4 * 0.49) == 1
    new = exchange(support, score.magnitude({"w": w}), score.magnitude({"w": g}), 0.49)
    assert torch.equal(new["w"], mask(1, 0, 1, 1, 0, 1, 0, 0))


def test_ties_go_to_the_lower_index_and_zero_scores_are_no_trap() -> None:
    support = Support({"w": mask(0, 1, 1, 0, 1, 1)})
    zero = Scores.of({"w": torch.zeros(6)})
    new = exchange(support, zero, zero, 0.5)
    # Kept weights of value zero still rank above what is not kept: 1 and 2 stay, 0 and 3 enter.
    assert torch.equal(new["w"], mask(1, 1, 1, 1, 0, 0))
    assert exchange(support, zero, zero, 0.0) == support
    assert exchange(support, zero, zero, 1.0).nnz == 4


@pytest.mark.parametrize("kind", [RigL, SET, SNFS])
def test_exchanges_keep_the_number_and_new_weights_are_zero_with_zero_state(
    kind: type[RigL | SET | SNFS],
) -> None:
    # (A8) grown weights that keep an old value; (A14, A21, A22) counts right only on average.
    method = kind(ERK, SPARSE, drop=0.6, every="2st", until="100%")
    model, optimizer, sparsifier = bind(method, adam)
    counts, before = sparsifier.support.counts(), sparsifier.support
    assert counts == ERK.counts({n: tuple(p.shape) for n, p in sparsifier.params.items()})
    grown = 0
    for _ in steps(model, optimizer, 0, STEPS):
        after = sparsifier.support
        assert after.nnz == before.nnz
        assert kind is SNFS or after.counts() == counts
        for name, new in after.entered(before).items():
            grown += int(new.sum())
            assert is_plus_zero(sparsifier.params[name][new])
            state = optimizer.state.get(sparsifier.params[name], {})
            for key in ("exp_avg", "exp_avg_sq"):
                if kind is not SNFS and key in state:
                    assert is_plus_zero(state[key][new])
        before = after
    assert grown > 50


# --- RigL ----------------------------------------------------------------------------------------


def rigl(**fields: Any) -> RigL:
    return RigL(ERK, SPARSE, **{"every": "3st", "until": "9st", "drop": 0.5} | fields)


@pytest.mark.parametrize("how", ["plain", "accumulated", "closure", "scaler"])
def test_an_update_of_rigl_takes_the_place_of_an_optimizer_step(how: str) -> None:
    model, optimizer, sparsifier = bind(rigl(), sgd)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    updates = []
    for step in range(STEPS):
        twin = copy.deepcopy(model)  # hooks do not come along: its gradients are dense
        micro = [10 * step, 10 * step + 1] if how == "accumulated" else [10 * step]
        for index in micro:
            backward(twin, index)
        old, was = sparsifier.support, copy.deepcopy(model.state_dict())
        state = copy.deepcopy(optimizer.state_dict()["state"])

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            return backward(model, 10 * step)

        if how == "closure":
            assert optimizer.step(closure) is not None
        elif how == "scaler":
            optimizer.zero_grad()
            x, y = batch(10 * step)
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.zero_grad()
            for index in micro:
                backward(model, index)
            optimizer.step()
        assert sparsifier.step == step + 1
        moved = not all(torch.equal(p, was[n]) for n, p in model.named_parameters())
        if sparsifier.support is old:
            assert moved
            continue
        updates.append(step)
        share = 0.5 * (1 + math.cos(math.pi * step / 9)) / 2
        for name, new in sparsifier.support.items():
            weight = was[name]
            grad = twin.get_parameter(name).grad
            assert grad is not None
            stay = int(old[name].sum()) - int(share * int(old[name].sum()))
            rest = top(weight.abs().masked_fill(~old[name], -1), stay)
            expected = rest | top(grad.abs().masked_fill(rest, -1), int(old[name].sum()) - stay)
            assert torch.equal(new, expected), name
            # What stays, and what was dropped and grown at once, keeps its value; the rest is zero.
            assert torch.equal(sparsifier.params[name], weight.where(new & old[name], 0))
            both = state and optimizer.state_dict()["state"]
            if both:
                number = list(dict(model.named_parameters())).index(name)
                then, now = (s[number]["momentum_buffer"] for s in (state, both))
                assert torch.equal(now, then.masked_fill(new & ~old[name], 0))
        for name, p in model.named_parameters():
            if name not in sparsifier.support:
                assert torch.equal(p, was[name]), name
            assert p.grad is not None  # hidden from the optimizer, and back
    assert updates == [0, 3, 6]


def test_a_step_that_a_fused_optimizer_skips_inside_is_no_update() -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    sparsifier = Sparsifier(rigl(), model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    first = sparsifier.support
    x, y = batch(0)
    scaler.scale(nn.functional.cross_entropy(model(x), y) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert sparsifier.step == 0
    assert sparsifier.support is first
    assert all(p.grad is not None for p in model.parameters())


def test_the_next_step_after_an_update_has_gradients_of_kept_weights_alone() -> None:
    model, optimizer, sparsifier = bind(rigl(), sgd)
    for step in range(2):  # gradients are never zeroed: the update's are still there
        backward(model, step)
        optimizer.step()
        for name, kept_here in sparsifier.support.items():
            grad = model.get_parameter(name).grad
            assert grad is not None
            assert is_plus_zero(grad[~kept_here])


def test_an_update_that_moves_nothing_clears_the_gradients_too() -> None:
    model, optimizer, sparsifier = bind(rigl(drop=0.001), sgd)
    before = sparsifier.support
    backward(model, 0)
    assert any(model.get_parameter(n).grad[~m].any() for n, m in before.items())  # type: ignore[index]
    optimizer.step()
    assert sparsifier.support == before
    assert all(is_plus_zero(model.get_parameter(n).grad[~m]) for n, m in before.items())  # type: ignore[index]


def test_an_engine_runs_dense_where_the_dense_gradient_is_wanted() -> None:
    model = build()
    engine = acdc.Engine(model, batch(0)[0], backend=Reference(), choose=False)
    optimizer = sgd(model)
    Sparsifier(rigl(), model, optimizer, engine=engine)
    active = []
    for step in range(STEPS):
        active.append(engine.active)
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    assert [step for step, on in enumerate(active) if not on] == [0, 3, 6]

    plain, other, _ = bind(rigl(), sgd)
    train(plain, other, 0, STEPS)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_a_removed_rigl_leaves_the_optimizer_alone() -> None:
    model, optimizer, sparsifier = bind(rigl(), sgd)
    sparsifier.remove()
    before = model.fc1.weight.clone()
    train(model, optimizer, 0, 1)
    assert not torch.equal(model.fc1.weight, before)
    assert not optimizer._optimizer_step_pre_hooks


def step_flops(method: Method[Any], sparse: int, dense: int) -> Fraction:
    """Return the mean FLOPs of a step of the method's sparse phases, on one sample."""
    steps = [range(p.start, p.stop) for p in method.resolved.phases if p.kind == "sparse"]
    spent = sum(method.training.flops(r, lambda step: step, sparse, dense) for r in steps)
    return Fraction(spent, sum(map(len, steps)))


def test_flops_of_rigl_are_those_of_the_paper() -> None:
    # ResNet-50, ERK 80 %: f_S/f_D = .4154, an update each 100 steps (appendix H; README: .42).
    dense, sparse = 10_000, 4154
    method = RigL(ERK, constant("sparse", 100).resolve(100), until="100%")
    ours = step_flops(method, sparse, dense) / (3 * dense)
    theirs = Fraction(3 * sparse * 100 + 2 * sparse + dense, 101 * 3 * dense)
    assert f"{float(ours):.4f}" == f"{float(theirs):.4f}" == "0.4173"
    short = RigL(ERK, constant("sparse", 100).resolve(100), until="50%")
    assert step_flops(short, sparse, dense) == 3 * sparse + Fraction(50, 10_000) * (dense - sparse)


def test_flops_of_the_others() -> None:
    f_s, f_d = 100, 1000
    for kind in (Static, OneShot, GMP, Gradual, WoodFisher, DSD, acdc.ACDC):
        assert step_flops(kind(ERK, SPARSE), f_s, f_d) == 3 * f_s
    assert step_flops(SET(ERK, SPARSE), f_s, f_d) == 3 * f_s
    assert step_flops(SNFS(ERK, SPARSE), f_s, f_d) == 2 * f_s + f_d
    # The one measurement of SNIP has all weights in all three passes: all are kept then.
    measured = SNIP(ERK, SPARSE).training.flops(range(1), lambda step: step, f_d, f_d)
    assert measured == 3 * f_d
    later = SNIP(ERK, SPARSE).training.flops(range(1, 10), lambda step: step, f_s, f_d)
    assert later == 9 * 3 * f_s


# --- SET -----------------------------------------------------------------------------------------


def test_set_keeps_the_largest_by_magnitude_and_draws_the_rest() -> None:
    # (A21) A prune mode that keeps only the most negative weights.
    method = SET(Unstructured(0.5), SPARSE, drop=0.5, every="1st", until="8st", seed=5)
    w = torch.cat([torch.tensor([-1.0, 1.0]).repeat(10) * torch.arange(1, 21), torch.zeros(20)])
    weights, support = Weights({"w": w}, {}.get), Support({"w": w != 0})
    new, _ = method.update(4, weights, support, None)
    # Half a cosine at its middle: a quarter of twenty leave, the smallest five.
    rest = w.abs() > 5
    draws = score.random(weights, 5, 4)["w"].masked_fill(rest, -1)
    assert torch.equal(new["w"], rest | top(draws, 5))
    assert method.update(8, weights, support, None)[0] is support


def test_what_is_random_depends_on_the_seed_and_the_step_alone() -> None:
    runs = []
    for seed in (0, 0, 1):  # (A16) seed 0 is a seed
        torch.manual_seed(len(runs))
        method = SET(ERK, SPARSE, every="1st", until="100%", seed=seed)
        model, optimizer, sparsifier = bind(method, sgd)
        train(model, optimizer, 0, STEPS)
        runs.append(sparsifier.support)
    assert runs[0] == runs[1] != runs[2]
    same_start = [bind(kind(ERK, SPARSE), sgd)[2].support for kind in (Static, SET, RigL, SNFS)]
    assert all(support == same_start[0] for support in same_start)


# --- static, SNIP --------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["uniform", "erk", "global"])
def test_a_static_support_is_random_exact_and_stays(scope: Any) -> None:
    # (A14) Bernoulli masks have the right density only on average.
    pattern = Unstructured(0.7, scope)
    model, optimizer, sparsifier = bind(Static(pattern, SPARSE, seed=0), sgd)
    first = sparsifier.support
    shapes = {n: tuple(p.shape) for n, p in sparsifier.params.items()}
    assert first.nnz == pattern.total(shapes)
    assert pattern.counts(shapes) in (None, first.counts())
    assert first != pattern.select({n: build().get_parameter(n).abs() for n in shapes})
    train(model, optimizer, 0, STEPS)
    assert sparsifier.support is first
    assert first != bind(Static(pattern, SPARSE, seed=1), sgd)[2].support
    assert [c.step for c in sparsifier.changes] == [0]


@pytest.mark.parametrize("pattern", [Unstructured(0.8), ERK, NM(2, 4)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_snip_keeps_the_largest_saliency_of_the_first_step_which_moves_nothing(
    pattern: Any, accumulate: int
) -> None:
    model, optimizer, sparsifier = bind(SNIP(pattern, SPARSE), sgd)
    plain = build()
    for index in range(accumulate):
        backward(model, index)
        backward(plain, index)
    assert sparsifier.support.is_full
    optimizer.step()
    named = {n: plain.get_parameter(n) for n in sparsifier.params}
    expected = pattern.select(
        {n: (w * w.grad).abs().detach() for n, w in named.items()}  # type: ignore[operator]
    )
    assert sparsifier.support == expected
    assert not optimizer.state
    for name, p in model.named_parameters():
        value = plain.get_parameter(name)
        assert torch.equal(p, value.where(expected[name], 0) if name in expected else value)
    optimizer.zero_grad()
    train(model, optimizer, 1, STEPS)
    assert sparsifier.support == expected


# --- SNFS ----------------------------------------------------------------------------------------


def test_places_go_to_the_layers_with_the_most_momentum_by_hand() -> None:
    method = SNFS(Unstructured(0.5), SPARSE, drop=0.5, every="1st", until="100%")
    a = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0]).requires_grad_()
    b = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0]).requires_grad_()
    support = Support({"a": mask(1, 1, 1, 1, 0, 0, 0, 0), "b": mask(1, 1, 1, 1, 0, 0, 0, 0)})
    # Mean over the kept weights: 3 in a, 1 in b.
    state = {
        a: {"momentum_buffer": torch.tensor([3.0, -3, 3, 3, 0.1, -0.4, 0.3, 0.2])},
        b: {"momentum_buffer": torch.tensor([1.0, -1, 1, 1, 0.1, 0.2, 0.3, -9.0])},
    }
    new, _ = method.update(6, Weights({"a": a, "b": b}, state.get), support, None)
    # Half way, a share of 1/4: one weight of four leaves each layer (3 of a, 0 of b). Of the two
    # places 3/4 are a's: 1.5 against .5, equal remainders, so the earlier layer has both.
    assert torch.equal(new["a"], mask(1, 1, 1, 1, 0, 1, 0, 0))  # 3 comes back: momentum 3
    assert torch.equal(new["b"], mask(0, 1, 1, 1, 0, 0, 0, 0))
    assert new.nnz == support.nnz


def test_momentum_of_adam_is_normalised_and_an_optimizer_without_has_gradients() -> None:
    w = torch.zeros(2).requires_grad_()
    w.grad = torch.tensor([5.0, 6.0])
    assert torch.equal(Weights({"w": w}, {}.get).momentum("w"), w.grad)
    adams: dict[str, Any] = {"exp_avg": torch.ones(2), "exp_avg_sq": torch.tensor([4.0, 1.0])}
    assert torch.allclose(Weights({"w": w}, {w: adams}.get).momentum("w"), torch.tensor([0.5, 1.0]))
    assert Weights({"w": w}, {w: {"momentum_buffer": None}}.get).momentum("w") is w.grad
    w.grad = None
    with pytest.raises(InputError, match="'w' has neither momentum nor gradient to rank by"):
        Weights({"w": w}, {}.get).momentum("w")


def test_momentum_stays_dense_and_no_layer_dies() -> None:
    # Few paths lead through so sparse a network, and all momentum may lie on weights that are kept.
    # With this seed there are enough of them.
    method = SNFS(Unstructured(0.95), SPARSE, drop=1.0, every="1st", seed=9)
    model, optimizer, sparsifier = bind(method, sgd)
    total = sparsifier.support.nnz
    for _ in steps(model, optimizer, 0, STEPS):
        assert sparsifier.support.nnz == total
        assert all(sparsifier.support.counts().values())
        for name, kept_here in sparsifier.support.items():
            momentum = optimizer.state[sparsifier.params[name]]["momentum_buffer"]
            assert kept_here.all() or momentum[~kept_here].any(), name


def test_a_layer_that_is_hardly_sparse_loses_at_most_its_sparsity() -> None:
    method = SNFS(Unstructured(0.1), SPARSE, drop=1.0, every="1st", until="100%")
    w = torch.arange(1.0, 11.0).requires_grad_()
    support = Support({"w": torch.arange(10) > 0})  # 10 % sparse
    state = {w: {"momentum_buffer": torch.zeros(10)}}
    rest = method._rest(0.8, Weights({"w": w}, state.get), support)
    assert rest.nnz == 9 - math.ceil(0.1 * 9)


def test_apportioning() -> None:
    weights = {"a": 1.0, "b": 1.0, "c": 1.0}
    assert apportion(10, weights, {"a": 9, "b": 9, "c": 9}) == {"a": 4, "b": 3, "c": 3}
    assert apportion(10, weights, {"a": 1, "b": 9, "c": 9}) == {"a": 1, "b": 5, "c": 4}
    assert apportion(5, dict.fromkeys("abc", 0.0), {"a": 1, "b": 3, "c": 1}) == {
        "a": 1,
        "b": 3,
        "c": 1,
    }
    assert apportion(0, weights, dict.fromkeys("abc", 0)) == {"a": 0, "b": 0, "c": 0}
    with pytest.raises(InputError, match="10 cannot be shared out: there is room for 9"):
        apportion(10, weights, dict.fromkeys("abc", 3))
    with pytest.raises(InputError, match=r"share of 'b' is nan.*diverged"):
        apportion(3, weights | {"b": math.nan}, dict.fromkeys("abc", 3))


# --- gradual pruning -----------------------------------------------------------------------------


def test_the_cubic_meets_both_ends() -> None:
    # (A7) A wrong denominator; (A20) a range that ends one update early.
    values = [ramp(step, 100, 500, 0.05, 0.9) for step in range(0, 601, 50)]
    assert values[:3] == [0.05, 0.05, 0.05]
    assert values[-3:] == [0.9, 0.9, 0.9]
    assert values == sorted(values)
    assert ramp(300, 100, 500, 0.05, 0.9) == pytest.approx(0.9 - 0.85 / 8)
    for first, last in ((0.0, 0.8), (0.05, 0.95), (0.1, 0.98)):
        assert (ramp(7, 7, 11, first, last), ramp(11, 7, 11, first, last)) == (first, last)


@pytest.mark.parametrize("kind", [GMP, Gradual])
@pytest.mark.parametrize("pattern", [Unstructured(0.9), ERK, Block((4, 1), 0.75)])
def test_gradual_pruning_is_nested_and_exact_at_every_cut(
    kind: type[GMP | Gradual], pattern: Any
) -> None:
    schedule = phases(6, [("dense", "1ep"), ("sparse", "5ep")]).resolve(5)
    method = kind(pattern, schedule, first=0.1, every="3st", length="10st")
    model, optimizer, sparsifier = bind(method, sgd)
    shapes = {n: tuple(p.shape) for n, p in sparsifier.params.items()}
    before = sparsifier.support
    seen = {}
    for step in steps(model, optimizer, 0, 30):
        if sparsifier.support is not before:
            assert sparsifier.support.entered(before).nnz == 0
            seen[step] = sparsifier.support.nnz
            before = sparsifier.support
    # Every three steps from 5 on, and last at 15, though that is no multiple.
    assert list(seen) == [5, 8, 11, 14, 15]
    for step, nnz in seen.items():
        assert nnz == pattern.at(ramp(step, 5, 15, 0.1, pattern.sparsity)).total(shapes)
    assert seen[5] == pattern.at(0.1).total(shapes)
    assert seen[15] == pattern.total(shapes)
    assert sparsifier.dense_twin is not None
    assert sparsifier.dense_twin.step == 5


def test_what_is_cut_stays_cut_even_among_zeros() -> None:
    method = GMP(Unstructured(0.5), SPARSE, first=0.25, every="2st", length="8st")
    support = Support({"w": mask(0, 0, 1, 1, 1, 1, 1, 1)})
    w = torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 1])  # zeros that are kept rank as those that are cut
    new, _ = method.update(8, Weights({"w": w}), support, None)
    assert torch.equal(new["w"], mask(0, 0, 1, 1, 1, 0, 0, 1))


def test_overrides_rise_in_proportion() -> None:
    pattern = Unstructured(0.8, overrides={"fc1": 0.4})
    assert pattern.at(0.4) == Unstructured(0.4, overrides={"fc1": 0.2})
    assert pattern.at(0.8) is pattern
    assert Unstructured(0.0).at(0.0) == Unstructured(0.0)
    with pytest.raises(InputError, match=r"NM\(n=2, m=4\) has the sparsity 0.5 and no other"):
        NM(2, 4).at(0.3)


def test_a_phase_too_short_for_the_last_cut_is_refused() -> None:
    with pytest.raises(InputError, match=r"last cut '100%'.*step 12.*ends at 12. Set a shorter"):
        bind(GMP(ERK, SPARSE, length="100%"), sgd)
    with pytest.raises(InputError, match=r"Gradual makes its last cut"):
        bind(
            Gradual(ERK, phases(2, [("dense", "1ep"), ("sparse", "1ep")]), length="60%").resolve(
                10
            ),
            sgd,
        )


# --- GraNet --------------------------------------------------------------------------------------


def granet(**fields: Any) -> GraNet:
    return GraNet(**{"pattern": ERK, "schedule": SPARSE, "every": "3st", "length": "6st"} | fields)


def test_granet_cuts_on_the_cubic_and_then_exchanges_by_gradient() -> None:
    model, optimizer, sparsifier = bind(granet(first=0.5, drop=0.5), sgd)
    shapes = {n: tuple(p.shape) for n, p in sparsifier.params.items()}
    assert sparsifier.support == ERK.at(0.5).select(score.random(sparsifier.params, 0, 0))
    for step in range(STEPS):
        old = sparsifier.support
        twin = copy.deepcopy(model)  # hooks do not come along: its gradients are dense
        backward(twin, step)
        twin_optimizer = sgd(twin)
        twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        twin_optimizer.step()
        train(model, optimizer, step, step + 1)
        now = step + 1
        if now % 3 or now == STEPS:
            assert sparsifier.support is old
            continue
        pattern = ERK.at(ramp(now, 0, 6, 0.5, 0.8))
        share = 0.5 * (1 + math.cos(math.pi * now / STEPS)) / 2
        for name, count in (pattern.counts(shapes) or {}).items():
            weight, grad = twin.get_parameter(name).detach(), twin.get_parameter(name).grad
            assert grad is not None
            rest = top(weight.abs().masked_fill(~old[name], -1), count)
            rest = top(weight.abs().masked_fill(~rest, -1), count - int(share * count))
            grown = top(grad.abs().masked_fill(rest, -1), int(share * count))
            assert torch.equal(sparsifier.support[name], rest | grown), name
            new = grown & ~old[name]
            assert is_plus_zero(sparsifier.params[name][new])
            assert is_plus_zero(optimizer.state[sparsifier.params[name]]["momentum_buffer"][new])
    assert [c.step for c in sparsifier.changes] == [0, 3, 6, 9]
    assert all((c.regrown or 0) > 0 for c in sparsifier.changes[1:])


def test_granet_starts_dense_or_from_what_is_trained() -> None:
    assert bind(granet(), sgd)[2].support.is_full
    draws = [bind(granet(first=0.5, seed=seed), sgd)[2].support for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    later = phases(4, [("dense", "1ep"), ("sparse", "3ep")]).resolve(4)
    model, optimizer, sparsifier = bind(granet(first=0.5, schedule=later), sgd)
    plain = build()
    train(plain, sgd(plain), 0, 4)
    train(model, optimizer, 0, 4)
    largest = score.magnitude({n: plain.get_parameter(n) for n in sparsifier.params})
    assert sparsifier.support == ERK.at(0.5).select(largest)


@pytest.mark.parametrize("factory", [sgd, adam], ids=["sgd", "adam"])
def test_granet_resumes_and_its_forecast_is_what_it_does(factory: Any) -> None:
    assert_resumes(granet(first=0.5), factory)
    assert_forecast(granet(first=0.5, length="5st"), factory)  # the last cut is between exchanges


def test_granet_counts_the_gradients_of_all_weights_before_an_exchange() -> None:
    f_s, f_d = 100, 1000
    # Updates at 3, 6 and 9 of 12 steps, each with the dense gradient of the step before it.
    assert step_flops(granet(), f_s, f_d) == 3 * f_s + Fraction(3, 12) * (f_d - f_s)


# --- from a trained model; DSD -------------------------------------------------------------------


def test_one_shot_cuts_the_trained_weights_once() -> None:
    trained = build()
    train(trained, sgd(trained), 0, 5)
    model = build(seed=7)
    model.load_state_dict(trained.state_dict())
    optimizer = sgd(model)
    sparsifier = Sparsifier(OneShot(Unstructured(0.9), SPARSE), model, optimizer)
    expected = Unstructured(0.9).select(
        score.magnitude({n: trained.get_parameter(n) for n in sparsifier.params})
    )
    assert sparsifier.support == expected
    assert sparsifier.support.nnz == kept(sparsifier.support.numel, 0.9)
    for name, m in expected.items():
        assert torch.equal(model.get_parameter(name), trained.get_parameter(name).where(m, 0))
    train(model, optimizer, 0, STEPS)
    assert [c.step for c in sparsifier.changes] == [0]


def test_dsd_brings_all_weights_back_at_zero_and_ends_dense() -> None:
    plan = phases(3, [("dense", "1ep"), ("sparse", "1ep"), ("dense", "1ep")])
    method = DSD(Unstructured(0.3, "uniform", floor=0), plan.resolve(4))
    model, optimizer, sparsifier = bind(method, sgd)
    for step in steps(model, optimizer, 0, STEPS):
        if step == 7:
            cut = {name: ~m for name, m in sparsifier.support.items()}
            assert sparsifier.support.counts() == {
                name: kept(m.numel(), 0.3) for name, m in cut.items()
            }
        if step == 8:
            assert sparsifier.support.is_full
            assert not optimizer.state
            assert all(is_plus_zero(model.get_parameter(n)[m]) for n, m in cut.items())
    assert any(model.get_parameter(n)[m].any() for n, m in cut.items())
    with pytest.raises(InputError, match="network is dense"):
        sparsifier.pair()


# --- WoodFisher ----------------------------------------------------------------------------------


def fisher_inverse(g: Tensor, damping: float) -> Tensor:
    """Return the inverse by the authors' updates, one for each of the gradients [N, size]."""
    inverse = torch.eye(g.shape[1], dtype=torch.float64) / damping
    for row in g.double():
        v = inverse @ row
        inverse -= torch.outer(v, v) / (len(g) + row @ v)
    return inverse


def woodfisher(**fields: Any) -> WoodFisher:
    fields = {"first": 0.3, "every": "3st", "length": "6st", "gradients": 2, "block": 16} | fields
    return WoodFisher(Unstructured(0.8), SPARSE, **fields)


def moves(
    method: WoodFisher, weights: Weights, support: Mapping[str, Tensor], memory: Memory
) -> dict[str, Tensor]:
    move = method.training.move
    assert move is not None
    return dict(move(weights, Support(support), memory))


@pytest.mark.parametrize("damping", [1e-5, 0.1])
@pytest.mark.parametrize("block", [3, 4, 100])
def test_scores_and_moves_of_woodfisher_are_those_of_the_inverse(
    block: int, damping: float
) -> None:
    draw = torch.Generator().manual_seed(0)
    w, g = (torch.randn(n, 10, generator=draw) for n in (1, 5))
    kept_until_now = mask(1, 0, 1, 1, 1, 1, 1, 0, 1, 1)[None]
    rows = g[:, kept_until_now[0]]
    memory = {"w": (kept_until_now, list(rows))}
    method = woodfisher(block=block, damping=damping, compensation=0.5)
    params = Weights({"w": w})

    live = rows.shape[1]
    inverse = torch.zeros(live, live, dtype=torch.float64)
    for start in range(0, live, block):
        part = slice(start, start + block)
        f = rows[:, part].double().T @ rows[:, part].double() / 5
        f += damping * torch.eye(f.shape[0])
        inverse[part, part] = torch.linalg.inv(f)
        torch.testing.assert_close(fisher_inverse(rows[:, part], damping), inverse[part, part])

    score = method.rank(params, memory)["w"]
    expected = w[kept_until_now].double().square() / inverse.diagonal()
    torch.testing.assert_close(score[kept_until_now], expected.float())

    stays = mask(1, 0, 0, 1, 1, 0, 1, 0, 0, 1)[None]  # of the kept ones 2, 5 and 8 leave
    v = (w[kept_until_now] / inverse.diagonal()).where(~stays[kept_until_now], 0)
    move = moves(method, params, {"w": stays}, memory)["w"]
    torch.testing.assert_close(move[kept_until_now], (-0.5 * inverse @ v).float())
    assert is_plus_zero(move[~kept_until_now])
    assert not moves(woodfisher(compensation=0.0), params, {"w": stays}, memory)


def test_by_hand_woodfisher_cuts_what_the_loss_feels_least_and_others_make_up_for_it() -> None:
    # Two gradients (√2, √2, 0) and λ = 1 make F = [[3, 2, 0], [2, 3, 0], [0, 0, 1]].
    params = Weights({"w": torch.tensor([1.0, 2.0, 1.1])})
    memory = {"w": (mask(1, 1, 1), [torch.tensor([2**0.5, 2**0.5, 0])] * 2)}
    method = woodfisher(damping=1.0)
    f = torch.tensor([[3.0, 2, 0], [2, 3, 0], [0, 0, 1]])
    torch.testing.assert_close(torch.linalg.inv(f).diagonal(), torch.tensor([0.6, 0.6, 1.0]))
    score = method.rank(params, memory)["w"]
    torch.testing.assert_close(score, torch.tensor([1 / 0.6, 4 / 0.6, 1.21]))
    assert score.argmin() == 2  # and not the smallest weight
    # Without weight 0, weight 1 takes over 2/3 of it, as it does in the minimum of dᵀ F d.
    move = moves(method, params, {"w": mask(0, 1, 1)}, memory)["w"]
    torch.testing.assert_close(move, torch.tensor([-1.0, 2 / 3, 0.0]))
    assert move @ f @ move < f[0, 0]  # what the cut alone would cost
    torch.testing.assert_close(move @ f @ move, score[0])


@pytest.mark.parametrize("how", ["plain", "accumulated", "closure", "scaler", "fused"])
def test_woodfisher_remembers_the_gradients_of_executed_steps_before_a_cut(how: str) -> None:
    model = build()
    # Nesterov without decay: foreach and fused steps change gradients in place.
    options = {"fused": True} if how in ("scaler", "fused") else {"foreach": True}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, **options)
    sparsifier = Sparsifier(woodfisher(), model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    rows: dict[str, list[Tensor]] = {name: [] for name in sparsifier.params}
    lengths = []
    for attempt in range(STEPS):
        skipped = how == "scaler" and attempt in (1, 4)
        support, was = sparsifier.support, copy.deepcopy(model)
        indices = [10 * attempt, 10 * attempt + 1] if how == "accumulated" else [10 * attempt]
        optimizer.zero_grad()
        if how == "closure":
            optimizer.step(lambda first=indices[0]: backward(model, first))
        else:
            for index in indices:
                x, y = batch(index)
                loss = nn.functional.cross_entropy(model(x), y)
                loss = loss * float("inf") if skipped else loss
                (scaler.scale(loss) if how == "scaler" else loss).backward()
            if how == "scaler":
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
        for index in indices:
            backward(was, index)
        step = sparsifier.step - (not skipped)
        if not skipped and step in (1, 2, 4, 5):  # two before each cut; the first, at 0, has none
            for name, held in rows.items():
                grad = was.get_parameter(name).grad
                assert grad is not None
                held.append(grad[support[name]])
        if sparsifier.support is not support:
            rows = {name: [] for name in rows}
        memory = sparsifier.state_dict()["method_state"]
        assert len(memory) == (len(rows) if rows["fc1.weight"] else 0)
        for name, (kept_here, held) in memory.items():
            assert torch.equal(kept_here, support[name])
            expected = torch.stack(rows[name])
            torch.testing.assert_close(torch.stack(held), expected, rtol=1e-5, atol=1e-7)
        lengths.append(len(rows["fc1.weight"]))
    assert lengths[:3] == ([0, 0, 1] if how == "scaler" else [0, 1, 0])
    assert [c.step for c in sparsifier.changes] == [0, 3, 6]


def test_a_cut_of_woodfisher_takes_the_lowest_scores_and_moves_the_rest() -> None:
    model, optimizer, sparsifier = bind(woodfisher(), sgd)
    bare, other, alone = bind(woodfisher(compensation=0.0), sgd)
    magnitudes = Unstructured(0.3).select(
        score.magnitude(build().state_dict()).subset(alone.params)
    )
    assert sparsifier.support == alone.support == magnitudes  # no gradients: by magnitude
    train(model, optimizer, 0, 2)
    train(bare, other, 0, 2)
    twin, third, _ = bind(GMP(Unstructured(0.3), SPARSE, 0.3, "3st", "6st"), sgd)
    train(twin, third, 0, 3)  # its cut at 3 takes nothing more: what a cut at 3 finds
    before, old = sparsifier.state_dict()["method_state"], sparsifier.support
    train(model, optimizer, 2, 3)
    train(bare, other, 2, 3)
    last = {n: twin.get_parameter(n).grad[old[n]] for n in old}  # type: ignore[index]
    memory = {n: (old[n], [*before[n][1], last[n]]) for n in old}
    params = Weights({n: twin.get_parameter(n) for n in old})
    new = sparsifier.support
    ranks = woodfisher().rank(params, memory)
    pattern = Unstructured(0.8).at(ramp(3, 0, 6, 0.3, 0.8))
    assert new == alone.support == pattern.select(score.among(ranks, old))
    assert new != pattern.select(score.magnitude({n: params[n] for n in old}))
    moved, found = False, moves(woodfisher(), params, new, memory)
    for name, stays in new.items():
        expected = params[name].detach().where(stays, 0)
        assert torch.equal(bare.get_parameter(name), expected)
        move = found[name]
        moved |= bool(move[stays].any())
        assert torch.equal(model.get_parameter(name), (params[name] + move).where(stays, 0))
    assert moved
    assert not sparsifier.state_dict()["method_state"]


def test_a_gradient_that_is_not_a_number_is_refused_in_a_sentence() -> None:
    model, optimizer, _ = bind(woodfisher(), sgd)
    train(model, optimizer, 0, 2)
    backward(model, 2)
    model.fc1.weight.grad[0, 0] = float("nan")
    with torch.no_grad(), pytest.raises(InputError, match=r"'fc1.weight' holds NaN.*has diverged"):
        optimizer.step()


# --- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_name_and_citation(name: str) -> None:
    kind = METHODS[name]
    assert kind.name == name
    assert getattr(acdc, kind.__name__) is kind
    assert kind.__name__ in acdc.__all__
    assert kind.__doc__
    if kind is not acdc.Dense:
        assert "Source: " in kind.__doc__
        assert kind.citation.startswith("@")
        assert kind.citation.endswith("}\n")
        assert kind.citation.count("{") == kind.citation.count("}")
        assert "year" in kind.citation


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "drop": (lambda: RigL(ERK, SPARSE, drop=0.0), r"RigL\(drop=...\) is 0.0.*above 0, up to 1"),
    "drop, text": (lambda: SET(ERK, SPARSE, drop="30%"), r"SET\(drop=...\) is '30%'.*share"),  # type: ignore[arg-type]
    "every": (lambda: SET(ERK, SPARSE, every="100"), "duration of every is '100'. Write a number"),
    "no time": (lambda: RigL(ERK, SPARSE, every="0st"), "every is '0st', which is none. Make it"),
    "until": (lambda: SNFS(ERK, SPARSE, until="soon"), "The duration of until is 'soon'"),
    "seed": (lambda: Static(ERK, SPARSE, seed=-1), "seed is -1. Give a whole number from 0 up"),
    "seed, text": (lambda: SET(ERK, SPARSE, seed="a"), "seed is 'a'. Give a whole number"),  # type: ignore[arg-type]
    "first": (lambda: GMP(ERK, SPARSE, first=0.9), r"GMP\(first=...\) is 0.9.*ends at 0.8.*lower"),
    "first, 50": (lambda: GMP(ERK, SPARSE, first=50), r"first is 50.*write 0.9 for 90 %"),
    "pattern": (lambda: RigL(NM(2, 4), SPARSE), r"NM\(n=2, m=4\), which this method cannot keep"),  # type: ignore[arg-type]
    "backward": (
        lambda: TopKAST(ERK, SPARSE, backward=0.9),
        r"backward=...\) is 0.9, and the pattern has the sparsity 0.8.*lower it",
    ),
    "penalty": (
        lambda: TopKAST(ERK, SPARSE, penalty=-1.0),
        "penalty=...\\) is -1.0. Give a number",
    ),
    "decay": (lambda: SRSTE(NM(2, 4), SPARSE, decay=-1.0), "decay=...\\) is -1.0. Give a number"),
    "gradients": (
        lambda: WoodFisher(ERK, SPARSE, gradients=0),
        "gradients=...\\) is 0. Give a whole",
    ),
    "block": (lambda: WoodFisher(ERK, SPARSE, block=2e3), r"block=...\) is 2000.0. Give a whole"),  # type: ignore[arg-type]
    "damping": (lambda: WoodFisher(ERK, SPARSE, damping=0.0), "damping=...\\) is 0.0. Without it"),
    "compensation": (
        lambda: WoodFisher(ERK, SPARSE, compensation=-1.0),
        "compensation=...\\) is -1.0. Give a number from 0 up",
    ),
    "not N:M": (lambda: SRSTE(ERK, SPARSE), r"which this method cannot keep. Give NM"),  # type: ignore[arg-type]
    "exchange": (lambda: granet(drop=1.5), r"GraNet\(drop=...\) is 1.5.*above 0, up to 1"),
    "reset": (lambda: SET(ERK, SPARSE, reset="some"), "reset is 'some'. It is one of all"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_sentences(case: str) -> None:
    call, sentence = BAD[case]
    with pytest.raises(InputError, match=sentence):
        call()


# --- methods that keep dense weights behind the sparse ones --------------------------------------

VIEWS: dict[str, Any] = {
    "topkast": TopKAST(Unstructured(0.8), SPARSE, 0.4, penalty=0.01, every="2st"),
    "dpf": DPF(Unstructured(0.8), SPARSE, first=0.3, every="2st", length="7st"),
    "srste": SRSTE(NM(2, 4), SPARSE, decay=0.1, every="2st"),
    "ste": SRSTE(NM(2, 4), SPARSE, decay=0.0, every="1st"),
}
every_view = pytest.mark.parametrize("name", VIEWS)
LEARNING = STR(Unstructured(0.8), SPARSE, first=0.3, every="2st", length="7st", rate=10.0)


class ByHand:
    """The same training without the library: dense weights, masked for forward and backward."""

    def __init__(self, method: Any, names: list[str]) -> None:
        self.method, self.names = method, names
        self.model = build()
        self.optimizer = sgd(self.model)
        self.first, self.second = self.choose(0)

    def choose(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the support of the computation, and the support that is trained."""
        method = self.method
        magnitude = {n: self.model.get_parameter(n).abs().detach() for n in self.names}
        if isinstance(method, DPF):
            pattern: Any = Unstructured(ramp(step, 0, 7, 0.3, 0.8))
        else:
            pattern = method.pattern
        first = dict(pattern.select(magnitude))
        second = {n: torch.ones_like(m) for n, m in first.items()}
        if isinstance(method, TopKAST):
            second = dict(Unstructured(method.backward).select(magnitude))
        return first, second

    def step(self, step: int) -> None:
        dense = {n: self.model.get_parameter(n).detach().clone() for n in self.names}
        with torch.no_grad():
            for n in self.names:
                self.model.get_parameter(n).masked_fill_(~self.first[n], 0)
        self.optimizer.zero_grad()
        backward(self.model, step)
        method = self.method
        with torch.no_grad():
            for n, w in dense.items():
                p, a, b = self.model.get_parameter(n), self.first[n], self.second[n]
                p.copy_(w)
                assert p.grad is not None
                if isinstance(method, TopKAST):  # weight decay faster by 1/density outside of A
                    p.grad.masked_fill_(~b, 0)
                    p.grad += (w * torch.where(a, 0.01, 0.01 / (1 - 0.8))).masked_fill(~b, 0)
                elif isinstance(method, SRSTE) and method.decay:
                    p.grad += (method.decay * w).masked_fill(a, 0)
            self.optimizer.step()
            for n, w in dense.items():
                self.model.get_parameter(n).copy_(
                    self.model.get_parameter(n).where(self.second[n], w)
                )
        every = 1 if method.every == "1st" else 2
        due = (step + 1) % every == 0
        if isinstance(method, DPF):  # the last choice is at 7, though that is no multiple of two
            due = step + 1 == 7 or (due and step + 1 < 7)
        if due and step + 1 < STEPS:
            self.first, self.second = self.choose(step + 1)


@every_view
@pytest.mark.parametrize("how", ["plain", "closure"])
def test_a_view_trains_the_dense_weights_by_the_gradient_at_the_sparse_ones(
    name: str, how: str
) -> None:
    model, optimizer, sparsifier = bind(VIEWS[name], sgd)
    other = ByHand(VIEWS[name], list(sparsifier.params))
    supports = {sparsifier.support.digest()}
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            return backward(model, step)

        if how == "closure":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        other.step(step)
        supports.add(sparsifier.support.digest())
        assert sparsifier.support == Support(other.first)
        for n, p in model.named_parameters():
            value = other.model.get_parameter(n)
            if n in sparsifier.params:
                assert torch.equal(sparsifier.dense_weights[n], value), n
                assert is_plus_zero(p[~other.first[n]])
                value = value.where(other.first[n], 0)
            assert torch.equal(p, value), n
    assert len(supports) > 3


def test_what_top_kast_does_not_train_stays_and_its_sets_have_their_sizes() -> None:
    method = TopKAST(Unstructured(0.8), SPARSE, 0.4, every="4st")
    model, optimizer, sparsifier = bind(method, sgd)  # with momentum and weight decay
    for _ in range(3):
        start = {n: w.clone() for n, w in sparsifier.dense_weights.items()}
        first, second = sparsifier.support, sparsifier._store.trained
        assert second is not None
        assert (first.nnz, second.nnz) == (kept(888, 0.8), kept(888, 0.4))
        assert all((second[n] | ~first[n]).all() for n in first)  # A lies in B
        moved = 0
        for step in range(3):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
            for n, w in sparsifier.dense_weights.items():
                assert torch.equal(w[~second[n]], start[n][~second[n]])
                moved += int((w != start[n])[second[n] & ~first[n]].sum())
        assert moved > 0
        train(model, optimizer, 3, 4)


@every_view
def test_a_view_is_plain_to_whoever_looks(name: str) -> None:
    model, optimizer, sparsifier = bind(VIEWS[name], sgd)
    for _ in steps(model, optimizer, 0, STEPS):
        assert list(model.state_dict()) == list(build().state_dict())
        assert type(model) is Net
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert same(clone.state_dict(), model.state_dict())
    sparsifier.remove()
    assert all(is_plus_zero(model.get_parameter(n)[~m]) for n, m in sparsifier.support.items())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, 0, 1)
    assert any(model.get_parameter(n)[~m].any() for n, m in sparsifier.support.items())
    assert before.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [*VIEWS, "str"])
def test_a_skipped_step_leaves_view_and_dense_weights_as_they_were(name: str, fused: bool) -> None:
    def factory(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)

    method = LEARNING if name == "str" else VIEWS[name]
    model, optimizer, sparsifier = bind(method, factory)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    plain_model, plain, reference = bind(method, factory)
    for attempt in range(6):
        before = copy.deepcopy((list(model.parameters()), sparsifier.state_dict()))
        overflow = attempt in (1, 4)
        optimizer.zero_grad()
        x, y = batch(attempt)
        loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss * (float("inf") if overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert same((list(model.parameters()), sparsifier.state_dict()), before)
            continue
        plain.zero_grad()  # the scale, and the loss in it, must not reach what is added
        backward(plain_model, attempt)
        plain.step()
        for n, w in sparsifier.dense_weights.items():
            torch.testing.assert_close(w, reference.dense_weights[n], rtol=1e-4, atol=1e-6)
        learned, expected = (s.state_dict()["method_state"] or {} for s in (sparsifier, reference))
        assert learned.keys() == expected.keys()
        assert bool(learned) == (name == "str")
        for n, threshold in learned.items():
            assert not torch.equal(threshold, before[1]["method_state"][n])
            torch.testing.assert_close(threshold, expected[n], rtol=1e-5, atol=1e-6)


@every_view
def test_in_a_dense_phase_after_it_the_dense_weights_are_back(name: str) -> None:
    plan = phases(2, [("sparse", "1ep"), ("dense", "1ep")]).resolve(8)
    model, optimizer, sparsifier = bind(replace(VIEWS[name], schedule=plan), sgd)
    train(model, optimizer, 0, 7)
    twin = ByHand(VIEWS[name], list(sparsifier.params))
    for step in range(8):
        twin.step(step)
    train(model, optimizer, 7, 8)
    assert sparsifier.support.is_full
    assert sparsifier.dense_weights == {}
    for n in sparsifier.params:
        assert torch.equal(model.get_parameter(n), twin.model.get_parameter(n))


def test_an_engine_stands_aside_for_a_view() -> None:
    model = build()
    engine = acdc.Engine(model, batch(0)[0], backend=Reference(), choose=False)
    optimizer = sgd(model)
    sparsifier = Sparsifier(VIEWS["dpf"], model, optimizer, engine=engine)
    plain, other, reference = bind(VIEWS["dpf"], sgd)
    for step in range(STEPS):
        assert not engine.active
        train(model, optimizer, step, step + 1)
    train(plain, other, 0, STEPS)
    assert same(sparsifier.dense_weights, reference.dense_weights)


def test_an_engine_runs_what_thresholds_leave_and_they_learn_the_same() -> None:
    model = build()
    engine = acdc.Engine(model, batch(0)[0], backend=Reference(), choose=False)
    optimizer = sgd(model)
    sparsifier = Sparsifier(LEARNING, model, optimizer, engine=engine)
    plain, other, reference = bind(LEARNING, sgd)
    for step in range(STEPS):
        assert engine.active
        train(model, optimizer, step, step + 1)
        train(plain, other, step, step + 1)
        assert sparsifier.support == reference.support
        for name, dense in sparsifier.dense_weights.items():
            torch.testing.assert_close(dense, reference.dense_weights[name], rtol=1e-4, atol=1e-6)
            learned, expected = (
                s.state_dict()["method_state"] or {} for s in (sparsifier, reference)
            )
            torch.testing.assert_close(learned[name], expected[name], rtol=1e-4, atol=1e-6)
            view, plainly = model.get_parameter(name), plain.get_parameter(name)
            assert torch.equal(view == 0, plainly == 0)


def test_flops_of_views() -> None:
    f_s, f_d = 200, 1000
    assert step_flops(DPF(ERK, SPARSE), f_s, f_d) == 2 * f_s + f_d
    assert step_flops(SRSTE(NM(2, 4), SPARSE), f_s, f_d) == 2 * f_s + f_d
    # B at half the sparsity of A costs half way between A and all.
    assert step_flops(TopKAST(ERK, SPARSE, backward=0.4), f_s, f_d) == 2 * f_s + 600
    assert step_flops(STR(Unstructured(0.8), SPARSE), f_s, f_d) == 3 * f_s


# --- STR -----------------------------------------------------------------------------------------


def test_the_soft_threshold_and_its_gradient_by_hand() -> None:
    rule = SoftThreshold(rate=2.0, momentum=0.5, decay=0.1)
    w, g = torch.tensor([1.0, -0.75, 0.5, -0.25]), torch.tensor([3.0, 1.0, 9.0, 9.0])
    s = torch.tensor(0.0, requires_grad=True)
    view = w.sign() * (w.abs() - s.sigmoid()).relu()  # the authors' line
    view.backward(g)
    assert s.grad == -0.5  # -1/4 · (3 - 1)
    shrunk = rule.shrink(w, torch.tensor([0.0, 0.0]))
    assert shrunk.tolist() == view.tolist() == [0.5, -0.25, 0.0, 0.0]
    after = rule.learn(torch.tensor([0.0, 4.0]), shrunk, g, lr=0.1)
    assert after.tolist() == pytest.approx([-2 * 0.1 * 1.5, 1.5])  # 4/2 - 1/2 + 0
    decayed = rule.learn(torch.tensor([-4.0, 0.0]), shrunk, torch.zeros(4), lr=0.1)
    assert decayed.tolist() == pytest.approx([-4 + 0.08, -0.4])


def test_str_learns_thresholds_behind_exact_supports() -> None:
    model, optimizer, sparsifier = bind(LEARNING, sgd)
    apart = set()
    for step in steps(model, optimizer, 0, STEPS):
        learned = sparsifier._state
        apart.add(tuple(float(learned[n][0] - learned["conv1.weight"][0]) for n in learned))
        chosen = min(step, 7) if step >= 7 else step - step % 2
        assert sparsifier.support.nnz == Unstructured(ramp(chosen, 0, 7, 0.3, 0.8)).total(
            {n: tuple(p.shape) for n, p in sparsifier.params.items()}
        )
        for n, dense in sparsifier.dense_weights.items():
            threshold, kept_here = learned[n][0].sigmoid(), sparsifier.support[n]
            soft = dense.sign() * (dense.abs() - threshold).relu()
            assert torch.equal(sparsifier.params[n], soft.masked_fill(~kept_here, 0) + 0.0)
            assert sparsifier.params[n].any()
            if step == chosen:  # the thresholds cut to the support, and not only the support itself
                assert (dense[~kept_here].abs() <= threshold * (1 + 1e-5)).all()
                assert (dense[kept_here].abs() > threshold).all()
    assert len(apart) == STEPS  # parted by their gradients in every step
    with pytest.raises(InputError, match=r"cannot keep. Give the scope \"global\""):
        STR(ERK, SPARSE)
