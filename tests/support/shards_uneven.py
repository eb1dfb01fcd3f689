"""Ranks that have other numbers of samples, or of batches, than the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from acdc import distributed
from acdc.collectives import PeerError
from acdc.pattern import Unstructured
from acdc.sparsifier import Sparsifier
from support.helpers import TOTAL, Flat, Net, adam, batch, build, is_plus_zero, sgd
from support.shards import ends_badly, mesh, on
from support.shards_training import ALL, acdc_of, same_here, shard

EPOCH = 3  # steps

Last = Callable[[nn.Module, int], torch.Tensor]
"""Model and number of a batch → the loss of the last batch of an epoch on the last rank."""


def full(model: nn.Module, index: int) -> torch.Tensor:
    x, y = batch(index)
    return nn.functional.cross_entropy(model(x), y)


def smaller(model: nn.Module, index: int) -> torch.Tensor:
    x, y = batch(index)
    return nn.functional.cross_entropy(model(x[:1]), y[:1])


def weightless(model: nn.Module, index: int) -> torch.Tensor:
    """There is no batch: the one before is taken again, and does not count."""
    return full(model, index - 1) * 0.0


def empty(model: nn.Module, index: int) -> torch.Tensor:
    """There is no batch: it has no sample, and a mean over it would be NaN."""
    return model(batch(index)[0][:0]).sum() * 0.0


def backward(model: nn.Module, step: int, rank: int, last: Last) -> None:
    loss = last if rank == 1 and step % EPOCH == EPOCH - 1 else full
    loss(model, 2 * step + rank).backward()


def uneven(
    kind: type[nn.Module], last: Last, factory: Callable[..., torch.optim.Optimizer]
) -> None:
    """Train in one process on the mean gradient of both ranks, in DistributedDataParallel, and
    sharded; assert that weights and masks are the same after every step, on every rank.
    """
    rank, method = dist.get_rank(), acdc_of(Unstructured(0.8))
    alone, replica, model = build(kind), build(kind), shard(build(kind), mesh(2))
    wrapped = DistributedDataParallel(replica)
    optimizers = [factory(each) for each in (alone, replica, model)]
    own = dist.new_subgroups(1)[0]
    expected = Sparsifier(method, alone, optimizers[0], process_group=own)
    replicated = Sparsifier(method, wrapped, optimizers[1])
    sharded = Sparsifier(method, model, optimizers[2])
    for step in range(TOTAL):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for each in (0, 1):
            backward(alone, step, each, last)
        for param in alone.parameters():
            assert param.grad is not None
            param.grad /= 2
        for each in (wrapped, model):
            backward(each, step, rank, last)
        for optimizer in optimizers:
            optimizer.step()
        for name, mask in expected.support.items():
            assert torch.equal(replicated.support[name], mask), (step, name)
            assert same_here(sharded.support[name], mask), (step, name)
            assert is_plus_zero(alone.get_parameter(name)[~mask])
        for name, param in alone.named_parameters():
            assert torch.equal(replica.get_parameter(name), param), (step, name)
            assert same_here(model.get_parameter(name), param), (step, name)
    assert expected.step == replicated.step == sharded.step == TOTAL


@on(2, long=True)
def last_batch_smaller_on_a_rank() -> None:
    uneven(Net, smaller, sgd)
    uneven(Flat, smaller, adam)


@on(2, long=True)
def a_batch_fewer_on_a_rank() -> None:
    """The rank takes the step nevertheless."""
    uneven(Net, weightless, sgd)
    uneven(Flat, empty, adam)


@on(2)
def a_rank_skips_a_step() -> None:
    """It takes part in the backward pass, so that FSDP notices nothing."""
    model = shard(build(), mesh(2))
    optimizer = sgd(model)
    sparsifier = Sparsifier(ALL["static"](), model, optimizer)
    for step in range(3):
        full(model, step).backward()
        if step or not dist.get_rank():
            optimizer.step()
    for collect in (
        distributed.sparse_network,
        lambda _: distributed.save("uneven", model, optimizer, sparsifier),
    ):
        with pytest.raises(PeerError, match=r"some are after step 2, and others after step 3.*of"):
            collect(sparsifier)


def one_step_less(
    afterwards: Callable[[nn.Module, torch.optim.Optimizer, Sparsifier], object],
) -> None:
    """Let the second rank leave its loop a step before the first one."""
    model = shard(build(), mesh(2))
    optimizer = sgd(model)
    sparsifier = Sparsifier(ALL["gmp"](), model, optimizer)
    for step in range(TOTAL - dist.get_rank()):
        optimizer.zero_grad()
        full(model, 2 * step + dist.get_rank()).backward()
        optimizer.step()
    afterwards(model, optimizer, sparsifier)
    raise AssertionError("as if nothing had happened")


@ends_badly
def one_step_less_and_then_the_network() -> None:
    one_step_less(lambda _, __, sparsifier: distributed.sparse_network(sparsifier))


@ends_badly
def one_step_less_and_then_a_checkpoint() -> None:
    one_step_less(lambda *run: distributed.save("uneven", *run))


@ends_badly
def one_step_less_and_then_the_counts() -> None:
    one_step_less(lambda _, __, sparsifier: sparsifier.support.digest())
