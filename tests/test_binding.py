"""One model, its weights and one optimizer belong to one sparsifier, and stay what they were."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim.optimizer import _global_optimizer_pre_hooks

import acdc
from acdc.errors import InputError
from acdc.sparsifier import Sparsifier
from support.helpers import CUTS, SCHEDULE, TOTAL, Net, backward, build, is_plus_zero, sgd

METHOD = acdc.ACDC(acdc.Unstructured(0.8), SCHEDULE)


def attached() -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
    model = build()
    optimizer = sgd(model)
    return model, optimizer, Sparsifier(METHOD, model, optimizer)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for index in range(count):
        optimizer.zero_grad()
        backward(model, index)
        optimizer.step()


# --- one sparsifier -------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, CUTS[0] + 1], ids=["dense", "sparse"])
def test_a_second_sparsifier_is_refused_and_changes_nothing(after: int) -> None:
    model, optimizer, sparsifier = attached()
    steps(model, optimizer, after)
    hooks = len(optimizer._optimizer_step_post_hooks), len(optimizer._optimizer_step_pre_hooks)
    state = copy.deepcopy(model.state_dict())
    for other in (optimizer, sgd(model)):
        with pytest.raises(InputError, match="The model has a sparsifier already") as refused:
            Sparsifier(METHOD, model, other)
        assert "remove()" in str(refused.value)
    assert hooks == (
        len(optimizer._optimizer_step_post_hooks), len(optimizer._optimizer_step_pre_hooks),
    )  # fmt: skip
    assert all(map(torch.equal, state.values(), model.state_dict().values()))
    steps(model, optimizer, 1)
    assert sparsifier.step == after + 1


def test_a_second_sparsifier_on_a_part_or_on_a_wrapper_is_refused() -> None:
    model, _, _sparsifier = attached()
    for other in (nn.Sequential(model), nn.Sequential(model.conv2)):
        with pytest.raises(InputError, match=r"The weight '.*' has a sparsifier already"):
            Sparsifier(METHOD, other, sgd(other))
    with pytest.raises(InputError, match="The model has a sparsifier already"):
        Sparsifier(METHOD, torch.compile(model, backend="eager"), sgd(model))


def test_one_optimizer_of_two_models_takes_one_sparsifier() -> None:
    first, second = build(), build(seed=1)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    Sparsifier(METHOD, first, optimizer)
    with pytest.raises(InputError, match="The optimizer has a sparsifier already"):
        Sparsifier(METHOD, second, optimizer)


def test_after_remove_another_one_may_be_attached() -> None:
    model, optimizer, sparsifier = attached()
    steps(model, optimizer, CUTS[0] + 1)
    sparsifier.remove()
    other = Sparsifier(METHOD, model, optimizer)
    steps(model, optimizer, TOTAL)
    assert other.step == TOTAL
    assert sparsifier.step == CUTS[0] + 1


def test_a_copy_is_another_model_and_a_failed_attempt_leaves_no_claim() -> None:
    model, _, _sparsifier = attached()
    other = copy.deepcopy(model)
    with pytest.raises(InputError, match="does not hold"):
        Sparsifier(METHOD, other, sgd(model := build()))
    Sparsifier(METHOD, other, sgd(other))
    Sparsifier(METHOD, model, sgd(model))


def test_two_networks_that_train_side_by_side_have_one_each() -> None:
    nets = nn.ModuleDict({"generator": build(), "discriminator": build(seed=1)})
    for net in nets.values():
        optimizer = sgd(net)
        Sparsifier(METHOD, net, optimizer)
        steps(net, optimizer, TOTAL)


def test_a_sparsifier_that_was_dropped_in_a_sparse_phase_still_holds_the_weights() -> None:
    model, optimizer, sparsifier = attached()
    steps(model, optimizer, CUTS[0] + 1)
    del optimizer, sparsifier  # its hooks would clear gradients by the old support
    with pytest.raises(InputError, match="has a sparsifier already"):
        Sparsifier(METHOD, model, sgd(model))


# --- the same weights -----------------------------------------------------------------------------


def assigned(model: nn.Module) -> None:
    model.conv2.weight = nn.Parameter(model.conv2.weight.detach().clone())


def loaded(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def moved(model: nn.Module) -> None:
    model.to("meta")


def converted(model: nn.Module) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


class Shifted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(model.fc1, "weight", Shifted())


def weight_normed(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.fc1)


def pruned(model: nn.Module) -> None:
    prune.random_unstructured(model.fc1, "weight", 0.5)


def tied(model: nn.Module) -> None:
    model.fc1.weight = model.fc3.weight


def another_layer(model: nn.Module) -> None:
    model.fc2 = nn.Linear(8, 4)


def removed(model: nn.Module) -> None:
    del model.fc2.weight
    model.fc2.weight = torch.zeros(4, 8)


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc3 = nn.Linear(8, 8)
        self.fc3.requires_grad_(False)


CHANGES = (
    assigned, loaded, moved, converted, parametrized, weight_normed, pruned, tied, another_layer,
    removed,
)  # fmt: skip


def changed(
    change: Callable[[nn.Module], None], after: int
) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
    """Return a model that was changed after so many steps, its optimizer and its sparsifier."""
    model = build(Tied)
    optimizer = sgd(model)
    sparsifier = Sparsifier(METHOD, model, optimizer)
    steps(model, optimizer, after)
    change(model)
    return model, optimizer, sparsifier


@pytest.mark.parametrize("after", [1, CUTS[0] + 1], ids=["dense", "sparse"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_weight_that_was_replaced_is_noticed_at_the_next_step(
    change: Callable[[nn.Module], None], after: int
) -> None:
    _model, optimizer, sparsifier = changed(change, after)
    with pytest.raises(InputError, match="was replaced by another tensor") as noticed:
        optimizer.step()
    assert "remove()" in str(noticed.value)
    with pytest.raises(InputError, match="was replaced by another tensor"):
        sparsifier.pair()
    sparsifier.remove()


@pytest.mark.parametrize("after", [0, 1, CUTS[0] + 1], ids=["new", "dense", "sparse"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_weight_that_was_replaced_is_noticed_by_a_new_optimizer(
    change: Callable[[nn.Module], None], after: int
) -> None:
    """Nobody calls the one that the sparsifier has."""
    model, _, sparsifier = changed(change, after)
    optimizer = sgd(model)
    for _ in range(2):
        with pytest.raises(InputError, match="was replaced by another tensor") as noticed:
            optimizer.step()
    assert "remove()" in str(noticed.value)
    sparsifier.remove()
    if change is not moved:  # weights on meta have no values
        Sparsifier(METHOD, model, optimizer)
        optimizer.step()


def test_a_weight_that_was_replaced_is_noticed_by_a_compiled_step() -> None:
    model, _, _sparsifier = attached()
    assigned(model)
    step = torch.compile(sgd(model).step, backend="eager")
    backward(model, 0)
    with pytest.raises(InputError, match="was replaced by another tensor"):
        step()


def test_optimizers_of_something_else_step_as_before() -> None:
    model, optimizer, sparsifier = attached()
    other = build(seed=1)
    others = sgd(other)
    bias = torch.optim.SGD([model.fc2.bias], lr=0.1)  # of the model, and steps no pruned weight
    steps(other, others, 1)
    bias.step()
    another_layer(model)
    steps(other, others, 1)
    steps(other, sgd(other), 1)
    with pytest.raises(InputError, match=r"'fc2\.weight' of the model was replaced"):
        sgd(model).step()
    with pytest.raises(InputError, match=r"'fc2\.weight' of the model was replaced"):
        optimizer.step()
    sparsifier.remove()
    sgd(model).step()


def test_nothing_is_asked_before_a_step_once_all_sparsifiers_are_gone() -> None:
    gc.collect()  # those of other tests
    before = len(_global_optimizer_pre_hooks)
    model, optimizer, sparsifier = attached()
    other, others, another = attached()
    assert len(_global_optimizer_pre_hooks) == 1
    sparsifier.remove()
    assert len(_global_optimizer_pre_hooks) == 1
    del another
    others = sgd(other)  # the sparsifier is lost with its optimizer
    gc.collect()
    another_layer(other)
    steps(other, others, 1)
    Sparsifier(METHOD, model, optimizer).remove()
    assert len(_global_optimizer_pre_hooks) == 0 <= before


def test_a_weight_that_left_its_group_is_noticed() -> None:
    model, optimizer, _sparsifier = attached()
    group = optimizer.param_groups[0]
    rest = [p for p in group["params"] if p is not model.fc1.weight]
    group["params"] = rest
    with pytest.raises(InputError, match=r"'fc1.weight' was in group 0, and is now in none"):
        steps(model, optimizer, 1)
    optimizer.add_param_group({"params": [model.fc1.weight], "lr": 0.5})
    with pytest.raises(InputError, match=r"'fc1.weight' was in group 0, and is now in 1"):
        steps(model, optimizer, 1)


def half_and_back(model: nn.Module) -> nn.Module:
    return model.half().float()


def to_the_same_device(model: nn.Module) -> nn.Module:
    return model.to("cpu").to(memory_format=torch.channels_last)


def with_compiled_part(model: nn.Module) -> nn.Module:
    model.conv2 = torch.compile(model.conv2, backend="eager")
    return model


def with_another_head(model: nn.Module) -> nn.Module:
    model.extra = nn.Linear(4, 4)
    return model


def loaded_in_place(model: nn.Module) -> nn.Module:
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    return model


@pytest.mark.parametrize(
    "change",
    [half_and_back, to_the_same_device, with_compiled_part, with_another_head, loaded_in_place],
    ids=lambda change: change.__name__,
)
def test_what_keeps_the_weights_is_left_alone(change: Callable[[nn.Module], nn.Module]) -> None:
    model, optimizer, sparsifier = attached()
    steps(model, optimizer, CUTS[0] + 1)
    change(model)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    steps(model, optimizer, TOTAL - CUTS[0] - 1)
    assert sparsifier.step == TOTAL
    for name, mask in sparsifier.support.items():
        assert is_plus_zero(sparsifier.params[name][~mask])


def test_the_check_of_a_step_takes_microseconds() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(50)))
    optimizer = sgd(model)
    sparsifier = Sparsifier(METHOD, model, optimizer)
    times = []
    for _ in range(50):
        began = time.perf_counter()
        sparsifier._hooks.check()
        times.append(time.perf_counter() - began)
    assert min(times) < 1e-4  # 5 microseconds on an idle core
    other = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    times = []
    for _ in range(50):
        began = time.perf_counter()
        sparsifier._hooks._binding.check_before(other)
        times.append(time.perf_counter() - began)
    assert min(times) < 1e-5  # 1 microsecond


# --- weights without values -----------------------------------------------------------------------


def test_a_lazy_layer_is_refused_in_a_sentence_until_the_model_was_called() -> None:
    model = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(4))
    with pytest.raises(InputError, match="has no shape yet: it belongs to a lazy module"):
        METHOD.select(model)
    with pytest.raises(InputError, match="Call the model once"):
        Sparsifier(METHOD, model, torch.optim.SGD(model.parameters(), lr=0.1))
    model(torch.zeros(2, 8))
    Sparsifier(METHOD, model, sgd(model))


def test_weights_on_meta_are_refused_in_a_sentence() -> None:
    model = build().to("meta")
    with pytest.raises(InputError, match="on the device 'meta'"):
        Sparsifier(METHOD, model, sgd(model))
    model.to_empty(device="cpu")
    Sparsifier(METHOD, model, sgd(model))
