"""How a pass over a sparse layer is cut into tiles. The rule was found by measuring; see
``docs/engine.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from acdc.engine.geometry import ConvGeometry, Size2
from acdc.engine.layout import Shape

# A panel may fill the first-level cache, which has this size in most machines.
PANEL_BYTES = 32 * 1024
# With fewer kept weights in a row, loading and storing the row's sums costs as much as the row.
SHORT_ROW = 12


@dataclass(frozen=True)
class Tile:
    """The register tile in output pixels, and the number of channels in a panel.

    A panel is the channels that are read at a time. The kernels shrink a tile that is larger than
    their registers.
    """

    rows: int
    columns: int
    channels: int

    @staticmethod
    def forward(geometry: ConvGeometry, dy: Shape, density: float) -> Tile:
        """Return a good tile for the forward pass at this density."""
        pixels = _pixels(geometry, (dy.height, dy.width), geometry.in_channels, dy.lanes)
        read = _read(pixels, geometry.stride, geometry.kernel, geometry.dilation)
        return Tile(*pixels, _channels(read, dy, density * math.prod(geometry.kernel)))

    @staticmethod
    def input_grad(geometry: ConvGeometry, x: Shape, density: float) -> Tile:
        """Return a good tile for the input gradient at this density.

        With a stride, the pixels that are a stride apart form a phase. Each phase uses its own part
        of the filter.
        """
        rows, columns = geometry.stride
        size = (-(-x.height // rows), -(-x.width // columns))
        if rows * columns > 1:
            pixels = (1, min(size[1], 8))
        else:
            pixels = _pixels(geometry, size, geometry.out_channels, x.lanes)
        taps = (-(-geometry.kernel[0] // rows), -(-geometry.kernel[1] // columns))
        read = _read(pixels, (1, 1), taps, geometry.dilation)
        kept = density * math.prod(geometry.kernel) / (rows * columns)
        return Tile(*pixels, _channels(read, x, kept))

    def weight_grad(self, geometry: ConvGeometry) -> Tile:
        """Return a good tile for the weight gradient, which shares the panels of this tile.

        It is larger, because every kept weight costs one sum over the lanes in each tile.
        """
        return self if geometry.kernel == (1, 1) else Tile(4, self.columns, self.channels)


def _pixels(geometry: ConvGeometry, size: Size2, channels: int, lanes: int) -> Size2:
    """Return a tile of 8 to 12 accumulators, which is enough to hide their latency."""
    height, width = size
    if geometry.kernel == (1, 1):
        fits = [w for w in (8, 7, 6, 5, 4) if width % w == 0]
        columns = fits[0] if fits else min(width, 8)
        return max(1, min(3, height, 12 // columns)), columns
    columns = 4 if width % 4 == 0 or width > 8 else min(width, 7)
    most = 3 if channels <= 16 and lanes <= 8 else 2
    return max(1, min(most, height, 12 // columns)), columns


def _read(pixels: Size2, step: Size2, taps: Size2, dilation: Size2) -> int:
    """Return how many pixels of a channel a tile reads."""
    sides = zip(pixels, step, taps, dilation, strict=True)
    return math.prod((p - 1) * s + (t - 1) * d + 1 for p, s, t, d in sides)


def _channels(read: int, shape: Shape, kept: float) -> int:
    """Return how many channels fit into a panel, or twice as many if rows would be too short.

    Args:
        read: How many pixels of a channel a tile reads.
        shape: The shape of a buffer.
        kept: How many weights of a channel a row keeps, on average.

    """
    fit = PANEL_BYTES // (read * shape.lanes * shape.dtype.itemsize)
    channels = max(8, 1 << max(1, fit).bit_length() - 1)
    return channels if channels * kept >= SHORT_ROW else 2 * channels
