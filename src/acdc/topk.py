"""The exact top-k over all layers of a model, without a copy of the weights.

Of sharded scores every rank ranks what it holds. The ranks add up their histograms, and nothing is
gathered: the masks are those of one process, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from acdc import shards
from acdc.errors import InputError
from acdc.score import Scores


def check_floor(total: int, least: Collection[int]) -> None:
    """Raise InputError if ``total`` is less than the sum of the layers' minima ``least``."""
    if total < sum(least):
        raise InputError(
            f"{total:,} may be kept in all, but the floor asks for {sum(least):,}: at least "
            f"{max(least, default=0)} in each of {len(least)} layers. Ask for less "
            f"sparsity, leave some layers dense, or lower floor."
        )


_CHUNK = 1 << 20  # weights ranked at a time: 4 MB of keys, so that both passes stay near the cache


_BUCKETS = 1 << 16


_EXTREMES = 128  # at either end of the first histogram: infinity, and NaN beyond it


_BELOW_EVERY_INDEX = -(2.0**60)


def largest_with_floor(scores: Scores, k: int, floor: int) -> dict[str, Tensor]:
    """Return masks of exactly ``k`` largest scores, at least ``floor`` of them in every layer.

    A layer that would fall short keeps its ``floor`` largest, and the others share what is left.

    Raises:
        InputError: ``k`` is smaller than the floors of the layers together, or a score is NaN.
    """
    least = {name: min(floor, math.prod(shape)) for name, shape in scores.shapes.items()}
    check_floor(k, least.values())
    held: dict[str, Tensor] = {}
    while True:
        free = [name for name in scores if name not in held]
        masks = largest(scores.subset(free), k - sum(least[name] for name in held))
        counts = shards.counts((name, masks[name]) for name in free if least[name])
        short = [name for name, count in counts.items() if count < least[name]]
        if not short:
            return {**masks, **held}
        for name in short:
            held |= largest(scores.subset([name]), least[name])


def largest(scores: Scores, k: int) -> dict[str, Tensor]:
    """Return masks that keep exactly the ``k`` largest scores of all tensors together.

    Ties go to the earlier tensor and the lower flat index. Radix selection: the bits of a float,
    read as an integer, sort like the float, so a histogram of the upper 16 bits over all tensors
    finds the bucket of the k-th score, and one of the next 16 bits inside that bucket finds the
    score itself (64-bit scores take four such passes). Beyond the scores of one tensor it needs a
    chunk of keys and 512 KB of counts, whatever the size of the model, and work linear in it.
    Scores equal to the k-th that are sharded are ranked by their index in the whole tensor.

    Args:
        scores: Float tensors, asked for one at a time.
        k: Number of scores to keep, from 0 to their number.

    Raises:
        InputError: A score is NaN.
    """
    numel = sum(math.prod(shape) for shape in scores.shapes.values())
    if not 0 <= k <= numel:
        raise InputError(f"{k:,} scores cannot be kept: there are {numel:,}.")
    if k == 0:
        return {name: torch.zeros_like(scores[name], dtype=torch.bool) for name in scores}
    threshold, ties, mesh = _kth_key(scores, k)
    masks: dict[str, Tensor] = {}
    for name in scores:
        score = scores[name]
        part = shards.local(score)
        mask = torch.empty(part.numel(), dtype=torch.bool, device=score.device)
        pieces = mask.split(_CHUNK)
        for key, piece in zip(_keys(part, scores.dtype), pieces, strict=True):
            torch.gt(key, threshold, out=piece)
            if ties and mesh is None:  # scores equal to the k-th: the first ones of them are kept
                equal = torch.nonzero(key == threshold).flatten()[:ties]
                piece[equal] = True
                ties -= equal.numel()
        masks[name] = shards.like(score, mask.view(part.shape))
    return masks if mesh is None else _with_ties(masks, scores, threshold, ties)


def _with_ties(
    masks: dict[str, Tensor], scores: Scores, threshold: int, ties: int
) -> dict[str, Tensor]:
    """Return masks that keep the first ``ties`` of the sharded scores equal to the k-th, too."""

    def equal(name: str) -> Tensor:
        score = scores[name]
        part = shards.local(score)
        keys = torch.cat(list(_keys(part, scores.dtype)))
        return shards.like(score, (keys == threshold).view(part.shape))

    def by_index(name: str) -> Tensor:
        tied = equal(name)
        index = shards.positions(tied).to(torch.float64)  # exact up to 2⁵³
        index.neg_().masked_fill_(~shards.local(tied), _BELOW_EVERY_INDEX)
        return shards.like(tied, index)

    tied = Scores(scores.shapes, equal)
    for name, count in shards.counts(tied.items()).items():
        take = min(count, ties)
        ties -= take
        if take == count > 0:
            masks[name] = masks[name] | tied[name]
        elif take:
            first = largest(Scores({name: scores.shapes[name]}, by_index, torch.float64), take)
            masks[name] = masks[name] | first[name]
    return masks


def _kth_key(scores: Scores, k: int) -> tuple[int, int, shards.Mesh]:
    """Return the key of the k-th largest score, how many scores equal to it are kept, and the mesh
    of ranks that hold the scores.
    """
    width = torch.finfo(scores.dtype).bits
    prefix, left = 0, k  # the upper bits found so far; how many to keep among the keys with them
    mesh = None
    for shift in range(width - 16, -1, -16):
        histogram = torch.zeros(_BUCKETS, dtype=torch.int64)
        first = shift == width - 16
        for name in scores:
            score = scores[name]
            mesh = mesh or shards.mesh_of([score])
            if not shards.counts_here(score):
                continue
            counts = torch.zeros(_BUCKETS, dtype=torch.int64, device=score.device)
            for key in _keys(shards.local(score), scores.dtype):
                if first:
                    digit = (
                        key >> shift
                    ) + _BUCKETS // 2  # the sign bit makes digits start below 0
                else:
                    digit = (key[(key >> (shift + 16)) == prefix] >> shift) & (_BUCKETS - 1)
                counts += torch.bincount(digit, minlength=_BUCKETS)
            histogram += counts.cpu()
        histogram = shards.total(histogram, mesh)
        if first and (histogram[:_EXTREMES].any() or histogram[-_EXTREMES:].any()):
            for name in scores:
                refuse_nan(name, scores[name])
        from_top = histogram.flip(0).cumsum(0)
        bucket = int(torch.searchsorted(from_top, left))
        left -= int(from_top[bucket - 1]) if bucket else 0
        digit_of_kth = _BUCKETS - 1 - bucket
        prefix = digit_of_kth - _BUCKETS // 2 if first else (prefix << 16) | digit_of_kth
    return prefix, left, mesh


def _keys(score: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield integers that sort like the scores read as ``dtype``, a chunk at a time."""
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    for chunk in score.detach().reshape(-1).split(_CHUNK):
        bits = (chunk.to(dtype) + 0.0).view(integer)  # + 0.0: -0.0 and 0.0 are the same score
        # Below zero, a larger magnitude is a smaller number: flip all bits but the sign.
        yield bits ^ ((bits >> (torch.iinfo(integer).bits - 1)) & torch.iinfo(integer).max)


def refuse_nan(name: str, score: Tensor) -> None:
    """Raise InputError if a score holds NaN. Collective, and on all ranks, if it is sharded."""
    here = bool(torch.isnan(shards.local(score)).any())
    if shards.anywhere(here, shards.mesh_of([score])):
        raise InputError(
            f"The score of {name!r} holds NaN, so its weights cannot be ranked. The training has "
            f"diverged: lower the learning rate, or go back to an earlier checkpoint."
        )
