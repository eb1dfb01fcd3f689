"""The processor: its name, and the CPUs that this process may use."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor_name() -> str:
    """Return the name of the CPU model, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def affinity() -> list[int] | None:
    """Return the numbers of the CPUs that this process may use; None: the system does not tell."""
    read = getattr(os, "sched_getaffinity", None)  # Linux alone
    return None if read is None else sorted(read(0))


def usable_cpus() -> int:
    """Return how many CPUs this process may use, as far as the system tells."""
    known = affinity()
    return (os.cpu_count() or 1) if known is None else len(known)
