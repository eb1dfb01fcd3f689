"""Errors of collective operations, as sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed

from acdc.errors import AcdcError


class PeerError(AcdcError):
    """Processes that train one model cannot reach one another, or do not agree."""


def has_peers() -> bool:
    """Return whether several processes were started together, whatever each of them trains."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return int(distributed.get_world_size()) > 1


@contextmanager
def together(what: str) -> Iterator[None]:
    """Turn the errors of a collective operation into a sentence.

    Args:
        what: What the processes do in this context.

    Raises:
        PeerError: Another process has ended, or did not come in the time that
            ``init_process_group`` was given.
    """
    try:
        yield
    except RuntimeError as error:
        if not has_peers() or not is_of_peers(error):
            raise
        first = str(error).strip().split("\n")[0]
        raise PeerError(
            f"Rank {distributed.get_rank()} cannot {what}: another process has ended, or does "
            f"something else ({first}). The process that ended says why. All processes must take "
            f"the same steps on equally many batches."
        ) from error


def is_of_peers(error: RuntimeError) -> bool:
    """Return whether an error comes from the communication between processes."""
    if isinstance(error, distributed.DistError):
        return True
    signs = ("gloo", "nccl", "connection", "socket", "timed out")
    return any(sign in str(error).lower() for sign in signs)
