"""How a pass over a sparse layer is cut into tiles. The rule was found by measuring; see
``docs/engine.md``. What differs from machine to machine is a ``Tiling``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from acdc.engine.caches import caches
from acdc.engine.geometry import ConvGeometry, Size2
from acdc.engine.layout import Shape

MOST_ROWS = 4  # of a tile, in the kernels
PIXELS = 12  # of a tile, by the rule
# With fewer kept weights in a row, loading and storing the row's sums costs as much as the row.
SHORT_ROW = 12


@dataclass(frozen=True)
class Tiling:
    """What the tiles of a layer depend on beside the layer.

    The size of a panel changes no result. The rows decide in which order the statistics of a
    BatchNorm and the gradient of a weight are summed, so they change the rounding of both.

    Args:
        panel_bytes: How large a panel may be.
        rows: The most rows of a tile of the forward pass and of the input gradient. None: the
            rule's.
        grad_rows: The most rows of a tile of the weight gradient. None: the rule's.

    """

    panel_bytes: int
    rows: int | None = None
    grad_rows: int | None = None

    @staticmethod
    def of_caches() -> Tiling:
        """Return the tiling of the rule: a panel may fill the first-level cache."""
        return Tiling(caches().first)


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
    def forward(geometry: ConvGeometry, dy: Shape, density: float, tiling: Tiling) -> Tile:
        """Return a good tile for the forward pass at this density."""
        size = (dy.height, dy.width)
        pixels = _pixels(geometry, size, geometry.in_channels, dy.lanes, tiling.rows)
        read = _read(pixels, geometry.stride, geometry.kernel, geometry.dilation)
        kept = density * math.prod(geometry.kernel)
        return Tile(*pixels, _channels(read, dy, kept, tiling.panel_bytes))

    @staticmethod
    def input_grad(geometry: ConvGeometry, x: Shape, density: float, tiling: Tiling) -> Tile:
        """Return a good tile for the input gradient at this density.

        With a stride, the pixels that are a stride apart form a phase. Each phase uses its own part
        of the filter.
        """
        rows, columns = geometry.stride
        size = (-(-x.height // rows), -(-x.width // columns))
        if rows * columns > 1:
            pixels = (1, min(size[1], 8))
        else:
            pixels = _pixels(geometry, size, geometry.out_channels, x.lanes, tiling.rows)
        taps = (-(-geometry.kernel[0] // rows), -(-geometry.kernel[1] // columns))
        read = _read(pixels, (1, 1), taps, geometry.dilation)
        kept = density * math.prod(geometry.kernel) / (rows * columns)
        return Tile(*pixels, _channels(read, x, kept, tiling.panel_bytes))

    def weight_grad(self, geometry: ConvGeometry, tiling: Tiling) -> Tile:
        """Return a good tile for the weight gradient, which shares the panels of this tile.

        It is larger, because every kept weight costs one sum over the lanes in each tile.
        """
        rows = self.rows if geometry.kernel == (1, 1) else MOST_ROWS
        return Tile(tiling.grad_rows or rows, self.columns, self.channels)


def _pixels(
    geometry: ConvGeometry, size: Size2, channels: int, lanes: int, rows: int | None
) -> Size2:
    """Return a tile of at most so many rows.

    By the rule it has 8 to 12 accumulators, which are enough to hide their latency.
    """
    height, width = size
    pointwise = geometry.kernel == (1, 1)
    if pointwise:
        fits = [w for w in (8, 7, 6, 5, 4) if width % w == 0]
        columns = fits[0] if fits else min(width, 8)
    else:
        columns = 4 if width % 4 == 0 or width > 8 else min(width, 7)
    if rows is None:
        most = 3 if pointwise or (channels <= 16 and lanes <= 8) else 2
        rows = min(most, PIXELS // columns)
    return max(1, min(rows, height)), columns


def _read(pixels: Size2, step: Size2, taps: Size2, dilation: Size2) -> int:
    """Return how many pixels of a channel a tile reads."""
    sides = zip(pixels, step, taps, dilation, strict=True)
    return math.prod((p - 1) * s + (t - 1) * d + 1 for p, s, t, d in sides)


def _channels(read: int, shape: Shape, kept: float, panel_bytes: int) -> int:
    """Return how many channels fit into a panel, or twice as many if rows would be too short.

    Args:
        read: How many pixels of a channel a tile reads.
        shape: The shape of a buffer.
        kept: How many weights of a channel a row keeps, on average.
        panel_bytes: How large a panel may be.

    """
    fit = panel_bytes // (read * shape.lanes * shape.dtype.itemsize)
    channels = max(8, 1 << max(1, fit).bit_length() - 1)
    return channels if channels * kept >= SHORT_ROW else 2 * channels
