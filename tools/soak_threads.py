"""Long trials of threads: one network on the engine, called from several threads at once."""

from __future__ import annotations

from collections.abc import Callable

from support.threads import trial


def many_threads(seed: int) -> str | None:
    """Call a network from two to four threads, in every other try while its phases change."""
    return trial(seed, calls=40)


TRIALS: dict[str, Callable[[int], str | None]] = {"many_threads": many_threads}
