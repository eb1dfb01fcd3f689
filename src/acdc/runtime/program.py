"""A part of a network as operations of the runtime, for any batch size.

A program holds plain data: sizes, numbers and tensors. It knows no modules and no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from acdc.engine.geometry import ConvGeometry, Size2

Activation = Literal[
    "nothing", "relu", "relu6", "sigmoid", "hardsigmoid", "hardswish", "silu", "gelu", "gelu_tanh"
]
ACTIVATIONS: tuple[Activation, ...] = (
    "nothing", "relu", "relu6", "sigmoid", "hardsigmoid", "hardswish", "silu", "gelu", "gelu_tanh",
)  # fmt: skip
"""What may be applied to each number of a result, in the order of ``csrc/acdc_points.h``."""


@dataclass(frozen=True)
class Value:
    """A tensor between two operations, without its batch size.

    Args:
        channels, height, width: Its sizes. A token has one pixel.
        tokens: It is ``[..., channels]`` outside of the runtime, else ``[N, channels, H, W]``.

    """

    channels: int
    height: int = 1
    width: int = 1
    tokens: bool = False


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
            for name in ("x", "out", "y", "residual", "gate"):
                if (old := getattr(op, name, None)) is not None:
                    setattr(op, name, number_of[old])

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
