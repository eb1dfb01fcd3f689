"""The compiled kernels. This is the only module that uses ``acdc._kernels``.

Every call runs on ``torch.get_num_threads()`` threads of torch's own OpenMP pool. For a given
number of threads its results are bitwise the same every time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch  # first: the kernels must find torch's OpenMP library
from torch import Tensor

from acdc.engine.caches import caches
from acdc.engine.contract import (
    Call,
    Fold,
    KernelPlan,
    Kernels,
    P,
    Pointwise,
    Step,
    Strides,
    numel,
)
from acdc.engine.geometry import ConvGeometry, Size2
from acdc.engine.layout import LINE, Buffer, Shape
from acdc.engine.tile import Tile, Tiling
from acdc.errors import AcdcError, InputError

try:
    _kernels: Any = importlib.import_module("acdc._kernels")
    _why_missing = ""
except ImportError as _error:  # installed without a compiler, or built for another torch
    _kernels, _why_missing = None, str(_error)

Struct = Any
"""A struct of arguments, as in ``csrc/acdc_kernels.h``. Its addresses keep nothing alive."""


def available() -> bool:
    """Return whether the compiled kernels are installed."""
    return _kernels is not None


def why_missing() -> str:
    """Return why the compiled kernels cannot be loaded; empty if they are."""
    return _why_missing


def library() -> str:
    """Return the file of the compiled kernels."""
    _check_available()
    return str(_kernels.__file__)


def _check_available() -> None:
    if _kernels is None:
        raise AcdcError(
            "The compiled kernels are missing: reinstall acdc-train where there is a C++ compiler."
        )


def instruction_sets() -> list[str]:
    """Return the instruction sets that were compiled and that this machine has, narrowest first."""
    if _kernels is None:
        return []
    return [_kernels.isa(i) for i in range(_kernels.table_count()) if _kernels.supported(i)]


def kernel_names() -> tuple[str, ...]:
    """Return the rows of the kernel table."""
    return () if _kernels is None else tuple(_kernels.KERNELS)


def advise_huge_pages(memory: Tensor) -> None:
    """Ask the system for huge pages behind memory that was not touched yet.

    A pass over an activation then has far fewer page table misses. Where the system has no huge
    pages, nothing happens.
    """
    if _kernels is not None:
        _kernels.advise_huge_pages(memory.data_ptr(), memory.numel() * memory.element_size())


def give_memory_back() -> None:
    """Give memory that was freed back to the system, where the C library holds it for later.

    Dense steps and sparse ones allocate other sizes, so neither fit well into the memory that the
    others have left.
    """
    if _kernels is not None:
        _kernels.give_memory_back()


def gather(dense: Tensor, index: Tensor, vector: Tensor) -> None:
    """Copy elements into a vector: ``vector[i] = dense[index[i]]``. See ``engine/kept.py``."""
    _kernels.gather(
        dense.data_ptr(),
        index.data_ptr(),
        index.numel(),
        vector.data_ptr(),
        dense.element_size(),
        torch.get_num_threads(),
    )


def expand(vector: Tensor, index: Tensor, dense: Tensor) -> None:
    """Copy a vector into elements, and zeros beside them. See ``engine/kept.py``."""
    _kernels.expand(
        vector.data_ptr(),
        index.data_ptr(),
        index.numel(),
        dense.data_ptr(),
        dense.numel(),
        dense.element_size(),
        torch.get_num_threads(),
    )


def clear(tensor: Tensor, mask: Tensor, where: bool) -> None:
    """Set elements to zero where ``mask`` is ``where``. See ``engine/kept.py``."""
    _kernels.clear(
        mask.data_ptr(),
        where,
        tensor.data_ptr(),
        tensor.numel(),
        tensor.element_size(),
        torch.get_num_threads(),
    )


def generator_bytes() -> int:
    """Return how many bytes of a generator's state :func:`bernoulli` reads."""
    return int(_kernels.GENERATOR_BYTES)


def bernoulli(state: Tensor, out: Tensor, p: float, one: float, isa: str | None = None) -> None:
    """Draw as ``out.bernoulli_(p)`` does on the CPU, in the order of memory.

    Args:
        state: What ``torch.Generator.get_state`` returned. It becomes the state after the draws.
        out: Where the draws go: float32 or float64, without gaps in memory.
        p: The probability of a one.
        one: What is written for a one.
        isa: The instruction set; the widest one that this machine has by default. All draw the
            same numbers.

    """
    _kernels.bernoulli(
        _index_of(isa or instruction_sets()[-1]),
        state.data_ptr(),
        p,
        one,
        out.data_ptr(),
        out.numel(),
        out.dtype == torch.float64,
    )


def optimizer_step(kernel: str, kept: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Call ``acdc_sgd`` or ``acdc_adam`` of ``csrc/kept.cpp``.

    Args:
        kernel: ``"sgd"`` or ``"adam"``.
        kept, options: The fields of ``acdc_kept``, and of the struct of the kernel. A tensor stands
            for its address.
    """
    structs = [struct("kept", kept), struct(f"{kernel}_args", options)]
    getattr(_kernels, kernel)(*structs, torch.get_num_threads())


def struct(name: str, fields: Mapping[str, Any]) -> Struct:
    """Return a struct of ``csrc/`` with these fields.

    A tensor stands for its address, and None for none.
    """
    made = getattr(_kernels, name)()
    for field, value in fields.items():
        if value is not None:
            setattr(made, field, value.data_ptr() if isinstance(value, Tensor) else value)
    return made


# --- the kernels of the runtime: csrc/acdc_points.h -----------------------------------------------


def lanes_of(isa: str) -> int:
    """Return how many floats a register of an instruction set holds."""
    return int(_kernels.lanes(_index_of(isa)))


def point_kernel_names() -> tuple[str, ...]:
    """Return the rows of the table of the runtime's kernels."""
    return () if _kernels is None else tuple(_kernels.POINT_KERNELS)


def positions(bits: Tensor, count: int) -> Tensor | None:
    """Return the positions of the bits that are set, ascending, as int32.

    Args:
        bits: uint8, contiguous. The lowest bit of a byte comes first.
        count: How many bits are set. Other bits than so many: None is returned.

    """
    index = torch.empty(count, dtype=torch.int32)
    found = _kernels.positions(bits.data_ptr(), bits.numel(), index.data_ptr(), count)
    return index if found == count else None


def points_list(**fields: Any) -> int | None:
    """Make the list of a convolution of the runtime: ``acdc_points_list``.

    Args:
        fields: Those of ``acdc_points_list_args``.

    Returns:
        The number of its rows, or None if an offset does not fit into 32 bits.

    Raises:
        MemoryError: There is not enough memory.

    """
    rows = int(_kernels.points_list(struct("points_list_args", fields)))
    if rows == -2:
        raise MemoryError("There is not enough memory for the index list of a layer.")
    return None if rows < 0 else rows


def most_queries() -> int:
    """Return how many queries of an attention a thread computes at a time, at most."""
    return int(_kernels.QUERIES)


def point_call(
    isa: str, kernel: str, is_double: bool, args: Struct, held: tuple[object, ...]
) -> NativeCall:
    """Return the call of a kernel of the runtime.

    Args:
        isa: The instruction set.
        kernel: The row of the table.
        is_double: The numbers are float64.
        args: Its arguments.
        held: What must live as long as the call.
    """
    return NativeCall(getattr(_kernels, kernel), _index_of(isa), is_double, args, held)


def point_sequence(calls: Sequence[NativeCall]) -> Callable[[Tensor | None], None]:
    """Return calls as one function.

    The function adds the seconds of each call to a float64 tensor ``[2, calls]``, if given one, in
    its first row.
    """
    made = _kernels.Sequence()
    for call in calls:
        getattr(made, f"add_{call.kernel}")(call.index, call.is_double, call.args, True)

    def run(seconds: Tensor | None = None) -> None:
        assert calls  # the function keeps the structs alive
        made.run(0, 1, 0 if seconds is None else seconds.data_ptr())

    return run


def _index_of(isa: str) -> int:
    """Return the number of an instruction set that this machine has."""
    _check_available()
    if isa not in instruction_sets():
        raise InputError(f"This machine has the kernels {instruction_sets()}, not {isa!r}.")
    return [_kernels.isa(i) for i in range(_kernels.table_count())].index(isa)


class NativePlan(KernelPlan):
    """The index lists as the compiled kernels read them.

    Attributes:
        tile, grad_tile, weight_tile: How the forward pass, the input gradient and the weight
            gradient are cut. The weight gradient shares the panels of the forward pass.
        row: The elements of an output channel, if these follow each other in the weight; else 0.

    """

    def __init__(
        self,
        geometry: ConvGeometry,
        support: Tensor,
        x: Shape,
        dy: Shape,
        strides: Strides | None = None,
        tiling: Tiling | None = None,
    ) -> None:
        _check_available()
        super().__init__(geometry, support, x, dy, strides)
        density = self.nnz / numel(geometry) / geometry.groups
        tiling = tiling or Tiling.of_caches()
        self.tile = Tile.forward(geometry, dy, density, tiling)
        self.grad_tile = Tile.input_grad(geometry, x, density, tiling)
        self.weight_tile = self.tile.weight_grad(geometry, tiling)
        row = numel(geometry) // geometry.out_channels
        self.row = row if geometry.out_channels == 1 or self.strides[0] == row else 0
        shape, strides = torch.Size(geometry.weight_shape), self.strides
        # Each step asks several times for each layer: the usual answers are ready.
        self._same: list[tuple[torch.Size, tuple[int, ...]]] = [(shape, strides)]
        if geometry.kernel == (1, 1):
            self._same.append((shape[:2], strides[:2]))
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
        self.compiled = _kernels.Plan(a)
        if not self.compiled.valid():
            raise InputError(
                f"A layer this large does not fit into 32-bit offsets or memory: {geometry}."
            )

    def refresh(self, weight: Tensor, input_grad: bool = False) -> None:
        if weight.dtype != self.x.dtype or weight.numel() != numel(self.geometry):
            raise InputError(
                f"The plan needs {numel(self.geometry)} weights of {self.x.dtype}, got "
                f"{weight.shape} of {weight.dtype}."
            )
        weight = weight.detach()
        if not self.has_strides_of(weight):
            weight = torch.empty_strided(
                self.geometry.weight_shape, self.strides, dtype=weight.dtype, device="cpu"
            ).copy_(weight.reshape(self.geometry.weight_shape))
        self.compiled.refresh(weight.data_ptr(), input_grad, torch.get_num_threads())

    def has_strides_of(self, weight: Tensor) -> bool:
        """Return whether a dense weight, or its gradient, has the strides of this plan."""
        if (weight.shape, weight.stride()) in self._same:
            return True
        shape = self.geometry.weight_shape
        if weight.dim() == 2:
            weight = weight[:, :, None, None]
        return tuple(weight.shape) == shape and all(
            size == 1 or have == want
            for size, have, want in zip(shape, weight.stride(), self.strides, strict=True)
        )


def _native(plan: KernelPlan) -> NativePlan:
    if not isinstance(plan, NativePlan):
        raise InputError(f"A {type(plan).__name__} is not a plan of the compiled kernels.")
    return plan


@dataclass
class NativeCall:
    """A kernel and its arguments. ``held`` keeps the memory alive that the arguments point into."""

    function: Callable[[int, bool, Struct], None]
    index: int
    is_double: bool
    args: Struct
    held: tuple[object, ...] = ()

    @property
    def kernel(self) -> str:
        """The kernel's row in the kernel table."""
        return str(self.function.__name__)

    def __call__(self) -> None:
        """Run the kernel."""
        self.function(self.index, self.is_double, self.args)


@dataclass
class NativeWeightGradCall(NativeCall):
    """The weight gradient of a layer; ``into`` sets where it is written."""

    plan: NativePlan | None = None
    scratch: int = 0

    def into(self, grad: Tensor, scratch: Tensor, *, whole: bool = False) -> None:
        """Write to these tensors from now on."""
        assert self.plan is not None
        assert scratch.numel() >= self.scratch
        assert scratch.data_ptr() % LINE == 0
        if grad.dtype != self.plan.x.dtype or not self.plan.has_strides_of(grad):
            raise InputError(
                f"The gradient must be a {self.plan.x.dtype} tensor shaped as the weight, with the "
                f"plan's strides {self.plan.strides}; got {grad.dtype}, {tuple(grad.shape)} with "
                f"strides {grad.stride()}."
            )
        self.args.target, self.args.workspace = grad.data_ptr(), scratch.data_ptr()
        self.args.size = grad.numel() if whole else 0


class Native(Kernels):
    """The kernels of one instruction set.

    Args:
        isa: The name of the instruction set. The default is the widest one this machine has.

    """

    by_block = True

    def __init__(self, isa: str | None = None) -> None:
        _check_available()
        self.isa = isa or instruction_sets()[-1]
        self._index = _index_of(self.isa)
        self.lanes = int(_kernels.lanes(self._index))
        self._workspace: dict[torch.dtype, Tensor] = {}
        # While `bind` runs a method, `_run` appends its call here instead of running it.
        self._bound: list[NativeCall] | None = None

    def plan(
        self,
        geometry: ConvGeometry,
        support: Tensor,
        x: Shape,
        dy: Shape,
        *,
        strides: Strides | None = None,
        tiling: Tiling | None = None,
    ) -> NativePlan:
        return NativePlan(geometry, support, x, dy, strides, tiling)

    # ---- bound calls ----

    def bind(self, kernel: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> NativeCall:
        bound: list[NativeCall] = []
        self._bound = bound
        try:
            kernel(*args, **kwargs)
        finally:
            self._bound = None
        (call,) = bound
        call.held = (args, kwargs, *call.held)
        return call

    def sequence(self, steps: Sequence[Step], blocks: int) -> list[Call]:
        threads = torch.get_num_threads()
        calls: list[Call] = []
        for compiled, group in groupby(steps, lambda step: isinstance(step.call, NativeCall)):
            members = list(group)
            if compiled:
                calls.append(partial(self._compiled_sequence(members), blocks, threads))
            else:
                calls.extend(step.call for step in members)
        return calls

    def _compiled_sequence(self, steps: Sequence[Step]) -> Callable[..., None]:
        """Return bound calls as one function of the numbers of blocks and of threads.

        The function adds the seconds of each call to a float64 ``[1 + threads, calls]`` tensor, if
        given one. Its first row is for work done once for all threads, the others for the work of
        each thread.
        """
        sequence = _kernels.Sequence()
        calls = []
        for step in steps:
            assert isinstance(step.call, NativeCall)
            calls.append(step.call)
            add = getattr(sequence, f"add_{step.call.kernel}")
            add(step.call.index, step.call.is_double, step.call.args, step.alone)

        def run(blocks: int, threads: int, seconds: Tensor | None = None) -> None:
            assert calls  # the function keeps the structs alive
            sequence.run(blocks, threads, 0 if seconds is None else seconds.data_ptr())

        return run

    # ---- conversions ----

    def to_layout(self, plain: Tensor, out: Buffer) -> Buffer:
        if not self._convert("to_layout", out, plain):
            self._convert("to_layout", out, plain.contiguous())
        return out

    def from_layout(self, buffer: Buffer, out: Tensor | None = None) -> Tensor:
        s = buffer.shape
        if out is None:
            size = (
                (s.samples, s.channels) if s.tokens else (s.samples, s.channels, s.height, s.width)
            )
            out = torch.empty(size, dtype=s.dtype, device="cpu")
        if not self._convert("from_layout", buffer, out):
            out.copy_(self.from_layout(buffer))
        return out

    def _convert(self, name: str, buffer: Buffer, plain: Tensor) -> bool:
        """Convert between a buffer and a tensor, or return False if the strides must be others.

        The next tensor of this form finds its call ready: a step of a transformer converts about
        175 times, and making the arguments takes longer than a small conversion.
        """
        key = (name, self._index, plain.shape, plain.stride(), plain.dtype, torch.get_num_threads())
        call = buffer.ready.get(key) if self._bound is None else None
        if call is None:
            if not _convertible(plain):
                return False
            a = _kernels.convert_args()
            a.image, a.plain = self._image(buffer), self._plain(plain, buffer)
            call = self._call(name, a, buffer)
            if self._bound is not None:  # it keeps its arguments
                call.held = (plain,)
                self._bound.append(call)
                return True
            buffer.ready[key] = call
        call.args.plain.data = plain.data_ptr()
        call()
        return True

    # ---- the sparse layer ----

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
        plan = _native(plan)
        if accumulate and bias is not None:
            raise InputError(
                "A convolution that adds to its output has no bias: leave out bias or accumulate."
            )
        self._as_planned(plan.x, x, "x")
        self._sized_as(plan.dy, y, "y")
        a = _kernels.conv_args()
        a.set_plan(plan.compiled, False)
        a.in_row_step, a.in_column_step = plan.geometry.stride
        a.out_row_step = a.out_column_step = 1
        held = self._vectors(a, y, bias=bias, shift=shift)
        if not statistics:
            self._conv(a, plan.tile, x, y, accumulate, held)
            return None
        if y.shape.tokens:
            raise InputError("Statistics are for images.")
        sums = self._sums(sums, 2, y)
        a.sums = sums.data_ptr()
        workspace = self._scratch(2, y)
        a.workspace = workspace.data_ptr()
        self._conv(a, plan.tile, x, y, accumulate, [*held, sums, workspace])
        return sums

    def conv_input_grad(
        self, plan: KernelPlan, dy: Buffer, dx: Buffer, *, accumulate: bool = False
    ) -> None:
        plan = _native(plan)
        self._as_planned(plan.dy, dy, "dy")
        self._sized_as(plan.x, dx, "dx")
        a = _kernels.conv_args()
        a.set_plan(plan.compiled, True)
        a.in_row_step = a.in_column_step = 1
        a.out_row_step, a.out_column_step = plan.geometry.stride
        self._conv(a, plan.grad_tile, dy, dx, accumulate, [])

    def conv_weight_grad(
        self, plan: KernelPlan, x: Buffer, dy: Buffer, grad: Tensor, *, accumulate: bool = False
    ) -> None:
        call = self.weight_grad_call(plan, x, dy, accumulate=accumulate)
        scratch = _aligned(call.scratch, x.shape.dtype)  # must live until the call is done
        call.into(grad, scratch)
        call()

    def weight_grad_call(
        self, plan: KernelPlan, x: Buffer, dy: Buffer, *, accumulate: bool = False
    ) -> NativeWeightGradCall:
        plan = _native(plan)
        self._as_planned(plan.x, x, "x")
        self._sized_as(plan.dy, dy, "dy")
        self._same_samples(x, dy)
        a = _kernels.weight_grad_args()
        a.set_plan(plan.compiled)
        a.x, a.dy = self._image(x), self._image(dy)
        a.in_row_step, a.in_column_step = plan.geometry.stride
        a.tile_rows, a.tile_columns = plan.weight_tile.rows, plan.weight_tile.columns
        a.accumulate, a.threads = accumulate, torch.get_num_threads()
        a.row = plan.row
        pitch = (plan.nnz + 31) // 16 * 16
        is_double = x.shape.dtype == torch.float64
        return NativeWeightGradCall(
            _kernels.weight_grad, self._index, is_double, a, (plan, x, dy), plan, a.threads * pitch
        )

    def channel_sums(self, x: Buffer, *, sums: Tensor | None = None) -> Tensor:
        a = _kernels.channel_sums_args()
        sums, workspace = self._sums(sums, 1, x), self._scratch(1, x)
        a.x, a.sums, a.workspace = self._image(x), sums.data_ptr(), workspace.data_ptr()
        self._run("channel_sums", a, x, sums, workspace)
        return sums

    # ---- BatchNorm ----

    def statistics(
        self, x: Buffer, *, shift: Tensor | None = None, sums: Tensor | None = None
    ) -> Tensor:
        a = _kernels.statistics_args()
        sums, workspace = self._sums(sums, 2, x), self._scratch(2, x)
        a.x, a.sums, a.workspace = self._image(x), sums.data_ptr(), workspace.data_ptr()
        self._run("statistics", a, x, sums, workspace, *self._vectors(a, x, shift=shift))
        return sums

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
        a = _kernels.norm_fold_args()
        a.channels, a.count, a.eps = y.shape.channels, _count(y), eps
        a.momentum = -1.0 if momentum is None else momentum
        if sums is not None:
            a.sums = sums.data_ptr()
        if batches is not None:
            a.batches = batches.data_ptr()
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
        self._run("norm_fold", a, y, *held)

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
        a = _kernels.norm_args()
        self._images(a, y=y, out=out, residual=residual, y2=y2)
        a.relu = relu
        held = self._vectors(a, y, scale=scale, offset=offset, scale2=scale2)
        self._run("norm", a, y, *held)

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
        a = _kernels.norm_reduce_args()
        self._images(a, grad=grad, y=y, out=out, y2=y2, dz=dz)
        sums, workspace = self._sums(sums, 3, y), self._scratch(3, y)
        a.sums, a.workspace = sums.data_ptr(), workspace.data_ptr()
        a.relu = out is not None or scale is not None
        held = self._vectors(a, y, mean=mean, mean2=mean2, scale=scale, offset=offset)
        self._run("norm_reduce", a, y, sums, workspace, *held)
        return sums

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
        self._run("norm_unfold", a, y, *held)

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
        args = _kernels.norm_grad_args()
        self._images(args, grad=grad, y=y, out=out, y2=y2, dy=dy, dy2=dy2)
        args.relu = out is not None or scale is not None
        held = self._vectors(
            args, y, scale=scale, offset=offset, a=a, b=b, c=c, a2=a2, b2=b2, c2=c2
        )
        self._run("norm_grad", args, y, *held)

    # ---- LayerNorm ----

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
        a = _kernels.layer_norm_args()
        self._images(a, x=x, out=out)
        self._stats(a, x, stats)
        a.eps, a.centered, a.known = eps, centered, known
        self._run("layer_norm", a, x, *self._vectors(a, x, weight=weight, bias=bias))

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
        a = _kernels.layer_norm_grad_args()
        self._images(a, grad=grad, x=x, dx=dx)
        self._stats(a, x, stats)
        a.centered, a.accumulate = centered, accumulate
        held = self._vectors(a, x, weight=weight)
        if sums is not None:
            held += [self._sums(sums, 2, x), self._scratch(2, x)]
            a.sums, a.workspace = (tensor.data_ptr() for tensor in held[-2:])
        self._run("layer_norm_grad", a, x, *held)

    # ---- between layers ----

    def gate(self, x: Buffer, gate: Buffer, out: Buffer) -> None:
        a = _kernels.gate_args()
        self._images(a, x=x, out=out)
        a.gate = self._one_pixel(gate, x)
        self._run("gate", a, x)

    def gate_grad(self, grad: Buffer, x: Buffer, dgate: Buffer) -> None:
        a = _kernels.gate_grad_args()
        self._images(a, grad=grad, x=x)
        a.dgate = self._one_pixel(dgate, x)
        self._run("gate_grad", a, x)

    def pointwise(self, kernel: Pointwise, *inputs: Buffer, out: Buffer) -> None:
        args = _kernels.pointwise_args()
        self._images(args, **dict(zip("ab", inputs, strict=False)), out=out)
        self._run(kernel, args, out)

    def max_pool(
        self, x: Buffer, y: Buffer, window: Size2, stride: Size2, padding: Size2 = (0, 0)
    ) -> None:
        self._pool("max_pool", window, stride, padding, True, x=x, y=y)

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
        self._pool("max_pool_grad", window, stride, padding, True, x=x, y=y, dy=dy, dx=dx)

    def avg_pool(
        self,
        x: Buffer,
        y: Buffer,
        window: Size2,
        stride: Size2,
        padding: Size2 = (0, 0),
        count_padding: bool = True,
    ) -> None:
        self._pool("avg_pool", window, stride, padding, count_padding, x=x, y=y)

    def avg_pool_grad(
        self,
        dy: Buffer,
        dx: Buffer,
        window: Size2,
        stride: Size2,
        padding: Size2 = (0, 0),
        count_padding: bool = True,
    ) -> None:
        self._pool("avg_pool_grad", window, stride, padding, count_padding, x=dx, dy=dy, dx=dx)

    # ---- from tensors to structs ----

    def _run(self, name: str, args: Struct, buffer: Buffer, *held: Tensor) -> None:
        """Run a kernel now, or append its call while ``bind`` is at work.

        Args:
            name: The kernel.
            args: Its arguments.
            buffer: One of its buffers, for the dtype.
            held: The tensors that the arguments point into, beside the buffers.

        """
        call = self._call(name, args, buffer, *held)
        if self._bound is None:
            call()
        else:
            self._bound.append(call)

    def _call(self, name: str, args: Struct, buffer: Buffer, *held: Tensor) -> NativeCall:
        """Return the call of a kernel. The arguments are those of ``_run``."""
        args.threads = torch.get_num_threads()
        is_double = buffer.shape.dtype == torch.float64
        return NativeCall(getattr(_kernels, name), self._index, is_double, args, held)

    def _conv(
        self,
        a: Struct,
        tile: Tile,
        x: Buffer,
        y: Buffer,
        accumulate: bool,
        held: Sequence[Tensor],
    ) -> None:
        self._same_samples(x, y)
        a.x, a.y = self._image(x), self._image(y)
        a.tile_rows, a.tile_columns, a.accumulate = tile.rows, tile.columns, accumulate
        a.stream_bytes = caches().last // 2  # the other half is for what the pass reads
        self._run("conv", a, x, *held)

    def _pool(
        self,
        name: str,
        window: Size2,
        stride: Size2,
        padding: Size2,
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
        self._same_samples(*buffers.values())
        for key, buffer in buffers.items():
            setattr(a, key, self._image(buffer))
        a.window_rows, a.window_columns = window
        a.row_step, a.column_step = stride
        a.row_padding, a.column_padding = padding
        a.count_padding = count_padding
        self._run(name, a, buffers["x"])

    def _image(self, buffer: Buffer) -> Struct:
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

    def _images(self, args: Struct, **buffers: Buffer | None) -> None:
        """Set the fields of these names to buffers of one size."""
        given = {name: buffer for name, buffer in buffers.items() if buffer is not None}
        first = next(iter(given.values())).shape
        for name, buffer in given.items():
            s = buffer.shape
            if (s.channels, s.height, s.width) != (first.channels, first.height, first.width):
                raise InputError(f"Buffers of one operation have one size, got {first} and {s}.")
            setattr(args, name, self._image(buffer))
        self._same_samples(*given.values())

    def _stats(self, args: Struct, x: Buffer, stats: Buffer) -> None:
        """Set the statistics of each pixel of ``x``."""
        s = stats.shape
        if (s.channels, s.height, s.width) != (2, x.shape.height, x.shape.width):
            raise InputError(f"Statistics have two channels and the size of {x.shape}, got {s}.")
        self._same_samples(x, stats)
        args.stats = self._image(stats)

    def _one_pixel(self, gate: Buffer, x: Buffer) -> Struct:
        s = gate.shape
        if (s.channels, s.height, s.width) != (x.shape.channels, 1, 1):
            raise InputError(f"A gate has one pixel and {x.shape.channels} channels, got {s}.")
        self._same_samples(x, gate)
        return self._image(gate)

    def _vectors(self, args: Struct, like: Buffer, **vectors: Tensor | None) -> list[Tensor]:
        """Set the fields of these names to vectors with one number per channel.

        Returns the tensors that the fields point into. A kernel reads the buffer's dtype, so a
        vector of another dtype is copied.
        """
        held = []
        for name, vector in vectors.items():
            if vector is None:
                continue
            if vector.shape != (like.shape.channels,):
                raise InputError(
                    f"{name} needs one number per channel ({like.shape.channels}), got "
                    f"{tuple(vector.shape)}."
                )
            held.append(vector.detach().to(like.shape.dtype).contiguous())
            if self._bound is not None and held[-1].data_ptr() != vector.data_ptr():
                raise InputError(
                    f"A bound call reads {name} without a copy: it must be a contiguous vector of "
                    f"{like.shape.dtype}, got {vector.dtype}."
                )
            setattr(args, name, held[-1].data_ptr())
        return held

    def _plain(self, plain: Tensor, buffer: Buffer) -> Struct:
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

    def _sums(self, sums: Tensor | None, rows: int, buffer: Buffer) -> Tensor:
        shape = (buffer.shape.channels,) if rows == 1 else (rows, buffer.shape.channels)
        if sums is None:
            return torch.empty(shape, dtype=torch.float64, device="cpu")
        if sums.shape != shape or sums.dtype != torch.float64 or not sums.is_contiguous():
            raise InputError(f"Sums are contiguous float64 {shape}, got {tuple(sums.shape)}.")
        return sums

    def _scratch(self, rows: int, buffer: Buffer) -> Tensor:
        """Return memory for partial sums: so many registers per channel and thread.

        A bound call gets memory of its own, since bound calls may run at the same time. All others
        share one piece.
        """
        count = torch.get_num_threads() * buffer.shape.channels * rows * self.lanes
        dtype = buffer.shape.dtype
        if self._bound is not None:
            return _aligned(count, dtype)
        shared = self._workspace.get(dtype)
        if shared is None or shared.numel() < count:
            shared = self._workspace[dtype] = _aligned(count, dtype)
        return shared

    def _as_planned(self, planned: Shape, buffer: Buffer, name: str) -> None:
        s = buffer.shape
        self._sized_as(planned, buffer, name)
        if s.halo != planned.halo:
            raise InputError(
                f"The plan was made for a halo of {planned.halo}; {name} has {s.halo}."
            )

    def _sized_as(self, planned: Shape, buffer: Buffer, name: str) -> None:
        s = buffer.shape
        got = (s.channels, s.height, s.width, s.tokens, s.dtype)
        if got != (planned.channels, planned.height, planned.width, planned.tokens, planned.dtype):
            raise InputError(f"The plan was made for {planned}; {name} is {s}.")

    def _same_samples(self, *buffers: Buffer) -> None:
        if len({(b.shape.samples, b.shape.tokens, b.shape.dtype) for b in buffers}) != 1:
            raise InputError("Buffers of one operation hold the same samples in the same dtype.")


def _aligned(count: int, dtype: torch.dtype) -> Tensor:
    """Return memory for so many numbers, aligned to a cache line."""
    memory = torch.empty(count + LINE // dtype.itemsize, dtype=dtype, device="cpu")
    start = -memory.data_ptr() % LINE // dtype.itemsize
    return memory[start : start + count]


def _count(buffer: Buffer) -> int:
    """Return how many numbers one channel has."""
    s = buffer.shape
    return s.samples * (1 if s.tokens else s.height * s.width)


def _dense_planes(plain: Tensor) -> bool:
    """Return whether the pixels of a channel are contiguous."""
    if plain.dim() != 4:
        return False
    height, width = plain.shape[2:]
    return (width == 1 or plain.stride(3) == 1) and (height == 1 or plain.stride(2) == width)


def _convertible(plain: Tensor) -> bool:
    """Return whether the conversion kernels read these strides: dense planes or dense channels.

    A contiguous tensor with one channel may have any stride there.
    """
    return _dense_planes(plain) or plain.stride(1) == 1 or plain.is_contiguous()
