"""Whether the ranks are at the same step of one training run."""

from __future__ import annotations

from acdc.collectives import PeerError
from acdc.shards import extremes, mesh_of
from acdc.sparsifier import Sparsifier


def check_same_step(sparsifier: Sparsifier) -> None:
    """Check that all ranks of sharded weights have executed as many steps. All must call it.

    Otherwise the parts of a weight would be those of different steps.

    Raises:
        PeerError: Some ranks have executed more steps than others, or do something else.
    """
    low, high = extremes([sparsifier.step], mesh_of(sparsifier.params.values()))
    if low != high:
        raise PeerError(
            f"The ranks do not agree: some are after step {low[0]}, and others after step "
            f"{high[0]}. A rank has skipped a step, or had fewer batches. Every rank must take "
            f"every step: a rank without a batch takes it with a loss of zero, for example that of "
            f"any batch times 0."
        )
