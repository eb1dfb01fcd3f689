"""A module as one program, from ``torch.export``."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from acdc.engine import native
from acdc.engine.arguments import Arguments, NoFixedArguments
from acdc.engine.host import own_forward
from acdc.engine.modes import why_not_kernels
from acdc.errors import InputError
from acdc.runtime.aten import HANDLERS
from acdc.runtime.checking import check_program
from acdc.runtime.exported import exchanged, export
from acdc.runtime.fusion import fuse
from acdc.runtime.handle import Handle, computing
from acdc.runtime.plan import Settings
from acdc.runtime.program import Program
from acdc.runtime.reading import Reader
from acdc.runtime.segment import compute, why_not
from acdc.runtime.views import Unknown

log = logging.getLogger(__name__)

LIMIT = 1e-3  # a program that differs by more of the largest number of a result is wrong


class Whole:
    """The forward of a module as one program.

    Args:
        name: Of the module.
        module: The module in evaluation mode.
        args, kwargs: What it is called with.

    Attributes:
        others: Computes calls that the program does not take, such as a text of another length.
            None: PyTorch does.

    Raises:
        Unknown: It is no program, for the reason that the message gives.

    """

    def __init__(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        if not native.available():
            raise Unknown("the compiled kernels are missing")
        self.name = name or type(module).__name__
        self.others: Callable[..., Any] | None = None
        self.plain: Callable[..., Any] = own_forward(module)
        self.signature = inspect.signature(module.forward)
        try:
            self.example = Arguments.of(self.signature, args, kwargs)
        except NoFixedArguments as error:
            raise Unknown(str(error)) from error
        if not self.example.tensors:
            raise Unknown("it is called without tensors")
        self._sizes = [_sizes(x) for x in self.example.tensors]
        exported = export(module, args, kwargs, self.example.tensors)
        reader = Reader(exported, _dtype(module, self.example), HANDLERS)
        reader.read()
        self.program, self.sources = reader.program, tuple(reader.sources)
        self.form = exported.program.call_spec.out_spec
        _finish(self.program, name)
        # What is returned twice is one tensor, as in PyTorch.
        self.returned = [self.program.outputs.index(n) for n in self.program.outputs]
        self._compare(args, kwargs)
        self._said: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module."""
        why = why_not_kernels(args, kwargs)
        if why is not None:
            return self._plainly(why, args, kwargs)
        try:
            arguments = Arguments.of(self.signature, args, kwargs)
        except NoFixedArguments as error:
            return self._plainly(str(error), args, kwargs)
        other = self._why_other(arguments)
        if other is None:
            try:
                return self._computed(arguments)
            except InputError as error:  # no plan for so many samples
                return self._plainly(str(error).removesuffix("."), args, kwargs)
        if self.others is None:
            return self._plainly(other, args, kwargs)
        self._say(f"{self.name} runs in parts: {other}.")
        return self.others(*args, **kwargs)

    def _plainly(self, why: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self._say(f"{self.name} runs in PyTorch: {why}.")
        return self.plain(*args, **kwargs)

    def _say(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            log.warning(sentence)

    def _why_other(self, arguments: Arguments) -> str | None:
        """Return why the program does not hold for these arguments, or None."""
        if arguments.key != self.example.key:
            return arguments.difference(self.example)
        tensors = arguments.tensors
        first = tensors[0].shape[:1]
        for x, was, sizes in zip(tensors, self.example.tensors, self._sizes, strict=True):
            of_samples = was.shape[:1] == self.example.tensors[0].shape[:1]
            if _sizes(x) != sizes or x.shape[:1] != (first if of_samples else was.shape[:1]):
                return (
                    f"a tensor has the sizes {tuple(x.shape)}, and the example's {tuple(was.shape)}"
                )
        return why_not([tensors[number] for number in self.sources], self.program)

    def _computed(self, arguments: Arguments) -> Any:
        results = compute(self.program, [arguments.tensors[n] for n in self.sources])
        return tree_unflatten([results[number] for number in self.returned], self.form)

    def _compare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Compare the program with PyTorch, for two numbers of samples."""
        handle = Handle(Settings(native.instruction_sets()[-1], 1))
        tensors = self.example.tensors
        first = tensors[0].shape[0]
        for samples in (first, 1 if first > 1 else 2):
            others = [_resized(x, first, samples) for x in tensors]
            with torch.no_grad(), computing(handle):
                some, named = exchanged((args, dict(kwargs)), tensors, others)
                wanted = tree_leaves(self.plain(*some, **named))
                got = tree_leaves(self._computed(Arguments.of(self.signature, some, named)))
            for a, b in zip(got, wanted, strict=True):
                if a.shape != b.shape or not _close(a, b):
                    raise Unknown("the program does not compute what PyTorch computes")


def _sizes(x: Tensor) -> tuple[Any, ...]:
    return (*x.shape[1:], x.dtype)


def _dtype(module: nn.Module, example: Arguments) -> torch.dtype:
    for tensor in (*example.tensors, *module.parameters()):
        if tensor.is_floating_point():
            if tensor.dtype not in (torch.float32, torch.float64):
                raise Unknown(f"the kernels take float32 and float64, and it is {tensor.dtype}")
            return tensor.dtype
    raise Unknown("it has no numbers")


def _finish(program: Program, name: str) -> None:
    """Fuse operations, drop those that nothing reads, and check the sizes."""
    for op in program.ops:
        op.name = f"{name}.{op.name}" if name else op.name
    _drop_unread(program)
    fuse(program)
    try:
        check_program(program)
    except InputError as error:
        raise Unknown(str(error)) from error


def _drop_unread(program: Program) -> None:
    read = set(program.outputs)
    kept = []
    for op in reversed(program.ops):
        if op.out in read:
            kept.append(op)
            read.update(op.reads)
    program.ops = kept[::-1]


def _resized(x: Tensor, samples: int, wanted: int) -> Tensor:
    """Return a tensor with another number of samples."""
    if not x.dim() or x.shape[0] != samples:
        return x
    return x[:wanted] if wanted < samples else torch.cat([x] * wanted)[:wanted]


def _close(got: Tensor, wanted: Tensor) -> bool:
    if not wanted.numel() or not bool(wanted.isfinite().all()):
        return True  # the example has no numbers to compare
    largest = max(float(wanted.abs().max()), 1e-30)
    return float((got - wanted).abs().max()) <= LIMIT * largest
