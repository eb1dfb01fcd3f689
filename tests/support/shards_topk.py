"""The masks of sharded scores are those of one process, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from acdc.errors import InputError
from acdc.pattern import NM, Block, Pattern, Unstructured
from acdc.score import Scores, random
from acdc.shape import Shape
from acdc.shards import counts, cuts
from acdc.support import Support
from acdc.topk import largest
from support.shards import mesh, on, placed

# 7 and 1 rows do not divide, and leave ranks without any.
SIZES = {"conv": (7, 4, 3, 3), "narrow": (1, 30), "tall": (64, 5), "wide": (8, 16)}
GROUPED = {"conv": (8, 16, 3, 3), "tall": (64, 8), "wide": (16, 16)}


def layouts(every: bool = True) -> Iterator[tuple[dist.DeviceMesh, tuple[object, ...]]]:
    """Yield meshes of all ranks, each with placements."""
    world = dist.get_world_size()
    yield mesh(world), (Shard(0),)
    yield mesh(world), (Shard(1),)
    if world == 4:
        both = mesh(2, 2)
        yield both, (Replicate(), Shard(0))
        if every:
            yield both, (Shard(0), Shard(1))
            yield both, (Shard(0), Shard(0))
        yield both, (_StridedShard(0, split_factor=2), Shard(0))  # FSDP around tensor parallelism


def scores(sizes: dict[str, tuple[int, ...]], kind: str) -> dict[str, Tensor]:
    """Return scores: with many ties, with few, all the same, or of double precision."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, shape in sizes.items():
        values = torch.randn(shape, generator=generator)
        if kind == "tied":
            values = (2 * values).round() / 2
        elif kind == "equal":
            values = torch.ones(shape)
        elif kind == "double":
            values = 1 + values.double() * 1e-12
        found[name] = values
    return found


def whole(masks: Support) -> Support:
    return Support({name: mask.full_tensor() for name, mask in masks.items()})


def check(pattern: Pattern, full: dict[str, Tensor], every: bool = False) -> None:
    expected = pattern.select(full)
    for over, placements in layouts(every):
        sharded = {name: placed(value, over, *placements) for name, value in full.items()}
        found = pattern.select(sharded)
        assert whole(found) == expected, (pattern, placements)
        assert found.counts() == expected.counts()
        assert found.numel == expected.numel
        assert found.digest() == expected.digest()
        assert all(mask.placements == tuple(placements) for mask in found.values())


PATTERNS = (
    Unstructured(0.8),
    Unstructured(0.95, floor=9),
    Unstructured(0.6, "uniform"),
    Unstructured(0.7, "erk", overrides={"wide": 0.25}),
)


@on(2, 4)
def single_weights() -> None:
    pairs = list(zip(("few", "equal", "double", "tied"), PATTERNS, strict=True))
    for kind, pattern in pairs if dist.get_world_size() == 2 else pairs[1::2]:
        check(pattern, scores(SIZES, kind))


@on(4, long=True)
def single_weights_of_every_kind() -> None:
    for kind in ("few", "equal", "double", "tied"):
        for pattern in PATTERNS:
            check(pattern, scores(SIZES, kind), every=True)


@on(2, 4)
def few_and_many() -> None:
    full = scores({"a": (3, 5), "b": (2, 4)}, "tied")
    for over, placements in layouts(every=False):
        sharded = {name: placed(value, over, *placements) for name, value in full.items()}
        for k in (0, 1, 14, 22):
            found, expected = largest(Scores.of(sharded), k), largest(Scores.of(full), k)
            for name, mask in expected.items():
                assert torch.equal(found[name].full_tensor(), mask), (k, name, placements)


def groups_and_blocks() -> None:
    for kind in ("few", "tied", "equal"):
        full = scores(GROUPED, kind)
        check(NM(2, 4), {n: v for n, v in full.items() if n != "tall"})
        check(NM(1, 2), full)
        check(NM(1, 2, transposable=True), {n: v for n, v in full.items() if v.shape[0] % 16 == 0})
        check(Block((2, 2), 0.7), full)
        check(Block((4, 1), 0.6, "uniform"), {"tall": full["tall"]})


on(2)(groups_and_blocks)
on(4, long=True)(groups_and_blocks)


@on(2, 4)
def where_groups_are_cut() -> None:
    """A rank that holds no whole groups: all ranks say so."""
    over = mesh(dist.get_world_size())
    weight = placed(torch.zeros(12, 24), over, Shard(0))
    shape = Shape((12, 24))
    assert NM(2, 4).cut_by_shards(shape, weight) is None  # groups lie along the inputs
    tiles = NM(2, 4, transposable=True).cut_by_shards(shape, weight)
    assert tiles is not None
    assert "along axis 0 so that tiles of 4 x 4" in tiles
    assert Block((3, 1), 0.5).cut_by_shards(shape, weight) is None
    why = Block((4, 1), 0.5).cut_by_shards(shape, weight)
    assert why is not None
    assert "along axis 0 so that blocks of 4 x 1" in why
    weight = placed(torch.zeros(12, 24), over, Shard(1))
    assert NM(2, 4).cut_by_shards(shape, weight) is not None or 24 // len(over.mesh) % 4 == 0
    assert NM(2, 8).cut_by_shards(shape, weight) is not None
    why = NM(5, 24).cut_by_shards(shape, weight)
    assert why is not None
    assert "axis 1" in why
    assert not cuts(torch.zeros(3), 0, 2)


@on(2)
def nan_on_one_rank() -> None:
    """All ranks raise the same sentence, and none waits for another."""
    full = scores(GROUPED, "few")
    full["wide"][0, 0] = math.nan  # of the first rank
    sharded = {name: placed(value, mesh(2), Shard(0)) for name, value in full.items()}
    for pattern in (Unstructured(0.5), NM(2, 4), Block((2, 2), 0.5)):
        with pytest.raises(InputError, match="The score of 'wide' holds NaN"):
            pattern.select(sharded)


@on(2, 4)
def infinite_scores() -> None:
    full = scores(GROUPED, "few")
    full["wide"][3, 5] = math.inf
    full["tall"][1, 1] = -math.inf
    check(Unstructured(0.5), full)


@on(2, 4)
def supports() -> None:
    """Counts and comparisons are those of all ranks."""
    full = [Unstructured(0.8).select(scores(SIZES, kind)) for kind in ("few", "tied")]
    for over, placements in layouts(every=False):
        old, new = (
            Support({name: placed(mask, over, *placements) for name, mask in each.items()})
            for each in full
        )
        assert new.nnz == full[1].nnz
        assert new.churn(old) == full[1].churn(full[0])
        assert new.regrown(old) == full[1].regrown(full[0])
        assert new != old
        assert new == full[1]
        assert full[1] == new
        assert not new.is_full
        assert Support.full(dict(new)).is_full
        shapes = {name: tuple(mask.shape) for name, mask in new.items()}
        assert Support.unpack(new.pack(), shapes) == new
        drawn = random(dict(new), "seed", 3)
        plain = random(dict(full[1]), "seed", 3)
        assert all(torch.equal(drawn[name].full_tensor(), plain[name]) for name in plain)
        assert counts([]) == {}
