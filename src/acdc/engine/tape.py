"""The operations of a segment written out as instructions, forward and backward, on shared buffers.

A *tape* is the list of instructions that the operations write, and the *slots* that the
instructions use. A slot stands for a buffer, and is alive from its first to its last instruction. A
frame (``acdc.engine.memory``) gives memory to the slots and binds the instructions to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from acdc.engine.contract import Call, KernelPlan, Kernels, WeightGradCall
from acdc.engine.graph import ConvSpec
from acdc.engine.layout import Buffer, Shape

T = TypeVar("T")


@dataclass(eq=False)
class Value:
    """A tensor between two operations, without its batch size.

    Args:
        channels, height, width, tokens, dtype: As in ``acdc.engine.layout.Shape``.
        halo: The halo that its readers need.
        grad_halo: The halo that its maker needs of its gradient.

    """

    channels: int
    height: int
    width: int
    tokens: bool
    dtype: torch.dtype
    halo: int = 0
    grad_halo: int = 0

    def shape(self, samples: int, lanes: int, halo: int) -> Shape:
        """Return the shape of a buffer for it."""
        return Shape(
            samples, self.channels, self.height, self.width, lanes, halo, self.tokens, self.dtype
        )


class Op(ABC):
    """An operation. It writes its forward and its backward pass onto a tape."""

    out: Value

    @property
    @abstractmethod
    def reads(self) -> tuple[Value, ...]:
        """The inputs."""

    def params(self) -> tuple[Tensor, ...]:
        """Return the parameters that may take a gradient."""
        return ()

    def read_by_address(self) -> tuple[Tensor | None, ...]:
        """Return the tensors that bound calls point into."""
        return ()

    def read_again(self) -> tuple[Tensor | None, ...]:
        """Return the parameters that the backward pass reads again."""
        return ()

    def settings(self) -> Hashable:
        """Return the settings of the module that instructions are bound with."""
        return None

    @abstractmethod
    def forward(self, tape: Tape) -> None:
        """Append the instructions that compute ``out``."""

    def recompute(self, tape: Tape) -> Slot:
        """Return the slot of ``out`` for the backward pass.

        An operation may compute ``out`` a second time, where that costs less than to keep it.
        """
        return tape.value(self.out)

    @abstractmethod
    def backward(self, tape: Tape) -> None:
        """Append the instructions that turn the gradient of ``out`` into those of the inputs."""


@dataclass(eq=False)
class Slot:
    """A buffer that a tape asks for.

    Args:
        value: What it holds.
        halo: Its halo.
        first, last: Its first and its last instruction, counted over the whole tape. The boundary
            between the forward and the backward pass counts as one.
        groups: The groups of instructions that use it. None stands for the ends of the tape.

    """

    value: Value
    halo: int
    first: int = -1
    last: int = -1
    groups: set[int | None] = field(default_factory=set)

    @property
    def is_transient(self) -> bool:
        """Whether a single group uses it. Going block by block, one block per thread is enough."""
        return len(self.groups) == 1 and None not in self.groups


class Binder(Protocol):
    """What an instruction is bound to: the kernels, and memory for every slot.

    Attributes:
        backend: The kernels.
        memory_format: How the first input of this call lies in memory.
        results: The gradients of parameters, by the id of the parameter.
        before: What runs before the forward pass.
        after: What runs after the backward pass.
        targets: The calls of weight gradients, each with its layer.

    """

    backend: Kernels
    memory_format: torch.memory_format
    results: dict[int, Tensor]
    before: list[Around]
    after: list[Around]
    targets: list[tuple[WeightGradCall, ConvSpec]]

    def buffer(self, slot: Slot) -> Buffer:
        """Return the memory of a slot."""

    def plan(self, op: Op) -> KernelPlan:
        """Return the index lists of a layer."""

    def once(self, key: object, make: Callable[[], T]) -> T:
        """Return what ``make`` returned for this key the first time."""


Bind = Callable[[Binder], Call]

Around = Callable[[Binder], object]
"""What runs before or after a pass, with the frame as its argument.

A function that held its frame would be a cycle, and the buffers would live until Python collects
garbage.
"""


@dataclass(frozen=True)
class Origin:
    """The operation that an instruction is a part of, and whether it is in the backward pass."""

    op: Op
    backward: bool


@dataclass(frozen=True)
class Instruction:
    """A call that is not bound to memory yet.

    Args:
        bind: Binds it.
        alone: It needs the results of all blocks.
        origin: What it is a part of.

    """

    bind: Bind
    alone: bool
    origin: Origin


@dataclass(frozen=True)
class GradientRequest:
    """The gradients that a backward pass computes: of these parameters, by id, and inputs."""

    params: frozenset[int]
    inputs: tuple[bool, ...]


class Tape:
    """The instructions of a segment, and the slots that they use.

    Args:
        ops: The operations in order.
        inputs, outputs: The values at both ends.
        request: What the backward pass computes. None if there is no backward pass; then nothing is
            kept for it.
        last: Whether each output has its channels last in the memory of PyTorch. The default is
            that it lies as the first input does.

    """

    def __init__(
        self,
        ops: Sequence[Op],
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        request: GradientRequest | None,
        last: Sequence[bool] = (),
    ) -> None:
        self.request, self.last = request, last or (False,) * len(outputs)
        self.forward: list[Instruction] = []
        self.backward: list[Instruction] = []
        self.slots: list[Slot] = []
        self._now = self.forward  # the list that `do` appends to
        self._values: dict[Value, Slot] = {}
        self._grads: dict[Value, Slot] = {}
        self._needed: set[Value] = set()
        self._group = 0  # the number of the group between two instructions that stand alone
        self._recomputable = {op.out: op for op in ops if op.out not in outputs}
        self._recomputed: dict[tuple[Value, int], Slot] = {}

        self.inputs = [self.value(value) for value in inputs]
        self._touch(None, *self.inputs)
        for op in ops:
            op.forward(self)
        self.outputs = [self.value(value) for value in outputs]
        self._touch(None, *self.outputs)
        self.output_grads: list[Slot] = []
        self.input_grads: list[Slot | None] = []
        if request is not None:
            self._write_backward(ops, inputs, outputs, request)

    def _write_backward(
        self,
        ops: Sequence[Op],
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        request: GradientRequest,
    ) -> None:
        self._now = self.backward
        self._group += 1
        self._needed = {v for v, asked in zip(inputs, request.inputs, strict=True) if asked}
        for op in ops:
            if self._needed.intersection(op.reads) or any(map(self.takes, op.params())):
                self._needed.add(op.out)
        self.output_grads = [self.grad(value) for value in outputs]
        self._touch(None, *self.output_grads)
        for op in reversed(ops):
            if op.out in self._grads and op.out in self._needed:
                op.backward(self)
        self.input_grads = [
            self._grads.get(value) if asked else None
            for value, asked in zip(inputs, request.inputs, strict=True)
        ]
        self._touch(None, *(slot for slot in self.input_grads if slot is not None))

    # --- for operations ---------------------------------------------------------------------------

    @property
    def has_backward(self) -> bool:
        """Whether there is a backward pass."""
        return self.request is not None

    def is_kept(self, slot: Slot) -> bool:
        """Return whether a slot must survive from the forward to the backward pass."""
        return slot.first <= len(self.forward) < slot.last

    def do(self, op: Op, bind: Bind, *slots: Slot, alone: bool = False) -> None:
        """Append an instruction of this operation that uses these slots.

        An instruction that stands alone runs when all blocks are done. The others may run block by
        block.
        """
        self._group += alone
        self._now.append(Instruction(bind, alone, Origin(op, self._now is self.backward)))
        self._touch(self._group, *slots)
        self._group += alone

    def value(self, value: Value) -> Slot:
        """Return the slot of a value."""
        if value not in self._values:
            self._values[value] = self.new(value, value.halo)
        return self._values[value]

    def filled_before(self, value: Value) -> Slot:
        """Return the slot of a value that is written before the first instruction."""
        slot = self.value(value)
        slot.first = 0
        slot.groups.add(None)
        return slot

    def value_in_backward(self, value: Value) -> Slot:
        """Return the slot of a value in the backward pass: kept, or recomputed in this group."""
        maker = self._recomputable.get(value)
        if maker is None:
            return self.value(value)
        key = (value, self._group)
        if key not in self._recomputed:
            self._recomputed[key] = maker.recompute(self)
        return self._recomputed[key]

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
        """Return whether the gradient of a value is needed."""
        return value in self._needed

    def takes(self, param: Tensor | None) -> bool:
        """Return whether a parameter takes a gradient."""
        return param is not None and self.request is not None and id(param) in self.request.params

    def has_grad(self, value: Value) -> bool:
        """Return whether a value's gradient has a share already."""
        return value in self._grads

    def give(self, op: Op, slot: Slot, value: Value) -> None:
        """Add the contents of a slot to the gradient of a value. The slot must not change later."""
        if self.has_grad(value):
            total = self.grad(value)
            self.do(
                op,
                lambda f: f.backend.bind(
                    f.backend.pointwise, "add", f.buffer(total), f.buffer(slot), out=f.buffer(total)
                ),
                total,
                slot,
            )
        elif slot.halo == value.grad_halo and slot not in self._grads.values():
            self._grads[value] = slot
        else:
            self.copy(op, slot, self.grad(value))

    def release(self, value: Value) -> Slot:
        """Return the slot of a complete gradient that nothing else reads.

        Its memory may become the gradient of another value.
        """
        return self._grads.pop(value)

    def copy(self, op: Op, source: Slot, target: Slot) -> None:
        """Append a copy from slot to slot."""
        self.do(
            op,
            lambda f: f.backend.bind(
                f.backend.pointwise, "copy", f.buffer(source), out=f.buffer(target)
            ),
            source,
            target,
        )

    def _touch(self, group: int | None, *slots: Slot) -> None:
        now = len(self.forward)
        if self._now is self.backward:
            now += 1 + len(self.backward)
        for slot in slots:
            slot.groups.add(group)
            slot.first = now if slot.first < 0 else slot.first
            slot.last = now
