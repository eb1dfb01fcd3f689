"""The pair of a network whose weights are sharded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from acdc.hooks.pairing import facts_of, twins
from acdc.pair import Pair
from acdc.shards import whole
from acdc.sparsifier import Sparsifier
from acdc.support import Support


def pair(sparsifier: Sparsifier, **facts: Any) -> Pair | None:
    """Return the pair of a network on the first rank, and ``None`` on all others.

    All ranks must call it. One tensor at a time is gathered; the first rank copies it to memory of
    the CPU, where it holds both networks in the end. Then ``pair.save(folder)`` writes them.

    Args:
        sparsifier: What trains the network.
        **facts: Anything JSON can hold, kept with the pair.

    Raises:
        InputError: The network is dense now, or there is no dense network.
    """
    is_first = sparsifier.is_first

    def gathered(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in state.items():
            full = whole(tensor.detach()) if isinstance(tensor, Tensor) else tensor
            if is_first:
                found[name] = full.to("cpu", copy=True) if isinstance(full, Tensor) else full
        return found

    sparse, dense, dense_step = twins(
        sparsifier.method,
        sparsifier.step,
        sparsifier.model,
        sparsifier.dense_twin,
        sparsifier.dense_weights,
        gathered,
    )
    masks = gathered(sparsifier.support)
    if not is_first:
        return None
    known = facts_of(sparsifier.method, sparsifier.step, dense_step)
    return Pair(sparse, dense, Support(masks), {**known, **facts})
