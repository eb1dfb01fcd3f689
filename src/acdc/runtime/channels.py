"""Channels that no kept weight writes or reads are removed from a program.

A channel without kept weights is a constant: the bias and the activation of its layer. Where all
readers have no padding, or where the constant is zero, its contribution goes into their biases. A
channel that nothing reads needs not be computed. Removing one may leave others without weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acdc.runtime.program import Activation, Conv, Kept, Program

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
    """Remove channels between two layers, in place, and count them in ``program.removed``."""
    found = 1
    while found:
        found = sum(_remove_from(program, number) for number in range(len(program.values)))
        program.removed += found


def _remove_from(program: Program, number: int) -> int:
    """Remove channels of one value, and return how many."""
    layers = _layers_around(program, number)
    if layers is None:
        return 0
    maker, readers = layers
    written = _counts(_out_channels(maker), maker.geometry.out_channels) > 0
    read = torch.zeros_like(written)
    for reader in readers:
        read |= _counts(_in_channels(reader), reader.geometry.in_channels) > 0
    constant = _constants(maker)
    unpadded = all(reader.geometry.padding == (0, 0) for reader in readers)
    known = ~written & constant.isfinite() & ((constant == 0) | unpadded)
    gone = known | ~read
    if bool(gone.all()):
        gone[0] = False  # a layer has at least one channel
    if not bool(gone.any()):
        return 0
    for reader in readers:
        _add_constants(reader, torch.where(gone & read, constant, 0))
        _keep_inputs(reader, ~gone)
    _keep_outputs(maker, ~gone)
    program.values[number] = replace(program.values[number], channels=int((~gone).sum()))
    return int(gone.sum())


def _layers_around(program: Program, number: int) -> tuple[Conv, list[Conv]] | None:
    """Return the layer that makes a value and those that read it, or None if others do."""
    makers = [op for op in program.ops if op.out == number]
    readers = [op for op in program.ops if number in op.reads]
    if number in program.outputs or len(makers) != 1 or not readers:
        return None
    maker = makers[0]
    if not isinstance(maker, Conv) or maker.residual is not None or maker.geometry.groups > 1:
        return None
    layers = []
    for op in readers:
        if not isinstance(op, Conv) or op.residual == number or op.geometry.groups > 1:
            return None
        layers.append(op)
    return maker, layers


def _counts(channels: Tensor, count: int) -> Tensor:
    return torch.bincount(channels, minlength=count)


def _taps(op: Conv) -> int:
    return op.geometry.kernel[0] * op.geometry.kernel[1]


def _out_channels(op: Conv) -> Tensor:
    return op.weight.index.long() // (_taps(op) * op.geometry.in_channels)


def _in_channels(op: Conv) -> Tensor:
    return op.weight.index.long() // _taps(op) % op.geometry.in_channels


def _constants(op: Conv) -> Tensor:
    """Return what each channel of a layer is, if it has no weights."""
    bias = op.bias
    if bias is None:
        bias = torch.zeros(op.geometry.out_channels, dtype=op.weight.values.dtype)
    constants: Tensor = _FUNCTIONS[op.activation](bias)
    return constants


def _add_constants(op: Conv, constants: Tensor) -> None:
    """Add to the bias what constant input channels contribute."""
    share = op.weight.values.double() * constants.double()[_in_channels(op)]
    total = torch.zeros(op.geometry.out_channels, dtype=torch.float64)
    total.index_add_(0, _out_channels(op), share)
    if op.bias is not None:
        total += op.bias
    if op.bias is not None or bool(total.any()):
        op.bias = total.to(op.weight.values.dtype)


def _keep_inputs(op: Conv, kept: Tensor) -> None:
    """Keep these input channels of a layer."""
    index, taps = op.weight.index.long(), _taps(op)
    channel = _in_channels(op)
    stays, count = kept[channel], int(kept.sum())
    number_of = kept.cumsum(0) - 1
    moved = (_out_channels(op) * count + number_of[channel]) * taps + index % taps
    op.weight = Kept(moved[stays].to(torch.int32), op.weight.values[stays])
    op.geometry = replace(op.geometry, in_channels=count)


def _keep_outputs(op: Conv, kept: Tensor) -> None:
    """Keep these output channels of a layer."""
    filters = _taps(op) * op.geometry.in_channels
    channel = _out_channels(op)
    stays = kept[channel]
    moved = (kept.cumsum(0) - 1)[channel] * filters + op.weight.index.long() % filters
    op.weight = Kept(moved[stays].to(torch.int32), op.weight.values[stays])
    op.bias = None if op.bias is None else op.bias[kept]
    op.geometry = replace(op.geometry, out_channels=int(kept.sum()))
