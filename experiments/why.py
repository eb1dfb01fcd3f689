"""Why AC/DC is behind gradual pruning in short runs: one test for each suspected cause.

    acdc compare experiments/why.py:why_fashion_mnist --jobs 2 --resume --out experiments
    acdc compare experiments/why.py:why_tinyshakespeare --jobs 2 --resume --out experiments
    python experiments/why.py            # what the results say of each cause
    python experiments/why.py --write    # writes that to why.md
    python experiments/why.py --ledger experiments/why_fashion_mnist/runs/NAME

A test changes one thing. It compares the quality of sparse networks on the same seeds, as a
contrast: qualities times coefficients, summed up. What the contrast must reach was written down
before any cell was trained (``CAUSES``). A cause is supported if the interval of the contrast is
above zero and its mean reaches the threshold, and refuted if the interval is below the threshold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from variants import ACDC_PAPER, GMP_75, TWIN, Option, trial

from acdc import ACDC, Unstructured
from acdc.compare import Candidate, Grid, GridMethod, Task
from acdc.pages.paired import half_width
from acdc.recipes import grids
from acdc.recipes.grids import SCOPE
from acdc.runs import record
from acdc.runs.optim import Rewarm, Tail
from acdc.runs.recipe import Recipe

HERE = Path(__file__).parent
SPARSITY, SEEDS = 0.95, (0, 1, 2)
AT_ENDS = 20  # steps over which the ledger averages the loss at the ends of a phase

# --- the rows: AC/DC or GMP with one change ------------------------------------------------------


def _with(name: str, label: str, **options: Any) -> GridMethod:
    """Return AC/DC with options of the method."""

    def build(task: Task, sparsity: float, epochs: int, _: int) -> Candidate:
        method = ACDC(Unstructured(sparsity, SCOPE), grids.alternation(epochs), **options)
        return Candidate(method, changes=TWIN)

    return GridMethod(f"acdc_{name}", f"AC/DC, {label}", build)


def _curve(name: str, label: str, change: Callable[[Any], Any]) -> Option:
    return Option(name, label, lambda recipe: replace(recipe, lr=change(recipe.lr)))


def _decay(recipe: Recipe) -> Recipe:
    decayed = replace(recipe.optimizer, weight_decay=3 * recipe.optimizer.weight_decay)
    return replace(recipe, optimizer=decayed)


DECAY = Option("decay3", "3 x weight decay", _decay)
REWARM = _curve("rewarm", "rewarm", lambda curve: Rewarm(curve, low=0.35))
RESTART = _curve("restart", "warm-up", lambda curve: Rewarm(curve, low=0.05, share=0.4))
TAIL = _curve("tail", "tail", Tail)
SPARSE_2 = _curve("sparse2", "2 x rate when sparse", lambda curve: Rewarm(curve, 1.0, sparse=2.0))

SHARED = (
    ACDC_PAPER,
    GMP_75,
    trial(ACDC_PAPER, REWARM),
    trial(ACDC_PAPER, DECAY),
    trial(GMP_75, DECAY),
    _with("ramp", "ramp", ramp=0.6),
    trial(ACDC_PAPER, TAIL),
    _with("entered", "reset of what comes back", reset="entered"),
    trial(ACDC_PAPER, SPARSE_2),
    trial(GMP_75, SPARSE_2),
    _with("average", "mean cut", average=0.4),
    _with("taper", "falling density", taper=2.0),
)
NORMS = _with("norms", "norms restored", restore_norms=True)
KEPT_STATE = _with("state", "no reset", reset="none")

# --- the causes -----------------------------------------------------------------------------------

FASHION_MNIST, TINYSHAKESPEARE = "why_fashion_mnist", "why_tinyshakespeare"
Contrast = Mapping[str, int]


@dataclass(frozen=True)
class Cause:
    """A suspected cause, and the test that decides about it.

    Args:
        cause: What is suspected.
        belief: How far it was believed before the test: high, medium, low.
        contrast: Name of a row → its coefficient.
        least: Name of a grid → what the contrast must reach, in points of accuracy or in bits.
    """

    cause: str
    belief: str
    contrast: Contrast
    least: Mapping[str, float]


def _against(row: str, baseline: str = "acdc") -> Contrast:
    return {row: 1, baseline: -1}


BOTH = {FASHION_MNIST: 0.15, TINYSHAKESPEARE: 0.02}
IMAGES, TEXT = {FASHION_MNIST: 0.15}, {TINYSHAKESPEARE: 0.02}
CAUSES = (
    Cause(
        "After a decompression the norms of filters are those of the sparse network, so that the "
        "effective rate is too high: a lower rate that rises again",
        "high", _against("acdc_rewarm"), BOTH,
    ),
    Cause("The same: filters get their norms back", "high", _against("acdc_norms"), IMAGES),
    Cause(
        "Phases are short against the time in which norms settle: with three times the weight "
        "decay, which makes that time three times shorter, AC/DC gains on GMP",
        "high", {"acdc_decay3": 1, "gmp_decay3": -1, "acdc": -1, "gmp": 1}, BOTH,
    ),
    Cause("The cut is abrupt: gradual compressions", "high", _against("acdc_ramp"), BOTH),
    Cause(
        "The rate is low in the last sparse phase: a warm-up of its own",
        "medium", _against("acdc_tail"), BOTH,
    ),
    Cause(
        "AdamW starts anew without a warm-up: state reset only where weights come back",
        "high for text, none for images", _against("acdc_entered"), BOTH,
    ),
    Cause("The same: no reset", "high for text", _against("acdc_state"), TEXT),
    Cause("The same: a warm-up in dense phases", "high for text", _against("acdc_restart"), TEXT),
    Cause(
        "Steps of sparse layers are small: twice the rate in sparse phases",
        "medium", _against("acdc_sparse2"), BOTH,
    ),
    Cause("The same for GMP", "medium", _against("gmp_sparse2", "gmp"), BOTH),
    Cause(
        "The mask is chosen from noisy weights: the mean of the dense phase is cut",
        "medium", _against("acdc_average"), BOTH,
    ),
    Cause(
        "Every compression has the final density: the first ones keep more",
        "medium", _against("acdc_taper"), BOTH,
    ),
)  # fmt: skip


def _grid(name: str, base: Grid, methods: tuple[GridMethod, ...]) -> Grid:
    task = replace(base.task, recipe=replace(base.task.recipe, threads=1))
    return Grid(
        name=name,
        about=f"tests causes of AC/DC's gap to GMP on {base.task.name}",
        task=task,
        methods=methods,
        sparsities=(SPARSITY,),
        seeds=SEEDS,
    )


def why_fashion_mnist() -> Grid:
    """The tests on Fashion-MNIST at 95 %, three seeds."""
    return _grid(FASHION_MNIST, grids.compare_fashion_mnist(), (*SHARED, NORMS))


def why_tinyshakespeare() -> Grid:
    """The tests on Shakespeare at 95 %, three seeds."""
    more = (KEPT_STATE, trial(ACDC_PAPER, RESTART))
    return _grid(TINYSHAKESPEARE, grids.compare_tinyshakespeare(), (*SHARED, *more))


GRIDS = {FASHION_MNIST: why_fashion_mnist, TINYSHAKESPEARE: why_tinyshakespeare}

# --- what the results say -------------------------------------------------------------------------

Qualities = Mapping[tuple[str, int], float]
"""Name of a row and seed → quality of its sparse network, larger is better."""


def qualities(folder: Path) -> dict[tuple[str, int], float]:
    """Return the qualities in the folder of a grid; none where nothing was trained."""
    path = folder / "results.jsonl"
    rows = map(json.loads, path.read_text("utf-8").splitlines()) if path.exists() else ()
    return {(row["method"], row["seed"]): row["sparse_quality"] for row in rows}


def contrasts(contrast: Contrast, found: Qualities) -> list[float]:
    """Return the contrast of every seed for which all its rows are trained."""
    return [
        sum(times * found[row, seed] for row, times in contrast.items())
        for seed in SEEDS
        if all((row, seed) in found for row in contrast)
    ]


def verdict(values: list[float], least: float) -> str:
    """Return what the contrasts of the seeds say of a cause."""
    if not values:
        return "not run yet"
    half = half_width(values)
    if half is None:
        return f"{values[0]:+.3f}, one seed: undecided"
    mean = fmean(values)
    said = "undecided"
    if mean >= least and mean - half > 0:
        said = "supported"
    elif mean + half < least:
        said = "refuted"
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f}), {len(values)} seeds: {said}"


def table(folder: Path) -> str:
    """Return the table of causes as Markdown."""
    found = {name: qualities(folder / name) for name in GRIDS}
    lines = [
        "| cause: test | believed | Fashion-MNIST, points | Shakespeare, bits |",
        "|---|---|---|---|",
    ]
    for cause in CAUSES:
        said = [
            verdict(contrasts(cause.contrast, found[name]), cause.least[name])
            if name in cause.least
            else "no test"
            for name in GRIDS
        ]
        lines.append(f"| {cause.cause} | {cause.belief} | {' | '.join(said)} |")
    return "\n".join(lines) + "\n"


def ledger(run: Path) -> str:
    """Return the training loss at the ends of every phase of a run, and the jumps between phases.

    The loss is the mean of the first and of the last 20 steps of a phase.
    """
    events, _ = record.events(run / "metrics.jsonl")
    phases = next(event["phases"] for event in events if event["event"] == "start")
    losses = {
        event["step"]: event["loss"]
        for event in events
        if event["event"] == "step" and "twin" not in event
    }
    lines = ["phase           first loss  last loss  change   jump before"]
    before = None
    for phase in phases:
        steps = [losses[s] for s in range(phase["start"], phase["stop"]) if s in losses]
        first, last = fmean(steps[:AT_ENDS]), fmean(steps[-AT_ENDS:])
        jump = "" if before is None else f"{first - before:+.4f}"
        span = f"{phase['kind']} {phase['start']}-{phase['stop']}"
        lines.append(
            f"{span:<15} {first:<11.4f} {last:<10.4f} {last - first:+.4f}  {jump}".rstrip()
        )
        before = last
    return "\n".join(lines)


def main() -> int:
    """Print the table, or the ledger of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table to why.md")
    parser.add_argument("--folder", type=Path, default=HERE, help="of the grids")
    parser.add_argument("--ledger", metavar="RUN", type=Path, help="print the losses of a run")
    arguments = parser.parse_args()
    if arguments.ledger is not None:
        print(ledger(arguments.ledger))
        return 0
    found = table(arguments.folder)
    print(found, end="")
    if arguments.write:
        (HERE / "why.md").write_text(f"# {__doc__.splitlines()[0]}\n\n{found}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
