"""Where the points of each value lie, and which values share memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from acdc.engine.caches import caches
from acdc.engine.layout import allocate
from acdc.engine.native import advise_huge_pages
from acdc.runtime.lists import Taps
from acdc.runtime.points import Buffer, Grid, Reach
from acdc.runtime.program import Conv, Gate, Map, Norm, Op, Planes, Program, Value


@dataclass
class Steps:
    """A program whose strides are written out as planes.

    Args:
        ops: The operations.
        values: The values, those of the planes included.
        taps: The positions of each layer's filter.
        sources: The value that the kernel of each layer reads: its input, or the planes of it.

    """

    ops: list[Op]
    values: list[Value]
    taps: dict[Op, Taps]
    sources: dict[Op, int]

    def reads(self, op: Op) -> tuple[int, ...]:
        """Return the values that the kernel of an operation reads."""
        return (self.sources[op], *op.reads[1:]) if op in self.sources else op.reads


def steps_of(program: Program) -> Steps:
    """Return the steps of a program."""
    steps = Steps([], list(program.values), {}, {})
    for op in program.ops:
        if isinstance(op, Conv):
            steps.taps[op], steps.sources[op] = Taps.of_geometry(op.geometry), op.x
            if op.geometry.stride != (1, 1):
                planes = _planes(op, steps)
                steps.ops.append(planes)
                steps.sources[op] = planes.out
        steps.ops.append(op)
    return steps


def _planes(op: Conv, steps: Steps) -> Planes:
    taps, x, out = steps.taps[op], steps.values[op.x], steps.values[op.out]
    reach = taps.reach
    size = (out.height + reach.above + reach.below, out.width + reach.left + reach.right)
    steps.values.append(Value(x.channels * len(taps.phases), out.height, out.width))
    first = (-reach.above, -reach.left)
    return Planes(
        op.name, op.x, len(steps.values) - 1, taps.phases, first, size, op.geometry.stride
    )


def grids_of(steps: Steps, samples: int) -> list[Grid]:
    """Return where the points of each value lie, for so many samples.

    A kernel writes each point of its result at the place that it has in its inputs. So all values
    that are connected by such kernels have the same pitches.
    """
    classes = _Classes(len(steps.values))
    for op in steps.ops:
        if isinstance(op, Conv | Map):
            for number in steps.reads(op):
                classes.join(number, op.out)
        elif isinstance(op, Gate | Norm):
            classes.join(op.x, op.out)
    needs: dict[int, tuple[int, int, Reach]] = {}
    for number, value in enumerate(steps.values):
        _need(needs, classes.of(number), value.width, value.height, Reach())
    for op in steps.ops:
        if isinstance(op, Conv):
            value, reach = steps.values[steps.sources[op]], steps.taps[op].reach
            strided = op.geometry.stride != (1, 1)
            # The zeros after a row are those before the next one. Planes have pixels there.
            down, right = op.geometry.padding
            if strided:
                down, right = reach.above + reach.below, reach.left + reach.right
            _need(needs, classes.of(op.out), value.width + right, value.height + down, reach)
    grids: dict[int, dict[int, Grid]] = defaultdict(dict)
    for number, value in enumerate(steps.values):
        key = classes.of(number)
        row, rows, reach = needs[key]
        grids[key][number] = Grid(samples, value.height, value.width, row, rows, reach)
    found = {number: grid for same in grids.values() for number, grid in _aligned(same).items()}
    return [found[number] for number in range(len(found))]


def _aligned(grids: dict[int, Grid]) -> dict[int, Grid]:
    """Align the rows of values that have the same pitches, where none takes more registers for it.

    A register that is read from two cache lines takes longer. Filters of one row gain nothing.
    """
    aligned = {number: grid.aligned for number, grid in grids.items()}
    reach = next(iter(grids.values())).reach
    free = all(aligned[number].registers == grid.registers for number, grid in grids.items())
    return aligned if free and reach.above + reach.below else grids


def _need(
    needs: dict[int, tuple[int, int, Reach]], key: int, row: int, rows: int, reach: Reach
) -> None:
    before = needs.get(key, (0, 0, Reach()))
    needs[key] = max(before[0], row), max(before[1], rows), before[2] | reach


class _Classes:
    """Sets of values, which are joined."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def of(self, number: int) -> int:
        """Return the number that stands for the set of this one."""
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]  # shorter next time
            number = self._parent[number]
        return number

    def join(self, a: int, b: int) -> None:
        """Make one set of two."""
        self._parent[self.of(a)] = self.of(b)


@dataclass
class _Piece:
    """Memory that several values use, one after the other."""

    grid: Grid
    channels: int
    last: int
    planes: bool = False  # planes have pixels where other values have zeros

    @property
    def numbers(self) -> int:
        """How many numbers it holds. Kernels may read one channel beyond the last one."""
        return self.grid.channel * (self.channels + 1)


def place(
    steps: Steps,
    grids: Sequence[Grid],
    inputs: Sequence[int],
    outputs: Sequence[int],
    dtype: torch.dtype,
) -> tuple[list[Buffer], int]:
    """Return a buffer for each value, and the bytes of all memory.

    A value lives from the operation that makes it to the last one that reads it. Values whose
    points lie alike share memory: the points between pixels stay zero.
    """
    pieces, piece_of = _shared(steps, grids, inputs, outputs)
    return _allocated(pieces, piece_of, steps, grids, dtype)


def fitting(program: Program, most: int) -> int:
    """Return for how many samples, at most ``most``, the values fit into the last-level cache.

    Values that do not fit are read from memory again and again, which takes longer than computing
    few samples at a time.
    """
    steps = steps_of(program)
    pieces, _ = _shared(steps, grids_of(steps, most), program.inputs, program.outputs)
    needed = sum(piece.numbers for piece in pieces) * program.dtype.itemsize
    return max(1, min(most, most * caches().last // max(1, needed)))


def _shared(
    steps: Steps, grids: Sequence[Grid], inputs: Sequence[int], outputs: Sequence[int]
) -> tuple[list[_Piece], dict[int, int]]:
    """Return pieces of memory, and the number of the piece of each value."""
    last = [-1] * len(steps.values)
    for time, op in enumerate(steps.ops):
        for number in steps.reads(op):
            last[number] = time
    for number in outputs:
        last[number] = len(steps.ops)
    pieces: list[_Piece] = []
    piece_of: dict[int, int] = {}
    for number in inputs:
        piece_of[number] = _take(pieces, grids[number], steps.values[number], -1, last[number])
    for time, op in enumerate(steps.ops):
        if op.out not in piece_of:
            value, grid = steps.values[op.out], grids[op.out]
            over = next((n for n in op.in_place if last[n] == time and grids[n] == grid), None)
            if over is not None and pieces[piece_of[over]].channels >= value.channels:
                piece_of[op.out] = piece_of[over]
                pieces[piece_of[over]].last = last[op.out]
            else:
                end, planes = max(time, last[op.out]), isinstance(op, Planes)
                piece_of[op.out] = _take(pieces, grid, value, time, end, planes)
    return pieces, piece_of


def _take(
    pieces: list[_Piece], grid: Grid, value: Value, time: int, last: int, planes: bool = False
) -> int:
    """Return the number of a piece that is free at this time, or of a new one."""
    alike = [i for i, p in enumerate(pieces) if p.grid == grid and p.planes == planes]
    free = [i for i in alike if pieces[i].last < time]
    if not free:
        pieces.append(_Piece(grid, value.channels, last, planes))
        return len(pieces) - 1
    # The smallest one that is large enough, else the largest one, which then grows.
    number = min(
        free,
        key=lambda i: (
            pieces[i].channels < value.channels,
            abs(pieces[i].channels - value.channels),
        ),
    )
    pieces[number] = replace(
        pieces[number], channels=max(pieces[number].channels, value.channels), last=last
    )
    return number


def _allocated(
    pieces: Sequence[_Piece],
    piece_of: dict[int, int],
    steps: Steps,
    grids: Sequence[Grid],
    dtype: torch.dtype,
) -> tuple[list[Buffer], int]:
    memory = allocate([piece.numbers for piece in pieces], dtype, advise_huge_pages)
    masks: dict[Grid, Tensor | None] = {
        grid: grid.live(dtype) if grid.has_gaps else None for grid in set(grids)
    }
    buffers = []
    for number, value in enumerate(steps.values):
        grid = grids[number]
        buffers.append(Buffer(grid, value.channels, memory[piece_of[number]], masks[grid]))
    held = sum(mask.numel() * mask.element_size() for mask in masks.values() if mask is not None)
    return buffers, memory[0].untyped_storage().nbytes() + held
