"""JSON files that a person, another program or a failing disk may have changed.

:func:`parse` reads a text strictly. :func:`misfit` compares the value with a schema, and says where
the two differ. A schema is a type: ``int``, ``list[str]``, ``float | None``, a ``TypedDict``, or an
``Annotated`` number with its :class:`Between`. Keys that a ``TypedDict`` does not name are allowed.

>>> from typing import TypedDict
>>> class Point(TypedDict):
...     x: float
...     names: NotRequired[list[str]]
>>> print(misfit(parse('{"x": 1, "names": ["a", null]}'), Point))
names[1] is null and must be a text
>>> misfit(parse('{"x": 1, "y": 2}'), Point) is None
True
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NotRequired,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

MOST_NESTED = 60  # levels; the deepest file that acdc writes has 12


class Between(NamedTuple):
    """The smallest and the largest number allowed. NaN is neither."""

    least: float
    most: float


# Larger numbers would overflow a float or an array. No run reaches them.
Count = Annotated[int, Between(0, 10**24)]
Positive = Annotated[int, Between(1, 10**24)]
Number = Annotated[float, Between(-1e24, 1e24)]
Seconds = Annotated[float, Between(0, 1e12)]
Share = Annotated[float, Between(0, 1)]
Percent = Annotated[float, Between(0, 100)]
Ratio = Annotated[float, Between(0, 1e6)]


class Misfit(NamedTuple):
    """A value that does not fit: its path, and what is wrong with it, in words."""

    path: str
    words: str

    def __str__(self) -> str:
        return f"{self.path.lstrip('.') or 'the file'} {self.words}"

    def below(self, part: str) -> Misfit:
        """Return the same fault, seen from the value that holds this one."""
        return Misfit(part + self.path, self.words)


# --- reading ------------------------------------------------------------------------------------


def parse(text: str | bytes) -> Any:
    """Return the value of a JSON text in UTF-8.

    Raises:
        ValueError: It is no JSON, it is nested too deeply, or an object has a key twice. The
            message says why.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=_each_key_once)
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_NESTED} levels deep") from None
    if _is_deeper(value, MOST_NESTED):
        raise ValueError(f"it is nested more than {MOST_NESTED} levels deep")
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return found


def _is_deeper(value: Any, levels: int) -> bool:
    """Return whether a value is nested deeper than that. Not recursive: it may be very deep."""
    layer = [value]
    for _ in range(levels + 1):
        nested = [part for part in layer if isinstance(part, dict | list)]
        layer = [v for part in nested for v in (part.values() if isinstance(part, dict) else part)]
        if not layer:
            return False
    return True


# --- comparing with a schema --------------------------------------------------------------------

Check = Callable[[Any], Misfit | None]


def misfit(value: Any, schema: Any) -> Misfit | None:
    """Return where a value does not fit a schema, or ``None`` if it fits."""
    return _check(schema)(value)


@cache  # a run has a hundred thousand events of six kinds
def _check(schema: Any) -> Check:
    """Return the function that compares a value with a schema."""
    kind, options = get_origin(schema), get_args(schema)
    if schema is Any:
        return lambda _: None
    if is_typeddict(schema):
        return _object(schema)
    if kind is Annotated:
        return _number(options[0], options[1])
    if kind in (Union, UnionType):
        return _either(options)
    if kind is list:
        return _list(_check(options[0]))
    if kind is dict:
        return _mapping(_check(options[1]))
    if kind is Literal:
        allowed = ", ".join(map(repr, options))
        return lambda value: (
            None
            if isinstance(value, str) and value in options
            else Misfit("", f"is {_shown(value)} and must be one of {allowed}")
        )
    return _plain(schema)


_WANTED = {
    int: "a whole number", float: "a number", str: "a text", bool: "true or false",
    dict: "an object", list: "a list", NoneType: "null",
}  # fmt: skip


def _plain(kind: type) -> Check:
    # In Python True is an int; in JSON it is not. JSON writes 2.0 as 2.
    kinds: Any = (int, float) if kind is float else kind

    def check(value: Any) -> Misfit | None:
        if isinstance(value, kinds) and (kind is bool or not isinstance(value, bool)):
            return None
        return Misfit("", f"is {_shown(value)} and must be {_WANTED[kind]}")

    return check


def _number(kind: type, bounds: Between) -> Check:
    plain, (least, most) = _plain(kind), bounds

    def check(value: Any) -> Misfit | None:
        if found := plain(value):
            return found
        if least <= value <= most:
            return None
        words = f"is {_shown(value)} and must lie between {least:g} and {most:g}"
        return Misfit("", words)

    return check


def _object(schema: Any) -> Check:
    fields = []
    for key, hint in get_type_hints(schema, include_extras=True).items():
        optional = get_origin(hint) is NotRequired
        fields.append((key, optional, _check(get_args(hint)[0] if optional else hint)))
    is_object = _plain(dict)

    def check(value: Any) -> Misfit | None:
        if found := is_object(value):
            return found
        for key, optional, part in fields:
            if key not in value:
                if not optional:
                    return Misfit(f".{key}", "is missing")
            elif found := part(value[key]):
                return found.below(f".{key}")
        return None

    return check


def _list(part: Check) -> Check:
    is_list = _plain(list)

    def check(value: Any) -> Misfit | None:
        if found := is_list(value):
            return found
        for number, each in enumerate(value):
            if found := part(each):
                return found.below(f"[{number}]")
        return None

    return check


def _mapping(part: Check) -> Check:
    is_object = _plain(dict)

    def check(value: Any) -> Misfit | None:
        if found := is_object(value):
            return found
        for key, each in value.items():
            if found := part(each):
                return found.below(f".{key}")
        return None

    return check


def _either(options: tuple[Any, ...]) -> Check:
    checks = [_check(option) for option in options]
    or_null = " or null" if NoneType in options else ""

    def check(value: Any) -> Misfit | None:
        found = [each(value) for each in checks]
        if None in found:
            return None
        # The first option is the usual one.
        first = found[0]
        assert first is not None
        return first if first.path else Misfit("", first.words + or_null)

    return check


def _shown(value: Any) -> str:
    """Return a value as it stands in the file, if it is short."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."
