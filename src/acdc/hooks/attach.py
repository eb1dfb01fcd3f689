"""Checks before anything is touched: what cannot be trained sparsely is refused in a sentence."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import AveragedModel

from acdc.collectives import has_peers
from acdc.errors import InputError
from acdc.hooks.optimizers import Optimizers
from acdc.layers import misnamed, unwrapped
from acdc.methods.base import Method, check_method
from acdc.methods.training import Behind
from acdc.processes import Peers, group_of

if TYPE_CHECKING:  # an engine takes a second to load, and only its users need one
    from acdc.engine.engine import Engine

_AVERAGES = ("ModelEma", "ModelEmaV2", "ModelEmaV3")  # of timm
_FLAT = ("FullyShardedDataParallel", "FlatParameter")


def checked(method: Method[Any]) -> Method[Any]:
    """Return the method, if it is one and its schedule is in steps.

    Raises:
        InputError: It is something else, or holds a plan.
    """
    check_method(method, "Sparsifier(method, model, optimizer)")
    method.resolved  # noqa: B018  # a plan is refused before anything is touched
    return method


def to_train(model: nn.Module, engine: Engine | None) -> nn.Module:
    """Return the module to train, without wrappers.

    Raises:
        InputError: It is an average or sharded as one flat parameter, its parameters have other
            names than in its ``state_dict``, or the engine is of another model.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"Sparsifier(method, model, optimizer) takes a torch.nn.Module as its second argument, "
            f"and was given a {type(model).__name__}."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"The model is a {type(model).__name__} of torch.jit, whose parameters cannot be "
            f"followed. Train the module that it was made of, and script the result."
        )
    inner = unwrapped(model)
    for each in (model, inner):
        if isinstance(each, AveragedModel) or _is_one_of(each, _AVERAGES):
            raise InputError(
                f"The model is an average of weights ({type(each).__name__}), which no optimizer "
                f"steps. Give the model that is trained; sparsifier.project(average) sets the "
                f"pruned weights of an average to zero, and sparsifier.register_average(average) "
                f"lets pair(average=...) save it."
            )
    modules = (*model.modules(), *inner.modules())
    if any(_is_one_of(each, _FLAT) for each in (*modules, *inner.parameters())):
        raise InputError(
            "The parameters of the model are sharded over processes by FullyShardedDataParallel, "
            "which holds them as one flat parameter. Shard the model with "
            "torch.distributed.fsdp.fully_shard (FSDP2), or train with "
            "torch.nn.parallel.DistributedDataParallel."
        )
    if names := misnamed(inner):
        raise InputError(
            f"{len(names)} parameters of the {type(inner).__name__} have other names in its "
            f"state_dict, {names[0]!r} first, so what is trained could not be saved. Give the "
            f"module inside the wrapper, the one whose state_dict is saved."
        )
    if engine is not None and engine.model is not inner:
        raise InputError(
            "The engine was made for another model. Build it from this very one: "
            "acdc.Engine(model, example)."
        )
    return inner


def peers_of(model: nn.Module, group: Any) -> Peers:
    """Return the processes that share masks with this one.

    Args:
        model: As the user gave it. Of a DistributedDataParallel in it, or around it, the processes
            share masks.
        group: The process group that the user gave; ``None``: none.

    Raises:
        InputError: The group is no process group, or this process is not in it.
    """
    if group is None:
        group = group_of(model)
        if group is None and has_peers():
            warnings.warn(
                "torch.distributed is initialised, and the sparsifier was given neither a model in "
                "DistributedDataParallel nor process_group=..., so this process chooses its masks "
                "alone. If several processes train this model together, give the wrapped model, or "
                "process_group=torch.distributed.group.WORLD. If each process trains a model of "
                "its own, nothing needs to be done.",
                stacklevel=3,
            )
        return Peers(group)
    if distributed.is_available() and group is distributed.GroupMember.NON_GROUP_MEMBER:
        raise InputError(
            "This process is not a member of process_group. Give the group of the processes that "
            "train this model together with this one; every process gives its own."
        )
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise InputError(
            f"process_group is a {type(group).__name__}. It takes a process group of "
            f"torch.distributed, such as torch.distributed.group.WORLD, new_group(ranks), or "
            f"get_group() of a device mesh."
        )
    return Peers(group)


def check_can_attach(method: Method[Any], params: Mapping[str, Tensor], parts: Optimizers) -> None:
    """Raise InputError unless the method can train these weights by these optimizers."""
    parts.check_held(params)
    if isinstance(method.training, Behind) and len(parts) > 1:
        raise InputError(
            f"{type(method).__name__} trains dense weights behind sparse ones, and puts them in "
            f"for one step of one optimizer; {len(parts)} optimizers were given. Give one "
            f"optimizer, or a method that masks weights, such as ACDC, GMP or RigL."
        )


def refuse_copy(sparsifier: object, _protocol: object = None) -> Any:
    """Raise InputError: a copy would hold no hooks, and its model would train dense.

    ``copy`` and ``pickle`` call it as ``__reduce_ex__``.
    """
    raise InputError(
        "A sparsifier is bound to its model and its optimizer by hooks, and cannot be copied or "
        "pickled. Save sparsifier.state_dict(), or attach another one to copies of the model and "
        "the optimizer: Sparsifier(method, model, optimizer, state=sparsifier.state_dict())."
    )


def _is_one_of(value: object, names: tuple[str, ...]) -> bool:
    return any(cls.__name__ in names for cls in type(value).__mro__)
