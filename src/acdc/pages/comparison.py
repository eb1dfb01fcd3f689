"""The page of a comparison: accuracy against sparsity and against what it costs, and every cell.

Like the report of a run the page holds its figures and its style, loads nothing from the network
and runs no script. If the comparison is unfinished or has failed cells, the page shows the other
cells and a notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from acdc.compare import results
from acdc.compare.grid import Budget, Grid
from acdc.compare.results import Json, Outcome
from acdc.index import Twin
from acdc.pages.figure import (
    DENSE,
    GREY,
    INK,
    SHADE,
    SPARSE,
    Form,
    Plate,
    entry,
    environment,
    height_with_legend,
    legend,
    plate,
    publish,
)
from acdc.pages.paired import Paired, against_baseline, against_dense
from acdc.pages.tables import percent, plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BUDGETS: dict[Budget, str] = {
    "epochs": "equal epochs",
    "flops": "equal training FLOPs",
    "seconds": "equal measured seconds",
}

# Dark enough to be read on white. Methods that share a hue have different markers.
HUES = ("#2a7f62", "#8a4f9e", "#a6761d", "#c2407a", "#3a8fb7", "#6b4a2b", "#4d5d8c", "#5f7f1f")
MARKERS = "osD^vPX<>p*h"


@dataclass(frozen=True)
class Mean:
    """All seeds of one method at one sparsity and one budget.

    Args:
        method: Name of the method.
        sparsity: The sparsity asked for.
        budget: Unit of the length of the runs.
        sparse: Whether the networks are sparse. DSD has a sparsity, and its networks are dense.
        qualities: Qualities of the seeds that have finished.
        dense: Qualities of the dense twins, if there are any.
        seeds: Number of cells, failed ones included.
        costs: Means over the seeds: ``"train_flops_ratio"``, ``"inference_flops_ratio"``,
            ``"seconds"``, ``"epochs"``, ``"sparsity_reached"``.
    """

    method: str
    sparsity: float
    budget: Budget
    sparse: bool
    qualities: tuple[float, ...]
    dense: tuple[float, ...]
    seeds: int
    costs: Mapping[str, float]

    @property
    def quality(self) -> float:
        """The mean over the seeds."""
        return fmean(self.qualities)


COLUMNS = 5  # of a legend, at most

COSTS = {
    "train_flops_ratio": ("train", "training FLOPs, share of the dense run"),
    "seconds": ("seconds", "training, measured seconds"),
    "inference_flops_ratio": ("inference", "FLOPs of an inference, share of dense"),
}


def render(folder: Path, grid: Grid, outcomes: Sequence[Outcome]) -> Path:
    """Write ``report.html`` into the folder of a comparison and return its path.

    Args:
        folder: The folder.
        grid: The grid of the comparison.
        outcomes: The outcome of every cell.

    Raises:
        MissingDependency: matplotlib or jinja2 is not installed.
        InputError: The folder cannot be written.
    """
    return publish(folder / "report.html", page(grid, outcomes, _remarks(folder)))


def _remarks(folder: Path) -> str:
    """Return the author's remarks on the results, from a file in the same folder."""
    path = folder / "remarks.md"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def page(grid: Grid, outcomes: Sequence[Outcome], remarks: str = "") -> str:
    """Return the page as the text of an HTML file.

    Args:
        grid: The grid of the comparison.
        outcomes: The outcome of every cell.
        remarks: The author's remarks on the results: paragraphs between empty lines, with names and
            commands in backticks.
    """
    found = means(grid, outcomes)
    fronts = {cost: front(found, cost) for cost in COSTS}
    look = _Look(grid)
    template = environment().get_template("compare.html.jinja")
    return template.render(
        grid=grid,
        budgets=BUDGETS,
        colours={"dense": DENSE, "sparse": SPARSE, "shade": SHADE, "ink": INK, "grey": GREY},
        look=look,
        quality=look.quality,
        summary=_summary(grid, outcomes),
        remarks=paragraphs(remarks),
        verdicts=_verdicts(grid, found, look),
        notices=_notices(grid, outcomes),
        plates=[
            *(_by_sparsity(grid, found, budget, look) for budget in grid.budgets),
            *(_by_cost(found, cost, fronts[cost], look) for cost in COSTS),
        ],
        rows=[_mean_row(mean, found, fronts, look) for mean in found],
        baseline=None if grid.baseline is None else look.labels[grid.baseline],
        paired=[_paired_row(each, look) for each in against_baseline(grid, outcomes)],
        twins=[_paired_row(each, look) for each in against_dense(grid, outcomes)],
        needs=_needs(grid, outcomes),
        cells=[_cell_row(outcome, look) for outcome in outcomes],
        origin=_origin(grid, outcomes),
        command=_command(outcomes),
    )


def paragraphs(text: str) -> list[list[str]]:
    """Return the paragraphs of a text, split at backticks: every second part is a name.

    >>> paragraphs("See `acdc list`.\\n\\nOne\\nline.")
    [['See ', 'acdc list', '.'], ['One line.']]
    """
    joined = (" ".join(part.split("\n")) for part in text.strip().split("\n\n"))
    return [part.strip().split("`") for part in joined if part.strip()]


# --- means and fronts ---------------------------------------------------------------------------


def means(grid: Grid, outcomes: Iterable[Outcome]) -> list[Mean]:
    """Return the means over the seeds, in the order of the grid, without empty ones."""
    groups: dict[tuple[Budget, float, str], list[Outcome]] = {}
    for outcome in outcomes:
        cell = outcome.cell
        if cell.budget != "beforehand":
            groups.setdefault((cell.budget, cell.sparsity, cell.method), []).append(outcome)
    rank = {method.name: number for number, method in enumerate(grid.methods)}
    found = []
    for (budget, sparsity, method), cells in groups.items():
        rows = [outcome.row for outcome in cells if outcome.row is not None]
        if rows:
            costs = {
                cost: fmean(row[cost] for row in rows)
                for cost in (*COSTS, "epochs", "sparsity_reached")
                if cost != "seconds"
            }
            costs["seconds"] = fmean(_seconds(outcome) for outcome in cells if outcome.row)
            sparse = any("sparse" in _qualities(row) for row in rows)
            found_dense = [_qualities(row).get("dense") for row in rows if sparse]
            twins = tuple(quality for quality in found_dense if quality is not None)
            values = tuple(map(_quality, rows))
            found.append(Mean(method, sparsity, budget, sparse, values, twins, len(cells), costs))
    budgets = list(BUDGETS)
    return sorted(
        found, key=lambda m: (budgets.index(m.budget), m.sparse, m.sparsity, rank[m.method])
    )


def _seconds(outcome: Outcome) -> float:
    assert outcome.row is not None
    return results.seconds(outcome.row, outcome.origin)


def _qualities(row: Json) -> dict[Twin, float]:
    """Return the qualities of the networks that a cell left: one or two of them."""
    twins: tuple[Twin, ...] = ("sparse", "dense")
    values = {twin: row[f"{twin}_quality"] for twin in twins}
    return {twin: float(value) for twin, value in values.items() if value is not None}


def _quality(row: Json) -> float:
    """Return the quality of the sparse network if a cell left one, else of the dense one."""
    return next(iter(_qualities(row).values()))


def front(found: Sequence[Mean], cost: str) -> list[Mean]:
    """Return the Pareto front: the means that no other mean dominates in quality and cost.

    The front is sorted by rising cost. Two means of equal quality and equal cost are both on it.
    """

    def beaten(one: Mean) -> bool:
        return any(
            other.quality >= one.quality
            and other.costs[cost] <= one.costs[cost]
            and (other.quality > one.quality or other.costs[cost] < one.costs[cost])
            for other in found
        )

    return sorted((m for m in found if not beaten(m)), key=lambda m: (m.costs[cost], m.quality))


def window(found: Sequence[Mean]) -> tuple[float, float, int]:
    """Return start and end of the quality axis, and the number of means below it.

    The axis leaves out means that are less than half as good as the best one: a network that
    collapsed. They would take the height that the differences between the other means need.
    """
    best = max(mean.quality for mean in found)
    least = best / 2 if best > 0 else 2 * best
    shown = [mean for mean in found if mean.quality >= least]
    low, high = (pick(pick(m.qualities) for m in shown) for pick in (min, max))
    margin = 0.08 * (high - low) or 0.01 * abs(high)
    return low - margin, high + margin, len(found) - len(shown)


# --- colours, markers, number formats -----------------------------------------------------------


class _Look:
    """Names, colours, markers and numbers of a grid."""

    def __init__(self, grid: Grid) -> None:
        self.labels = {"dense": "Dense"} | {m.name: m.label for m in grid.methods}
        others = [m.name for m in grid.methods if m.name not in ("dense", "acdc")]
        self.colours = {"dense": DENSE, "acdc": SPARSE} | {
            name: HUES[i % len(HUES)] for i, name in enumerate(others)
        }
        self.markers = {"dense": "s", "acdc": "o"} | {
            name: MARKERS[(i + 2) % len(MARKERS)] for i, name in enumerate(others)
        }
        bits = results.quality(grid.task) == "bits"
        held = bool(grid.task.recipe.data.validation)
        self.quality = "−bits per character" + " of the validation split" * held
        if not bits:
            self.quality = f"{'validation' if held else 'test'} accuracy, %"
        self.digits = 3 if bits else 2

    def number(self, value: float) -> str:
        """Write a quality."""
        return f"{value:.{self.digits}f}".replace("-", "−")

    def signed(self, value: float) -> str:
        """Write a difference of qualities, with its sign."""
        return f"{value:+.{self.digits}f}".replace("-", "−")

    def spread(self, values: Sequence[float]) -> str:
        """Write a mean, and lowest and highest where there are several."""
        mean = self.number(fmean(values))
        if len(values) == 1:
            return mean
        return f"{mean} ({self.number(min(values))} to {self.number(max(values))})"

    def sparsity(self, value: float) -> str:
        """Write a sparsity that was asked for."""
        return f"{100 * value:g}\u202f%" if value else "–"

    def keys(self, names: Iterable[str]) -> list[Any]:
        """Return the legend's entries of these methods."""
        return [
            entry(self.colours[name], self.labels[name], marker=self.markers[name], markersize=4.5)
            for name in names
        ]


# --- figures ------------------------------------------------------------------------------------


def _by_sparsity(grid: Grid, found: Sequence[Mean], budget: Budget, look: _Look) -> Plate:
    name = f"sparsity{list(BUDGETS).index(budget)}"
    what = "Bits per character" if look.digits == 3 else "Accuracy"
    heading = f"{what} against sparsity, {BUDGETS[budget]}"
    mine = [mean for mean in found if mean.budget == budget and mean.sparse]
    dense = [mean for mean in found if mean.budget == budget and not mean.sparse]
    if not mine:
        return Plate(name, heading, absent="No cell of a sparse network has finished.")
    positions = {s: i for i, s in enumerate(sorted({mean.sparsity for mean in mine}))}
    methods = [m.name for m in grid.methods if any(mean.method == m.name for mean in mine)]
    bottom, top, hidden = window([*mine, *dense])
    several = any(len(mean.qualities) > 1 for mean in (*mine, *dense))

    def draw(figure: Figure, form: Form) -> None:
        axes = figure.subplots()
        for across in dense:
            low, high = min(across.qualities), max(across.qualities)
            colour = look.colours[across.method]
            axes.axhspan(low, high, facecolor=colour, alpha=0.12, edgecolor="none", zorder=0)
            axes.axhline(across.quality, color=colour, linewidth=1.1, zorder=1)
        for i, method in enumerate(methods):
            points = sorted((m for m in mine if m.method == method), key=lambda m: m.sparsity)
            # Side by side: the spreads of methods that are close would hide one another.
            aside = min(0.05, 0.9 / len(methods)) * (i - (len(methods) - 1) / 2)
            _line(axes, points, [positions[m.sparsity] + aside for m in points], look, filled=True)
        axes.set_xticks(list(positions.values()), [look.sparsity(s) for s in positions])
        axes.set_xlim(-0.5, len(positions) - 0.5)
        axes.set_ylim(bottom, top)
        axes.set_xlabel("sparsity")
        axes.set_ylabel(look.quality)
        lines = [entry(look.colours[m.method], look.labels[m.method]) for m in dense]
        legend(axes, [*look.keys(methods), *lines], form, COLUMNS)

    caption = "Mean over the seeds; bars reach from the lowest seed to the highest." * several
    caption = caption or "One seed."
    if dense:
        line = "A line across is a dense network" if len(dense) > 1 else "The line across is dense"
        caption += f" {line}{', its band the seeds' * several}."
    caption += _hidden(hidden)
    if budget != "epochs":
        what = "takes" if budget == "seconds" else "spends"
        caption += (
            f" Each method trains until it has {'taken' if budget == 'seconds' else 'spent'} what "
            f"the dense run {what}, but no longer than {grid.longest:g} times its epochs."
        )
    heights = height_with_legend(
        [look.labels[m] for m in (*methods, *(m.method for m in dense))], COLUMNS
    )
    return plate(name, heading, caption, draw, heights)


def _by_cost(found: Sequence[Mean], cost: str, best: Sequence[Mean], look: _Look) -> Plate:
    name, axis = COSTS[cost]
    what = "Bits per character" if look.digits == 3 else "Accuracy"
    heading = f"{what} against {axis.split(',')[0]}"
    if name == "seconds":
        heading = f"{what} against measured seconds"
    if not found:
        return Plate(name, heading, absent="No cell has finished.")
    groups: dict[tuple[str, Budget], list[Mean]] = {}
    for mean in found:
        groups.setdefault((mean.method, mean.budget), []).append(mean)
    methods = list(dict.fromkeys(method for method, _ in groups))
    bottom, top, hidden = window(found)
    both = len({budget for _, budget in groups}) > 1

    def draw(figure: Figure, form: Form) -> None:
        axes = figure.subplots()
        x = [m.costs[cost] for m in best]
        axes.plot(x, [m.quality for m in best], color=SHADE, linewidth=7, zorder=0)
        axes.plot(
            x, [m.quality for m in best], color=INK, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1
        )
        for (_, budget), points in groups.items():
            points = sorted(points, key=lambda m: m.sparsity)
            _line(axes, points, [m.costs[cost] for m in points], look, filled=budget == "epochs")
        if form == "wide" and len(found) <= 40:
            for mean in (m for m in best if m.quality > bottom):
                axes.annotate(
                    look.sparsity(mean.sparsity) if mean.sparse else "dense",
                    (mean.costs[cost], mean.quality), xytext=(5, -9), textcoords="offset points",
                    fontsize=7, color=GREY,
                )  # fmt: skip
        values = [m.costs[cost] for m in found]
        if min(values) > 0 and max(values) > 6 * min(values):
            _log(axes)
        axes.set_ylim(bottom, top)
        axes.set_xlabel(axis)
        axes.set_ylabel(look.quality)
        front_key = entry(INK, "Pareto front", linewidth=0.8, linestyle=(0, (2, 2)))
        legend(axes, [*look.keys(methods), front_key], form, COLUMNS)

    caption = (
        f"A point is the mean over the seeds of one method at one sparsity; bars reach from the "
        f"lowest seed to the highest. The dashed line is the Pareto front: no point is both better "
        f"and cheaper than {'one' if len(best) == 1 else 'those'} on it; sparsities are written "
        f"beside {'it' if len(best) == 1 else 'them'}."
    )
    if both:
        caption += " Filled: equal epochs; open: equal training FLOPs."
    caption += _hidden(hidden)
    if name != "inference":
        caption += " What a method needs beforehand is included."
    heights = height_with_legend([look.labels[name] for name in methods], COLUMNS)
    return plate(name, heading, caption, draw, heights)


def _line(
    axes: Axes, points: Sequence[Mean], x: Sequence[float], look: _Look, filled: bool
) -> None:
    """Draw one method at rising sparsities: means, spreads, and the line between the means."""
    if not points:
        return
    colour = look.colours[points[0].method]
    y = [m.quality for m in points]
    spread = [[m.quality - min(m.qualities) for m in points],
              [max(m.qualities) - m.quality for m in points]]  # fmt: skip
    axes.errorbar(
        x, y, yerr=spread, color=colour, marker=look.markers[points[0].method], markersize=4.5,
        markerfacecolor=colour if filled else "white", linewidth=0.9, elinewidth=0.8, capsize=1.8,
        zorder=3,
    )  # fmt: skip


def _hidden(count: int) -> str:
    """Return the sentence on points below the axis, if there are any."""
    if not count:
        return ""
    verb = "lies" if count == 1 else "lie"
    return f" {plural(count, 'point')}, not half as good as the best, {verb} below the axis."


def _log(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


# --- sentences and tables -----------------------------------------------------------------------


def _summary(grid: Grid, outcomes: Sequence[Outcome]) -> str:
    cells = [outcome for outcome in outcomes if outcome.cell.budget != "beforehand"]
    done = sum(outcome.row is not None for outcome in cells)
    weights = max((o.row["prunable"] for o in outcomes if o.row), default=0)
    size = f" of {weights:,} prunable weights" if weights else ""
    sparsities = ", ".join(f"{100 * s:g}" for s in grid.sparsities)
    return (
        f"{grid.task.name}: {plural(len(grid.methods), 'method')} at {sparsities}\u202f% sparsity, "
        f"{plural(len(grid.seeds), 'seed')} each, on a network{size}. The dense run takes "
        f"{plural(grid.task.epochs, 'epoch')}. {done} of {plural(len(cells), 'cell')} have "
        f"finished."
    )


def _verdicts(grid: Grid, found: Sequence[Mean], look: _Look) -> list[str]:
    """Return a sentence for each sparsity: the best method, and AC/DC's rank if it is not best."""
    sentences = []
    for budget in grid.budgets:
        mine = [m for m in found if m.budget == budget and m.sparse]
        for sparsity in sorted({m.sparsity for m in mine}):
            ranked = sorted((m for m in mine if m.sparsity == sparsity), key=lambda m: -m.quality)
            if len(ranked) < 2:
                continue
            numbers = [look.number(m.quality) for m in ranked]
            best = [m for m in ranked if look.number(m.quality) == numbers[0]]
            names = " and ".join(look.labels[m.method] for m in best)
            at = f"At {look.sparsity(sparsity)}, {BUDGETS[budget]}, {names}"
            if len(best) == 1:
                second = look.labels[ranked[1].method]
                sentences.append(
                    f"{at} is best with {numbers[0]}, before {second} with {numbers[1]}."
                )
            else:
                sentences.append(f"{at} are best, level at {numbers[0]}.")
            ours = next((m for m in ranked if m.method == "acdc"), None)
            if ours is not None and ours not in best:
                sentences[-1] += (
                    f" AC/DC does not win here: it has {look.number(ours.quality)}, place "
                    f"{ranked.index(ours) + 1} of {len(ranked)}."
                )
    return sentences


def _notices(grid: Grid, outcomes: Sequence[Outcome]) -> list[str]:
    used = dict.fromkeys(str(outcome.origin["data"]) for outcome in outcomes if outcome.origin)
    waiting = [o for o in outcomes if o.row is None and o.reason == results.NOT_YET]
    failed = [o for o in outcomes if o.row is None and o.reason != results.NOT_YET]
    sentences = []
    if set(used) - {grid.task.recipe.data.title}:
        sentences.append(f"All figures here are of {' and '.join(used)}.")
    if waiting:
        sentences.append(
            f"This comparison is not complete: {plural(len(waiting), 'cell')} of {len(outcomes)} "
            f"{'is' if len(waiting) == 1 else 'are'} still to be trained."
        )
    if failed:
        sentences.append(
            f"{plural(len(failed), 'cell')} of {len(outcomes)} without results; the table of cells "
            f"says why."
        )
    # Several cells may come to the same run.
    sentences += dict.fromkeys(
        f"{outcome.row['cell']}: {warning}"
        for outcome in outcomes
        if outcome.row is not None
        for warning in outcome.row.get("warnings", ())
    )
    return sentences


def _mean_row(
    mean: Mean, found: Sequence[Mean], fronts: Mapping[str, Sequence[Mean]], look: _Look
) -> Json:
    dense = [m for m in found if m.budget == mean.budget and m.method == "dense"]
    gap = mean.quality - dense[0].quality if dense and mean is not dense[0] else None
    costs = mean.costs
    return {
        "method": look.labels[mean.method],
        "kind": {"dense": "dense", "acdc": "sparse"}.get(mean.method, ""),
        "budget": BUDGETS[mean.budget],
        "cells": [
            look.sparsity(mean.sparsity) + ", then dense" * (mean.sparsity > 0 and not mean.sparse),
            f"{costs['epochs']:g}",
            f"{len(mean.qualities)} of {mean.seeds}",
            look.spread(mean.qualities),
            "–" if gap is None else f"{'+' if gap > 0 else ''}{look.number(gap)}",
            look.spread(mean.dense) if mean.dense else "–",
            percent(costs["train_flops_ratio"], 1) + "◆" * (mean in fronts["train_flops_ratio"]),
            percent(costs["inference_flops_ratio"], 1)
            + "◆" * (mean in fronts["inference_flops_ratio"]),
            f"{costs['seconds']:,.1f}" + "◆" * (mean in fronts["seconds"]),
        ],
    }


def _paired_row(paired: Paired, look: _Look) -> Json:
    interval, verdict = paired.interval, "–"
    if interval is not None:
        low, high = interval
        verdict = "better" if low > 0 else "worse" if high < 0 else "not told apart"
    return {
        "method": look.labels[paired.method],
        "kind": "sparse" if paired.method == "acdc" else "",
        "budget": BUDGETS[paired.budget],
        "other": look.labels[paired.baseline],
        "cells": [
            look.sparsity(paired.sparsity),
            str(len(paired.differences)),
            look.signed(paired.mean),
            "–" if interval is None else " to ".join(map(look.signed, interval)),
            verdict,
        ],
    }


def _cell_row(outcome: Outcome, look: _Look) -> Json:
    cell, row = outcome.cell, outcome.row
    budget = f"beforehand, {cell.epochs} epochs"
    shown = {
        "method": look.labels[cell.method],
        "first": [
            look.sparsity(cell.sparsity),
            str(cell.seed),
            budget
            if cell.budget == "beforehand"
            else BUDGETS[cell.budget].replace("training ", ""),
        ],
        "label": outcome.run.label.rpartition("-")[2] if outcome.run else "–",
        "reason": outcome.reason,
        "cells": [],
    }
    if row is None:
        return shown

    qualities = _qualities(row)

    def number(twin: Twin) -> str:
        return look.number(qualities[twin]) if twin in qualities else "–"

    return shown | {
        "cells": [
            str(row["epochs"]),
            f"{100 * row['sparsity_reached']:.2f}\u202f%" if "sparse" in qualities else "–",
            number("sparse"),
            number("dense"),
            percent(row["train_flops_ratio"]),
            percent(row["inference_flops_ratio"]),
            f"{_seconds(outcome):,.1f}",
        ]
    }


def _needs(grid: Grid, outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    needs = results.needs(grid, outcomes)
    rows = []
    for method in grid.methods:
        need = needs.get(method.name)
        text = "Nothing: it starts from fresh weights."
        if need is not None:
            text = (
                f"A dense network trained for {plural(need['epochs'], 'epoch')} with the same "
                f"seed, {percent(need['ratio'], 1)} of the FLOPs of the dense run. It is trained "
                f"once for all cells that start from it; each counts it in full."
            )
        rows.append((method.label, text))
    return rows


def _origin(grid: Grid, outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """Return data, machine, versions and dates of the cells; every value that occurs."""
    origins = [outcome.origin for outcome in outcomes if outcome.origin]
    rows = [("Grid", grid.name)]
    parts: tuple[tuple[str, Callable[[Json], str]], ...] = (
        ("Data", lambda d: str(d["data"])),
        ("Machine", lambda d: ", ".join(f"{k} {v}" for k, v in d["machine"].items())),
        ("Versions", lambda d: ", ".join(f"{k} {v}" for k, v in d["versions"].items())),
        ("Device", lambda d: str(d["device"])),
    )
    for label, of in parts:
        if values := dict.fromkeys(map(of, origins)):
            rows.append((label, "; ".join(values)))
    if when := sorted(str(outcome.row["finished"]) for outcome in outcomes if outcome.row):
        rows.append(("Finished", f"{when[0]} to {when[-1]}"))
    return rows


def _command(outcomes: Sequence[Outcome]) -> str | None:
    commands = [outcome.origin["command"] for outcome in outcomes if outcome.origin]
    return str(commands[-1]) if commands else None
