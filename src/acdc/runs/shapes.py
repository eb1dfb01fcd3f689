"""The shapes of values that are read from a file: of an event, and of the entries of a checkpoint.

A shape is a type such as ``int``, one of the classes below, a list that holds the shape of its
parts, a tuple of the values that are allowed, or a dictionary with a shape for each key. A key that
ends with ``?`` may be missing. Other keys may be there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from acdc.cost import Ledger
from acdc.schedule import Schedule

Shape = Any


@dataclass(frozen=True)
class Number:
    """A number within bounds; NaN is in none.

    Args:
        kind: ``int`` or ``float``. A whole number is a float, too.
        least: The smallest.
        most: The largest.
    """

    kind: type
    least: float
    most: float


@dataclass(frozen=True)
class Maybe:
    """A value of this shape, or None."""

    shape: Shape


@dataclass(frozen=True)
class Each:
    """A dictionary with any keys of this type, and values of this shape."""

    key: type
    shape: Shape


# No run reaches the bounds, and what is computed from numbers within them does not overflow.
COUNT = Number(int, 0, 2**53)
SECONDS = Number(float, 0, 1e12)
SHARE = Number(float, 0, 1)
AMOUNT = Number(float, 0, 1e300)


class Misfit(Exception):
    """A value that does not fit. The message says which, and what it should be."""


def check(value: Any, shape: Shape, what: str) -> None:
    """Compare a value with a shape.

    Args:
        value: The value.
        shape: The shape.
        what: What the value is, for the message.

    Raises:
        Misfit: It does not fit.
    """
    if isinstance(shape, type):
        _check_type(value, shape, what)
    elif isinstance(shape, Number):
        _check_type(value, shape.kind, what)
        if not shape.least <= value <= shape.most:
            raise Misfit(f"{what} is {value}, and it can be {shape.least:g} to {shape.most:g}")
    elif isinstance(shape, dict):
        _check_type(value, dict, what)
        for key, part in shape.items():
            name = key.removesuffix("?")
            if name in value:
                check(value[name], part, name)
            elif name == key:
                raise Misfit(f"{what} has no {key!r}")
    elif isinstance(shape, Each):
        _check_type(value, dict, what)
        for key, part in value.items():
            _check_type(key, shape.key, f"a key of {what}")
            check(part, shape.shape, f"{key!r} in {what}")
    elif isinstance(shape, list):
        _check_type(value, list, what)
        for part in value:
            check(part, shape[0], f"a part of {what}")
    elif isinstance(shape, Maybe):
        if value is not None:
            check(value, shape.shape, what)
    elif type(value) is not type(shape[0]) or value not in shape:
        raise Misfit(f"{what} is none of {', '.join(map(repr, shape))}")


def _check_type(value: Any, kind: type, what: str) -> None:
    kinds: Any = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind not in (bool, object)):
        raise Misfit(f"{what} is of type {type(value).__name__}, not {kind.__name__}")


# --- events -------------------------------------------------------------------------------------

_KIND = ("dense", "sparse")
_TWIN = {"twin?": ("dense",)}
_TIMES = {"seconds?": SECONDS, "cpu_seconds?": SECONDS}
_PHASE = {"kind": _KIND, "start": COUNT, "stop": COUNT}
_CHOICE = {
    "name": str,
    "sparse": bool,
    "density": SHARE,
    "dense_ms": Maybe(AMOUNT),
    "sparse_ms": Maybe(AMOUNT),
    "convert_ms": Maybe(AMOUNT),
}
_ENGINE = {"kind?": str, "reason?": Maybe(str)}
_LAYER = {
    "name": str,
    "shape": [COUNT],
    "numel": Number(int, 1, 2**53),
    "positions?": Maybe(COUNT),
    "prunable?": bool,
}
_FLOPS = Number(int, 0, 10**30)
_COST = {**_PHASE, "samples": COUNT, "flops": _FLOPS, "dense_flops": _FLOPS}

# What the times and the pages read of each event. Runs of older versions lack some of it.
EVENTS: dict[str, Shape] = {
    "start": {
        "total_steps": COUNT,
        "phases": [_PHASE],
        "steps_per_epoch": [COUNT],
        "layers?": [_LAYER],
        "refused?": Each(str, str),
        "engine?": _ENGINE,
    },
    "step": {"phase": _KIND, "loss?": Maybe(float), "lr?": Maybe(float), **_TIMES, **_TWIN},
    "eval": {"phase": _KIND, "accuracy": Number(float, 0, 100), **_TIMES, **_TWIN},
    "change": {
        "to": _KIND,
        "nnz": COUNT,
        "churn": Maybe(SHARE),
        "regrown?": Maybe(COUNT),
        "counts?": Maybe(Each(str, COUNT)),
    },
    "engine": {"choices?": [_CHOICE], "refused?": Each(str, str), **_ENGINE, **_TIMES},
    "ledger": {"phases": [_COST], "exact": bool},
}


def check_event(value: Any) -> None:
    """See that a value is an event of a run. Events of kinds that are not known are let through.

    Raises:
        Misfit: It is none.
    """
    check(value, {"event": str, "step": COUNT}, "the line")
    check(value, EVENTS.get(value["event"], {}), "the event")
    try:
        if value["event"] == "start":
            Schedule.from_dict(value)
        elif value["event"] == "ledger":
            Ledger.from_dict(value)
    except (TypeError, ValueError) as error:
        raise Misfit(str(error)) from error
