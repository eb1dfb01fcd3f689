"""What a sparsifier's checkpoint must agree with, and how its tensors come back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import Field, fields, is_dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from acdc.errors import InputError
from acdc.methods.base import Method
from acdc.schedule import Schedule
from acdc.shards import placed
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
    shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
    mine = {name: tuple(param.shape) for name, param in params.items()}
    if differ := sorted(n for n in shapes.keys() | mine.keys() if shapes.get(n) != mine.get(n)):
        raise InputError(
            f"The state is of another model, or other layers were pruned: {len(differ)} weights "
            f"differ, {differ[0]!r} first ({shapes.get(differ[0], 'absent')} there, "
            f"{mine.get(differ[0], 'absent')} here)."
        )
    current = _settings(method)
    if state["method"] not in (current, _settings(method, every=True)):
        raise InputError(
            f"The state is of another run: its method is {state['method']}, and here it is "
            f"{current}. Resume with the method the run was started with."
        )
    saved, step, twin = Schedule.from_dict(state["schedule"]), state["step"], state["dense_twin"]
    if difference := _difference(saved, method.resolved, step):
        raise InputError(
            f"The state is of another run: {difference}. A schedule may be changed at resume only "
            f"where it lies ahead: the phases until step {step} must be those of the run."
        )
    last = method.resolved.last("dense")
    if last is None or saved == method.resolved or is_due(state, method):
        return
    if last.stop <= step and (twin is None or twin["step"] != last.stop):
        raise InputError(
            f"The last dense phase of the new schedule ended at step {last.stop}, before the state "
            f"was saved at step {step}, and the dense network of that moment was not kept. Let the "
            f"new schedule have another dense phase, or keep the one that the run had."
        )


def is_due(state: Mapping[str, Any], method: Method[Any]) -> bool:
    """Return whether a finished run goes on with a new phase, whose change is due at once."""
    step, schedule = state["step"], method.resolved
    finished = step == Schedule.from_dict(state["schedule"]).total < schedule.total
    return bool(finished and schedule.phase_at(step).start == step)


def _difference(saved: Schedule, mine: Schedule, step: int) -> str:
    """Return how two schedules differ until a step, or nothing."""
    if step > mine.total:
        return f"it was saved at step {step}, and this schedule ends at {mine.total}"
    # The phase that begins where a run ended is not of that run.
    until = step + 1 if step < saved.total else step
    pairs = zip_longest(
        ((p.kind, p.start) for p in saved.phases if p.start < until),
        ((p.kind, p.start) for p in mine.phases if p.start < until),
    )
    for theirs, ours in pairs:
        if theirs != ours:
            texts = [f"a {p[0]} phase at step {p[1]}" if p else "no phase" for p in (theirs, ours)]
            return f"its schedule has {texts[0]} where this one has {texts[1]}"
    return ""


def _settings(method: Method[Any], every: bool = False) -> str:
    """Return a method and its arguments as text, without those that the state holds in full.

    Args:
        method: The method.
        every: Whether arguments that were added later are named even while they have their default.
            Some checkpoints name them.
    """
    arguments: Iterable[Field[Any]] = fields(method) if is_dataclass(method) else ()
    values: dict[str, Any] = {
        field.name: getattr(method, field.name)
        for field in arguments
        if field.name not in ("schedule", "layers") and (every or not is_unused(method, field))
    }
    given = (f"{n}={v.digest() if isinstance(v, Support) else v!r}" for n, v in values.items())
    return f"{method.name}({', '.join(given)})"


def is_unused(value: Any, field: Field[Any]) -> bool:
    """Return whether a field of a dataclass was added later and has its default.

    Such a field, ``field(default=..., metadata={"added": True})``, is not written: recipes and
    checkpoints then have the values that they had before there was the field.
    """
    return bool(field.metadata.get("added")) and getattr(value, field.name) == field.default


def unpacked(packed: Mapping[str, Tensor] | None, params: Mapping[str, Tensor]) -> Support | None:
    """Return a support from ``Support.pack``, placed as the weights are; ``None`` for none."""
    if packed is None:
        return None
    masks = Support.unpack(packed, {name: tuple(param.shape) for name, param in params.items()})
    return Support({n: placed(mask, params[n]).to(params[n].device) for n, mask in masks.items()})


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
