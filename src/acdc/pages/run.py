"""The report of a run: one HTML page that says what happened, and opens anywhere.

``render(run)`` reads what training wrote into the run's folder and writes ``report.html`` beside
it. The page holds its figures and its style, asks the network for nothing and runs no script. The
page of a run that stopped before its end shows what there is and says so.

Every figure is drawn twice, wide and narrow, and the page shows the one that fits the screen: a
drawing scaled down to a telephone has labels that nobody can read.

How drawings and pages are made is in ``figure.py``.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from datetime import datetime
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from acdc.methods import METHODS
from acdc.pages import tables
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
    environment,
    legend,
    plate,
    publish,
)
from acdc.pages.history import Array, Run, read
from acdc.pages.tables import percent, plural, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 1500  # a line in a figure has at most so many


def render(run: Path) -> Path:
    """Write ``report.html`` into the folder of a run and return its path.

    The file appears whole or not at all: a page that was there before stays until the new one is
    complete. The same run gives the same bytes.

    Args:
        run: Folder with ``recipe.json`` and, as far as the run came, ``metrics.jsonl`` and
            ``record.json``.

    Raises:
        InputError: The folder is not the folder of a run, or one of its files is damaged.
        MissingDependency: matplotlib or jinja2 is not installed.
    """
    run = Path(run)
    text = page(read(run))
    return publish(run / "report.html", text)


# --- Figures -------------------------------------------------------------------------------------


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
    known = ~np.isnan(y)
    totals = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    centre = np.arange(len(y))
    first = np.maximum(centre - window // 2, 0)
    last = np.minimum(centre + (window - window // 2), len(y))
    with np.errstate(invalid="ignore"):
        mean = (totals[last] - totals[first]) / (counts[last] - counts[first])
    return np.where(known, mean, np.nan)


def _time_axis(axes: Axes, run: Run, form: Form, label: bool = True) -> None:
    """Epochs along the bottom, the sparse phases shaded."""
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


def _keys(run: Run, twins: bool) -> list[Any]:
    """The legend's entries: only what the figure shows."""
    assert run.schedule is not None
    sparse = any(phase.kind == "sparse" for phase in run.schedule.phases)
    keys: list[Any] = [entry(DENSE, "dense phase" if sparse else "dense network")]
    if sparse:
        keys += [entry(SPARSE, "sparse phase")]
    if run.branch_evals or len(run.branch):
        keys += [entry(DENSE, "dense twin, fine-tuned", linestyle=(0, (3, 1.6)))]
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


def _accuracy(run: Run) -> Plate:
    sparsity = _sparsity(run)
    name = "accuracy"
    heading = "Accuracy and sparsity over training" if sparsity else "Accuracy over training"
    if reason := _no_clock(run) or (
        "" if run.evals else "The run stopped before its first evaluation."
    ):
        return Plate(name, heading, absent=reason)
    assert run.schedule is not None
    x = run.epochs([e["step"] for e in run.evals])
    y = np.array([e["accuracy"] for e in run.evals], dtype=np.float64)
    kinds = [str(e["phase"]) for e in run.evals]
    tail_x = run.epochs([e["step"] for e in run.branch_evals])
    tail_y = np.array([e["accuracy"] for e in run.branch_evals], dtype=np.float64)
    fork = run.schedule.last("dense")
    at = [i for i, e in enumerate(run.evals) if fork is not None and e["step"] <= fork.stop]
    if len(tail_x) and at:  # the branch leaves the line where the twin was taken
        tail_x, tail_y = np.append(x[at[-1]], tail_x), np.append(y[at[-1]], tail_y)
    low, hidden = _floor(y)
    rings: list[tuple[float, float, str]] = []
    if run.finished:
        if "sparse" in run.networks:
            rings.append((x[-1], y[-1], SPARSE))
        if len(tail_x):
            rings.append((tail_x[-1], tail_y[-1], DENSE))
        elif at:
            rings.append((x[at[-1]], y[at[-1]], DENSE))

    def draw(figure: Figure, form: Form) -> None:
        rows = 2 if sparsity else 1
        panels = figure.subplots(
            rows, 1, squeeze=False, sharex=True, height_ratios=[3.2, 1][:rows]
        )[:, 0]
        top = panels[0]
        first = 0
        for kind, group in groupby(kinds[1:]):  # a line is of the kind of the phase that it ends in
            stop = first + len(list(group))
            top.plot(x[first : stop + 1], y[first : stop + 1], color=_colour(kind), zorder=3)
            first = stop
        for kind in sorted(set(kinds)) if len(x) <= 60 else ():
            of_kind = [i for i, k in enumerate(kinds) if k == kind]
            top.plot(x[of_kind], y[of_kind], "o", color=_colour(kind), markersize=2.6, zorder=4)
        top.plot(tail_x, tail_y, color=DENSE, linestyle=(0, (3, 1.6)), zorder=3)
        for px, py, color in rings:
            top.plot(
                px, py, "o", markersize=5.5, markerfacecolor="white", color=color, zorder=5,
                markeredgewidth=1.3, clip_on=False,
            )  # fmt: skip
        top.set_ylabel("test accuracy, %")
        span = max(float(np.nanmax(np.append(y, tail_y))) - low, 1e-3)
        top.set_ylim(low, min(low + 1.07 * span, 100 + 0.02 * span))
        legend(top, _keys(run, bool(rings)), form)
        _time_axis(top, run, form, label=not sparsity)
        if sparsity:
            bottom = panels[1]
            steps, zeros = sparsity
            bottom.step(run.epochs(steps), zeros, where="post", color=INK, linewidth=1.1, zorder=3)
            bottom.set_ylim(-6, 106)
            bottom.set_yticks([0, 50, 100])
            bottom.set_ylabel("sparsity, %")
            _time_axis(bottom, run, form)
        figure.align_ylabels()

    caption = f"Accuracy on the test set after each epoch, in percent{_hidden(low, hidden)}."
    if sparsity:
        caption = (
            f"Top: {caption[0].lower()}{caption[1:]} Bottom: share of the prunable weights that "
            f"are zero, in percent. Sparse phases are shaded."
        )
    if len(tail_x):
        caption += (
            " The dashed line is the dense twin: it leaves the run at the end of the last dense "
            "phase and is trained on, densely, on the tail of the same learning-rate curve."
        )
    if rings:
        caption += (
            " Rings mark the twins of table 1."
            if len(rings) > 1
            else " The ring marks the network of table 1."
        )
    if run.details.get("bn_reestimated"):
        caption += (
            " The statistics of batch normalisation were estimated anew after training, so that "
            "table 1 may differ from the rings."
        )
    height: dict[Form, float] = (
        {"wide": 3.7, "narrow": 3.6} if sparsity else {"wide": 2.8, "narrow": 2.8}
    )
    return plate(name, heading, caption, draw, height)


def _floor(y: Array) -> tuple[float, int]:
    """Return where the accuracy axis starts, and how many evaluations lie below it.

    The first epochs of a long run climb from chance. Drawn in full they take the height that the
    differences between the phases need.
    """
    low, high = float(np.nanmin(y)), float(np.nanmax(y))
    settled = float(np.nanmin(y[len(y) // 5 :]))
    if high - low > 2.5 * (high - settled) > 0:
        low = settled - 0.15 * (high - settled)
    else:
        low -= 0.05 * max(high - low, 1.0)
    return low, int((y < low).sum())


def _hidden(low: float, hidden: int) -> str:
    if not hidden:
        return ""
    lies = "evaluation lies" if hidden == 1 else "evaluations lie"
    return f" (the axis starts at {low:.1f}\u202f%; {hidden} early {lies} below)"


def _sparsity(run: Run) -> tuple[list[int], list[float]] | None:
    """Sparsity in percent from each step on, or ``None`` for a run that is dense throughout."""
    if not run.compressions or not run.prunable:
        return None
    steps, zeros = [0], [0.0]
    for change in run.changes:
        steps.append(int(change["step"]))
        zeros.append(100 * (1 - int(change["nnz"]) / run.prunable))
    return [*steps, run.reached], [*zeros, zeros[-1]]


def _loss(run: Run) -> Plate:
    name, heading = "loss", "Training loss and learning rate"
    if reason := _no_clock(run) or ("" if len(run.steps) else "The run stopped before a step."):
        return Plate(name, heading, absent=reason)
    assert run.schedule is not None
    window = max(1, min(run.schedule.total // 100, min(run.schedule.steps_per_epoch)))
    lines: list[tuple[Array, Array, str, Any]] = []
    for steps, branch in ((run.steps, False), (run.branch, True)):
        for phase in run.schedule.phases:
            part = steps.within(phase.start, phase.stop)
            if part.stop > part.start:
                # A mean has no spikes to keep: every so manyth point draws it.
                every = max(1, len(steps) // POINTS)
                color = DENSE if branch else _colour(phase.kind)
                style: Any = (0, (3, 1.6)) if branch else "-"
                mean = smooth(steps.loss[part], window)
                at = run.epochs(steps.step[part])
                lines.append((at[::every], mean[::every], color, style))
    raw = decimate(run.epochs(run.steps.step), run.steps.loss)
    if not any(np.isfinite(line[1]).any() for line in lines):
        return Plate(name, heading, absent="No step of this run has a finite loss.")
    means = np.concatenate([line[1] for line in lines])
    low, high = float(np.nanmin(means)), float(np.nanmax(means))
    log = low > 0 and high / low > 8
    top_of_raw = float(np.nanquantile(run.steps.loss, 0.995))
    rate = decimate(run.epochs(run.steps.step), run.steps.rate)
    # A rate that falls in steps falls by factors: on a linear axis the late steps cannot be seen.
    levels = np.unique(run.steps.rate[~np.isnan(run.steps.rate)])
    positive = len(levels) > 1 and levels[0] > 0
    steps_down = positive and levels[-1] / levels[0] > 20 and min(levels[1:] / levels[:-1]) > 1.5

    def draw(figure: Figure, form: Form) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
        top.plot(*raw, color=FAINT, linewidth=0.5, zorder=1)
        for x, y, color, style in lines:
            top.plot(x, y, color=color, linestyle=style, zorder=3)
        top.set_ylabel("training loss")
        if log:
            top.set_yscale("log")
            _plain_log(top)
            top.set_ylim(low / 1.7, max(high, top_of_raw) * 1.15)
        else:
            top.set_ylim(min(0.0, low), max(high, top_of_raw) * 1.05)
        legend(top, [*_keys(run, twins=False), entry(FAINT, "single steps")], form)
        _time_axis(top, run, form, label=False)
        bottom.plot(*rate, color=INK, linewidth=1.1, zorder=3)
        bottom.set_ylabel("learning rate")
        if steps_down:
            bottom.set_yscale("log")
            _plain_log(bottom, between=False)
        else:
            bottom.set_ylim(bottom=0)
        _time_axis(bottom, run, form)
        figure.align_ylabels()

    caption = (
        f"Top: training loss{', on a logarithmic axis' if log else ''}. Coloured: mean over "
        f"{plural(window, 'step')}, centred, within each phase; grey: single steps. "
        f"Bottom: learning rate{', on a logarithmic axis' if steps_down else ''}."
    )
    if len(run.branch):
        caption += " Dashed: fine-tuning of the dense twin."
    if lost := int(np.isnan(run.steps.loss).sum()):
        caption += f" The loss of {plural(lost, 'step')} is not finite and is not drawn."
    return plate(name, heading, caption, draw, {"wide": 3.7, "narrow": 3.6})


def _plain_log(axes: Axes, between: bool = True) -> None:
    """Write 0.1, 1, 10 along a logarithmic axis, and 2 and 5 between them if there is room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    subs = (1.0, 2.0, 5.0) if between else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _churn(run: Run) -> Plate:
    name, heading = "churn", "Change of the support"
    known = [c for c in run.compressions if c["churn"] is not None]
    reason = _no_clock(run)
    if not reason and not run.compressions:
        reason = (
            "The network was dense throughout: there is no support that could change."
            if run.schedule is not None and run.schedule.last("sparse") is None
            else "The run stopped before its first compression."
        )
    elif not reason and not known:
        reason = "The network was compressed once: there is no earlier support to compare with."
    if reason:
        return Plate(name, heading, absent=reason)
    x = run.epochs([c["step"] for c in known])
    y = 100 * np.array([c["churn"] for c in known], dtype=np.float64)
    first = float(run.epochs(run.compressions[0]["step"]))

    def draw(figure: Figure, form: Form) -> None:
        axes = figure.subplots()
        axes.vlines(x, 0, y, color=SPARSE, linewidth=1.1, zorder=3)
        axes.plot(x, y, "o", color=SPARSE, markersize=4.5, zorder=4)
        if len(x) <= (16 if form == "wide" else 8):
            for px, py in zip(x, y, strict=True):
                axes.annotate(
                    f"{py:.2g}", (px, py), xytext=(0, 5), textcoords="offset points",
                    ha="center", fontsize=8,
                )  # fmt: skip
        axes.set_ylim(0, max(float(y.max()) * 1.22, 1e-3))
        axes.set_ylabel("changed weights, %")
        _time_axis(axes, run, form)

    caption = (
        f"Share of the prunable weights that were kept in one of two consecutive sparse supports "
        f"and not in the other, in percent, at each compression but the first (epoch {first:g}), "
        f"which has no predecessor."
    )
    if run.prunable:
        density = int(known[-1]["nnz"]) / run.prunable
        caption += (
            f" Two independent random supports of the last density ({percent(density)}) would "
            f"differ in {percent(2 * density * (1 - density), 1)} of the weights."
        )
    return plate(name, heading, caption, draw, {"wide": 2.4, "narrow": 2.7})


def _density(run: Run) -> Plate:
    name, heading = "density", "Density of the layers"
    layers = [layer for layer in run.layers if layer.density is not None]
    if not layers:
        reason = "The run stopped before its first compression."
        stays_dense = run.schedule is not None and run.schedule.last("sparse") is None
        if stays_dense or list(run.networks) == ["dense"]:
            reason = "The network is dense: every layer keeps all its weights."
        elif run.compressions or run.finished:
            reason = "The run recorded no count of kept weights by layer."
        return Plate(name, heading, absent=reason)
    values = np.array([100 * (layer.density or 0.0) for layer in layers])
    pruned = [layer for layer in layers if layer.prunable]
    overall = 100 * sum(layer.nnz or 0 for layer in pruned) / max(1, sum(p.numel for p in pruned))
    positive = values[values > 0]
    log = bool(len(positive)) and positive.min() < 10 and values.max() / positive.min() > 6
    left = 10 ** math.floor(math.log10(positive.min() / 1.3)) if log else 0.0

    def draw(figure: Figure, form: Form) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes = figure.subplots()
        rows = np.arange(len(layers))
        axes.hlines(rows, left, 100, color="#e6e6e6", linewidth=0.6, zorder=1)
        axes.axvline(overall, color=GREY, linewidth=0.8, linestyle=(0, (4, 2)), zorder=2)
        for prunable, color, face in ((True, SPARSE, SPARSE), (False, DENSE, "white")):
            mine = [row for row in rows if layers[row].prunable == prunable]
            axes.plot(
                np.maximum(values[mine], left), mine, "o", color=color, markerfacecolor=face,
                markersize=4.2, zorder=3, clip_on=False,
            )  # fmt: skip
        if log:
            axes.set_xscale("log")
            subs = (1.0,) if form == "narrow" or left < 0.1 else (1.0, 2.0, 5.0)
            axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlim(left, 100)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        # Names are the user's: a dollar sign in one is not mathematics.
        axes.set_yticks(rows, [short(layer.name) for layer in layers], parse_math=False)
        axes.tick_params(axis="y", length=0, labelsize=8 if form == "wide" else 7.5)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("weights kept, %")

    caption = (
        f"Share of the weights that the sparse support keeps, layer by layer from input to output, "
        f"in percent{', on a logarithmic axis' if log else ''}. The dashed line is the density of "
        f"all prunable weights together, {percent(overall / 100)}."
    )
    if len(pruned) < len(layers):
        caption += " Open dots: layers that are not pruned."
    if empty := int((values == 0).sum()):
        caption += f" {plural(empty, 'layer')} without any weight drawn at the left edge."
    height = 0.55 + 0.168 * len(layers)
    return plate(name, heading, caption, draw, {"wide": height, "narrow": height})


# --- The page ------------------------------------------------------------------------------------


def page(run: Run) -> str:
    """Return the report as the text of an HTML page.

    Raises:
        MissingDependency: matplotlib or jinja2 is not installed.
    """
    template = environment().get_template("report.html.jinja")
    return template.render(
        run=run,
        details=run.details,
        colours={"dense": DENSE, "sparse": SPARSE, "shade": SHADE, "ink": INK, "grey": GREY},
        method=_method(run),
        subtitle=_subtitle(run),
        summary=_summary(run),
        notices=_notices(run),
        plates=[draw(run) for draw in (_accuracy, _loss, _churn, _density)],
        networks=list(run.networks),
        twins=tables.twins(run),
        training=tables.training(run),
        ledger=tables.one_power(tables.ledger(run), 1),
        engine=tables.engine(run),
        engine_says=_engine(run),
        phases=tables.one_power(tables.phases(run), 4),
        compressions=tables.compressions(run),
        layers=tables.one_power(tables.layers(run), 4, 5),
        values=tables.values(run),
        origin=_origin(run),
        command=_command(run),
    )


def _method(run: Run) -> str:
    """Return the name of the method as people write it."""
    method = (run.recipe.get("values") or {}).get("method")
    kind = method.get("type") if isinstance(method, Mapping) else method
    labels = {cls.__name__: cls.label for cls in METHODS.values()} | {"Dense": "Dense training"}
    return labels.get(kind, kind) if isinstance(kind, str) else "Training"


def _subtitle(run: Run) -> list[str]:
    parts = []
    asked, sparse = run.details.get("sparsity_asked"), run.networks.get("sparse")
    if sparse is not None:
        asked_text = "" if asked is None else f"{percent(asked)} sparsity asked for, "
        parts.append(f"{asked_text}{percent(sparse['sparsity'])} reached")
    parts.append(f"seed {run.recipe.get('seed', 'not recorded')}")
    if when := run.details.get("finished", run.details.get("started")):
        parts.append(_date(when))
    return parts


def _date(started: Any) -> str:
    try:
        when = (
            datetime.fromisoformat(started)
            if isinstance(started, str)
            else datetime.fromtimestamp(float(started))
        )
    except (TypeError, ValueError):
        return str(started)
    return f"{when:%Y-%m-%d %H:%M} {when.tzname() or ''}".strip()


def _reached(network: Mapping[str, Any]) -> str:
    bits = f" ({network['bits']:.3f} bits a character)" if "bits" in network else ""
    return f"{network['accuracy']:.2f}\u202f%{bits}"


def _summary(run: Run) -> str:
    """The report in a few sentences."""
    sentences = []
    schedule = run.schedule
    parameters = run.details.get("parameters")
    if schedule is not None:
        network = "A network" if parameters is None else f"A network of {parameters:,} parameters"
        if run.prunable:
            layers = sum(layer.prunable for layer in run.layers)
            network += f" ({run.prunable:,} prunable weights in {plural(layers, 'layer')})"
        elif run.layers:
            network += f" ({run.weights:,} weights in {plural(len(run.layers), 'layer')})"
        share = float(schedule.share("sparse"))
        sentence = (
            f"{network} was trained for {plural(schedule.epochs, 'epoch')} "
            f"({plural(schedule.total, 'step')})"
            if run.finished
            else f"{network} was to be trained for {plural(schedule.epochs, 'epoch')} "
            f"({plural(schedule.total, 'step')})"
        )
        sentences.append(sentence + (f", {percent(share, 1)} of them sparse." if share else "."))
    if run.record is not None:
        sentences.append(_left(run, run.record))
    return " ".join(sentences)


def _left(run: Run, record: Mapping[str, Any]) -> str:
    """The networks that a run left, and their costs, in a sentence or two."""
    sparse, dense = run.networks.get("sparse"), run.networks.get("dense")
    inference = percent(record["inference_flops_ratio"], 1)
    training = percent(record["train_flops_ratio"], 1)
    if sparse is not None and dense is not None:
        twin = "taken at the end of the last dense phase"
        if run.details.get("dense_finetuned") or len(run.branch):
            twin += " and fine-tuned on the tail of the learning-rate curve"
        return (
            f"The sparse twin keeps {sparse['nnz']:,} weights and reaches {_reached(sparse)} on "
            f"the test set; the dense twin, {twin}, reaches {_reached(dense)}. An inference of "
            f"the sparse twin takes {inference} of the dense FLOPs, and the training of both took "
            f"{training} of the FLOPs of dense training of the same length."
        )
    if sparse is not None:
        return (
            f"It keeps {sparse['nnz']:,} weights and reaches {_reached(sparse)} on the test set. "
            f"An inference takes {inference} of the dense FLOPs, and the training took {training} "
            f"of those of dense training of the same length."
        )
    return f"It reaches {_reached(run.networks['dense'])} on the test set."


def _notices(run: Run) -> list[str]:
    """What a reader must know before trusting the page."""
    notices = []
    if not run.finished:
        where = ""
        if run.schedule is not None:
            done = run.reached / run.schedule.total
            where = f" at step {run.reached:,} of {run.schedule.total:,} ({percent(done, 1)})"
        notices.append(
            f"This run stopped before its end{where} and wrote no record. The page shows what it "
            f"had measured until then; the twins, their sizes and the machine are not known."
        )
        if run.ledger is not None:
            counted = run.ledger.phases[-1].stop
            notices.append(f"The FLOPs of training are those of the first {counted:,} steps.")
    if run.damaged:
        lines = "line" if run.damaged == 1 else "lines"
        notices.append(
            f"{run.damaged} {lines} of metrics.jsonl could not be read and "
            f"{'was' if run.damaged == 1 else 'were'} left out."
        )
    for layer, reason in run.refused.items():
        notices.append(f"The layer {short(layer)} stayed dense: {reason}")
    return notices


def _engine(run: Run) -> str:
    """What computed the sparse phases, and what it gained, in a few sentences."""
    engine = run.engine
    if engine.get("kind", "off") == "off":
        reason = engine.get("reason")
        return f"The engine stayed off: {reason}." if reason else ""
    sentences = []
    if choices := engine.get("choices"):
        sparse = sum(choice["sparse"] for choice in choices)
        sentences.append(
            f"In sparse phases {sparse} of "
            f"{plural(len(choices) + len(engine.get('refused', {})), 'layer')}"
            f" ran on the engine ({engine['kind']})."
        )
    if engine.get("reason"):
        sentences.append(f"Its kernels were those of PyTorch: {engine['reason']}.")
    sparse_ms, dense_ms = (_step_ms(run, kind) for kind in ("sparse", "dense"))
    if sparse_ms is not None and dense_ms is not None:
        sentences.append(
            f"A step took {sparse_ms:,.1f}\u202fms in them and {dense_ms:,.1f}\u202fms in "
            f"dense ones."
        )
    for name, reason in engine.get("refused", {}).items():
        sentences.append(f"The layer {name} was left to PyTorch: {reason}.")
    return " ".join(sentences)


def _step_ms(run: Run, kind: str) -> float | None:
    """The mean time of a step in the phases of a kind."""
    assert run.schedule is not None
    spans = [(p.start, p.stop) for p in run.schedule.phases if p.kind == kind]
    times = [run.steps.seconds[run.steps.within(*span)] for span in spans]
    measured = np.concatenate([np.empty(0), *times])
    measured = measured[~np.isnan(measured)]
    return 1000 * float(measured.mean()) if len(measured) else None


def _origin(run: Run) -> list[tuple[str, str]]:
    """Where and with what the run was made."""
    details = run.details
    rows = [("Recipe", str(run.recipe.get("name", "not recorded")))]
    rows += [("Seed", str(run.recipe.get("seed", "not recorded")))]
    if run.record is not None and run.record.get("run"):
        # The folder's name alone: its path on the machine is private.
        rows.append(("Run", Path(str(run.record["run"])).name))
    for key in ("started", "finished"):
        if details.get(key):
            rows.append((key.capitalize(), _date(details[key])))
    for key, label in (("machine", "Machine"), ("versions", "Versions")):
        known = details.get(key)
        if isinstance(known, Mapping):
            rows.append((label, ", ".join(f"{name} {value}" for name, value in known.items())))
        elif known:
            rows.append((label, str(known)))
    if details.get("device"):
        many = int(details.get("devices") or 1)
        rows.append(("Device", f"{details['device']}{f' × {many}' if many > 1 else ''}"))
    return rows


def _command(run: Run) -> str | None:
    command = run.details.get("command")
    if isinstance(command, (list, tuple)):
        return shlex.join(str(part) for part in command)
    return None if command is None else str(command)
