"""``acdc list``: the recipes and the grids."""

from __future__ import annotations

import argparse

from acdc.cli.arguments import Commands, add_command
from acdc.cli.output import print_rows


def add(commands: Commands) -> None:
    """Add the command."""
    add_command(commands, "list", run, "list the recipes, and the grids of 'acdc compare'")


def run(_: argparse.Namespace) -> int:
    """Print the names, with a sentence each."""
    from acdc import recipes
    from acdc.recipes import grids

    rows = [(name, recipes.get(name).about) for name in recipes.names()]
    print_rows([*rows, *((name, grid().about) for name, grid in grids.GRIDS.items())], left=2)
    return 0
