"""Tensors that several ranks share: what this rank holds of them, and what all ranks hold together.

A sharded weight is a DTensor, and so are its gradient, its scores and its mask. The tensor itself
knows which rank holds which elements, and this module is the only one that looks inside. Every
function takes plain tensors, too, which one rank holds as a whole.

A collective function must be called by all ranks of the device mesh.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from acdc.collectives import together
from acdc.errors import InputError

Mesh = Any
"""A ``torch.distributed.device_mesh.DeviceMesh``; ``None``: one process."""

GATHER = (
    "Call acdc.distributed.sparse_network(sparsifier), or acdc.distributed.pair(sparsifier) if the "
    "method keeps a dense twin, on every rank: the first rank gets whole tensors. Without a "
    "sparsifier, gather the state dict on every rank by get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True, cpu_offload=True)) of "
    "torch.distributed.checkpoint.state_dict."
)
"""How to make whole tensors of sharded ones, as sentences for an error."""

PLAIN_MODEL = f"Load whole weights into a model that is not sharded, and give that. {GATHER}"


def is_sharded(tensor: object) -> bool:
    """Return whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # without it, there is none
    return module is not None and isinstance(tensor, module.DTensor)


def check_whole(model: nn.Module, what: str, instead: str = PLAIN_MODEL) -> None:
    """Raise InputError if weights of a model are sharded.

    Args:
        model: The model.
        what: What needs whole weights, for the sentence: ``"a Runtime"``.
        instead: What to do instead: whole sentences.
    """
    # After a forward pass, FSDP may still hold whole weights, and free them at any time.
    if fsdp_modules(model) or any(map(is_sharded, model.parameters())):
        raise InputError(
            f"The weights of the model are sharded over ranks, and {what} needs whole ones. "
            f"{instead}"
        )


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules to which ``fully_shard`` was applied."""
    fsdp = getattr(getattr(distributed, "fsdp", None), "FSDPModule", None)
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp)]


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, in the same memory."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part.detach()


def like(tensor: Tensor, part: Tensor, shape: Iterable[int] | None = None) -> Tensor:
    """Return the tensor of which ``part`` is what this rank holds, placed as ``tensor`` is.

    Args:
        tensor: A tensor whose placement is taken. A plain one: the part is the whole.
        part: Of this rank.
        shape: Of the whole; ``None``: that of ``tensor``.
    """
    if not is_sharded(tensor):
        return part
    from torch.distributed.tensor import DTensor

    sizes = torch.Size(tensor.shape if shape is None else shape)
    steps = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    mesh, placements = _spread(tensor)
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=sizes, stride=tuple(steps)
    )


def placed(tensor: Tensor, target: Tensor) -> Tensor:
    """Return a tensor with the placement of another one. Collective, if ``tensor`` is sharded.

    Args:
        tensor: A DTensor of any placement, or a plain tensor that every rank holds as a whole.
        target: Of the same shape.
    """
    if not is_sharded(target):
        return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    mesh, placements = _spread(target)
    if not is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        # A rank takes its part of what it has, and nothing is sent.
        part = distribute_tensor(tensor.detach(), mesh, placements, src_data_rank=None)
        return like(target, local(part).clone())
    if _spread(tensor) == (mesh, placements):
        return tensor
    moved: Tensor = tensor.redistribute(mesh, placements)  # type: ignore[attr-defined]
    return moved


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor. Collective, if it is sharded."""
    return placed(tensor, torch.empty(0))


def mesh_of(tensors: Iterable[Tensor]) -> Mesh:
    """Return the device mesh of the first sharded tensor, or ``None`` where none is sharded."""
    return next((_spread(tensor)[0] for tensor in tensors if is_sharded(tensor)), None)


def counts_here(tensor: Tensor) -> bool:
    """Return whether this rank counts its part of a tensor: of several ranks that hold the same
    part, the first one does.
    """
    if not is_sharded(tensor):
        return True
    mesh, placements = _spread(tensor)
    coordinate = mesh.get_coordinate()
    return all(
        not placement.is_replicate() or coordinate[dim] == 0
        for dim, placement in enumerate(placements)
    )


def total(numbers: Tensor, mesh: Mesh) -> Tensor:
    """Return the sums over all ranks of a mesh, on the CPU. Collective."""
    return _reduced(numbers, mesh, "SUM")


def extremes(numbers: list[int], mesh: Mesh) -> tuple[list[int], list[int]]:
    """Return the smallest and the largest numbers of all ranks of a mesh. Collective."""
    both = torch.tensor([*numbers, *(-n for n in numbers)], dtype=torch.int64)
    most = _reduced(both, mesh, "MAX").tolist()
    return [-n for n in most[len(numbers) :]], most[: len(numbers)]


def anywhere(flag: bool, mesh: Mesh) -> bool:
    """Return whether something holds on any rank of a mesh. Collective."""
    return flag if mesh is None else bool(total(torch.tensor([int(flag)]), mesh))


def counts(masks: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Return the number of True elements of every mask by name. Collective for sharded masks.

    Args:
        masks: Names and masks, asked for one at a time.
    """
    found, mesh = {}, None
    for name, mask in masks:
        mesh = mesh or mesh_of([mask])
        found[name] = int(torch.count_nonzero(local(mask))) if counts_here(mask) else 0
    if mesh is None:
        return found
    return dict(zip(found, total(torch.tensor(list(found.values())), mesh).tolist(), strict=True))


def positions(tensor: Tensor) -> Tensor:
    """Return the flat index in the whole tensor of every element that this rank holds, int64."""
    index = torch.zeros((1,) * tensor.dim(), dtype=torch.int64)
    for axis, size in enumerate(tensor.shape):
        held = _along(tensor, axis).cpu()
        shape = [1] * tensor.dim()
        shape[axis] = len(held)
        index = index * size + held.view(shape)
    return index.to(tensor.device)


def cuts(tensor: Tensor, axis: int, size: int) -> bool:
    """Return whether a boundary between ranks goes through a group of ``size`` consecutive elements
    along an axis. Collective.
    """
    if not is_sharded(tensor):
        return False
    held = _along(tensor, axis)
    whole = len(held) % size == 0
    if whole and len(held):
        groups = held.view(-1, size)
        aligned = groups[:, 0] % size == 0
        whole = bool((aligned & (groups[:, -1] - groups[:, 0] == size - 1)).all())
    return anywhere(not whole, _spread(tensor)[0])


def _along(tensor: Tensor, axis: int) -> Tensor:
    """Return the indices along an axis that this rank holds."""
    shape = [1] * tensor.dim()
    shape[axis] = tensor.shape[axis]
    every = torch.arange(tensor.shape[axis]).view(shape)
    if not is_sharded(tensor):
        return every.flatten()
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh, placements = _spread(tensor)
    only = [p if getattr(p, "dim", None) == axis else Replicate() for p in placements]
    return local(distribute_tensor(every, mesh, only, src_data_rank=None)).flatten()


def _spread(tensor: Tensor) -> tuple[Mesh, tuple[Any, ...]]:
    return tensor.device_mesh, tuple(tensor.placements)  # type: ignore[attr-defined]


def _reduced(numbers: Tensor, mesh: Mesh, operation: str) -> Tensor:
    if mesh is None:
        return numbers
    numbers = numbers.to(mesh.device_type, copy=True)
    with together("add up what the ranks have counted"):
        for dim in range(mesh.ndim):
            if mesh.size(dim) > 1:
                reduce = getattr(distributed.ReduceOp, operation)
                distributed.all_reduce(numbers, reduce, group=mesh.get_group(dim))
    return numbers.cpu()
