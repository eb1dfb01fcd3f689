"""What runs how: the rows of ``Runtime.explain`` and ``Runtime.profile``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """One layer or operation.

    Args:
        layer: Its name.
        how: ``"sparse"`` and ``"dense"`` run in the runtime, ``"torch"`` in PyTorch.
        kept: How many of its weights are not zero; None for an operation without weights.
        weights: How many weights it has.
        why: Why PyTorch computes it; else empty.
        kernel: What computes it.
        bytes: The memory of its index list.
        milliseconds: The time of one call, if it was measured.
        gflops: Billions of operations on kept weights in a second, if it was measured.

    """

    layer: str
    how: Literal["sparse", "dense", "torch"]
    kept: int | None = None
    weights: int | None = None
    why: str = ""
    kernel: str = ""
    bytes: int = 0
    milliseconds: float | None = None
    gflops: float | None = None


@dataclass(frozen=True)
class Explanation:
    """The rows of a network. ``print`` shows them as a table."""

    rows: tuple[Row, ...]
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        timed = any(row.milliseconds is not None for row in self.rows)
        head = ["layer", "runs", "kept", "kernel", "bytes"] + (["ms", "GF/s"] if timed else [])
        table = [[*head, "why"], *(_cells(row, timed) for row in self.rows)]
        return "\n".join([*_aligned(table), *self.remarks])


def _cells(row: Row, timed: bool) -> list[str]:
    kept = "" if row.kept is None else f"{row.kept:,} of {row.weights:,}"
    cells = [row.layer, row.how, kept, row.kernel, f"{row.bytes:,}" if row.bytes else ""]
    if timed:
        cells.append("" if row.milliseconds is None else f"{row.milliseconds:.3f}")
        cells.append("" if row.gflops is None else f"{row.gflops:.0f}")
    return [*cells, row.why]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
