"""The comparisons at equal epochs in one table, as README shows it.

    python experiments/compared.py --sparsity 0.95

Reads ``experiments/compare_*/results.jsonl`` and prints, for each method and task, the quality
(test accuracy, or bits of a character) as mean (lowest to highest) over the seeds; training FLOPs
and CPU seconds are shares of the dense runs'.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
Row = dict[str, Any]

TASKS = {
    "compare_fashion_mnist": "Fashion-MNIST, 12 epochs, %",
    "compare_fashion_mnist_long": "Fashion-MNIST, 36 epochs, %",
    "compare_cifar10": "CIFAR-10 (JPEG), 15 epochs, %",
    "compare_tinyshakespeare": "Shakespeare, 2,400 steps, bits",
    "compare_tinyshakespeare_long": "Shakespeare, 7,200 steps, bits",
}
LINES = (
    ("dense", "dense", "dense_quality"),
    ("AC/DC, dense twin", "acdc", "dense_quality"),
    ("AC/DC, sparse twin", "acdc", "sparse_quality"),
    ("GMP", "gmp", "sparse_quality"),
    ("Top-KAST", "topkast", "sparse_quality"),
    ("RigL, ERK", "rigl_erk", "sparse_quality"),
    ("SET, ERK", "set", "sparse_quality"),
    ("one-shot + fine-tune", "oneshot", "sparse_quality"),
    ("static, ERK", "static_erk", "sparse_quality"),
)
FLOPS = "compare_fashion_mnist"  # whose training FLOPs have a column
TIMED = {
    "compare_fashion_mnist": "Fashion-MNIST",
    "compare_cifar10": "CIFAR-10",
    "compare_tinyshakespeare": "Shakespeare",
}


@cache
def results(task: str) -> list[Row]:
    """Return all rows of a comparison."""
    return list(map(json.loads, (HERE / task / "results.jsonl").read_text().splitlines()))


def rows(task: str, method: str, sparsity: float) -> list[Row]:
    """Return the rows of a method at equal epochs, one for each seed."""
    wanted = (method, 0.0 if method == "dense" else sparsity, "epochs")
    return [r for r in results(task) if (r["method"], r["sparsity"], r["budget"]) == wanted]


def qualities(task: str, method: str, field: str, sparsity: float) -> str:
    """Return mean (lowest to highest), and of how many seeds where it is not all."""
    values = [abs(r[field]) for r in rows(task, method, sparsity)]  # bits are written as minus bits
    if not values:
        return "not run"
    digits = 3 if "bits" in TASKS[task] else 2
    text = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    known = len(rows(task, "dense", 0.0))
    return text if len(values) == known else f"{text}, {_seeds(len(values))}"


def share(task: str, method: str, field: str, sparsity: float) -> float | None:
    """Return the mean of a field over that of the dense runs."""
    values = [r[field] for r in rows(task, method, sparsity)]
    dense = [r[field] for r in rows(task, "dense", 0.0)]
    return mean(values) / mean(dense) if values and dense else None


def table(sparsity: float) -> str:
    """Return the table as Markdown."""
    heads = [f"{head}, {_seeds(len(rows(task, 'dense', 0.0)))}" for task, head in TASKS.items()]
    heads += [f"training FLOPs, {TIMED[FLOPS]}", f"CPU seconds, {' · '.join(TIMED.values())}"]
    text = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for label, method, field in LINES:
        cells = [qualities(task, method, field, sparsity) for task in TASKS]
        spent = [""] * 2
        if field == "sparse_quality" or method == "dense":  # a twin of the same run costs nothing
            flops = share(FLOPS, method, "train_flops_ratio", sparsity)
            seconds = [share(task, method, "cpu_seconds", sparsity) for task in TIMED]
            spent = [
                "–" if flops is None else f"{flops:.1%}".replace("%", " %"),
                " · ".join("–" if s is None else f"{s:.2f}" for s in seconds),
            ]
        text.append(f"| {label} | {' | '.join(cells + spent)} |")
    return "\n".join(text)


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.95, help="of the table (0.95)")
    print(table(parser.parse_args().sparsity))


if __name__ == "__main__":
    main()
