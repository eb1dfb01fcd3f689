"""A large weight as the vector of its kept elements, and the optimizer's state of these alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from acdc.engine.kept import expand, gather
from acdc.engine.native import optimizer_step

LARGEST = 2**31 - 1  # elements; positions have 32 bits


class KeptWeight:
    """The kept elements of a weight, in the order of memory.

    Args:
        param: The weight, contiguous in some order of its dimensions, of at most ``LARGEST``
            elements.
        mask: True where the weight is kept, of its shape.

    Attributes:
        vector: The kept elements ``[k]`` as a parameter of their own, with a gradient of the same
            length. They have elements between :meth:`read` and :meth:`write`.
        version: That of the weight when this object last wrote it.
    """

    def __init__(self, param: nn.Parameter, mask: Tensor) -> None:
        self.param, self._stride = param, param.stride()
        self._order = _order_of_memory(param)
        self.index = mask.permute(self._order).reshape(-1).nonzero()[:, 0].int()
        self.vector = nn.Parameter(param.detach().new_empty(0))
        self.version: int | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the weight has a gradient, and both are stored as they were."""
        param, grad = self.param, self.param.grad
        return (
            grad is not None
            and grad.layout == torch.strided
            and grad.dtype == param.dtype
            and (param.stride(), param.dtype) == (self._stride, self.vector.dtype)
        )

    def read(self) -> None:
        """Copy the kept elements of the weight and of its gradient into vectors."""
        assert self.param.grad is not None
        self.vector.data = self.kept(self.param)
        self.vector.grad = self.kept(self.param.grad)

    def write(self) -> None:
        """Copy the vector into the weight, with zeros beside it."""
        expand(self.vector.detach(), self.index, self._flat(self.param))
        self.version = self.param._version
        self.vector.data, self.vector.grad = self.vector.new_empty(0), None

    def step_by(self, kernel: str, options: Mapping[str, Any]) -> None:
        """Step the kept elements where they are, with zeros beside them.

        Args:
            kernel: ``"sgd"`` or ``"adam"``: see ``csrc/acdc_kernels.h``.
            options: The fields of its struct. Tensors have the length of the vector.
        """
        assert self.param.grad is not None
        weight = self._flat(self.param)
        kept = {
            "weight": weight,
            "grad": self._flat(self.param.grad),
            "index": self.index,
            "count": self.index.numel(),
            "size": weight.numel(),
        }
        optimizer_step(kernel, kept, options)
        torch.autograd.graph.increment_version(self.param)
        self.version = self.param._version

    def put(self, values: Tensor) -> None:
        """Give the kept elements of the weight other values ``[k]``; the zeros beside them stay."""
        self._flat(self.param).index_copy_(0, self.index.long(), values)
        self.version = self.param._version

    def kept(self, dense: Tensor) -> Tensor:
        """Return the kept elements of a tensor of the weight's shape."""
        return gather(self._flat(dense), self.index)

    def dense(self, kept: Tensor) -> Tensor:
        """Return a tensor of the weight's shape and layout: the kept elements, and zeros."""
        result = torch.empty_like(self.param, dtype=kept.dtype)
        expand(kept, self.index, self._flat(result))
        return result

    def _flat(self, tensor: Tensor) -> Tensor:
        """Return all elements in the order of memory; of another layout, as a copy."""
        return tensor.detach().permute(self._order).reshape(-1)


def can_be_kept(param: Tensor) -> bool:
    """Return whether a weight lies in memory without gaps, and its positions have 32 bits."""
    without_gaps = param.permute(_order_of_memory(param)).is_contiguous()
    return param.numel() <= LARGEST and bool(without_gaps)


def _order_of_memory(param: Tensor) -> list[int]:
    """Return the dimensions, that of the largest stride first."""
    return sorted(range(param.dim()), key=lambda d: -param.stride()[d])


class KeptState(dict[str, Any]):
    """The optimizer's state of a weight, of which only the kept elements are stored.

    Whoever reads an entry finds a tensor of the weight's shape: at the first reading after a step,
    all entries become such tensors. The next step stores their kept elements again. A tensor that
    somebody holds is therefore not changed by later steps.

    Args:
        weight: The weight.
        state: Its state after a step. A tensor as long as the vector of kept elements is stored as
            it is; everything else is stored and read like the entry of any dictionary.
    """

    def __init__(self, weight: KeptWeight, state: Mapping[str, Any]) -> None:
        super().__init__(state)
        self._weight = weight
        self._are_kept = {
            key
            for key, value in state.items()
            if isinstance(value, Tensor) and value.shape == weight.index.shape
        }

    def of_kept(self) -> dict[str, Any]:
        """Return the state of the vector of kept elements."""
        return {key: self._of_kept(key, value) for key, value in dict.items(self)}

    def _of_kept(self, key: str, value: Any) -> Any:
        if key in self._are_kept:
            return value
        is_dense = isinstance(value, Tensor) and value.shape == self._weight.param.shape
        return self._weight.kept(value) if is_dense else value

    def make_dense(self) -> None:
        """Turn vectors of kept elements into tensors of the weight's shape."""
        with torch.no_grad():
            for key in self._are_kept & dict.keys(self):
                dict.__setitem__(self, key, self._weight.dense(dict.__getitem__(self, key)))
        self._are_kept = set()

    def __setitem__(self, key: str, value: Any) -> None:
        self._are_kept.discard(key)
        super().__setitem__(key, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _makes_dense(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    def read(self: KeptState, *args: Any, **kwargs: Any) -> Any:
        self.make_dense()
        return method(self, *args, **kwargs)

    return read


# Everything that shows a value, or changes more than one entry. ``__iter__`` shows keys alone, but
# without one of its own, ``dict(state)`` would copy the values as they are stored.
for _name in (
    "__getitem__", "get", "items", "values", "copy", "__iter__", "__eq__", "__ne__", "__repr__",
    "__or__", "__ror__", "__ior__", "pop", "popitem", "setdefault", "update",
):  # fmt: skip
    setattr(KeptState, _name, _makes_dense(_name))
