"""``acdc cite``: what to cite for a method."""

from __future__ import annotations

import argparse

from acdc.cli.arguments import Commands, add_command
from acdc.cli.output import print_rows
from acdc.errors import InputError


def add(commands: Commands) -> None:
    """Add the command."""
    sub = add_command(commands, "cite", run, "print what to cite for a method, as BibTeX")
    sub.add_argument(
        "method", metavar="METHOD", nargs="?", help="name of the method; left out: list them all"
    )


def run(args: argparse.Namespace) -> int:
    """Print the BibTeX entry of a method, or the names of all methods."""
    from acdc.methods import METHODS

    if args.method is None:
        firsts = {name: (kind.__doc__ or "").partition(".")[0] for name, kind in METHODS.items()}
        print_rows([(name, " ".join(first.split())) for name, first in firsts.items()], left=2)
        return 0
    if args.method not in METHODS:
        raise InputError(
            f"There is no method {args.method!r}. The methods are: {', '.join(METHODS)}."
        )
    method = METHODS[args.method]
    if not method.citation:
        raise InputError(f"{method.label} training has no paper to cite.")
    print(method.citation, end="")
    return 0
