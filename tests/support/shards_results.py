"""What training leaves of sharded weights, and whatever else takes a model or a state dict."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import acdc
from acdc import distributed
from acdc.distributed import results
from acdc.errors import InputError
from acdc.export import to_onnx, to_runtime
from acdc.shards import is_sharded, whole
from acdc.sparsifier import Sparsifier
from support.helpers import Flat, Net, adam, build, same, sgd, train
from support.shards import mesh, on
from support.shards_training import ALL, acdc_of, compare, shard

GMP = ALL["gmp"]
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def is_first() -> bool:
    return dist.get_rank() == 0


def saved(sparsifier: Sparsifier, folder: str) -> None:
    """Write the sparse network of all ranks."""
    network = distributed.sparse_network(sparsifier, seed=3)
    assert (network is not None) == is_first()
    if network is not None:
        assert network.support.nnz == sum(int(m.sum()) for m in network.support.values())
        network.save(folder)


def check_files(folder: str, alone: Sparsifier) -> None:
    """Assert that a folder is what one process writes, byte for byte."""
    if not is_first():
        return
    facts = {"method": alone.method.name, "step": alone.step, "schedule": alone.schedule.to_dict()}
    state = alone.model.state_dict()
    expected = acdc.SparseNetwork(state, alone.support, {**facts, "seed": 3}).save("expected")
    for name in ("sparse.safetensors", "sparse.json"):
        assert Path(folder, name).read_bytes() == (expected / name).read_bytes(), (folder, name)
    assert acdc.SparseNetwork.load(folder) == acdc.SparseNetwork.load(expected)


@on(2)
def sparse_networks() -> None:
    """The files are those of one process: sharded, in DistributedDataParallel, and alone."""
    sparsifier, alone = compare(GMP())
    saved(sparsifier, "sharded")
    check_files("sharded", alone)
    with pytest.raises(InputError, match=r"no pair yet.*acdc\.distributed\.sparse_network\(spars"):
        distributed.pair(sparsifier)
    with pytest.raises(InputError, match=r"distributed\.pair.*distributed\.sparse_network\(spars"):
        sparsifier.pair()
    if is_first():  # the functions also take whole weights
        network = distributed.sparse_network(alone, seed=3)
        assert network == acdc.SparseNetwork.load("sharded")

    model = build()
    wrapped = DistributedDataParallel(model)
    optimizer = sgd(model)
    replicated = Sparsifier(GMP(), wrapped, optimizer)
    train(wrapped, optimizer)
    with pytest.raises(InputError, match=r"acdc\.SparseNetwork\(sparsifier\.model\.state_dict\(\)"):
        replicated.pair()
    saved(replicated, "replicated")
    check_files("replicated", replicated)


@on(4)
def sparse_networks_of_hsdp() -> None:
    sparsifier, alone = compare(ALL["rigl"](), adam, sharded=lambda net: shard(net, mesh(2, 2)))
    saved(sparsifier, "hybrid")
    check_files("hybrid", alone)


@on(4, long=True)
def sparse_networks_of_every_method() -> None:
    """Whether they keep a twin or not: the network of a sparse phase is there."""
    for name, make in ALL.items():
        sparsifier, alone = compare(make())
        if sparsifier.phase.kind == "dense":
            with pytest.raises(InputError, match=r"no sparse network now: after .* is dense"):
                distributed.sparse_network(sparsifier)
            continue
        saved(sparsifier, name)
        check_files(name, alone)


@on(2)
def sparse_networks_of_tensor_parallelism() -> None:
    plan = {"fc0": ColwiseParallel(), "fc1": RowwiseParallel()}
    model = parallelize_module(build(Flat), mesh(2), plan)
    optimizer, method = sgd(model), GMP()
    sparsifier = Sparsifier(
        acdc.GMP(
            method.pattern,
            method.resolved,
            every="2st",
            length="4st",
            layers=acdc.Layers(exclude=("fc2",)),
        ),
        model,
        optimizer,
    )
    train(model, optimizer)
    network = distributed.sparse_network(sparsifier)
    state = {name: whole(value.detach()) for name, value in model.state_dict().items()}
    masks = {name: whole(mask) for name, mask in sparsifier.support.items()}
    if network is not None:
        assert same(network.sparse, state)
        assert network.support == acdc.Support(masks)


@on(2)
def one_tensor_at_a_time() -> None:
    """No rank holds two tensors that were gathered, but for copies of the first one."""
    gathered: list[weakref.ref[Tensor]] = []
    most = 0

    def watched(tensor: Tensor) -> Tensor:
        nonlocal most
        full = whole(tensor)
        if full is not tensor:
            gathered.append(weakref.ref(full))
        most = max(most, sum(ref() is not None for ref in gathered))
        return full

    model = shard(build(), mesh(2))
    optimizer = sgd(model)
    sparsifier = Sparsifier(acdc_of(acdc.Unstructured(0.8)), model, optimizer)
    train(model, optimizer)
    gc.disable()  # nothing waits for it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "whole", watched)
        for make in (distributed.pair, distributed.sparse_network):
            gathered.clear()
            assert (make(sparsifier) is not None) == is_first()
            assert len(gathered) >= len(sparsifier.support) + len(list(model.parameters()))
            assert most == 1, make


@on(2)
def whole_weights_are_asked_for() -> None:
    """In a sentence, by all that takes a model or a state dict."""
    model = shard(build(), mesh(2))
    optimizer = sgd(model)
    sparsifier = Sparsifier(acdc_of(acdc.Unstructured(0.8)), model, optimizer)
    with pytest.raises(InputError, match=r"There is no sparse network now: after 0 of .* is dense"):
        distributed.sparse_network(sparsifier)
    train(model, optimizer)
    state, support = model.state_dict(), sparsifier.support
    full = get_model_state_dict(model, options=WHOLE)
    network, twins = distributed.sparse_network(sparsifier), distributed.pair(sparsifier)
    x = torch.randn(2, 3, 4, 4)

    def refuse(sentence: str, call: Callable[[], Any]) -> None:
        with pytest.raises(InputError, match=sentence):
            call()

    gather = r" is sharded: .*acdc\.distributed\.sparse_network\(sparsifier\).*get_model_state_dict"
    weight = r"The tensor 'conv1\.weight' of the (sparse|dense) (network|twin)"
    refuse(weight + gather, lambda: acdc.SparseNetwork(state, support))
    refuse(weight + gather, lambda: acdc.Pair(state, state, support))
    refuse(weight + gather, lambda: acdc.DenseNetwork(state))
    refuse(r"of the model are sharded.* an Engine needs whole", lambda: acdc.Engine(model, x))
    model.eval()
    refuse(r"of the model are sharded.* a Runtime needs whole", lambda: acdc.Runtime(model, x))
    refuse(r"of the model are sharded.* an export needs", lambda: to_onnx(model, x, "x.onnx"))
    refuse(r"of the model are sharded.* an export needs", lambda: to_runtime(model, x, "x.run"))
    at_once = shard(build(), mesh(2), at_once=True).eval()
    with torch.no_grad():
        at_once(x)  # FSDP holds whole weights now
    assert not any(map(is_sharded, at_once.parameters()))
    refuse(r"of the model are sharded.* a Runtime needs whole", lambda: acdc.Runtime(at_once, x))
    refuse(r"'conv1\.weight', this process holds .*sharded in", lambda: sparsifier.project(build()))
    twin = sparsifier.dense_twin
    assert twin is not None
    refuse(r"dense twin are sharded, and those of the model are whole", lambda: twin.restore(Net()))
    if network is not None and twins is not None:
        refuse(r"The mask of 'conv1\.weight'" + gather, lambda: acdc.SparseNetwork(full, support))
        assert same(acdc.DenseNetwork(full).dense, network.sparse)
        network.save("network")
        twins.save("twins")
    dist.barrier()
    network, twins = acdc.SparseNetwork.load("network"), acdc.Pair.load("twins")
    again = shard(build(seed=5), mesh(2))
    before = {name: param.to_local().clone() for name, param in again.named_parameters()}
    for load in (network.sparse_model, twins.dense_model):
        refuse(
            r"of the model are sharded, 'conv1\.weight'.*set_model", lambda load=load: load(again)
        )
    assert all(torch.equal(p.to_local(), before[n]) for n, p in again.named_parameters())
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(again, dict(network.sparse), options=options)  # as it says
    assert same({n: whole(v.detach()) for n, v in again.state_dict().items()}, network.sparse)
