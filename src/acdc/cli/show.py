"""``acdc show``: what a recipe or a grid would do."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from acdc.cli.arguments import Commands, add_command, add_recipe, chosen_recipe
from acdc.cli.output import percent, print_rows
from acdc.errors import InputError

if TYPE_CHECKING:
    from acdc.runs.preview import Preview


def add(commands: Commands) -> None:
    """Add the command."""
    sub = add_command(
        commands,
        "show",
        run,
        "show what a recipe would do: values, phases, layers, cost; or the cells of a grid",
        "Nothing is trained, and no data is needed.",
    )
    add_recipe(sub)


def run(args: argparse.Namespace) -> int:
    """Print what would be trained."""
    from acdc.recipes import grids

    if ":" in args.recipe or args.recipe in grids.GRIDS:
        if args.set:
            raise InputError("--set is for recipes. Change a grid in its function.")
        return _show_grid(args.recipe)
    recipe, changed = chosen_recipe(args)
    from acdc.runs.preview import Preview

    view = Preview(recipe)
    schedule = view.schedule  # first: phases that do not fit are an error, and nothing is printed
    print(f"{recipe.name}: {recipe.about}\n")
    print("Values, which --set PATH=VALUE changes:\n")
    print_rows(
        [(f"  {path}", str(value), _mark(path, changed)) for path, value in _values(recipe)],
        left=3,
    )
    print(f"\nPhases ({schedule.total:,} optimizer steps):\n")
    print(textwrap.indent(schedule.table(), "  "))
    print("\nLayers:\n")
    print_rows(list(_layers(view)), left=2, last_left=True)
    print("\nSize and cost:\n")
    print_rows(list(_sizes(view)), left=1, last_left=True)
    return 0


def _layers(view: Preview) -> Iterator[tuple[str, ...]]:
    yield "  layer", "shape", "weights", "pruned"
    for layer in view.network.layers:
        yield (
            f"  {layer.name.removesuffix('.weight')}",
            "×".join(map(str, layer.shape)),
            f"{layer.weights:,}",
            "yes" if layer.name in view.pruned else f"no: {view.why_dense(layer.name)}",
        )
    counted = {layer.name for layer in view.network.layers}
    for name, reason in view.refused.items():
        if name not in counted:
            shape = tuple(view.parameter(name).shape)
            yield (
                f"  {name.removesuffix('.weight')}",
                "×".join(map(str, shape)),
                f"{math.prod(shape):,}",
                f"no: {reason}",
            )


def _sizes(view: Preview) -> Iterator[tuple[str, ...]]:
    inference = view.network.inference_ratio(view.counts) if view.counts else 1.0
    estimate = "" if view.ledger.exact else ", estimated on untrained weights"
    yield "  parameters", f"{view.parameters:,}", ""
    yield "  prunable weights", f"{view.prunable:,}", f"in {len(view.pruned)} layers"
    yield "  of them kept when sparse", f"{view.kept:,}", percent(view.kept, view.prunable)
    left = view.parameters - view.prunable + view.kept
    yield "  parameters left when sparse", f"{left:,}", percent(left, view.parameters)
    yield "  FLOPs of an inference, dense", f"{view.network.flops():.3e}", ""
    yield (
        "  FLOPs of an inference, sparse",
        f"{view.network.flops(view.counts):.3e}",
        f"{100 * inference:.2f} % of dense{estimate}",
    )
    yield (
        "  FLOPs of training",
        f"{view.ledger.flops:.3e}",
        f"{100 * view.ledger.ratio:.2f} % of dense training{estimate}",
    )


def _mark(path: str, changed: Mapping[str, str]) -> str:
    """Mark the values that differ from the recipe's own."""
    return "(changed)" if any(path == c or path.startswith(f"{c}.") for c in changed) else ""


def _values(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every path that can be set, with its value as it is typed."""
    from dataclasses import fields, is_dataclass

    for field in fields(node):
        if not prefix and field.name in ("name", "about"):
            continue
        value, path = getattr(node, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            yield path, type(value).__name__
            yield from _values(value, f"{path}.")
        elif value is None:
            yield path, "none"
        elif isinstance(value, bool):
            yield path, str(value).lower()
        elif isinstance(value, tuple) and not any(isinstance(v, tuple) for v in value):
            yield path, ",".join(map(str, value)) or "()"
        else:
            yield path, value


def _show_grid(name: str) -> int:
    """Print the cells of a grid."""
    from acdc.compare.cells import cells, explain, prepare
    from acdc.compare.grid import locate
    from acdc.recipes import grids

    grid = locate(grids.find(name))
    print(f"{grid.name}: {grid.about}\n")
    print(f"Task: {grid.task.name}, {grid.task.epochs} epochs dense\n")
    print("Cells:\n")
    rows = [("  method", "sparsity", "seed", "budget", "epochs", "run", "")]
    for cell in cells(grid):
        what = (f"  {cell.method}", f"{100 * cell.sparsity:g} %", f"{cell.seed}", cell.budget)
        if cell.budget != "epochs":
            rows.append((*what, "as measured", "", ""))
            continue
        try:
            run = prepare(grid, cell, grid.task.epochs)
        except Exception as error:  # any error makes a failed cell, as in a comparison
            rows.append((*what, "", "", f"none: {explain(error)}"))
            continue
        first = f"after {run.before.label}" if run.before else ""
        rows.append((*what, f"{run.epochs}", run.label, first))
    print_rows(rows, left=1, last_left=True)
    return 0
