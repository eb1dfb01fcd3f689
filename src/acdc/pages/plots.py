"""The figures of a run's page: accuracy, loss, change of the support, density of the layers.

Each figure has three parts. A frozen dataclass holds the data, its method ``caption`` describes the
data, and its method ``draw`` draws the data once for each form. A figure without data is absent,
and its plate holds the reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from acdc.pages.figure import (
    DENSE,
    FAINT,
    GREY,
    INK,
    SHADE,
    SPARSE,
    Form,
    Plate,
    entry,
    legend,
    plate,
)
from acdc.pages.history import Array, Json, Layer, Run
from acdc.pages.tables import percent, plural, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 1500  # largest number of points of a line in a figure
DASHED: Any = (0, (3, 1.6))  # the dense twin's fine-tuning


def figures(run: Run) -> list[Plate]:
    """Return the figures of the page of a run."""
    return [accuracy(run), loss(run), churn(run), density(run)]


# --- Parts of several figures --------------------------------------------------------------------


def decimate(x: Array, y: Array, limit: int = POINTS) -> tuple[Array, Array]:
    """Thin a line to at most ``limit`` points: the lowest and the highest of each of equal bins.

    The outline of the line stays what it was, every spike included. ``x`` and ``y`` have the shape
    ``[points]``; a bin that is NaN throughout stays a gap.
    """
    if len(x) <= limit:
        return x, y
    edges = np.linspace(0, len(x), max(1, limit // 2) + 1).astype(int)
    low, high = np.where(np.isnan(y), np.inf, y), np.where(np.isnan(y), -np.inf, y)
    keep: list[int] = []
    for a, b in pairwise(edges):
        keep += sorted((a + int(low[a:b].argmin()), a + int(high[a:b].argmax())))
    return x[keep], y[keep]


def smooth(y: Array, window: int) -> Array:
    """Return the centred mean over ``window`` points, over fewer at the ends; NaN is left out."""
    valid = ~np.isnan(y)
    totals = np.concatenate([[0.0], np.cumsum(np.where(valid, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(valid)])
    centre = np.arange(len(y))
    first = np.maximum(centre - window // 2, 0)
    last = np.minimum(centre + (window - window // 2), len(y))
    with np.errstate(invalid="ignore"):
        mean = (totals[last] - totals[first]) / (counts[last] - counts[first])
    return np.where(valid, mean, np.nan)


def _time_axis(axes: Axes, run: Run, form: Form, label: bool = True) -> None:
    """Draw epochs along the bottom, and shade the sparse phases."""
    from matplotlib.ticker import MaxNLocator

    assert run.schedule is not None
    for phase in run.schedule.phases:
        if phase.kind == "sparse":
            start, stop = run.epochs([phase.start, phase.stop])
            axes.axvspan(start, stop, facecolor=SHADE, edgecolor="none", linewidth=0, zorder=0)
    axes.set_xlim(0, run.schedule.epochs)
    axes.xaxis.set_major_locator(MaxNLocator(10 if form == "wide" else 6, integer=True))
    axes.tick_params(labelbottom=label)
    if label:
        axes.set_xlabel("training, epochs")


def _plain_log(axes: Axes, between: bool = True) -> None:
    """Write 0.1, 1, 10 along a logarithmic axis, and 2 and 5 between them if there is room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    subs = (1.0, 2.0, 5.0) if between else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _keys(run: Run, twins: bool) -> list[Any]:
    """Return the legend's entries: only what the figure shows."""
    assert run.schedule is not None
    sparse = any(phase.kind == "sparse" for phase in run.schedule.phases)
    keys: list[Any] = [entry(DENSE, "dense phase" if sparse else "dense network")]
    if sparse:
        keys += [entry(SPARSE, "sparse phase")]
    if run.branch_evals or len(run.branch):
        keys += [entry(DENSE, "dense twin, fine-tuned", linestyle=DASHED)]
    if twins:
        ring = {"linestyle": "", "marker": "o", "markerfacecolor": "white", "markersize": 5.5}
        label = "twins of table 1" if sparse else "network of table 1"
        keys += [entry(INK if sparse else DENSE, label, **ring)]
    return keys


def _colour(kind: str) -> str:
    return SPARSE if kind == "sparse" else DENSE


def _no_clock(run: Run) -> str:
    return (
        "This run wrote no start event into metrics.jsonl, so there is no clock to draw against."
        if run.schedule is None
        else ""
    )


# --- Accuracy ------------------------------------------------------------------------------------


class _Ring(NamedTuple):
    """Marks a network of table 1."""

    epoch: float
    accuracy: float
    colour: str


@dataclass(frozen=True)
class _Accuracy:
    """Accuracy after each epoch and, in a panel below it, the sparsity.

    Args:
        run: The run.
        x: Epoch of each evaluation.
        y: Accuracy of each evaluation, in percent.
        kinds: Kind of the phase that each evaluation ends.
        branch: Epochs and accuracies of the dense twin's fine-tuning.
        rings: The networks of table 1.
        sparsity: See ``_sparsity``.
    """

    run: Run
    x: Array
    y: Array
    kinds: list[str]
    branch: tuple[Array, Array]
    rings: list[_Ring]
    sparsity: tuple[list[int], list[float]] | None

    @classmethod
    def of(cls, run: Run) -> _Accuracy:
        assert run.schedule is not None
        x, y = _curve(run, run.evals)
        branch = _curve(run, run.branch_evals)
        fork = run.schedule.last("dense")
        dense = [i for i, e in enumerate(run.evals) if fork is not None and e["step"] <= fork.stop]
        taken = (x[dense[-1]], y[dense[-1]]) if dense else None  # the evaluation of the dense twin
        if len(branch[0]) and taken:  # the branch leaves the line where the twin was taken
            branch = np.append(taken[0], branch[0]), np.append(taken[1], branch[1])
        rings: list[_Ring] = []
        if run.finished:
            if "sparse" in run.networks:
                rings.append(_Ring(x[-1], y[-1], SPARSE))
            if len(branch[0]):
                rings.append(_Ring(branch[0][-1], branch[1][-1], DENSE))
            elif taken:
                rings.append(_Ring(*taken, DENSE))
        kinds = [str(e["phase"]) for e in run.evals]
        return cls(run, x, y, kinds, branch, rings, _sparsity(run))

    @cached_property
    def floor(self) -> tuple[float, int]:
        """Start of the accuracy axis, and the number of evaluations below it.

        The first epochs of a long run climb from chance. Drawn in full they take the height that
        the differences between the phases need.
        """
        low, high = float(np.nanmin(self.y)), float(np.nanmax(self.y))
        settled = float(np.nanmin(self.y[len(self.y) // 5 :]))
        if high - low > 2.5 * (high - settled) > 0:
            low = settled - 0.15 * (high - settled)
        else:
            low -= 0.05 * max(high - low, 1.0)
        return low, int((self.y < low).sum())

    def caption(self) -> str:
        low, hidden = self.floor
        below = ""
        if hidden:
            lies = "evaluation lies" if hidden == 1 else "evaluations lie"
            below = f" (the axis starts at {low:.1f}\u202f%; {hidden} early {lies} below)"
        caption = f"Accuracy on the test set after each epoch, in percent{below}."
        if self.sparsity:
            caption = (
                f"Top: {caption[0].lower()}{caption[1:]} Bottom: share of the prunable weights "
                f"that are zero, in percent. Sparse phases are shaded."
            )
        if len(self.branch[0]):
            caption += (
                " The dashed line is the dense twin: it leaves the run at the end of the last "
                "dense phase and is trained on, densely, on the tail of the same learning-rate "
                "curve."
            )
        if len(self.rings) > 1:
            caption += " Rings mark the twins of table 1."
        elif self.rings:
            caption += " The ring marks the network of table 1."
        if self.run.details.get("bn_reestimated"):
            caption += (
                " The statistics of batch normalisation were estimated anew after training, so "
                "that table 1 may differ from the rings."
            )
        return caption

    def draw(self, figure: Figure, form: Form) -> None:
        rows = 2 if self.sparsity else 1
        panels = figure.subplots(
            rows, 1, squeeze=False, sharex=True, height_ratios=[3.2, 1][:rows]
        )[:, 0]
        self._draw_lines(panels[0])
        legend(panels[0], _keys(self.run, bool(self.rings)), form)
        _time_axis(panels[0], self.run, form, label=not self.sparsity)
        if self.sparsity:
            self._draw_sparsity(panels[1], *self.sparsity)
            _time_axis(panels[1], self.run, form)
        figure.align_ylabels()

    def _draw_lines(self, axes: Axes) -> None:
        x, y, kinds = self.x, self.y, self.kinds
        first = 0
        for kind, group in groupby(kinds[1:]):  # a line is of the kind of the phase that it ends in
            stop = first + len(list(group))
            axes.plot(x[first : stop + 1], y[first : stop + 1], color=_colour(kind), zorder=3)
            first = stop
        for kind in sorted(set(kinds)) if len(x) <= 60 else ():
            of_kind = [i for i, k in enumerate(kinds) if k == kind]
            axes.plot(x[of_kind], y[of_kind], "o", color=_colour(kind), markersize=2.6, zorder=4)
        axes.plot(*self.branch, color=DENSE, linestyle=DASHED, zorder=3)
        for ring in self.rings:
            axes.plot(
                ring.epoch, ring.accuracy, "o", markersize=5.5, markerfacecolor="white",
                color=ring.colour, zorder=5, markeredgewidth=1.3, clip_on=False,
            )  # fmt: skip
        axes.set_ylabel("test accuracy, %")
        low, _ = self.floor
        span = max(float(np.nanmax(np.append(y, self.branch[1]))) - low, 1e-3)
        axes.set_ylim(low, min(low + 1.07 * span, 100 + 0.02 * span))

    def _draw_sparsity(self, axes: Axes, steps: list[int], zeros: list[float]) -> None:
        x = self.run.epochs(steps)
        axes.step(x, zeros, where="post", color=INK, linewidth=1.1, zorder=3)
        axes.set_ylim(-6, 106)
        axes.set_yticks([0, 50, 100])
        axes.set_ylabel("sparsity, %")


def _curve(run: Run, evals: Sequence[Json]) -> tuple[Array, Array]:
    """Return epochs and accuracies of evaluations."""
    x = run.epochs([e["step"] for e in evals])
    return x, np.array([e["accuracy"] for e in evals], dtype=np.float64)


def _sparsity(run: Run) -> tuple[list[int], list[float]] | None:
    """Return steps and the sparsity in percent from each on; ``None`` for a run without any."""
    if not run.compressions or not run.prunable:
        return None
    steps, zeros = [0], [0.0]
    for change in run.changes:
        steps.append(int(change["step"]))
        zeros.append(100 * (1 - int(change["nnz"]) / run.prunable))
    return [*steps, run.reached], [*zeros, zeros[-1]]


def accuracy(run: Run) -> Plate:
    """Figure 1: accuracy and sparsity over training."""
    name, heading = "accuracy", "Accuracy over training"
    if _sparsity(run):
        heading = "Accuracy and sparsity over training"
    if reason := _no_clock(run) or (
        "" if run.evals else "The run stopped before its first evaluation."
    ):
        return Plate(name, heading, absent=reason)
    data = _Accuracy.of(run)
    wide, narrow = (3.7, 3.6) if data.sparsity else (2.8, 2.8)
    return plate(name, heading, data.caption(), data.draw, {"wide": wide, "narrow": narrow})


# --- Loss ----------------------------------------------------------------------------------------


class _Line(NamedTuple):
    """The mean loss within a phase, over training or over fine-tuning."""

    x: Array
    y: Array
    colour: str
    style: Any


@dataclass(frozen=True)
class _Loss:
    """Training loss and, in a panel below it, the learning rate.

    Args:
        run: The run.
        window: Steps that a mean is taken over.
        lines: The mean loss, a line for each phase.
    """

    run: Run
    window: int
    lines: list[_Line]

    @classmethod
    def of(cls, run: Run) -> _Loss:
        assert run.schedule is not None
        window = max(1, min(run.schedule.total // 100, min(run.schedule.steps_per_epoch)))
        lines: list[_Line] = []
        for steps, branch in ((run.steps, False), (run.branch, True)):
            # A mean has no spikes to keep: one point in so many draws it.
            every = max(1, len(steps) // POINTS)
            for phase in run.schedule.phases:
                part = steps.within(phase.start, phase.stop)
                if part.stop > part.start:
                    colour = DENSE if branch else _colour(phase.kind)
                    x, y = run.epochs(steps.step[part]), smooth(steps.loss[part], window)
                    lines.append(_Line(x[::every], y[::every], colour, DASHED if branch else "-"))
        return cls(run, window, lines)

    @property
    def finite(self) -> bool:
        """Whether there is a point to draw."""
        return any(np.isfinite(line.y).any() for line in self.lines)

    @cached_property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest mean."""
        means = np.concatenate([line.y for line in self.lines])
        return float(np.nanmin(means)), float(np.nanmax(means))

    @property
    def log(self) -> bool:
        """Whether the axis of the loss is logarithmic."""
        low, high = self.range
        return low > 0 and high / low > 8

    @cached_property
    def rate_log(self) -> bool:
        """Whether the axis of the learning rate is logarithmic.

        A rate that falls in steps falls by factors. On a linear axis the late steps cannot be seen.
        """
        rate = self.run.steps.rate
        levels = np.unique(rate[~np.isnan(rate)])
        positive = len(levels) > 1 and levels[0] > 0
        return bool(
            positive and levels[-1] / levels[0] > 20 and min(levels[1:] / levels[:-1]) > 1.5
        )

    def caption(self) -> str:
        caption = (
            f"Top: training loss{', on a logarithmic axis' if self.log else ''}. Coloured: mean "
            f"over {plural(self.window, 'step')}, centred, within each phase; grey: single steps. "
            f"Bottom: learning rate{', on a logarithmic axis' if self.rate_log else ''}."
        )
        if len(self.run.branch):
            caption += " Dashed: fine-tuning of the dense twin."
        if lost := int(np.isnan(self.run.steps.loss).sum()):
            caption += f" The loss of {plural(lost, 'step')} is not finite and is not drawn."
        return caption

    def draw(self, figure: Figure, form: Form) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
        self._draw_loss(top)
        legend(top, [*_keys(self.run, twins=False), entry(FAINT, "single steps")], form)
        _time_axis(top, self.run, form, label=False)
        self._draw_rate(bottom)
        _time_axis(bottom, self.run, form)
        figure.align_ylabels()

    def _draw_loss(self, axes: Axes) -> None:
        steps = self.run.steps
        single = decimate(self.run.epochs(steps.step), steps.loss)
        axes.plot(*single, color=FAINT, linewidth=0.5, zorder=1)
        for line in self.lines:
            axes.plot(line.x, line.y, color=line.colour, linestyle=line.style, zorder=3)
        axes.set_ylabel("training loss")
        low, high = self.range
        top = max(high, float(np.nanquantile(steps.loss, 0.995)))
        if self.log:
            axes.set_yscale("log")
            _plain_log(axes)
            axes.set_ylim(low / 1.7, top * 1.15)
        else:
            axes.set_ylim(min(0.0, low), top * 1.05)

    def _draw_rate(self, axes: Axes) -> None:
        steps = self.run.steps
        rate = decimate(self.run.epochs(steps.step), steps.rate)
        axes.plot(*rate, color=INK, linewidth=1.1, zorder=3)
        axes.set_ylabel("learning rate")
        if self.rate_log:
            axes.set_yscale("log")
            _plain_log(axes, between=False)
        else:
            axes.set_ylim(bottom=0)


def loss(run: Run) -> Plate:
    """Figure 2: training loss and learning rate."""
    name, heading = "loss", "Training loss and learning rate"
    if reason := _no_clock(run) or ("" if len(run.steps) else "The run stopped before a step."):
        return Plate(name, heading, absent=reason)
    data = _Loss.of(run)
    if not data.finite:
        return Plate(name, heading, absent="No step of this run has a finite loss.")
    return plate(name, heading, data.caption(), data.draw, {"wide": 3.7, "narrow": 3.6})


# --- Change of the support -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Churn:
    """Weights that changed sides at each compression but the first.

    Args:
        run: The run.
        x: Epoch of each compression.
        y: Changed weights of each compression, in percent.
        nnz: Weights kept after the last compression.
    """

    run: Run
    x: Array
    y: Array
    nnz: int

    @classmethod
    def of(cls, run: Run) -> _Churn:
        changes = _with_predecessor(run)
        x = run.epochs([c["step"] for c in changes])
        y = 100 * np.array([c["churn"] for c in changes], dtype=np.float64)
        return cls(run, x, y, int(changes[-1]["nnz"]))

    def caption(self) -> str:
        first = float(self.run.epochs(self.run.compressions[0]["step"]))
        caption = (
            f"Share of the prunable weights that were kept in one of two consecutive sparse "
            f"supports and not in the other, in percent, at each compression but the first "
            f"(epoch {first:g}), which has no predecessor."
        )
        if self.run.prunable:
            density = self.nnz / self.run.prunable
            caption += (
                f" Two independent random supports of the last density ({percent(density)}) would "
                f"differ in {percent(2 * density * (1 - density), 1)} of the weights."
            )
        return caption

    def draw(self, figure: Figure, form: Form) -> None:
        axes = figure.subplots()
        axes.vlines(self.x, 0, self.y, color=SPARSE, linewidth=1.1, zorder=3)
        axes.plot(self.x, self.y, "o", color=SPARSE, markersize=4.5, zorder=4)
        if len(self.x) <= (16 if form == "wide" else 8):
            for px, py in zip(self.x, self.y, strict=True):
                axes.annotate(
                    f"{py:.2g}", (px, py), xytext=(0, 5), textcoords="offset points",
                    ha="center", fontsize=8,
                )  # fmt: skip
        axes.set_ylim(0, max(float(self.y.max()) * 1.22, 1e-3))
        axes.set_ylabel("changed weights, %")
        _time_axis(axes, self.run, form)


def _with_predecessor(run: Run) -> list[Json]:
    """Return the compressions that have an earlier support to compare with."""
    return [c for c in run.compressions if c["churn"] is not None]


def _no_churn(run: Run) -> str:
    if reason := _no_clock(run):
        return reason
    assert run.schedule is not None
    if not run.compressions:
        if run.schedule.last("sparse") is None:
            return "The network was dense throughout: there is no support that could change."
        return "The run stopped before its first compression."
    if not _with_predecessor(run):
        return "The network was compressed once: there is no earlier support to compare with."
    return ""


def churn(run: Run) -> Plate:
    """Figure 3: change of the support at each compression."""
    name, heading = "churn", "Change of the support"
    if reason := _no_churn(run):
        return Plate(name, heading, absent=reason)
    data = _Churn.of(run)
    return plate(name, heading, data.caption(), data.draw, {"wide": 2.4, "narrow": 2.7})


# --- Density of the layers -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Density:
    """Share of the weights that each layer keeps.

    Args:
        layers: The layers, from input to output.
        values: Density of each, in percent.
    """

    layers: list[Layer]
    values: Array

    @classmethod
    def of(cls, layers: list[Layer]) -> _Density:
        return cls(layers, np.array([100 * (layer.density or 0.0) for layer in layers]))

    @property
    def overall(self) -> float:
        """Density of all prunable weights together, in percent."""
        pruned = [layer for layer in self.layers if layer.prunable]
        return 100 * sum(layer.nnz or 0 for layer in pruned) / max(1, sum(p.numel for p in pruned))

    @cached_property
    def left(self) -> float:
        """Left edge of the axis: a power of ten if the axis is logarithmic, otherwise 0."""
        positive = self.values[self.values > 0]
        if not len(positive) or positive.min() >= 10 or self.values.max() / positive.min() <= 6:
            return 0.0
        return float(10 ** math.floor(math.log10(positive.min() / 1.3)))

    def caption(self) -> str:
        caption = (
            f"Share of the weights that the sparse support keeps, layer by layer from input to "
            f"output, in percent{', on a logarithmic axis' if self.left else ''}. The dashed line "
            f"is the density of all prunable weights together, {percent(self.overall / 100)}."
        )
        if not all(layer.prunable for layer in self.layers):
            caption += " Open dots: layers that are not pruned."
        if empty := int((self.values == 0).sum()):
            caption += f" {plural(empty, 'layer')} without any weight drawn at the left edge."
        return caption

    def draw(self, figure: Figure, form: Form) -> None:
        axes = figure.subplots()
        rows = np.arange(len(self.layers))
        axes.hlines(rows, self.left, 100, color="#e6e6e6", linewidth=0.6, zorder=1)
        axes.axvline(self.overall, color=GREY, linewidth=0.8, linestyle=(0, (4, 2)), zorder=2)
        for prunable, color, face in ((True, SPARSE, SPARSE), (False, DENSE, "white")):
            mine = [row for row in rows if self.layers[row].prunable == prunable]
            axes.plot(
                np.maximum(self.values[mine], self.left), mine, "o", color=color,
                markerfacecolor=face, markersize=4.2, zorder=3, clip_on=False,
            )  # fmt: skip
        self._share_axis(axes, form)
        axes.set_ylim(len(self.layers) - 0.4, -0.6)
        # Names are the user's: a dollar sign in one is not mathematics.
        axes.set_yticks(rows, [short(layer.name) for layer in self.layers], parse_math=False)
        axes.tick_params(axis="y", length=0, labelsize=8 if form == "wide" else 7.5)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("weights kept, %")

    def _share_axis(self, axes: Axes, form: Form) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        if self.left:
            axes.set_xscale("log")
            subs = (1.0,) if form == "narrow" or self.left < 0.1 else (1.0, 2.0, 5.0)
            axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlim(self.left, 100)


def _no_density(run: Run) -> str:
    """Say why no layer of the run has a density."""
    stays_dense = run.schedule is not None and run.schedule.last("sparse") is None
    if stays_dense or list(run.networks) == ["dense"]:
        return "The network is dense: every layer keeps all its weights."
    if run.compressions or run.finished:
        return "The run recorded no count of kept weights by layer."
    return "The run stopped before its first compression."


def density(run: Run) -> Plate:
    """Figure 4: density of the layers."""
    name, heading = "density", "Density of the layers"
    layers = [layer for layer in run.layers if layer.density is not None]
    if not layers:
        return Plate(name, heading, absent=_no_density(run))
    data = _Density.of(layers)
    height = 0.55 + 0.168 * len(layers)
    return plate(name, heading, data.caption(), data.draw, {"wide": height, "narrow": height})
