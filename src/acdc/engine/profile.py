"""Where the time of the runs of layers goes: by layer, way, and kernel.

A profile gives the runs other kernels for a while, which compute the same, bit for bit, and look at
the clock around every call. Without one, nothing is counted and nothing is slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acdc.engine.layout import Buffer
from acdc.engine.native import Call, Native, Plan
from acdc.engine.operations import Conv, Normalise, Op
from acdc.engine.segment import Segment

CONVERSIONS = "conversions"
LISTS = "lists"


@dataclass
class Timing:
    """What one kernel took for one layer, on one way.

    Args:
        layer: Name of the module; ``conversions`` at the ends of runs; or, without a module, what
            the operation is.
        backward: Whether this was on the way back.
        kernel: Its row in the kernel table, or ``refresh``: values copied into index lists.
        ms: Milliseconds; where threads go through blocks, the mean of what each of them took.
        calls: How many times a run called it.
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
        """10^9 operations a second on kept weights; a multiply-add is two."""
        return 2e-6 * self.multiply_adds / self.ms if self.ms else 0.0


class Profile:
    """What was counted so far.

    Attributes:
        waiting_ms: What threads waited for each other where they go through blocks, on average.
        runs_ms: All that passed inside of runs.

    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._rows: dict[tuple[str, bool, str], Timing] = {}
        self._names: dict[Op, str] = {}
        self._kept: dict[Op, int] = {}
        self.waiting_ms = 0.0
        self.runs_ms = 0.0

    @property
    def rows(self) -> list[Timing]:
        """Everything but waiting, in the order in which it came first."""
        return list(self._rows.values())

    def clear(self) -> None:
        """Forget what was counted: the first step had to get its buffers."""
        self._rows.clear()
        self.waiting_ms = self.runs_ms = 0.0

    @property
    def rest_ms(self) -> float:
        """What passed inside of runs, and no row has: Python, autograd, memory for gradients."""
        return self.runs_ms - self.waiting_ms - sum(row.ms for row in self._rows.values())

    def add(
        self, layer: str, backward: bool, kernel: str, ms: float, multiply_adds: int = 0
    ) -> None:
        """Count one call."""
        key = (layer, backward, kernel)
        row = self._rows.setdefault(key, Timing(*key))
        row.ms += ms
        row.calls += 1
        row.multiply_adds += multiply_adds

    def add_sequence(self, calls: Sequence[Call], seconds: Tensor, wall: float) -> None:
        """Count a sequence.

        Args:
            calls: Its calls.
            seconds: float64 ``[1 + threads, calls]``, as the kernels fill it.
            wall: Seconds of all of it.

        """
        each = seconds[0] + seconds[1:].mean(0)
        for call, took in zip(calls, each.tolist(), strict=True):
            assert call.origin is not None
            op, backward = call.origin
            ops = self._multiply_adds(op, call)
            self.add(self._names[op], backward, call.kernel, 1e3 * took, ops)
        self.waiting_ms += 1e3 * (wall - float(each.sum()))

    def know(self, segment: Segment) -> None:
        """Note what the operations of a run are called, and how many weights their layers keep."""
        self._names |= {op: self._name_of(op) for op in segment.program.ops}
        self._kept |= {conv: plan.nnz for conv, plan in segment.plans.items()}

    def _name_of(self, op: Op) -> str:
        if isinstance(op, Conv):
            module: nn.Module = op.spec.module
        elif isinstance(op, Normalise):
            module = op.norm.module
        else:
            return type(op).__name__.lower()
        weight = getattr(module, "weight", None)  # a layer that stands alone is a twin
        for name, other in self._model.named_modules():
            if other is module or (weight is not None and getattr(other, "weight", None) is weight):
                return name or type(other).__name__
        return type(module).__name__

    def _multiply_adds(self, op: Op, call: Call) -> int:
        if call.kernel not in ("conv", "weight_grad"):
            return 0
        pixels = 1 if op.out.tokens else op.out.height * op.out.width
        return int(self._kept[op] * call.args.x.samples * pixels)


class _TimedPlan(Plan):
    """The same index lists, whose refreshing is counted."""

    def __init__(self, plain: Plan, profile: Profile) -> None:
        vars(self).update(vars(plain))
        self.plain, self._profile = plain, profile

    def refresh(self, weight: Tensor, input_grad: bool = False) -> None:
        """Copy the values of the kept weights into the lists."""
        began = time.perf_counter()
        super().refresh(weight, input_grad)
        self._profile.add(LISTS, False, "refresh", 1e3 * (time.perf_counter() - began))


class _Timed(Native):
    """The same kernels, counted."""

    def __init__(self, plain: Native, profile: Profile) -> None:
        super().__init__(plain.isa)
        self._profile = profile
        self._backward, self._began = False, 0.0

    def sequence(self, calls: Sequence[Call], alone: Sequence[bool]) -> Callable[..., None]:
        """Return bound calls as one."""
        plain = super().sequence(calls, alone)

        def run(blocks: int, threads: int) -> None:
            seconds = torch.zeros(1 + threads, len(calls), dtype=torch.float64)
            began = time.perf_counter()
            plain(blocks, threads, seconds)
            self._profile.add_sequence(calls, seconds, time.perf_counter() - began)

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
        """Return the forward of a run, which counts all that passes in it, on both ways."""

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
        self._profile.runs_ms += 1e3 * (time.perf_counter() - self._began)


@contextmanager
def profiled(segments: Iterable[Segment], profile: Profile) -> Iterator[None]:
    """Count what these runs do; they get fresh buffers at both ends."""
    chosen = [(segment, segment.backend) for segment in segments]
    for segment, plain in chosen:
        profile.know(segment)
        timed = segment.backend = _Timed(plain, profile)
        plans = {conv: _TimedPlan(plan, profile) for conv, plan in segment.plans.items()}
        segment.stop()
        segment.start(plans, segment.written)
        segment.forward = timed.around(segment.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for segment, plain in chosen:
            del segment.forward
            segment.backend = plain
            plans = {conv: getattr(p, "plain", p) for conv, p in segment.plans.items()}
            segment.stop()
            segment.start(plans, segment.written)
