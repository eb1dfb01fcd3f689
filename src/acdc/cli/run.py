"""``acdc run``: trains a recipe."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from acdc.cli.arguments import Commands, add_command, add_json, add_recipe, chosen_recipe
from acdc.cli.output import is_helper, print_json, quiet_libraries
from acdc.errors import AcdcError, InputError


def add(commands: Commands) -> None:
    """Add the command."""
    sub = add_command(
        commands, "run", run, "train a recipe: a sparse model, its dense twin and a report"
    )
    add_recipe(sub)
    sub.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs"),
        help="where the run gets a folder of its own, named after the recipe and the values that "
        "were set (default: runs)",
    )
    sub.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in that folder from its last checkpoint; show the results if the "
        "run is complete",
    )
    sub.add_argument("--seed", metavar="N", type=int, help="short for --set seed=N")
    sub.add_argument(
        "--devices",
        metavar="N",
        type=int,
        help="short for --set devices=N: processes, one for each device, that share every batch "
        "(default: those that torchrun has started, or one)",
    )
    sub.add_argument(
        "--device", metavar="D", default="auto", help="auto, cpu, cuda or mps (default: auto)"
    )
    sub.add_argument(
        "--download", action="store_true", help="download the data if no copy of it is found"
    )
    add_json(sub, "the record of the run")


def run(args: argparse.Namespace) -> int:
    """Train the recipe, print the results, and write the report."""
    from acdc.runs.recipe import label

    recipe, changed = chosen_recipe(args)
    # Checked before data and libraries are loaded: phases that do not fit fail at once.
    recipe.method.resolve(recipe.data.steps_per_epoch(recipe.batch_size))

    path = args.out / label(recipe.name, changed)
    with quiet_libraries():
        from rich.console import Console

        from acdc import console
        from acdc.runs import train
        from acdc.runs.record import SUMMARY, Folder

        helper = is_helper()
        err = Console(stderr=True, quiet=helper)
        complete = args.resume and Folder(path).record.exists()
        what = f"{'Going on with ' if args.resume else ''}{recipe.name}, writing to {path}"
        with console.Watcher(what, recipe.dense_finetune, err) as watcher:
            record = train.run(
                recipe,
                path,
                changed=changed,
                resume=args.resume,
                device=args.device,
                download=args.download,
                command=args.command_line,
                watch=None if helper else watcher,
            )
        if helper:
            return 0
        # The results are on the disk: an error in the table or in the page cannot lose them.
        out = err if args.json else Console(soft_wrap=True)
        if complete:
            err.print("This run is complete: nothing was trained.", highlight=False)
        try:
            try:
                out.print()
                out.print(console.outcome(record))
                out.print(f"\nTook {record['seconds']:.1f} s.", highlight=False)
            finally:
                page = _render(path)
            out.print(f"Report: {page}", highlight=False, soft_wrap=True)
        finally:
            if args.json:
                print_json({key: record[key] for key in SUMMARY})
    return 0


def _render(path: Path) -> Path:
    """Write the report, and say how to write it later if that fails."""
    from acdc.pages.run import render

    try:
        return render(path)
    except (AcdcError, OSError) as error:
        raise InputError(
            f"The run is complete and its record is in {path}, but its report could not be "
            f"written: {error} Once the cause is removed: acdc report {shlex.quote(str(path))}"
        ) from error
