"""A segment of a traced network, as a module that the graph calls."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from acdc.engine.graph import Kind
from acdc.errors import InputError
from acdc.runtime.handle import current
from acdc.runtime.program import Embed, Program, Value

log = logging.getLogger(__name__)


class Segment(nn.Module):
    """Nodes of a graph that the kernels compute.

    Args:
        plain: The same nodes in PyTorch.
        program: The nodes as operations.
        sources: For each input of the program: the number of an argument, and how it is read.

    """

    def __init__(
        self, plain: fx.GraphModule, program: Program, sources: Sequence[tuple[int, Kind]]
    ) -> None:
        super().__init__()
        self.program, self.sources = program, tuple(sources)
        self._plain = (plain,)  # in a tuple: its layers are not those of the network twice
        self._returns_one = isinstance(plain.graph.output_node().args[0], fx.Node)
        self._said: set[str] = set()

    def forward(self, *args: Tensor) -> Any:
        """Compute the nodes."""
        given = [args[number] for number, _ in self.sources]
        why = why_not(given, self.program)
        if why is None:
            try:
                results = compute(self.program, given)
                return results[0] if self._returns_one else tuple(results)
            except InputError as error:  # no plan for so large images or so many samples
                why = str(error).removesuffix(".")
        if why not in self._said:
            self._said.add(why)
            log.warning("A part of the network runs in PyTorch: %s.", why)
        return self._plain[0](*args)


def compute(program: Program, given: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs of a program in the memory of the present handle.

    Args:
        program: The program.
        given: Its inputs, which :func:`why_not` has nothing against.

    """
    values = _inputs_of(program)
    flat = [_flat(x, v, program.dtype) for x, v in zip(given, values, strict=True)]
    results = current().compute(program, flat)
    lead = lead_of(given[0].shape, values[0])
    for i, number in enumerate(program.outputs):
        value = program.values[number]
        if value.tokens and not value.is_sequence:
            results[i] = results[i].reshape(*lead, value.channels)
    return results


INTEGERS = (torch.int64, torch.int32, torch.bool)


def why_not(given: Sequence[Tensor], program: Program) -> str | None:
    """Return why the kernels cannot take these tensors, or None."""
    values = _inputs_of(program)
    for x, value in zip(given, values, strict=True):
        if value.integers:
            if x.dtype not in INTEGERS:
                return f"a tensor is {x.dtype}, and the example's holds integers"
        elif x.dtype != program.dtype:
            return f"a tensor is {x.dtype}, and the example's is {program.dtype}"
        if x.device.type != "cpu" or x.layout != torch.strided:
            return "a tensor is not an ordinary one on the CPU"
        sizes, wanted = _sizes(x, value)
        if sizes != wanted:
            return f"a tensor has the sizes {sizes}, and the example's has {wanted}"
    if len({lead_of(x.shape, value) for x, value in zip(given, values, strict=True)}) > 1:
        return "tensors have different numbers of samples"
    return _why_no_rows(given, program)


def _sizes(x: Tensor, value: Value) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sizes of a tensor that are fixed, and what they must be."""
    if value.integers:
        return tuple(x.shape[1:]), (value.width,)
    if value.is_sequence:
        return tuple(x.shape[1:]), (value.width, value.channels)
    if value.tokens:
        return tuple(x.shape[-1:]), (value.channels,)
    return tuple(x.shape[1:]), (value.channels, value.height, value.width)


def _why_no_rows(given: Sequence[Tensor], program: Program) -> str | None:
    """Return why integers are no numbers of rows of their table, or None."""
    of_input = dict(zip(program.inputs, given, strict=True))
    for op in program.ops:
        if isinstance(op, Embed) and (x := of_input[op.x]).numel():
            low, high = int(x.min()), int(x.max())
            if low < 0 or high >= op.table.shape[0]:
                return f"a tensor holds {low} to {high}, and a table has {op.table.shape[0]} rows"
    return None


def _inputs_of(program: Program) -> list[Value]:
    return [program.values[number] for number in program.inputs]


def lead_of(shape: Sequence[int], value: Value) -> tuple[int, ...]:
    """Return the sizes of a tensor that count samples or tokens."""
    one_token = value.tokens and not value.is_sequence and not value.integers
    return tuple(shape[:-1] if one_token else shape[:1])


def _flat(x: Tensor, value: Value, dtype: torch.dtype) -> Tensor:
    """Return ``[tokens, C]``, ``[N, tokens, C]`` or ``[N, C, H, W]``."""
    x = x.detach().resolve_neg()  # the kernels read memory, and a lazy sign is not in memory
    if value.integers:
        x = x.to(dtype).unsqueeze(-1)
    one_token = value.tokens and not value.is_sequence
    return x.reshape(-1, value.channels) if one_token else x
