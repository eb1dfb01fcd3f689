"""What a program must be before memory is allocated for it. A file may hold any numbers."""

from __future__ import annotations

from torch import Tensor

from acdc.engine.contract import numel
from acdc.engine.geometry import ConvGeometry
from acdc.errors import InputError
from acdc.runtime.placing import grids_of, steps_of
from acdc.runtime.program import (
    Attention,
    Conv,
    Embed,
    Gate,
    Join,
    Map,
    Norm,
    Op,
    Pool,
    Program,
    Value,
)

MOST_OPS = 4096
MOST_SIZE = 2**24  # of a channel count, or of a side of an image
# Of the positions of a filter, a side of a window, a stride, a padding, a dilation, or the keys of
# an attention.
MOST_STEP = 4096
MOST_BYTES = 2**34  # of all values for one sample, if none shared memory


def check_program(program: Program) -> None:
    """Raise unless a program is one that kernels can run.

    Raises:
        InputError: An operation reads a value that is not made before, or sizes do not fit. The
            message is a part of a sentence.

    """
    if not program.ops or len(program.ops) > MOST_OPS:
        raise InputError(f"it has {len(program.ops)} operations, and can have 1 to {MOST_OPS}")
    for value in program.values:
        sizes = (value.channels, value.height, value.width)
        if not all(1 <= size <= MOST_SIZE for size in sizes):
            raise InputError(f"a value has the sizes {sizes}")
        if value.tokens and value.height != 1:
            raise InputError("tokens have more than one row")
        if value.integers and not (value.tokens and value.channels == 1):
            raise InputError("integers have more than one channel")
    _check_order(program)
    _check_integers(program)
    for number, op in enumerate(program.ops):
        try:
            _check_sizes(op, program.values)
        except InputError as error:
            raise InputError(f"its operation {number} does not fit: {error}") from error
    _check_memory(program)


def _check_order(program: Program) -> None:
    """Check that each value is made once, before it is read."""
    count = len(program.values)
    made = set(program.inputs)
    if not program.inputs or len(made) != len(program.inputs):
        raise InputError("its inputs are not different values")
    for op in program.ops:
        if any(number not in made for number in op.reads):
            raise InputError("an operation reads a value that is not made before")
        if op.out in made:
            raise InputError("a value is made twice")
        made.add(op.out)
    if made != set(range(count)):
        raise InputError("its values are not those that its operations make")
    if not program.outputs or not made.issuperset(program.outputs):
        raise InputError("an output is a value that is not made")


def _check_integers(program: Program) -> None:
    """Check that integers are inputs, and are read as rows of a table or as a mask alone."""
    integers = {number for number, value in enumerate(program.values) if value.integers}
    if not integers.issubset(program.inputs) or integers.intersection(program.outputs):
        raise InputError("integers are no input, or an output")
    for op in program.ops:
        wanted = {op.x} if isinstance(op, Embed) else set()
        if isinstance(op, Attention) and op.mask is not None:
            wanted = {op.mask}
        if integers.intersection(op.reads) != wanted:
            raise InputError("an operation reads integers as numbers, or numbers as integers")


def _check_sizes(op: Op, values: list[Value]) -> None:
    x, out = values[op.x], values[op.out]
    if isinstance(op, Conv):
        _check_conv(op, x, out)
        if op.residual is not None:
            _same(values[op.residual], out)
        _vector(op.bias, out)
    elif isinstance(op, Map):
        _same(x, out)
        if op.y is not None:
            _same(values[op.y], out)
        _vector(op.scale, out)
        _vector(op.offset, out)
        if (op.scale is None) != (op.offset is None):
            raise InputError("a scale without an offset")
    elif isinstance(op, Gate):
        _same(x, out)
        if values[op.gate] not in (Value(x.channels), Value(x.channels, tokens=True)):
            raise InputError("a gate has one pixel, and the channels of its image")
    elif isinstance(op, Norm):
        _same(x, out)
        _vector(op.weight, out)
        _vector(op.bias, out)
    elif isinstance(op, Pool):
        _check_pool(op, x, out)
    elif isinstance(op, Join):
        _check_join(op, values)
    elif isinstance(op, Embed):
        _check_embed(op, x, out)
    else:
        assert isinstance(op, Attention)
        _check_attention(op, values)


def _check_conv(op: Conv, x: Value, out: Value) -> None:
    g = op.geometry
    taps = g.kernel[0] * g.kernel[1]
    if max(taps, *g.stride, *g.padding, *g.dilation) > MOST_STEP or numel(g) >= 2**31:
        raise InputError(f"its sizes are too large: {g}")
    made = Value(g.out_channels, *g.out_size(x.height, x.width), tokens=out.tokens)
    if g.in_channels != x.channels or made != out:
        raise InputError(f"{g} makes {made} of {x}, not {out}")


def _check_pool(op: Pool, x: Value, out: Value) -> None:
    if max(*op.window, *op.stride, *op.padding) > max(MOST_STEP, x.height, x.width):
        raise InputError("its window is too large")
    g = ConvGeometry(x.channels, x.channels, op.window, op.stride, op.padding)
    if any(2 * p > w for p, w in zip(op.padding, op.window, strict=True)):
        raise InputError("its padding is more than half of its window")
    if (out.channels, out.height, out.width) != (x.channels, *g.out_size(x.height, x.width)):
        raise InputError(f"pooling makes {g.out_size(x.height, x.width)}, not {out}")


def _check_join(op: Join, values: list[Value]) -> None:
    out = values[op.out]
    if not op.parts or len(op.parts) > MOST_OPS or op.x != op.parts[0].x:
        raise InputError(f"it joins {len(op.parts)} parts, and can join 1 to {MOST_OPS}")
    for part in op.parts:
        x = values[part.x]
        _within(part.channel, part.channels, x.channels)
        _within(part.point, part.points, x.points)
        _within(part.to_channel, part.channels, out.channels)
        _within(part.to_point, part.points, out.points)
    if op.table is not None and tuple(op.table.shape) != (out.channels, out.points):
        raise InputError(f"a table of {tuple(op.table.shape)} for {out}")


def _within(first: int, count: int, size: int) -> None:
    if first < 0 or count < 1 or first + count > size:
        raise InputError(f"a part from {first} to {first + count} of {size}")


def _check_embed(op: Embed, x: Value, out: Value) -> None:
    rows = op.table.shape[0]
    if op.table.dim() != 2 or op.table.shape[1] != out.channels:
        raise InputError(f"a table of {tuple(op.table.shape)} for {out.channels} channels")
    if not 1 <= rows <= MOST_SIZE:  # float32 holds the integers up to this one
        raise InputError(f"a table of {rows} rows")
    if (x.height, x.width) != (out.height, out.width):
        raise InputError(f"{x} and {out} have different sizes")


def _check_attention(op: Attention, values: list[Value]) -> None:
    x, keys, held, out = (values[number] for number in (op.x, op.keys, op.values, op.out))
    if min(op.heads, op.size, op.value_size) < 1 or any(
        v.height != 1 for v in (x, keys, held, out)
    ):
        raise InputError("an attention of no size, or of images with several rows")
    sizes = (op.size, op.size, op.value_size)
    for value, first, size in zip((x, keys, held), op.first, sizes, strict=True):
        _within(first, op.heads * size, value.channels)
    if held.width != keys.width or out.width != x.width:
        raise InputError("an attention with different numbers of tokens")
    if out.channels != op.heads * op.value_size:
        raise InputError(f"{op.heads} heads of {op.value_size} channels make {out}")
    if op.mask is not None and values[op.mask].width != keys.width:
        raise InputError("a mask with another number of tokens")
    if keys.width > MOST_STEP:
        raise InputError(
            f"an attention to {keys.width} tokens, and at most {MOST_STEP} are allowed"
        )


def _same(value: Value, out: Value) -> None:
    sizes = (value.channels, value.height, value.width)
    if sizes != (out.channels, out.height, out.width):
        raise InputError(f"{value} and {out} have different sizes")


def _vector(vector: Tensor | None, out: Value) -> None:
    if vector is not None and tuple(vector.shape) != (out.channels,):
        raise InputError(f"a vector of {tuple(vector.shape)} for {out.channels} channels")


def _check_memory(program: Program) -> None:
    steps = steps_of(program)
    itemsize = program.dtype.itemsize
    total = sum(
        grid.channel * value.channels * itemsize
        for grid, value in zip(grids_of(steps, 1), steps.values, strict=True)
    )
    if total > MOST_BYTES:
        raise InputError(f"it needs {total:,} bytes for one sample")
