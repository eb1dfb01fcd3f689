"""The gradients of the rows of sparse layers are scaled for the time of an optimizer step.

A normalisation layer amplifies the gradient of a neuron by one over the root of its density, so
that the sparsest neurons of a layer move most. SparseOpt takes that back.

Source: Adnan, Jain, Jacobs, Sharma, Krishnan, Burkholz, Ioannou, "SparseOpt: Addressing
Normalization-induced Gradient Skew in Sparse Training", ICML 2026 (arXiv:2605.27541).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from acdc.hooks.optimizers import params_of
from acdc.hooks.steps import closed, is_nested
from acdc.shape import Shape, shapes_of
from acdc.support import Support


class RowScale:
    """Lets optimizers find scaled gradients: those of row i times ``sqrt(d_i / d)``.

    ``d_i`` is the density of the weights of output i, and ``d`` its mean over the outputs of the
    layer. The gradients of the user are put back after the step. A layer whose rows are equally
    dense is not scaled, and in a dense phase none is.

    Register it after everything that looks at gradients before a step, such as a method that grows
    weights by gradient. Then nothing but the optimizer finds the scaled gradients.

    Args:
        params: The prunable weights by name, with their shapes.
        optimizers: The optimizers that step them.
    """

    def __init__(self, params: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> None:
        self._params, self._shapes = params, shapes_of(params)
        self._factors: dict[int, Tensor] = {}  # by the id of the parameter
        self._grads: list[tuple[Tensor, Tensor]] = []
        self._handles = [
            handle
            for each in optimizers
            for handle in (
                each.register_step_pre_hook(self._before),
                each.register_step_post_hook(self._after),
            )
        ]

    def hold(self, support: Support) -> None:
        """Scale for these densities from here on."""
        self._factors = {}
        for name, mask in {} if support.is_full else support.items():
            factors = row_factors(mask, self._shapes[name])
            if factors is not None:
                param = self._params[name]
                self._factors[id(param)] = factors.to(param)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _before(
        self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        if not self._factors or is_nested(optimizer):
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            args, kwargs = (optimizer, closed(closure)), {}
        for param in params_of(optimizer):
            factors, grad = self._factors.get(id(param)), param.grad
            if factors is not None and grad is not None and grad.layout == torch.strided:
                self._grads.append((param, grad))
                param.grad = grad * factors
        return args, kwargs

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if is_nested(optimizer):
            return
        for param, grad in self._grads:
            param.grad = grad
        self._grads = []


def row_factors(mask: Tensor, shape: Shape) -> Tensor | None:
    """Return the factors of the gradients of a layer.

    >>> mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    >>> row_factors(mask, Shape(mask.shape)).flatten()  # 1 and 1/4 of a mean of 5/8
    tensor([1.2649, 0.6325])

    Args:
        mask: True where a weight is kept.
        shape: Its shape, which says what a row is.

    Returns:
        A tensor that broadcasts to the mask, float32; ``None`` where all factors are 1, nothing is
        kept, or it is not known which axis holds the outputs.
    """
    if shape.inputs is None:
        return None
    if shape.groups > 1:  # of a transposed convolution: each group has inputs of its own
        parts = mask.unflatten(shape.inputs, (shape.groups, -1))
        density = _densities(parts, {shape.inputs, shape.outputs + 1})
        mean = density.mean()
        density = density.expand(*parts.shape[:2], *density.shape[2:]).flatten(0, 1)
    else:
        # An axis 0 that holds neither outputs nor inputs holds matrices, each a layer of its own.
        matrices = {0} - {shape.outputs, shape.inputs}
        density = _densities(mask, {shape.outputs, *matrices})
        mean = density.mean(shape.outputs, keepdim=True) if matrices else density.mean()
        if shape.stack > 1:
            stacked = density.unflatten(0, (shape.stack, -1))
            mean = stacked.mean(1, keepdim=True).expand_as(stacked).flatten(0, 1)
    if bool((density == mean).all()):
        return None  # nothing is kept, too
    # Matrices without a kept weight have no gradient either.
    return (density / torch.where(mean > 0, mean, 1.0)).sqrt()


def _densities(mask: Tensor, rows: set[int]) -> Tensor:
    """Return the mean of a mask over all axes but these, which stay as axes of size one."""
    others = [axis for axis in range(mask.dim()) if axis not in rows]
    return mask.float().mean(others, keepdim=True) if others else mask.float()
