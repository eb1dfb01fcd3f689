"""Locks that a forked process can go on with.

A thread that holds a lock does not exist in a forked child, so the child would wait for it forever,
and what the lock guards may be half changed. So a fork first takes every lock of this module, as
the standard library's ``logging`` does with its own.
"""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType


class Lock:
    """A lock that its thread may take again.

    Args:
        rank: A thread that holds a lock takes only locks of higher ranks.

    """

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self._lock = threading.RLock()
        self.acquire, self.release = self._lock.acquire, self._lock.release
        _every.add(self)

    @property
    def is_mine(self) -> bool:
        """Whether this thread holds it."""
        return bool(self._lock._is_owned())  # type: ignore[attr-defined]

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


_every: weakref.WeakSet[Lock] = weakref.WeakSet()
_held: list[Lock] = []  # by the thread that forks


def _take_all() -> None:
    locks = sorted(_every, key=lambda lock: lock.rank)
    for lock in locks:
        lock.acquire()
    _held[:] = locks


def _release_all() -> None:
    locks, _held[:] = _held[:], []
    for lock in locks:
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_take_all, after_in_parent=_release_all, after_in_child=_release_all)
