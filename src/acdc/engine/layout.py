"""The layout of the engine: ``[block][channel][row][column][lane]``, with a halo of zeros.

A *block* is as many samples as a SIMD register has lanes. For linear layers the samples are tokens,
and a block is 8 columns of ``lanes`` tokens. ``docs/engine.md`` gives the reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from acdc.errors import InputError

LINE = 64  # bytes in a cache line, and the alignment of every buffer
TOKEN_COLUMNS = 8  # registers of tokens in a block: one register tile of a linear layer

Halos = tuple[int, int, int, int] | None
"""Height, width, halo and lanes."""


@dataclass(frozen=True)
class Shape:
    """The shape of one buffer: its contents and its place in memory. Pitches count elements.

    ``part_of``: the channels of the buffer that this one is a part of; 0 if it is a whole one.
    """

    samples: int
    channels: int
    height: int
    width: int
    lanes: int
    halo: int = 0
    tokens: bool = False
    dtype: torch.dtype = torch.float32
    part_of: int = 0

    def __post_init__(self) -> None:
        if min(self.samples, self.channels, self.height, self.width, self.lanes) < 1:
            raise InputError(f"All sizes of a layout buffer are at least 1, got {self}.")
        if self.halo < 0:
            raise InputError(f"The halo of a layout buffer cannot be negative, got {self.halo}.")

    @staticmethod
    def of_images(
        shape: tuple[int, ...] | torch.Size,
        lanes: int,
        halo: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Shape:
        """Return the shape that holds an ``[N, C, H, W]`` tensor."""
        samples, channels, height, width = shape
        return Shape(samples, channels, height, width, lanes, halo, False, dtype)

    @staticmethod
    def of_tokens(
        tokens: int, features: int, lanes: int, dtype: torch.dtype = torch.float32
    ) -> Shape:
        """Return the shape that holds a ``[tokens, features]`` tensor."""
        return Shape(tokens, features, 1, TOKEN_COLUMNS, lanes, 0, True, dtype)

    @property
    def per_block(self) -> int:
        """Samples in a block."""
        return self.lanes * (self.width if self.tokens else 1)

    @property
    def blocks(self) -> int:
        """Number of blocks; the last may hold fewer samples than lanes."""
        return -(-self.samples // self.per_block)

    @property
    def row(self) -> int:
        """Elements from a row to the next."""
        return (self.width + 2 * self.halo) * self.lanes

    @property
    def channel(self) -> int:
        """Elements from a channel to the next.

        For images this is an odd number of cache lines. With a power of two, the same pixel of many
        channels would compete for one set of the first-level cache. A block of tokens is
        contiguous, since it is read whole.
        """
        count = self.row * (self.height + 2 * self.halo)
        if self.tokens:
            return count
        per_line = LINE // self.dtype.itemsize
        return (-(-count // per_line) | 1) * per_line

    @property
    def block(self) -> int:
        """Elements from a block to the next, in whole cache lines."""
        per_line = LINE // self.dtype.itemsize
        return -(-self.channel * (self.part_of or self.channels) // per_line) * per_line

    @property
    def origin(self) -> int:
        """Elements from the start of memory to pixel (0, 0)."""
        return self.halo * (self.row + self.lanes)

    @property
    def halos(self) -> Halos:
        """Where in memory the halos are: the same for buffers that differ in channels or samples.

        None if there are none.
        """
        return (self.height, self.width, self.halo, self.lanes) if self.halo else None

    @property
    def numel(self) -> int:
        """Elements of memory."""
        return self.block * self.blocks

    def with_channels(self, channels: int) -> Shape:
        """Return the same shape with another number of channels."""
        return replace(self, channels=channels)


@dataclass(frozen=True)
class Buffer:
    """A piece of memory in the layout. Its halo stays zero, since kernels write only interiors.

    Args:
        shape: Its shape.
        data: The memory.
        per_thread: It has one block per thread, whatever the shape says. This is enough for values
            that are read as soon as they are written, when kernels go block by block.
        ready: Calls of kernels that need no further preparation, by what they depend on.

    """

    shape: Shape
    data: torch.Tensor
    per_thread: bool = False
    ready: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def zeros(shape: Shape) -> Buffer:
        """Allocate a buffer, all zeros, aligned to a cache line."""
        return Buffer(shape, allocate([shape.numel], shape.dtype)[0])

    def part(self, first: int, channels: int) -> Buffer:
        """Return some channels of this buffer, in the same memory."""
        s = self.shape
        shape = replace(s, channels=channels, part_of=s.part_of or s.channels)
        return Buffer(shape, self.data[first * s.channel :], self.per_thread)

    def pixels(self) -> torch.Tensor:
        """Return the interior as a view ``[block, channel, row, column, lane]``."""
        s = self.shape
        return self.data.as_strided(
            (s.blocks, s.channels, s.height, s.width, s.lanes),
            (s.block, s.channel, s.row, s.lanes, 1),
            self.data.storage_offset() + s.origin,
        )


def allocate(
    sizes: Sequence[int],
    dtype: torch.dtype,
    prepare: Callable[[torch.Tensor], None] | None = None,
) -> list[torch.Tensor]:
    """Return vectors of zeros in one allocation, each aligned to a cache line.

    Args:
        sizes: Elements of each vector, in whole cache lines.
        dtype: Of the elements.
        prepare: Called with the memory before it is first written.

    """
    spare = LINE // dtype.itemsize
    data = torch.empty(sum(sizes) + spare, dtype=dtype, device="cpu")
    if prepare is not None:
        prepare(data)
    data.zero_()
    start = (-data.data_ptr() % LINE) // dtype.itemsize
    return list(data[start : start + sum(sizes)].split(list(sizes)))
