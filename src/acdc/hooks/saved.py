"""What a sparsifier's checkpoint must agree with, and how its tensors come back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from acdc.errors import InputError
from acdc.methods.base import Method
from acdc.schedule import Schedule
from acdc.support import Support

FORMAT = 2  # of the state dict


def identity(method: Method[Any], params: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the part of a checkpoint that a resumed run must agree with."""
    return {
        "format": FORMAT,
        "method": _settings(method),
        "schedule": method.resolved.to_dict(),
        "shapes": {name: tuple(param.shape) for name, param in params.items()},
    }


def check_same_run(
    method: Method[Any], params: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Raise InputError unless a checkpoint is of this model, this method and its schedule.

    Args:
        method: The method that resumes.
        params: The prunable weights by name.
        state: The checkpoint.
    """
    if state.get("format") != FORMAT:
        raise InputError(
            f"The sparsifier's state has format {state.get('format')!r}, and this version of "
            f"acdc reads format {FORMAT}."
        )
    saved = {name: tuple(shape) for name, shape in state["shapes"].items()}
    mine = {name: tuple(param.shape) for name, param in params.items()}
    if differ := sorted(n for n in saved.keys() | mine.keys() if saved.get(n) != mine.get(n)):
        raise InputError(
            f"The state is of another model, or other layers were pruned: {len(differ)} weights "
            f"differ, {differ[0]!r} first ({saved.get(differ[0], 'absent')} there, "
            f"{mine.get(differ[0], 'absent')} here)."
        )
    schedule = Schedule.from_dict(state["schedule"])
    if difference := _difference(method, state["method"], schedule):
        raise InputError(
            f"The state is of another run: {difference}. Resume with the method and the schedule "
            f"the run was started with."
        )


def _difference(method: Method[Any], described: str, schedule: Schedule) -> str:
    """Return how a method and a schedule differ from the saved ones, or nothing."""
    mine, my_schedule = _settings(method), method.resolved
    if described != mine:
        return f"its method is {described}, and here it is {mine}"
    if schedule.phases != my_schedule.phases:
        pairs = zip_longest(schedule.phases, my_schedule.phases)
        there, here = next((a, b) for a, b in pairs if a != b)
        return f"its schedule has {there or 'no phase'} where this one has {here or 'none'}"
    return "" if schedule == my_schedule else "its epochs have other numbers of steps"


def _settings(method: Method[Any]) -> str:
    """Return a method and its arguments as text, without those that the state holds in full."""
    names: list[str] = [field.name for field in fields(method)] if is_dataclass(method) else []
    values = {n: getattr(method, n) for n in names if n not in ("schedule", "layers")}
    given = (f"{n}={v.digest() if isinstance(v, Support) else v!r}" for n, v in values.items())
    return f"{method.name}({', '.join(given)})"


def unpacked(packed: Mapping[str, Tensor] | None, params: Mapping[str, Tensor]) -> Support | None:
    """Return a support from ``Support.pack`` on the devices of the weights; ``None`` for none."""
    if packed is None:
        return None
    masks = Support.unpack(packed, {name: tuple(param.shape) for name, param in params.items()})
    return Support({name: mask.to(params[name].device) for name, mask in masks.items()})


def on_devices(state: Any, params: Mapping[str, Tensor]) -> Any:
    """Return a method's state with copies of its tensors on the devices of the weights.

    An entry of the outermost dictionary that has the name of a weight goes to the device of that
    weight, everything else to the device of the first weight.
    """

    def copied(value: Any, device: torch.device) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, copy=True)
        if isinstance(value, Mapping):
            at = {key: params[key].device if key in params else device for key in value}
            return {key: copied(item, at[key]) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(copied(item, device) for item in value)
        return value

    first = next((param.device for param in params.values()), torch.device("cpu"))
    return copied(state, first)
