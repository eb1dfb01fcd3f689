"""How far AC/DC's dense network lags behind the dense run when it is cut for the last time.

    python experiments/last_cut.py

Reads the runs that ``acdc compare GRID --out experiments`` leaves in ``experiments/*/runs``, and
writes ``experiments/last_cut.json``: a row for each sparsity and seed, with the quality (test
accuracy, or minus the bits of a character) of both at the last evaluation before that cut.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from acdc.lab.compare.results import quality
from acdc.lab.record import machine, versions
from acdc.recipes.grids import GRIDS

HERE = Path(__file__).parent
TASKS = ("compare_fashion_mnist", "compare_cifar10", "compare_tinyshakespeare")


def curve(run: Path, bits: bool) -> dict[int, tuple[str, float]]:
    """Return kind of phase and quality after each epoch, without a twin's fine-tuning."""
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {
        e["epoch"]: (e["phase"], -e["loss"] / math.log(2) if bits else e["accuracy"])
        for e in events
        if e["event"] == "eval" and "twin" not in e
    }


def rows(task: str) -> list[dict[str, Any]]:
    """Return a row for each seed and sparsity whose two runs are there."""
    folder = HERE / task
    bits = quality(GRIDS[task]().task) == "bits"
    results = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    runs = {
        (r["method"], r["sparsity"], r["seed"]): curve(folder / "runs" / r["cell"], bits)
        for r in results
        if (folder / "runs" / r["cell"]).is_dir()
    }
    found = []
    for (method, sparsity, seed), ours in sorted(runs.items()):
        dense = runs.get(("dense", 0.0, seed))
        if method != "acdc" or dense is None:
            continue
        cut = max(epoch for epoch, (kind, _) in ours.items() if kind == "dense")
        found.append(
            {
                "task": task,
                "sparsity": sparsity,
                "seed": seed,
                "epoch": cut,
                "epochs": max(ours),
                "dense_run": dense[cut][1],
                "acdc": ours[cut][1],
                "lag": dense[cut][1] - ours[cut][1],
            }
        )
    return found


def main() -> None:
    """Print a table and write the rows."""
    found = [row for task in TASKS for row in rows(task)]
    print(
        f"{'task':24} {'at':>5} {'seed':>4} {'epoch':>8} {'dense run':>10} {'AC/DC':>7} {'lag':>6}"
    )
    for row in found:
        print(
            f"{row['task']:24} {row['sparsity']:5} {row['seed']:4} {row['epoch']:3} of "
            f"{row['epochs']:2} {row['dense_run']:9.3f} {row['acdc']:8.3f} {row['lag']:6.3f}"
        )
    record = {
        "command": "python experiments/last_cut.py",
        "machine": machine(),
        "versions": versions(),
        "rows": found,
    }
    (HERE / "last_cut.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
