"""A run of layers as a module: plain tensors in and out, the layout in between.

It stands in the traced graph in place of the nodes that it runs, and keeps those nodes as
``plain``, for every call that the kernels cannot take.
"""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from acdc.engine.graph import first_line
from acdc.engine.kept import Written
from acdc.engine.layout import Buffer, Shape, allocate
from acdc.engine.native import Call as NativeCall
from acdc.engine.native import Native, advise_huge_pages
from acdc.engine.operations import Conv
from acdc.engine.program import Program
from acdc.engine.tape import Call, Instruction, Slot, Tape, Value, Wants

log = logging.getLogger(__name__)


class Frame:
    """A tape with memory: every instruction bound to buffers of one batch size."""

    def __init__(
        self, tape: Tape, memory: Memory, samples: int, backend: Any, plans: Mapping[Conv, Any]
    ) -> None:
        self.backend = backend
        self.results: dict[int, Tensor] = {}
        self.before: list[Call] = []
        self.after: list[Call] = []
        self.targets: list[tuple[Any, Tensor]] = []
        self._plans = plans
        self._numbers: dict[object, Any] = {}
        self._buffers = {slot: memory.buffer(slot, samples) for slot in tape.slots}
        self.forward = self._bound(tape.forward, memory.by_block)
        self.backward = self._bound(tape.backward, memory.by_block)

    def buffer(self, slot: Slot) -> Buffer:
        """Return the memory of a slot."""
        return self._buffers[slot]

    def plan(self, conv: Conv) -> Any:
        """Return the index lists of a layer."""
        return self._plans[conv]

    def numbers(self, owner: object, make: Callable[[], Any]) -> Any:
        """Return what ``make`` made for ``owner`` the first time."""
        if owner not in self._numbers:
            self._numbers[owner] = make()
        return self._numbers[owner]

    def _bound(self, instructions: list[Instruction], by_block: bool) -> list[Call]:
        """Return the calls of instructions; kernels one after another become one call."""
        calls = [(i.bind(self), i.alone or not by_block) for i in instructions]
        blocks = next(iter(self._buffers.values())).shape.blocks
        bound: list[Call] = []
        for native, group in groupby(calls, lambda call: isinstance(call[0], NativeCall)):
            members, alone = zip(*group, strict=True)
            if native:
                run = self.backend.sequence(members, alone)
                bound.append(partial(run, blocks, torch.get_num_threads()))
            else:
                bound.extend(members)
        return bound


class Memory:
    """The buffers of a tape: slots that never live together share one, if they have one shape.

    Sized for the largest batch so far; a smaller batch uses the first blocks.

    Attributes:
        by_block: Whether the kernels of a group go block by block: there are enough blocks to keep
            all threads busy.

    """

    def __init__(self, tape: Tape, samples: int, backend: Any) -> None:
        self.samples, self.lanes, self.threads = samples, backend.lanes, torch.get_num_threads()
        self.by_block = isinstance(backend, Native) and self._enough_blocks(tape)
        self._of: dict[Slot, tuple[int, bool]] = {}  # its piece, and whether it is passing
        pieces: list[Shape] = []
        free: dict[tuple[Shape, bool], list[tuple[int, int]]] = defaultdict(list)
        for slot in sorted(tape.slots, key=lambda s: s.first):
            passing = self.by_block and slot.is_passing
            shape = self._shape(slot, samples)
            if passing:
                shape = replace(shape, samples=self.threads * shape.per_block)
            pool = free[shape, passing]
            usable = [entry for entry in pool if entry[0] < slot.first]
            if usable:
                pool.remove(usable[0])
                piece = usable[0][1]
            else:
                piece = len(pieces)
                pieces.append(shape)
            pool.append((slot.last, piece))
            self._of[slot] = (piece, passing)
        self._pieces = allocate(pieces, advise_huge_pages)

    def _shape(self, slot: Slot, samples: int) -> Shape:
        return slot.value.shape(samples, self.lanes, slot.halo)

    def _enough_blocks(self, tape: Tape) -> bool:
        """Return whether whole blocks keep every thread at least 85 % busy."""
        counts = {self._shape(slot, self.samples).blocks for slot in tape.slots}
        if len(counts) != 1:  # images and tokens
            return False
        (blocks,) = counts
        return blocks / (-(-blocks // self.threads) * self.threads) >= 0.85

    def buffer(self, slot: Slot, samples: int) -> Buffer:
        """Return the memory of a slot for a batch of this size."""
        piece, passing = self._of[slot]
        shape = self._shape(slot, samples)
        return Buffer(shape, self._pieces[piece].data[: shape.numel], passing)

    def tensors(self) -> list[Tensor]:
        """Return all memory, each piece once."""
        return [buffer.data for buffer in self._pieces]


class Arena:
    """One memory and its frames. It serves one forward pass at a time, until that is let go."""

    def __init__(self, tape: Tape, samples: int, backend: Any, plans: Mapping[Conv, Any]) -> None:
        self.tape, self.backend, self.plans = tape, backend, plans
        self.memory = Memory(tape, samples, backend)
        self._frames: dict[int, Frame] = {}

    def frame(self, samples: int) -> Frame:
        """Return the frame for a batch of this size, which fits."""
        if samples not in self._frames:
            self._frames[samples] = Frame(self.tape, self.memory, samples, self.backend, self.plans)
        return self._frames[samples]


class Lease:
    """The right to a frame; it ends with ``end``, or when nobody holds it any more."""

    def __init__(self, arena: Arena, frame: Frame, free: list[Arena]) -> None:
        self.frame, self.tape, self.memory = frame, arena.tape, arena.memory
        self._finalizer = weakref.finalize(self, free.append, arena)
        self._finalizer.atexit = False

    def end(self) -> None:
        """Give the frame back."""
        self._finalizer()


class Segment(nn.Module):
    """A run of layers in the layout.

    Args:
        plain: The run in PyTorch: what else would be called.
        program: The run as a program.
        backend: The kernels.

    """

    def __init__(self, plain: fx.GraphModule, program: Program, backend: Any) -> None:
        super().__init__()
        # Not submodules: the network has them already, and the segment shows nothing of its own.
        self._held = (plain, program)
        self.backend = backend
        self.plans: Mapping[Conv, Any] = {}
        self.written = Written()
        self.nnz: dict[int, int] = {}  # id of a weight → elements of its gradient that are written
        self._tapes: dict[Any, Tape] = {}
        self._free: dict[Any, list[Arena]] = {}
        self.weights = [op.spec.module.weight for op in program.convs]  # read again going back
        self.weights += [n.module.weight for n in program.norms if n.module.weight is not None]
        self._pointers: tuple[int, ...] = ()
        self._said: set[str] = set()

    @property
    def program(self) -> Program:
        """The run as a program."""
        return self._held[1]

    @property
    def is_current(self) -> bool:
        """Whether the parameters are those that the program was built for."""
        return all(now is p for now, p in zip(self._params_now(), self.program.params, strict=True))

    def start(self, plans: Mapping[Conv, Any], written: Written) -> None:
        """Run with these index lists from here on.

        Args:
            plans: The index lists of its layers.
            written: Is told the weight gradients.

        """
        self.stop()
        self.plans, self.written, self.nnz = plans, written, {}
        for conv, plan in plans.items():  # of a weight that is used twice, the larger
            key = id(conv.spec.module.weight)
            self.nnz[key] = max(self.nnz.get(key, 0), plan.nnz)

    def stop(self) -> None:
        """Free the index lists and all buffers."""
        self.plans = {}
        self._free = {key: [] for key in self._free}

    def forward(self, *inputs: Tensor) -> Any:
        """Run on the kernels, or on PyTorch where they cannot."""
        reason = self._refusal(inputs)
        if reason is None:
            try:
                return self._run(inputs)
            except _NoMemory as error:
                reason = str(error)
        if reason not in self._said:
            self._said.add(reason)
            log.warning("A run of sparse layers is computed by plain PyTorch: %s.", reason)
        return self._held[0](*inputs)

    def _refusal(self, inputs: tuple[Tensor, ...]) -> str | None:
        samples = set()
        for x, value in zip(inputs, self.program.inputs, strict=True):
            if not _fits(x, value):
                return f"its input has become {x.dtype} {tuple(x.shape)} on {x.device}"
            samples.add(_samples(x, value))
        if torch._C._are_functorch_transforms_active():
            return "a function transform is active"
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        if len(samples) != 1 or samples == {0}:
            return f"its batch has {sorted(samples)} samples"
        if not self.is_current:
            return "a parameter was replaced by another"
        if any(
            norm.of_batch and min(samples) * norm.y.height * norm.y.width == 1
            for norm in self.program.norms
        ):
            return "a BatchNorm has a single value to average"
        return None

    def _run(self, inputs: tuple[Tensor, ...]) -> Any:
        params = self.program.params
        if torch.is_grad_enabled():
            outputs = _Run.apply(self, len(inputs), *inputs, *params)  # type: ignore[no-untyped-call]
        else:
            lease = self.lease(inputs, None)
            outputs = compute(lease, inputs)
            lease.end()
        return outputs[0] if self.program.returns_one else outputs

    # --- frames -----------------------------------------------------------------------------------

    def _key(self, wants: Wants | None) -> Any:
        modes = tuple((n.of_batch, n.module.momentum, n.module.eps) for n in self.program.norms)
        return wants, modes, torch.get_num_threads()

    def lease(self, inputs: tuple[Tensor, ...], wants: Wants | None) -> Lease:
        """Return a frame for these inputs that nobody uses."""
        key = self._key(wants)
        if key not in self._tapes:
            self._tapes[key] = Tape(self.program, wants)
            self._free[key] = []
        pointers = tuple(t.data_ptr() for t in self._tensors())
        if pointers != self._pointers:  # bound calls read parameters where they were
            self._pointers = pointers
            for other in self._free:
                self._free[other] = []
        samples = _samples(inputs[0], self.program.inputs[0])
        free = self._free[key]
        arena = free.pop() if free else None
        if arena is None or arena.memory.samples < samples:
            del arena  # its memory first
            try:
                with torch.inference_mode(False), torch.no_grad():
                    arena = Arena(self._tapes[key], samples, self.backend, self.plans)
            except (RuntimeError, MemoryError) as error:
                raise _NoMemory(f"no memory for its buffers ({first_line(error)})") from error
        with torch.inference_mode(False), torch.no_grad():
            frame = arena.frame(samples)
        return Lease(arena, frame, free)

    def _params_now(self) -> list[Tensor]:
        """Return the parameters that the modules hold at present, in the order of the program."""
        return list({id(p): p for op in self.program.ops for p in op.params()}.values())

    def _tensors(self) -> list[Tensor]:
        """Return what bound calls point at: all but the weights, which are copied at each call."""
        found = [conv.spec.module.bias for conv in self.program.convs]
        for norm in self.program.norms:
            module = norm.module
            found += [module.weight, module.bias, module.running_mean, module.running_var]
            found.append(module.num_batches_tracked)
        return [tensor for tensor in found if tensor is not None]


class _NoMemory(Exception):
    """There is none left for a frame."""


class _Run(torch.autograd.Function):
    """A segment in autograd: one node from its inputs and parameters to its outputs."""

    @staticmethod
    def forward(ctx: Any, segment: Segment, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, flags = tensors[:count], ctx.needs_input_grad[2:]
        takes = [p for p, f in zip(segment.program.params, flags[count:], strict=True) if f]
        wants = Wants(frozenset(map(id, takes)), tuple(flags[:count]))
        ctx.lease = segment.lease(inputs, wants)
        ctx.written, ctx.nnz = segment.written, segment.nnz
        ctx.params, ctx.takes = segment.program.params, takes
        ctx.like = [(x.shape, _format(x)) for x in inputs]
        # Not to be read, but for PyTorch to see that they were not changed in between, and that
        # the way back is gone once only: the first time frees them, and the frame.
        ctx.save_for_backward(*segment.weights)
        return compute(ctx.lease, inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        lease, tape = ctx.lease, ctx.lease.tape
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        kept = [memory.clone() for memory in lease.memory.tensors()] if keep else []
        frame = lease.frame
        frame.results.update({id(p): torch.zeros_like(p) for p in ctx.takes})
        for call, weight in frame.targets:
            call.into(frame.results[id(weight)])
        totals: dict[Slot, Tensor] = {}
        for grad, slot in zip(grads, tape.output_grads, strict=True):
            totals[slot] = totals[slot] + grad if slot in totals else grad
        for slot, grad in totals.items():
            frame.backend.to_layout(_flat(grad, slot.value), frame.buffer(slot))
        for call in frame.backward + frame.after:
            call()
        for key in ctx.nnz.keys() & frame.results.keys():
            ctx.written.note(key, frame.results[key], ctx.nnz[key])
        inputs = [
            None if slot is None else _plain(frame, slot, *like)
            for slot, like in zip(tape.input_grads, ctx.like, strict=True)
        ]
        params = [frame.results.pop(id(p), None) for p in ctx.params]
        if keep:
            for memory, copy in zip(lease.memory.tensors(), kept, strict=True):
                memory.copy_(copy)
        else:
            lease.end()
        return (None, None, *inputs, *params)


def compute(lease: Lease, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Run a frame forward, from plain tensors to plain tensors."""
    frame, tape = lease.frame, lease.tape
    for x, slot in zip(inputs, tape.inputs, strict=True):
        frame.backend.to_layout(_flat(x.detach(), slot.value), frame.buffer(slot))
    for call in frame.before + frame.forward:
        call()
    first = inputs[0]
    return tuple(
        _plain(frame, slot, _out_shape(first, slot.value), _format(first)) for slot in tape.outputs
    )


# --- between plain tensors and buffers ------------------------------------------------------------


def _fits(x: Tensor, value: Value) -> bool:
    if x.dtype != value.dtype or x.device.type != "cpu" or x.layout != torch.strided:
        return False
    if value.tokens:
        return x.shape[-1] == value.channels
    return tuple(x.shape[1:]) == (value.channels, value.height, value.width)


def _samples(x: Tensor, value: Value) -> int:
    return x.numel() // value.channels if value.tokens else x.shape[0]


def _flat(x: Tensor, value: Value) -> Tensor:
    return x.reshape(-1, value.channels) if value.tokens else x


def _out_shape(x: Tensor, value: Value) -> tuple[int, ...]:
    if value.tokens:
        return (*x.shape[:-1], value.channels)
    return (x.shape[0], value.channels, value.height, value.width)


def _format(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not x.is_contiguous() else torch.contiguous_format


def _plain(frame: Frame, slot: Slot, shape: tuple[int, ...], memory: torch.memory_format) -> Tensor:
    """Return what a slot holds as a tensor of this shape and memory format."""
    with torch.no_grad():
        out = torch.empty(shape, dtype=slot.value.dtype, memory_format=memory)
        frame.backend.from_layout(frame.buffer(slot), _flat(out, slot.value))
    return out
