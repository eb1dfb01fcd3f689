"""``acdc cost``: the FLOPs of a recipe, by phase and by layer."""

from __future__ import annotations

import argparse
import sys
import textwrap

from acdc.cli.arguments import Commands, add_command, add_json, add_recipe, chosen_recipe
from acdc.cli.output import percent, print_json, print_rows

CONVENTION = (
    "One weight at one output position is one multiply-add, 2 FLOPs. Convolutions and linear "
    "layers count. A training step costs 3 forward passes per sample, in a sparse phase on the "
    "kept weights alone. A sparse step that needs the gradient of all weights costs 2 sparse "
    "passes and a dense one."
)


def add(commands: Commands) -> None:
    """Add the command."""
    about = "count the FLOPs of a recipe, by phase and by layer"
    sub = add_command(commands, "cost", run, about, CONVENTION)
    add_recipe(sub)
    add_json(sub, "the counts")


def run(args: argparse.Namespace) -> int:
    """Print the counts."""
    from acdc.runs.preview import Preview

    recipe, _ = chosen_recipe(args)
    view = Preview(recipe)
    out = sys.stderr if args.json else sys.stdout
    ledger = view.ledger
    dense_total = ledger.dense_flops
    print(f"{recipe.name}: {recipe.about}\n", file=out)
    print(textwrap.fill(CONVENTION, 100), file=out)
    if not ledger.exact:
        note = (
            "How many weights a global pattern keeps in each layer depends on the trained weights: "
            "the sparse figures are estimated on untrained weights. The record of a run has the "
            "exact ones."
        )
        print("\n" + textwrap.fill(note, 100), file=out)
    print("\nTraining, by phase:\n", file=out)
    rows = [("  phase", "epochs", "steps", "FLOPs", "of dense training")]
    for (kind, epochs, steps, _), cost in zip(view.schedule.rows(), ledger.phases, strict=True):
        share = percent(cost.flops, dense_total)
        rows.append((f"  {kind}", epochs, steps, f"{cost.flops:,}", share))
    rows.append(
        (
            "  total",
            str(view.schedule.epochs),
            f"{view.schedule.total:,}",
            f"{ledger.flops:,}",
            percent(ledger.flops, dense_total),
        )
    )
    print_rows(rows, left=3, file=out)
    print("\nInference on one sample, by layer:\n", file=out)
    print(textwrap.indent(view.network.table(view.counts), "  "), file=out)
    print("\nInference FLOPs:\n", file=out)
    sparse, dense = view.network.flops(view.counts), view.network.flops()
    print_rows(
        [("  dense", f"{dense:,}", ""), ("  sparse", f"{sparse:,}", percent(sparse, dense))],
        left=1,
        file=out,
    )
    if args.json:
        kept = view.network.kept(view.counts)
        layers = [
            {"name": x.name, "weights": x.weights, "kept": kept[x.name], "macs": x.macs}
            for x in view.network.layers
        ]
        print_json(
            {
                "recipe": recipe.name,
                "estimated": not ledger.exact,
                "dense_flops": dense,
                "sparse_flops": sparse,
                "inference_flops_ratio": view.network.inference_ratio(view.counts),
                "train_flops": ledger.flops,
                "train_flops_dense": dense_total,
                "train_flops_ratio": ledger.ratio,
                "phases": ledger.to_dict()["phases"],
                "layers": layers,
            }
        )
    return 0
