"""The kernel of :mod:`acdc.hooks.flat`. It needs Triton, so that nothing else imports it."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def clear_pruned(
    tensors: Any,
    masks: Any,
    sizes: Any,
    block_tensor: Any,
    block_start: Any,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write +0.0 where a mask is 0.

    Args:
        tensors: int64 ``[n]``: addresses of tensors of one element size.
        masks: int64 ``[n]``: addresses of their masks, a byte for each element.
        sizes: int64 ``[n]``: their numbers of elements.
        block_tensor: int64 ``[blocks]``: the tensor that each program clears a part of.
        block_start: int64 ``[blocks]``: the first element of the part.
        BITS: The size of an element.
        BLOCK: Elements of a part.
    """
    block = tl.program_id(0)
    tensor = tl.load(block_tensor + block)
    element = tl.load(block_start + block) + tl.arange(0, BLOCK)
    inside = element < tl.load(sizes + tensor)
    mask = tl.load(masks + tensor).to(tl.pointer_type(tl.int8))
    kept = tl.load(mask + element, mask=inside, other=1)
    pruned = kept == 0  # nothing is beyond the end of the tensor
    # An integer zero of any size is the bits of +0.0.
    if BITS == 8:
        tl.store(tl.load(tensors + tensor).to(tl.pointer_type(tl.int8)) + element, 0, mask=pruned)
    elif BITS == 16:
        tl.store(tl.load(tensors + tensor).to(tl.pointer_type(tl.int16)) + element, 0, mask=pruned)
    elif BITS == 32:
        tl.store(tl.load(tensors + tensor).to(tl.pointer_type(tl.int32)) + element, 0, mask=pruned)
    else:
        tl.store(tl.load(tensors + tensor).to(tl.pointer_type(tl.int64)) + element, 0, mask=pruned)
