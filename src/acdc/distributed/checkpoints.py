"""Checkpoints of a model, its optimizer and its sparsifier, which any number of ranks can load.

They are written by ``torch.distributed.checkpoint`` (DCP). DCP loads into tensors that are there,
so that what a run does not have yet (masks before the first cut, a dense twin, the state of a new
optimizer) would never be loaded. Therefore the states of the optimizer and the sparsifier are
written in two parts: their tensors, each under a number, and an outline, which holds everything
else, and for every tensor its number and the weight whose placement it has. ``load`` reads the
outline first, and makes the tensors.

The optimizer is not asked by ``get_optimizer_state_dict``. That makes state where there is none
(after a decompression), by a step with a learning rate of zero, but only if there are no gradients.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import cache
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as read_into
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as write

from acdc.distributed.ranks import check_same_step
from acdc.errors import InputError
from acdc.hooks.optimizers import OneOrSeveral
from acdc.hooks.saved import unpacked
from acdc.hooks.twin import on_cpu
from acdc.shards import like, local
from acdc.sparsifier import Sparsifier

_TENSOR = "tensor of the checkpoint"
_MASKS = ("support", "last_sparse", "trained")

Folder = str | os.PathLike[str]


def save(
    folder: Folder,
    model: nn.Module,
    optimizer: OneOrSeveral,
    sparsifier: Sparsifier,
    *,
    asynchronous: bool = False,
) -> Future[Any] | None:
    """Write a checkpoint of a training run. All ranks must call it, after a step.

    Every rank writes what it holds. A mask takes a byte for each weight.

    Args:
        folder: Where it is written; one folder for each checkpoint, on a file system that all ranks
            share.
        model: The model, sharded, in DistributedDataParallel, or plain.
        optimizer: Its optimizer, or a list of several.
        sparsifier: What binds both.
        asynchronous: Whether to return as soon as everything is copied to memory of the CPU, and to
            write in a thread. The training may then go on. The ranks communicate by gloo for it.

    Returns:
        With ``asynchronous``: what ends when the checkpoint is written. Ask for its ``result()``
        before the process ends.

    Raises:
        PeerError: The ranks have executed different numbers of steps.
    """
    check_same_step(sparsifier)
    run = {"optimizer": _states(optimizer), "sparsifier": sparsifier.state_dict()}
    state = {"model": get_model_state_dict(model), "run": _taken_apart(run, sparsifier)}
    if not asynchronous:
        write(state, checkpoint_id=folder)
        return None
    group = _own_group(distributed.group.WORLD) if distributed.is_initialized() else None
    written = async_save(state, checkpoint_id=folder, process_group=group)
    assert isinstance(written, Future)
    return written


def load(
    folder: Folder,
    model: nn.Module,
    optimizer: OneOrSeveral,
    sparsifier: Sparsifier,
) -> None:
    """Go on where :func:`save` was called. All ranks must call it.

    Build the model, the optimizer and the sparsifier as for a new run; the number of ranks and the
    placement of the weights may be others than those of the run that was saved.

    Args:
        folder: What :func:`save` wrote.
        model: The model.
        optimizer: Its optimizer, or a list of several.
        sparsifier: What binds both.

    Raises:
        InputError: There is no such checkpoint, or it is of another model, method or schedule.
    """
    outline, sizes = _read_outline(folder)
    tensors = _tensors(outline, sizes, dict(sparsifier.model.named_parameters()))
    read_into({"run": {"tensors": tensors}}, checkpoint_id=folder)
    run = _put_together(outline, tensors)
    found = run["sparsifier"]
    found["dense_twin"] = on_cpu(found["dense_twin"])  # DTensors are made where their mesh is
    sparsifier.check_state_dict(found)
    weights = get_model_state_dict(model)
    read_into({"model": weights}, checkpoint_id=folder)
    set_model_state_dict(model, weights)
    for each, state in zip(_several(optimizer), run["optimizer"], strict=True):
        each.load_state_dict(state)
    sparsifier.load_state_dict(found)


def _several(optimizer: OneOrSeveral) -> list[torch.optim.Optimizer]:
    return [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)


def _states(optimizer: OneOrSeveral) -> list[dict[str, Any]]:
    return [each.state_dict() for each in _several(optimizer)]


@cache
def _own_group(world: Any) -> Any:
    """Return a group for the thread that writes, so that the training does not wait for it."""
    return distributed.new_group(backend="gloo")


# --- tensors and an outline ----------------------------------------------------------------------


def _taken_apart(run: dict[str, Any], sparsifier: Sparsifier) -> dict[str, Any]:
    """Return the states as an outline and tensors, without anything that depends on the ranks."""
    for key in _MASKS:
        masks = unpacked(run["sparsifier"][key], sparsifier.params)
        run["sparsifier"][key] = None if masks is None else dict(masks)
    params = dict(sparsifier.model.named_parameters())
    names = {id(param): name for name, param in params.items()}
    stepped = [
        [names.get(id(p)) for group in each.param_groups for p in group["params"]]
        for each in sparsifier.optimizers
    ]
    tensors: dict[str, Tensor] = {}

    def number(path: tuple[Any, ...], value: Tensor) -> Any:
        key, name = str(len(tensors)), _weight_of(path, stepped)
        placed = name in params and value.shape == params[name].shape
        tensors[key] = value
        return (_TENSOR, key, name if placed else None)

    file = io.BytesIO()
    torch.save(_mapped(run, number), file)
    outline = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    return {"outline": outline, "tensors": tensors}


def _weight_of(path: tuple[Any, ...], stepped: list[list[str | None]]) -> Any:
    """Return the name of the weight that a tensor belongs to, by its place in the states.

    Args:
        path: Keys, such as ``("sparsifier", "dense_twin", "optimizer", "state", 3, "exp_avg")``.
        stepped: The names of the weights of every optimizer, in the order of its groups.
    """
    if "optimizer" not in path:
        return path[-1]
    inside = path[path.index("optimizer") + 1 :]
    which, rest = (inside[0], inside[1:]) if isinstance(inside[0], int) else (0, inside)
    is_of_weight = rest[0] == "state" and isinstance(rest[1], int)
    return stepped[which][rest[1]] if is_of_weight else None


def _mapped(
    value: Any, change: Callable[[tuple[Any, ...], Tensor], Any], path: tuple[Any, ...] = ()
) -> Any:
    """Return a nested state with every tensor replaced by what ``change(path, tensor)`` returns."""
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, change, (*path, i)) for i, item in enumerate(value))
    return value


def _read_outline(folder: Folder) -> tuple[Any, dict[str, TensorStorageMetadata]]:
    """Return the outline, and the size of every tensor by its number."""
    try:
        found = FileSystemReader(folder).read_metadata().state_dict_metadata
        size = found["run.outline"]
    except (OSError, KeyError) as error:
        raise InputError(
            f"{os.fspath(folder)} holds no checkpoint of acdc.distributed.save(...). Give the "
            f"folder that was given to save; an asynchronous checkpoint is complete when the "
            f"result() of what save returned is there."
        ) from error
    assert isinstance(size, TensorStorageMetadata)
    outline = torch.empty(size.size, dtype=torch.uint8)
    read_into({"run": {"outline": outline}}, checkpoint_id=folder)
    prefix = "run.tensors."
    sizes = {
        key.removeprefix(prefix): value
        for key, value in found.items()
        if key.startswith(prefix) and isinstance(value, TensorStorageMetadata)
    }
    return torch.load(io.BytesIO(outline.numpy().tobytes()), weights_only=True), sizes


def _tensors(
    outline: Any, sizes: Mapping[str, TensorStorageMetadata], params: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return memory for the tensors of an outline, placed as their weights are.

    Raises:
        InputError: The checkpoint is of another model.
    """
    made = {}
    for _, key, name in _marks(outline):
        size, dtype = sizes[key].size, sizes[key].properties.dtype
        if name is None:
            made[key] = torch.empty(size, dtype=dtype)
            continue
        if name not in params or params[name].shape != size:
            raise InputError(
                f"The checkpoint is of another model: its weight {name!r} has the shape "
                f"{tuple(size)}, and this model has no such weight. Nothing was loaded."
            )
        part = torch.empty(local(params[name]).shape, dtype=dtype)
        made[key] = like(params[name], part)
    return made


def _is_mark(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and value[0] == _TENSOR


def _marks(outline: Any) -> list[tuple[str, str, str | None]]:
    """Return what stands for tensors in an outline."""
    if _is_mark(outline):
        return [outline]
    if isinstance(outline, Mapping):
        outline = list(outline.values())
    inside = outline if isinstance(outline, list | tuple) else ()
    return [mark for value in inside for mark in _marks(value)]


def _put_together(outline: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the state of which this is the outline."""
    if _is_mark(outline):
        return tensors[outline[1]]
    if isinstance(outline, Mapping):
        return {key: _put_together(value, tensors) for key, value in outline.items()}
    if isinstance(outline, list | tuple):
        return type(outline)(_put_together(value, tensors) for value in outline)
    return outline
