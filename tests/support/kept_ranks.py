"""Processes that train one model, and send the gradients of kept weights alone.

It is a process of its own, which forks the ranks: they cost no imports. Called by
``test_reduce_kept.py`` with a folder, into which each rank writes what it saw.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel as DDP

import acdc
from acdc import distributed
from acdc.engine import choice, judge
from acdc.engine.choice import Choice
from acdc.engine.tile import Tiling
from acdc.engine.timing import Candidate
from acdc.engine.tuning import Tilings
from acdc.errors import InputError
from acdc.schedule import constant
from acdc.sparsifier import Sparsifier
from support import gloo
from support.helpers import SCHEDULE, TOTAL, Net, backward, batch, build, sgd

Seen = dict[str, Any]
PATIENCE = 180.0  # of a machine that is busy with something else
PATTERN = acdc.Unstructured(0.8)
METHOD = acdc.ACDC(PATTERN, SCHEDULE)


class Unused(Net):
    """With a layer that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(8, 8)


class Gaps(Net):
    """With a weight that is a part of a larger tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1.weight = nn.Parameter(torch.randn(8, 16)[:, ::2])


@contextmanager
def pinned() -> Iterator[None]:
    """Let the engine run all layers sparse, and not what the clock says is faster."""

    def measure(layer: Candidate, *_: Any) -> Choice:
        return Choice(True, 0.2, 1e6, 1.0, 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "measure", measure)
        patch.setattr(choice, "WORK", 0)
        patch.setattr(Tilings, "of", lambda *_: Tiling(2**14, 1))
        patch.setattr(judge, "clock", lambda: 0.0)
        yield


def train(
    method: Any = METHOD,
    kind: type[nn.Module] = Net,
    accumulate: int = 1,
    inner: Any = None,
    hook: Any = None,
    on: bool = True,
    channels_last: bool = False,
    engine: bool = False,
    **ddp: Any,
) -> Seen:
    """Train with the hook or without; return the weights after each step, and the bytes."""
    model = build(kind)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = sgd(model)
    wrapped = DDP(model, **ddp)
    example = batch(0)[0]
    sparsifier = Sparsifier(
        method, wrapped, optimizer, engine=acdc.Engine(model, example) if engine else None
    )
    reduction = None
    if on:
        reduction = distributed.reduce_kept(wrapped, sparsifier, inner, hook)
    elif inner is not None:
        wrapped.register_comm_hook(hook if hook is not None else dist.group.WORLD, inner)
    seen: Seen = {"weights": [], "grads": [], "sent": [], "whole": [], "kept": []}
    seen["sparse"] = []
    for step in range(TOTAL):
        support = sparsifier.gradient_support
        seen["sparse"].append(sparsifier.engine is not None and sparsifier.engine.active)
        seen["kept"].append(None if support is None else support.nnz)
        before = (reduction.sent, reduction.whole) if reduction else (0, 0)
        optimizer.zero_grad()
        for micro in range(accumulate):
            last = micro == accumulate - 1
            index = (accumulate * step + micro) * dist.get_world_size() + dist.get_rank()
            with nullcontext() if last else wrapped.no_sync():
                backward(wrapped, index)
        seen["grads"].append(
            [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        )
        if reduction:
            seen["sent"].append(reduction.sent - before[0])
            seen["whole"].append(reduction.whole - before[1])
        optimizer.step()
        seen["weights"].append([p.detach().clone() for p in model.parameters()])
    seen["digest"] = sparsifier.support.digest()
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    seen["numel"], seen["prunable"] = sum(sizes), sparsifier.support.numel
    return seen


def rigl() -> Any:
    return acdc.RigL(PATTERN, constant("sparse", 3).resolve(3), drop=0.5, every="3st", until="100%")


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "several buckets": {"bucket_cap_mb": 0.0005},
    "views": {"gradient_as_bucket_view": True},
    "channels_last": {"channels_last": True},
    "channels_last, views": {"channels_last": True, "gradient_as_bucket_view": True},
    "gaps": {"kind": Gaps},
    "accumulated": {"accumulate": 2},
    "static graph": {"static_graph": True},
    "unused": {"kind": Unused, "find_unused_parameters": True},
    "nm": {"method": acdc.ACDC(acdc.NM(2, 4), SCHEDULE)},
    "block": {"method": acdc.ACDC(acdc.Block((4, 1), 0.5), SCHEDULE)},
    "rigl": {"method": rigl()},
    "topkast": {"method": acdc.TopKAST(PATTERN, constant("sparse", 3).resolve(3), every="3st")},
    "str": {"method": acdc.STR(PATTERN, constant("sparse", 3).resolve(3), first=0.5, every="2st",
                               length="5st")},
    "fp16": {"inner": default_hooks.fp16_compress_hook},
    "engine": {"engine": True},  # all layers run sparse: see `pinned`
}  # fmt: skip


def removed() -> Seen:
    """Return gradients after the sparsifier has gone: all weights have one again."""
    model = build()
    optimizer = sgd(model)
    wrapped = DDP(model)
    sparsifier = Sparsifier(METHOD, wrapped, optimizer)
    distributed.reduce_kept(wrapped, sparsifier)
    for step in range(3):
        optimizer.zero_grad()
        backward(wrapped, step)
        optimizer.step()
    sparsifier.remove()
    optimizer.zero_grad()
    backward(wrapped, dist.get_rank())
    outside = [sparsifier.params[name].grad[~mask] for name, mask in sparsifier.support.items()]
    return {"outside": int(torch.cat(outside).count_nonzero())}


class Passed(torch.autograd.Function):
    """The identity. It notes that the backward pass goes through it."""

    noted: ClassVar[list[str]] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        Passed.noted.append("passed")
        return grad.clone()


class Between(nn.Module):
    """What the engine does not know: one segment ends before it, and another one begins after."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Passed.apply(x)  # type: ignore[no-any-return]


class Halves(nn.Module):
    """Two segments, and the gradients of each are a bucket."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        self.between = Between()
        self.second = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(x)))  # type: ignore[no-any-return]


def overlapped() -> Seen:
    """Return the order of reductions and backward passes in a sparse step with the engine."""
    model, x = Halves(), torch.randn(8, 32)
    optimizer = sgd(model)
    wrapped = DDP(model, bucket_cap_mb=0.006)  # 6,291 bytes: a layer has 4,224
    method = acdc.Static(PATTERN, constant("sparse", 9).resolve(1))
    engine = acdc.Engine(model, x)
    sparsifier = Sparsifier(method, wrapped, optimizer, engine=engine)
    distributed.reduce_kept(wrapped, sparsifier)
    reduce = dist.all_reduce

    def noted(tensor: torch.Tensor, *args: Any, **more: Any) -> Any:
        Passed.noted.append("reduced")
        return reduce(tensor, *args, **more)

    for step in range(3):  # DDP makes its buckets anew after the first step
        if step == 2:
            Passed.noted.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_reduce", noted)
            wrapped(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = [name for name, chosen in engine.choices.items() if chosen.sparse]
    return {"order": list(Passed.noted), "layers": layers, "active": engine.active}


def uneven() -> Seen:
    """Let the last rank have fewer batches, within a sparse phase."""
    found = []
    for on in (False, True):
        model = build()
        optimizer = sgd(model)
        wrapped = DDP(model)
        method = acdc.ACDC(PATTERN, constant("sparse", 1).resolve(9))
        sparsifier = Sparsifier(method, wrapped, optimizer)
        if on:
            distributed.reduce_kept(wrapped, sparsifier)
        with wrapped.join():
            for step in range(3 + (dist.get_rank() == 0)):
                optimizer.zero_grad()
                backward(wrapped, step)
                optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    return {"equal": all(map(torch.equal, *found))}


def power() -> Seen:
    """Train with PowerSGD in dense phases."""
    state = powerSGD_hook.PowerSGDState(dist.group.WORLD, 1, start_powerSGD_iter=2)
    return train(inner=powerSGD_hook.powerSGD_hook, hook=state)


def refused() -> dict[str, str]:
    """Return the sentences of what is refused."""

    def second_hook() -> None:
        model = build()
        wrapped = DDP(model)
        sparsifier = Sparsifier(METHOD, wrapped, sgd(model))
        distributed.reduce_kept(wrapped, sparsifier)
        distributed.reduce_kept(wrapped, sparsifier)

    def not_wrapped() -> None:
        model = build()
        distributed.reduce_kept(model, Sparsifier(METHOD, model, sgd(model)))  # type: ignore[arg-type]

    def another_model() -> None:
        model = build()
        sparsifier = Sparsifier(METHOD, DDP(model), sgd(model))
        distributed.reduce_kept(DDP(build()), sparsifier)

    def not_shared() -> None:
        model = build()
        sparsifier = Sparsifier(METHOD, model, sgd(model))
        distributed.reduce_kept(DDP(model), sparsifier)

    cases: tuple[Callable[[], None], ...] = (second_hook, not_wrapped, another_model, not_shared)
    said = {}
    for case in cases:
        with warnings.catch_warnings(action="ignore"):
            try:
                case()
                said[case.__name__] = "nothing"
            except InputError as error:
                said[case.__name__] = str(error)
    return said


def see(rank: int, world: int, folder: Path) -> None:
    """Write what a rank saw."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / f"store{world}"), world), rank=rank,
        world_size=world,
    )  # fmt: skip
    if world > 2:
        found: Seen = {("plain", on): train(on=on) for on in (False, True)}
    else:
        with pinned():
            found = {(name, on): train(on=on, **case) for name, case in CASES.items()
                     for on in (False, True)}  # fmt: skip
            found["overlapped"] = overlapped()
        found |= {"removed": removed(), "uneven": uneven(), "refused": refused(), "power": power()}
    torch.save(found, folder / f"{world}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Fork the ranks."""
    torch.set_num_threads(1)
    sgd(build(Net)).step()  # imports what every rank would have to import by itself
    folder, codes = Path(sys.argv[1]), list[int | None]()
    for world in (2, 3):
        children = []
        for rank in range(world):
            child = os.fork()
            if not child:
                try:
                    see(rank, world, folder)
                    os._exit(0)
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                    os._exit(1)
            children.append(child)
        codes += gloo.ends(children, PATIENCE)
    sys.exit(any(code != 0 for code in codes))


if __name__ == "__main__":
    main()
