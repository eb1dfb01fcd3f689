"""``acdc doctor``: what is installed, what the machine has, and what is wrong."""

from __future__ import annotations

import argparse

from acdc.cli.arguments import Commands, add_command, add_json
from acdc.cli.output import print_json, say


def add(commands: Commands) -> None:
    """Add the command."""
    sub = add_command(
        commands,
        "doctor",
        run,
        "print facts about this installation and machine, and what is wrong",
        "Paste the text into a report.",
    )
    sub.add_argument(
        "--with",
        dest="modules",
        metavar="MODULE",
        nargs="+",
        default=[],
        help="import these modules first, such as those of a program that is slow",
    )
    add_json(sub, "the facts")


def run(args: argparse.Namespace) -> int:
    """Print the facts."""
    from acdc.doctor import facts, report

    found = facts(args.modules)
    if args.json:
        for problem in found["problems"]:
            say(problem)
        print_json(found)
    else:
        print(report(found))
    return 0
