"""A run of layers as a module: plain tensors in and out, the layout in between.

It stands in the traced graph in place of the nodes that it runs, and keeps those nodes as
``plain``, for every call that the kernels cannot take.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from acdc.engine.graph import first_line
from acdc.engine.layout import LINE, Buffer, Shape, allocate
from acdc.engine.lowering import Program
from acdc.engine.native import Call as NativeCall
from acdc.engine.native import Native, advise_huge_pages
from acdc.engine.operations import Conv
from acdc.engine.tape import Call, Instruction, Slot, Tape, Value, Wants
from acdc.engine.written import LARGE, Written

log = logging.getLogger(__name__)


class Frame:
    """A tape with memory: every instruction bound to buffers of one batch size."""

    def __init__(
        self, tape: Tape, memory: Memory, samples: int, backend: Any, plans: Mapping[Conv, Any]
    ) -> None:
        self.backend, self._dtype = backend, tape.program.inputs[0].dtype
        self.results: dict[int, Tensor] = {}
        self.before: list[Call] = []
        self.after: list[Call] = []
        self.targets: list[tuple[Any, Tensor]] = []
        self._plans = plans
        self._numbers: dict[object, Any] = {}
        self._buffers = {slot: memory.buffer(slot, samples) for slot in tape.slots}
        self.forward = self._bound(tape.forward, memory.by_block)
        self.backward = self._bound(tape.backward, memory.by_block)
        self._scratch_of(memory.workspace)  # now: where there is none, PyTorch can still compute

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

    def set_targets(self, workspace: Workspace) -> None:
        """Let the weight gradients go into ``results``, and their partial sums into scratch."""
        for (call, weight), part in zip(self.targets, self._scratch_of(workspace), strict=True):
            call.into(self.results[id(weight)], part)

    def _scratch_of(self, workspace: Workspace) -> Sequence[Tensor]:
        """Return the memory for the partial sums of each weight gradient."""
        counts = [call.scratch for call, _ in self.targets]
        return workspace.scratch(sum(counts), self._dtype).split(counts) if counts else ()

    def _bound(self, instructions: list[Instruction], by_block: bool) -> list[Call]:
        """Return the calls of instructions; kernels one after another become one call."""
        calls = [(i.bind(self), i.alone or not by_block) for i in instructions]
        for (call, _), instruction in zip(calls, instructions, strict=True):
            if isinstance(call, NativeCall):
                call.origin = instruction.origin
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


class Workspace:
    """Memory that the runs of a network share, as only one of them computes at a time: for what
    lives on the way forward, or on the way back, but not from one to the other.

    Attributes:
        lock: Held by the run that computes.

    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._pieces: WeakValueDictionary[tuple[Shape, int], Buffer] = WeakValueDictionary()
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}  # by id of the parameter

    def pieces(self, shapes: Sequence[Shape]) -> list[Buffer]:
        """Return a buffer for each shape: for the second of one shape always the same second one.
        They live as long as somebody uses them.
        """
        seen: Counter[Shape] = Counter()
        keys = []
        for shape in shapes:
            keys.append((shape, seen[shape]))
            seen[shape] += 1
        found = {key: self._pieces[key] for key in keys if key in self._pieces}
        new = [key for key in keys if key not in found]
        made = allocate([shape for shape, _ in new], advise_huge_pages)
        found |= zip(new, made, strict=True)
        self._pieces.update(found)
        return [found[key] for key in keys]

    def scratch(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return memory for partial sums, aligned to a cache line."""
        spare = LINE // dtype.itemsize
        if dtype not in self._scratch or self._scratch[dtype].numel() < count + spare:
            self._scratch.pop(dtype, None)
            self._scratch[dtype] = torch.empty(count + spare, dtype=dtype)
        start = -self._scratch[dtype].data_ptr() % LINE // dtype.itemsize
        return self._scratch[dtype][start : start + count]

    def zeros_like(self, param: Tensor) -> Tensor:
        """Return zeros for a gradient: in the memory of the last one, if nobody has that any more.

        Memory that comes from the system anew at each step costs as much as clearing it, and what
        is freed in between is broken up by the activations of the next step.
        """
        if param.numel() < LARGE:
            return torch.zeros_like(param)
        mine = self._gradients.get(id(param))
        if mine is None:
            mine = self._gradients[id(param)] = torch.empty_like(param)
            advise_huge_pages(mine)
        elif _users(mine) > 1:
            return torch.zeros_like(param)
        return mine.zero_().data  # which counts its changes for itself

    def clear(self) -> None:
        """Free the memory for partial sums and gradients."""
        self._scratch.clear()
        self._gradients.clear()


def _users(tensor: Tensor) -> int:
    """Return how many tensors use the memory of this one."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1  # `storage` is one more


class Memory:
    """The buffers of a tape: slots that never live together share one, if they have one shape.

    What goes through the turn from forward to backward is the memory's own; all else is the
    workspace's, where it does not fit in before or after. Sized for the largest batch so
    far; a smaller batch uses the first blocks.

    Attributes:
        by_block: Whether the kernels of a group go block by block: there are enough blocks to keep
            all threads busy.

    """

    def __init__(self, tape: Tape, samples: int, backend: Any, workspace: Workspace) -> None:
        self.samples, self.lanes, self.threads = samples, backend.lanes, torch.get_num_threads()
        self.by_block = isinstance(backend, Native) and self._enough_blocks(tape)
        self.workspace = workspace
        self._of: dict[Slot, tuple[_Pieces, int, bool]] = {}  # its piece, and whether it is passing
        own, shared = _Pieces(), _Pieces()
        for slot in sorted(tape.slots, key=lambda s: (not tape.is_kept(s), s.first)):
            passing = self.by_block and slot.is_passing
            shape = self._shape(slot, samples)
            if passing:
                shape = replace(shape, samples=self.threads * shape.per_block)
            fits = tape.is_kept(slot) or own.free(shape, slot) is not None
            pieces = own if fits else shared
            self._of[slot] = (pieces, pieces.take(shape, slot), passing)
        own.buffers = allocate(own.shapes, advise_huge_pages)
        shared.buffers = workspace.pieces(shared.shapes)
        self.kept = [buffer.data for buffer in own.buffers]

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
        pieces, piece, passing = self._of[slot]
        shape = self._shape(slot, samples)
        return Buffer(shape, pieces.buffers[piece].data[: shape.numel], passing)


class _Pieces:
    """Pieces of memory, each for slots of one shape that never live together."""

    def __init__(self) -> None:
        self.shapes: list[Shape] = []
        self.buffers: list[Buffer] = []
        self._slots: list[list[Slot]] = []  # of each piece

    def free(self, shape: Shape, slot: Slot) -> int | None:
        """Return the number of a piece that is free while the slot lives, if there is one."""
        for number, (have, slots) in enumerate(zip(self.shapes, self._slots, strict=True)):
            if have == shape and all(s.last < slot.first or slot.last < s.first for s in slots):
                return number
        return None

    def take(self, shape: Shape, slot: Slot) -> int:
        """Return the number of a piece for the whole life of a slot."""
        piece = self.free(shape, slot)
        if piece is None:
            piece = len(self.shapes)
            self.shapes.append(shape)
            self._slots.append([])
        self._slots[piece].append(slot)
        return piece


class Arena:
    """One memory and its frames. It serves one forward pass at a time, until that is let go."""

    def __init__(
        self,
        tape: Tape,
        samples: int,
        backend: Any,
        plans: Mapping[Conv, Any],
        workspace: Workspace,
    ) -> None:
        self.tape, self.backend, self.plans = tape, backend, plans
        self.memory = Memory(tape, samples, backend, workspace)
        self._frames: dict[int, Frame] = {}

    def restart(self, plans: Mapping[Conv, Any]) -> None:
        """Let go of all frames; those from here on use these index lists."""
        self.plans = plans
        self._frames.clear()

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
        workspace: The memory that it shares with other runs.

    """

    def __init__(
        self, plain: fx.GraphModule, program: Program, backend: Any, workspace: Workspace
    ) -> None:
        super().__init__()
        # Not submodules: the network has them already, and the segment shows nothing of its own.
        self._held = (plain, program)
        self.backend, self.workspace = backend, workspace
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
        """Run with these index lists from here on, in the buffers that there are.

        Args:
            plans: The index lists of its layers.
            written: Is told the weight gradients.

        """
        self._restart(plans)
        self.written, self.nnz = written, {}
        for conv, plan in plans.items():  # of a weight that is used twice, the larger
            key = id(conv.spec.module.weight)
            self.nnz[key] = max(self.nnz.get(key, 0), plan.nnz)

    def pause(self) -> None:
        """Free the index lists, and keep the buffers for the next ones."""
        self._restart({})

    def stop(self) -> None:
        """Free the index lists and all buffers."""
        self.plans = {}
        self._free = {key: [] for key in self._free}

    def _restart(self, plans: Mapping[Conv, Any]) -> None:
        self.plans = plans
        # New lists: an arena that is out comes back to its old one, and goes with it.
        self._free = {key: list(free) for key, free in self._free.items()}
        for arena in (arena for free in self._free.values() for arena in free):
            arena.restart(plans)

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
                    arena = Arena(
                        self._tapes[key], samples, self.backend, self.plans, self.workspace
                    )
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
        lease = ctx.lease
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        kept = [memory.clone() for memory in lease.memory.kept] if keep else []
        with lease.memory.workspace.lock:
            inputs, results = compute_back(lease, grads, ctx.takes, ctx.like)
        for key in ctx.nnz.keys() & results.keys():
            ctx.written.note(key, results[key], ctx.nnz[key])
        if keep:
            for memory, copy in zip(lease.memory.kept, kept, strict=True):
                memory.copy_(copy)
        else:
            lease.end()
        return (None, None, *inputs, *(results.get(id(p)) for p in ctx.params))


def compute(lease: Lease, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Run a frame forward, from plain tensors to plain tensors."""
    frame, tape, first = lease.frame, lease.tape, inputs[0]
    with lease.memory.workspace.lock:
        for x, slot in zip(inputs, tape.inputs, strict=True):
            frame.backend.to_layout(_flat(x.detach(), slot.value), frame.buffer(slot))
        for call in frame.before + frame.forward:
            call()
        return tuple(
            _plain(frame, slot, _out_shape(first, slot.value), _format(first))
            for slot in tape.outputs
        )


def compute_back(
    lease: Lease,
    grads: Sequence[Tensor],
    takes: Sequence[Tensor],
    like: Sequence[tuple[torch.Size, torch.memory_format]],
) -> tuple[list[Tensor | None], dict[int, Tensor]]:
    """Run a frame back, from the gradients of its outputs.

    Args:
        lease: Of the frame.
        grads: Of the outputs.
        takes: The parameters that take a gradient.
        like: Shape and memory format of each input.

    Returns:
        The gradients of the inputs, where they are wanted, and those of the parameters by id.

    """
    frame, tape = lease.frame, lease.tape
    frame.results = {id(p): lease.memory.workspace.zeros_like(p) for p in takes}
    frame.set_targets(lease.memory.workspace)
    totals: dict[Slot, Tensor] = {}
    for grad, slot in zip(grads, tape.output_grads, strict=True):
        totals[slot] = totals[slot] + grad if slot in totals else grad
    for slot, grad in totals.items():
        frame.backend.to_layout(_flat(grad, slot.value), frame.buffer(slot))
    for call in frame.backward + frame.after:
        call()
    inputs = [
        None if slot is None else _plain(frame, slot, *shape_and_format)
        for slot, shape_and_format in zip(tape.input_grads, like, strict=True)
    ]
    results, frame.results = frame.results, {}
    return inputs, results


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
