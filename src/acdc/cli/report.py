"""``acdc report``: the report page of a run, written again."""

from __future__ import annotations

import argparse

from acdc.cli.arguments import Commands, add_command, add_run


def add(commands: Commands) -> None:
    """Add the command."""
    add_run(add_command(commands, "report", run, "write the report page of a run again"))


def run(args: argparse.Namespace) -> int:
    """Write the page and print its path."""
    from acdc.pages.run import render

    print(render(args.run))
    return 0
