"""Several processes, of which some train one model together and some train their own.

It is a process of its own, which forks the ranks: they cost no imports. Called by
``test_process_groups.py`` with a folder, into which each rank of each case writes what it saw.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import acdc
from acdc.errors import InputError
from acdc.sparsifier import Sparsifier
from support.helpers import SCHEDULE, TOTAL, backward, batch, build, sgd

METHOD = acdc.ACDC(acdc.Unstructured(0.8), SCHEDULE)
Seen = dict[str, Any]


class Sent:
    """Counts what the sparsifier sends, by the name of the operation."""

    def __init__(self) -> None:
        self.numbers: dict[str, list[int]] = {"broadcast": [], "all_gather": []}
        self.objects = 0
        broadcast, gather, objects = dist.broadcast, dist.all_gather, dist.broadcast_object_list

        def counted_broadcast(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.numbers["broadcast"].append(tensor.numel() * tensor.element_size())
            return broadcast(tensor, *args, **kwargs)

        def counted_gather(every: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.numbers["all_gather"].append(tensor.numel() * tensor.element_size())
            return gather(every, tensor, *args, **kwargs)

        def counted_objects(*args: Any, **kwargs: Any) -> Any:
            self.objects += 1
            return objects(*args, **kwargs)

        dist.broadcast, dist.all_gather = counted_broadcast, counted_gather
        dist.broadcast_object_list = counted_objects


def train(
    model: nn.Module, first: int = 0, every: int = 1, sent: Sent | None = None, **options: Any
) -> Seen:
    """Train on the batches ``first``, ``first + every`` and so on; return what was seen."""
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        sparsifier = Sparsifier(METHOD, model, optimizer, **options)
    digests = []
    for step in range(TOTAL):
        optimizer.zero_grad()
        backward(model, first + every * step)
        optimizer.step()
        digests.append(sparsifier.support.digest())
    return {
        "digests": digests,
        "weights": {name: p.detach().clone() for name, p in sparsifier.params.items()},
        "warned": [(str(w.message), w.filename) for w in warned],
        "shared": bool(sparsifier._weights.peers),
        "sent": None if sent is None else (sent.numbers, sent.objects),
    }


def seeds(rank: int) -> Seen:
    return train(build(seed=rank), first=10 * rank, sent=Sent())


def alone(_: int) -> Seen:
    """What :func:`seeds` does, in one process."""
    return {str(seed): train(build(seed=seed), first=10 * seed) for seed in range(2)}


def one_engine(rank: int) -> Seen:
    model = build(seed=rank)
    engine = None if rank else acdc.Engine(model, batch(0)[0])
    return train(model, engine=engine)


def ddp(rank: int) -> Seen:
    return train(DDP(build()), first=rank, every=2, sent=Sent())


def differing(rank: int) -> Seen:
    """The ranks have weights of their own, so that each on its own would choose otherwise."""
    sent = Sent()
    seen = train(build(seed=rank), sent=sent, process_group=dist.group.WORLD)
    return seen | {"numels": [p.numel() for p in seen["weights"].values()]}


def subgroups(rank: int) -> Seen:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = pairs[rank // 2]
    seen = train(build(seed=rank), process_group=mine)
    other = pairs[1 - rank // 2]
    return seen | {"stranger": refused(build(), process_group=other)}


def refused(model: nn.Module, **options: Any) -> str:
    try:
        Sparsifier(METHOD, model, sgd(model), **options)
    except InputError as error:
        return str(error)
    return "attached"


class Around(nn.Module):
    """A module around a DistributedDataParallel, such as a trainer's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def wrappers(rank: int) -> Seen:
    alone, _ = dist.new_subgroups(1)
    inner = DDP(build())
    parts = nn.Sequential(DDP(build()), DDP(nn.Linear(4, 4), process_group=alone))
    seen = {
        "ddp": train(DDP(build())),
        "compiled": train(torch.compile(DDP(build()), backend="eager")),
        "around": train(Around(DDP(build()))),
        "inside": train(inner.module),
        "alone": train(build(), process_group=alone),
        "ddp, alone": train(DDP(build()), process_group=alone),
    }
    return {
        **{name: (each["shared"], each["warned"]) for name, each in seen.items()},
        "parts": refused(parts),
        "no group": refused(build(), process_group="gloo"),
    }


CASES: dict[str, tuple[int, Callable[[int], Seen]]] = {
    "seeds": (2, seeds), "alone": (1, alone), "one engine": (2, one_engine), "ddp": (2, ddp),
    "differing": (2, differing), "subgroups": (4, subgroups), "wrappers": (2, wrappers),
}  # fmt: skip


def fork(case: str, rank: int, world: int, folder: Path) -> int:
    """Start a rank, and return the number of its process."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = dist.FileStore(str(folder / f"{case}.store"), world)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        torch.save(CASES[case][1](rank), folder / f"{case}.{rank}.pt")
        code = 0
    except Exception:
        import traceback

        traceback.print_exc()
    os._exit(code)


def main() -> None:
    """Run all cases, one after the other."""
    torch.set_num_threads(1)
    backward(build(), 0)  # imports what every rank would have to import by itself
    torch.compile(nn.Linear(2, 2), backend="eager")
    folder, failed = Path(sys.argv[1]), 0
    for case, (world, _) in CASES.items():
        children = [fork(case, rank, world, folder) for rank in range(world)]
        failed += sum(os.waitpid(child, 0)[1] != 0 for child in children)
    sys.exit(failed)


if __name__ == "__main__":
    main()
