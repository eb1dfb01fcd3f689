"""Sharded weights: who shares them, and what cannot be trained on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from acdc.collectives import PeerError
from acdc.errors import InputError
from acdc.hooks.saved import identity
from acdc.methods.base import Method
from acdc.methods.training import Masked
from acdc.processes import MeshPeers, group_of
from acdc.random import seed_of
from acdc.shape import shapes_of
from acdc.shards import extremes, is_sharded, mesh_of


def mesh_peers(
    method: Method[Any],
    params: Mapping[str, Tensor],
    model: nn.Module,
    given: Mapping[str, Any],
) -> MeshPeers | None:
    """Return the ranks that share the weights, or ``None`` where no weight is sharded.

    Args:
        method: The method.
        params: The prunable weights by name.
        model: As the user gave it.
        given: Arguments of the sparsifier that need whole weights, by name; ``None``: not given.

    Raises:
        InputError: These weights cannot be pruned as they are sharded, or not by this method.
        PeerError: The ranks were given different methods, schedules or models.
    """
    mesh = mesh_of(params.values())
    if mesh is None:
        return None
    _check_placements(params)
    if whole := [name for name, value in given.items() if value is not None]:
        raise InputError(
            f"{whole[0]} was given, and the weights of the model are sharded. It needs whole "
            f"weights: leave it out, or train with torch.nn.parallel.DistributedDataParallel."
        )
    if group_of(model) is not None:
        raise InputError(
            "The model has sharded weights and is in DistributedDataParallel. Shard it over a "
            "device mesh of two dimensions instead: fully_shard(model, mesh=...) replicates along "
            "the first and shards along the second."
        )
    _check_method(method)
    _check_pattern(method, params)
    mine = seed_of(repr(identity(method, params)))
    low, high = extremes([mine], mesh)
    if low != high:
        raise PeerError(
            "The ranks were given different methods, schedules or models. Build the same model on "
            "all ranks of the device mesh, and give the same method."
        )
    return MeshPeers(mesh)


def refuse_pair(params: Mapping[str, Tensor]) -> None:
    """Raise InputError if weights are sharded: their pair is gathered by all ranks together."""
    if mesh_of(params.values()) is not None:
        raise InputError(
            "The weights of the model are sharded, and the pair is that of all ranks. Call "
            "acdc.distributed.pair(sparsifier) on every rank: it gathers one tensor at a time, and "
            "the first rank gets the pair. For a method without a dense twin, such as GMP or RigL, "
            "call acdc.distributed.sparse_network(sparsifier) in the same way."
        )


def reshard(modules: Iterable[Any]) -> None:
    """Free the whole weights that FSDP has gathered for a forward pass.

    After an evaluation some modules still hold them. They would compute with the weights of before
    a change.

    Args:
        modules: What :func:`acdc.shards.fsdp_modules` returned.
    """
    for module in modules:
        module.reshard()


def _check_placements(params: Mapping[str, Tensor]) -> None:
    plain = [name for name, param in params.items() if not is_sharded(param)]
    if plain:
        raise InputError(
            f"{len(params) - len(plain)} of the weights to prune are sharded, and {len(plain)} are "
            f"not, {plain[0]!r} first. Shard all of them, for example by fully_shard(model), or "
            f"leave these out: acdc.Layers(exclude=...)."
        )
    first, *_ = params
    for name, param in params.items():
        mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
        if mesh != params[first].device_mesh:  # type: ignore[attr-defined]
            raise InputError(
                f"The weights {first!r} and {name!r} are sharded over different device meshes. "
                f"Shard all weights to prune over one mesh, or leave some out: "
                f"acdc.Layers(exclude=...)."
            )
        if param.device.type != mesh.device_type:
            raise InputError(
                f"The weight {name!r} is on {param.device}, and its device mesh is of "
                f"{mesh.device_type} devices (CPUOffloadPolicy). Masks lie where the mesh is. "
                f"Train without offloading the weights."
            )
        if any(placement.is_partial() for placement in placements):
            raise InputError(
                f"The weight {name!r} is placed as {placements}: what the ranks hold must be added "
                f"up. Give weights that are sharded or replicated."
            )


def _check_method(method: Method[Any]) -> None:
    why = method.needs_whole_weights
    if not why and isinstance(method.training, Masked) and method.training.rescale is not None:
        why = "restore_norms compares the norms of whole filters"
    if why:
        raise InputError(
            f"{type(method).__name__} cannot train weights that are sharded: {why}. Use "
            f"torch.nn.parallel.DistributedDataParallel, or another method, such as ACDC, GMP or "
            f"RigL."
        )


def _check_pattern(method: Method[Any], params: Mapping[str, Tensor]) -> None:
    pattern = getattr(method, "pattern", None)
    shapes = shapes_of(params)
    if pattern is None:
        return
    for name, param in params.items():
        if why := pattern.cut_by_shards(shapes[name], param):
            raise InputError(f"The weight {name!r} cannot be pruned by {pattern}: {why}.")
