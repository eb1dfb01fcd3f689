"""Which layers run sparse: each is timed both ways, on the batch size of the example.

A layer alone in the network pays for two conversions, a layer inside a run for none. So layers are
measured one by one, and runs are weighed as a whole. Equal layers are timed once, on a part of the
batch; on all of it, and several times, only where neither way is far ahead.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from acdc.engine.geometry import ConvGeometry
from acdc.engine.layout import Buffer
from acdc.engine.tape import Value

REPEATS = 3  # after one to warm up; the fastest counts, as nothing makes a computation too fast
PART = 2  # blocks of the batch that are timed first
CLEAR = 1.5  # times as fast: then one timing of a part of the batch tells
FEW = 16  # random samples that are drawn
NEAR = 1.1  # densities within this factor take equally long
FAR = 1.5  # densities further apart may call for another choice


@dataclass(frozen=True)
class Choice:
    """What was measured of a layer, forward and backward, and what follows.

    Args:
        sparse: It runs on the kernels.
        density: Share of kept weights when it was measured.
        dense_ms: PyTorch, in milliseconds for the whole batch. None, as the others, if nothing was
            measured.
        sparse_ms: The kernels, in the layout.
        convert_ms: To the layout and back, its input and its output.

    """

    sparse: bool
    density: float
    dense_ms: float | None = None
    sparse_ms: float | None = None
    convert_ms: float | None = None

    def fits(self, density: float) -> bool:
        """Return whether it need not be made anew at this density.

        >>> [Choice(False, 0.6).fits(density) for density in (0.89, 0.6, 0.41, 0.39, 0.0)]
        [True, True, True, False, False]
        """
        low, high = sorted((self.density, density))
        return high <= FAR * low or high == low

    @property
    def gain_ms(self) -> float:
        """What the kernels save, without conversions."""
        return (self.dense_ms or 0.0) - (self.sparse_ms or 0.0)


@dataclass(frozen=True)
class Site:
    """A layer where it stands: what a measurement needs.

    Args:
        name: Of the module in the network.
        module, geometry: The layer.
        x, out: What it reads and makes.
        samples: The batch size.

    """

    name: str
    module: nn.Conv2d | nn.Linear
    geometry: ConvGeometry
    x: Value
    out: Value
    samples: int


@dataclass(frozen=True)
class Timed:
    """What is known of a computation.

    Args:
        ms: The shortest time.
        repeats: How many times it was timed.

    """

    ms: float = math.inf
    repeats: int = 0


Timings = dict[Any, Timed]
"""What was timed, by all that makes it as long as it is."""


def measure(site: Site, plan: Any, backend: Any, density: float, known: Timings) -> Choice:
    """Time one layer, dense and sparse.

    Inside of a run it may lose up to two conversions, which leaving the run would cost.

    Args:
        site: The layer.
        plan: Its index lists.
        backend: The kernels.
        density: The share of kept weights.
        known: What was timed before, and is added to.

    """
    per_block = site.x.shape(site.samples, backend.lanes, site.x.halo).per_block
    few = min(site.samples, PART * per_block)
    times = _times(replace(site, samples=few), plan, backend, density, known, 1)
    dense, sparse, convert = (site.samples / few * ms for ms in times)
    if max(dense, sparse) < CLEAR * min(dense, sparse):
        dense, sparse, convert = _times(site, plan, backend, density, known, REPEATS)
    return Choice(sparse < dense + convert, density, dense, sparse, convert)


def _times(
    site: Site, plan: Any, backend: Any, density: float, known: Timings, repeats: int
) -> tuple[float, float, float]:
    """Return milliseconds dense, sparse, and for conversions."""
    equal = (site.geometry, site.samples, site.x.height, site.x.width, *site.module.weight.stride())
    about = round(math.log(density, NEAR)) if density else None
    ways = {
        ("dense", *equal): partial(_dense, site),
        ("sparse", about, *equal): partial(_sparse, site, plan, backend),
        ("convert", *equal): partial(_conversions, site, backend),
    }
    dense, sparse, convert = (_best_of(repeats, known, key, make) for key, make in ways.items())
    return dense, sparse, convert


def _best_of(
    repeats: int, known: Timings, key: Any, make: Callable[[], Callable[[], object]]
) -> float:
    """Return the shortest of so many times in milliseconds; those that are known count."""
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


def run_pays(choices: Iterable[Choice], conversions_ms: float) -> bool:
    """Return whether a run of layers gains more than the conversions at its ends cost."""
    return sum(choice.gain_ms for choice in choices) > conversions_ms


def conversion_ms(value: Value, samples: int, backend: Any, known: Timings) -> float:
    """Return the time of one conversion to and from the layout; ``known`` is added to."""

    def make() -> Callable[[], object]:
        buffer = Buffer.zeros(value.shape(samples, backend.lanes, value.halo))
        plain = _random(value, samples)

        def both() -> None:
            backend.to_layout(plain, buffer)
            backend.from_layout(buffer, plain)

        return both

    key = (value.shape(samples, backend.lanes, value.halo), "both")
    return _best_of(REPEATS, known, key, make)


def table(choices: Mapping[str, Choice], refused: Mapping[str, str]) -> str:
    """Return the choices as text, one line a layer, and why other layers had none."""
    width = max(len(name) for name in ("layer", *choices, *refused))
    lines = [f"{'layer':<{width}}  density  dense ms  sparse ms  convert ms  runs"]
    for name, c in choices.items():
        times = ["-" if t is None else f"{t:.2f}" for t in (c.dense_ms, c.sparse_ms, c.convert_ms)]
        runs = "sparse" if c.sparse else "dense"
        cells = f"{c.density:7.3f}  {times[0]:>8}  {times[1]:>9}  {times[2]:>10}  {runs}"
        lines.append(f"{name:<{width}}  {cells}")
    lines += [f"{name:<{width}}  PyTorch: {reason}" for name, reason in refused.items()]
    return "\n".join(lines)


# --- what is timed --------------------------------------------------------------------------------


def _random(value: Value, samples: int) -> Tensor:
    """Return a few random samples, again and again: enough for a kernel that looks at no values."""
    shape: tuple[int, ...] = (min(samples, FEW), value.channels)
    if not value.tokens:
        shape = (*shape, value.height, value.width)
    generator = torch.Generator().manual_seed(0)  # not the user's: timing changes no run
    few = torch.randn(shape, generator=generator, dtype=value.dtype)
    times = -(-samples // FEW)
    return few if times == 1 else torch.cat([few] * times)[:samples]


def _dense(site: Site) -> Callable[[], object]:
    """Return the layer in PyTorch, in the memory format of its weight: all its gradients."""
    x, grad = _random(site.x, site.samples), _random(site.out, site.samples)
    weight, bias = site.module.weight.detach(), site.module.bias
    bias = None if bias is None else bias.detach()
    if isinstance(site.module, nn.Linear):

        def linear() -> None:
            nn.functional.linear(x, weight, bias)
            torch.mm(grad, weight)
            torch.mm(grad.t(), x)

        return linear
    g = site.geometry
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


def _buffers(site: Site, lanes: int) -> tuple[Buffer, Buffer]:
    """Return buffers for what the layer reads and for what it makes."""
    return (
        Buffer.zeros(site.x.shape(site.samples, lanes, site.x.halo)),
        Buffer.zeros(site.out.shape(site.samples, lanes, site.out.grad_halo)),
    )


def _sparse(site: Site, plan: Any, backend: Any) -> Callable[[], object]:
    """Return the layer on the kernels, in the layout: all its gradients."""
    x, y = _buffers(site, backend.lanes)
    backend.to_layout(_random(site.x, site.samples), x)
    weight = site.module.weight.detach()
    result = torch.zeros_like(weight)

    def layer() -> None:
        plan.refresh(weight)
        plan.refresh(weight, True)
        backend.conv(plan, x, y)
        backend.conv_weight_grad(plan, x, y, result)
        backend.conv_input_grad(plan, y, x)

    return layer


def _conversions(site: Site, backend: Any) -> Callable[[], object]:
    """Return the conversions that the layer needs when it stands alone."""
    buffers = _buffers(site, backend.lanes)
    plains = [_random(value, site.samples) for value in (site.x, site.out)]

    def convert() -> None:
        for plain, buffer in zip(plains, buffers, strict=True):
            backend.to_layout(plain, buffer)
            backend.from_layout(buffer, plain)

    return convert
