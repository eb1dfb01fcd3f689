"""Shapes of files: what fits, and where a value that does not fit is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from acdc.schema import COUNT, MOST_NESTED, SHARE, Each, Maybe, Misfit, Number, check, parse

SHAPE = {
    "count": COUNT,
    "share?": SHARE,
    "words": [str],
    "kept": Each(str, COUNT),
    "loss?": Maybe(float),
    "kind": ("dense", "sparse"),
    "inner": {"on": bool},
}
GOOD: dict[str, Any] = {
    "count": 3, "share": 0.5, "words": ["a"], "kept": {"w": 1}, "loss": None, "kind": "dense",
    "inner": {"on": True, "more": 1}, "more": [],
}  # fmt: skip


def test_what_fits() -> None:
    check(GOOD, SHAPE, "it")
    check({**GOOD, "loss": float("nan"), "share": 1}, SHAPE, "it")
    check({key: GOOD[key] for key in ("count", "words", "kept", "kind", "inner")}, SHAPE, "it")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": True}, "count is true, and has to be a whole number"),
        ({"count": 1.0}, "count is 1.0, and has to be a whole number"),
        ({"count": -1}, r"count is -1, and can be 0 to 9.0072e\+15"),
        ({"count": 10**400}, "count is a very large number, and can be"),
        ({"share": float("nan")}, "share is NaN, and can be 0 to 1"),
        ({"share": 1.5}, "share is 1.5, and can be 0 to 1"),
        ({"share": None}, "share is null, and has to be a number"),
        ({"loss": 10**400}, "loss is too large for a number"),
        ({"words": ["a", 2]}, r"words\[1\] is 2, and has to be a text"),
        ({"words": {}}, "words is an object, and has to be a list"),
        ({"kept": {"w": "x"}}, 'kept.w is "x", and has to be a whole number'),
        ({"kind": "x" * 99}, 'kind is "x+ ..., and has to be one of'),
        ({"kind": ["dense"]}, "kind is a list, and has to be one of"),
        ({"inner": {"on": 1}}, "inner.on is 1, and has to be true or false"),
        ({"inner": {}}, "inner has no 'on'"),
    ],
)
def test_what_does_not_fit_is_named_by_its_path(change: dict[str, Any], words: str) -> None:
    with pytest.raises(Misfit, match=words):
        check({**GOOD, **change}, SHAPE, "it")


def test_the_whole_value_goes_by_its_own_name() -> None:
    with pytest.raises(Misfit, match="the file is a list, and has to be an object"):
        check([], SHAPE, "the file")
    with pytest.raises(Misfit, match="the file has no 'count'"):
        check({}, SHAPE, "the file")
    with pytest.raises(Misfit, match="x is 2, and can be 0 to 1"):
        check(2, Number(int, 0, 1), "x")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        (b"\xff{}", "utf-8"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        ('{"x": [{"a": 1, "a": 1}]}', "the key 'a' twice"),
        ("[" * 100_000 + "]" * 100_000, "nested more than 60 levels"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested more than 60 levels"),
        ("[" * (MOST_NESTED + 1) + "]" * (MOST_NESTED + 1), "nested more than 60 levels"),
        ("9" * 5000, "4300 digits"),
    ],
)
def test_texts_that_are_refused(text: str | bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_texts_that_are_read() -> None:
    deep = "[" * MOST_NESTED + "]" * MOST_NESTED
    assert json.dumps(parse(deep)) == deep
    assert parse('{"ü": [1, {"a": null}]}'.encode()) == {"ü": [1, {"a": None}]}
