"""A support that is given is kept; the gradual methods go on from the zeros that a model has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import acdc
from acdc import methods
from acdc.errors import InputError
from acdc.methods.base import Method
from acdc.runs.recipe import encode
from acdc.support import Support

SPARSE = acdc.constant("sparse", epochs=1).resolve(6)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5)
    )


def sparse_network(sparsity: float = 0.7) -> tuple[nn.Sequential, Support]:
    net = network()
    weights = acdc.Layers().select(net)
    support = acdc.Unstructured(sparsity).select({n: w.detach().abs() for n, w in weights.items()})
    with torch.no_grad():
        for name, mask in support.items():
            weights[name].masked_fill_(~mask, 0.0)
    return net, support


def train(
    method: Method[Any], net: nn.Module, steps: int, watch: Callable[[acdc.Sparsifier], None]
) -> acdc.Sparsifier:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    sparsifier = acdc.Sparsifier(method, net, optimizer)
    watch(sparsifier)
    for step in range(steps):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        watch(sparsifier)
    return sparsifier


def pruned_bits(sparsifier: acdc.Sparsifier) -> int:
    """Return how many weights outside the support are not +0.0, bit for bit."""
    found = 0
    for name, mask in sparsifier.support.items():
        bits = sparsifier.params[name].detach().contiguous().view(torch.int32)
        found += int(bits[~mask].count_nonzero())
    return found


def test_a_given_support_is_kept_under_training() -> None:
    net, support = sparse_network()

    def watch(sparsifier: acdc.Sparsifier) -> None:
        assert sparsifier.support == support
        assert pruned_bits(sparsifier) == 0

    sparsifier = train(acdc.Given(support, SPARSE), net, 6, watch)
    assert len(sparsifier.changes) == 1
    saved = acdc.SparseNetwork(net.state_dict(), sparsifier.support)
    assert saved.support == support


def test_transfer_keeps_the_zeros_and_trains_a_new_head_densely() -> None:
    net, support = sparse_network()
    net[4] = nn.Linear(40, 7)
    head = net[4].weight.detach().clone()
    method = acdc.Given.zeros(net, SPARSE)
    assert list(method.support) == ["0.weight", "2.weight"]
    train(method, net, 6, lambda s: None)
    assert all(torch.equal(method.support[n], support[n]) for n in method.support)
    assert (net[4].weight != head).all()
    assert method.sparsity == pytest.approx(method.support.sparsity)


def test_dense_phases_train_all_weights_and_the_same_support_returns() -> None:
    net, support = sparse_network()
    plan = acdc.phases(3, [("sparse", "1ep"), ("dense", "1ep"), ("sparse", "1ep")]).resolve(2)
    seen: list[bool] = []

    def watch(sparsifier: acdc.Sparsifier) -> None:
        seen.append(sparsifier.support.is_full)
        assert sparsifier.support.is_full or sparsifier.support == support

    sparsifier = train(acdc.Given(support, plan), net, 6, watch)
    assert seen == [False, False, True, True, False, False, False]
    assert sparsifier.pair().support == support


def test_a_resumed_run_has_the_same_support_and_another_support_is_refused() -> None:
    net, support = sparse_network()
    state = train(acdc.Given(support, SPARSE), net, 3, lambda s: None).state_dict()
    net = network()
    other = acdc.Sparsifier(acdc.Given(support, SPARSE), net, torch.optim.SGD(net.parameters(), 1))
    other.load_state_dict(state)
    other.remove()
    assert other.step == 3
    assert other.support == support
    masks = {name: mask.roll(1, 0) for name, mask in support.items()}
    moved = acdc.Given(Support(masks), SPARSE)
    third = acdc.Sparsifier(moved, net, torch.optim.SGD(net.parameters(), 1))
    with pytest.raises(InputError, match="of another run"):
        third.load_state_dict(state)


def test_the_forecast_is_exact() -> None:
    net, support = sparse_network()
    method = acdc.Given(support, SPARSE)
    params, _ = method.select(net)
    assert method.forecast(params).exact
    assert method.forecast(params).supports == ((0, support.counts()),)


def _renamed(support: Support) -> Support:
    return Support({f"net.{name}": mask for name, mask in support.items()})


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda net, s: acdc.Given({"0.weight": s["0.weight"]}, SPARSE), "Give a Support"),
        (lambda net, s: acdc.Given(Support({}), SPARSE), "at least one weight"),
        (lambda net, s: acdc.Given(s, "sparse"), "Give a plan"),
        (lambda net, s: acdc.Given(s, SPARSE, reset="some"), "It is one of"),
        (lambda net, s: acdc.Given(_renamed(s), SPARSE).select(net), "no such parameter"),
        (
            lambda net, s: acdc.Given(Support({"4.weight": s["0.weight"]}), SPARSE).select(net),
            "was replaced",
        ),
        (lambda net, s: acdc.Given.zeros(network(), SPARSE), "exactly zero"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    build: Callable[[nn.Module, Support], Any], match: str
) -> None:
    net, support = sparse_network()
    with pytest.raises(InputError, match=match):
        build(net, support)


def test_a_layer_of_zeros_alone_and_a_frozen_layer_are_refused() -> None:
    net, support = sparse_network()
    nn.init.zeros_(net[2].weight)
    with pytest.raises(InputError, match=r"Every weight of '2\.weight' is zero"):
        acdc.Given.zeros(net, SPARSE)
    net[2].weight.requires_grad_(False)
    with pytest.raises(InputError, match="is not trained"):
        acdc.Given(support, SPARSE).select(net)


# --- going on from a sparse network -------------------------------------------------------------


def further(cls: type[Method[Any]], pattern: Any, **more: Any) -> Method[Any]:
    if cls is methods.OneShot:
        return methods.OneShot(pattern, SPARSE, keep_zeros=True)
    return cls(pattern, SPARSE, first=0.7, every="1st", length="4st", keep_zeros=True, **more)  # type: ignore[call-arg]


@pytest.mark.parametrize("scope", ["global", "uniform", "erk"])
@pytest.mark.parametrize("cls", [methods.OneShot, methods.GMP, methods.Gradual, methods.WoodFisher])
def test_a_sparse_network_is_pruned_further_and_no_zero_comes_back(
    cls: type[Method[Any]], scope: Any
) -> None:
    net, support = sparse_network()
    zeros = {name: ~mask for name, mask in support.items()}

    def watch(sparsifier: acdc.Sparsifier) -> None:
        assert pruned_bits(sparsifier) == 0
        assert not any((mask & zeros[n]).any() for n, mask in sparsifier.support.items())

    sparsifier = train(further(cls, acdc.Unstructured(0.9, scope)), net, 6, watch)
    numel, nnz = sparsifier.support.numel, sparsifier.support.nnz
    if scope == "global":
        assert nnz == acdc.kept(numel, 0.9)
    else:  # a layer that is sparser already stays so
        assert 0.85 * acdc.kept(numel, 0.9) <= nnz <= acdc.kept(numel, 0.9)
    assert not further(cls, acdc.Unstructured(0.9)).forecast(dict(sparsifier.params)).exact


def test_without_it_zeros_come_back() -> None:
    net, support = sparse_network()
    method = methods.Gradual(acdc.Unstructured(0.9), SPARSE, every="1st", length="4st")
    back: list[bool] = []

    def watch(sparsifier: acdc.Sparsifier) -> None:
        back.append(any(bool((m & ~support[n]).any()) for n, m in sparsifier.support.items()))

    train(method, net, 6, watch)
    assert back[0]


def test_pruning_to_less_than_there_is_keeps_what_there_is() -> None:
    net, support = sparse_network(0.8)
    method = methods.OneShot(acdc.Unstructured(0.5), SPARSE, keep_zeros=True)
    assert train(method, net, 2, lambda s: None).support == support


def test_a_field_that_was_added_leaves_recipes_as_they_were() -> None:
    """Labels of runs are hashes of their values, and results are found by their labels."""
    method = methods.GMP(acdc.Unstructured(0.9), acdc.constant("sparse", epochs=2))
    assert "keep_zeros" not in encode(method)
    assert encode(further(methods.GMP, acdc.Unstructured(0.9)))["keep_zeros"] is True


def test_exports() -> None:
    assert acdc.Given is methods.Given
