"""The index list of a convolution: its kept weights in the order in which the kernel reads them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from acdc.engine import native
from acdc.engine.caches import caches
from acdc.engine.geometry import ConvGeometry, Size2
from acdc.engine.locks import Lock
from acdc.engine.tile import SHORT_ROW
from acdc.runtime.points import WIDEST, Grid, Reach
from acdc.runtime.program import Conv

# Lanes -> registers of points in a tile: of one row, and of several rows with the same offsets.
ROW = {4: 12, 8: 12, 16: 14}
BLOCK = {4: 3, 8: 3, 16: 4}

# Bytes of points in a tile that may be read from the second-level cache. A result is read and
# written once for each tile of channels, which costs more where a row has few kept weights.
FAR = 256 * 2**10

FEW = 16
"""The most points at which a layer that keeps all weights is computed without an index list."""


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
        channels = fit
        while channels * kept_of_channel < SHORT_ROW and channels * read < FAR:
            channels *= 2
        balanced = across >= 4 * threads or across % threads == 0
        groups = 1 if balanced else min(threads, op.geometry.out_channels)
        return Cut(vectors, channels, groups, uniform)


def is_dense(op: Conv, out: Grid, taps: Taps) -> bool:
    """Return whether a layer keeps all weights and computes images of one pixel, and few of them.

    Such a layer needs no index list.
    """
    return (
        len(op.weight.values) == op.weight_numel
        and op.geometry.groups == 1
        and taps.of == ((0, 0, 0),)
        and out.height == out.width == 1
        and out.samples <= FEW
    )


def instruction_set_for(points: int, isa: str) -> str:
    """Return the instruction set for a layer with so many points, if ``isa`` is that of the plan.

    A register that is filled in part takes as long as a full one. AVX2 has registers of half the
    size of AVX-512, which an image of 7x7 pixels fills better.
    """
    if isa != "avx512" or "avx2" not in native.instruction_sets():
        return isa
    wide, narrow = (-(-points // lanes) * lanes for lanes in (16, 8))
    return "avx2" if wide > 1.1 * narrow else isa


@dataclass(frozen=True, eq=False)
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


class SharedLists:
    """The index lists and matrices that the plans of all handles of a network share.

    Each of them exists as long as a plan needs it.
    """

    def __init__(self) -> None:
        self._lists: WeakValueDictionary[tuple[Hashable, ...], IndexList] = WeakValueDictionary()
        self._matrices: WeakValueDictionary[Conv, Tensor] = WeakValueDictionary()
        self._lock = Lock(rank=1)  # taken while a handle's lock is held

    def get(self, op: Conv, x: Grid, taps: Taps, cut: Cut) -> IndexList | None:
        """Return what :func:`index_list` returns."""
        key = (op, x.channel, x.row, taps, cut)
        with self._lock:
            found = self._lists.get(key) or index_list(op, x, taps, cut)
            if found is not None:
                self._lists[key] = found
            return found

    def matrix(self, op: Conv) -> Tensor:
        """Return the weight of a layer that keeps all of them: ``[out, in]``, whole registers."""
        with self._lock:
            found = self._matrices.get(op)
            if found is None:
                rows = op.weight.values.reshape(op.geometry.out_channels, op.geometry.in_channels)
                found = pad(rows, (0, -rows.shape[1] % WIDEST)).contiguous()
                self._matrices[op] = found
            return found


def index_list(op: Conv, x: Grid, taps: Taps, cut: Cut) -> IndexList | None:
    """Return the list of a layer, or None if its offsets do not fit into 32 bits.

    Args:
        op: The layer.
        x: Where the points lie that it reads: those of its input, or of its planes.
        taps: The positions of its filter.
        cut: How it is cut.

    """
    g = op.geometry
    tiles = -(-g.in_channels // cut.channels)
    most_rows = tiles * g.out_channels
    parts = torch.empty(cut.groups * tiles + 1, dtype=torch.int32)
    channel = torch.empty(most_rows, dtype=torch.int32)
    begin = torch.empty(most_rows + 1, dtype=torch.int32)
    # acdc_entry_f32 or acdc_entry_f64, as integers of their size
    integers = torch.int32 if op.weight.values.dtype == torch.float32 else torch.int64
    entries = torch.empty(op.weight.values.numel(), 2, dtype=integers)
    tap = [
        phase * g.in_channels * x.channel + down * x.row + right for phase, down, right in taps.of
    ]
    rows = native.points_list(
        index=op.weight.index,
        values=op.weight.values.contiguous(),
        kept=op.weight.values.numel(),
        out_channels=g.out_channels,
        in_channels=g.in_channels,
        groups=g.groups,
        taps=len(tap),
        tap=torch.tensor(tap),
        x_channel=x.channel,
        tile=cut.channels,
        cuts=cut.groups,
        is_double=integers == torch.int64,
        parts=parts,
        channel=channel,
        begin=begin,
        entries=entries,
    )
    if rows is None:
        return None
    # Copies of the rows that there are: most places of a small tile are empty.
    return IndexList(
        parts, channel[:rows].clone(), begin[: rows + 1].clone(), entries, tiles, cut.groups
    )
