"""Square tiles in which ``n`` of ``m`` weights are kept in every row and in every column.

A matrix of such tiles is N:M along its inputs, and its transpose is N:M as well, so that hardware
for N:M serves the forward pass and the gradient of the inputs. The masks of a tile are few enough
to try them all: 90 for 2 of 4.
"""

from __future__ import annotations

from functools import cache, reduce
from itertools import combinations, product

import torch
from torch import Tensor

LARGEST = 4  # weights along a tile's side: a tile of 5 has 2,040 masks, one of 6 has 297,200

_CHUNK = 1 << 12  # tiles whose masks are compared at a time: 3 MB of sums for 2 of 4
_BOUND = torch.finfo(torch.float64).max / 32  # the sum of a tile of such scores is finite


def tile_masks(n: int, m: int) -> Tensor:
    """Return all masks of a tile, in the order in which ties are broken.

    Masks are sorted as their rows are read, from the top left on: of two masks, the one that keeps
    a weight where they first differ comes first. The first mask of 2 of 4 is
    ``1100 1100 0011 0011``.

    Args:
        n: Kept weights in each row and in each column.
        m: Rows and columns.

    Returns:
        bool ``[masks, m, m]`` on the CPU, True where a weight is kept.
    """
    return _rows(n, m)[torch.tensor(_choices(n, m))]


def best_masks(tiles: Tensor, n: int, m: int) -> Tensor:
    """Return the mask of every tile that keeps the largest sum of scores.

    Sums are taken in double precision and in one order, so that the result is the same on every
    device. The sum of a tile of float32 is exact unless its scores differ by a factor of 2^26 or
    more. Infinite scores count as very large ones. Ties go to the first of :func:`tile_masks`.

    Args:
        tiles: Scores ``[tiles, m, m]``, none of them NaN.
        n: Kept weights in each row and in each column.
        m: Rows and columns.

    Returns:
        bool ``[tiles, m, m]``.
    """
    masks, half = tile_masks(n, m).to(tiles.device), m // 2
    choices = _choices(n, m)
    upper = torch.tensor([_number(rows[:half], n, m) for rows in choices], device=tiles.device)
    lower = torch.tensor([_number(rows[half:], n, m) for rows in choices], device=tiles.device)
    kept = torch.empty(tiles.shape, dtype=torch.bool, device=tiles.device)
    for part, out in zip(tiles.split(_CHUNK), kept.split(_CHUNK), strict=True):
        scores = part.permute(1, 2, 0).double().clamp(-_BOUND, _BOUND)
        by_row = torch.stack([sum(scores[:, i] for i in kept) for kept in _columns(n, m)])
        sums = _sums(by_row[:, :half])[upper] + _sums(by_row[:, half:])[lower]
        out.copy_(masks[sums.argmax(dim=0)])  # the first of several largest
    return kept


def _sums(by_row: Tensor) -> Tensor:
    """Return the sums of some rows for every choice of columns in each of them.

    Args:
        by_row: ``[choices, rows, tiles]``: the sum of each row for every choice of its columns.

    Returns:
        ``[choices ** rows, tiles]``, at the places that ``_number`` gives.
    """
    first, *rest = by_row.unbind(1)
    for row in rest:
        first = (first[:, None] + row).flatten(0, 1)
    return first


def _number(rows: tuple[int, ...], n: int, m: int) -> int:
    """Return the place of the choices of some rows among all choices of so many rows."""
    return reduce(lambda number, row: number * len(_columns(n, m)) + row, rows, 0)


def _columns(n: int, m: int) -> list[tuple[int, ...]]:
    """Return the columns that a row may keep."""
    return list(combinations(range(m), n))


def _rows(n: int, m: int) -> Tensor:
    """Return the masks of a row: bool ``[rows, m]``."""
    return torch.tensor([[i in kept for i in range(m)] for kept in _columns(n, m)])


@cache
def _choices(n: int, m: int) -> list[tuple[int, ...]]:
    """Return, for each mask of a tile, the index in ``_columns`` of each of its rows."""
    columns = _columns(n, m)
    return [
        rows
        for rows in product(range(len(columns)), repeat=m)
        if all(sum(i in columns[row] for row in rows) == n for i in range(m))
    ]
