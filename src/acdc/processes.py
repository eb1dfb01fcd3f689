"""The processes that train one model together."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from acdc.errors import AcdcError
from acdc.support import Support

SHOWN = 3  # processes that a sentence names


class PeerError(AcdcError):
    """Processes that train one model cannot reach one another, or do not agree."""


def has_peers() -> bool:
    """Return whether this is one of several processes that train the same model."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return int(distributed.get_world_size()) > 1


@contextmanager
def together(what: str) -> Iterator[None]:
    """Turn the errors of a collective operation into a sentence.

    Args:
        what: What the processes do in this context.

    Raises:
        PeerError: Another process has ended, or did not come in the time that
            ``init_process_group`` was given.
    """
    try:
        yield
    except RuntimeError as error:
        if not has_peers() or not is_of_peers(error):
            raise
        first = str(error).strip().split("\n")[0]
        raise PeerError(
            f"Rank {distributed.get_rank()} cannot {what}: another process has ended, or does "
            f"something else ({first}). The process that ended says why. All processes must take "
            f"the same steps on equally many batches."
        ) from error


def is_of_peers(error: RuntimeError) -> bool:
    """Return whether an error comes from the communication between processes."""
    if isinstance(error, distributed.DistError):
        return True
    signs = ("gloo", "nccl", "connection", "socket", "timed out")
    return any(sign in str(error).lower() for sign in signs)


def from_rank_zero(tensor: Tensor) -> Tensor:
    """Fill a tensor in place with the values of rank 0, where there are several ranks; return it.

    Sums may differ in the last bit between ranks. What decides about a support must not.
    """
    if has_peers():
        with together("receive what rank 0 has chosen"):
            distributed.broadcast(tensor, src=0)
    return tensor


def agreed(support: Support, step: int) -> Support:
    """Return the support of rank 0 on every rank: scores may differ in the last bit.

    Args:
        support: The support that this rank has chosen.
        step: Executed steps of this rank.

    Raises:
        PeerError: The ranks are at different steps, or prune different layers.
    """
    if not has_peers():
        return support
    _check_same_place(support, step)
    masks = {name: from_rank_zero(mask.to(torch.uint8)) for name, mask in support.items()}
    return Support({name: mask.to(torch.bool) for name, mask in masks.items()})


def _check_same_place(support: Support, step: int) -> None:
    """Check that all ranks change the same layers after the same step.

    A broadcast of other sizes may wait forever, or fill a mask with the bytes of another.
    """
    shapes = zlib.crc32(repr([(n, tuple(m.shape)) for n, m in support.items()]).encode())
    # The number of kept weights, which a seed cannot change: the sparsity that was asked for.
    mine = [step, shapes, support.nnz]
    device = next((mask.device for mask in support.values()), torch.device("cpu"))
    every = [torch.empty(len(mine), dtype=torch.int64, device=device) for _ in range(_world())]
    with together(f"change the support after step {step}"):
        distributed.all_gather(every, torch.tensor(mine, device=device))
    ranks = [tensor.tolist() for tensor in every]
    if all(rank == ranks[0] for rank in ranks):
        return
    others = [number for number, rank in enumerate(ranks) if rank != mine][:SHOWN]
    said = "; ".join(f"rank {i} {_describe(*ranks[i])}" for i in others)
    raise PeerError(
        f"The processes do not agree: rank {distributed.get_rank()} {_describe(*mine)}; {said}. "
        f"Every process needs the same model, method and schedule, and equally many batches."
    )


def _describe(step: int, shapes: int, kept: int) -> str:
    return f"is after step {step} and keeps {kept:,} weights (layers {shapes:08x})"


def _world() -> int:
    return int(distributed.get_world_size())
