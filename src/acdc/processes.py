"""The processes that train one model together."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from acdc.support import Support


def has_peers() -> bool:
    """Return whether this is one of several processes that train the same model."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return int(distributed.get_world_size()) > 1


def from_rank_zero(tensor: Tensor) -> Tensor:
    """Fill a tensor in place with the values of rank 0, where there are several ranks; return it.

    Sums may differ in the last bit between ranks. What decides about a support must not.
    """
    if has_peers():
        distributed.broadcast(tensor, src=0)
    return tensor


def agreed(support: Support) -> Support:
    """Return the support of rank 0 on every rank: scores may differ in the last bit."""
    if not has_peers():
        return support
    masks = {name: from_rank_zero(mask.to(torch.uint8)) for name, mask in support.items()}
    return Support({name: mask.to(torch.bool) for name, mask in masks.items()})
