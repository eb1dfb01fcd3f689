"""Where the time of the segments goes: by layer, pass, and kernel.

While a profile is active, the segments use kernels that compute bitwise the same and time every
call. Without a profile nothing is timed, and nothing is slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acdc.engine.contract import KernelPlan, Kernels, Step
from acdc.engine.layout import Buffer
from acdc.engine.native import Native, NativeCall, NativePlan
from acdc.engine.operations import Conv, Normalise
from acdc.engine.segment import Segment
from acdc.engine.tape import Op, Origin

CONVERSIONS = "conversions"
LISTS = "lists"


@dataclass
class Timing:
    """The time of one kernel for one layer, in one pass.

    Args:
        layer: Name of the module; ``conversions`` at the ends of segments; ``lists``; or, without a
            module, the kind of the operation.
        backward: Whether this was in the backward pass.
        kernel: The row in the kernel table, or ``refresh``: values copied into index lists.
        ms: Milliseconds. Where threads go block by block, this is the mean over the threads.
        calls: How many times it was called.
        multiply_adds: Of kept weights.

    """

    layer: str
    backward: bool
    kernel: str
    ms: float = 0.0
    calls: int = 0
    multiply_adds: int = 0

    @property
    def gflops(self) -> float:
        """10^9 operations per second on kept weights; a multiply-add is two."""
        return 2e-6 * self.multiply_adds / self.ms if self.ms else 0.0


class Profile:
    """The times so far.

    Attributes:
        waiting_ms: The mean time that threads waited for each other at the ends of groups.
        segments_ms: The total time inside segments.

    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._rows: dict[tuple[str, bool, str], Timing] = {}
        self._names: dict[Op, str] = {}
        self._kept: dict[Op, int] = {}
        self.waiting_ms = 0.0
        self.segments_ms = 0.0

    @property
    def rows(self) -> list[Timing]:
        """All times except waiting, in the order in which they first occurred."""
        return list(self._rows.values())

    def clear(self) -> None:
        """Forget all times: the first step allocates its buffers."""
        self._rows.clear()
        self.waiting_ms = self.segments_ms = 0.0

    @property
    def rest_ms(self) -> float:
        """The time inside segments that no row has: Python, autograd, memory for gradients."""
        return self.segments_ms - self.waiting_ms - sum(row.ms for row in self._rows.values())

    def add(
        self, layer: str, backward: bool, kernel: str, ms: float, multiply_adds: int = 0
    ) -> None:
        """Count one call."""
        key = (layer, backward, kernel)
        row = self._rows.setdefault(key, Timing(*key))
        row.ms += ms
        row.calls += 1
        row.multiply_adds += multiply_adds

    def add_sequence(self, steps: Sequence[Step], seconds: Tensor, wall: float) -> None:
        """Count a sequence.

        Args:
            steps: Its compiled calls.
            seconds: float64 ``[1 + threads, calls]``, as the kernels fill it.
            wall: Seconds of all of it.

        """
        each = seconds[0] + seconds[1:].mean(0)
        for step, took in zip(steps, each.tolist(), strict=True):
            call, origin = step.call, step.origin
            assert isinstance(call, NativeCall)
            assert isinstance(origin, Origin)
            ops = self._multiply_adds(origin.op, call)
            self.add(self._names[origin.op], origin.backward, call.kernel, 1e3 * took, ops)
        self.waiting_ms += 1e3 * (wall - float(each.sum()))

    def include(self, segment: Segment) -> None:
        """Note the names of a segment's operations, and how many weights its layers keep."""
        self._names |= {op: self._name_of(op) for op in segment.program.ops}
        self._kept |= {op: plan.nnz for op, plan in segment.plans.items()}

    def _name_of(self, op: Op) -> str:
        if isinstance(op, Conv):
            module: nn.Module = op.spec.module
        elif isinstance(op, Normalise):
            module = op.norm.module
        else:
            return type(op).__name__.lower()
        weight = getattr(module, "weight", None)  # the module of a single layer is a copy
        for name, other in self._model.named_modules():
            if other is module or (weight is not None and getattr(other, "weight", None) is weight):
                return name or type(other).__name__
            if weight is not None and getattr(other, "in_proj_weight", None) is weight:
                return f"{name}.in_proj".removeprefix(".")
        return type(module).__name__

    def _multiply_adds(self, op: Op, call: NativeCall) -> int:
        if call.kernel not in ("conv", "weight_grad"):
            return 0
        pixels = 1 if op.out.tokens else op.out.height * op.out.width
        return int(self._kept[op] * call.args.x.samples * pixels)


class _TimedPlan(NativePlan):
    """The same index lists; refreshing them is timed."""

    def __init__(self, plain: KernelPlan, profile: Profile) -> None:
        vars(self).update(vars(plain))
        self.plain, self._profile = plain, profile

    def refresh(self, weight: Tensor, input_grad: bool = False) -> None:
        """Copy the values of the kept weights into the lists."""
        began = time.perf_counter()
        super().refresh(weight, input_grad)
        self._profile.add(LISTS, False, "refresh", 1e3 * (time.perf_counter() - began))


class _TimedNative(Native):
    """The same kernels, timed."""

    def __init__(self, plain: Kernels, profile: Profile) -> None:
        super().__init__(plain.isa)
        self._profile = profile
        self._backward, self._began = False, 0.0

    def _compiled_sequence(self, steps: Sequence[Step]) -> Callable[..., None]:
        plain = super()._compiled_sequence(steps)

        def run(blocks: int, threads: int) -> None:
            seconds = torch.zeros(1 + threads, len(steps), dtype=torch.float64, device="cpu")
            began = time.perf_counter()
            plain(blocks, threads, seconds)
            self._profile.add_sequence(steps, seconds, time.perf_counter() - began)

        return run

    def to_layout(self, plain: Tensor, out: Buffer) -> Buffer:
        """Copy a tensor into a buffer."""
        with self._conversion("to_layout"):
            return super().to_layout(plain, out)

    def from_layout(self, buffer: Buffer, out: Tensor | None = None) -> Tensor:
        """Copy a buffer into a tensor."""
        with self._conversion("from_layout"):
            return super().from_layout(buffer, out)

    @contextmanager
    def _conversion(self, kernel: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        ms = 1e3 * (time.perf_counter() - began)
        self._profile.add(CONVERSIONS, self._backward, kernel, ms)

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward of a segment, with both passes timed as a whole."""

        def run(*inputs: Tensor) -> Any:
            self._enter(False)
            outputs = forward(*inputs)
            self._leave()
            first = outputs if isinstance(outputs, Tensor) else outputs[0]
            if first.grad_fn is not None:
                first.grad_fn.register_prehook(lambda _: self._enter(True))
                first.grad_fn.register_hook(lambda *_: self._leave())
            return outputs

        return run

    def _enter(self, backward: bool) -> None:
        self._backward, self._began = backward, time.perf_counter()

    def _leave(self) -> None:
        self._profile.segments_ms += 1e3 * (time.perf_counter() - self._began)


@contextmanager
def profiled(segments: Iterable[Segment], profile: Profile) -> Iterator[None]:
    """Time these segments inside this context. They get new buffers at its start and its end."""
    chosen = [(segment, segment.backend) for segment in segments]
    for segment, plain in chosen:
        profile.include(segment)
        timed = segment.backend = _TimedNative(plain, profile)
        _restart(segment, {op: _TimedPlan(plan, profile) for op, plan in segment.plans.items()})
        segment.forward = timed.around(segment.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for segment, plain in chosen:
            del segment.forward
            segment.backend = plain
            _restart(segment, {op: _plain(plan) for op, plan in segment.plans.items()})


def _restart(segment: Segment, plans: Mapping[Op, KernelPlan]) -> None:
    segment.stop()
    segment.start(plans, segment.written)


def _plain(plan: KernelPlan) -> KernelPlan:
    return plan.plain if isinstance(plan, _TimedPlan) else plan
