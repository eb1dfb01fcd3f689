"""The changes of the support so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from acdc.schedule import Kind
from acdc.support import Support


@dataclass(frozen=True)
class Change:
    """One change of the support.

    Args:
        step: Executed steps when it happened.
        to: The kind of phase it began.
        nnz: Prunable weights kept from here on.
        churn: Share of mask bits that differ from the previous sparse support; ``None`` where
            there was none, and on the way to dense.
        regrown: Weights kept now that the previous sparse support did not keep; ``None`` likewise.
        counts: Kept weights by name; ``None`` on the way to dense.
    """

    step: int
    to: Kind
    nnz: int
    churn: float | None
    regrown: int | None
    counts: dict[str, int] | None


class Changes:
    """Every change of the support, and the last sparse one, which the next is compared with."""

    def __init__(self) -> None:
        self.all: tuple[Change, ...] = ()
        self.last_sparse: Support | None = None

    def note(self, step: int, to: Kind, support: Support) -> None:
        """Add the change to ``support`` after ``step`` executed steps."""
        before = None if to == "dense" else self.last_sparse
        self.all += (
            Change(
                step=step,
                to=to,
                nnz=support.nnz,
                churn=None if before is None else support.churn(before),
                regrown=None if before is None else support.regrown(before),
                counts=None if to == "dense" else support.counts(),
            ),
        )
        if to == "sparse":
            self.last_sparse = support

    def state(self) -> list[dict[str, Any]]:
        """Return the changes as plain values, for a checkpoint."""
        return [asdict(change) for change in self.all]

    def load(self, state: Iterable[Mapping[str, Any]], last_sparse: Support | None) -> None:
        """Take over what :meth:`state` returned."""
        self.all = tuple(Change(**change) for change in state)
        self.last_sparse = last_sparse
