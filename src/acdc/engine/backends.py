"""Which kernels compute: the compiled ones, or their PyTorch reference."""

from __future__ import annotations

import logging

from acdc.engine import native
from acdc.engine.native import Native
from acdc.engine.reference import Reference

log = logging.getLogger(__name__)


Kernels = Native | Reference


_said: set[str] = set()


def kernels() -> Kernels:
    """Return the native kernels, or the reference where they were not compiled (and say so,
    once).
    """
    if native.available():
        return Native()
    if "reference" not in _said:
        _said.add("reference")
        log.warning(
            "The compiled kernels are missing: sparse layers run on plain PyTorch, without a gain. "
            "Reinstall acdc where there is a C++ compiler."
        )
    return Reference()
