"""The sizes of the CPU's caches, as far as the system tells."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from acdc.processor import affinity

log = logging.getLogger(__name__)

SYSTEM = Path("/sys/devices/system/cpu")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Caches:
    """The sizes of caches in bytes. The defaults serve where the system does not tell.

    Args:
        first: The first-level data cache of one core.
        last: The last-level caches that the process can use, together.

    """

    first: int = 32 * 2**10
    last: int = 32 * 2**20


# What a system tells outside of these is no size of a cache: some virtual machines tell 0.
_FIRST = range(4 * 2**10, 2**20 + 1)
_LAST = range(128 * 2**10, 2**34 + 1)


@dataclass(frozen=True)
class _Cache:
    level: int
    size: int
    cpus: str  # that share it


@cache
def caches() -> Caches:
    """Return the caches of this machine, read once."""
    return read(_own_cpus(), SYSTEM)


def read(cpus: Collection[int], system: Path) -> Caches:
    """Return the caches of some CPUs.

    Args:
        cpus: Their numbers. With CPUs of several kinds, the smallest first-level cache counts.
        system: The folder in which Linux describes its CPUs. It may be missing or incomplete, as in
            some containers.

    """
    firsts: list[int] = []
    lasts: set[_Cache] = set()
    for cpu in cpus:
        found = list(_caches_of(system / f"cpu{cpu}" / "cache"))
        firsts += [c.size for c in found if c.level == 1 and c.size in _FIRST]
        above = [c for c in found if c.level > 1 and c.size in _LAST]
        if above:
            lasts.add(max(above, key=lambda c: c.level))
    known = Caches()
    return Caches(
        min(firsts, default=known.first), sum(c.size for c in lasts) if lasts else known.last
    )


def _own_cpus() -> Collection[int]:
    """Return the CPUs on which this process may run."""
    known = affinity()
    return [0] if known is None else known


def _caches_of(folder: Path) -> Iterator[_Cache]:
    """Yield the caches of a CPU that hold data."""
    for index in sorted(folder.glob("index*")):
        try:
            kind, size, level, cpus = (
                (index / name).read_text("utf-8").strip()
                for name in ("type", "size", "level", "shared_cpu_list")
            )
            if kind in ("Data", "Unified"):
                yield _Cache(int(level), _bytes(size), cpus)
        except (OSError, ValueError) as error:
            log.debug("%s does not describe a cache: %s", index, error)


def _bytes(text: str) -> int:
    """Return a size as Linux writes it in bytes.

    >>> _bytes("48K"), _bytes("2M"), _bytes("65536")
    (49152, 2097152, 65536)
    """
    unit = _UNITS.get(text[-1:].upper())
    return int(text) if unit is None else int(text[:-1]) * unit
