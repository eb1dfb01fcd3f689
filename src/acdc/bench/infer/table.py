"""Rows of ``acdc bench infer`` as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from acdc.bench.infer.measure import OURS
from acdc.bench.race import Row
from acdc.bench.table import number


class Table:
    """Lines, a contender each.

    Args:
        cases: Names in the first column.
        contenders: Names in the column of contenders.
    """

    def __init__(self, cases: Iterable[str], contenders: Iterable[str]) -> None:
        self.case = max(4, *map(len, cases))
        self.contender = max(9, *map(len, contenders))

    def header(self) -> str:
        """Return the header line."""
        left = f"{'case':{self.case}}  {'zeros':>6}  {'batch':>5}  {'contender':{self.contender}}"
        left += f"  {'p50 ms':>8}  {'p90 ms':>8}  {'p99 ms':>8}  {'items/s':>8}"
        left += f"  {'acdc is':>7}  {'(quartiles)':13}  {'cold ms':>8}  {'MB':>7}  {'net MB':>7}"
        return left + f"  {'file MB':>7}  {'error':>7}  setting"

    def line(self, row: Row) -> str:
        """Return a row's line."""
        zeros = "–" if row["sparsity"] is None else f"{100 * row['sparsity']:.3g} %"
        line = f"{row['case']:{self.case}}  {zeros:>6}  {row['batch']:5}"
        line += f"  {row['contender']:{self.contender}}"
        if row["why"] is not None:
            return f"{line}  {row['why']}"
        for key in ("p50_ms", "p90_ms", "p99_ms", "items_per_second"):
            line += f"  {number(row[key]):>8}"
        ratio, spread = "", ""
        if row["ratio"] is not None:
            low, high = row["quartiles"]
            ratio, spread = f"{row['ratio']:.2f}x", f"({low:.2f}..{high:.2f})"
        line += f"  {ratio:>7}  {spread:13}  {number(row['cold_ms']):>8}"
        for key in ("memory_mb", "network_mb", "file_mb"):
            line += f"  {number(row[key]):>7}"
        error = "–" if row["error"] is None else f"{row['error']:.0e}"
        return f"{line}  {error:>7}  {row['setting']}"


def notes(rows: Sequence[Row]) -> list[str]:
    """Return the lines below the table."""
    lines = []
    for row in rows:
        if row["contender"] == OURS and row["note"] is not None:
            line = f"{row['case']}: no frozen file: {row['note']}"
            lines += [line] if line not in lines else []
    lines.append(
        "'acdc is 2.0x': twice as fast. 'cold': from the file to the first answer, without the "
        "import. 'net MB': resident memory beyond that after the import. 'error': largest "
        "difference to PyTorch in double precision, relative to the largest output."
    )
    if marked := sorted({row["contender"] for row in rows if row["precision"] != "float32"}):
        lines.append(f"{', '.join(marked)}: another precision than float32.")
    return lines
