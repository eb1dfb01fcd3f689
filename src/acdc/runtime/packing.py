"""Positions of kept weights in few bytes, in one of three forms.

=======  =============  =========================================================================
none                    every weight is kept
mask     uint8 [bytes]  a bit for each weight, the lowest bit of a byte first, 1 = kept
gaps     uint8 [bytes]  for each kept weight the number of weights between it and the kept weight
                        before it. Where more than 254 lie between, a byte 255 for each 255 of them
                        comes first
=======  =============  =========================================================================

A mask takes an eighth of a byte for each weight, gaps a byte for each kept weight: gaps are smaller
from a sparsity of 88 % on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from acdc.engine import native
from acdc.errors import InputError

FORMS = ("mask", "gaps")
_FAR = 255  # a byte that skips so many weights and keeps none


def pack(index: Tensor, count: int) -> dict[str, Tensor]:
    """Return positions in the form that takes the fewest bytes, by the name of the form.

    Args:
        index: ``[kept]``, ascending.
        count: The number of weights.

    """
    if index.numel() == count:
        return {}
    gaps = _gaps(index)
    if gaps.numel() < -(-count // 8):
        return {"gaps": gaps}
    return {"mask": _bits(index, count)}


def unpack(forms: Mapping[str, Tensor], count: int, kept: int) -> Tensor:
    """Return the positions as int32 ``[kept]``.

    Args:
        forms: What :func:`pack` returned.
        count: The number of weights.
        kept: The number of kept weights.

    Raises:
        InputError: These are no such positions.

    """
    if len(forms) > 1:
        raise InputError("has both a mask and gaps")
    if count >= 2**31:
        raise InputError(f"has {count} weights, and can have {2**31 - 1}")
    if not forms:
        if kept != count:
            raise InputError(f"has {kept} values and no mask, and {count} weights")
        return torch.arange(count, dtype=torch.int32)
    ((name, packed),) = forms.items()
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise InputError(f"has {name} that are no bytes")
    return (_of_mask if name == "mask" else _of_gaps)(packed.contiguous(), count, kept)


def _bits(index: Tensor, count: int) -> Tensor:
    kept = torch.zeros(-(-count // 8) * 8, dtype=torch.uint8)
    kept[index.long()] = 1
    return (kept.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _of_mask(bits: Tensor, count: int, kept: int) -> Tensor:
    if bits.numel() != -(-count // 8):
        raise InputError(f"has a mask that does not fit {count} weights")
    index = native.positions(bits, kept)
    if index is None:
        raise InputError("has not as many values as its mask has ones")
    if index.numel() and int(index[-1]) >= count:
        raise InputError("has a mask with bits beyond its weight")
    return index


def _gaps(index: Tensor) -> Tensor:
    between = index.long().diff(prepend=torch.tensor([-1])) - 1
    skips = between // _FAR
    ends = (skips + 1).cumsum(0)  # behind the last byte of each kept weight
    gaps = torch.full((int(ends[-1]) if len(ends) else 0,), _FAR, dtype=torch.uint8)
    gaps[ends - 1] = (between % _FAR).to(torch.uint8)
    return gaps


def _of_gaps(gaps: Tensor, count: int, kept: int) -> Tensor:
    if gaps.numel() > count:  # a byte passes at least one weight
        raise InputError(f"has gaps that do not fit {count} weights")
    keeps = gaps != _FAR
    behind = (gaps.to(torch.int32) + keeps).cumsum(0)  # int64
    if int(keeps.sum()) != kept:
        raise InputError("has not as many values as it has gaps")
    if behind.numel() and (int(behind[-1]) > count or not bool(keeps[-1])):
        raise InputError(f"has gaps that do not end in its {count} weights")
    return (behind[keeps] - 1).to(torch.int32)
