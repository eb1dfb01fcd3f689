"""The shapes of values that are read from a file that anybody may have changed.

A shape is a type such as ``int``, one of the classes below, a list that holds the shape of its
parts, a tuple of the values that are allowed, or a dictionary with a shape for each key. A key that
ends with ``?`` may be missing. Other keys may be there.

>>> check(parse('{"x": 1, "names": ["a", null]}'), {"x": float, "names?": [str]}, "the point")
Traceback (most recent call last):
acdc.schema.Misfit: names[1] is null, and has to be a text
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

Shape = Any

MOST_NESTED = 60  # levels of a JSON file; those that acdc writes have 12


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
POSITIVE = Number(int, 1, 2**53)
FLOPS = Number(int, 0, 10**30)
SECONDS = Number(float, 0, 1e12)
SHARE = Number(float, 0, 1)
PERCENT = Number(float, 0, 100)
AMOUNT = Number(float, 0, 1e300)


class Misfit(ValueError):
    """A value that does not fit. The message says which, and what it should be."""


def check(value: Any, shape: Shape, what: str, path: str = "") -> None:
    """Compare a value with a shape.

    Args:
        value: The value.
        shape: The shape.
        what: What the value is, for the message.
        path: The keys that lead to the value; if there are any, the message has them.

    Raises:
        Misfit: It does not fit.
    """
    subject = path or what
    if isinstance(shape, type):
        _check_type(value, shape, subject)
    elif isinstance(shape, Number):
        _check_type(value, shape.kind, subject)
        if not shape.least <= value <= shape.most:
            bounds = f"{shape.least:g} to {shape.most:g}"
            raise Misfit(f"{subject} is {_shown(value)}, and can be {bounds}")
    elif isinstance(shape, dict):
        _check_type(value, dict, subject)
        for key, part in shape.items():
            name = key.removesuffix("?")
            if name in value:
                check(value[name], part, what, f"{path}.{name}" if path else name)
            elif name == key:
                raise Misfit(f"{subject} has no {key!r}")
    elif isinstance(shape, Each):
        _check_type(value, dict, subject)
        for key, part in value.items():
            _check_type(key, shape.key, f"a key of {subject}")
            check(part, shape.shape, what, f"{path}.{key}" if path else str(key))
    elif isinstance(shape, list):
        _check_type(value, list, subject)
        for number, part in enumerate(value):
            check(part, shape[0], what, f"{path}[{number}]")
    elif isinstance(shape, Maybe):
        if value is not None:
            check(value, shape.shape, what, path)
    elif type(value) is not type(shape[0]) or value not in shape:
        allowed = ", ".join(map(repr, shape))
        raise Misfit(f"{subject} is {_shown(value)}, and has to be one of {allowed}")


_WORDS: dict[type, str] = {
    int: "a whole number", float: "a number", str: "a text", bool: "true or false",
    dict: "an object", list: "a list",
}  # fmt: skip


def _check_type(value: Any, kind: type, subject: str) -> None:
    kinds: Any = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind not in (bool, object)):
        wanted = _WORDS.get(kind, f"a {kind.__name__}")
        raise Misfit(f"{subject} is {_shown(value)}, and has to be {wanted}")
    if kind is float and isinstance(value, int) and abs(value) > 10**300:
        raise Misfit(f"{subject} is too large for a number")


def _shown(value: Any) -> str:
    """Return a value as JSON has it if it is short, else its type."""
    if isinstance(value, bool | float | str) or value is None or isinstance(value, int):
        text = "a very large number" if _is_huge(value) else json.dumps(value)
        return text if len(text) <= 40 else f"{text[:36]} ..."
    return _WORDS.get(type(value), f"of the type {type(value).__name__}")


def _is_huge(value: Any) -> bool:
    return isinstance(value, int) and value.bit_length() > 1000


# --- JSON ---------------------------------------------------------------------------------------


def parse(text: str | bytes) -> Any:
    """Return the value of a JSON text in UTF-8.

    Raises:
        ValueError: It is no JSON, it is nested too deeply, or an object has a key twice. The
            message says why.
    """
    deep = f"it is nested more than {MOST_NESTED} levels deep"
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=_each_key_once)
    except RecursionError:
        raise ValueError(deep) from None
    if _is_deeper(value, MOST_NESTED):
        raise ValueError(deep)
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"an object has the key {twice[:40]!r} twice")
    return found


def _is_deeper(value: Any, levels: int) -> bool:
    """Return whether a value is nested deeper than that, a level at a time."""
    layer = [value]
    for _ in range(levels):
        nested = [part for part in layer if isinstance(part, dict | list)]
        layer = [v for part in nested for v in (part.values() if isinstance(part, dict) else part)]
    return any(isinstance(part, dict | list) for part in layer)
