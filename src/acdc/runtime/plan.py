"""A program for one number of samples: index lists, memory, and one sequence of calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acdc.engine.native import NativeCall
from acdc.errors import InputError
from acdc.runtime.calls import Calls, direct, sequence
from acdc.runtime.lists import Cut, SharedLists, instruction_set_for, is_dense
from acdc.runtime.placing import Steps, grids_of, place, steps_of
from acdc.runtime.points import Buffer
from acdc.runtime.program import (
    Attention,
    Conv,
    Embed,
    Gate,
    Join,
    Map,
    Norm,
    Op,
    Planes,
    Pool,
    Program,
    Value,
)


def plain_shape(samples: int, value: Value) -> tuple[int, ...]:
    """Return the shape of the plain tensor of so many samples, or tokens, of a value."""
    if value.is_sequence:
        return samples, value.width, value.channels
    if value.tokens:
        return samples, value.channels
    return samples, value.channels, value.height, value.width


@dataclass(frozen=True)
class Settings:
    """How plans compute.

    Args:
        isa: The widest instruction set.
        threads: The number of threads.

    """

    isa: str
    threads: int


@dataclass(frozen=True)
class Layer:
    """A layer of a plan.

    Args:
        op: The layer.
        isa: Its instruction set.
        cut: How it is cut into items of work. None: its weight is read as a matrix.
        bytes: The memory of its index list or matrix.

    """

    op: Conv
    isa: str
    cut: Cut | None
    bytes: int


class Plan:
    """A program for one number of samples.

    Args:
        program: The program.
        samples: How many samples, or tokens.
        settings: How it computes.
        lists: Where plans find the index lists of other plans.

    Attributes:
        bytes: The memory of its buffers.
        layers: Its layers.
        steps: Its operations and their calls.

    """

    def __init__(
        self, program: Program, samples: int, settings: Settings, lists: SharedLists
    ) -> None:
        self.program, self.samples, self.settings = program, samples, settings
        self._lists = lists
        self._calls = Calls(settings.isa, program.dtype, settings.threads)
        steps = steps_of(program)
        grids = grids_of(steps, samples)
        self._buffers, self.bytes = place(
            steps, grids, program.inputs, program.outputs, program.dtype
        )
        self.layers: list[Layer] = []
        self._loads = [self._copy("points_load", number) for number in program.inputs]
        self._stores = [self._copy("points_store", number) for number in program.outputs]
        self.steps = [(op, self._call(op, steps)) for op in steps.ops]
        self._every = [*self._loads, *(call for _, call in self.steps), *self._stores]
        self._threads = settings.threads
        self._run = sequence(self._every)

    def __call__(
        self, inputs: Sequence[Tensor], threads: int, seconds: Tensor | None = None
    ) -> list[Tensor]:
        """Compute the program.

        Args:
            inputs: ``[samples, C, H, W]``, ``[tokens, C]`` or ``[samples, tokens, C]`` tensors of
                the program's dtype.
            threads: How many threads compute, at most as many as the settings say.
            seconds: Float64 ``[2, calls]``. The time of each call is added to the first row.

        Returns:
            New tensors of such shapes.

        """
        if threads != self._threads:
            self._threads = threads
            for call in self._every:
                call.args.threads = threads
        for call, plain in zip(self._loads, inputs, strict=True):
            direct(call, plain)
        results = [
            torch.empty(
                plain_shape(self.samples, self.program.values[number]), dtype=self.program.dtype
            )
            for number in self.program.outputs
        ]
        for call, plain in zip(self._stores, results, strict=True):
            direct(call, plain)
        self._run(seconds)
        return results

    def seconds(self, threads: int) -> list[float]:
        """Return the seconds of each step of one run. All inputs are ones."""
        values = [self.program.values[number] for number in self.program.inputs]
        inputs = [
            torch.ones(plain_shape(self.samples, value), dtype=self.program.dtype)
            for value in values
        ]
        seconds = torch.zeros(2, len(self._every), dtype=torch.float64)
        self(inputs, threads, seconds)
        first = len(self._loads)
        return [float(s) for s in seconds[0, first : first + len(self.steps)]]

    def _copy(self, kernel: str, number: int) -> NativeCall:
        return self._calls.copy(kernel, self._buffers[number])

    def _call(self, op: Op, steps: Steps) -> NativeCall:
        buffers = self._buffers
        x, out = buffers[op.x], buffers[op.out]
        if isinstance(op, Conv):
            return self._conv(op, buffers[steps.sources[op]], out, steps)
        if isinstance(op, Planes):
            return self._calls.planes(op, x, out)
        if isinstance(op, Map):
            return self._calls.map(op, x, None if op.y is None else buffers[op.y], out)
        if isinstance(op, Gate):
            return self._calls.gate(op, x, buffers[op.gate], out)
        if isinstance(op, Norm):
            return self._calls.norm(op, x, out)
        if isinstance(op, Pool):
            return self._calls.pool(op, x, out)
        if isinstance(op, Join):
            return self._calls.join(op, buffers, out)
        if isinstance(op, Embed):
            return self._calls.embed(op, x, out)
        assert isinstance(op, Attention)
        return self._calls.attention(op, buffers, out)

    def _conv(self, op: Conv, x: Buffer, out: Buffer, steps: Steps) -> NativeCall:
        taps, isa = steps.taps[op], instruction_set_for(out.grid.count, self.settings.isa)
        residual = None if op.residual is None else self._buffers[op.residual]
        if is_dense(op, out.grid, taps):
            weight = self._lists.matrix(op)
            self.layers.append(Layer(op, self._calls.isa, None, weight.nbytes))
            return self._calls.dense(op, weight, x, out, residual)
        calls = Calls(isa, self.program.dtype, self.settings.threads)
        cut = Cut.rule(
            op, out.grid, taps, calls.lanes, self.settings.threads, self.program.dtype.itemsize
        )
        entries = self._lists.get(op, x.grid, taps, cut)
        if entries is None:
            raise InputError(
                f"{op.name} is too large for {self.samples} samples at once: its buffers do not "
                "fit into 32-bit offsets. Give fewer samples or smaller images."
            )
        self.layers.append(Layer(op, isa, cut, entries.bytes))
        return calls.conv(op, entries, cut, x, out, residual)
