"""A table of what is pruned, and of what is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from acdc.methods.base import Method
from acdc.schedule import Phase
from acdc.support import Support

_SHOWN = 4  # refused names of one reason, at most


class Summarised(Protocol):
    """What a summary reads: a sparsifier."""

    step: int
    method: Method[Any]
    model: nn.Module
    refused: dict[str, str]

    @property
    def phase(self) -> Phase:
        """The phase of the next step."""

    @property
    def params(self) -> Mapping[str, Tensor]:
        """The prunable weights by name."""

    @property
    def support(self) -> Support:
        """The support now."""


def headline(sparsifier: Summarised) -> str:
    """Return a line: method, step, phase and support."""
    total = sparsifier.method.resolved.total
    return (
        f"Sparsifier({sparsifier.method.name}, step {sparsifier.step} of {total}, "
        f"{sparsifier.phase.kind}, {sparsifier.support})"
    )


def summary(sparsifier: Summarised) -> str:
    """Return a table of plain text: every pruned weight, the shares of zeros, and what is refused.

    Args:
        sparsifier: Of which the support is shown as it is now.
    """
    counts, support = sparsifier.support.counts(), sparsifier.support
    every = sum(param.numel() for param in sparsifier.model.parameters())
    zeros = support.numel - support.nnz
    rows = [("layer", "shape", "kept", "sparsity")]
    rows += [
        _row(name, "×".join(map(str, weight.shape)), counts[name], weight.numel())
        for name, weight in sparsifier.params.items()
    ]
    rows.append(_row("prunable weights", "", support.nnz, support.numel))
    rows.append(_row("all parameters", "", every - zeros, every))
    lines = [headline(sparsifier), "", *_table(rows)]
    if sparsifier.refused:
        lines += ["", "Not pruned:", *_reasons(sparsifier)]
    return "\n".join(lines)


def _row(name: str, shape: str, kept: int, numel: int) -> tuple[str, str, str, str]:
    share = 100 * (1 - kept / numel) if numel else 0.0
    return name, shape, f"{kept:,} of {numel:,}", f"{share:.2f} %"


def _table(rows: list[tuple[str, str, str, str]]) -> Iterable[str]:
    width = [max(len(row[column]) for row in rows) for column in range(4)]
    for name, shape, kept, share in rows:
        yield (
            f"{name:{width[0]}}  {shape:{width[1]}}  {kept:>{width[2]}}  {share:>{width[3]}}"
        ).rstrip()


def _reasons(sparsifier: Summarised) -> Iterable[str]:
    """Yield a line for each reason, with the names that it concerns and their parameters."""
    sizes = {name: param.numel() for name, param in sparsifier.model.named_parameters()}
    reasons: dict[str, list[str]] = {}
    for name, why in sparsifier.refused.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        numel = sum(sizes[name] for name in names)
        yield f"  {', '.join(names[:_SHOWN])}{more} ({numel:,}): {why}"
