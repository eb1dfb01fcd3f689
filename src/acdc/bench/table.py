"""Rows of a benchmark as lines for a terminal, and as the file that ``--json`` names."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from acdc.bench.race import Row
from acdc.outfile import write
from acdc.runs.record import machine, versions

NAMES = {
    "engine": "engine",
    "torch_csr": "torch CSR",
    "sparseprop": "SparseProp",
    "sparselab": "SparseLab",
}


class Table:
    """Lines of one benchmark, each printed as soon as its row is measured.

    Args:
        cases: Names in the first column.
        columns: Keys of further figures, and the titles of their columns.
    """

    def __init__(self, cases: Iterable[str], columns: Mapping[str, str]) -> None:
        self.case, self.columns = max(map(len, cases)), columns

    def header(self) -> str:
        """Return the header line."""
        left = f"{'case':{self.case}}  {'zeros':>6}  {'dense ms':>8}  {'(best setting)':15}"
        left += f"  {'engine ms':>9}  {'ratio':>6}  {'(quartiles)':13}"
        return left + "".join(f"  {title:>{_width(title)}}" for title in self.columns.values())

    def line(self, row: Row) -> str:
        """Return a row's line."""
        ratio, spread = "–", ""
        if row["ratio"] is not None:
            low, high = row["quartiles"]["ratio"]
            ratio, spread = f"{row['ratio']:.2f}x", f"({low:.2f}..{high:.2f})"
        line = f"{row['case']:{self.case}}  {100 * row['sparsity']:4g} %"
        line += f"  {number(row['dense_ms']):>8}  {row['dense_setting']:15}"
        line += f"  {number(row['engine_ms']):>9}  {ratio:>6}  {spread:13}"
        for key, title in self.columns.items():
            line += f"  {number(row[key]):>{_width(title)}}"
        return line.rstrip()


def _width(title: str) -> int:
    return max(len(title), 8)


def number(value: float | None) -> str:
    """Write a figure with three significant digits; a dash for a figure that is missing."""
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def notes(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each library that was not timed, with the cases it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["notes"].items():
            cases = found.setdefault((name, reason), [])
            cases += [row["case"]] if row["case"] not in cases else []
    every = len({row["case"] for row in rows})
    lines = []
    for (name, reason), cases in found.items():
        scope = ", ".join(cases) if len(cases) < 4 else f"{len(cases)} of {every} cases"
        lines.append(f"{NAMES[name]}: {reason}" + (f" ({scope})" if len(cases) < every else ""))
    return lines


def save(path: Path, command: str, rows: Sequence[Row], **facts: Any) -> None:
    """Write the file: command, date, machine, versions, further facts, and the rows so far.

    Raises:
        InputError: The file cannot be written.
    """
    record = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": machine(),
        "versions": versions() | _peers(),
        **facts,
        "rows": list(rows),
    }
    write(path, (json.dumps(record, indent=1) + "\n").encode())


def _peers() -> dict[str, str]:
    """Return the versions of the other libraries that are installed."""
    found = {}
    for name in ("sparseprop", "sparselab"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
