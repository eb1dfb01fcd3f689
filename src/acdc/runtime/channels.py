"""Channels that no kept weight writes or reads are removed from a program.

A channel without kept weights is a constant: the bias and the activation of its layer. Where the
layers that read the constant have no padding, or where it is zero, its contribution goes into their
biases. Then nothing reads the channel. A channel that nothing reads needs not be computed.

Sums, products, pooling, depthwise layers and concatenations compute channel by channel: a channel
of their result and the channels that it is made of are *tied*, and are removed together or not at
all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acdc.runtime.program import Activation, Conv, Gate, Join, Kept, Map, Op, Part, Pool, Program

_FUNCTIONS: dict[Activation, Callable[..., Any]] = {
    "nothing": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
}


def remove_channels(program: Program) -> None:
    """Remove channels, in place, and add those of layers to ``program.removed``."""
    _fold_constants(program)
    needed = _needed(program)
    _drop_unneeded(program, needed)
    kept = _kept_together(program, needed)
    program.removed += sum(int((~kept[layer.out]).sum()) for layer in program.convs)
    for op in program.ops:
        _narrow(op, kept)
    program.values = [
        replace(value, channels=int(mask.sum()))
        for value, mask in zip(program.values, kept, strict=True)
    ]


# --- constants ------------------------------------------------------------------------------------


def _fold_constants(program: Program) -> None:
    """Move what constant channels contribute to a layer into its bias.

    The operations are in order, so that a channel that becomes a constant is one for its readers.
    """
    unknown = torch.tensor(torch.nan, dtype=program.dtype)
    constants = [unknown.expand(value.channels) for value in program.values]
    for op in program.ops:
        if isinstance(op, Conv):
            _fold_into(op, constants[op.x])
        found = _constants_of(op, constants, program)
        if found is not None:
            constants[op.out] = torch.where(found.isfinite(), found, unknown)


def _fold_into(op: Conv, constants: Tensor) -> None:
    """Add what constant inputs contribute to the bias of a layer, and drop their weights."""
    if _is_grouped(op):
        return
    known = constants == 0
    if op.geometry.padding == (0, 0):
        known = constants.isfinite()
    folded = known[_in_channels(op)]
    if not bool(folded.any()):
        return
    values, channels = op.weight.values[folded], _out_channels(op)[folded]
    share = values.double() * constants.double()[_in_channels(op)[folded]]
    total = torch.zeros(op.geometry.out_channels, dtype=torch.float64)
    total.index_add_(0, channels, share)
    if op.bias is not None:
        total += op.bias
    if op.bias is not None or bool(total.any()):
        op.bias = total.to(op.weight.values.dtype)
    op.weight = Kept(op.weight.index[~folded], op.weight.values[~folded])


def _constants_of(op: Op, constants: list[Tensor], program: Program) -> Tensor | None:
    """Return what each channel of a result is if it is a constant, else NaN; None: none is one."""
    if isinstance(op, Conv):
        bias = op.bias
        if bias is None:
            bias = torch.zeros(op.geometry.out_channels, dtype=program.dtype)
        if op.residual is not None:
            bias = bias + constants[op.residual]
        written = _counts(_out_channels(op), op.geometry.out_channels) > 0
        return torch.where(written, torch.nan, _FUNCTIONS[op.activation](bias))
    if isinstance(op, Map):
        return _mapped(op, constants)
    if isinstance(op, Gate):
        return constants[op.x] * constants[op.gate]
    if isinstance(op, Pool):
        x = constants[op.x]
        pads_zeros = not op.maximum and op.count_padding and op.padding != (0, 0)
        return torch.where(x == 0, x, torch.nan) if pads_zeros else x
    if isinstance(op, Join) and op.table is None and op.covers(program.values[op.out]):
        return _joined(op, constants, program.values[op.out].channels)
    return None


def _mapped(op: Map, constants: list[Tensor]) -> Tensor:
    x = constants[op.x]
    if op.scale is not None:
        x = x * op.scale
    if op.offset is not None:
        x = x + op.offset
    if op.y is not None:
        y = constants[op.y]
        x = x * y if op.multiply else x + y
    result: Tensor = _FUNCTIONS[op.activation](x)
    return result


def _joined(op: Join, constants: list[Tensor], channels: int) -> Tensor:
    """Return the constants of channels all parts of which are the same constant."""
    low = torch.full((channels,), torch.inf, dtype=constants[op.x].dtype)
    high = -low
    for part in op.parts:
        given = constants[part.x][part.channel : part.channel + part.channels]
        rows = slice(part.to_channel, part.to_channel + part.channels)
        low[rows] = torch.minimum(low[rows], given)  # NaN if either is
        high[rows] = torch.maximum(high[rows], given)
    return torch.where(low == high, low, torch.nan)


# --- what is read ---------------------------------------------------------------------------------


def _needed(program: Program) -> list[Tensor]:
    """Return for each value which of its channels the outputs depend on."""
    needed = [torch.zeros(value.channels, dtype=torch.bool) for value in program.values]
    for number in program.outputs:
        needed[number][:] = True
    for op in reversed(program.ops):
        out = needed[op.out]
        if isinstance(op, Conv) and not _is_grouped(op):
            reads = _in_channels(op)[out[_out_channels(op)]]
            needed[op.x] |= _counts(reads, op.geometry.in_channels) > 0
            if op.residual is not None:
                needed[op.residual] |= out
        elif isinstance(op, Join):
            for part in op.parts:
                source = needed[part.x][part.channel : part.channel + part.channels]
                source |= out[part.to_channel : part.to_channel + part.channels]
        elif _is_by_channel(op):
            for number in op.reads:
                needed[number] |= out
        else:  # each channel of the result depends on several, or on all, of what is read
            for number in op.reads:
                needed[number][:] = True
    return needed


def _drop_unneeded(program: Program, needed: list[Tensor]) -> None:
    """Drop the weights of output channels that nothing reads: tied channels may have to stay."""
    for op in program.convs:
        stays = needed[op.out][_out_channels(op)]
        op.weight = Kept(op.weight.index[stays], op.weight.values[stays])


# --- channels that are removed together -----------------------------------------------------------


def _kept_together(program: Program, needed: list[Tensor]) -> list[Tensor]:
    """Return for each value which channels stay. Each value keeps at least one."""
    counts = [value.channels for value in program.values]
    first = [sum(counts[:number]) for number in range(len(counts))]
    label = _labels(sum(counts), list(_ties(program, first)))
    stays = torch.cat(needed) if needed else torch.zeros(0, dtype=torch.bool)
    for number in _fixed(program):
        stays[first[number] : first[number] + counts[number]] = True
    while True:
        staying = torch.zeros(len(stays), dtype=torch.int8)
        staying.scatter_reduce_(0, label, stays.to(torch.int8), "amax")
        stays = staying.bool()[label]
        kept = list(stays.split(counts))
        empty = [number for number, mask in enumerate(kept) if not bool(mask.any())]
        if not empty:
            return kept
        stays[[first[number] for number in empty]] = True


def _ties(program: Program, first: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs of channels that are removed together, counted over all values."""

    def channels(number: int, start: int = 0, count: int | None = None) -> Tensor:
        count = program.values[number].channels if count is None else count
        return torch.arange(first[number] + start, first[number] + start + count)

    for op in program.ops:
        if isinstance(op, Join):
            for part in op.parts:
                yield (
                    channels(op.out, part.to_channel, part.channels),
                    channels(part.x, part.channel, part.channels),
                )
        elif _is_by_channel(op):
            for number in op.reads:
                yield channels(op.out), channels(number)
        elif isinstance(op, Conv) and op.residual is not None:
            yield channels(op.out), channels(op.residual)


def _labels(count: int, ties: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return a number for each channel, the same for those that are tied, directly or not."""
    label = torch.arange(count)
    if not ties:
        return label
    one, other = (torch.cat(side) for side in zip(*ties, strict=True))
    while True:
        least = torch.minimum(label[one], label[other])
        spread = label.scatter_reduce(0, one, least, "amin").scatter_reduce(0, other, least, "amin")
        spread = spread[spread]  # a label is a channel, which may have found a lesser one
        if torch.equal(spread, label):
            return label
        label = spread


def _fixed(program: Program) -> set[int]:
    """Return the values that keep all of their channels."""
    fixed = {*program.inputs, *program.outputs}
    for op in program.ops:
        if isinstance(op, Conv):
            if _is_grouped(op):
                fixed.update((op.x, op.out))
        elif not isinstance(op, Join) and not _is_by_channel(op):
            fixed.update((op.out, *op.reads))
    return fixed


def _is_by_channel(op: Op) -> bool:
    """Whether each channel of the result depends on the same channel of what is read."""
    return isinstance(op, Map | Gate | Pool) or (isinstance(op, Conv) and _is_depthwise(op))


def _is_depthwise(op: Conv) -> bool:
    g = op.geometry
    return 1 < g.groups == g.in_channels == g.out_channels


def _is_grouped(op: Conv) -> bool:
    return op.geometry.groups > 1 and not _is_depthwise(op)


# --- operations with fewer channels ---------------------------------------------------------------


def _narrow(op: Op, kept: list[Tensor]) -> None:
    """Let an operation compute the channels that stay."""
    out = kept[op.out]
    if isinstance(op, Conv):
        _narrow_layer(op, kept[op.x], out)
    elif isinstance(op, Map):
        op.scale = None if op.scale is None else op.scale[out]
        op.offset = None if op.offset is None else op.offset[out]
    elif isinstance(op, Join):
        op.parts = tuple(_narrowed(op.parts, kept, out))
        op.x = op.parts[0].x
        op.table = None if op.table is None else op.table[out].contiguous()


def _narrow_layer(op: Conv, inputs: Tensor, outputs: Tensor) -> None:
    if bool(inputs.all()) and bool(outputs.all()):
        return
    depthwise, taps = _is_depthwise(op), _taps(op)
    tap = op.weight.index.long() % taps
    channel, filters = _in_channels(op), _out_channels(op)
    stays = inputs[channel] & outputs[filters]
    count_in, count_out = int(inputs.sum()), int(outputs.sum())
    row = (outputs.cumsum(0) - 1)[filters]
    if not depthwise:
        row = row * count_in + (inputs.cumsum(0) - 1)[channel]
    index = (row * taps + tap)[stays].to(torch.int32)
    op.weight = Kept(index, op.weight.values[stays])
    op.bias = None if op.bias is None else op.bias[outputs]
    groups = count_out if depthwise else op.geometry.groups
    op.geometry = replace(op.geometry, in_channels=count_in, out_channels=count_out, groups=groups)


def _narrowed(parts: tuple[Part, ...], kept: list[Tensor], out: Tensor) -> Iterator[Part]:
    for part in parts:
        given = kept[part.x]
        count = int(given[part.channel : part.channel + part.channels].sum())
        if count:
            channel, to = int(given[: part.channel].sum()), int(out[: part.to_channel].sum())
            yield replace(part, channel=channel, to_channel=to, channels=count)


# --- the weights of a layer -----------------------------------------------------------------------


def _counts(channels: Tensor, count: int) -> Tensor:
    return torch.bincount(channels, minlength=count)


def _taps(op: Conv) -> int:
    return op.geometry.kernel[0] * op.geometry.kernel[1]


def _out_channels(op: Conv) -> Tensor:
    """Return the output channel of each kept weight."""
    per_filter = _taps(op) * op.geometry.in_channels // op.geometry.groups
    return op.weight.index.long() // per_filter


def _in_channels(op: Conv) -> Tensor:
    """Return the input channel of each kept weight, but for grouped layers."""
    if _is_depthwise(op):
        return _out_channels(op)
    return op.weight.index.long() // _taps(op) % op.geometry.in_channels
