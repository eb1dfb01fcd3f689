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


def settings(method: Method[Any]) -> str:
    """Return a method and its arguments as text, without those that the state holds in full."""
    names: list[str] = [field.name for field in fields(method)] if is_dataclass(method) else []
    given = (f"{n}={getattr(method, n)!r}" for n in names if n not in ("schedule", "layers"))
    return f"{method.name}({', '.join(given)})"


def check_same_shapes(
    saved: Mapping[str, tuple[int, ...]], mine: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise InputError unless the weights of a checkpoint are those of the model."""
    if saved == mine:
        return
    differ = sorted(n for n in saved.keys() | mine.keys() if saved.get(n) != mine.get(n))
    raise InputError(
        f"The state is of another model, or other layers were pruned: {len(differ)} weights "
        f"differ, {differ[0]!r} first ({saved.get(differ[0], 'absent')} there, "
        f"{mine.get(differ[0], 'absent')} here)."
    )


def check_same_run(method: Method[Any], described: str, schedule: Schedule) -> None:
    """Raise InputError unless a checkpoint is of a run with this method and its schedule."""
    mine, my_schedule = settings(method), method.resolved
    if described != mine:
        differ = f"its method is {described}, and here it is {mine}"
    elif schedule.phases != my_schedule.phases:
        pairs = zip_longest(schedule.phases, my_schedule.phases)
        there, here = next((a, b) for a, b in pairs if a != b)
        differ = f"its schedule has {there or 'no phase'} where this one has {here or 'none'}"
    elif schedule != my_schedule:
        differ = "its epochs have other numbers of steps"
    else:
        return
    raise InputError(
        f"The state is of another run: {differ}. Resume with the method and the schedule the "
        f"run was started with."
    )


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
