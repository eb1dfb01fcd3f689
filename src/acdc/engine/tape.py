"""A program written out as instructions, forward and backward, on buffers that share memory.

A *slot* is a buffer that a tape asks for, alive from its first to its last instruction; a frame
(``acdc.engine.segment``) gives the slots memory and binds the instructions to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from acdc.engine.layout import Buffer, Shape

if TYPE_CHECKING:
    from acdc.engine.lowering import Program
    from acdc.engine.operations import Conv, Op


@dataclass(eq=False)
class Value:
    """A tensor between two operations, without its batch size."""

    channels: int
    height: int
    width: int
    tokens: bool
    dtype: torch.dtype
    halo: int = 0  # what those who read it need
    grad_halo: int = 0  # what the one who made it needs of its gradient

    def shape(self, samples: int, lanes: int, halo: int) -> Shape:
        """Return the shape of a buffer for it."""
        return Shape(
            samples, self.channels, self.height, self.width, lanes, halo, self.tokens, self.dtype
        )


@dataclass(eq=False)
class Slot:
    """A buffer that a tape asks for.

    Args:
        value: What it holds.
        halo: Its halo.
        first, last: The instructions of its life, counted through the tape; the turn counts as one.
        groups: Those that use it; None stands for both ends of the tape.

    """

    value: Value
    halo: int
    first: int = -1
    last: int = -1
    groups: set[int | None] = field(default_factory=set)

    @property
    def is_passing(self) -> bool:
        """Whether only one group knows it: block by block, one block for each thread will do."""
        return len(self.groups) == 1 and None not in self.groups


class Binder(Protocol):
    """What an instruction is bound to: memory for every slot, and a place for small numbers."""

    backend: Any
    results: dict[int, Tensor]  # the gradients of parameters, by id
    before: list[Call]  # what runs before the way forward
    after: list[Call]  # what runs after the way back
    targets: list[tuple[Any, Tensor]]  # calls of weight gradients, and whose they are

    def buffer(self, slot: Slot) -> Buffer:
        """Return the memory of a slot."""

    def plan(self, conv: Conv) -> Any:
        """Return the index lists of a convolution."""

    def numbers(self, owner: object, make: Callable[[], Any]) -> Any:
        """Return what ``make`` made for ``owner`` the first time."""


Call = Callable[[], object]
Bind = Callable[[Binder], Call]


@dataclass(frozen=True)
class Instruction:
    """What binds a call, and whether that needs what all blocks left behind.

    Args:
        bind, alone: These.
        origin: The operation it is a part of, and whether it is on the way back.

    """

    bind: Bind
    alone: bool
    origin: tuple[Op, bool]


@dataclass(frozen=True)
class Wants:
    """What the way back has to give: the ids of parameters, and which of the inputs."""

    params: frozenset[int]
    inputs: tuple[bool, ...]


class Tape:
    """The instructions of a program, and the slots that they use.

    Args:
        program: What to write out.
        wants: What the way back gives; None if there is none, and nothing is kept for it.

    """

    def __init__(self, program: Program, wants: Wants | None) -> None:
        self.program, self.wants = program, wants
        self.forward: list[Instruction] = []
        self.backward: list[Instruction] = []
        self.slots: list[Slot] = []
        self._now = self.forward
        self._op: Op
        self._values: dict[Value, Slot] = {}
        self._grads: dict[Value, Slot] = {}
        self._needed: set[Value] = set()
        self._group = 0  # of instructions between two that stand alone
        self._makers = {op.out: op for op in program.ops}
        self._again: dict[tuple[Value, int], Slot] = {}

        self.inputs = [self.value(value) for value in program.inputs]
        self._touch(None, *self.inputs)
        for op in program.ops:
            self._op = op
            op.forward(self)
        self.outputs = [self.value(value) for value in program.outputs]
        self._touch(None, *self.outputs)
        self.output_grads: list[Slot] = []
        self.input_grads: list[Slot | None] = []
        if wants is not None:
            self._write_backward(wants)

    def _write_backward(self, wants: Wants) -> None:
        program = self.program
        self._now = self.backward
        self._group += 1
        self._needed = {v for v, want in zip(program.inputs, wants.inputs, strict=True) if want}
        for op in program.ops:
            if self._needed.intersection(op.reads) or any(map(self.takes, op.params())):
                self._needed.add(op.out)
        self.output_grads = [self.grad(value) for value in program.outputs]
        self._touch(None, *self.output_grads)
        for op in reversed(program.ops):
            if op.out in self._grads and op.out in self._needed:
                self._op = op
                op.backward(self)
        self.input_grads = [
            self._grads.get(value) if want else None
            for value, want in zip(program.inputs, wants.inputs, strict=True)
        ]
        self._touch(None, *(slot for slot in self.input_grads if slot is not None))

    # --- for operations ---------------------------------------------------------------------------

    @property
    def keeps(self) -> bool:
        """Whether there is a way back."""
        return self.wants is not None

    def is_kept(self, slot: Slot) -> bool:
        """Return whether a slot lives on from the way forward to the way back."""
        return slot.first <= len(self.forward) < slot.last

    def do(self, bind: Bind, *slots: Slot, alone: bool = False) -> None:
        """Append an instruction that uses these slots.

        The others go block by block; one that stands alone comes when all blocks are done.
        """
        self._group += alone
        self._now.append(Instruction(bind, alone, (self._op, self._now is self.backward)))
        self._touch(self._group, *slots)
        self._group += alone

    def value(self, value: Value) -> Slot:
        """Return the slot of a value."""
        if value not in self._values:
            self._values[value] = self.new(value, value.halo)
        return self._values[value]

    def value_again(self, value: Value) -> Slot:
        """Return the slot of a value on the way back: as it was kept, or made again just now."""
        maker = self._makers.get(value)
        if maker is None or value in self.program.outputs:
            return self.value(value)
        key = (value, self._group)
        if key not in self._again:
            reader, self._op = self._op, maker
            self._again[key] = maker.again(self)
            self._op = reader
        return self._again[key]

    def grad(self, value: Value) -> Slot:
        """Return the slot of a value's gradient."""
        if value not in self._grads:
            self._grads[value] = self.new(value, value.grad_halo)
        return self._grads[value]

    def new(self, value: Value, halo: int) -> Slot:
        """Return a new slot that can hold a value."""
        self.slots.append(Slot(value, halo))
        return self.slots[-1]

    def needs(self, value: Value) -> bool:
        """Return whether the gradient of a value is wanted."""
        return value in self._needed

    def takes(self, param: Tensor | None) -> bool:
        """Return whether a parameter takes a gradient."""
        return param is not None and self.wants is not None and id(param) in self.wants.params

    def has_grad(self, value: Value) -> bool:
        """Return whether something is in a value's gradient already."""
        return value in self._grads

    def give(self, slot: Slot, value: Value) -> None:
        """Add what a slot holds to the gradient of a value; the slot is not written any more."""
        if self.has_grad(value):
            total = self.grad(value)
            self.do(
                lambda f: f.backend.bind("add", f.buffer(total), f.buffer(slot), f.buffer(total)),
                total,
                slot,
            )
        elif slot.halo == value.grad_halo and slot not in self._grads.values():
            self._grads[value] = slot
        else:
            self.copy(slot, self.grad(value))

    def release(self, value: Value) -> Slot:
        """Return the slot of a gradient that is complete and that nobody else reads: its memory may
        go to the gradient of another value.
        """
        return self._grads.pop(value)

    def copy(self, source: Slot, target: Slot) -> None:
        """Append a copy from slot to slot."""

        def bind(f: Binder) -> Call:
            pixels, into = f.buffer(source).pixels(), f.buffer(target).pixels()
            return lambda: into.copy_(pixels)

        self.do(bind, source, target, alone=True)

    def _touch(self, group: int | None, *slots: Slot) -> None:
        now = len(self.forward)
        if self._now is self.backward:
            now += 1 + len(self.backward)
        for slot in slots:
            slot.groups.add(group)
            slot.first = now if slot.first < 0 else slot.first
            slot.last = now
