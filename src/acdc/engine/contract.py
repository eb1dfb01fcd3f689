"""The interface between the engine and its kernels.

``Native`` (``acdc.engine.native``) and ``Reference`` (``acdc.engine.reference``) implement it, and
the tests compare the two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, ParamSpec, Protocol

import torch
from torch import Tensor

from acdc.engine.geometry import ConvGeometry, Size2
from acdc.engine.layout import Buffer, Shape
from acdc.engine.tile import Tiling
from acdc.errors import InputError

DTYPES = (torch.float32, torch.float64)
Strides = tuple[int, int, int, int]
Call = Callable[[], object]
P = ParamSpec("P")

Pointwise = Literal[
    "relu",  # max(x, 0); NaN stays NaN
    "relu_grad",  # (grad, y): grad where y, the output of the ReLU, is positive; 0 elsewhere
    "add",  # (x, y): x + y
    "mul",  # (x, y): x * y
    "copy",  # x
    "gelu",  # x * (1 + erf(x / sqrt(2))) / 2
    "gelu_tanh",  # the approximation of gelu by tanh
    "silu",  # x / (1 + exp(-x))
    "sigmoid",  # 1 / (1 + exp(-x))
    "relu6",  # min(max(x, 0), 6)
    "hardsigmoid",  # relu6(x + 3) / 6
    "hardswish",  # x * relu6(x + 3) / 6
    "gelu_grad",  # (grad, x): the gradient of the input x, from the gradient of the output
    "gelu_tanh_grad",
    "silu_grad",
    "sigmoid_grad",
    "relu6_grad",
    "hardsigmoid_grad",
    "hardswish_grad",
]
"""The kernels that compute each number of their output from the same number of their inputs."""


class KernelPlan(ABC):
    """The index lists of one layer, for one support and one pair of buffer shapes.

    The batch size of the shapes does not matter.

    Args:
        geometry: The layer's sizes.
        support: int64 flat indices of the kept weights, strictly ascending.
        x, dy: Shapes of the input's buffer and of the output gradient's buffer.
        strides: Strides of the dense weight ``[out, in, row, column]`` and of its gradient. Both
            fill their memory without gaps. The default is contiguous.

    Attributes:
        nnz: The number of kept weights.

    """

    def __init__(
        self,
        geometry: ConvGeometry,
        support: Tensor,
        x: Shape,
        dy: Shape,
        strides: Strides | None = None,
    ) -> None:
        check_plan(geometry, support, x, dy, strides)
        self.geometry, self.x, self.dy = geometry, x, dy
        self.strides = strides or contiguous_strides(geometry)
        self.nnz = support.numel()

    @abstractmethod
    def refresh(self, weight: Tensor, input_grad: bool = False) -> None:
        """Copy the values of the kept weights into the lists.

        Args:
            weight: The dense weight.
            input_grad: Fill the list of the input gradient, instead of that of the forward pass.

        """


class WeightGradCall(Protocol):
    """A bound call of ``conv_weight_grad``. ``into`` sets its output before each call.

    Attributes:
        scratch: How many elements its partial sums need.

    """

    scratch: int

    def into(self, grad: Tensor, scratch: Tensor, *, whole: bool = False) -> None:
        """Write to these tensors from now on. The caller keeps both alive.

        Args:
            grad: Receives the gradients of the kept weights.
            scratch: Receives the partial sums. It is aligned to a cache line.
            whole: ``grad`` holds anything: write zeros beside the kept weights.

        """

    def __call__(self) -> None:
        """Run the kernel."""


@dataclass(frozen=True)
class Step:
    """One call of a sequence.

    Args:
        call: What to run.
        alone: The call needs the results of all blocks, so no other call may run block by block
            with it.
        origin: What the call is a part of; a profile reads it.

    """

    call: Call
    alone: bool
    origin: object


class Fold:
    """A BatchNorm as ``scale * y + offset``, one number per channel, and the coefficients of its
    backward pass.
    """

    def __init__(self, channels: int, dtype: torch.dtype) -> None:
        vectors = torch.zeros(9, channels, dtype=dtype, device="cpu")
        self.mean, self.inverse, self.scale, self.offset = vectors[:4]
        self.a, self.b, self.c, self.weight_grad, self.bias_grad = vectors[4:]


class Kernels(Protocol):
    """A set of kernels. All buffers are in the layout of ``acdc.engine.layout``.

    Attributes:
        isa: The name of the instruction set.
        lanes: How many samples a register holds.
        by_block: Whether ``sequence`` can take each block of a batch through several calls before
        it
            starts the next block.

    """

    isa: str
    lanes: int
    by_block: bool

    def plan(
        self,
        geometry: ConvGeometry,
        support: Tensor,
        x: Shape,
        dy: Shape,
        *,
        strides: Strides | None = None,
        tiling: Tiling | None = None,
    ) -> KernelPlan:
        """Return the index lists of a layer.

        Args:
            geometry, support, x, dy, strides: As ``KernelPlan`` has them.
            tiling: What the tiles depend on beside the layer. The default is that of the caches of
                this machine. The reference has no tiles.

        """

    # --- bound calls ------------------------------------------------------------------------------

    def bind(self, kernel: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> Call:
        """Return the call of one of the methods below, ready to run again and again.

        A method that returns sums must be given a tensor for them, as ``sums=``.
        """

    def weight_grad_call(
        self, plan: KernelPlan, x: Buffer, dy: Buffer, *, accumulate: bool = False
    ) -> WeightGradCall:
        """Return the bound call of ``conv_weight_grad``, without its output."""

    def sequence(self, steps: Sequence[Step], blocks: int) -> list[Call]:
        """Return the calls that run these steps in order, for buffers of so many blocks.

        The steps between two that stand alone may run block by block: each thread takes a block
        through all of them before it takes the next.
        """

    # --- conversions ------------------------------------------------------------------------------

    def to_layout(self, plain: Tensor, out: Buffer) -> Buffer:
        """Copy an ``[N, C, H, W]`` or ``[tokens, features]`` tensor of any strides to a buffer."""

    def from_layout(self, buffer: Buffer, out: Tensor | None = None) -> Tensor:
        """Copy a buffer into a plain tensor: into ``out``, or into a new contiguous one."""

    # --- the sparse layer -------------------------------------------------------------------------

    def conv(
        self,
        plan: KernelPlan,
        x: Buffer,
        y: Buffer,
        *,
        bias: Tensor | None = None,
        accumulate: bool = False,
        statistics: bool = False,
        shift: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> Tensor | None:
        """Compute ``y = conv(x)``, or ``y += conv(x)``.

        With ``statistics``, return float64 ``[2, channels]``, written into ``sums`` if given: the
        sums of ``y - shift`` and of its square, over samples and pixels. A shift near the mean (the
        running mean) keeps the variance exact.
        """

    def conv_input_grad(
        self, plan: KernelPlan, dy: Buffer, dx: Buffer, *, accumulate: bool = False
    ) -> None:
        """Compute ``dx`` from ``dy``, or add it to what ``dx`` holds."""

    def conv_weight_grad(
        self, plan: KernelPlan, x: Buffer, dy: Buffer, grad: Tensor, *, accumulate: bool = False
    ) -> None:
        """Write the gradients of the kept weights into ``grad``, or add them.

        ``grad`` is shaped as the dense weight and has the plan's strides. Its other elements stay
        as they are.
        """

    def channel_sums(self, x: Buffer, *, sums: Tensor | None = None) -> Tensor:
        """Return the float64 sum of each channel over samples and pixels: a bias gradient."""

    # --- BatchNorm --------------------------------------------------------------------------------

    def statistics(
        self, x: Buffer, *, shift: Tensor | None = None, sums: Tensor | None = None
    ) -> Tensor:
        """Return float64 ``[2, channels]``: the sums of ``x - shift`` and of its square."""

    def norm_fold(
        self,
        fold: Fold,
        y: Buffer,
        *,
        sums: Tensor | None = None,
        shift: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        batches: Tensor | None = None,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        other: Fold | None = None,
    ) -> None:
        """Fill ``fold`` for a BatchNorm over ``y``.

        With the sums of a batch, also update the running statistics and the int64 ``batches``.
        Without sums, use the running statistics.

        Args:
            fold: What is filled. ``norm`` takes its scale and offset.
            y: What is normalized. Its shape says how many numbers each sum has.
            sums, shift: From ``conv`` or ``statistics``.
            weight, bias, running_mean, running_var, batches, momentum, eps: As in
                ``torch.nn.BatchNorm2d``.
            other: A fold whose offset is added to this one's, for ``norm`` with two inputs.

        """

    def norm(
        self,
        y: Buffer,
        scale: Tensor,
        offset: Tensor,
        out: Buffer,
        *,
        relu: bool = False,
        residual: Buffer | None = None,
        y2: Buffer | None = None,
        scale2: Tensor | None = None,
    ) -> None:
        """Compute ``out = f(scale*y + offset [+ scale2*y2] [+ residual])``, f = ReLU or nothing."""

    def norm_reduce(
        self,
        grad: Buffer,
        y: Buffer,
        mean: Tensor,
        *,
        out: Buffer | None = None,
        scale: Tensor | None = None,
        offset: Tensor | None = None,
        y2: Buffer | None = None,
        mean2: Tensor | None = None,
        dz: Buffer | None = None,
        sums: Tensor | None = None,
    ) -> Tensor:
        """Return float64 ``[3, channels]``: the sums of dz, dz*(y - mean) and dz*(y2 - mean2).

        ``dz`` is the gradient before the ReLU: ``grad`` where the ReLU's output was positive, and 0
        elsewhere. The output is read from ``out``, or computed as ``scale*y + offset`` if given
        these. Given neither, there was no ReLU, and ``dz`` is ``grad``. The buffer ``dz`` receives
        it, if given, and may be ``grad`` itself.
        """

    def norm_unfold(
        self,
        fold: Fold,
        y: Buffer,
        sums: Tensor,
        *,
        second: bool = False,
        training: bool = True,
        weight: Tensor | None = None,
    ) -> None:
        """Fill the gradients of a fold, and the ``a, b, c`` that ``norm_grad`` takes.

        Args:
            fold: As ``norm_fold`` filled it.
            y: What was normalized.
            sums: From ``norm_reduce``.
            second: This is the normalization of ``y2`` there.
            training: Whether the statistics were those of the batch.
            weight: As in ``norm_fold``.

        """

    def norm_grad(
        self,
        grad: Buffer,
        y: Buffer,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        dy: Buffer,
        *,
        out: Buffer | None = None,
        scale: Tensor | None = None,
        offset: Tensor | None = None,
        y2: Buffer | None = None,
        a2: Tensor | None = None,
        b2: Tensor | None = None,
        c2: Tensor | None = None,
        dy2: Buffer | None = None,
    ) -> None:
        """Compute ``dy = a*dz + b*y + c`` and ``dy2 = a2*dz + b2*y2 + c2``.

        ``dz`` follows from ``grad``, ``out``, ``scale`` and ``offset`` as in ``norm_reduce``.
        """

    # --- LayerNorm --------------------------------------------------------------------------------

    def layer_norm(
        self,
        x: Buffer,
        stats: Buffer,
        out: Buffer,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        centered: bool = True,
        known: bool = False,
    ) -> None:
        """Normalize each pixel, or token, over its channels.

        ``out = (x - mean) / sqrt(variance + eps) * weight + bias``.

        Args:
            x, out: Its input and its output.
            stats: A buffer of the size of ``x`` with two channels. It receives the mean and
                ``1 / sqrt(variance + eps)`` of each pixel.
            weight, bias: One number per channel; 1 and 0 by default.
            eps: Is added to the variance.
            centered: LayerNorm. Otherwise RMSNorm: the mean counts as 0.
            known: ``stats`` is read instead, as an earlier call left it.

        """

    def layer_norm_grad(
        self,
        grad: Buffer,
        x: Buffer,
        stats: Buffer,
        dx: Buffer | None,
        *,
        weight: Tensor | None = None,
        centered: bool = True,
        accumulate: bool = False,
        sums: Tensor | None = None,
    ) -> None:
        """Compute the gradients of ``layer_norm``.

        Args:
            grad: The gradient of its output.
            x, stats, weight, centered: As ``layer_norm`` had and left them.
            dx: Receives the gradient of ``x``, if given.
            accumulate: Add to what ``dx`` holds.
            sums: Float64 ``[2, channels]``. It receives the gradients of bias and weight, if given.

        """

    # --- between layers ---------------------------------------------------------------------------

    def gate(self, x: Buffer, gate: Buffer, out: Buffer) -> None:
        """Compute ``out = x * gate``, where ``gate`` is an image of one pixel."""

    def gate_grad(self, grad: Buffer, x: Buffer, dgate: Buffer) -> None:
        """Compute the gradient of the gate: the sum of ``grad * x`` over the pixels."""

    def pointwise(self, kernel: Pointwise, *inputs: Buffer, out: Buffer) -> None:
        """Compute ``out`` by one of the pointwise kernels. It may be one of the inputs."""

    def max_pool(
        self, x: Buffer, y: Buffer, window: Size2, stride: Size2, padding: Size2 = (0, 0)
    ) -> None:
        """Compute the maximum of each window."""

    def max_pool_grad(
        self,
        x: Buffer,
        y: Buffer,
        dy: Buffer,
        dx: Buffer,
        window: Size2,
        stride: Size2,
        padding: Size2 = (0, 0),
    ) -> None:
        """Give each maximum's gradient to the first pixel that equals the maximum."""

    def avg_pool(
        self,
        x: Buffer,
        y: Buffer,
        window: Size2,
        stride: Size2,
        padding: Size2 = (0, 0),
        count_padding: bool = True,
    ) -> None:
        """Compute the average of each window. A window as large as the image pools it globally."""

    def avg_pool_grad(
        self,
        dy: Buffer,
        dx: Buffer,
        window: Size2,
        stride: Size2,
        padding: Size2 = (0, 0),
        count_padding: bool = True,
    ) -> None:
        """Spread each average's gradient over its window."""


# --- what every plan checks -----------------------------------------------------------------------


def contiguous_strides(geometry: ConvGeometry) -> Strides:
    """Return the strides of a contiguous dense weight."""
    _, per_group, rows, columns = geometry.weight_shape
    return (per_group * rows * columns, rows * columns, columns, 1)


def numel(geometry: ConvGeometry) -> int:
    """Return the number of weights of the dense layer."""
    out, per_group, rows, columns = geometry.weight_shape
    return out * per_group * rows * columns


def check_plan(
    geometry: ConvGeometry,
    support: Tensor,
    x: Shape,
    dy: Shape,
    strides: Strides | None = None,
) -> None:
    """Raise unless the support, the two shapes and the strides belong to this layer."""
    if strides is not None:
        covered = 1
        for stride, size in sorted(zip(strides, geometry.weight_shape, strict=True)):
            if size > 1 and stride != covered:
                raise InputError(
                    f"A weight of {geometry.weight_shape} with strides {strides} has gaps or "
                    "overlaps: keep it contiguous or channels_last."
                )
            covered *= size
    if support.dtype != torch.int64 or support.dim() != 1:
        raise InputError(
            f"The support must be a vector of int64 indices, got {support.dtype} "
            f"{tuple(support.shape)}."
        )
    if numel(geometry) >= 2**31:
        raise InputError(f"A layer of {numel(geometry)} weights is too large for 32-bit indices.")
    if support.numel():
        ascending = bool((support[1:] > support[:-1]).all())
        if not ascending or int(support[0]) < 0 or int(support[-1]) >= numel(geometry):
            raise InputError(
                f"Indices of kept weights must ascend within 0..{numel(geometry) - 1}."
            )
    if x.channels != geometry.in_channels or dy.channels != geometry.out_channels:
        raise InputError(
            f"Buffers of {x.channels} and {dy.channels} channels do not fit {geometry}."
        )
    if x.dtype != dy.dtype or x.dtype not in DTYPES or x.lanes != dy.lanes or x.tokens != dy.tokens:
        raise InputError(
            "Both buffers of a layer must have the same lanes, dtype (float32 or float64) and kind."
        )
    if x.tokens and geometry != ConvGeometry.linear(x.channels, dy.channels):
        raise InputError("Buffers of tokens are for linear layers.")
    if (dy.height, dy.width) != geometry.out_size(x.height, x.width):
        raise InputError(
            f"The output is {geometry.out_size(x.height, x.width)}, got {dy.height}x{dy.width}."
        )
    if x.halo < geometry.halo or dy.halo < geometry.grad_halo(x.height, x.width):
        raise InputError(
            f"The halos must be at least {geometry.halo} and "
            f"{geometry.grad_halo(x.height, x.width)}, "
            f"got {x.halo} and {dy.halo}."
        )
