"""Between a tensor of dense size and the vector of its kept elements."""

from __future__ import annotations

import torch
from torch import Tensor

from acdc.engine import native

SIZES = (2, 4, 8)  # bytes of an element that the compiled functions move


def gather(dense: Tensor, index: Tensor) -> Tensor:
    """Return the kept elements of a tensor.

    Args:
        dense: ``[n]``, contiguous, on the CPU.
        index: int32 ``[k]``, ascending: the positions of the kept elements.

    Returns:
        ``[k]``, of the dtype of ``dense``.
    """
    if not native.available() or dense.element_size() not in SIZES:
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
    if native.available() and dense.element_size() in SIZES:
        native.expand(vector, index, dense)
        torch.autograd.graph.increment_version(dense)
    else:
        dense.zero_().index_copy_(0, index.long(), vector)
