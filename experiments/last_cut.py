"""How far AC/DC's dense network lags behind the dense run when it is cut for the last time.

    python experiments/last_cut.py

Reads the runs that ``acdc compare GRID --out experiments`` leaves in ``experiments/*/runs``, and
writes ``experiments/last_cut.json``: a row for each sparsity and seed, with the quality (test
accuracy, or minus the bits of a character) of both at the last evaluation before that cut. Rows
that are there stay where the runs are gone.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from acdc.compare.grid import Task
from acdc.compare.results import judged
from acdc.pages.history import read
from acdc.recipes.grids import GRIDS
from acdc.runs.record import machine, versions

HERE = Path(__file__).parent
OUT = HERE / "last_cut.json"
TASKS = (
    "compare_fashion_mnist",
    "compare_fashion_mnist_long",
    "compare_cifar10",
    "compare_tinyshakespeare",
    "compare_tinyshakespeare_long",
)


def curve(task: Task, run: Path) -> dict[int, tuple[str, float]]:
    """Return kind of phase and quality after each epoch, without a twin's fine-tuning."""
    return {e["epoch"]: (e["phase"], judged(task, e)) for e in read(run).evals}


def rows(name: str) -> list[dict[str, Any]]:
    """Return a row for each seed and sparsity whose two runs are there."""
    folder, task = HERE / name, GRIDS[name]().task
    results = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    runs = {
        (r["method"], r["sparsity"], r["seed"]): curve(task, folder / "runs" / r["cell"])
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
                "task": name,
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


def key(row: dict[str, Any]) -> tuple[int, float, int]:
    """Return what there is one row of, in the order of the table."""
    return TASKS.index(row["task"]), row["sparsity"], row["seed"]


def main() -> None:
    """Print a table and write the rows."""
    known = json.loads(OUT.read_text())["rows"] if OUT.exists() else []
    measured = [row for name in TASKS for row in rows(name)]
    found = sorted({key(row): row for row in [*known, *measured]}.values(), key=key)
    print(
        f"{'task':28} {'at':>5} {'seed':>4} {'epoch':>8} {'dense run':>10} {'AC/DC':>7} {'lag':>6}"
    )
    for row in found:
        print(
            f"{row['task']:28} {row['sparsity']:5} {row['seed']:4} {row['epoch']:3} of "
            f"{row['epochs']:2} {row['dense_run']:9.3f} {row['acdc']:8.3f} {row['lag']:6.3f}"
        )
    record = {
        "command": "python experiments/last_cut.py",
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": machine(),
        "versions": versions(),
        "rows": found,
    }
    OUT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
