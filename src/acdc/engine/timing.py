"""How long one layer takes, dense and sparse, and how long the conversions at its ends take.

Equal layers are timed once, on a part of the batch. They are timed on the whole batch, and several
times, only where neither dense nor sparse is clearly faster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from acdc.engine.contract import KernelPlan, Kernels
from acdc.engine.graph import ConvSpec
from acdc.engine.layout import Buffer
from acdc.engine.tape import Value

REPEATS = 3  # after one to warm up; the fastest counts, as nothing makes a computation too fast
PART = 2  # blocks of the batch that are timed first
CLEAR = 1.5  # with this ratio of dense to sparse, one timing of a part of the batch is enough
FEW = 16  # random samples that are drawn
NEAR = 1.1  # densities within this factor take equally long


@dataclass(frozen=True)
class Candidate:
    """A layer that may run sparse, with what a timing needs.

    Args:
        name: Of the module in the network.
        spec: The layer.
        x, out: Its input and its output.
        samples: The batch size.

    """

    name: str
    spec: ConvSpec
    x: Value
    out: Value
    samples: int


@dataclass(frozen=True)
class Timed:
    """The timings of a computation so far.

    Args:
        ms: The shortest time.
        repeats: How many times it was timed.

    """

    ms: float = math.inf
    repeats: int = 0


Timings = dict[Hashable, Timed]
"""The timings so far, by everything that a computation's time depends on."""


@dataclass(frozen=True)
class LayerTimes:
    """The times of a layer for the whole batch, forward and backward.

    Args:
        dense_ms: PyTorch, in milliseconds.
        sparse_ms: The kernels, in the layout.
        convert_ms: The conversions of its input and its output to the layout and back.

    """

    dense_ms: float
    sparse_ms: float
    convert_ms: float


def time_layer(
    layer: Candidate, plan: KernelPlan, backend: Kernels, density: float, known: Timings
) -> LayerTimes:
    """Time one layer, dense and sparse.

    Args:
        layer: The layer.
        plan: Its index lists.
        backend: The kernels.
        density: The share of kept weights.
        known: The timings so far; new ones are added.

    """
    per_block = layer.x.shape(layer.samples, backend.lanes, layer.x.halo).per_block
    few = min(layer.samples, PART * per_block)
    times = _times(replace(layer, samples=few), plan, backend, density, known, 1)
    dense, sparse, convert = (layer.samples / few * ms for ms in times)
    if max(dense, sparse) < CLEAR * min(dense, sparse):
        dense, sparse, convert = _times(layer, plan, backend, density, known, REPEATS)
    return LayerTimes(dense, sparse, convert)


def _times(
    layer: Candidate,
    plan: KernelPlan,
    backend: Kernels,
    density: float,
    known: Timings,
    repeats: int,
) -> tuple[float, float, float]:
    """Return milliseconds dense, sparse, and for conversions."""
    weight = layer.spec.by_output(layer.spec.weight)
    place = (layer.x.tokens, layer.x.height, layer.x.width)
    equal = (layer.spec.geometry, layer.samples, *place, *weight.stride())
    about = round(math.log(density, NEAR)) if density else None
    makers = {
        ("dense", *equal): partial(_dense, layer),
        ("sparse", about, *equal): partial(_sparse, layer, plan, backend),
        ("convert", *equal): partial(_conversions, layer, backend),
    }
    dense, sparse, convert = (_best_of(repeats, known, key, make) for key, make in makers.items())
    return dense, sparse, convert


def conversion_ms(value: Value, samples: int, backend: Kernels, known: Timings) -> float:
    """Return the milliseconds of one conversion to the layout and back; ``known`` is added to."""

    def make() -> Callable[[], object]:
        buffer = Buffer.zeros(value.shape(samples, backend.lanes, value.halo))
        plain = _random(value, samples)

        def both() -> None:
            backend.to_layout(plain, buffer)
            backend.from_layout(buffer, plain)

        return both

    key = (value.shape(samples, backend.lanes, value.halo), "both")
    return _best_of(REPEATS, known, key, make)


def _best_of(
    repeats: int, known: Timings, key: Hashable, make: Callable[[], Callable[[], object]]
) -> float:
    """Return the shortest of so many times in milliseconds. Known timings count."""
    so_far = known.get(key, Timed())
    if so_far.repeats < repeats:
        more = best_ms(make(), repeats - so_far.repeats)
        known[key] = Timed(min(so_far.ms, more), repeats)
    return known[key].ms


def best_ms(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the shortest time of a call in milliseconds."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times) * 1e3


# --- the timed computations -----------------------------------------------------------------------


def _random(value: Value, samples: int) -> Tensor:
    """Return a few random samples, repeated: a kernel's time does not depend on their values."""
    shape: tuple[int, ...] = (min(samples, FEW), value.channels)
    if not value.tokens:
        shape = (*shape, value.height, value.width)
    # A generator of its own: timing must not change the user's random numbers.
    generator = torch.Generator("cpu").manual_seed(0)
    few = torch.randn(shape, generator=generator, dtype=value.dtype, device="cpu")
    times = -(-samples // FEW)
    return few if times == 1 else torch.cat([few] * times)[:samples]


def _dense(layer: Candidate) -> Callable[[], object]:
    """Return the layer in PyTorch with all its gradients, in the memory format of its weight."""
    x, grad = _random(layer.x, layer.samples), _random(layer.out, layer.samples)
    weight = layer.spec.by_output(layer.spec.weight.detach())
    bias = None if layer.spec.bias is None else layer.spec.bias.detach()
    if layer.spec.is_linear:
        if not layer.x.tokens:
            x, grad = (t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]) for t in (x, grad))

        def linear() -> None:
            nn.functional.linear(x, weight, bias)
            torch.mm(grad, weight)
            torch.mm(grad.t(), x)

        return linear
    g = layer.spec.geometry
    if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        x = x.contiguous(memory_format=torch.channels_last)
        grad = grad.contiguous(memory_format=torch.channels_last)
    settings = (list(g.stride), list(g.padding), list(g.dilation), False, [0, 0], g.groups)

    def conv() -> None:
        torch.nn.functional.conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)
        torch.ops.aten.convolution_backward(
            grad, x, weight, None, *settings, [True, True, bias is not None]
        )

    return conv


def _buffers(layer: Candidate, lanes: int) -> tuple[Buffer, Buffer]:
    """Return buffers for the layer's input and its output."""
    return (
        Buffer.zeros(layer.x.shape(layer.samples, lanes, layer.x.halo)),
        Buffer.zeros(layer.out.shape(layer.samples, lanes, layer.out.grad_halo)),
    )


def _sparse(layer: Candidate, plan: KernelPlan, backend: Kernels) -> Callable[[], object]:
    """Return the layer on the kernels with all its gradients, in the layout."""
    x, y = _buffers(layer, backend.lanes)
    backend.to_layout(_random(layer.x, layer.samples), x)
    weight = layer.spec.by_output(layer.spec.weight.detach())
    result = torch.zeros_like(weight)

    def passes() -> None:
        plan.refresh(weight)
        plan.refresh(weight, True)
        backend.conv(plan, x, y)
        backend.conv_weight_grad(plan, x, y, result)
        backend.conv_input_grad(plan, y, x)

    return passes


def _conversions(layer: Candidate, backend: Kernels) -> Callable[[], object]:
    """Return the conversions that the layer needs outside of a segment."""
    buffers = _buffers(layer, backend.lanes)
    plains = [_random(value, layer.samples) for value in (layer.x, layer.out)]

    def convert() -> None:
        for plain, buffer in zip(plains, buffers, strict=True):
            backend.to_layout(plain, buffer)
            backend.from_layout(buffer, plain)

    return convert
