"""A part of a network as operations of the runtime, for any batch size.

A program holds plain data: sizes, numbers and tensors. It knows no modules and no memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from acdc.engine.geometry import ConvGeometry, Size2

Activation = Literal[
    "nothing", "relu", "relu6", "sigmoid", "hardsigmoid", "hardswish", "silu", "gelu", "gelu_tanh",
    "tanh",
]  # fmt: skip
ACTIVATIONS: tuple[Activation, ...] = (
    "nothing", "relu", "relu6", "sigmoid", "hardsigmoid", "hardswish", "silu", "gelu", "gelu_tanh",
    "tanh",
)  # fmt: skip
"""What may be applied to each number of a result, in the order of ``csrc/acdc_points.h``."""


@dataclass(frozen=True)
class Value:
    """A tensor between two operations, without its batch size.

    Args:
        channels, height, width: Its sizes. A token has one pixel. A sequence is an image of one
            row: each of its tokens is a pixel.
        tokens: It is ``[..., channels]`` outside of the runtime, or ``[N, width, channels]`` if it
            is a sequence; else ``[N, channels, H, W]``.
        integers: It is an integer or bool tensor ``[N, width]`` outside of the runtime: numbers of
            rows of a table, or a mask.

    """

    channels: int
    height: int = 1
    width: int = 1
    tokens: bool = False
    integers: bool = False

    @property
    def is_sequence(self) -> bool:
        """Whether a sample has several tokens."""
        return self.tokens and self.width > 1

    @property
    def points(self) -> int:
        """The pixels, or tokens, of a sample."""
        return self.height * self.width


@dataclass(eq=False)
class Kept:
    """The kept weights of a layer.

    Args:
        index: int32 ``[kept]``, ascending: their positions in the dense weight, which is
            contiguous.
        values: ``[kept]``.

    """

    index: Tensor
    values: Tensor

    @staticmethod
    def of(weight: Tensor) -> Kept:
        """Return all weights that are not zero."""
        flat = weight.detach().reshape(-1)
        index = flat.nonzero()[:, 0]
        return Kept(index.to(torch.int32), flat[index])


@dataclass(eq=False)
class Op:
    """An operation.

    Args:
        name: Of the module or of the node that it comes from.
        x: The number of the value that it reads.
        out: The number of the value that it makes.

    """

    name: str
    x: int
    out: int

    @property
    def reads(self) -> tuple[int, ...]:
        """The values that it reads."""
        return (self.x,)

    @property
    def in_place(self) -> tuple[int, ...]:
        """The values whose memory the result may take over, if nothing reads them later."""
        return ()

    def renumber(self, number_of: Mapping[int, int]) -> None:
        """Give new numbers to all values."""
        for name in ("x", "out", "y", "residual", "gate", "keys", "values", "mask"):
            if (old := getattr(self, name, None)) is not None:
                setattr(self, name, number_of[old])


@dataclass(eq=False)
class Conv(Op):
    """A convolution or a linear layer: ``out = activation(conv(x) + bias + residual)``."""

    geometry: ConvGeometry
    weight: Kept
    bias: Tensor | None = None
    residual: int | None = None
    activation: Activation = "nothing"

    @property
    def reads(self) -> tuple[int, ...]:
        """The values that it reads."""
        return (self.x,) if self.residual is None else (self.x, self.residual)

    @property
    def in_place(self) -> tuple[int, ...]:
        """The values whose memory the result may take over."""
        # The residual is read before the sums are stored.
        return () if self.residual is None or self.residual == self.x else (self.residual,)

    def scale(self, factor: Tensor, offset: Tensor) -> None:
        """Multiply each output channel by a number, and add another one."""
        per_filter = self.weight_numel // self.geometry.out_channels
        of_channel = factor[self.weight.index.long() // per_filter]
        self.weight = Kept(self.weight.index, self.weight.values * of_channel)
        self.bias = offset if self.bias is None else self.bias * factor + offset

    @property
    def weight_numel(self) -> int:
        """The number of weights of the dense layer."""
        return torch.Size(self.geometry.weight_shape).numel()


@dataclass(eq=False)
class Map(Op):
    """``out = activation(scale * x + offset, with y added or multiplied)``, number by number."""

    y: int | None = None
    multiply: bool = False
    scale: Tensor | None = None
    offset: Tensor | None = None
    activation: Activation = "nothing"

    @property
    def reads(self) -> tuple[int, ...]:
        """The values that it reads."""
        return (self.x,) if self.y is None else (self.x, self.y)

    @property
    def in_place(self) -> tuple[int, ...]:
        """The values whose memory the result may take over."""
        return self.reads

    @property
    def is_affine(self) -> bool:
        """Whether it only scales and shifts each channel."""
        return self.scale is not None and self.y is None and self.activation == "nothing"

    @property
    def is_activation(self) -> bool:
        """Whether it only applies an activation."""
        return self.scale is None and self.y is None

    @property
    def is_sum(self) -> bool:
        """Whether it only adds two values."""
        plain = self.scale is None and self.activation == "nothing"
        return self.y is not None and not self.multiply and plain


@dataclass(eq=False)
class Gate(Op):
    """``out = x * gate``, where the gate has one pixel: squeeze-and-excitation."""

    gate: int

    @property
    def reads(self) -> tuple[int, ...]:
        """The values that it reads."""
        return (self.x, self.gate)

    @property
    def in_place(self) -> tuple[int, ...]:
        """The values whose memory the result may take over."""
        return (self.x,)


@dataclass(eq=False)
class Norm(Op):
    """A LayerNorm (``centered``) or an RMSNorm over the channels of each token."""

    eps: float
    centered: bool
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def in_place(self) -> tuple[int, ...]:
        """The values whose memory the result may take over."""
        return (self.x,)


@dataclass(eq=False)
class Pool(Op):
    """Max or average pooling."""

    maximum: bool
    window: Size2
    stride: Size2
    padding: Size2
    count_padding: bool


@dataclass(frozen=True)
class Part:
    """Some points of some channels of a value. Points are numbered row by row.

    Args:
        x: The value.
        channel, point: The first ones that are read.
        channels, points: How many are copied.
        to_channel, to_point: The first ones that are written.

    """

    x: int
    channel: int
    point: int
    channels: int
    points: int
    to_channel: int
    to_point: int


@dataclass(eq=False)
class Join(Op):
    """Copies parts of values into one: concatenation, slices, another form, tokens from a table.

    Args:
        parts: What is copied, in this order. ``x`` is the value of the first one.
        table: ``[channels, points]``, which is added to what is copied, or None. What no part
            covers is the number of the table, or 0.

    """

    parts: tuple[Part, ...]
    table: Tensor | None = None

    @property
    def reads(self) -> tuple[int, ...]:
        """The values that it reads."""
        return tuple(dict.fromkeys(part.x for part in self.parts))

    def renumber(self, number_of: Mapping[int, int]) -> None:
        """Give new numbers to all values."""
        super().renumber(number_of)
        self.parts = tuple(replace(part, x=number_of[part.x]) for part in self.parts)

    def covers(self, out: Value) -> bool:
        """Return whether the parts write every point of the result."""
        written = torch.zeros(out.channels, out.points, dtype=torch.bool)
        for p in self.parts:
            rows = slice(p.to_channel, p.to_channel + p.channels)
            written[rows, p.to_point : p.to_point + p.points] = True
        return bool(written.all())


@dataclass(eq=False)
class Embed(Op):
    """The rows of a table, ``[rows, channels]``, whose numbers are the integers of a value."""

    table: Tensor


@dataclass(eq=False)
class Attention(Op):
    """``out = softmax(scale * queries . keys) . values`` for each sample and each head.

    Args:
        x, keys, values: The values that hold queries, keys and values: sequences, or images of one
            row. The channels of a head follow one another.
        first: The first channel of queries, of keys and of values.
        heads: How many heads there are.
        size, value_size: Channels of a head: of queries and keys, and of values.
        scale: What the products are multiplied by.
        causal: Each query attends to the keys up to its own number.
        mask: Integers, one for each key: 0 where no query attends to it; or None.

    """

    keys: int
    values: int
    first: tuple[int, int, int]
    heads: int
    size: int
    value_size: int
    scale: float
    causal: bool = False
    mask: int | None = None

    @property
    def reads(self) -> tuple[int, ...]:
        """The values that it reads."""
        found = (self.x, self.keys, self.values, *(() if self.mask is None else (self.mask,)))
        return tuple(dict.fromkeys(found))


@dataclass(eq=False)
class Planes(Op):
    """The planes of a stride, which a plan puts before a convolution: see ``acdc_points.h``.

    Args:
        phases: The row and the column of each phase.
        first: The row and the column of the first point of a plane.
        size: The rows and the columns of a plane.
        stride: The stride.

    """

    phases: tuple[Size2, ...]
    first: Size2
    size: Size2
    stride: Size2


@dataclass(eq=False)
class Program:
    """Operations in order.

    Args:
        dtype: Of all numbers.
        values: All values, by number.
        ops: The operations.
        inputs, outputs: The values at both ends.
        removed: How many channels were removed.

    """

    dtype: torch.dtype
    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    removed: int = 0

    def new(self, value: Value) -> int:
        """Add a value and return its number."""
        self.values.append(value)
        return len(self.values) - 1

    def drop_unused(self) -> None:
        """Number the values anew, without those that nothing makes or reads."""
        used = set(self.inputs).union(self.outputs, *((op.out, *op.reads) for op in self.ops))
        number_of = {old: new for new, old in enumerate(sorted(used))}
        self.values = [self.values[old] for old in sorted(used)]
        self.inputs = [number_of[old] for old in self.inputs]
        self.outputs = [number_of[old] for old in self.outputs]
        for op in self.ops:
            op.renumber(number_of)

    @property
    def convs(self) -> list[Conv]:
        """The layers."""
        return [op for op in self.ops if isinstance(op, Conv)]


def readers_of(ops: Sequence[Op], outputs: Sequence[int], values: int) -> list[int]:
    """Return how many operations read each value; an output has one reader more."""
    count = [0] * values
    for op in ops:
        for number in op.reads:
            count[number] += 1
    for number in outputs:
        count[number] += 1
    return count
