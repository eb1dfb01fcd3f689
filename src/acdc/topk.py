"""The exact top-k over all layers of a model, without a copy of the weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

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
        short = [n for n in free if least[n] and int(torch.count_nonzero(masks[n])) < least[n]]
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
    threshold, ties = _kth_key(scores, k)
    masks: dict[str, Tensor] = {}
    for name in scores:
        score = scores[name]
        mask = torch.empty(score.numel(), dtype=torch.bool, device=score.device)
        parts = mask.split(_CHUNK)
        for key, part in zip(_keys(score, scores.dtype), parts, strict=True):
            torch.gt(key, threshold, out=part)
            if ties:  # scores equal to the k-th: the first ones of them are kept
                equal = torch.nonzero(key == threshold).flatten()[:ties]
                part[equal] = True
                ties -= equal.numel()
        masks[name] = mask.view(score.shape)
    return masks


def _kth_key(scores: Scores, k: int) -> tuple[int, int]:
    """Return the key of the k-th largest score, and how many scores equal to it are kept."""
    width = torch.finfo(scores.dtype).bits
    prefix, left = 0, k  # the upper bits found so far; how many to keep among the keys with them
    for shift in range(width - 16, -1, -16):
        histogram = torch.zeros(_BUCKETS, dtype=torch.int64)
        first = shift == width - 16
        for name in scores:
            score = scores[name]
            counts = torch.zeros(_BUCKETS, dtype=torch.int64, device=score.device)
            for key in _keys(score, scores.dtype):
                if first:
                    digit = (
                        key >> shift
                    ) + _BUCKETS // 2  # the sign bit makes digits start below 0
                else:
                    digit = (key[(key >> (shift + 16)) == prefix] >> shift) & (_BUCKETS - 1)
                counts += torch.bincount(digit, minlength=_BUCKETS)
            if first and (counts[:_EXTREMES].any() or counts[-_EXTREMES:].any()):
                refuse_nan(name, score)
            histogram += counts.cpu()
        from_top = histogram.flip(0).cumsum(0)
        bucket = int(torch.searchsorted(from_top, left))
        left -= int(from_top[bucket - 1]) if bucket else 0
        digit_of_kth = _BUCKETS - 1 - bucket
        prefix = digit_of_kth - _BUCKETS // 2 if first else (prefix << 16) | digit_of_kth
    return prefix, left


def _keys(score: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield integers that sort like the scores read as ``dtype``, a chunk at a time."""
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    for chunk in score.detach().reshape(-1).split(_CHUNK):
        bits = (chunk.to(dtype) + 0.0).view(integer)  # + 0.0: -0.0 and 0.0 are the same score
        # Below zero, a larger magnitude is a smaller number: flip all bits but the sign.
        yield bits ^ ((bits >> (torch.iinfo(integer).bits - 1)) & torch.iinfo(integer).max)


def refuse_nan(name: str, score: Tensor) -> None:
    """Raise InputError if a score holds NaN."""
    if bool(torch.isnan(score).any()):
        raise InputError(
            f"The score of {name!r} holds NaN, so its weights cannot be ranked. The training has "
            f"diverged: lower the learning rate, or go back to an earlier checkpoint."
        )
