"""The report of a run: one HTML page that says what happened, and opens anywhere.

``render(run)`` reads what training wrote into the run's folder and writes ``report.html`` beside
it. The page holds its figures and its style, loads nothing from the network and runs no script. The
page of a run that stopped before its end shows what was measured, and a notice names the last step.

The figures are in ``plots.py``, the tables in ``tables.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from acdc.engine.verdict import Verdict
from acdc.methods import METHODS
from acdc.pages import plots, tables
from acdc.pages.figure import DENSE, GREY, INK, SHADE, SPARSE, environment, publish
from acdc.pages.history import Run, read
from acdc.pages.tables import percent, plural, short


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
        plates=plots.figures(run),
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
        command=run.details.get("command"),
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
    if finished := run.details.get("finished"):
        parts.append(_date(finished))
    return parts


def _date(text: str) -> str:
    """Write a date of a record for people; a text that is no date stays as it is."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{when:%Y-%m-%d %H:%M} {when.tzname() or ''}".strip()


def _reached(network: Mapping[str, Any]) -> str:
    bits = f" ({network['bits']:.3f} bits a character)" if "bits" in network else ""
    return f"{network['accuracy']:.2f}\u202f%{bits}"


def _summary(run: Run) -> str:
    """Return the report in a few sentences."""
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
    """Describe the networks that a run left, and their costs, in a sentence or two."""
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
    """Return what a reader must know before trusting the page."""
    notices = []
    if not run.finished:
        progress = ""
        if run.schedule is not None:
            done = run.reached / run.schedule.total
            progress = f" at step {run.reached:,} of {run.schedule.total:,} ({percent(done, 1)})"
        notices.append(
            f"This run stopped before its end{progress} and wrote no record. The page shows what "
            f"it had measured until then; the twins, their sizes and the machine are not known."
        )
        if run.ledger is not None:
            counted = run.ledger.phases[-1].stop
            notices.append(f"The FLOPs of training are those of the first {counted:,} steps.")
    notices += [
        f"Step {warning['step']:,}: {warning['text']}"
        for warning in run.details.get("warnings") or ()
    ]
    if run.damaged:
        lines = "line" if run.damaged == 1 else "lines"
        notices.append(
            f"{run.damaged} {lines} of metrics.jsonl could not be read and "
            f"{'was' if run.damaged == 1 else 'were'} left out."
        )
    if run.prunable:  # a dense run refuses every layer
        notices += _stayed_dense(run.refused)
    return notices


def _stayed_dense(refused: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each reason why layers stayed dense."""
    reasons: dict[str, list[str]] = {}
    for layer, reason in refused.items():
        reasons.setdefault(reason, []).append(short(layer))
    for reason, (first, *others) in reasons.items():
        layers = f"layers {first}, {', '.join(others[:3])}" if others else f"layer {first}"
        more = f" and {len(others) - 3} more" if others[3:] else ""
        yield f"The {layers}{more} stayed dense: {reason}"


def _engine(run: Run) -> str:
    """Say what computed the sparse phases, and how long a step took."""
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
    for verdict in map(Verdict.from_dict, engine.get("verdicts", ())):
        sentences.append(f"Judged by whole steps: {verdict}.")
    for name, reason in engine.get("refused", {}).items():
        sentences.append(f"The layer {name} was left to PyTorch: {reason}.")
    return " ".join(sentences)


def _step_ms(run: Run, kind: str) -> float | None:
    """Return the mean time of a step in the phases of a kind."""
    assert run.schedule is not None
    spans = [(p.start, p.stop) for p in run.schedule.phases if p.kind == kind]
    times = [run.steps.seconds[run.steps.within(*span)] for span in spans]
    measured = np.concatenate([np.empty(0), *times])
    measured = measured[~np.isnan(measured)]
    return 1000 * float(measured.mean()) if len(measured) else None


def _origin(run: Run) -> list[tuple[str, str]]:
    """Return recipe, seed, date, machine and versions of the run."""
    details = run.details
    rows = [("Recipe", str(run.recipe.get("name", "not recorded")))]
    rows += [("Seed", str(run.recipe.get("seed", "not recorded")))]
    if run.record is not None and run.record.get("run"):
        # The folder's name alone: its path on the machine is private.
        rows.append(("Run", Path(str(run.record["run"])).name))
    if finished := details.get("finished"):
        rows.append(("Finished", _date(finished)))
    for key, label in (("machine", "Machine"), ("versions", "Versions")):
        if value := details.get(key):
            rows.append((label, ", ".join(f"{name} {part}" for name, part in value.items())))
    if details.get("device"):
        many = int(details.get("devices") or 1)
        rows.append(("Device", f"{details['device']}{f' × {many}' if many > 1 else ''}"))
    return rows
