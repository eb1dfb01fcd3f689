"""The index list of a convolution: its kept weights in the order in which the kernel reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from acdc.engine.caches import caches
from acdc.engine.geometry import ConvGeometry, Size2
from acdc.engine.tile import SHORT_ROW
from acdc.runtime.points import Grid, Reach
from acdc.runtime.program import Conv

# Lanes -> registers of points in a tile: of one row, and of several rows with the same offsets.
ROW = {4: 12, 8: 12, 16: 14}
BLOCK = {4: 3, 8: 3, 16: 4}


@dataclass(frozen=True)
class Taps:
    """The positions of a filter as offsets in the planes of its stride.

    Args:
        phases: The row and the column of each phase that some position is in.
        of: For each position of the filter, row by row: phase, rows, columns.
        reach: How far the positions reach.

    """

    phases: tuple[Size2, ...]
    of: tuple[tuple[int, int, int], ...]
    reach: Reach

    @staticmethod
    def of_geometry(geometry: ConvGeometry) -> Taps:
        """Return the positions of a layer's filter."""
        places = []
        for row in range(geometry.kernel[0]):
            for column in range(geometry.kernel[1]):
                down = row * geometry.dilation[0] - geometry.padding[0]
                right = column * geometry.dilation[1] - geometry.padding[1]
                phase = down % geometry.stride[0], right % geometry.stride[1]
                places.append((phase, down // geometry.stride[0], right // geometry.stride[1]))
        phases = tuple(sorted({phase for phase, _, _ in places}))
        downs, rights = [d for _, d, _ in places], [r for _, _, r in places]
        reach = Reach(
            max(0, -min(downs)), max(0, max(downs)), max(0, -min(rights)), max(0, max(rights))
        )
        of = tuple((phases.index(phase), down, right) for phase, down, right in places)
        return Taps(phases, of, reach)


@dataclass(frozen=True)
class Cut:
    """How a convolution is cut into items of work.

    Args:
        vectors: Registers of points in a tile.
        channels: Input channels in a tile.
        groups: Groups of output channels.
        uniform: Every weight is kept, so that rows have the same offsets.

    """

    vectors: int
    channels: int
    groups: int
    uniform: bool = False

    @staticmethod
    def rule(op: Conv, grid: Grid, taps: Taps, lanes: int, threads: int, itemsize: int) -> Cut:
        """Return a good cut. What is summed, and in which order, depends on no thread."""
        registers = -(-grid.count // lanes)
        uniform = len(op.weight.values) == op.weight_numel and op.geometry.groups == 1
        if registers == 1 and lanes == 16:  # measured: row by row is faster here
            uniform = False
        most = BLOCK[lanes] if uniform else ROW[lanes]
        across = -(-registers // most)
        vectors = -(-registers // across)
        rows = len({(phase, down) for phase, down, _ in taps.of})
        read = rows * (vectors * lanes + 8) * itemsize  # bytes of a channel that a tile reads
        fit = max(8, 1 << max(1, caches().first // read).bit_length() - 1)
        filters = op.geometry.out_channels * op.geometry.in_channels // op.geometry.groups
        kept_of_channel = len(op.weight.values) / max(1, filters)
        channels = fit if fit * kept_of_channel >= SHORT_ROW else 2 * fit
        balanced = across >= 4 * threads or across % threads == 0
        groups = 1 if balanced else min(threads, op.geometry.out_channels)
        return Cut(vectors, channels, groups, uniform)


@dataclass(frozen=True)
class IndexList:
    """A list as ``acdc_points_conv_args`` takes it."""

    parts: Tensor
    channel: Tensor
    begin: Tensor
    entries: Tensor
    tiles: int
    groups: int

    @property
    def bytes(self) -> int:
        """The memory that it takes."""
        tensors = (self.parts, self.channel, self.begin, self.entries)
        return sum(t.numel() * t.element_size() for t in tensors)


def index_list(op: Conv, x: Grid, taps: Taps, cut: Cut) -> IndexList | None:
    """Return the list of a layer, or None if its offsets do not fit into 32 bits.

    Args:
        op: The layer.
        x: Where the points lie that it reads: those of its input, or of its planes.
        taps: The positions of its filter.
        cut: How it is cut.

    """
    g = op.geometry
    out, channel, offset = _positions(op, x, taps)
    if offset.numel() and int(offset.abs().max()) >= 2**31:
        return None
    tiles = -(-g.in_channels // cut.channels)
    row_of = channel // cut.channels * g.out_channels + out  # [tile][output channel]
    counts = torch.bincount(row_of, minlength=tiles * g.out_channels)
    groups = _groups(counts.view(tiles, -1).sum(0), cut.groups)

    tile = torch.arange(tiles).repeat_interleave(g.out_channels)
    part = groups.repeat(tiles) * tiles + tile
    # Rows are sorted by length, so that the branch predictor learns the trip count of the loop.
    longest = int(counts.max()) + 1
    order = (part * longest + longest - 1 - counts).argsort(stable=True)
    used = (counts > 0) | (tile == 0) | (tile == tiles - 1)
    rows = order[used[order]]
    rank = torch.empty_like(order)
    rank[rows] = torch.arange(rows.numel())
    entry_order = rank[row_of].argsort(stable=True)

    parts = torch.zeros(cut.groups * tiles + 1, dtype=torch.int32)
    parts[1:] = torch.bincount(part[rows], minlength=cut.groups * tiles).cumsum(0)
    begin = torch.zeros(rows.numel() + 1, dtype=torch.int32)
    begin[1:] = counts[rows].cumsum(0)
    return IndexList(
        parts,
        (rows % g.out_channels).to(torch.int32),
        begin,
        _entries(offset[entry_order], op.weight.values[entry_order]),
        tiles,
        cut.groups,
    )


def _positions(op: Conv, x: Grid, taps: Taps) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output channel, the input channel and the offset of each kept weight."""
    g, count = op.geometry, len(taps.of)
    index = op.weight.index.long()
    filters, tap = index // count, index % count
    per_group = g.in_channels // g.groups
    out = filters // per_group
    channel = filters % per_group + out // (g.out_channels // g.groups) * per_group
    moved = [
        phase * g.in_channels * x.channel + down * x.row + right for phase, down, right in taps.of
    ]
    return out, channel, channel * x.channel + torch.tensor(moved)[tap]


def _groups(work: Tensor, groups: int) -> Tensor:
    """Return the group of each output channel: consecutive channels with equal work."""
    before = (work + 1).cumsum(0) - (work + 1)
    return before * groups // max(1, int((work + 1).sum()))


def _entries(offset: Tensor, values: Tensor) -> Tensor:
    """Return ``acdc_entry_f32`` or ``acdc_entry_f64`` as integers of their size."""
    integers = torch.int32 if values.dtype == torch.float32 else torch.int64
    return torch.stack((offset.to(integers), values.contiguous().view(integers)), 1).contiguous()
