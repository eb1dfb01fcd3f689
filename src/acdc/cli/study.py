"""``acdc study``: claims of the paper, measured, each with a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from acdc.cli.arguments import Commands, add_command
from acdc.cli.output import quiet_libraries, say
from acdc.errors import InputError


def add(commands: Commands) -> None:
    """Add the command and its studies."""
    top = add_command(
        commands,
        "study",
        None,
        "measure a claim of the paper, and write its page",
        "Each study writes study.json, with all figures, and report.html.",
    )
    studies = top.add_subparsers(metavar="WHAT", required=True)
    _add_convergence(studies)


def _add_out(sub: argparse.ArgumentParser, default: str) -> None:
    sub.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        help=f"where study.json and report.html are written (default: {default})",
    )


def _add_seed(sub: argparse.ArgumentParser, what: str) -> None:
    sub.add_argument("--seed", metavar="N", type=int, default=0, help=f"{what} (default: 0)")


def _add_convergence(studies: Commands) -> None:
    sub = add_command(
        studies,
        "convergence",
        _convergence,
        "hard thresholding, plain, stochastic and alternating, beside proven bounds",
        "Sparse linear and logistic regression and a small network; every bound on every seed, and "
        "what breaks where an assumption is violated. Takes some minutes.",
    )
    _add_out(sub, "runs/convergence")
    _add_seed(sub, "the first seed")
    sub.add_argument(
        "--seeds", metavar="N", type=int, default=20, help="number of seeds (default: 20)"
    )


def _convergence(args: argparse.Namespace) -> int:
    """Measure, write the page, and print its path."""
    from acdc.pages.study import check_folder, publish_study

    if args.seeds < 1:
        raise InputError(f"--seeds is {args.seeds}. It is a whole number from 1 up.")
    out = args.out or Path("runs/convergence")
    check_folder(out)
    from acdc.studies.convergence.page import page
    from acdc.studies.convergence.study import study

    with quiet_libraries():
        found = study(args.seed, args.seeds, say)
        print(publish_study(out, page(found, args.command_line), found))
    return 0
