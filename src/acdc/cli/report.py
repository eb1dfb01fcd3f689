"""``acdc report``: the report page of a run, written again."""

from __future__ import annotations

import argparse

from acdc.cli.arguments import Commands, add_command, add_run
from acdc.errors import InputError


def add(commands: Commands) -> None:
    """Add the command."""
    add_run(add_command(commands, "report", run, "write the report page of a run again"))


def run(args: argparse.Namespace) -> int:
    """Write the page and print its path."""
    from acdc.pages.run import render

    try:
        print(render(args.run))
    except OSError as error:
        raise InputError(
            f"The report of {args.run} could not be written: {error.strerror or error}."
        ) from error
    return 0
