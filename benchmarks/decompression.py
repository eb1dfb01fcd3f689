"""What it costs a short run that weights come back: training loss and weight norm at the switches.

    ACDC_DATA=... python benchmarks/decompression.py [--seeds 2] [--span 250] [--window 50]

The small ResNet of ``compare_fashion_mnist`` at 95 %, by ERK: a span dense, one sparse, one dense,
at the grid's peak learning rate throughout. ``before`` and ``after`` are the mean training loss of
the last window in front of a switch and of the first one behind it, and ``norm`` is that of all
convolutions together. The other lines tell what the rise of the loss comes from: no momentum reset;
a lower learning rate for the last span; and a run that stays dense. All see the same batches.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import acdc
from acdc.compare.grid import Task
from acdc.methods.base import Reset
from acdc.recipes.grids import SCOPE, compare_fashion_mnist
from common import save

SPARSITY = 0.95


@dataclass(frozen=True)
class Line:
    """One run: whether it is pruned, what a decompression resets, and its last learning rate."""

    pruned: bool = True
    reset: Reset = "all"
    tail: float = 1.0  # of the peak


LINES = {
    "AC/DC": Line(),
    "no momentum reset": Line(reset="none"),
    "0.3 x lr after it": Line(tail=0.3),
    "dense throughout": Line(pruned=False),
}


def norm(model: nn.Module) -> float:
    """Return the norm of all convolutions' weights together."""
    weights = (m.weight for m in model.modules() if isinstance(m, nn.Conv2d))
    return float(nn.utils.get_total_norm(weights))


def train(line: Line, task: Task, data: Any, seed: int, span: int, window: int) -> dict[str, Any]:
    """Train three spans; return what the two switches do."""
    torch.manual_seed(seed)
    recipe = task.recipe
    rate = recipe.optimizer.lr
    model = recipe.model.build().to(memory_format=torch.channels_last)
    optimizer = recipe.optimizer.build(model.parameters())
    if line.pruned:
        third = f"{span}st"
        plan = acdc.phases(1, [("dense", third), ("sparse", third), ("dense", third)])
        pattern = acdc.Unstructured(SPARSITY, SCOPE)
        method = acdc.ACDC(pattern, plan.resolve(3 * span), reset=line.reset)
        acdc.Sparsifier(method, model, optimizer)
    losses, norms = [], []
    batches = data.train_samples // recipe.batch_size
    for step in range(3 * span):
        for group in optimizer.param_groups:
            group["lr"] = rate * (line.tail if step >= 2 * span else 1.0)
        x, y = data.train_batch(step // batches, step % batches, recipe.batch_size, seed)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(
            model(x.contiguous(memory_format=torch.channels_last)), y
        )
        loss.backward()
        norms.append(norm(model))  # of the weights that this loss is of
        optimizer.step()
        losses.append(loss.item())
    row: dict[str, Any] = {}
    for switch, at in (("compression", span), ("decompression", 2 * span)):
        row[switch] = {
            "before": statistics.fmean(losses[at - window : at]),
            "after": statistics.fmean(losses[at : at + window]),
            "norm_before": norms[at - 1],
            "norm_after": norms[at],
        }
    row["last"] = statistics.fmean(losses[-window:])
    return row


def main() -> None:
    """Train all lines, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--span", type=int, default=250, help="steps of each third")
    parser.add_argument("--window", type=int, default=50, help="steps that a loss is averaged over")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = compare_fashion_mnist().task
    data = task.recipe.data.load()
    rows = []
    print(f"{'run':20} {'seed':>4} {'weights go: loss':>18} {'norm':>13} {'come back: loss':>18}")
    for seed in range(args.seeds):
        for name, line in LINES.items():
            row = train(line, task, data, seed, args.span, args.window)
            rows.append({"run": name, "seed": seed, **row})
            go, back = row["compression"], row["decompression"]
            print(
                f"{name:20} {seed:4} {go['before']:8.3f} -> {go['after']:.3f} "
                f"{go['norm_before']:6.1f} -> {go['norm_after']:.1f} "
                f"{back['before']:8.3f} -> {back['after']:.3f}",
                flush=True,
            )
    save("decompression", rows, data=data.name, sparsity=SPARSITY, task=task.name, **vars(args))


if __name__ == "__main__":
    main()
