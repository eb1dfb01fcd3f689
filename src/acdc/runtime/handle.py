"""What one handle owns: the plans of each program, their memory, and a lock.

Handles of one network share its programs. A call of a network notes its handle for the time of the
call, and each segment computes in the memory of that handle.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from acdc.engine.locks import Lock
from acdc.runtime.lists import SharedLists
from acdc.runtime.placing import fitting
from acdc.runtime.plan import Plan, Settings, plain_shape
from acdc.runtime.program import Program

log = logging.getLogger(__name__)

PLANS = 8  # of each program; the plan that was not used for the longest time is dropped
MOST_IMAGES = 8  # samples in a plan, if its values fit into the cache
MOST_TOKENS = 512

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


class Handle:
    """The plans of one handle.

    Args:
        settings: How plans compute.
        lists: The index lists of the network, which its handles share. None: new ones.

    """

    def __init__(self, settings: Settings, lists: SharedLists | None = None) -> None:
        self.settings = settings
        self.lists = lists or SharedLists()
        self.lock = Lock()
        self._plans: dict[Program, OrderedDict[int, Plan]] = {}
        self._first: dict[Program, Plan] = {}
        self._most_of: dict[Program, int] = {}
        self._said = False

    @property
    def threads(self) -> int:
        """The number of threads that compute now.

        GNU's OpenMP waits forever in a forked process for threads that exist in the parent alone.
        """
        if _forked and self.settings.threads > 1 and not self._said:
            self._said = True
            log.warning(
                "This process was forked, and threads do not survive a fork: the runtime computes "
                "on one thread. Start processes by 'spawn', or build the Runtime in each process, "
                "for more."
            )
        return 1 if _forked else self.settings.threads

    @property
    def plans(self) -> list[Plan]:
        """The first plan of each program: that of the example."""
        return list(self._first.values())

    @property
    def latest(self) -> list[Plan]:
        """The last plan of each program that computed."""
        return [next(reversed(plans.values())) for plans in self._plans.values()]

    def plan(self, program: Program, samples: int) -> Plan:
        """Return the plan of a program for so many samples."""
        plans = self._plans.setdefault(program, OrderedDict())
        if samples not in plans:
            plans[samples] = Plan(program, samples, self.settings, self.lists)
            self._first.setdefault(program, plans[samples])
            if len(plans) > PLANS:
                plans.popitem(last=False)
        plans.move_to_end(samples)
        return plans[samples]

    def _most(self, program: Program) -> int:
        """Return how many samples a plan of this program may have."""
        if program not in self._most_of:
            self._most_of[program] = fitting(program, _most_samples(program))
        return self._most_of[program]

    def compute(self, program: Program, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Compute a program for any number of samples, in pieces of bounded size."""
        samples = inputs[0].shape[0]
        pieces = max(1, -(-samples // self._most(program)))
        size = -(-samples // pieces)
        starts = range(0, samples, size) if samples else ()
        results = []
        with self.lock:
            for start in starts:
                piece = [x[start : start + size] for x in inputs]
                results.append(self.plan(program, piece[0].shape[0])(piece, self.threads))
        if len(results) == 1:
            return results[0]
        if not results:
            return [_empty(program, number) for number in program.outputs]
        return [torch.cat(parts) for parts in zip(*results, strict=True)]


def _most_samples(program: Program) -> int:
    """Return how many samples a plan may have, whatever their size."""
    inputs = [program.values[number] for number in program.inputs]
    if all(value.tokens for value in inputs):
        return max(1, MOST_TOKENS // max(value.width for value in inputs))
    return MOST_IMAGES


def _empty(program: Program, number: int) -> Tensor:
    return torch.empty(plain_shape(0, program.values[number]), dtype=program.dtype)


_current: ContextVar[Handle] = ContextVar("acdc_runtime_handle")


@contextmanager
def computing(handle: Handle) -> Iterator[None]:
    """Let segments compute in the memory of this handle."""
    token = _current.set(handle)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Handle:
    """Return the handle of the present call."""
    return _current.get()
