"""Positions of kept weights in a frozen file."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from acdc.engine import native
from acdc.errors import InputError
from acdc.runtime.packing import pack, unpack

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a compiler")


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_positions_come_back(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 5000))
    density = data.draw(st.sampled_from([0.0, 0.001, 0.05, 0.12, 0.5, 1.0]))
    seed = data.draw(st.integers(0, 10**6))
    kept = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < density
    index = kept.nonzero()[:, 0].to(torch.int32)
    packed = pack(index, count)
    assert sum(t.numel() for t in packed.values()) <= -(-count // 8)
    back = unpack(packed, count, index.numel())
    assert back.dtype == torch.int32
    assert torch.equal(back, index)


def test_the_form_is_the_smallest() -> None:
    few, many = torch.arange(0, 800, 20), torch.arange(0, 800, 2)
    assert list(pack(few, 800)) == ["gaps"]
    assert pack(few, 800)["gaps"].numel() == 40
    assert list(pack(many, 800)) == ["mask"]
    assert pack(torch.arange(800), 800) == {}


@pytest.mark.parametrize("far", [253, 254, 255, 256, 509, 510, 511, 765, 100_000])
def test_weights_that_are_far_apart(far: int) -> None:
    index = numbers(0, far, far + 1, 3 * far)
    packed = pack(index, 10**6)
    assert list(packed) == ["gaps"]
    assert torch.equal(unpack(packed, 10**6, 4), index)


@pytest.mark.parametrize(
    ("gaps", "count", "kept", "words"),
    [
        ([3, 3], 100, 3, "not as many values"),
        ([3, 3], 100, 1, "not as many values"),
        ([90, 90], 100, 2, "do not end in"),
        ([3, 255], 1000, 1, "do not end in"),
        ([255] * 10, 9, 0, "do not fit"),
        ([0] * 10, 9, 10, "do not fit"),
        ([255, 255, 0], 510, 1, "do not end in"),
    ],
)
def test_gaps_of_other_weights_are_refused(
    gaps: list[int], count: int, kept: int, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        unpack({"gaps": torch.tensor(gaps, dtype=torch.uint8)}, count, kept)


def test_gaps_reach_the_last_weight() -> None:
    gaps = torch.tensor([255, 255, 0], dtype=torch.uint8)
    assert unpack({"gaps": gaps}, 511, 1).tolist() == [510]


def test_too_many_weights_are_refused() -> None:
    with pytest.raises(InputError, match="can have 2147483647"):
        unpack({}, 2**31, 0)
