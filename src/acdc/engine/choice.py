"""Which layers run sparse: each is timed both ways, on the batch size of the example.

A layer alone in the network pays for two conversions, a layer inside a run for none. So layers are
measured one by one, and runs are weighed as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acdc.engine.geometry import ConvGeometry
from acdc.engine.layout import Buffer
from acdc.engine.tape import Value

REPEATS = 2  # after one to warm up; the faster counts, as nothing makes a computation too fast


@dataclass(frozen=True)
class Choice:
    """What was measured of a layer, forward and backward, and what follows.

    Args:
        sparse: It runs on the kernels.
        density: Share of kept weights when it was measured.
        dense_ms: PyTorch. None, as the others, if nothing was measured.
        sparse_ms: The kernels, in the layout.
        convert_ms: To the layout and back, its input and its output.

    """

    sparse: bool
    density: float
    dense_ms: float | None = None
    sparse_ms: float | None = None
    convert_ms: float | None = None

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


def measure(site: Site, plan: Any, backend: Any, density: float, known: dict[Any, float]) -> Choice:
    """Time one layer, dense and sparse.

    Inside of a run it may lose up to two conversions, which leaving the run would cost.

    Args:
        site: The layer.
        plan: Its index lists.
        backend: The kernels.
        density: The share of kept weights.
        known: What was timed before, and is added to: equal layers are equally fast when dense.

    """
    equal = (site.geometry, site.samples, site.x.height, site.x.width, *site.module.weight.stride())
    if equal not in known:
        known[equal] = best_ms(_dense(site))
    dense = known[equal]
    sparse, convert = (best_ms(call) for call in _sparse(site, plan, backend))
    return Choice(sparse < dense + convert, density, dense, sparse, convert)


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


def conversion_ms(value: Value, samples: int, backend: Any) -> float:
    """Return the time of one conversion to and from the layout."""
    buffer = Buffer.zeros(value.shape(samples, backend.lanes, value.halo))
    plain = _random(value, samples)

    def both() -> None:
        backend.to_layout(plain, buffer)
        backend.from_layout(buffer, plain)

    return best_ms(both)


def table(choices: Mapping[str, Choice]) -> str:
    """Return the choices as text, one line a layer."""
    width = max((len(name) for name in choices), default=5)
    lines = [f"{'layer':<{width}}  density  dense ms  sparse ms  convert ms  runs"]
    for name, c in choices.items():
        times = ["-" if t is None else f"{t:.2f}" for t in (c.dense_ms, c.sparse_ms, c.convert_ms)]
        runs = "sparse" if c.sparse else "dense"
        cells = f"{c.density:7.3f}  {times[0]:>8}  {times[1]:>9}  {times[2]:>10}  {runs}"
        lines.append(f"{name:<{width}}  {cells}")
    return "\n".join(lines)


# --- what is timed --------------------------------------------------------------------------------


def _random(value: Value, samples: int) -> Tensor:
    shape: tuple[int, ...] = (samples, value.channels)
    if not value.tokens:
        shape = (*shape, value.height, value.width)
    generator = torch.Generator().manual_seed(0)  # not the user's: timing changes no run
    return torch.randn(shape, generator=generator, dtype=value.dtype)


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


def _sparse(
    site: Site, plan: Any, backend: Any
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return the layer on the kernels, and the conversions that it needs when it stands alone."""
    lanes = backend.lanes
    x = Buffer.zeros(site.x.shape(site.samples, lanes, site.x.halo))
    y = Buffer.zeros(site.out.shape(site.samples, lanes, site.out.grad_halo))
    plain_x, plain_y = _random(site.x, site.samples), _random(site.out, site.samples)
    backend.to_layout(plain_x, x)
    weight = site.module.weight.detach()
    result = torch.zeros_like(weight)

    def layer() -> None:
        plan.refresh(weight)
        plan.refresh(weight, True)
        backend.conv(plan, x, y)
        backend.conv_weight_grad(plan, x, y, result)
        backend.conv_input_grad(plan, y, x)

    def convert() -> None:
        for plain, buffer in ((plain_x, x), (plain_y, y)):
            backend.to_layout(plain, buffer)
            backend.from_layout(buffer, plain)

    return layer, convert
