"""The kept elements of a tensor of dense size: as a vector, and back; and zeros beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from acdc.engine import native
from acdc.engine.gradients import LARGE

SIZES = (2, 4, 8)  # bytes of an element that the compiled functions move


def gather(dense: Tensor, index: Tensor) -> Tensor:
    """Return the kept elements of a tensor.

    Args:
        dense: ``[n]``, contiguous, on the CPU.
        index: int32 ``[k]``, ascending: the positions of the kept elements.

    Returns:
        ``[k]``, of the dtype of ``dense``.
    """
    if not _moves(dense):
        return dense.index_select(0, index)
    vector = torch.empty(index.numel(), dtype=dense.dtype, device="cpu")
    native.gather(dense, index, vector)
    return vector


def expand(vector: Tensor, index: Tensor, dense: Tensor) -> None:
    """Write kept elements into a tensor, and zeros beside them. Every byte is written once.

    Args:
        vector: ``[k]``, contiguous, of the dtype of ``dense``.
        index: int32 ``[k]``, ascending: the positions of the kept elements.
        dense: ``[n]``, contiguous, on the CPU. Its version is counted up.
    """
    if _moves(dense):
        native.expand(vector, index, dense)
        torch.autograd.graph.increment_version(dense)
    else:
        dense.zero_().index_copy_(0, index.long(), vector)


def clear(tensor: Tensor, mask: Tensor, where: bool = True) -> None:
    """Set elements of a tensor to +0.0, in place.

    Args:
        tensor: Of any layout, on any device.
        mask: bool, of its shape, on its device.
        where: An element becomes zero where the mask has this value.
    """
    # Not a product with a mask: that leaves -0.0 for -1, and NaN for infinity.
    if is_one_sweep(tensor, mask):
        native.clear(tensor, mask, where)
        torch.autograd.graph.increment_version(tensor)
    else:
        tensor.masked_fill_(mask if where else ~mask, 0.0)


def is_one_sweep(tensor: Tensor, mask: Tensor) -> bool:
    """Return whether a compiled function clears a tensor, by a mask of either meaning."""
    return _moves(tensor) and _is_plain(tensor) and tensor.stride() == mask.stride()


def _moves(tensor: Tensor) -> bool:
    """Return whether there are compiled functions for elements of this size."""
    return native.available() and tensor.element_size() in SIZES


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is numbers without gaps in the memory of the CPU, and large."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.numel() >= LARGE
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not (tensor.is_complex() or tensor.is_neg() or tensor.is_inference())
        and not (torch.is_grad_enabled() and tensor.requires_grad)
        and (tensor.is_contiguous() or _is_channels_last(tensor))
    )


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
