"""AC/DC at 90 % against a dense run of the same epochs and learning rate, on Fashion-MNIST.

    python experiments/fashion_mnist/run.py [--seeds 0 1 2] [--jobs 2] [--runs DIR]

Every run is ``acdc run fashion_mnist`` with one thread, ``--jobs`` of them at a time. Stop it at
any moment and start it again: finished runs are kept, a stopped one goes on from its checkpoint.
Beside this file it writes ``results.jsonl`` (a line per run and twin), ``summary.md`` and
``report.html``, the page of the AC/DC run with the first seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
METHODS: dict[str, list[str]] = {"acdc": [], "dense": ["--set", "method=dense"]}


def run(method: str, seed: int, runs: Path) -> Path:
    """Run one cell, or go on with it, and return its folder."""
    out = runs / f"{method}-{seed}"
    command = [sys.executable, "-m", "acdc", "run", "fashion_mnist", *METHODS[method]]
    command += ["--set", "threads=1", "--seed", str(seed), "--out", str(out), "--device", "cpu"]
    if list(out.glob("*/recipe.json")):
        command.append("--resume")
    with (runs / f"{method}-{seed}.log").open("a") as log:
        subprocess.run([*command, "--json"], check=True, stdout=log, stderr=log)
    return next(out.glob("*/record.json")).parent


def rows(method: str, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the results of one run, a twin each."""
    record = json.loads((folder / "record.json").read_text())
    details = record["details"]
    for twin in ("sparse", "dense"):
        if record[twin] is not None:
            yield {
                "method": method,
                "sparsity": details["sparsity_asked"] or 0.0,
                "seed": seed,
                "twin": twin,
                "accuracy": round(record[twin]["accuracy"], 2),
                "epochs": details["epochs"],
                "seconds": round(record["seconds"], 1),
            }


def summary(results: list[dict[str, Any]], record: dict[str, Any]) -> str:
    """Return mean and range over the seeds, and the distance to the dense run, as a table."""

    def of(method: str, twin: str) -> list[float]:
        return [r["accuracy"] for r in results if (r["method"], r["twin"]) == (method, twin)]

    lines = [
        "| run | twin | seeds | accuracy %, mean (lowest to highest) | against the dense run |"
    ]
    lines += ["|---|---|---|---|---|"]
    base = statistics.mean(of("dense", "dense"))
    for method, twin in (("dense", "dense"), ("acdc", "sparse"), ("acdc", "dense")):
        values = of(method, twin)
        mean = statistics.mean(values)
        gap = "" if method == "dense" else f"{mean - base:+.2f}"
        lines.append(
            f"| {method} | {twin} | {len(values)} | {mean:.2f} ({min(values):.2f} to "
            f"{max(values):.2f}) | {gap} |"
        )
    details = record["details"]
    machine, versions = details["machine"], details["versions"]
    lines += [
        "",
        f"Test accuracy after the last step, no checkpoint picked. {details['epochs']} epochs, "
        f"{details['prunable']:,} prunable weights, of which {record['sparse']['nnz']:,} are kept; "
        f"inference {100 * record['inference_flops_ratio']:.1f} % and training "
        f"{100 * record['train_flops_ratio']:.1f} % of the dense FLOPs; sparse file "
        f"{record['sparse']['bytes']:,} bytes, dense {record['dense']['bytes']:,}.",
        "",
        f"Command: `python experiments/fashion_mnist/run.py`. Machine: {machine['cpu']}, "
        f"{machine['cores']} cores, one thread a run, two runs at a time; "
        f"finished {details['finished']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion_mnist"))
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    cells = [(method, seed) for seed in args.seeds for method in METHODS]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = list(pool.map(lambda cell: run(*cell, args.runs), cells))
    results = [
        row for cell, folder in zip(cells, folders, strict=True) for row in rows(*cell, folder)
    ]
    (HERE / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in results))
    first = folders[cells.index(("acdc", args.seeds[0]))]
    record = json.loads((first / "record.json").read_text())
    (HERE / "summary.md").write_text(summary(results, record))
    shutil.copy(first / "report.html", HERE / "report.html")
    print(summary(results, record))


if __name__ == "__main__":
    main()
