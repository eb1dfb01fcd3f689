"""JSON files of the wrong shape: each key of a file left out, doubled, or with another value."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

PLACE = "@@place@@"
DEEP = "[" * 100_000 + "]" * 100_000

# Values that take the place of another one, as they stand in the file.
VALUES = {
    "null": "null",
    "text": '"a text"',
    "number": "-3.5",
    "true": "true",
    "object": "{}",
    "list": "[]",
    "list of null": "[null]",
    "deep": DEEP,
    "NaN": "NaN",
    "infinity": "1e999",
    "zero": "0",
    "huge": "1" + "0" * 400,
    "digits": "1" * 5000,
    "half a pair": '"\\ud800"',
}


def paths(value: Any, path: tuple[str | int, ...] = (), wide: int = 1) -> Iterator[Any]:
    """Yield the path of every value in another: of a list, of its first ``wide`` items."""
    if path:
        yield path
    parts: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        parts = list(enumerate(value))[:wide]
    for key, part in parts:
        yield from paths(part, (*path, key), wide)


def with_value(value: Any, path: tuple[str | int, ...], text: str) -> str:
    """Return the JSON text in which the value at ``path`` is ``text``."""
    copy = json.loads(json.dumps(value))
    parent = copy
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = PLACE
    return json.dumps(copy).replace(json.dumps(PLACE), text)


def without(value: Any, path: tuple[str | int, ...]) -> str:
    """Return the JSON text without the key at ``path``."""
    copy = json.loads(json.dumps(value))
    parent = copy
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    return json.dumps(copy)


def mutants(value: Any, wide: int = 1) -> Iterator[tuple[str, str]]:
    """Yield a name and a text for every way in which a file can have the wrong shape."""
    for path in paths(value, wide=wide):
        name = ".".join(map(str, path))
        yield f"{name}: left out", without(value, path)
        for kind, text in VALUES.items():
            yield f"{name}: {kind}", with_value(value, path, text)
        if isinstance(path[-1], str):
            key = json.dumps(path[-1])
            yield f"{name}: twice", with_value(value, path, f"null, {key}: 1")
    for kind, text in VALUES.items():
        yield f"the file: {kind}", text
    text = json.dumps(value)
    yield "the file: cut", text[: len(text) // 2]
    yield "the file: no text", "\x00\xff"
