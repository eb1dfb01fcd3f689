"""What a program must be before memory is allocated for it. A file may hold any numbers."""

from __future__ import annotations

from torch import Tensor

from acdc.engine.contract import numel
from acdc.engine.geometry import ConvGeometry
from acdc.errors import InputError
from acdc.runtime.placing import grids_of, steps_of
from acdc.runtime.program import Conv, Gate, Map, Norm, Op, Pool, Program, Value

MOST_OPS = 4096
MOST_SIZE = 2**24  # of a channel count, or of a side of an image
# Of the positions of a filter, a side of a window, a stride, a padding or a dilation.
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
        if value.tokens and sizes[1:] != (1, 1):
            raise InputError("a token has more than one pixel")
    _check_order(program)
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
    else:
        assert isinstance(op, Pool)
        _check_pool(op, x, out)


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
