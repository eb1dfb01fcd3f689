"""Checkpoints that one number of ranks writes and another one reads, and the pair."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from acdc import distributed
from acdc.errors import InputError
from acdc.pattern import Unstructured
from acdc.shards import whole
from acdc.sparsifier import Sparsifier
from support.helpers import CUTS, REVIVAL, TOTAL, adam, backward, build, same, sgd
from support.shards import mesh, on, one_after_another
from support.shards_training import ALL, acdc_of, compare, shard

METHOD = acdc_of(Unstructured(0.8))
STOPS = (1, CUTS[0] + 1, REVIVAL, CUTS[1] + 1)  # no mask yet, a mask, all weights back, a twin


def bound(plain: bool = False, factory: Any = sgd) -> tuple[nn.Module, Any, Sparsifier]:
    """Return a model, sharded over all ranks, its optimizer and its sparsifier."""
    model = build(seed=dist.get_world_size())  # nothing but the checkpoint counts
    if not plain:
        shard(model, mesh(dist.get_world_size()))
    optimizer = factory(model)
    return model, optimizer, Sparsifier(METHOD, model, optimizer)


def go_on(model: nn.Module, optimizer: Any, start: int, stop: int = TOTAL) -> None:
    for step in range(start, stop):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def gathered(value: Any) -> Any:
    """Return a nested state with whole tensors."""
    if isinstance(value, Tensor):
        return whole(value.detach()).clone()
    if isinstance(value, Mapping):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(item) for item in value)
    return value


def everything(model: nn.Module, optimizer: Any, sparsifier: Sparsifier) -> dict[str, Any]:
    """Return the state of a run, the same for any number of ranks."""
    twin, last = sparsifier.dense_twin, sparsifier.state_dict()["last_sparse"]
    return {
        "model": gathered(model.state_dict()),
        "optimizer": gathered(optimizer.state_dict()["state"]),
        "support": gathered(dict(sparsifier.support)),
        "changes": [vars(change) for change in sparsifier.changes],
        "step": sparsifier.step,
        "twin": None if twin is None else gathered(vars(twin)),
        "has_last": last is not None,
    }


def saved_and_loaded(factory: Any, stops: tuple[int, ...] = STOPS, to_the_end: bool = True) -> None:
    world = dist.get_world_size()
    if world == 2:
        parts = bound(factory=factory)
        for start, stop in zip((0, *stops), stops, strict=False):
            go_on(*parts[:2], start, stop)
            distributed.save(f"step{stop}", *parts)
            torch.save(everything(*parts), f"step{stop}.rank{dist.get_rank()}")
        go_on(*parts[:2], stops[-1])
        torch.save(everything(*parts), f"end.rank{dist.get_rank()}")
        return
    for stop in stops:
        for plain in (False, True) if world == 1 else (False,):
            parts = bound(plain, factory)
            distributed.load(f"step{stop}", *parts)
            expected = torch.load(f"step{stop}.rank0", weights_only=True)
            found = everything(*parts)
            for key in expected:
                assert same(found[key], expected[key]), (world, stop, plain, key)
            if world == 3 or not to_the_end:  # a third of a gradient is rounded
                continue
            go_on(*parts[:2], stop)
            expected = torch.load("end.rank0", weights_only=True)
            found = everything(*parts)
            for key in expected:
                assert same(found[key], expected[key]), (world, stop, plain, key, "at the end")


@one_after_another(2, 1, 3, 4)
def saved_on_two_ranks() -> None:
    saved_and_loaded(sgd, (REVIVAL, CUTS[1] + 1), to_the_end=False)


@one_after_another(2, 1, 3, 4, long=True)
def saved_at_many_steps() -> None:
    saved_and_loaded(sgd)


@one_after_another(2, 1, 3, 4, long=True)
def saved_at_many_steps_with_adam() -> None:
    saved_and_loaded(adam)


@on(2)
def saving_changes_nothing() -> None:
    saved_after_every_step(adam)


@on(2, long=True)
def saving_changes_nothing_with_momentum() -> None:
    saved_after_every_step(sgd)
    saved_after_every_step(
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    )


def saved_after_every_step(factory: Any) -> None:
    """Not at any step, although ``get_optimizer_state_dict`` takes one with a rate of zero."""

    def save(step: int, model: nn.Module, sparsifier: Sparsifier) -> None:
        optimizer = sparsifier.optimizer
        if step % 2:  # without gradients it takes one
            optimizer.zero_grad()
        get_optimizer_state_dict(model, optimizer)
        distributed.save(f"{type(optimizer).__name__}{step}", model, optimizer, sparsifier)
        assert sparsifier.step == step + 1

    sparsifier, expected = compare(METHOD, factory, after=save)
    found = distributed.pair(sparsifier, seed=3)
    assert (found is None) == bool(dist.get_rank())
    assert found is None or found == expected.pair(seed=3)
    twin = sparsifier.dense_twin
    assert twin is not None
    sparsifier.remove()
    twin.restore(sparsifier.model, sparsifier.optimizer)
    assert same(gathered(sparsifier.model.state_dict()), gathered(twin.model))
    assert same(gathered(sparsifier.optimizer.state_dict()), gathered(twin.optimizer))


@on(2)
def attached_again_after_every_step() -> None:
    """By the state of the rank, which holds DTensors."""
    for method in (METHOD, ALL["topkast"]()):
        ends = []
        for again in (False, True):
            model = shard(build(), mesh(2))
            optimizer = sgd(model)
            sparsifier = Sparsifier(method, model, optimizer)
            for step in range(TOTAL):
                go_on(model, optimizer, step, step + 1)
                if again:
                    state = sparsifier.state_dict()
                    sparsifier.remove()
                    sparsifier = Sparsifier(method, model, optimizer, state=state)
            behind = gathered(sparsifier.dense_weights)
            ends.append({**everything(model, optimizer, sparsifier), "behind": behind})
        for key in ends[0]:
            assert same(*(end[key] for end in ends)), (method, key)


@on(2)
def written_while_the_training_goes_on() -> None:
    parts = bound()
    go_on(*parts[:2], 0, STOPS[-1])
    expected = everything(*parts)
    written = distributed.save("later", *parts, asynchronous=True)
    assert written is not None
    for tensor in parts[0].state_dict().values():
        getattr(tensor, "_local_tensor", tensor).zero_()  # at once, and much
    go_on(*parts[:2], STOPS[-1])
    written.result()
    parts = bound()
    distributed.load("later", *parts)
    found = everything(*parts)
    for key in expected:
        assert same(found[key], expected[key]), key


@on(2)
def checkpoints_that_do_not_fit() -> None:
    parts = bound()
    with pytest.raises(InputError, match=r"nowhere holds no checkpoint of acdc\.distributed"):
        distributed.load("nowhere", *parts)
    with pytest.raises(InputError, match=r"There is no pair yet"):
        distributed.pair(parts[2])
    distributed.save("here", *parts)
    model = shard(build(seed=8), mesh(2))
    optimizer = sgd(model)
    other = Sparsifier(acdc_of(Unstructured(0.7)), model, optimizer)
    before = gathered(model.state_dict())
    with pytest.raises(InputError, match=r"The state is of another run: its method is acdc"):
        distributed.load("here", model, optimizer, other)
    assert same(gathered(model.state_dict()), before)
    assert Path("here").is_dir()
