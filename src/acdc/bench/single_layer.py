"""Sparse layers one at a time, with plain tensors in and out: the fallback for a layer that stands
alone.

Two ``torch.library`` operators, ``acdc::sparse_conv2d`` and its backward, with autograd and fake
tensors. Their conversions cost about as much as one pass of the layer; a run of layers stays in the
layout instead.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

from acdc.engine.backends import Kernels, kernels
from acdc.engine.geometry import ConvGeometry
from acdc.engine.layout import Buffer, Pool, Shape
from acdc.errors import InputError

_handles = itertools.count(1)
_layers: weakref.WeakValueDictionary[int, SparseLayer] = weakref.WeakValueDictionary()


class SparseLayer:
    """One layer and its support; builds a plan for each input size it meets. Hand it to the
    functions below.

    Args:
        geometry: the layer's sizes.
        support: bool, shaped as the weight, or sorted int64 flat indices of the kept weights.
        backend: the kernels to run on; default the best there are.

    """

    def __init__(
        self, geometry: ConvGeometry, support: torch.Tensor, backend: Kernels | None = None
    ) -> None:
        self.geometry = geometry
        flat = support.detach().reshape(-1)
        self.support = flat.nonzero()[:, 0] if flat.dtype == torch.bool else flat
        self.backend = backend or kernels()
        self._plans: dict[tuple[Any, ...], Any] = {}
        self._pool = Pool()
        self.handle = next(_handles)
        _layers[self.handle] = self

    def shapes(self, x: torch.Tensor) -> tuple[Shape, Shape]:
        """Return the shapes of the buffers of the input and of the output, for this input."""
        lanes, g = self.backend.lanes, self.geometry
        if x.dim() == 2:
            shape = Shape.of_tokens(x.shape[0], x.shape[1], lanes, x.dtype)
            return shape, shape.with_channels(g.out_channels)
        samples, _, height, width = x.shape
        out = g.out_size(height, width)
        return (
            Shape.of_images(x.shape, lanes, g.halo, x.dtype),
            Shape(samples, g.out_channels, *out, lanes, g.grad_halo(height, width), False, x.dtype),
        )

    def plan(self, x: Shape, y: Shape) -> Any:
        """Return the index lists for buffers of this size; they do not depend on the batch."""
        key = (x.height, x.width, x.tokens, x.dtype)
        if key not in self._plans:
            self._plans[key] = self.backend.plan(self.geometry, self.support, x, y)
        return self._plans[key]

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the layer on a plain tensor."""
        x_shape, y_shape = self.shapes(x)
        plan = self.plan(x_shape, y_shape)
        plan.refresh(weight)
        x_buffer, y_buffer = self._pool.take(x_shape), self._pool.take(y_shape)
        self.backend.to_layout(x, x_buffer)
        self.backend.conv(plan, x_buffer, y_buffer, bias=bias)
        out = self.backend.from_layout(y_buffer, _like(x, self.out_shape(x)))
        self._pool.give(x_buffer, y_buffer)
        return out

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wanted: list[bool]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of input, weight (zero outside of the support) and bias; empty if
        unwanted.
        """
        x_shape, y_shape = self.shapes(x)
        plan = self.plan(x_shape, y_shape)
        dy: Buffer = self.backend.to_layout(grad, self._pool.take(y_shape))
        x_buffer = self._pool.take(x_shape)
        dx, dweight, dbias = x.new_empty(0), x.new_empty(0), x.new_empty(0)
        if wanted[1]:
            dweight = torch.zeros(weight.shape, dtype=weight.dtype)
            self.backend.to_layout(x, x_buffer)
            self.backend.conv_weight_grad(plan, x_buffer, dy, dweight)
        if wanted[0]:
            plan.refresh(weight, True)
            self.backend.conv_input_grad(plan, dy, x_buffer)
            dx = self.backend.from_layout(x_buffer, _like(x, x.shape))
        if wanted[2]:
            dbias = self.backend.channel_sums(dy).to(x.dtype)
        self._pool.give(x_buffer, dy)
        return dx, dweight, dbias

    def out_shape(self, x: torch.Tensor) -> tuple[int, ...]:
        """Return the shape of the output for this input."""
        if x.dim() == 2:
            return (x.shape[0], self.geometry.out_channels)
        return (
            x.shape[0],
            self.geometry.out_channels,
            *self.geometry.out_size(x.shape[2], x.shape[3]),
        )


def _like(x: torch.Tensor, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
    """Return an empty tensor in the memory format of ``x``: contiguous or channels_last."""
    out = x.new_empty(shape)
    last = (
        x.dim() == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )
    return out.contiguous(memory_format=torch.channels_last) if last else out


def _layer(handle: int) -> SparseLayer:
    layer = _layers.get(handle)
    if layer is None:
        raise InputError(
            f"The sparse layer {handle} is gone: keep the SparseLayer while its operators run."
        )
    return layer


@torch.library.custom_op("acdc::sparse_conv2d", mutates_args=())
def _conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, handle: int
) -> torch.Tensor:
    return _layer(handle).forward(x, weight, bias)


@_conv.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, handle: int
) -> torch.Tensor:
    return _like(x, _layer(handle).out_shape(x))


@torch.library.custom_op("acdc::sparse_conv2d_backward", mutates_args=())
def _conv_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, handle: int, wanted: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _layer(handle).backward(grad, x, weight, wanted)


@_conv_backward.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, handle: int, wanted: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = _like(x, x.shape) if wanted[0] else x.new_empty(0)
    dweight = weight.new_empty(weight.shape) if wanted[1] else x.new_empty(0)
    dbias = x.new_empty(_layer(handle).geometry.out_channels if wanted[2] else 0)
    return dx, dweight, dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias, handle = inputs
    ctx.save_for_backward(x, weight)
    ctx.handle, ctx.has_bias = handle, bias is not None


def _autograd(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wanted = [
        ctx.needs_input_grad[0],
        ctx.needs_input_grad[1],
        ctx.has_bias and ctx.needs_input_grad[2],
    ]
    grads = _conv_backward(grad, x, weight, ctx.handle, wanted)
    return (*(g if wanted[i] else None for i, g in enumerate(grads)), None)


_conv.register_autograd(_autograd, setup_context=_setup)


def sparse_conv2d(
    x: torch.Tensor, weight: torch.Tensor, layer: SparseLayer, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute a convolution with the kept weights of a layer; differentiable once.

    Args:
        x: ``[N, C, H, W]``, float32 or float64, any strides.
        weight: the dense weight; what lies outside of the support is not read, and has gradient
            zero.
        layer: the geometry and the support.
        bias: ``[out_channels]`` or None.

    """
    out: torch.Tensor = _conv(x, weight, bias, layer.handle)
    return out


def sparse_linear(
    x: torch.Tensor, weight: torch.Tensor, layer: SparseLayer, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute a linear layer with its kept weights; ``x`` is ``[..., in_features]``, ``weight``
    two-dimensional.
    """
    out: torch.Tensor = _conv(x.reshape(-1, x.shape[-1]), weight, bias, layer.handle)
    return out.reshape(*x.shape[:-1], out.shape[-1])
