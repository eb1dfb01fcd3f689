"""Every reader on files with random damage. 'make soak' goes on with it for hours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import acdc
from acdc import recipes
from acdc.bitmask import serialize
from acdc.errors import InputError
from acdc.result import SparseNetwork
from acdc.runs.recipe import change
from acdc.schema import check, parse
from support.fuzz import READERS, networks

TRIES = 5_000 if os.environ.get("ACDC_FULL") else 150


@pytest.mark.parametrize("reader", READERS)
def test_random_damage_ends_in_a_sentence(reader: str) -> None:
    wrong = {seed: said for seed in range(TRIES) if (said := READERS[reader](seed)) is not None}
    assert not wrong


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """The file of a sparse network, without its index."""
    path = networks()[0].save(tmp_path) / "sparse.safetensors"
    return path.rename(tmp_path / "alone.safetensors")


def test_a_sparse_file_is_read_alone(alone: Path) -> None:
    network = acdc.read_sparse(alone)
    saved = networks()[0]
    assert network == SparseNetwork(saved.sparse, saved.support)
    again = saved.save(alone.parent / "again") / "sparse.safetensors"
    assert again.read_bytes() == alone.read_bytes()


def test_any_flipped_bit_of_a_sparse_file_is_refused(alone: Path) -> None:
    raw = alone.read_bytes()
    for bit in range(0, 8 * len(raw), 1 if TRIES > 1000 else 11):
        wrong = bytearray(raw)
        wrong[bit // 8] ^= 1 << (bit % 8)
        alone.write_bytes(wrong)
        with pytest.raises(InputError, match="is no sparse network as it was saved"):
            acdc.read_sparse(alone)


def test_other_files_are_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "file"
    tensors = {"w": torch.zeros(2)}
    for raw in (
        b"",
        b"\xff" * 100,
        (2**62).to_bytes(8, "little") + b"{}",
        serialize(tensors, {"format": "pt"}),
        serialize(tensors, {}),
        serialize(tensors, {"acdc": "[" * 100_000}),
        serialize(tensors, {"acdc": '{"layout": "other", "weights": {}, "aliases": {}}'}),
    ):
        path.write_bytes(raw)
        with pytest.raises(InputError, match="is no sparse network as it was saved"):
            acdc.read_sparse(path)
    for nothing in (tmp_path, tmp_path / "none", tmp_path / ("n" * 300)):
        with pytest.raises(InputError, match="cannot be read"):
            acdc.read_sparse(nothing)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40) | st.binary(max_size=40))
def test_parse_raises_nothing_but_value_errors(text: str | bytes) -> None:
    try:
        parse(text)
    except ValueError as refused:
        said = str(refused)
        assert said


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_shapes_refuse_every_value_in_words(value: object) -> None:
    shape = {"a": int, "b?": [float], "c": ("x", "y")}
    try:
        check(value, shape, "the value")
    except ValueError as refused:
        said = str(refused)
        assert said
    else:
        assert isinstance(value, dict)
        assert type(value["a"]) is int
        assert value["c"] in ("x", "y")


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(
        ["seed", "clip", "model.width", "method.pattern.sparsity", "method.schedule.sparse",
         "data.augment.padding", "method.pattern.overrides", "engine", "method", "threads"]
    ),
    st.text(max_size=12),
)  # fmt: skip
def test_any_text_after_set_is_a_value_or_a_sentence(path: str, text: str) -> None:
    try:
        change(recipes.get("digits"), {path: text})
    except InputError as refused:
        said = str(refused)
        assert said.endswith(".")
