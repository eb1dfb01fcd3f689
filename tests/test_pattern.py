"""Patterns against a brute-force oracle, published counts, ERK, and the choice of layers.

A letter such as (A3) names a bug of a peer that the test shows to be absent.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from acdc import score
from acdc.errors import InputError
from acdc.layers import Layers
from acdc.methods.acdc import ACDC
from acdc.methods.families import choose
from acdc.methods.srste import SRSTE
from acdc.pattern import NM, Block, Pattern, Unstructured, erk
from acdc.runs.models import CifarResNet, MobileNetV1, Model, ResNet50, WideResNet
from acdc.schedule import constant, phases
from acdc.score import Scores
from acdc.sparsifier import Sparsifier
from acdc.support import Support, kept
from acdc.transposable import best_masks, tile_masks

Shapes = dict[str, tuple[int, ...]]

# --- the oracle: Python sorts pairs (score, place) -----------------------------------------------


def in_order(values: list[float]) -> list[int]:
    """Return indices by falling score; ties by index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def oracle_layer(values: list[float], k: int) -> set[int]:
    return set(in_order(values)[:k])


def oracle_global(values: Mapping[str, list[float]], k: int, floor: int) -> dict[str, set[int]]:
    """Keep the ``floor`` largest of every layer, then the largest of all others."""
    must = {name: oracle_layer(v, min(floor, len(v))) for name, v in values.items()}
    everything = [(name, i, x) for name, v in values.items() for i, x in enumerate(v)]
    rest = [(name, i, x) for name, i, x in everything if i not in must[name]]
    left = k - sum(map(len, must.values()))
    for index in in_order([x for _, _, x in rest])[:left]:
        must[rest[index][0]].add(rest[index][1])
    return must


def masks_of(places: Mapping[str, set[int]], shapes: Mapping[str, tuple[int, ...]]) -> Support:
    masks = {}
    for name, shape in shapes.items():
        mask = torch.zeros(math.prod(shape), dtype=torch.bool)
        mask[sorted(places[name])] = True
        masks[name] = mask.view(shape)
    return Support(masks)


def shapes_of(scores: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(t.shape) for name, t in scores.items()}


def listed(scores: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {name: t.flatten().tolist() for name, t in scores.items()}


def oracle_unstructured(pattern: Unstructured, scores: Mapping[str, Tensor]) -> Support:
    shapes, values = shapes_of(scores), listed(scores)
    own = {n: s for n in scores for glob, s in dict(pattern.overrides).items() if glob == n}
    rest = [name for name in scores if name not in own]
    sizes = {name: len(v) for name, v in values.items()}
    k = {n: max(kept(sizes[n], s), min(pattern.floor, sizes[n])) for n, s in own.items()}
    places = {}
    if pattern.scope == "global":
        total = kept(sum(sizes[n] for n in rest), pattern.sparsity)
        places = oracle_global({n: values[n] for n in rest}, total, pattern.floor)
    elif pattern.scope == "uniform":
        for n in rest:
            k[n] = max(kept(sizes[n], pattern.sparsity), min(pattern.floor, sizes[n]))
    else:
        k |= erk({n: shapes[n] for n in rest}, pattern.sparsity, pattern.floor)
    places |= {name: oracle_layer(values[name], count) for name, count in k.items()}
    return masks_of(places, shapes)


def oracle_nm(pattern: NM, scores: Mapping[str, Tensor]) -> Support:
    masks = {name: torch.zeros(t.shape, dtype=torch.bool) for name, t in scores.items()}
    for name, t in scores.items():
        kernel = itertools.product(*map(range, t.shape[2:]))
        for row, position in itertools.product(range(t.shape[0]), kernel):
            for first in range(0, t.shape[1], pattern.m):
                group = [float(t[(row, first + i, *position)]) for i in range(pattern.m)]
                for i in in_order(group)[: pattern.n]:
                    masks[name][(row, first + i, *position)] = True
    return Support(masks)


def oracle_tile(values: list[list[float]], n: int) -> tuple[tuple[int, ...], ...]:
    """Return the columns that each row keeps: of all matrices of 0 and 1, the best fitting one."""
    m = len(values)
    fitting = [
        rows
        for rows in itertools.product(itertools.combinations(range(m), n), repeat=m)
        if all(sum(column in row for row in rows) == n for column in range(m))
    ]

    def total(rows: tuple[tuple[int, ...], ...]) -> Fraction:
        return sum((Fraction(values[i][j]) for i, row in enumerate(rows) for j in row), Fraction())

    return max(fitting, key=total)  # max returns the first of several


def oracle_transposable(pattern: NM, scores: Mapping[str, Tensor]) -> Support:
    n, m = pattern.n, pattern.m
    masks = {name: torch.zeros(t.shape, dtype=torch.bool) for name, t in scores.items()}
    for name, t in scores.items():
        kernel = list(itertools.product(*map(range, t.shape[2:])))
        corners = itertools.product(range(0, t.shape[0], m), range(0, t.shape[1], m), kernel)
        for row, column, position in corners:
            at = [[(row + i, column + j, *position) for j in range(m)] for i in range(m)]
            kept = oracle_tile([[float(t[place]) for place in line] for line in at], n)
            for i, columns in enumerate(kept):
                for j in columns:
                    masks[name][at[i][j]] = True
    return Support(masks)


def oracle_block(pattern: Block, scores: Mapping[str, Tensor]) -> Support:
    """Sum every block by hand, then rank blocks as if they were weights."""
    rows, columns = pattern.shape
    sums = {}
    for name, t in scores.items():
        s = torch.zeros(t.shape[0] // rows, t.shape[1] // columns, *t.shape[2:], dtype=t.dtype)
        for i, j in itertools.product(range(s.shape[0]), range(s.shape[1])):
            for r, c in itertools.product(range(rows), range(columns)):
                s[i, j] += t[i * rows + r, j * columns + c]
        sums[name] = s
    inner = oracle_unstructured(
        Unstructured(pattern.sparsity, pattern.scope, floor=pattern.floor), sums
    )
    masks = {}
    for name, mask in inner.items():
        whole = torch.zeros(scores[name].shape, dtype=torch.bool)
        for i, j in itertools.product(range(mask.shape[0]), range(mask.shape[1])):
            for r, c in itertools.product(range(rows), range(columns)):
                whole[i * rows + r, j * columns + c] = mask[i, j]
        masks[name] = whole
    return Support(masks)


# --- drawn scores --------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FILLS: dict[str, Callable[[torch.Generator, tuple[int, ...]], Tensor]] = {
    "random": lambda g, shape: torch.randn(shape, generator=g, dtype=torch.float64),
    "constant": lambda g, shape: torch.full(shape, 0.5, dtype=torch.float64),
    "tied": lambda g, shape: torch.randint(0, 3, shape, generator=g).double() / 4,
    "zero": lambda g, shape: torch.zeros(shape, dtype=torch.float64),
    "signed zeros": lambda g, shape: (
        torch.zeros(shape, dtype=torch.float64)
        * torch.randint(0, 2, shape, generator=g).double().sub(0.5)
    ),
    "infinite": lambda g, shape: torch.where(
        torch.rand(shape, generator=g) < 0.3,
        math.inf * torch.randint(0, 2, shape, generator=g).double().sub(0.5),
        torch.randn(shape, generator=g, dtype=torch.float64),
    ),
    "tiny": lambda g, shape: torch.randint(-3, 4, shape, generator=g).double() * 5e-45,
    "close": lambda g, shape: 1 + torch.randint(-9, 9, shape, generator=g).double() * 2.0**-22,
}


@st.composite
def scores(draw: st.DrawFn, sizes: st.SearchStrategy[int]) -> dict[str, Tensor]:
    """Draw one to four layers; their types may differ."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    layers = {}
    for i in range(draw(st.integers(1, 4))):
        kernel = draw(st.sampled_from([(), (1,), (3,), (2, 2), (1, 1)]))
        shape = (draw(sizes), draw(sizes), *kernel)
        fill = FILLS[draw(st.sampled_from(list(FILLS)))]
        layers[f"layer{i}"] = fill(generator, shape).to(draw(st.sampled_from(DTYPES)))
    return layers


SPARSITY = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99])
SCOPE = st.sampled_from(["global", "uniform", "erk"])


@settings(max_examples=200, deadline=None)
@given(scores(st.integers(1, 6)), SPARSITY, SCOPE, st.integers(0, 3), st.booleans())
def test_unstructured_is_what_sorting_gives(
    drawn: dict[str, Tensor], sparsity: float, scope: str, floor: int, override: bool
) -> None:
    overrides = {"layer0": 0.5} if override else {}
    pattern = Unstructured(sparsity, scope, overrides, floor)  # type: ignore[arg-type]
    shapes = shapes_of(drawn)
    rest = [math.prod(s) for n, s in shapes.items() if not (override and n == "layer0")]
    least = sum(min(floor, n) for n in rest)
    if scope != "uniform" and kept(sum(rest), sparsity) < least:
        for call in (lambda: pattern.select(drawn), lambda: pattern.total(shapes)):
            with pytest.raises(InputError, match=f"the floor asks for {least}"):
                call()
        return
    support = pattern.select(drawn)
    assert support == oracle_unstructured(pattern, drawn)
    assert support.nnz == pattern.total(shapes)
    assert pattern.counts(shapes) in (None, support.counts())
    assert all(n >= min(floor, math.prod(shapes[k])) for k, n in support.counts().items())
    if scope == "global" and not override:  # (A3, A22): neither ties nor a threshold cost a weight
        assert support.nnz == kept(support.numel, sparsity)


@settings(max_examples=60, deadline=None)
@given(scores(st.sampled_from([4, 8])), st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2)]))
def test_n_of_m_is_what_a_loop_over_groups_gives(
    drawn: dict[str, Tensor], nm: tuple[int, int]
) -> None:
    pattern = NM(*nm)
    support = pattern.select(drawn)
    assert support == oracle_nm(pattern, drawn)
    assert support.counts() == pattern.counts(shapes_of(drawn))
    assert support.nnz == pattern.total(shapes_of(drawn)) == support.numel * nm[0] // nm[1]


@settings(max_examples=60, deadline=None)
@given(
    scores(st.sampled_from([4, 8])),
    st.sampled_from([(4, 1), (1, 4), (2, 2), (4, 4)]),
    st.sampled_from([0.0, 0.25, 0.5, 0.75]),
    SCOPE,
)
def test_blocks_are_what_a_loop_gives(
    drawn: dict[str, Tensor], shape: tuple[int, int], sparsity: float, scope: str
) -> None:
    # Halves and eighths: sums are exact in any order, whatever the type.
    drawn = {n: (t.double().clamp(-4, 4) * 8).round().to(t.dtype) / 8 for n, t in drawn.items()}
    pattern = Block(shape, sparsity, scope, floor=0)  # type: ignore[arg-type]
    support = pattern.select(drawn)
    assert support == oracle_block(pattern, drawn)
    assert support.nnz == pattern.total(shapes_of(drawn))
    assert pattern.counts(shapes_of(drawn)) in (None, support.counts())


@settings(max_examples=25, deadline=None)
@given(
    scores(st.sampled_from([4, 8])),
    st.sampled_from([(2, 4), (2, 4), (1, 4), (3, 4), (1, 2)]),
)
def test_transposable_tiles_are_the_best_of_all(
    drawn: dict[str, Tensor], nm: tuple[int, int]
) -> None:
    # Sixteenths: the oracle's fractions and sums of doubles are equal.
    drawn = {n: (t.double().clamp(-4, 4) * 16).round().to(t.dtype) / 16 for n, t in drawn.items()}
    pattern = NM(*nm, transposable=True)
    support = pattern.select(drawn)
    assert support == oracle_transposable(pattern, drawn)
    assert support.counts() == pattern.counts(shapes_of(drawn))
    assert support.nnz == pattern.total(shapes_of(drawn)) == support.numel * nm[0] // nm[1]
    for mask in support.values():
        for channels in (0, 1):
            groups = mask.movedim(channels, -1).unflatten(-1, (-1, nm[1]))
            assert (groups.sum(-1) == nm[0]).all()


EVERY = [
    Unstructured(0.7),
    Unstructured(0.7, "uniform"),
    Unstructured(0.7, "erk"),
    NM(2, 4),
    NM(2, 4, transposable=True),
    Block((4, 1), 0.5),
    Block((2, 2), 0.5, "erk"),
]


@settings(max_examples=60, deadline=None)
@given(scores(st.sampled_from([4, 8])), st.sampled_from(EVERY))
def test_select_is_idempotent(drawn: dict[str, Tensor], pattern: Pattern) -> None:
    # Ranking the projected weights again, as the next compression would if nothing had moved.
    weights = {n: t.abs().nan_to_num(posinf=1.0) for n, t in drawn.items()}
    weights = {n: (t * 16).round() / 16 for n, t in weights.items()}  # exact sums for the blocks
    support = pattern.select(weights)
    projected = {n: t.masked_fill(~support[n], 0) for n, t in weights.items()}
    assert pattern.select(projected) == support
    assert pattern.select(weights) == support


# --- ties, types, strides, threads ---------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "uniform", "erk"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.9, 0.99])
def test_equal_scores_keep_exactly_the_first(
    scope: str, dtype: torch.dtype, sparsity: float
) -> None:
    # (A3) A strict ">" against the k-th value drops every tie: 100 equal values at 90 % keep 0.
    support = Unstructured(sparsity, scope).select({"w": torch.ones(10, 10, dtype=dtype)})  # type: ignore[arg-type]
    k = kept(100, sparsity)
    assert support["w"].flatten().tolist() == [i < k for i in range(100)]


def test_ties_across_layers_go_to_the_earlier_layer() -> None:
    ties = {"b": torch.ones(2, 3), "a": torch.ones(2, 3)}
    assert Unstructured(0.5).select(ties).counts() == {"b": 5, "a": 1}  # one each by the floor
    assert Unstructured(0.5, floor=0).select(ties).counts() == {"b": 6, "a": 0}


def test_one_element_and_signed_zeros() -> None:
    assert Unstructured(0.4).select({"w": torch.zeros(1, 1)}).nnz == 1
    zeros = {"w": torch.tensor([[-0.0, 0.0, -0.0, 0.0]])}  # equal, so by place
    for pattern in (Unstructured(0.5), NM(2, 4)):
        assert pattern.select(zeros)["w"].tolist() == [[True, True, False, False]]


def test_neighbouring_floats_are_told_apart() -> None:
    for dtype, step in ((torch.float32, 2.0**-24), (torch.float64, 2.0**-53)):
        w = torch.tensor([[1 - step, 1.0, 1 - 2 * step, 1.0]], dtype=dtype)
        assert Unstructured(0.25).select({"w": w})["w"].tolist() == [[True, True, False, True]]
    wide = torch.full((1, 2), 1.0 + 2.0**-40, dtype=torch.float64)  # beyond float32
    narrow = torch.ones(1, 2)
    assert Unstructured(0.5, floor=0).select({"a": narrow, "b": wide}).counts() == {"a": 0, "b": 2}


def test_the_place_is_that_of_the_logical_index_whatever_the_strides() -> None:
    w = torch.randint(0, 3, (8, 8, 3, 3)).float()
    for pattern in EVERY:
        expected = pattern.select({"w": w})
        assert pattern.select({"w": w.to(memory_format=torch.channels_last)}) == expected
        transposed = w.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
        assert pattern.select({"w": transposed}) == expected


def test_more_weights_than_one_chunk() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-50, 50, (1100, 1000), generator=generator).float()
    w[0, :5] = torch.tensor([1e-3, -1e-3, 7e30, -7e30, 49.5])
    support = Unstructured(0.9).select({"w": w})
    largest = torch.sort(w.flatten(), descending=True, stable=True).indices[: kept(w.numel(), 0.9)]
    expected = torch.zeros(w.numel(), dtype=torch.bool).index_fill_(0, largest, True)
    assert torch.equal(support["w"].flatten(), expected)


def test_one_thread_and_two_select_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(256, 256, generator=generator)
    layers = {"a": w, "b": (w.t() * 8).round() / 8, "c": w.to(torch.bfloat16)}
    patterns = [*EVERY, Block((32, 32), 0.5), Block((1, 256), 0.5), Block((256, 1), 0.5)]
    threads = torch.get_num_threads()
    try:
        digests = []
        for n in (1, 2):
            torch.set_num_threads(n)
            digests.append([pattern.select(layers).digest() for pattern in patterns])
    finally:
        torch.set_num_threads(threads)
    assert digests[0] == digests[1]


@pytest.mark.parametrize("pattern", [*EVERY, Unstructured(0.0), Unstructured(0.9, floor=0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("negative", [False, True])
def test_nan_is_refused_by_name(pattern: Pattern, dtype: torch.dtype, negative: bool) -> None:
    bad = torch.ones(8, 8, dtype=dtype)
    bad[3, 3] = -math.nan if negative else math.nan
    layers = {"good": torch.ones(8, 8, dtype=dtype), "bad": bad}
    with pytest.raises(InputError, match=r"'bad' holds NaN.*diverged: lower the learning rate"):
        pattern.select(layers)


# --- memory --------------------------------------------------------------------------------------


class Counting(Scores):
    """Scores that count how many of their tensors are still alive."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes, self._compute)
        self.handed: list[StorageWeakRef] = []
        self.peak = 0

    def _compute(self, name: str) -> Tensor:
        tensor = torch.rand(self.shapes[name], generator=torch.Generator().manual_seed(len(name)))
        self.handed = [ref for ref in self.handed if not ref.expired()]
        self.handed.append(StorageWeakRef(tensor.untyped_storage()))
        self.peak = max(self.peak, len(self.handed))
        return tensor


@pytest.mark.parametrize("pattern", EVERY)
def test_no_second_copy_of_all_weights(pattern: Pattern) -> None:
    counting = Counting({f"layer{i}": (8, 8, 3, 3) for i in range(20)})
    support = pattern.select(counting)
    assert support.nnz == pattern.total(counting.shapes)
    assert 1 <= counting.peak <= 2


# --- published counts ----------------------------------------------------------------------------


@cache
def network_shapes(spec: Model) -> Shapes:
    return {n: tuple(p.shape) for n, p in Layers().select(spec.build()).items()}


def without(shapes: Shapes, *names: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name not in names}


RESNET50 = ResNet50()


@pytest.mark.parametrize(
    ("spec", "left_out", "counts"),
    [
        (
            RESNET50,
            (),
            {0.5: 12_751_456, 0.8: 5_100_582, 0.9: 2_550_291, 0.95: 1_275_146, 0.98: 510_058},
        ),
        (
            RESNET50,
            ("conv1.weight", "fc.weight"),
            {0.8: 4_689_101, 0.9: 2_344_550, 0.95: 1_172_275, 0.98: 468_910},
        ),
        (MobileNetV1(), (), {0.75: 1_052_272, 0.9: 420_909}),
        (
            WideResNet(),
            (),
            {0.5: 18_259_416, 0.75: 9_129_708, 0.9: 3_651_883, 0.95: 1_825_942},
        ),
        (CifarResNet(), (), {0.5: 135_448}),
    ],
)
def test_published_counts_of_the_global_scope(
    spec: Model, left_out: tuple[str, ...], counts: dict[float, int]
) -> None:
    shapes = without(network_shapes(spec), *left_out)
    for sparsity, count in counts.items():
        assert Unstructured(sparsity).total(shapes) == count


def test_published_counts_of_the_uniform_scope_and_of_2_of_4() -> None:
    shapes = network_shapes(RESNET50)
    inner = without(shapes, "conv1.weight", "fc.weight")
    for sparsity, count in {0.9: 2_344_548, 0.95: 1_172_274}.items():
        assert Unstructured(sparsity, "uniform").total(inner) == count
    refused = {n for n, shape in shapes.items() if NM(2, 4).refuses(n, shape)}
    assert refused == {"conv1.weight"}  # three inputs
    assert NM(2, 4).total(without(shapes, "conv1.weight")) + 9_408 == 12_756_160


def test_a_network_of_published_size_keeps_its_published_count() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = network_shapes(MobileNetV1())
    weights = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    support = Unstructured(0.9).select(score.magnitude(weights))
    assert (support.nnz, support.numel) == (420_909, 4_209_088)
    smallest = min(float(w[support[n]].abs().min()) for n, w in weights.items())
    largest = max(float(w[~support[n]].abs().max()) for n, w in weights.items())
    assert smallest >= largest


# --- ERK -----------------------------------------------------------------------------------------


def rigl_recipe(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Return the densities by the RigL authors' rule, with the authors' solver."""
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        sparse = [name for name in shapes if name not in dense]
        ones = sum(size[n] - math.floor(sparsity * size[n]) for n in sparse)
        zeros = sum(math.floor(sparsity * size[n]) for n in dense)
        eps = (ones - zeros) / sum(raw[n] * size[n] for n in sparse)
        top = max(raw[n] for n in sparse)
        if eps * top <= 1:
            return {name: 1.0 if name in dense else eps * raw[name] for name in shapes}
        dense |= {n for n in sparse if raw[n] == top}


@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95, 0.965, 0.98, 0.99])
def test_erk_total_is_exact_and_near_the_published_recipe(sparsity: float) -> None:
    # (A6) Densities that are clipped and not redistributed miss the target.
    shapes = network_shapes(RESNET50)
    counts = erk(shapes, sparsity)
    assert sum(counts.values()) == kept(25_502_912, sparsity)
    for name, density in rigl_recipe(shapes, sparsity).items():
        numel = math.prod(shapes[name])
        assert 0 < counts[name] <= numel
        assert abs(counts[name] - round(density * numel)) <= 2, name


def test_erk_densities_of_resnet50() -> None:
    shapes = network_shapes(RESNET50)

    def density(sparsity: float) -> dict[str, float]:
        counts = Unstructured(sparsity, "erk").counts(shapes)
        assert counts is not None
        return {n.removesuffix(".weight"): counts[n] / math.prod(shapes[n]) for n in shapes}

    def dense(densities: dict[str, float]) -> set[str]:
        return {name for name, d in densities.items() if d == 1}

    at90 = density(0.9)
    assert dense(at90) == {"layer1.0.conv1"}
    expected = {
        "conv1": 0.420,
        "layer1.0.conv2": 0.177,
        "layer2.0.conv2": 0.087,
        "layer3.1.conv2": 0.043,
        "layer4.2.conv2": 0.021,
        "layer4.2.conv3": 0.119,
        "fc": 0.073,
    }
    assert {name: round(at90[name], 3) for name in expected} == expected
    block = "layer1.{}.{}".format
    assert dense(density(0.8)) == {
        *(block(0, name) for name in ("conv1", "conv3", "downsample.0")),
        *(block(i, name) for i in (1, 2) for name in ("conv1", "conv3")),
        "layer2.0.conv1",
    }
    for sparsity in (0.95, 0.965, 0.98):
        assert dense(density(sparsity)) == set()


def test_erk_where_a_layer_is_dense_until_the_floors_of_others_take_its_share() -> None:
    shapes: Shapes = {"wide": (1, 100), "a": (10, 10), "b": (10, 10)}
    assert erk(shapes, 0.5, floor=20) == {"wide": 100, "a": 25, "b": 25}
    assert erk(shapes, 0.5, floor=40) == {"wide": 70, "a": 40, "b": 40}
    assert erk(shapes, 0.5, floor=50) == {"wide": 50, "a": 50, "b": 50}


def bounded(shapes: Shapes, total: int, least: dict[str, int]) -> dict[str, float]:
    """Return eps·sum(dims), clipped to floor and size, with the eps that gives ``total``."""
    size = {n: math.prod(s) for n, s in shapes.items()}

    def at(eps: float) -> dict[str, float]:
        return {n: min(max(eps * sum(s), least[n]), size[n]) for n, s in shapes.items()}

    low, high = 0.0, float(max(size.values()))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle).values()) < total else (low, middle)
    return at(high)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(1, 40), st.integers(1, 40)),
            st.tuples(st.just(1), st.integers(50, 150)),
            st.tuples(st.integers(1, 12), st.integers(1, 12), st.just(3), st.just(3)),
        ),
        min_size=1,
        max_size=6,
    ),
    SPARSITY,
    st.integers(0, 60),
)
def test_erk_meets_total_sizes_and_floors(
    drawn: list[tuple[int, ...]], sparsity: float, floor: int
) -> None:
    shapes: Shapes = {f"layer{i}": shape for i, shape in enumerate(drawn)}
    size = {n: math.prod(s) for n, s in shapes.items()}
    least = {n: min(floor, size[n]) for n in shapes}
    total = kept(sum(size.values()), sparsity)
    if total < sum(least.values()):
        with pytest.raises(InputError, match="the floor asks for"):
            erk(shapes, sparsity, floor)
        return
    counts = erk(shapes, sparsity, floor)
    assert list(counts) == list(shapes)
    assert sum(counts.values()) == total
    for name, share in bounded(shapes, total, least).items():
        assert least[name] <= counts[name] <= size[name]
        assert abs(counts[name] - share) < 1 + 1e-6


# --- N:M and blocks where they do not fit -------------------------------------------------------


def test_groups_run_along_the_inputs_of_one_output_channel() -> None:
    # (A5) Groups over the flattened tensor cross pixels and filters where inputs are not a multiple
    # of four. Here every group holds one large weight, so each must keep it.
    w = torch.zeros(3, 8, 3, 3)
    w[:, 0::4] = 5.0
    w[:, 1::4] = 1.0
    mask = NM(2, 4).select({"w": w})["w"]
    assert torch.equal(mask, w > 0)
    # Rows that differ by orders of magnitude still keep half of their weights each.
    rows = torch.randn(6, 4, 1, 1) * torch.tensor([1e6, 1e-6, 1, 1e3, 1e-3, 0]).view(6, 1, 1, 1)
    assert NM(2, 4).select({"w": rows.abs()})["w"].flatten(1).sum(1).tolist() == [2] * 6
    columns = torch.randn(4, 8) * torch.tensor([1e6] * 4 + [1e-6] * 4)
    mask = NM(2, 4).select({"w": columns.abs()})["w"]
    assert mask[:, :4].sum(1).tolist() == mask[:, 4:].sum(1).tolist() == [2] * 4


class Odd(nn.Module):
    """Layers that the pattern's groups do not divide, and one that they divide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Linear(8, 6)
        self.odd = nn.Linear(6, 4)


def test_tiles_have_all_masks_and_ties_go_to_the_first() -> None:
    counts = {nm: len(tile_masks(*nm)) for nm in ((1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4))}
    assert counts == {(1, 2): 2, (1, 3): 6, (2, 3): 6, (1, 4): 24, (2, 4): 90, (3, 4): 24}
    masks = tile_masks(2, 4)
    texts = ["".join("01"[kept] for kept in mask.flatten().tolist()) for mask in masks]
    assert texts == sorted(set(texts), reverse=True)
    assert texts[0] == "1100110000110011"
    equal = NM(2, 4, transposable=True).select({"w": torch.ones(8, 4)})["w"]
    assert torch.equal(equal, masks[0].repeat(2, 1))
    # Each mask is the best for scores of its own; of several that are equally good, the first.
    assert torch.equal(best_masks(masks.double(), 2, 4), masks)
    either = masks[17] | masks[80]
    inside = [mask for mask in masks if torch.equal(mask & either, mask)]
    assert len(inside) > 1
    assert torch.equal(best_masks(either.float()[None], 2, 4)[0], inside[0])


def test_tiles_are_chosen_by_exact_sums() -> None:
    # In float32 every sum with 2^24 is the same, and the first mask of those would win.
    tile = torch.zeros(4, 4)
    tile[0, 0], tile[3, 1] = 2.0**24, 1.0
    mask = NM(2, 4, transposable=True).select({"w": tile})["w"]
    assert mask[0, 0]
    assert mask[3, 1]
    doubles = torch.rand(8, 8, dtype=torch.float64)
    close = doubles.float().double() + torch.linspace(0, 1e-9, 64, dtype=torch.float64).view(8, 8)
    pattern = NM(2, 4, transposable=True)
    assert pattern.select({"w": close}) == oracle_transposable(pattern, {"w": close})
    # Infinite scores count before all others, and huge ones do not overflow.
    for large in (math.inf, torch.finfo(torch.float64).max):
        tile = torch.rand(4, 4, dtype=torch.float64)
        tile[1, 2] = tile[2, 3] = large
        mask = pattern.select({"w": tile})["w"]
        assert mask[1, 2]
        assert mask[2, 3]
    tile = torch.full((4, 4), math.inf)
    tile[0, 0] = -math.inf
    assert not pattern.select({"w": tile})["w"][0, 0]


def test_transposable_is_close_to_the_best_and_the_text_of_nm_is_as_before() -> None:
    # A saved state names the pattern by this text.
    assert repr(NM(2, 4)) == str(NM()) == "NM(n=2, m=4)"
    assert repr(NM(1, 4, transposable=True)) == "NM(n=1, m=4, transposable=True)"
    assert NM(2, 4) != NM(2, 4, transposable=True)
    weights = {"w": torch.rand(64, 64)}
    both, rows = (NM(2, 4, transposable=t).select(weights)["w"] for t in (True, False))
    share = weights["w"][both].sum() / weights["w"][rows].sum()
    assert 0.9 < share < 1


@pytest.mark.parametrize("kind", [ACDC, SRSTE])
def test_networks_are_trained_in_tiles(kind: type[ACDC] | type[SRSTE]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=1), nn.Flatten(), nn.Linear(8 * 4, 12))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = constant("sparse", 1).resolve(4)
    sparsifier = Sparsifier(kind(NM(2, 4, transposable=True), schedule), model, optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(2, 4, 4, 4)).square().sum().backward()
        optimizer.step()
    assert list(sparsifier.support) == ["0.weight", "2.weight"]
    for name, mask in sparsifier.support.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight != 0, mask)
        for axis in (0, 1):
            assert (mask.movedim(axis, -1).unflatten(-1, (-1, 4)).sum(-1) == 2).all()


def test_transposable_layers_must_divide_both_ways() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good = nn.Conv2d(8, 12, 3, groups=2)  # 12 outputs, but 6 of each group
            self.fine = nn.Conv2d(8, 8, 3, groups=2)
            self.up = nn.ConvTranspose2d(8, 12, 2, groups=2)
            self.rnn = nn.LSTM(8, 6)
            self.head = nn.Linear(8, 6)
            self.odd = nn.Linear(6, 8)

    pattern = NM(2, 4, transposable=True)
    params, why = choose(Both(), pattern, Layers(types=("conv", "linear", "rnn")))
    assert list(params) == ["fine.weight"]
    assert why["good.weight"] == "its 6 outputs do not divide into tiles of 4"
    assert why["up.weight"] == "its 6 outputs do not divide into tiles of 4"
    assert why["rnn.weight_ih_l0"] == "its 6 outputs do not divide into tiles of 4"
    assert why["head.weight"] == "its 6 outputs do not divide into tiles of 4"
    assert why["odd.weight"] == "its 6 inputs do not divide into groups of 4"
    with pytest.raises(InputError, match=r"layer 'w' cannot be 2:4: its 6 outputs do not divide"):
        pattern.select({"w": torch.ones(6, 8)})
    with pytest.raises(InputError, match="The score of 'w' holds NaN"):
        pattern.select({"w": torch.full((4, 4), math.nan)})


def test_layers_that_do_not_divide_stay_dense_and_are_reported() -> None:
    model = Odd()
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = ACDC(NM(2, 4), constant("sparse", 1).resolve(5))
    sparsifier = Sparsifier(method, model, optimizer)
    assert sparsifier.refused == {
        "stem.weight": "its 3 inputs do not divide into groups of 4",
        "depthwise.weight": "its 1 inputs do not divide into groups of 4",
        "odd.weight": "its 6 inputs do not divide into groups of 4",
    }
    assert sparsifier.support.counts() == {"grouped.weight": 144, "head.weight": 24}
    for name in sparsifier.refused:
        assert torch.equal(model.get_parameter(name), before.get_parameter(name))

    params, refused = choose(Odd(), Block((4, 2), 0.5), None)
    assert list(params) == ["grouped.weight", "odd.weight"]
    assert refused["stem.weight"] == "its 8 x 3 channels do not divide into 4 x 2"
    assert set(refused) == {"stem.weight", "depthwise.weight", "head.weight"}


def test_what_does_not_divide_is_refused_by_select() -> None:
    with pytest.raises(InputError, match="layer 'w' cannot be 2:4: its 6 inputs"):
        NM(2, 4).select({"w": torch.ones(4, 6)})
    with pytest.raises(InputError, match="layer 'w' cannot be pruned in blocks: its 4 x 6"):
        Block((4, 4)).select({"w": torch.ones(4, 6)})
    with pytest.raises(InputError, match=r"refuses every chosen layer .*0\.weight: its 3 inputs"):
        choose(nn.Sequential(nn.Linear(3, 4)), NM(2, 4), None)


# --- overrides and the floor ---------------------------------------------------------------------


def test_an_override_is_for_the_layer_alone_and_the_first_match_counts() -> None:
    layers = {
        "stem.weight": torch.rand(10, 10),
        "body.0.weight": torch.rand(20, 10),
        "body.1.weight": torch.rand(20, 10),
        "head.weight": torch.rand(10, 10),
    }
    pattern = Unstructured(0.9, overrides=(("stem", 0.0), ("body.0", 0.25), ("body.*", 0.5)))
    support = pattern.select(layers)
    assert support.counts() == {
        "stem.weight": 100,
        "body.0.weight": 150,
        "body.1.weight": 100,
        "head.weight": 10,
    }
    assert pattern == Unstructured(
        0.9, overrides=(("stem", 0.0), ("body.0", 0.25), ("body.*", 0.5))
    )
    assert Unstructured(0.9, overrides={"stem": 0.5}) == Unstructured(
        0.9, overrides=(("stem", 0.5),)
    )
    for scope in ("uniform", "erk"):
        counts = Unstructured(0.9, scope, {"*.weight": 0.5}).counts(shapes_of(layers))  # type: ignore[arg-type]
        assert counts == {n: w.numel() // 2 for n, w in layers.items()}
    rest = Unstructured(0.9, "erk", {"stem": 0.0}).counts(shapes_of(layers))
    assert rest is not None
    assert sum(rest.values()) == 100 + kept(500, 0.9)


def test_an_override_that_matches_nothing_is_refused() -> None:
    pattern = Unstructured(0.9, overrides={"steam": 0.5})
    with pytest.raises(InputError, match=r"override for 'steam' matches no pruned layer.*: stem"):
        pattern.select({"stem.weight": torch.rand(3, 3)})


def test_no_layer_dies_silently() -> None:
    layers = {"small": torch.full((3, 3), 1e-9), "large": torch.rand(30, 30) + 1}
    assert Unstructured(0.9).select(layers).counts() == {"small": 1, "large": 90}
    assert Unstructured(0.9, floor=5).select(layers).counts() == {"small": 5, "large": 86}
    assert Unstructured(0.9, floor=20).select(layers).counts() == {"small": 9, "large": 82}
    assert Unstructured(0.9, floor=0).select(layers).counts() == {"small": 0, "large": 91}
    for scope in ("uniform", "erk"):
        assert Unstructured(0.99, scope).select(layers)["small"].sum() >= 1  # type: ignore[arg-type]


def test_a_request_below_the_floors_is_an_error_before_training() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    method = ACDC(Unstructured(0.99), phases(2, [("dense", "1ep"), ("sparse", "1ep")]).resolve(5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    sentence = "1 may be kept in all, but the floor asks for 5: at least 1 in each of 5 layers"
    with pytest.raises(InputError, match=sentence):
        Sparsifier(method, model, optimizer)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# --- arguments -----------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[], object], str]] = {
    "sparsity 1": (lambda: Unstructured(1.0), "sparsity is 1.0. It is the fraction of zeros"),
    "sparsity in percent": (lambda: Unstructured(90), "write 0.9 for 90 %"),
    "block sparsity": (lambda: Block((4, 1), -0.5), "sparsity is -0.5"),
    "scope": (lambda: Unstructured(0.5, "local"), "scope is 'local'. It is 'global', 'uniform'"),  # type: ignore[arg-type]
    "block scope": (lambda: Block(scope="local"), "scope is 'local'"),  # type: ignore[arg-type]
    "floor": (lambda: Unstructured(0.5, floor=-1), "floor is -1.*whole number from 0 up"),
    "block floor": (lambda: Block(floor=-1), "floor is -1.*whole number from 0 up"),
    "override": (
        lambda: Unstructured(0.5, overrides={"fc": 1.5}),
        "The override for 'fc' is 1.5",
    ),
    "overrides of the wrong form": (
        lambda: Unstructured(0.5, overrides=("fc", 0.5)),  # type: ignore[arg-type]
        r"overrides is \('fc', 0.5\).*pairs of a glob and a sparsity",
    ),
    "4 of 4": (lambda: NM(4, 4), r"NM\(4, 4\) is no pattern.*1 <= n < m, such as NM\(2, 4\)"),
    "0 of 4": (lambda: NM(0, 4), r"NM\(0, 4\)"),
    "tiles of eight": (
        lambda: NM(4, 8, transposable=True),
        r"NM\(4, 8, transposable=True\) has tiles of 8 x 8.*m is at most 4",
    ),
    "transposable": (lambda: NM(2, 4, "yes"), "transposable is 'yes'. It is True or False"),  # type: ignore[arg-type]
    "half": (lambda: NM(0.5, 4), r"NM\(0.5, 4\)"),  # type: ignore[arg-type]
    "block of zero": (lambda: Block((0, 1)), r"shape=\(0, 1\).*whole numbers from 1 up"),
    "block of three": (lambda: Block((1, 1, 1)), r"shape=\(1, 1, 1\)"),  # type: ignore[arg-type]
    "type of layer": (lambda: Layers(types=("convolution",)), "holds 'convolution'. The kinds"),
    "one name": (
        lambda: Layers(include="layer1"),  # type: ignore[arg-type]
        r"include is 'layer1'.*tuple of names.*\('layer1',\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_at_construction(case: str) -> None:
    call, sentence = BAD[case]
    with pytest.raises(InputError, match=sentence):
        call()


# --- which layers --------------------------------------------------------------------------------


class Mixed(nn.Module):
    """One module of every kind that has a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.stem = nn.Conv1d(4, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.body = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.Conv3d(4, 4, 1), nn.Linear(4, 4)])
        self.layer_norm = nn.LayerNorm(4)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.body[2].weight
        self.head = nn.Linear(4, 2)


def chosen(**fields: object) -> list[str]:
    names = Layers(**fields).select(Mixed())  # type: ignore[arg-type]
    return [name.removesuffix(".weight") for name in names]


def test_layers_by_type_name_and_place() -> None:
    everything = ["stem", "body.0", "body.1", "body.2", "up", "head"]
    assert chosen() == everything  # never a bias, a norm, an embedding; a shared weight once
    assert chosen(types=("conv",)) == ["stem", "body.0", "body.1", "up"]
    assert chosen(types=("linear",)) == ["body.2", "head"]
    assert chosen(include=("body.*",)) == ["body.0", "body.1", "body.2"]
    assert chosen(include=("stem", "head.weight")) == ["stem", "head"]
    assert chosen(exclude=("body.[01]",)) == ["stem", "body.2", "up", "head"]
    assert chosen(skip_first=True, skip_last=True) == ["body.0", "body.1", "body.2", "up"]


def test_defaults_are_the_papers() -> None:
    model = Mixed()
    whole = Layers().select(model)
    inner = Layers(skip_first=True, skip_last=True).select(model)
    for pattern, expected in (
        (Unstructured(0.9), whole),
        (Unstructured(0.9, "erk"), whole),
        (Unstructured(0.9, "uniform"), inner),
        (Block((4, 1), 0.5), whole),
        (Block((4, 1), 0.5, "uniform"), inner),
        (NM(2, 4), whole),
    ):
        assert list(pattern.default_layers().select(model)) == list(expected)


def test_frozen_layers_are_left_alone() -> None:
    model = Mixed()
    model.body[0].weight.requires_grad_(False)
    assert "body.0.weight" not in Layers().select(model)


def test_layer_choices_that_cannot_be_met() -> None:
    with pytest.raises(InputError, match=r"No layer is called 'boddy\.\*'.* are: stem, body.0"):
        chosen(include=("boddy.*",))
    with pytest.raises(InputError, match="No layer is called 'norm'"):
        chosen(exclude=("norm",))
    with pytest.raises(InputError, match=r"Nothing to prune: .*stem.weight: the first layer"):
        chosen(include=("stem",), skip_first=True)
    with pytest.raises(InputError, match="no parameter of two dimensions or more"):
        Layers().select(nn.BatchNorm1d(3))
    with pytest.raises(InputError, match=r"1\.weight: an embedding"):
        Layers().select(nn.Sequential(nn.BatchNorm1d(3), nn.Embedding(2, 2)))
    frozen = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)
    with pytest.raises(InputError, match="frozen: it requires no gradient"):
        Layers().select(frozen)


# --- scores --------------------------------------------------------------------------------------


def with_gradients() -> Iterator[tuple[str, nn.Parameter]]:
    model = nn.Linear(4, 3, bias=False)
    model(torch.ones(1, 4)).square().sum().backward()
    yield from model.named_parameters()


def test_scores_are_lazy_and_exact() -> None:
    params = dict(with_gradients())
    w = params["weight"]
    assert w.grad is not None
    assert torch.equal(score.magnitude(params)["weight"], w.abs())
    assert torch.equal(score.gradient(params)["weight"], w.grad.abs())
    assert torch.equal(score.saliency(params)["weight"], (w * w.grad).abs())
    assert not score.saliency(params)["weight"].requires_grad
    assert score.magnitude({"w": torch.ones(2, dtype=torch.float64)}).dtype == torch.float64
    with pytest.raises(KeyError):
        score.magnitude(params)["other"]
    w.grad = None
    with pytest.raises(InputError, match=r"shape \(3, 4\) has no gradient. Run a backward pass"):
        score.gradient(params)["weight"]


def test_random_scores_follow_seed_and_place_and_leave_the_global_generator_alone() -> None:
    params = {"a": torch.empty(5, 5), "b": torch.empty(5, 5)}
    state = torch.get_rng_state()
    first = score.random(params, 0)
    assert torch.equal(first["a"], first["a"])
    assert torch.equal(first["a"], score.random(params, 0)["a"])
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], score.random(params, 1)["a"])
    assert torch.equal(torch.get_rng_state(), state)
