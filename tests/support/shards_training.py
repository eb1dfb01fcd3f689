"""Training with sharded weights is that of one process, bit for bit.

All ranks have the same batches. So the mean of their gradients is that of one process, exactly: the
number of ranks is a power of two.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import acdc
from acdc.collectives import PeerError
from acdc.errors import InputError
from acdc.methods import METHODS
from acdc.methods.base import Method
from acdc.pattern import NM, Block, Pattern, Unstructured
from acdc.processes import MeshPeers
from acdc.schedule import Phase, Schedule
from acdc.shards import is_sharded, local, placed, whole
from acdc.sparsifier import Sparsifier
from support.helpers import (
    CUTS,
    SCHEDULE,
    TOTAL,
    Factory,
    Flat,
    Net,
    adam,
    backward,
    bits,
    build,
    is_plus_zero,
    sgd,
    train,
)
from support.shards import mesh, on


class Uneven(nn.Module):
    """Numbers of outputs that no number of ranks divides, and fewer than four."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 7, 3, padding=1)
        self.bn = nn.BatchNorm2d(7)
        self.conv2 = nn.Conv2d(7, 3, 3, stride=2)
        self.fc = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.bn(self.conv1(x)).relu()).relu().mean((2, 3)))


def shard(model: nn.Module, over: dist.DeviceMesh, at_once: bool = False) -> nn.Module:
    """Shard a model by FSDP2, its layers one by one. (Or all at once: FSDP then keeps what it has
    gathered until the backward pass.)
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    layers = [] if at_once else layers
    for layer in layers:
        fully_shard(layer, mesh=over)
    fully_shard(model, mesh=over)
    for module in (model, *layers):
        module.set_force_sum_reduction_for_comms(True)  # gloo has no mean
        module.set_gradient_divide_factor(float(dist.get_world_size()))
    return model


def same_here(part: Tensor, whole: Tensor) -> bool:
    """Whether what this rank holds is its part of a whole tensor, bit for bit."""
    assert is_sharded(part)
    return torch.equal(bits(local(part)), bits(local(placed(whole.detach(), part))))


def compare(
    method: Method[Any],
    factory: Factory = sgd,
    kind: type[nn.Module] = Net,
    sharded: Callable[[nn.Module], nn.Module] | None = None,
    after: Callable[[int, nn.Module, Sparsifier], None] = lambda *_: None,
    **options: Any,
) -> tuple[Sparsifier, Sparsifier]:
    """Train in one process and on shards; assert after every step that both are the same."""
    alone = build(kind)
    alone_optimizer = factory(alone)
    expected = Sparsifier(
        method, alone, alone_optimizer, process_group=dist.new_subgroups(1)[0], **options
    )
    model = build(kind)
    shard(model, mesh(dist.get_world_size())) if sharded is None else sharded(model)
    optimizer = factory(model)
    sparsifier = Sparsifier(method, model, optimizer, **options)
    for step in range(method.resolved.total):
        for each, its in ((alone, alone_optimizer), (model, optimizer)):
            its.zero_grad()
            backward(each, step)
        for name, mask in sparsifier.support.items():
            grad = sparsifier.params[name].grad
            if not method.training.wants_dense_gradient(step) and grad is not None:
                assert is_plus_zero(local(grad)[~local(mask)]), (step, name)
        for its in (alone_optimizer, optimizer):
            its.step()
        for name, mask in expected.support.items():
            assert same_here(sparsifier.support[name], mask), (step, name, method)
        for name, param in alone.named_parameters():
            assert same_here(model.get_parameter(name), param), (step, name, method)
        for name, mask in sparsifier.support.items():
            assert is_plus_zero(local(sparsifier.params[name])[~local(mask)]), (step, name)
        after(step, model, sparsifier)
    assert sparsifier.changes == expected.changes
    assert str(sparsifier) == str(expected)
    twin, other = sparsifier.dense_twin, expected.dense_twin
    assert (twin is None) == (other is None)
    for name, value in {} if other is None else other.model.items():
        assert twin is not None
        here = twin.model[name]
        assert same_here(here, value) if is_sharded(here) else torch.equal(here, value)
    return sparsifier, expected


def acdc_of(pattern: Pattern, **options: Any) -> acdc.ACDC:
    return acdc.ACDC(pattern, SCHEDULE, **options)


@on(2)
def fsdp() -> None:
    compare(acdc_of(Unstructured(0.8)))


@on(2, 4)
def numbers_that_do_not_divide() -> None:
    compare(acdc_of(Unstructured(0.7), reset="entered"), adam, Uneven)


@on(4, long=True)
def every_scope() -> None:
    for scope in ("global", "uniform", "erk"):
        compare(acdc_of(Unstructured(0.7, scope)))
        compare(acdc_of(Unstructured(0.7, scope, floor=3), reset="none"), adam, Uneven)


@on(4)
def hsdp() -> None:
    def hybrid(model: nn.Module) -> nn.Module:
        return shard(model, mesh(2, 2))

    sparsifier, _ = compare(acdc_of(Unstructured(0.8, "uniform")), sharded=hybrid)
    assert all(mask.placements == (Replicate(), Shard(0)) for mask in sparsifier.support.values())


@on(4)
def replicas_that_differ() -> None:
    """Ranks that hold the same part of a weight may differ in its last bit, but not in its mask."""
    model = shard(build(), mesh(2, 2))
    optimizer = sgd(model)

    @torch.no_grad()
    def disturb(*_: Any) -> None:
        for param in model.parameters():
            part = param.to_local()
            part.copy_(torch.where(part < 0, -0.125, 0.125))  # all tied, but for the last bit
            chosen = torch.rand(part.shape, generator=generator) < 0.3
            part.copy_(torch.where(chosen, torch.nextafter(part, 2 * part), part))

    generator = torch.Generator().manual_seed(dist.get_rank())
    optimizer.register_step_post_hook(disturb)
    sparsifier = Sparsifier(acdc_of(Unstructured(0.8)), model, optimizer)
    for step in range(CUTS[0] + 1):
        backward(model, step)
        optimizer.step()
    mine = torch.cat([local(mask).flatten() for mask in sparsifier.support.values()])
    others = [torch.empty_like(mine) for _ in range(4)]
    dist.all_gather(others, mine)
    rank = dist.get_rank()
    assert torch.equal(others[rank], others[(rank + 2) % 4])
    assert not torch.equal(others[rank], others[(rank + 1) % 4])


@on(2, long=True)
def a_rank_ends() -> None:
    """The others do not wait for it, and say so."""
    model = shard(build(), mesh(2))
    optimizer = sgd(model)
    if dist.get_rank():
        optimizer.register_step_post_hook(lambda *_: sparsifier.step + 1 in CUTS and os._exit(0))
    sparsifier = Sparsifier(acdc_of(Unstructured(0.8)), model, optimizer)
    with pytest.raises(PeerError, match=r"Rank 0 cannot .*: another process has ended"):
        train(model, optimizer)
    os._exit(0)


@on(2, long=True)
def nan_in_training() -> None:
    model = shard(build(), mesh(2))
    optimizer = sgd(model)
    Sparsifier(acdc_of(Unstructured(0.8)), model, optimizer)
    if dist.get_rank():
        local(model.fc2.weight).fill_(math.nan)
    with pytest.raises(InputError, match=r"The score of 'conv1.weight' holds NaN"):
        train(model, optimizer)


@on(2)
def patterns() -> None:
    compare(acdc_of(NM(2, 4)))
    compare(acdc_of(Block((2, 1), 0.75)), adam)


def check_cuts(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    layers: Any = None,
    of_rank: Callable[[int], int] = lambda step: step,
) -> None:
    """Train; assert that every cut keeps what one process would keep of the same weights.

    Args:
        model: Sharded.
        optimizer: Its optimizer.
        layers: Which are pruned.
        of_rank: Step → the number of the batch of this rank.
    """
    before: dict[str, Tensor] = {}

    def gather(*_: Any) -> None:  # registered first, so that it is called before the cut
        params = sparsifier.params.items()
        before.update({n: whole(p.detach()).clone() for n, p in params})

    optimizer.register_step_post_hook(gather)
    pattern = Unstructured(0.8)
    sparsifier = Sparsifier(acdc_of(pattern, layers=layers), model, optimizer)
    for step in range(TOTAL):
        optimizer.zero_grad()
        backward(model, of_rank(step))
        nn.utils.clip_grad_norm_(sparsifier.params.values(), 0.1)
        optimizer.step()
        for name, mask in sparsifier.support.items():
            assert is_plus_zero(local(sparsifier.params[name])[~local(mask)]), (step, name)
        if step + 1 in CUTS:
            expected = pattern.select({name: weight.abs() for name, weight in before.items()})
            assert sparsifier.support == expected, step
            assert sparsifier.support.digest() == expected.digest()


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def foreach(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)


@on(2)
def optimizers() -> None:
    """The fused steps of torch round the last elements of a tensor otherwise."""
    model = shard(build(), mesh(2))
    check_cuts(model, fused(model), of_rank=lambda step: 2 * step + dist.get_rank())
    compare(acdc_of(Unstructured(0.8), reset="entered"), foreach)


@on(2)
def attached_before_sharding() -> None:
    model = build()
    optimizer = sgd(model)
    Sparsifier(acdc_of(Unstructured(0.8)), model, optimizer, process_group=dist.group.WORLD)
    shard(model, mesh(2))
    backward(model, 0)
    sentence = r"was sharded after the sparsifier.*Shard first"
    with pytest.raises(InputError, match=sentence):
        optimizer.step()


@on(2)
def attached_before_sharding_and_a_new_optimizer() -> None:
    """The optimizer that the sparsifier was given takes no step."""
    sentence = r"was sharded after the sparsifier.*Shard first"
    for at_once, emptied in ((False, False), (True, True)):
        model = build()
        method, group = acdc_of(Unstructured(0.8)), dist.group.WORLD
        sparsifier = Sparsifier(method, model, sgd(model), process_group=group)
        shard(model, mesh(2), at_once)
        if emptied:  # as models are whose weights are made after they are sharded
            model.to_empty(device="cpu")
            for part in model.modules():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
        optimizer = sgd(model)
        before = {name: local(param).clone() for name, param in model.named_parameters()}
        backward(model, 0)
        with pytest.raises(InputError, match=sentence):
            optimizer.step()
        assert all(torch.equal(local(p), before[n]) for n, p in model.named_parameters())
        sparsifier.remove()
        Sparsifier(method, model, optimizer)
        train(model, optimizer)


@on(2)
def refused() -> None:
    over = mesh(2)
    method = acdc_of(Unstructured(0.8))
    model = shard(build(), over)

    def attach(sentence: str, method: Method[Any] = method, **options: Any) -> None:
        with pytest.raises(InputError, match=sentence):
            Sparsifier(method, model, sgd(model), **options)

    attach(r"scale_rows was given, and the weights of the model are sharded", scale_rows=True)
    attach(r"process_group was given", process_group=dist.group.WORLD)
    engine = type("Engine", (), {"model": model})()
    attach(r"engine was given", engine=engine)
    attach(
        r"cannot train weights that are sharded: restore_norms",
        acdc_of(Unstructured(0.8), restore_norms=True),
    )
    attach(r"'conv1.weight' cannot be pruned by Block.*two ranks", acdc_of(Block((8, 1), 0.5)))
    sparsifier = Sparsifier(method, model, sgd(model))
    with pytest.raises(InputError, match=r"acdc\.distributed\.pair\(sparsifier\)"):
        sparsifier.pair()
    model = build()
    fully_shard(model.fc1, mesh=over)
    attach(r"1 of the weights to prune are sharded, and 3 are not, 'conv1.weight' first")
    with pytest.raises(PeerError, match=r"some are after step 3, and others after step 4"):
        MeshPeers(over).agreed(sparsifier.support, 3 + dist.get_rank())
    model = shard(build(), over)
    over._device_type, device = "cuda", over._device_type
    attach(r"'conv1.weight' is on cpu, and its device mesh is of cuda devices")
    over._device_type = device
    other = acdc_of(Unstructured(0.8 if dist.get_rank() else 0.7))
    with pytest.raises(PeerError, match="different methods, schedules or models"):
        Sparsifier(other, model, sgd(model))


@on(2)
def evaluated_before_the_change() -> None:
    """Weights that FSDP has gathered for an evaluation are stale once the support changes."""
    model, method = shard(build(), mesh(2), at_once=True), acdc_of(Unstructured(0.8))
    optimizer = sgd(model)
    sparsifier = Sparsifier(method, model, optimizer, automatic=False)
    x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    for step in range(TOTAL):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        with torch.no_grad():
            model.eval()(x)
        sparsifier.advance()
        with torch.no_grad():
            found = model(x)
        model.train()
        alone = build()
        state = {k: whole(v) for k, v in model.state_dict().items()}
        alone.load_state_dict(state)
        assert torch.equal(alone.eval()(x), found), step


@on(2)
def evaluated_between_backward_and_step() -> None:
    """FSDP then holds whole weights in the places of the sharded ones: nothing was replaced."""
    model = shard(build(), mesh(2), at_once=True)
    optimizer = sgd(model)
    sparsifier = Sparsifier(acdc_of(Unstructured(0.8)), model, optimizer)
    for step in range(TOTAL):
        optimizer.zero_grad()
        backward(model, step)
        with torch.no_grad():
            model(torch.ones(2, 3, 4, 4))
        assert not any(map(is_sharded, model.parameters()))
        optimizer.step()
    assert sparsifier.step == TOTAL


@on(2)
def tensor_parallel() -> None:
    model = build(Flat)
    plan = {"fc0": ColwiseParallel(), "fc1": RowwiseParallel()}
    model = parallelize_module(model, mesh(2), plan)
    with pytest.raises(InputError, match=r"2 of the weights to prune are sharded, and 1 are not"):
        Sparsifier(acdc_of(Unstructured(0.8)), model, sgd(model))
    check_cuts(model, sgd(model), acdc.Layers(exclude=("fc2",)))


@on(4)
def fsdp_around_tensor_parallel() -> None:
    model, both = build(Flat), mesh(2, 2)
    plan = {"fc0": ColwiseParallel(), "fc1": RowwiseParallel()}
    parallelize_module(model, both["shard"], plan)
    check_cuts(shard(model, both["replicate"]), sgd(model), acdc.Layers(exclude=("fc2",)))


SPARSE = Schedule((Phase("sparse", 0, 9),), (3, 3, 3))
LATER = Schedule((Phase("dense", 0, 3), Phase("sparse", 3, 9)), (3, 3, 3))
HALF = Unstructured(0.5)
ALL: dict[str, Callable[[], Method[Any]]] = {
    "acdc, gradually": lambda: acdc_of(HALF, ramp=0.5, every="1st", first=0.2, taper=1.5),
    "acdc, average": lambda: acdc_of(HALF, average=1.0),
    "dense": lambda: acdc.Dense(Schedule((Phase("dense", 0, 4),), (4,))),
    "dpf": lambda: acdc.DPF(HALF, SPARSE, every="2st", length="4st"),
    "dsd": lambda: acdc.DSD(HALF, SCHEDULE),
    "gmp": lambda: acdc.GMP(HALF, SPARSE, every="2st", length="4st"),
    "gradual": lambda: acdc.Gradual(HALF, SPARSE, every="2st", length="4st"),
    "granet": lambda: acdc.GraNet(HALF, SPARSE, every="2st", length="4st"),
    "imp": lambda: acdc.IMP(HALF, LATER, rewind="1st", share=0.3),
    "oneshot": lambda: acdc.OneShot(HALF, SCHEDULE),
    "acdc_partial": lambda: acdc.PartialACDC(HALF, SPARSE, length="8st", period="3st", width="1st"),
    "rigl": lambda: acdc.RigL(HALF, SPARSE, every="2st"),
    "set": lambda: acdc.SET(HALF, SPARSE, every="2st"),
    "snfs": lambda: acdc.SNFS(HALF, SPARSE, every="2st"),
    "snip": lambda: acdc.SNIP(HALF, SPARSE),
    "srste": lambda: acdc.SRSTE(NM(2, 4), SPARSE, every="2st"),
    "static": lambda: acdc.Static(HALF, SPARSE),
    "topkast": lambda: acdc.TopKAST(HALF, SPARSE, backward=0.3, every="2st"),
}  # fmt: skip
REFUSED: dict[str, Callable[[], Method[Any]]] = {
    "str": lambda: acdc.STR(HALF, SPARSE, every="2st", length="4st"),
    "woodfisher": lambda: acdc.WoodFisher(HALF, SPARSE, every="2st", length="4st"),
}


def every_method() -> None:
    for make in ALL.values():
        compare(make())
    weights = {n: p.detach().abs() for n, p in build().named_parameters() if p.ndim > 1}
    compare(acdc.Given(HALF.select(weights), SCHEDULE))
    model = shard(build(), mesh(dist.get_world_size()))
    for make in REFUSED.values():
        with pytest.raises(InputError, match="cannot train weights that are sharded"):
            Sparsifier(make(), model, sgd(model))
    assert set(METHODS) <= {*ALL, *REFUSED, "acdc"}


on(2, 4, long=True)(every_method)


@on(2)
def methods() -> None:
    """Those that need more of a weight than its score."""
    for name in ("rigl", "set", "topkast"):
        compare(ALL[name]())
