"""The tables of the report: their rows, and the format of numbers.

Every cell keeps the exact number beside its text, so that programs can read the page, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from acdc.pages.history import Run, Steps
from acdc.schedule import Phase


class Cell(NamedTuple):
    """The shown ``text`` of a cell, times 10 to ``power``, and the exact number."""

    text: str
    value: Any = None
    power: int | None = None


NONE = Cell("–")

# Measures of a network: name, label, digits, unit of a difference. Bits for text alone.
MEASURES = (
    ("accuracy", "Test accuracy, %", 2, "points"),
    ("bits", "Bits of a character", 3, "bits"),
)


class Row(NamedTuple):
    """A line of a table."""

    label: str
    cells: tuple[Cell, ...]
    kind: str = ""


def percent(share: float, digits: int = 2) -> str:
    """Write a share in percent, with the thin space that does not break."""
    return f"{100 * share:.{digits}f}\u202f%"


def plural(count: int, noun: str) -> str:
    """Write a count and its noun, in the plural unless the count is 1."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _count(value: Any) -> Cell:
    return NONE if value is None else Cell(f"{int(value):,}", int(value))


def _share(value: Any, digits: int = 2) -> Cell:
    return NONE if value is None else Cell(percent(float(value), digits), value)


def _flops(value: Any) -> Cell:
    """Write three significant digits and a power of ten; small numbers in full."""
    if value is None:
        return NONE
    if abs(value) < 1e5:
        return Cell(f"{round(value):,}", round(value))
    mantissa, power = f"{value:.2e}".split("e")
    return Cell(f"{mantissa} × 10", round(value), int(power))


def one_power(rows: Sequence[Row], *columns: int) -> tuple[list[Row], int | None]:
    """Write the numbers of these columns as multiples of one power of ten, and return the power.

    Numbers below each other can then be compared by eye.
    """
    values = [v for row in rows for c in columns if (v := row.cells[c].value)]
    if not values or max(values) < 1e5:
        return list(rows), None
    power = math.floor(math.log10(max(values)))
    digits = min(3, max(2, 1 + power - math.floor(math.log10(min(values)))))

    def scaled(row: Row) -> Row:
        cells = list(row.cells)
        for c in columns:
            if (value := cells[c].value) is not None:
                cells[c] = Cell(f"{value / 10**power:.{digits}f}", value)
        return row._replace(cells=tuple(cells))

    return [scaled(row) for row in rows], power


def _seconds(value: Any) -> Cell:
    if value is None:
        return NONE
    return Cell(f"{value:,.1f}", round(float(value), 6))


def _reached(*networks: Any) -> list[Row]:
    """Return rows with the quality on the test data, and the difference of two networks."""
    rows = []
    for name, label, digits, unit in MEASURES:
        if name not in networks[0]:
            continue
        values = [network[name] for network in networks]
        cells = [Cell(f"{value:.{digits}f}", value) for value in values]
        if len(values) == 2:
            gap = values[0] - values[1]
            sign = "+" if gap > 0 else "−" if gap < 0 else "±"
            difference = Cell(f"{sign}{abs(gap):.{digits}f} {unit}", round(gap, 6))
            cells.append(difference if math.isfinite(gap) else NONE)
        rows.append(Row(label, tuple(cells)))
    return rows


def twins(run: Run) -> list[Row]:
    """Table 1: a column for each trained network; a third column compares two networks."""
    networks, details = run.networks, run.details
    if not networks:
        return []
    sparse = networks.get("sparse")
    prunable = details.get("prunable", run.prunable)
    both = len(networks) == 2

    def row(label: str, of_sparse: Cell, of_dense: Cell, sparse_to_dense: Cell = NONE) -> Row:
        cells = {"sparse": of_sparse, "dense": of_dense}
        columns = [cells[twin] for twin in networks]
        return Row(label, (*columns, *([sparse_to_dense] if both else [])))

    rows = _reached(*networks.values())
    if sparse is not None:
        asked, whole = details.get("sparsity_asked"), details.get("sparsity_all_parameters")
        kept = sparse["nnz"] / prunable if prunable else None
        rows += [
            row("Sparsity asked for", _share(asked), NONE),
            row("Sparsity of the prunable weights", _share(sparse["sparsity"]), _share(0)),
            row("Sparsity of all parameters", _share(whole), _share(0)),
            row("Prunable weights kept", _count(sparse["nnz"]), _count(prunable), _share(kept)),
        ]
    else:
        rows += [
            row("Parameters", NONE, _count(details.get("parameters"))),
            row("Weights of convolutions and linear layers", NONE, _count(run.weights)),
        ]
    size = {twin: network["bytes"] for twin, network in networks.items()}
    small = size["sparse"] / size["dense"] if both and size["dense"] else None
    ratio = run.record["inference_flops_ratio"] if run.record else None
    return [
        *rows,
        row(
            "Size on disk, bytes",
            _count(size.get("sparse")),
            _count(size.get("dense")),
            _share(small),
        ),
        row(
            "FLOPs of one inference",
            _flops(details.get("sparse_flops")),
            _flops(details.get("dense_flops")),
            _share(ratio),
        ),
    ]


class Stretch(NamedTuple):
    """Steps of one kind, and their cost."""

    steps: int
    flops: float | None  # of training
    share: float | None  # of training densely for the same steps
    seconds: float | None
    measured: int  # steps with a time


def _stretch(run: Run, phases: Sequence[Phase]) -> Stretch:
    """Return the cost of these phases, up to the last step of the run."""
    spans = [(phase.start, min(phase.stop, run.reached)) for phase in phases]
    starts = {phase.start for phase in phases}
    costs = [cost for cost in run.ledger.phases if cost.start in starts] if run.ledger else []
    flops, dense = sum(cost.flops for cost in costs), sum(cost.dense_flops for cost in costs)
    return Stretch(
        sum(max(0, stop - start) for start, stop in spans),
        flops if costs else None,
        flops / dense if dense else None,
        *_measured(run.steps, spans),
    )


def _fine_tuning(run: Run) -> Stretch:
    """Return the cost of fine-tuning the dense twin."""
    last = run.schedule.last("dense") if run.schedule is not None else None
    span = (last.stop if last is not None else 0, int(run.branch.step[-1]))
    flops = run.details.get("finetune_flops")
    share = None if flops is None else 1.0
    return Stretch(span[1] - span[0], flops, share, *_measured(run.branch, [span]))


def _measured(steps: Steps, spans: Sequence[tuple[int, int]]) -> tuple[float | None, int]:
    """Return the seconds of the steps in these spans, and the number of steps that have a time."""
    times = np.concatenate([np.empty(0), *(steps.seconds[steps.within(a, b)] for a, b in spans)])
    measured = int((~np.isnan(times)).sum())
    return float(np.nansum(times)) if measured else None, measured


def _stretch_cells(stretch: Stretch) -> tuple[Cell, ...]:
    mean = stretch.seconds / stretch.measured if stretch.seconds and stretch.measured else None
    return (
        _flops(stretch.flops),
        _share(stretch.share, 1),
        _seconds(stretch.seconds),
        NONE if mean is None else Cell(f"{1000 * mean:,.1f}", round(1000 * mean, 6)),
    )


def ledger(run: Run) -> list[Row]:
    """Table 2: the cost of training, by kind of phase."""
    if run.schedule is None or not run.reached:
        return []
    rows = []
    for kind in ("dense", "sparse"):
        if mine := [phase for phase in run.schedule.phases if phase.kind == kind]:
            stretch = _stretch(run, mine)
            label = f"{kind.capitalize()} phases"
            rows.append(Row(label, (_count(stretch.steps), *_stretch_cells(stretch)), kind))
    total = _stretch(run, run.schedule.phases)
    rows.append(Row("Training", (_count(total.steps), *_stretch_cells(total)), "total"))
    if len(run.branch):
        stretch = _fine_tuning(run)
        rows.append(
            Row("Fine-tuning of the dense twin", (_count(stretch.steps), *_stretch_cells(stretch)))
        )
    tests = [e["seconds"] for e in (*run.evals, *run.branch_evals) if e.get("seconds") is not None]
    if tests:
        rows.append(Row("Evaluation", (NONE, NONE, NONE, _seconds(sum(tests)), NONE)))
    built = [e["seconds"] for e in run.engines if e.get("seconds") is not None]
    if built:
        rows.append(Row("Building of the engine", (NONE, NONE, NONE, _seconds(sum(built)), NONE)))
    if run.record is not None and run.record.get("seconds") is not None:
        whole = _seconds(run.record["seconds"])
        rows.append(Row("Whole run, by the clock", (NONE, NONE, NONE, whole, NONE), "total"))
    return rows


def engine(run: Run) -> list[Row]:
    """The engine's timings of each layer, in milliseconds, and its choice."""

    def time(value: Any) -> Cell:
        return NONE if value is None else Cell(f"{value:.2f}", round(float(value), 6))

    return [
        Row(
            choice["name"],
            (
                _share(choice["density"]),
                time(choice["dense_ms"]),
                time(choice["sparse_ms"]),
                time(choice["convert_ms"]),
                Cell("sparse" if choice["sparse"] else "dense"),
            ),
        )
        for choice in run.engine.get("choices", ())
    ]


def phases(run: Run) -> list[Row]:
    """Table 3: the schedule, phase by phase, with the cost of each phase."""
    if run.schedule is None:
        return []
    rows = []
    texts = run.schedule.rows()
    for phase, (kind, epochs, steps, share) in zip(run.schedule.phases, texts, strict=True):
        nnz: int | None = None if phase.kind == "sparse" else run.prunable
        for change in run.compressions:
            if phase.start <= change["step"] < phase.stop:
                nnz = int(change["nnz"])
        density = nnz / run.prunable if nnz is not None and run.prunable else None
        cells = (
            Cell(epochs),
            Cell(steps),
            Cell(share.replace(" %", "\u202f%")),
            _share(density),
        )
        cost = _stretch_cells(_stretch(run, [phase]))
        rows.append(Row(kind, (*cells, *cost), kind))
    return rows


def compressions(run: Run) -> list[Row]:
    """The changes to a sparse support: epoch, step, weights kept, changed, regrown."""
    return [
        Row(
            f"{i}",
            (
                Cell(f"{float(run.epochs(c['step'])):.4g}"),
                _count(c["step"]),
                _count(c["nnz"]),
                _share(c["churn"], 3),
                _count(c.get("regrown")),
            ),
        )
        for i, c in enumerate(run.compressions if run.schedule is not None else [], 1)
    ]


def layers(run: Run) -> list[Row]:
    """The layers: shape, weights, kept, density, FLOPs of one inference dense and sparse."""
    return [
        Row(
            short(layer.name),
            (
                Cell(" × ".join(str(n) for n in layer.shape)),
                _count(layer.numel),
                _count(layer.nnz),
                _share(layer.density),
                _flops(None if layer.positions is None else 2 * layer.numel * layer.positions),
                _flops(
                    None
                    if layer.positions is None or layer.nnz is None
                    else 2 * layer.nnz * layer.positions
                ),
            ),
            "" if layer.prunable else "kept",
        )
        for layer in run.layers
    ]


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of nested values; the path of a part has its type as value."""
    if isinstance(value, Mapping) and value:
        if "type" in value and path:
            yield path, value["type"]
        for key, inner in value.items():
            if key != "type":
                yield from _flatten(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def values(run: Run) -> list[Row]:
    """The values of the recipe; a value that differs from the default has the kind "changed"."""
    changed = run.recipe.get("changed") or {}

    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    def differs(path: str) -> bool:
        return any(path == c or path.startswith(f"{c}.") for c in changed)

    return [
        Row(path, (Cell(text(value)),), "changed" if differs(path) else "")
        for path, value in _flatten(run.recipe.get("values") or {})
    ]


def training(run: Run) -> tuple[Cell, Cell, str] | None:
    """Training FLOPs of the run that made both twins, their share of dense training, and a note."""
    if run.record is None:
        return None
    note = "Of dense training for the same number of steps."
    if len(run.branch):
        note += " Fine-tuning the dense twin is not included."
    share = run.record.get("train_flops_ratio")
    return _flops(run.details.get("train_flops")), _share(share), note


def short(name: str) -> str:
    """Return the name of the layer that the parameter ``name`` is the weight of."""
    return name.removesuffix(".weight")
