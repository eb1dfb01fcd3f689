"""Which symbols and libraries of a compiled module an older Linux does not have.

``python tools/symbols.py FILE.so ...`` prints them, and exits with 1 if there are any. A module
that needs nothing else loads wherever glibc is 2.28 or later (the standard manylinux_2_28: RHEL 8,
Debian 10, Ubuntu 20.04), beside a PyTorch that brings libgomp. The limits are those of the GCC 8
and the glibc of these systems; ``auditwheel`` has the same. Needs ``readelf`` of binutils.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LIMITS = {
    "GLIBC": (2, 28),
    "GLIBCXX": (3, 4, 24),
    "CXXABI": (1, 3, 11),
    "GCC": (7, 0, 0),
    "GOMP": (4, 5),
    "OMP": (4, 5),
}
LIBRARIES = re.compile(
    r"lib(gomp|c|m|stdc\+\+|gcc_s|pthread|dl|rt)\.so\.\d+|ld-linux-[\w-]+\.so\.\d"
)


def too_new(module: Path) -> list[str]:
    """Return what an older system lacks, as ``symbol@version`` and ``library``."""
    found = [library for library in libraries(module) if not LIBRARIES.fullmatch(library)]
    for line in _read(module, "--dyn-syms").splitlines():
        undefined = re.search(r" UND (\S+@([A-Z]+)_([\d.]+))", line)
        if undefined:
            symbol, space, version = undefined.groups()
            if tuple(map(int, version.split("."))) > LIMITS.get(space, ()):
                found.append(symbol)
    return sorted(found)


def libraries(module: Path) -> list[str]:
    """Return the libraries that a module is linked with."""
    return re.findall(r"\(NEEDED\).*\[(.*)\]", _read(module, "--dynamic"))


def machine(module: Path) -> str:
    """Return the kind of CPU that a module is for, as ELF names it."""
    return re.findall(r"Machine:\s+(.*)", _read(module, "--file-header"))[0].strip()


def _read(module: Path, what: str) -> str:
    command = ["readelf", "--wide", what, str(module)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Check the files of the command line."""
    found = {module: too_new(Path(module)) for module in sys.argv[1:]}
    for module, symbols in found.items():
        print(f"{module}: {', '.join(symbols) or 'no symbol is too new'}")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
