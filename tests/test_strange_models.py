"""Models and optimizers of unusual build: they train with exact zeros, or are refused at attach."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import acdc
from acdc.errors import InputError
from acdc.sparsifier import Sparsifier
from support.helpers import CUTS, SCHEDULE, TOTAL, is_plus_zero

METHOD = acdc.ACDC(acdc.Unstructured(0.8), SCHEDULE)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
    loss: Tensor = model(x).square().mean()
    return loss


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, steps: int = TOTAL
) -> Sparsifier:
    """Train, with exact zeros and the exact number of kept weights after every step."""
    optimizer = sgd(model) if optimizer is None else optimizer
    sparsifier = Sparsifier(METHOD, model, optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        for name, mask in sparsifier.support.items():
            assert is_plus_zero(sparsifier.params[name][~mask])
            if sparsifier.phase.kind == "sparse":
                assert sparsifier.params[name][mask].count_nonzero() == mask.sum()
    assert sparsifier.step == steps
    return sparsifier


# --- what works ----------------------------------------------------------------------------------


class Renamed(nn.Module):
    """Its state dict calls ``net`` by another name, and it has nothing else."""

    def __init__(self, also: bool = False) -> None:
        super().__init__()
        self.net = net()
        if also:
            self.scale = nn.Parameter(torch.ones(1))
        self._register_state_dict_hook(self._rename)

    @staticmethod
    def _rename(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name in list(state):
            state[prefix + "core." + name.removeprefix(prefix)] = state.pop(name)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class WithoutSome(nn.Module):
    """A list with None in it, a module that is None, and a parameter that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 16), None, nn.Linear(16, 4)])  # type: ignore[list-item]
        self.register_module("nothing", None)
        self.register_parameter("no_weight", None)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x if layer is None else layer(x)
        return x


class BufferWeight(nn.Linear):
    """A linear layer whose weight is a buffer: nothing trains it."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.net, x, use_reentrant=False)
        return y


def biases_tied(model: nn.Sequential) -> nn.Module:
    model[2].bias = model[0].bias
    return model


def named_twice(model: nn.Sequential) -> nn.Module:
    model[0].register_parameter("again", model[2].weight)
    return model


def layer_twice(model: nn.Sequential) -> nn.Module:
    return nn.Sequential(model[0], model[2], nn.ReLU(), model[2], model[4])


def part_compiled(model: nn.Sequential) -> nn.Module:
    model[2] = torch.compile(model[2], backend="eager")  # type: ignore[assignment]
    return model


def compiled_in_place(model: nn.Sequential) -> nn.Module:
    model[2].compile(backend="eager")
    return model


def columns_of_one_matrix(model: nn.Sequential) -> nn.Module:
    """Two weights that lie between one another in memory, without a common element."""
    both = torch.randn(16, 24)
    model[0].weight = nn.Parameter(both[:, :8])
    model[2].weight = nn.Parameter(both[:, 8:])
    return model


def rows_of_one_matrix(model: nn.Sequential) -> nn.Module:
    both = torch.randn(16 * 8 + 16 * 16)
    model[0].weight = nn.Parameter(both[:128].view(16, 8))
    model[2].weight = nn.Parameter(both[128:].view(16, 16))
    return model


ALL = ["0.weight", "2.weight", "4.weight"]


@pytest.mark.parametrize(
    ("make", "pruned"),
    [
        (biases_tied, ALL),
        (named_twice, ["0.again", "0.weight", "4.weight"]),
        (layer_twice, ["0.weight", "1.weight", "4.weight"]),
        (part_compiled, ["0.weight", "2._orig_mod.weight", "4.weight"]),
        (compiled_in_place, ALL),
        (columns_of_one_matrix, ALL),
        (rows_of_one_matrix, ALL),
        (lambda _: Renamed(), ALL),  # the module inside is the one that is saved
        (lambda _: WithoutSome(), ["layers.0.weight", "layers.2.weight"]),
        (lambda _: nn.Sequential(nn.Linear(8, 16), BufferWeight(16, 4)), ["0.weight"]),
        (lambda _: Recomputed(), [f"net.{name}" for name in ALL]),
    ],
    ids=["tied biases", "registered twice", "a layer twice", "compiled part", "compiled in place",
         "columns", "rows", "renamed", "none", "buffer", "recomputed"],
)  # fmt: skip
def test_it_trains_with_exact_zeros(
    make: Callable[[nn.Sequential], nn.Module], pruned: list[str]
) -> None:
    sparsifier = trained(make(net()))
    assert sorted(sparsifier.params) == sorted(pruned)
    assert set(pruned) <= sparsifier.pair().sparse.keys()


@pytest.mark.parametrize(
    "norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["old", "new"]
)
def test_a_weight_that_is_computed_from_others_stays_dense(norm: Callable[..., Any]) -> None:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        norm(model[2])
    sparsifier = trained(model)
    assert list(sparsifier.params) == ["0.weight", "4.weight"]
    assert len(sparsifier.refused) == 2
    for reason in sparsifier.refused.values():
        assert reason.startswith("the weight of 2 is computed from it")


def test_what_the_optimizer_holds_besides_is_left_alone() -> None:
    model, stranger = net(), nn.Parameter(torch.ones(100, 10))
    optimizer = torch.optim.SGD([stranger, *model.parameters()], lr=0.1, momentum=0.9)
    trained(model, optimizer)
    assert torch.equal(stranger, torch.ones(100, 10))


def test_gradients_that_are_assigned_move_no_pruned_weight() -> None:
    model = net()
    optimizer = sgd(model)
    sparsifier = Sparsifier(METHOD, model, optimizer)
    for _ in range(TOTAL):
        for param in model.parameters():
            param.grad = torch.full_like(param, 1e-3)
        optimizer.step()
        for name, mask in sparsifier.support.items():
            assert is_plus_zero(sparsifier.params[name][~mask])


def test_a_copy_of_an_attached_model_is_free() -> None:
    model = net()
    sparsifier = trained(model, steps=CUTS[0] + 1)
    other, optimizer = copy.deepcopy((model, sparsifier.optimizer))
    assert type(pickle.loads(pickle.dumps(model))) is nn.Sequential
    loss_of(other, 0).backward()
    optimizer.step()
    assert sparsifier.step == CUTS[0] + 1
    dropped = ~sparsifier.support["2.weight"]
    assert other.get_submodule("2").weight[dropped].any()
    assert is_plus_zero(model[2].weight[dropped])


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, pickle.dumps, lambda s: copy.deepcopy((s.model, s.optimizer, s))],
    ids=["copy", "deepcopy", "pickle", "with its model"],
)
def test_a_sparsifier_is_not_copied(copied: Callable[[Sparsifier], Any]) -> None:
    """A copy held no hooks: its model trained dense, and its clock stood still."""
    sparsifier = trained(net(), steps=CUTS[0] + 1)
    with pytest.raises(InputError, match=r"cannot be copied or pickled.*state_dict\(\)"):
        copied(sparsifier)


def shared_by_data() -> nn.Module:
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))
    model[1].weight.data = model[0].weight.data  # type: ignore[union-attr]
    return model


def overlapping() -> nn.Module:
    model, memory = net(), torch.randn(256)
    model[0].weight = nn.Parameter(memory[:128].view(16, 8))
    model[2].weight = nn.Parameter(memory.view(16, 16))
    return model


@pytest.mark.parametrize("make", [shared_by_data, overlapping])
def test_two_parameters_in_one_memory_are_refused(make: Callable[[], nn.Module]) -> None:
    """Zeros of one were zeros of the other: an embedding was cut, or fewer weights were kept."""
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"'.\.weight' and '.\.weight' share memory.*exclude"):
        Sparsifier(METHOD, model, sgd(model))
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_memory_that_is_shared_by_what_stays_dense_is_no_matter() -> None:
    model = overlapping()
    layers = acdc.Layers(exclude=("0", "2"))
    method = acdc.ACDC(acdc.Unstructured(0.8), SCHEDULE, layers=layers)
    assert list(Sparsifier(method, model, sgd(model)).params) == ["4.weight"]


class Group(torch.optim.Optimizer):
    """Steps others, which have the state."""

    def __init__(self, model: nn.Module, as_dict: bool) -> None:
        params = list(model.parameters())
        super().__init__(params, {"lr": 0.1})
        first, second = torch.optim.Adam(params[:2]), torch.optim.SGD(params[2:], 0.1, 0.9)
        self.parts: Any = {"a": first, "b": second} if as_dict else [first, second]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for each in self.parts.values() if isinstance(self.parts, dict) else self.parts:
            each.step()


@pytest.mark.parametrize("as_dict", [True, False])
def test_an_optimizer_of_optimizers_is_refused_and_its_parts_are_followed(as_dict: bool) -> None:
    """Its own state is empty, so that no state was cleared when weights came back."""
    model = net()
    group = Group(model, as_dict)
    with pytest.raises(InputError, match=r"Group, which holds 2 optimizers \(Adam, SGD\).*a list"):
        Sparsifier(METHOD, model, group)
    parts = list(group.parts.values()) if as_dict else group.parts
    sparsifier = Sparsifier(METHOD, model, parts)
    for step in range(TOTAL):
        group.zero_grad()
        loss_of(model, step).backward()
        group.step()
    assert sparsifier.step == TOTAL


def test_a_module_whose_state_dict_renames_its_own_parameters_is_refused() -> None:
    model = Renamed(also=True)
    with pytest.raises(InputError, match=r"7 parameters of the Renamed have other names"):
        Sparsifier(METHOD, model, sgd(model))


def test_a_scripted_module_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(net())
    with pytest.raises(InputError, match=r"of torch\.jit, whose parameters cannot be followed"):
        Sparsifier(METHOD, model, sgd(model))


def test_an_optimizer_of_half_the_weights_is_refused() -> None:
    model = net()
    with pytest.raises(InputError, match=r"does not hold 2 of the 3 weights to prune, '2.weight'"):
        Sparsifier(METHOD, model, sgd(model[0]))
