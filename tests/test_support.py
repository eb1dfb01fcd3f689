"""Counts and supports: one rounding rule, and the changes between two supports."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from acdc.errors import InputError
from acdc.support import Support, kept, pack_bits, unpack_bits


def bools(text: str) -> Tensor:
    return torch.tensor([c == "1" for c in text])


# --- kept ----------------------------------------------------------------------------------------

# The published counts: kept = n - round(s·n).
PUBLISHED = [
    (25_502_912, 0.50, 12_751_456),  # ResNet-50, all 54 layers
    (25_502_912, 0.80, 5_100_582),
    (25_502_912, 0.90, 2_550_291),
    (25_502_912, 0.95, 1_275_146),
    (25_502_912, 0.98, 510_058),
    (23_445_504, 0.80, 4_689_101),  # without conv1 and fc
    (23_445_504, 0.90, 2_344_550),
    (23_445_504, 0.95, 1_172_275),
    (23_445_504, 0.98, 468_910),
    (4_209_088, 0.75, 1_052_272),  # MobileNetV1
    (4_209_088, 0.90, 420_909),
    (4_163_584, 0.75, 1_040_896),  # without conv1 and the depthwise layers
    (4_163_584, 0.90, 416_358),
    (36_518_832, 0.50, 18_259_416),  # WRN-28-10
    (36_518_832, 0.75, 9_129_708),
    (36_518_832, 0.90, 3_651_883),
    (36_518_832, 0.95, 1_825_942),
    (270_896, 0.50, 135_448),  # ResNet-20, 22 layers
    (268_336, 0.75, 67_084),  # without the two downsamples
    (268_336, 0.90, 26_834),
    (268_336, 0.95, 13_417),
]


@pytest.mark.parametrize(("numel", "sparsity", "count"), PUBLISHED)
def test_published_counts(numel: int, sparsity: float, count: int) -> None:
    assert kept(numel, sparsity) == count


def test_the_float_trap_where_the_product_is_whole() -> None:
    # In floats 100·(1 - 0.95) = 5.000000000000004 and 100·(1 - 0.9) = 9.999999999999998.
    assert [kept(100, s) for s in (0.5, 0.75, 0.8, 0.9, 0.95, 0.98)] == [50, 25, 20, 10, 5, 2]


@given(numel=st.integers(0, 10**9), places=st.integers(1, 7), digits=st.integers(0, 10**7 - 1))
def test_kept_is_exact_on_the_decimal_that_was_written(
    numel: int, places: int, digits: int
) -> None:
    text = f"0.{digits:07d}"[: 2 + places]
    assert kept(numel, float(text)) == numel - round(Fraction(text) * numel)


def test_halves_go_to_the_even_number_of_zeros() -> None:
    assert [kept(n, 0.5) for n in (1, 3, 5, 7)] == [1, 1, 3, 3]


def test_kept_of_other_numbers() -> None:
    assert kept(7, 0) == 7
    assert kept(10**7, 1e-07) == 10**7 - 1  # written with an exponent
    assert kept(100, np.float64(0.9)) == 10  # what numpy.linspace gives
    assert kept(10, 0.99) == 0
    assert kept(100, 0.575) == 42  # in floats 57.49999999999999 zeros, so 43
    assert kept(1, 0.4) == 1


@pytest.mark.parametrize("sparsity", [1, 1.0, -0.1, 1.5, 90, math.nan, math.inf, "0.9", None, True])
def test_a_sparsity_outside_zero_to_one_is_refused(sparsity: object) -> None:
    with pytest.raises(InputError, match=r"fraction of zeros: a number from 0 .* without, 1") as e:
        kept(10, sparsity)  # type: ignore[arg-type]
    assert repr(sparsity) in str(e.value)
    assert ("write 0.9 for 90 %" in str(e.value)) == (sparsity in (1.5, 90, math.inf))


# --- supports as values --------------------------------------------------------------------------

OLD = Support({"a": bools("1110"), "b": bools("110000").view(2, 3)})
NEW = Support({"a": bools("0111"), "b": bools("100010").view(2, 3)})


def test_counts_by_hand() -> None:
    assert (OLD.nnz, OLD.numel, OLD.density, OLD.sparsity) == (5, 10, 0.5, 0.5)
    assert OLD.counts() == {"a": 3, "b": 2}
    assert list(OLD) == ["a", "b"]
    assert not OLD.is_full


def test_churn_is_twice_what_regrew_over_all_weights() -> None:
    # By hand: "a" loses 0 and regains 3; "b" loses 1 and regains 4.
    assert NEW.regrown(OLD) == 2
    assert NEW.churn(OLD) == 2 * 2 / 10
    entered = NEW.entered(OLD)
    assert torch.equal(entered["a"], bools("0001"))
    assert torch.equal(entered["b"].flatten(), bools("000010"))
    assert OLD.churn(OLD) == 0
    assert OLD.regrown(OLD) == 0


def test_churn_where_the_sparsity_changes_counts_every_bit_that_differs() -> None:
    smaller = Support({"a": bools("1000"), "b": OLD["b"]})
    assert smaller.churn(OLD) == 2 / 10
    assert smaller.regrown(OLD) == 0
    assert OLD.regrown(smaller) == 2


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_laws_of_two_supports(pairs: list[tuple[bool, bool]]) -> None:
    a = Support({"w": torch.tensor([p[0] for p in pairs])})
    b = Support({"w": torch.tensor([p[1] for p in pairs])})
    assert a.churn(b) == b.churn(a)
    assert a.churn(b) * a.numel == pytest.approx(a.regrown(b) + b.regrown(a))
    assert a.nnz - a.regrown(b) == b.nnz - b.regrown(a)  # what both keep
    assert a.entered(b).nnz == a.regrown(b)
    assert (a == b) == (a.churn(b) == 0) == (a.digest() == b.digest())


def test_full() -> None:
    layer = nn.Linear(3, 2)
    full = Support.full({"weight": layer.weight})
    assert full.is_full
    assert (full.nnz, full.density) == (6, 1.0)
    assert not full["weight"].requires_grad
    empty = Support.full({})
    assert empty.is_full
    assert (empty.nnz, empty.density, empty.churn(empty)) == (0, 1.0, 0.0)


def test_equal_by_value_and_not_hashable() -> None:
    again = Support({name: mask.clone() for name, mask in OLD.items()})
    assert again == OLD
    assert OLD != NEW
    assert Support({"a": OLD["a"]}) != OLD
    assert Support({"a": OLD["a"], "b": OLD["b"].view(3, 2)}) != OLD
    assert dict(OLD) != OLD
    with pytest.raises(TypeError, match="unhashable"):
        hash(OLD)


def test_digest_tells_names_shapes_and_masks() -> None:
    masks = dict(OLD)
    others = [
        Support({"a": masks["a"], "c": masks["b"]}),
        Support({"a": masks["a"], "b": masks["b"].view(3, 2)}),
        Support({"a": masks["a"], "b": ~masks["b"]}),
    ]
    digests = {OLD.digest(), *(other.digest() for other in others)}
    assert len(digests) == 4
    strided = torch.empty(3, 2, dtype=torch.bool).t().copy_(masks["b"])
    assert Support({"a": masks["a"], "b": strided}).digest() == OLD.digest()


def test_other_names_and_other_types_are_refused() -> None:
    with pytest.raises(InputError, match="different models"):
        OLD.churn(Support({"a": OLD["a"]}))
    with pytest.raises(InputError, match="different models"):
        OLD.entered(Support({"a": OLD["a"], "c": OLD["b"]}))
    with pytest.raises(InputError, match=r"mask of 'a' is of torch.float32. A mask is torch.bool"):
        Support({"a": torch.ones(3)})


# --- packed --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=70))
def test_pack_and_back(values: list[bool]) -> None:
    mask = torch.tensor(values, dtype=torch.bool)
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [
        sum(bit << digit for digit, bit in enumerate(values[i : i + 8]))
        for i in range(0, len(values), 8)
    ]
    assert torch.equal(unpack_bits(packed, tuple(mask.shape)), mask)


def test_a_support_packed_and_back() -> None:
    shapes = {name: tuple(mask.shape) for name, mask in OLD.items()}
    assert Support.unpack(OLD.pack(), shapes) == OLD
    assert sum(p.numel() for p in OLD.pack().values()) == 2


@pytest.mark.parametrize(
    "packed", [torch.zeros(1, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)]
)
def test_a_packed_mask_of_another_size_or_type_is_refused(packed: Tensor) -> None:
    with pytest.raises(InputError, match=r"for shape \(3, 4\) has 2 bytes of torch.uint8"):
        unpack_bits(packed, (3, 4))
