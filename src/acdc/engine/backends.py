"""Which kernels compute: the compiled ones, or their PyTorch reference."""

from __future__ import annotations

import logging
from functools import cache

from acdc.engine import native
from acdc.engine.contract import Kernels
from acdc.engine.native import Native
from acdc.engine.reference import Reference

log = logging.getLogger(__name__)


def kernels() -> Kernels:
    """Return the compiled kernels, or the reference if they are missing (and log that once)."""
    if native.available():
        return Native()
    _warn()
    return Reference()


@cache
def _warn() -> None:
    log.warning(
        "The compiled kernels are missing: sparse layers run on plain PyTorch, without a gain. "
        "Reinstall acdc-train where there is a C++ compiler."
    )
