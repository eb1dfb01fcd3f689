"""Stopping a run by a signal, after a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from acdc.errors import AcdcError


class Interrupted(AcdcError):
    """The run was asked to stop, wrote a checkpoint, and stopped. ``signal`` is the signal."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


@contextmanager
def stop_signals(caught: list[int] | None = None) -> Iterator[list[int]]:
    """Yield a list that holds the signal, once one asks the process to stop.

    Args:
        caught: The list to use. Signals reach the main thread alone: whoever trains in another
            thread gives a list, and puts the number of a signal into it to stop.
    """
    caught = [] if caught is None else caught

    def note(number: int, _: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt  # asked twice: stop now
        caught.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may set handlers
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
