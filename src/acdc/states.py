"""State dicts that are saved and loaded: what they may hold, and whether they fit together."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from acdc.bitmask import as_integers, same_bits
from acdc.errors import InputError
from acdc.shards import GATHER, is_sharded
from acdc.support import Support

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
}


def plain_tensors(state: Mapping[str, Any], what: str) -> dict[str, Tensor]:
    """Return a state dict without its autograd history and without extra state of modules.

    Args:
        state: The state dict.
        what: Whose it is, for the sentence: ``"the sparse twin"``.

    Raises:
        InputError: An entry is no tensor, or one that safetensors cannot write, or sharded.
    """
    plain = {}
    for name, tensor in state.items():
        if is_extra(name, tensor):
            log.warning("%s is saved without %r, the extra state of a module.", what, name)
            continue
        if not isinstance(tensor, Tensor):
            raise InputError(
                f"The entry {name!r} of {what} is a {type(tensor).__name__}. Only tensors can be "
                f"saved: remove the entry."
            )
        if is_sharded(tensor):
            raise InputError(
                f"The tensor {name!r} of {what} is sharded: this rank holds a part of it. {GATHER}"
            )
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES:
            raise InputError(
                f"The tensor {name!r} of {what} is {tensor.dtype} on {tensor.device}, "
                f"{tensor.layout}. Only ordinary tensors of the dtypes that safetensors knows can "
                f"be saved: convert it first."
            )
        plain[name] = tensor.detach()
    return plain


def is_extra(name: str, value: Any) -> bool:
    """Return whether an entry of a state dict is what ``get_extra_state`` of a module returned, and
    no tensor. It may be any object, and no file of ours holds objects.
    """
    return name.rpartition(".")[2] == "_extra_state" and not isinstance(value, Tensor)


def json_object(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts as they will be read back: tuples as lists, keys as strings.

    Raises:
        InputError: JSON cannot hold one of them.
    """
    for name, fact in dict(facts).items():
        try:
            json.dumps({name: fact}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"The fact {name!r} cannot be written as JSON ({error}). Give strings, finite "
                f"numbers, booleans, None, and lists and dicts of them."
            ) from error
    result: dict[str, Any] = json.loads(json.dumps(dict(facts)))
    return result


def check_pruned(support: Support, state: Mapping[str, Tensor], what: str) -> None:
    """See that every weight that the support prunes is +0.0, bit for bit.

    Args:
        support: Which weights are kept.
        state: The state dict.
        what: Whose it is, for the sentence: ``"the sparse twin"``.

    Raises:
        InputError: The support is of another model, or a pruned weight is not zero.
    """
    for name, mask in support.items():
        if name not in state:
            raise InputError(
                f"The support names {name!r}, which {what} does not have. Give the support of the "
                f"same model; the names are those of model.state_dict()."
            )
        weight = state[name]
        if is_sharded(mask):
            raise InputError(
                f"The mask of {name!r} is sharded: this rank holds a part of it. {GATHER}"
            )
        if weight.shape != mask.shape:
            raise InputError(
                f"The support has shape {tuple(mask.shape)} for {name!r}, and the weight is of "
                f"shape {tuple(weight.shape)}. Give the support of the same model."
            )
        if not weight.dtype.is_floating_point:
            raise InputError(
                f"The support names {name!r}, which is {weight.dtype}. Only floating point weights "
                f"are pruned."
            )
        wrong = int(torch.count_nonzero(as_integers(weight).masked_fill(mask.to(weight.device), 0)))
        if wrong:
            raise InputError(
                f"{wrong} weights of {name!r} are pruned by the support and are not +0.0 in "
                f"{what}. Take the state dict at the end of a sparse phase, or call "
                f"Sparsifier.project(model) first."
            )


def differences(
    one: Mapping[str, Any], one_name: str, other: Mapping[str, Any], other_name: str
) -> str:
    """Return the names, shapes and dtypes in which two state dicts differ; none: ``""``."""
    found = [f"{other_name} has no {name!r}" for name in one if name not in other]
    found += [f"{one_name} has no {name!r}" for name in other if name not in one]
    for name in one:
        a, b = one[name], other.get(name)
        if isinstance(b, Tensor) and (a.shape != b.shape or a.dtype != b.dtype):
            found.append(f"{name!r} is {_kind(a)} in {one_name} and {_kind(b)} in {other_name}")
    most = 3
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(found[:most]) + more


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether two state dicts have the same names and bits."""
    return one.keys() == other.keys() and all(same_bits(one[k], other[k]) for k in one)


def load_into(model: Model, state: Mapping[str, Tensor], noun: str) -> Model:
    """Load a state dict into ``model`` in place, bit for bit, and return the model.

    Args:
        model: The model.
        state: The state dict.
        noun: Where it comes from, for the sentence: ``"pair"``.

    Raises:
        InputError: The model has other names, shapes or dtypes, or sharded weights. It is left as
            it was.
    """
    mine = model.state_dict()
    extra = {name: mine.pop(name) for name in list(mine) if is_extra(name, mine[name])}
    if found := differences(state, f"the {noun}", mine, "the model"):
        raise InputError(
            f"The {noun} is of another model: {found}. Build the model as in the run (not "
            f"wrapped, not compiled, same dtype). Nothing was loaded."
        )
    if sharded := [name for name, value in mine.items() if is_sharded(value)]:
        raise InputError(
            f"The {noun} holds whole tensors, and those of the model are sharded, {sharded[0]!r} "
            f"first. Nothing was loaded. Load the {noun} before the model is sharded, or call "
            f"set_model_state_dict(model, dict(state), options=StateDictOptions("
            f"full_state_dict=True)) of torch.distributed.checkpoint.state_dict on every rank, "
            f"with the state dict of the {noun}: it changes the dict that it is given."
        )
    model.load_state_dict({**state, **extra}, strict=True)  # extra state stays the model's own
    return model
