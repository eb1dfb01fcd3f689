"""The compiled kernels behind a small API of buffers. The only module that touches
``acdc._kernels``.

``acdc.engine.reference`` has the same functions in plain PyTorch, and the tests hold them together.
Every call runs on ``torch.get_num_threads()`` threads of torch's own OpenMP pool; for a given
number of threads its results are bitwise the same every time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch  # first: its OpenMP library must be the one that the kernels find

from acdc.engine.geometry import ConvGeometry, Pair
from acdc.engine.layout import LINE, Buffer, Shape
from acdc.engine.tile import Tile
from acdc.errors import AcdcError, InputError

try:
    _kernels: Any = importlib.import_module("acdc._kernels")
except ImportError:  # installed without a compiler
    _kernels = None

DTYPES = (torch.float32, torch.float64)
Strides = tuple[int, int, int, int]


def available() -> bool:
    """Return whether the compiled kernels are there."""
    return _kernels is not None


def instruction_sets() -> list[str]:
    """Return the instruction sets that were compiled in and that this machine has, narrowest
    first.
    """
    if _kernels is None:
        return []
    return [_kernels.isa(i) for i in range(_kernels.table_count()) if _kernels.supported(i)]


def kernel_names() -> tuple[str, ...]:
    """Return the rows of the kernel table."""
    return () if _kernels is None else tuple(_kernels.KERNELS)


def advise_huge_pages(memory: torch.Tensor) -> None:
    """Ask the system for huge pages behind memory that was not touched yet: a pass over an
    activation then misses the page tables far less often. Where there are none, nothing happens.
    """
    if _kernels is not None:
        _kernels.advise_huge_pages(memory.data_ptr(), memory.numel() * memory.element_size())


class Plan:
    """The index lists of one layer for one support and one pair of buffer shapes (of any batch
    size).

    Args:
        geometry: the layer's sizes.
        support: int64 flat indices of the kept weights, strictly ascending.
        x, dy: shapes of the input's buffer and of the output gradient's buffer.
        tile, grad_tile, weight_tile: how the forward pass, the input gradient and the weight
            gradient are cut. The weight gradient shares the panels of the forward pass.
        strides: of the dense weight ``[out, in, row, column]`` and of its gradient, which fill
            their memory without gaps; default contiguous.

    """

    def __init__(
        self,
        geometry: ConvGeometry,
        support: torch.Tensor,
        x: Shape,
        dy: Shape,
        tile: Tile | None = None,
        grad_tile: Tile | None = None,
        weight_tile: Tile | None = None,
        strides: Strides | None = None,
    ) -> None:
        if _kernels is None:
            raise AcdcError(
                "The compiled kernels are missing: reinstall acdc where there is a C++ compiler."
            )
        check_plan(geometry, support, x, dy, strides)
        self.geometry, self.x, self.dy = geometry, x, dy
        self.strides = strides or contiguous_strides(geometry)
        self.nnz = support.numel()
        density = self.nnz / numel(geometry) / geometry.groups
        self.tile = tile or Tile.forward(geometry, dy, density)
        self.grad_tile = grad_tile or Tile.input_grad(geometry, x, density)
        self.weight_tile = weight_tile or self.tile.weight_grad(geometry)
        a = _kernels.plan_args()
        a.out_channels, a.in_channels = geometry.out_channels, geometry.in_channels
        a.kernel_rows, a.kernel_columns = geometry.kernel
        a.groups = geometry.groups
        a.row_step, a.column_step = geometry.stride
        a.row_padding, a.column_padding = geometry.padding
        a.row_dilation, a.column_dilation = geometry.dilation
        support = support.contiguous()
        a.nnz, a.support = support.numel(), support.data_ptr()
        a.out_stride, a.in_stride, a.row_stride, a.column_stride = self.strides
        a.lanes, a.is_double = x.lanes, x.dtype == torch.float64
        a.x_row, a.x_channel = x.row, x.channel
        a.dy_row, a.dy_channel = dy.row, dy.channel
        a.in_tile, a.out_tile = self.tile.channels, self.grad_tile.channels
        self._plan = _kernels.Plan(a)
        if not self._plan.valid():
            raise InputError(
                f"A layer this large does not fit into 32-bit offsets or memory: {geometry}."
            )

    def refresh(self, weight: torch.Tensor, input_grad: bool = False) -> None:
        """Copy the values of the kept weights into the lists of the forward pass or the input
        gradient.
        """
        if weight.dtype != self.x.dtype or weight.numel() != numel(self.geometry):
            raise InputError(
                f"The plan wants {numel(self.geometry)} weights of {self.x.dtype}, got "
                f"{weight.shape}."
            )
        weight = weight.detach()
        if not self.lies_as_planned(weight):
            weight = torch.empty_strided(
                self.geometry.weight_shape, self.strides, dtype=weight.dtype
            ).copy_(weight.reshape(self.geometry.weight_shape))
        self._plan.refresh(weight.data_ptr(), input_grad, torch.get_num_threads())

    def lies_as_planned(self, weight: torch.Tensor) -> bool:
        """Return whether a dense weight (or its gradient) has the strides of this plan."""
        shape = self.geometry.weight_shape
        if weight.dim() == 2:
            weight = weight[:, :, None, None]
        return tuple(weight.shape) == shape and all(
            size == 1 or have == want
            for size, have, want in zip(shape, weight.stride(), self.strides, strict=True)
        )


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
    support: torch.Tensor,
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
            f"The support is a vector of int64 indices, got {support.dtype} {tuple(support.shape)}."
        )
    if numel(geometry) >= 2**31:
        raise InputError(f"A layer of {numel(geometry)} weights is too large for 32-bit indices.")
    if support.numel():
        ascending = bool((support[1:] > support[:-1]).all())
        if not ascending or int(support[0]) < 0 or int(support[-1]) >= numel(geometry):
            raise InputError(f"Indices of kept weights ascend within 0..{numel(geometry) - 1}.")
    if x.channels != geometry.in_channels or dy.channels != geometry.out_channels:
        raise InputError(
            f"Buffers of {x.channels} and {dy.channels} channels do not fit {geometry}."
        )
    if x.dtype != dy.dtype or x.dtype not in DTYPES or x.lanes != dy.lanes or x.tokens != dy.tokens:
        raise InputError(
            "Both buffers of a layer share lanes, dtype (float32 or float64) and kind."
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


@dataclass
class Call:
    """A kernel and its arguments. ``held`` are the tensors that its addresses point into;
    ``origin`` is what it was bound for.
    """

    function: Any
    index: int
    is_double: bool
    args: Any
    held: tuple[Any, ...] = ()
    origin: Any = field(default=None, kw_only=True)

    @property
    def kernel(self) -> str:
        """Its row in the kernel table."""
        return str(self.function.__name__)

    def __call__(self) -> None:
        """Run the kernel."""
        self.function(self.index, self.is_double, self.args)


@dataclass
class WeightGradCall(Call):
    """The weight gradient of a layer, for any tensor to put it into.

    ``scratch`` is how many numbers its partial sums are.
    """

    plan: Plan | None = None
    scratch: int = 0

    def into(self, grad: torch.Tensor, scratch: torch.Tensor) -> None:
        """Put the gradients of the kept weights into ``grad`` from now on, and the partial sums
        into ``scratch``, aligned to a cache line; the caller keeps both.
        """
        assert self.plan is not None
        assert scratch.numel() >= self.scratch
        assert scratch.data_ptr() % LINE == 0
        if grad.dtype != self.plan.x.dtype or not self.plan.lies_as_planned(grad):
            raise InputError(
                f"The gradient is a {self.plan.x.dtype} tensor shaped as the weight, with the "
                f"plan's strides {self.plan.strides}; got {grad.dtype}, {tuple(grad.shape)} with "
                f"strides {grad.stride()}."
            )
        self.args.target, self.args.workspace = grad.data_ptr(), scratch.data_ptr()


class Fold:
    """One number a channel each: a BatchNorm as ``scale * y + offset``, and its way back."""

    def __init__(self, channels: int, dtype: torch.dtype) -> None:
        self.mean, self.inverse, self.scale, self.offset = torch.zeros(4, channels, dtype=dtype)
        self.a, self.b, self.c = torch.zeros(3, channels, dtype=dtype)
        self.weight_grad, self.bias_grad = torch.zeros(2, channels, dtype=dtype)


class Native:
    """The kernels of one instruction set: the widest this machine has, or the one asked for by
    name.
    """

    plan = Plan

    def __init__(self, isa: str | None = None) -> None:
        if _kernels is None:
            raise AcdcError(
                "The compiled kernels are missing: reinstall acdc where there is a C++ compiler."
            )
        here = instruction_sets()
        if isa is not None and isa not in here:
            raise InputError(f"This machine has the kernels {here}, not {isa!r}.")
        self.isa = isa or here[-1]
        every = [_kernels.isa(i) for i in range(_kernels.table_count())]
        self._index = every.index(self.isa)
        self.lanes = int(_kernels.lanes(self._index))
        self._workspace: dict[torch.dtype, torch.Tensor] = {}
        self._bound: list[Call] | None = None  # while binding: calls go here and do not run
        self._own: tuple[torch.Tensor, ...] = ()  # the workspace of the call that is being bound

    def bind(self, name: str, *args: Any, **kwargs: Any) -> Call:
        """Return the call of a method that takes buffers and returns nothing of its own, ready to
        run again and again: its structs are filled once. Sums need their ``sums=`` tensor.
        """
        bound: list[Call] = []
        self._bound = bound
        try:
            getattr(self, name)(*args, **kwargs)
        finally:
            self._bound = None
        (call,) = bound
        call.held = (args, kwargs, *call.held)
        return call

    def sequence(self, calls: Sequence[Call], alone: Sequence[bool]) -> Callable[..., None]:
        """Return bound calls as one, a function of the number of blocks and of threads. It adds
        what each call takes to float64 ``[1 + threads, calls]``, if given: what it does for all
        threads at once, and what it does on each.

        Between two calls that stand alone, all run block by block: each thread takes a block
        through all of them. Those that need the sums of all blocks stand alone.
        """
        sequence = _kernels.Sequence()
        for call, is_alone in zip(calls, alone, strict=True):
            add = getattr(sequence, f"add_{call.kernel}")
            add(call.index, call.is_double, call.args, is_alone)
        held = tuple(calls)

        def run(blocks: int, threads: int, seconds: torch.Tensor | None = None) -> None:
            assert held  # the structs must live
            sequence.run(blocks, threads, 0 if seconds is None else seconds.data_ptr())

        return run

    # ---- conversions ----

    def to_layout(self, plain: torch.Tensor, out: Buffer) -> Buffer:
        """Copy an ``[N, C, H, W]`` tensor, or ``[tokens, features]``, of any strides into a
        buffer.
        """
        # A copy must live until the kernel has run: the struct holds its address only.
        plain = plain.detach() if _convertible(plain) else plain.detach().contiguous()
        a = _kernels.convert_args()
        a.image, a.plain = self._image(out), self._plain(plain, out)
        self._run("to_layout", a, out)
        return out

    def from_layout(self, buffer: Buffer, out: torch.Tensor | None = None) -> torch.Tensor:
        """Copy a buffer into a plain tensor: ``out`` if given (contiguous or channels_last), or a
        new one.
        """
        s = buffer.shape
        if out is None:
            size = (
                (s.samples, s.channels) if s.tokens else (s.samples, s.channels, s.height, s.width)
            )
            out = torch.empty(size, dtype=s.dtype)
        if not _convertible(out):
            return out.copy_(self.from_layout(buffer))
        a = _kernels.convert_args()
        a.image, a.plain = self._image(buffer), self._plain(out, buffer)
        self._run("from_layout", a, buffer)
        return out

    # ---- the sparse layer ----

    def conv(
        self,
        plan: Plan,
        x: Buffer,
        y: Buffer,
        *,
        bias: torch.Tensor | None = None,
        accumulate: bool = False,
        statistics: bool = False,
        shift: torch.Tensor | None = None,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Compute ``y = conv(x)``, or ``y += conv(x)``.

        With ``statistics``, return float64 ``[2, channels]`` (written into ``sums``, if given): the
        sums of ``y - shift`` and of its square over samples and pixels. A shift near the mean (the
        running mean) keeps the variance exact.
        """
        self._same(plan.x, x, "x")
        self._sized(y, plan.dy, "y")
        a = _kernels.conv_args()
        a.set_plan(plan._plan, False)
        a.in_row_step, a.in_column_step = plan.geometry.stride
        a.out_row_step = a.out_column_step = 1
        if statistics:
            sums = self._sums(sums, 2, y)
        return self._conv(a, plan.tile, x, y, bias, accumulate, sums if statistics else None, shift)

    def conv_input_grad(
        self, plan: Plan, dy: Buffer, dx: Buffer, *, accumulate: bool = False
    ) -> None:
        """Compute ``dx`` from ``dy``, or add it to what ``dx`` holds."""
        self._same(plan.dy, dy, "dy")
        self._sized(dx, plan.x, "dx")
        a = _kernels.conv_args()
        a.set_plan(plan._plan, True)
        a.in_row_step = a.in_column_step = 1
        a.out_row_step, a.out_column_step = plan.geometry.stride
        self._conv(a, plan.grad_tile, dy, dx, None, accumulate, None, None)

    def conv_weight_grad(
        self, plan: Plan, x: Buffer, dy: Buffer, grad: torch.Tensor, *, accumulate: bool = False
    ) -> None:
        """Write (or add) the gradients of the kept weights into ``grad``, shaped as the dense
        weight and with the plan's strides.

        All other elements of ``grad`` are left as they are.
        """
        call = self.weight_grad_call(plan, x, dy, accumulate=accumulate)
        spare = LINE // grad.element_size()
        scratch = torch.empty(call.scratch + spare, dtype=x.shape.dtype)
        call.into(grad, scratch[-scratch.data_ptr() % LINE // scratch.element_size() :])
        call()

    def weight_grad_call(
        self, plan: Plan, x: Buffer, dy: Buffer, *, accumulate: bool = False
    ) -> WeightGradCall:
        """Return the call of ``conv_weight_grad``, which wants to be told ``into`` which
        tensor.
        """
        self._same(plan.x, x, "x")
        self._sized(dy, plan.dy, "dy")
        self._together(x, dy)
        a = _kernels.weight_grad_args()
        a.set_plan(plan._plan)
        a.x, a.dy = self._image(x), self._image(dy)
        a.in_row_step, a.in_column_step = plan.geometry.stride
        a.tile_rows, a.tile_columns = plan.weight_tile.rows, plan.weight_tile.columns
        a.accumulate, a.threads = accumulate, torch.get_num_threads()
        pitch = (plan.nnz + 31) // 16 * 16
        is_double = x.shape.dtype == torch.float64
        return WeightGradCall(
            _kernels.weight_grad, self._index, is_double, a, (plan, x, dy), plan, a.threads * pitch
        )

    def channel_sums(self, x: Buffer, *, sums: torch.Tensor | None = None) -> torch.Tensor:
        """Return the float64 sums of a buffer over samples and pixels, by channel: a bias
        gradient.
        """
        a = _kernels.channel_sums_args()
        sums = self._sums(sums, 1, x)
        a.x, a.sums = self._image(x), sums.data_ptr()
        a.workspace = self._scratch(
            torch.get_num_threads() * x.shape.channels * self.lanes, x.shape.dtype
        )
        self._run("channel_sums", a, x)
        return sums

    # ---- between convolutions ----

    def norm(
        self,
        y: Buffer,
        scale: torch.Tensor,
        offset: torch.Tensor,
        out: Buffer,
        *,
        relu: bool = False,
        residual: Buffer | None = None,
        y2: Buffer | None = None,
        scale2: torch.Tensor | None = None,
    ) -> None:
        """Compute ``out = f(scale*y + offset [+ scale2*y2] [+ residual])``, f = ReLU or nothing."""
        a = _kernels.norm_args()
        self._images(a, y=y, out=out, residual=residual, y2=y2)
        held = self._vectors(a, y, scale=scale, offset=offset, scale2=scale2)
        a.relu = relu
        self._run("norm", a, y)
        del held

    def norm_reduce(
        self,
        grad: Buffer,
        y: Buffer,
        mean: torch.Tensor,
        *,
        out: Buffer | None = None,
        scale: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
        y2: Buffer | None = None,
        mean2: torch.Tensor | None = None,
        dz: Buffer | None = None,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return float64 ``[3, channels]``: the sums of dz, of dz*(y - mean) and of dz*(y2 -
        mean2).

        ``dz`` is ``grad``, zero where the ReLU stopped: where its ``out`` is not positive, or, if
        it had no residual, ``scale*y + offset``. Without either there was no ReLU. It is stored
        into the buffer ``dz``, if given (which may be ``grad``).
        """
        a = _kernels.norm_reduce_args()
        self._images(a, grad=grad, y=y, out=out, y2=y2, dz=dz)
        held = self._vectors(a, y, mean=mean, mean2=mean2, scale=scale, offset=offset)
        sums = self._sums(sums, 3, y)
        a.relu, a.sums = out is not None or scale is not None, sums.data_ptr()
        a.workspace = self._scratch(
            torch.get_num_threads() * y.shape.channels * 3 * self.lanes, y.shape.dtype
        )
        self._run("norm_reduce", a, y)
        del held
        return sums

    def norm_grad(
        self,
        grad: Buffer,
        y: Buffer,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        dy: Buffer,
        *,
        out: Buffer | None = None,
        scale: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
        y2: Buffer | None = None,
        a2: torch.Tensor | None = None,
        b2: torch.Tensor | None = None,
        c2: torch.Tensor | None = None,
        dy2: Buffer | None = None,
    ) -> None:
        """Compute ``dy = a*dz + b*y + c`` and ``dy2 = a2*dz + b2*y2 + c2``; dz as in
        ``norm_reduce``.
        """
        args = _kernels.norm_grad_args()
        self._images(args, grad=grad, y=y, out=out, y2=y2, dy=dy, dy2=dy2)
        held = self._vectors(
            args, y, scale=scale, offset=offset, a=a, b=b, c=c, a2=a2, b2=b2, c2=c2
        )
        args.relu = out is not None or scale is not None
        self._run("norm_grad", args, y)
        del held

    def statistics(
        self, x: Buffer, *, shift: torch.Tensor | None = None, sums: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return float64 ``[2, channels]``: the sums of ``x - shift`` and of its square."""
        a = _kernels.statistics_args()
        sums = self._sums(sums, 2, x)
        a.x, a.sums = self._image(x), sums.data_ptr()
        held = self._vectors(a, x, shift=shift)
        a.workspace = self._scratch(
            torch.get_num_threads() * x.shape.channels * 2 * self.lanes, x.shape.dtype
        )
        self._run("statistics", a, x)
        del held
        return sums

    def norm_fold(
        self,
        fold: Fold,
        y: Buffer,
        *,
        sums: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        running_mean: torch.Tensor | None = None,
        running_var: torch.Tensor | None = None,
        batches: torch.Tensor | None = None,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        other: Fold | None = None,
    ) -> None:
        """Fill ``fold`` for a BatchNorm over ``y``: from the sums of a batch, moving the running
        statistics and the int64 ``batches``; or, without sums, from the running statistics.

        Args:
            fold: what is filled; ``norm`` takes its scale and offset.
            y: what is normalized; its shape says how many numbers went into a sum.
            sums, shift: of ``conv`` or ``statistics``.
            weight, bias, running_mean, running_var, batches, momentum, eps: as in
                ``torch.nn.BatchNorm2d``.
            other: a fold whose offset is added to this one's, for ``norm`` with two inputs.

        """
        a = _kernels.norm_fold_args()
        a.channels, a.count, a.eps = y.shape.channels, _count(y), eps
        a.momentum = -1.0 if momentum is None else momentum
        if sums is not None:
            a.sums = sums.data_ptr()
        held = self._vectors(
            a,
            y,
            shift=shift,
            weight=weight,
            bias=bias,
            running_mean=running_mean,
            running_var=running_var,
            other_offset=None if other is None else other.offset,
            mean=fold.mean,
            inverse=fold.inverse,
            scale=fold.scale,
            offset=fold.offset,
        )
        if batches is not None:
            a.batches = batches.data_ptr()
        self._run("norm_fold", a, y)
        del held

    def norm_unfold(
        self,
        fold: Fold,
        y: Buffer,
        sums: torch.Tensor,
        *,
        second: bool = False,
        training: bool = True,
        weight: torch.Tensor | None = None,
    ) -> None:
        """Fill the gradients of a fold, and the ``a, b, c`` that ``norm_grad`` takes.

        Args:
            fold: as ``norm_fold`` left it.
            y: what was normalized.
            sums: of ``norm_reduce``.
            second: this is the normalization of ``y2`` there.
            training: whether the statistics were those of the batch.
            weight: as in ``norm_fold``.

        """
        a = _kernels.norm_unfold_args()
        a.channels, a.training, a.count = y.shape.channels, training, _count(y)
        a.sums, a.sums_y = sums[0].data_ptr(), sums[2 if second else 1].data_ptr()
        held = self._vectors(
            a,
            y,
            weight=weight,
            mean=fold.mean,
            inverse=fold.inverse,
            a=fold.a,
            b=fold.b,
            c=fold.c,
            weight_grad=fold.weight_grad,
            bias_grad=fold.bias_grad,
        )
        self._run("norm_unfold", a, y)
        del held

    def relu(self, x: Buffer, out: Buffer) -> None:
        """Compute ``out = max(x, 0)``; NaN stays NaN."""
        self._pointwise("relu", x, None, out)

    def relu_grad(self, grad: Buffer, y: Buffer, out: Buffer) -> None:
        """Compute ``out = grad`` where ``y``, the output of the ReLU, is positive, and 0
        elsewhere.
        """
        self._pointwise("relu_grad", grad, y, out)

    def add(self, x: Buffer, y: Buffer, out: Buffer) -> None:
        """Compute ``out = x + y``."""
        self._pointwise("add", x, y, out)

    def gelu(self, x: Buffer, out: Buffer) -> None:
        """Compute ``out = x * (1 + erf(x / sqrt(2))) / 2``."""
        self._pointwise("gelu", x, None, out)

    def gelu_grad(self, grad: Buffer, x: Buffer, out: Buffer) -> None:
        """Compute ``out``, the gradient of what ``gelu`` read, from that of what it made."""
        self._pointwise("gelu_grad", grad, x, out)

    def gelu_tanh(self, x: Buffer, out: Buffer) -> None:
        """Compute ``out`` as ``gelu`` with the approximation by tanh."""
        self._pointwise("gelu_tanh", x, None, out)

    def gelu_tanh_grad(self, grad: Buffer, x: Buffer, out: Buffer) -> None:
        """Compute ``out``, the gradient of what ``gelu_tanh`` read, from that of what it made."""
        self._pointwise("gelu_tanh_grad", grad, x, out)

    def silu(self, x: Buffer, out: Buffer) -> None:
        """Compute ``out = x / (1 + exp(-x))``."""
        self._pointwise("silu", x, None, out)

    def silu_grad(self, grad: Buffer, x: Buffer, out: Buffer) -> None:
        """Compute ``out``, the gradient of what ``silu`` read, from that of what it made."""
        self._pointwise("silu_grad", grad, x, out)

    def max_pool(
        self, x: Buffer, y: Buffer, window: Pair, stride: Pair, padding: Pair = (0, 0)
    ) -> None:
        """Compute the maximum over windows."""
        self._pool("max_pool", window, stride, padding, True, x=x, y=y)

    def max_pool_grad(
        self,
        x: Buffer,
        y: Buffer,
        dy: Buffer,
        dx: Buffer,
        window: Pair,
        stride: Pair,
        padding: Pair = (0, 0),
    ) -> None:
        """Give each maximum's gradient to the first pixel that equals it."""
        self._pool("max_pool_grad", window, stride, padding, True, x=x, y=y, dy=dy, dx=dx)

    def avg_pool(
        self,
        x: Buffer,
        y: Buffer,
        window: Pair,
        stride: Pair,
        padding: Pair = (0, 0),
        count_padding: bool = True,
    ) -> None:
        """Compute averages over windows. A window as large as the image is global average
        pooling.
        """
        self._pool("avg_pool", window, stride, padding, count_padding, x=x, y=y)

    def avg_pool_grad(
        self,
        dy: Buffer,
        dx: Buffer,
        window: Pair,
        stride: Pair,
        padding: Pair = (0, 0),
        count_padding: bool = True,
    ) -> None:
        """Spread each average's gradient over its window."""
        self._pool("avg_pool_grad", window, stride, padding, count_padding, x=dx, dy=dy, dx=dx)

    # ---- from tensors to structs ----

    def _run(self, name: str, args: Any, buffer: Buffer) -> None:
        args.threads = torch.get_num_threads()
        is_double = buffer.shape.dtype == torch.float64
        call = Call(getattr(_kernels, name), self._index, is_double, args, self._own)
        self._own = ()
        if self._bound is None:
            call()
        else:
            self._bound.append(call)

    def _conv(
        self,
        a: Any,
        tile: Tile,
        x: Buffer,
        y: Buffer,
        bias: torch.Tensor | None,
        accumulate: bool,
        sums: torch.Tensor | None,
        shift: torch.Tensor | None,
    ) -> torch.Tensor | None:
        if accumulate and bias is not None:
            raise InputError(
                "A bias starts a sum; it cannot be added to one: leave out bias or accumulate."
            )
        if sums is not None and y.shape.tokens:
            raise InputError("Statistics are for images.")
        self._together(x, y)
        a.x, a.y = self._image(x), self._image(y)
        a.tile_rows, a.tile_columns, a.accumulate = tile.rows, tile.columns, accumulate
        held = self._vectors(a, y, bias=bias, shift=shift)
        if sums is not None:
            a.sums = sums.data_ptr()
            a.workspace = self._scratch(
                torch.get_num_threads() * y.shape.channels * 2 * self.lanes, y.shape.dtype
            )
        self._run("conv", a, x)
        del held
        return sums

    def _pointwise(self, name: str, first: Buffer, second: Buffer | None, out: Buffer) -> None:
        args = _kernels.pointwise_args()
        self._images(args, a=first, b=second, out=out)
        self._run(name, args, out)

    def _pool(
        self,
        name: str,
        window: Pair,
        stride: Pair,
        padding: Pair,
        count_padding: bool,
        **buffers: Buffer,
    ) -> None:
        if any(2 * p > w for p, w in zip(padding, window, strict=True)):
            raise InputError(f"Padding is at most half the window, got {padding} for {window}.")
        a = _kernels.pool_args()
        x = buffers["x"].shape
        out = ConvGeometry(x.channels, x.channels, window, stride, padding).out_size(
            x.height, x.width
        )
        for key in buffers.keys() & {"y", "dy"}:
            y = buffers[key].shape
            if (y.height, y.width) != out or y.channels != x.channels:
                raise InputError(f"The pooled buffer is {out}, got {y.height}x{y.width}.")
        self._together(*buffers.values())
        for key, buffer in buffers.items():
            setattr(a, key, self._image(buffer))
        a.window_rows, a.window_columns = window
        a.row_step, a.column_step = stride
        a.row_padding, a.column_padding = padding
        a.count_padding = count_padding
        self._run(name, a, buffers["x"])

    def _image(self, buffer: Buffer) -> Any:
        s, image = buffer.shape, _kernels.Image()
        if s.lanes != self.lanes:
            raise InputError(
                f"The {self.isa} kernels have {self.lanes} lanes, the buffer has {s.lanes}."
            )
        image.origin = buffer.data.data_ptr() + s.origin * s.dtype.itemsize
        image.row, image.channel, image.block = s.row, s.channel, s.block
        image.blocks, image.channels, image.height, image.width = (
            s.blocks,
            s.channels,
            s.height,
            s.width,
        )
        image.samples, image.per_block = s.samples, s.per_block
        image.per_column = s.lanes if s.tokens else 0
        image.per_thread = buffer.per_thread
        return image

    def _images(self, args: Any, **buffers: Buffer | None) -> None:
        there = {name: buffer for name, buffer in buffers.items() if buffer is not None}
        first = next(iter(there.values())).shape
        for name, buffer in there.items():
            s = buffer.shape
            if (s.channels, s.height, s.width) != (first.channels, first.height, first.width):
                raise InputError(f"Buffers of one operation have one size, got {first} and {s}.")
            setattr(args, name, self._image(buffer))
        self._together(*there.values())

    def _vectors(
        self, args: Any, like: Buffer, **vectors: torch.Tensor | None
    ) -> list[torch.Tensor]:
        held = []
        for name, vector in vectors.items():
            if vector is None:
                continue
            if vector.shape != (like.shape.channels,):
                raise InputError(
                    f"{name} has one number a channel ({like.shape.channels}), got "
                    f"{tuple(vector.shape)}."
                )
            held.append(vector.detach().to(like.shape.dtype).contiguous())
            if self._bound is not None and held[-1].data_ptr() != vector.data_ptr():
                raise InputError(
                    f"A bound call reads {name} where it lies: it is a contiguous vector of "
                    f"{like.shape.dtype}, got {vector.dtype}."
                )
            setattr(args, name, held[-1].data_ptr())
        return held

    def _plain(self, plain: torch.Tensor, buffer: Buffer) -> Any:
        s, p = buffer.shape, _kernels.Plain()
        size = (s.samples, s.channels) if s.tokens else (s.samples, s.channels, s.height, s.width)
        if tuple(plain.shape) != size or plain.dtype != s.dtype:
            raise InputError(
                f"The buffer holds {size} of {s.dtype}, got {tuple(plain.shape)} of {plain.dtype}."
            )
        p.data = plain.data_ptr()
        sample, p.channel = plain.stride(0), plain.stride(1)
        p.lane, p.block = sample, sample * s.per_block
        if s.tokens:
            p.row, p.column = 0, sample * s.lanes
        elif _dense_planes(plain):
            p.row, p.column = s.width, 1
        else:
            p.row, p.column = plain.stride(2), plain.stride(3)
        if s.tokens or not _dense_planes(plain):
            p.channel = 1
        return p

    def _sums(self, sums: torch.Tensor | None, rows: int, buffer: Buffer) -> torch.Tensor:
        shape = (buffer.shape.channels,) if rows == 1 else (rows, buffer.shape.channels)
        if sums is None:
            return torch.empty(shape, dtype=torch.float64)
        if sums.shape != shape or sums.dtype != torch.float64 or not sums.is_contiguous():
            raise InputError(f"Sums are contiguous float64 {shape}, got {tuple(sums.shape)}.")
        return sums

    def _scratch(self, count: int, dtype: torch.dtype) -> int:
        """Return the address of a workspace: one for all calls, or, while binding, one for this
        call, as bound calls may run at the same time.
        """
        if self._bound is not None:
            own = torch.empty(count + 16, dtype=dtype)
            self._own = (own,)
            return own.data_ptr() + -own.data_ptr() % 64
        have = self._workspace.get(dtype)
        if have is None or have.numel() < count:
            have = self._workspace[dtype] = torch.empty(count + 16, dtype=dtype)
        return have.data_ptr() + -have.data_ptr() % 64

    def _same(self, planned: Shape, buffer: Buffer, name: str) -> None:
        s = buffer.shape
        self._sized(buffer, planned, name)
        if s.halo != planned.halo:
            raise InputError(
                f"The plan was made for a halo of {planned.halo}; {name} has {s.halo}."
            )

    def _sized(self, buffer: Buffer, planned: Shape, name: str) -> None:
        s = buffer.shape
        got = (s.channels, s.height, s.width, s.tokens, s.dtype)
        if got != (planned.channels, planned.height, planned.width, planned.tokens, planned.dtype):
            raise InputError(f"The plan was made for {planned}; {name} is {s}.")

    def _together(self, *buffers: Buffer) -> None:
        if len({(b.shape.samples, b.shape.tokens, b.shape.dtype) for b in buffers}) != 1:
            raise InputError("Buffers of one operation hold the same samples in the same dtype.")


def _count(buffer: Buffer) -> int:
    """Return the numbers of one channel."""
    s = buffer.shape
    return s.samples * (1 if s.tokens else s.height * s.width)


def _dense_planes(plain: torch.Tensor) -> bool:
    """Whether the pixels of a channel are one run of memory."""
    if plain.dim() != 4:
        return False
    height, width = plain.shape[2:]
    return (width == 1 or plain.stride(3) == 1) and (height == 1 or plain.stride(2) == width)


def _convertible(plain: torch.Tensor) -> bool:
    """Whether the conversion kernels read these strides: dense planes, or dense channels."""
    return _dense_planes(plain) or plain.stride(1) == 1
