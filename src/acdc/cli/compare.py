"""``acdc compare``: a grid of methods, sparsities and seeds, and the page that compares them."""

from __future__ import annotations

import argparse
from pathlib import Path

from acdc.address import check_address
from acdc.cli.arguments import Commands, add_command
from acdc.cli.output import quiet_libraries, say, without_folder


def add(commands: Commands) -> None:
    """Add the command."""
    sub = add_command(
        commands,
        "compare",
        run,
        "train a grid of methods, sparsities and seeds, and write the page that compares them",
        "Stop it at any moment: --resume trains the cells that are missing.",
    )
    sub.add_argument(
        "grid",
        metavar="GRID",
        help="a grid of 'acdc list', or FILE.py:FUNCTION for your own grid",
    )
    sub.add_argument(
        "--jobs",
        metavar="N",
        type=int,
        help="number of cells trained at the same time, each in a worker, a process with its share "
        "of the threads, so that a crash costs its own cell alone (default: 1; with --on: one in "
        "each worker; with --slurm: as many as there are). 0: one after another in the process of "
        "this command, for debuggers",
    )
    sub.add_argument(
        "--device",
        metavar="D",
        default="auto",
        help="auto, cpu, cuda or mps (default: auto). Several workers may share a card",
    )
    sub.add_argument(
        "--on",
        metavar="ADDRESS",
        help="train on the workers of a Dask scheduler that is running, such as tcp://HOST:8786. "
        "Each worker ('dask worker ADDRESS --nthreads 1') needs the environment of this command, "
        "the folder of --out under the same path, the file of the grid if it is one, and the data: "
        "set ACDC_DATA there as here",
    )
    sub.add_argument(
        "--slurm",
        metavar="KEY=VALUE",
        nargs="*",
        help="train each cell in a job of Slurm. The options are those of sbatch, such as "
        "partition=gpu gres=gpu:1 cpus-per-task=4 time=2:00:00 (default of time: 60 minutes; a job "
        "that runs out of its time goes on in the next). The nodes need the environment of this "
        "command and the folder of --out under the same paths",
    )
    sub.add_argument(
        "--resume",
        action="store_true",
        help="keep what is finished, train what is missing, and try failed cells again",
    )
    sub.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs"),
        help="where the grid gets a folder of its own (default: runs)",
    )


def run(args: argparse.Namespace) -> int:
    """Train the grid and print the path of its page."""
    if args.on is not None:
        check_address(args.on)  # before torch is imported, which takes seconds
    from acdc.recipes import grids

    address = grids.find(args.grid)
    with quiet_libraries():
        from rich.console import Console

        from acdc import console
        from acdc.compare.grid import locate
        from acdc.compare.work import compare
        from acdc.pages import comparison

        folder = args.out / locate(address).name
        with console.GridWatcher(Console(stderr=True)) as watcher:
            outcomes = compare(
                address,
                args.out,
                jobs=_jobs(args),
                on=args.on,
                slurm=args.slurm,
                resume=args.resume,
                device=args.device,
                command=without_folder(args.command_line, args.out),
                watch=watcher,
                draw=comparison.render,
            )
    failed = sum(outcome.row is None for outcome in outcomes)
    if failed:
        say(f"{failed} of {len(outcomes)} cells have no results; the page says why.")
    print(folder / "report.html")
    return 0


def _jobs(args: argparse.Namespace) -> int | None:
    """Return the number of jobs: one worker, unless the cells are trained elsewhere."""
    if args.jobs is None and args.on is None and args.slurm is None:
        return 1
    jobs: int | None = args.jobs
    return jobs
