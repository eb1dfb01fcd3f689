"""Buffers of points: how the pixels of a batch lie in a channel. See ``csrc/acdc_points.h``."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from acdc.engine.layout import LINE

WIDEST = 16  # numbers in the widest register; buffers serve every instruction set


@dataclass(frozen=True)
class Reach:
    """How far a convolution reads beyond the pixels of its output, in rows and columns."""

    above: int = 0
    below: int = 0
    left: int = 0
    right: int = 0

    def __or__(self, other: Reach) -> Reach:
        return Reach(
            max(self.above, other.above),
            max(self.below, other.below),
            max(self.left, other.left),
            max(self.right, other.right),
        )


@dataclass(frozen=True)
class Grid:
    """Where the pixels of a channel lie. Pitches count points.

    Args:
        samples, height, width: The pixels.
        row: From a row to the next.
        rows: Rows from a sample to the next.
        reach: What is read beyond.

    """

    samples: int
    height: int
    width: int
    row: int
    rows: int
    reach: Reach

    @property
    def sample(self) -> int:
        """From a sample to the next."""
        return self.row * self.rows

    @property
    def count(self) -> int:
        """From the first pixel to the last one, with the gaps between."""
        return (self.samples - 1) * self.sample + (self.height - 1) * self.row + self.width

    @property
    def registers(self) -> int:
        """How many of the widest registers the points of a channel fill."""
        return _whole(self.count, WIDEST) // WIDEST

    @property
    def aligned(self) -> Grid:
        """The same pixels with rows of whole registers: one is then read from one cache line."""
        return replace(self, row=_whole(self.row, WIDEST))

    @property
    def before(self) -> int:
        """The points before the first pixel, in whole registers."""
        return _whole(self.reach.above * self.row + self.reach.left, WIDEST)

    @property
    def channel(self) -> int:
        """From a channel to the next: an odd number of cache lines.

        With a power of two, the same point of many channels would compete for one set of the
        first-level cache.
        """
        after = self.reach.below * self.row + self.reach.right
        points = self.before + _whole(self.count, WIDEST) + after
        return (_whole(points, WIDEST) // WIDEST | 1) * WIDEST

    @property
    def has_gaps(self) -> bool:
        """Whether some points between the first and the last pixel are no pixels."""
        return self.row > self.width or self.rows > self.height

    def live(self, dtype: torch.dtype) -> Tensor:
        """Return integers of the size of ``dtype``, -1 at each pixel and 0 at all other points."""
        size = _whole(self.count, WIDEST)
        integers = torch.int32 if dtype == torch.float32 else torch.int64
        memory = torch.zeros(size + WIDEST, dtype=integers)
        start = -memory.data_ptr() % LINE // memory.element_size()
        live = memory[start : start + size]
        shape = (self.samples, self.height, self.width)
        live.as_strided(shape, (self.sample, self.row, 1), live.storage_offset()).fill_(-1)
        return live


def _whole(count: int, unit: int) -> int:
    return -(-count // unit) * unit


@dataclass(frozen=True)
class Buffer:
    """Memory for the channels of a value.

    Args:
        grid: Where the pixels of a channel lie.
        channels: How many there are.
        memory: The memory, aligned to a cache line. Points that are no pixels are zero.
        live: The mask of the grid, or None.

    """

    grid: Grid
    channels: int
    memory: Tensor
    live: Tensor | None

    @property
    def address(self) -> int:
        """The address of the first pixel of the first channel."""
        return self.memory.data_ptr() + self.grid.before * self.memory.element_size()
