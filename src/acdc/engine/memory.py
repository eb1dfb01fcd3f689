"""The memory of segments: buffers for the slots of a tape, and the tape's calls bound to them.

Buffers that must survive from the forward to the backward pass belong to an arena. All others come
from a workspace that the segments of a network share.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar, cast
from weakref import WeakSet

import torch
from torch import Tensor
from torch._C._autograd import SavedTensor

from acdc.engine.contract import Call, KernelPlan, Kernels, Step, WeightGradCall
from acdc.engine.gradients import LARGE
from acdc.engine.graph import ConvSpec
from acdc.engine.layout import LINE, Buffer, Shape, allocate
from acdc.engine.locks import Lock
from acdc.engine.native import advise_huge_pages
from acdc.engine.pieces import Grid, Piece, Pieces
from acdc.engine.tape import Around, Instruction, Op, Slot, Tape

T = TypeVar("T")


class Workspace:
    """Memory that the segments of a network share. Only one thread computes in it at a time.

    It holds what a segment needs within its forward pass or within its backward pass.

    Attributes:
        lock: Held while a segment computes, and while graphs, index lists or buffers change.
        changes: How often a piece of memory was added.

    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.changes = 0
        self._pieces: dict[Grid, WeakSet[Piece]] = defaultdict(WeakSet)
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}  # by id of the parameter

    def pieces(self, wanted: Sequence[tuple[Grid, int]]) -> list[Piece]:
        """Return a piece of memory for each grid and size.

        The largest one that is wanted gets the largest one that there is, and so on, so that the
        segments of a network need little more than the one that needs most. A piece lives as long
        as some caller uses it.
        """
        found: dict[int, Piece] = {}
        for grid in dict.fromkeys(grid for grid, _ in wanted):
            numbers = [n for n, (g, _) in enumerate(wanted) if g == grid]
            have = sorted(self._pieces[grid], key=lambda piece: -piece.data.numel())
            for number in sorted(numbers, key=lambda n: -wanted[n][1]):
                size = wanted[number][1]
                if have and have[0].data.numel() >= size:
                    found[number] = have.pop(0)
                else:
                    (data,) = allocate([size], grid.dtype, advise_huge_pages)
                    found[number] = Piece(data)
                    self._pieces[grid].add(found[number])
                    self.changes += 1
        return [found[number] for number in range(len(wanted))]

    def scratch(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return memory for partial sums, aligned to a cache line."""
        spare = LINE // dtype.itemsize
        if dtype not in self._scratch or self._scratch[dtype].numel() < count + spare:
            self._scratch.pop(dtype, None)
            self._scratch[dtype] = torch.empty(count + spare, dtype=dtype, device="cpu")
        start = -self._scratch[dtype].data_ptr() % LINE // dtype.itemsize
        return self._scratch[dtype][start : start + count]

    def gradient(self, param: Tensor) -> tuple[Tensor, bool]:
        """Return memory for a gradient, and whether it holds only zeros.

        A large gradient reuses the memory of the step before, if no tensor uses that any more. New
        memory from the system would cost as much as clearing the old one, and memory that is freed
        in between is split up by the activations of the next step. It is not cleared: the kernel
        that writes the gradient writes the zeros, too.
        """
        if param.numel() < LARGE:
            return torch.zeros_like(param), True
        reused = self._gradients.get(id(param))
        if reused is None:
            reused = self._gradients[id(param)] = torch.empty_like(param)
            advise_huge_pages(reused)
        elif _users(reused) > 1:
            return torch.empty_like(param), False
        # `.data` is a tensor with a version counter of its own: later writes here must not count as
        # changes of the gradient that was handed out.
        return reused.data, False

    def clear(self) -> None:
        """Free the memory for partial sums and gradients."""
        self._scratch.clear()
        self._gradients.clear()


def _shape_of(tensor: Tensor) -> torch.Size:
    return tensor.shape


def _users(tensor: Tensor) -> int:
    """Return how many tensors use the memory of this one."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1  # `storage` is one more


class Frame:
    """A tape with every instruction bound to buffers of one batch size.

    Args:
        tape: The instructions.
        buffers: The memory of each slot.
        backend: The kernels.
        plans: The index lists of the layers.
        by_block: The kernels of a group may run block by block.
        workspace: The memory for partial sums.

    """

    def __init__(
        self,
        tape: Tape,
        buffers: Mapping[Slot, Buffer],
        backend: Kernels,
        plans: Mapping[Op, KernelPlan],
        by_block: bool,
        workspace: Workspace,
    ) -> None:
        self.backend, self._dtype = backend, tape.inputs[0].value.dtype
        self.memory_format = torch.contiguous_format
        self.results: dict[int, Tensor] = {}
        self.before: list[Around] = []
        self.after: list[Around] = []
        self.targets: list[tuple[WeightGradCall, ConvSpec]] = []
        self._plans, self._buffers = plans, buffers
        self._made: dict[object, object] = {}
        self.forward = self._bound(tape.forward, by_block)
        self.backward = self._bound(tape.backward, by_block)
        self._scratch_of(workspace)  # allocated now: if it fails, PyTorch can still compute

    def buffer(self, slot: Slot) -> Buffer:
        """Return the memory of a slot."""
        return self._buffers[slot]

    def plan(self, op: Op) -> KernelPlan:
        """Return the index lists of a layer."""
        return self._plans[op]

    def once(self, key: object, make: Callable[[], T]) -> T:
        """Return what ``make`` returned for this key the first time."""
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])

    def make_results(self, takes: Sequence[Tensor], workspace: Workspace) -> None:
        """Allocate the gradients of these parameters, and direct the weight gradients into them."""
        made = {id(p): workspace.gradient(p) for p in takes}
        self.results = {key: grad for key, (grad, _) in made.items()}
        unwritten = {key for key, (_, is_zero) in made.items() if not is_zero}
        for (call, layer), part in zip(self.targets, self._scratch_of(workspace), strict=True):
            key = id(layer.weight)
            # A weight that is used twice has two calls: the second one adds.
            call.into(layer.by_output(self.results[key]), part, whole=key in unwritten)
            unwritten.discard(key)
        for key in unwritten:
            self.results[key].zero_()

    def _scratch_of(self, workspace: Workspace) -> Sequence[Tensor]:
        """Return the memory for the partial sums of each weight gradient."""
        counts = [call.scratch for call, _ in self.targets]
        return workspace.scratch(sum(counts), self._dtype).split(counts) if counts else ()

    def _bound(self, instructions: Sequence[Instruction], by_block: bool) -> list[Call]:
        """Return the bound calls of instructions."""
        steps = [Step(i.bind(self), i.alone or not by_block, i.origin) for i in instructions]
        blocks = next(iter(self._buffers.values())).shape.blocks
        return self.backend.sequence(steps, blocks)


class Arena:
    """The buffers of a tape, and its frames by batch size. It serves one forward pass at a time.

    Buffers that must survive from the forward to the backward pass belong to the arena. All others
    come from the shared workspace, unless a piece that is large enough is free here. The arena is
    sized for ``samples``; a smaller batch uses the first blocks.

    Attributes:
        kept: The memory of the arena itself.
        by_block: Whether the kernels of a group run block by block. There must be enough blocks to
            keep all threads busy.

    """

    def __init__(
        self,
        tape: Tape,
        samples: int,
        backend: Kernels,
        plans: Mapping[Op, KernelPlan],
        workspace: Workspace,
    ) -> None:
        self.tape, self.samples, self.backend, self.plans = tape, samples, backend, plans
        self.workspace, self.threads = workspace, torch.get_num_threads()
        self.by_block = backend.by_block and self._enough_blocks()
        self._frames: dict[int, Frame] = {}
        self._piece_of: dict[Slot, tuple[Pieces, int, bool]] = {}  # and whether it is transient
        own, self._shared = Pieces(self.by_block), Pieces(self.by_block)
        shapes = {slot: self._whole_shape(slot) for slot in tape.slots}
        # The largest first: smaller ones then find room in them.
        for slot in sorted(
            tape.slots, key=lambda s: (not tape.is_kept(s), -shapes[s].numel, s.first)
        ):
            shape, pieces = shapes[slot], own
            if tape.is_kept(slot):
                free = None  # all of these are alive between the passes
            elif (free := own.free(shape, slot)) is None:
                pieces, free = self._shared, self._shared.free(shape, slot)
            number = pieces.put(shape, slot, free)
            self._piece_of[slot] = (pieces, number, self._is_transient(slot))
        dtype = tape.inputs[0].value.dtype
        self.kept = allocate([size for _, size in own.wanted], dtype, advise_huge_pages)
        own.given = [Piece(data) for data in self.kept]
        self._share()

    def _share(self) -> None:
        """Take pieces of the workspace, and drop all frames if these are others."""
        given = self.workspace.pieces(self._shared.wanted)
        self._changes = self.workspace.changes
        if given != self._shared.given:
            self._shared.given = given
            self._frames.clear()

    def restart(self, plans: Mapping[Op, KernelPlan]) -> None:
        """Drop all frames. New frames use these index lists."""
        self.plans = plans
        self._frames.clear()

    def frame(self, samples: int) -> Frame:
        """Return the frame for a batch of this size, which must fit."""
        if self._changes != self.workspace.changes:
            self._share()
        if samples not in self._frames:
            buffers = {slot: self._buffer(slot, samples) for slot in self.tape.slots}
            self._frames[samples] = Frame(
                self.tape, buffers, self.backend, self.plans, self.by_block, self.workspace
            )
        return self._frames[samples]

    def _is_transient(self, slot: Slot) -> bool:
        return self.by_block and slot.is_transient

    def _whole_shape(self, slot: Slot) -> Shape:
        """Return the shape of a slot for the batch that the arena is sized for."""
        shape = self._shape(slot, self.samples)
        if self._is_transient(slot):
            shape = replace(shape, samples=self.threads * shape.per_block)
        return shape

    def _shape(self, slot: Slot, samples: int) -> Shape:
        return slot.value.shape(samples, self.backend.lanes, slot.halo)

    def _enough_blocks(self) -> bool:
        """Return whether whole blocks keep every thread at least 85 % busy."""
        counts = {self._shape(slot, self.samples).blocks for slot in self.tape.slots}
        if len(counts) != 1:  # images and tokens
            return False
        (blocks,) = counts
        return blocks / (-(-blocks // self.threads) * self.threads) >= 0.85

    def _buffer(self, slot: Slot, samples: int) -> Buffer:
        """Return the memory of a slot for a batch of this size."""
        pieces, piece, transient = self._piece_of[slot]
        shape = self._shape(slot, samples)
        return Buffer(shape, pieces.given[piece].data[: shape.numel], transient)


class Lease:
    """The right to use a frame. It ends with ``end``, or when the lease is garbage collected.

    Args:
        arena: The arena of the frame.
        frame: The frame.
        free: The list that the arena returns to.

    Attributes:
        reads_inputs: Whether the tensors that autograd saved for ``hold`` are read with their
            values. Otherwise they are placeholders, which cost nothing.
        threads: The number of threads that the buffers are sized for.

    """

    def __init__(self, arena: Arena, frame: Frame, free: list[Arena]) -> None:
        self.frame, self.tape = frame, arena.tape
        self.kept, self.workspace = arena.kept, arena.workspace
        self.threads = arena.threads
        self.reads_inputs = False
        self._finalizer = weakref.finalize(self, free.append, arena)
        self._finalizer.atexit = False

    def hold(self, inputs: Sequence[Tensor], saved: Sequence[SavedTensor]) -> None:
        """Free large inputs that autograd saved, where the frame keeps their values anyway.

        Derivatives of second order need the inputs with their history, and are rare. Autograd keeps
        the history of what it saved, and reads the values from here.
        """
        for x, one, slot in zip(inputs, saved, self.tape.inputs, strict=False):
            if x.numel() < LARGE or not self.tape.is_kept(slot):
                continue
            with suppress(RuntimeError):  # the user packs saved tensors: `save_on_cpu`, checkpoint
                one.register_hooks(_shape_of, partial(self._unpacked, slot))  # type: ignore[attr-defined]

    def _unpacked(self, slot: Slot, shape: torch.Size) -> Tensor:
        if not self.reads_inputs:
            return torch.empty((), dtype=slot.value.dtype, device="cpu").expand(shape)
        with self.workspace.lock:
            return self.frame.backend.from_layout(self.frame.buffer(slot)).reshape(shape)

    def end(self) -> None:
        """Give the frame back."""
        self._finalizer()
