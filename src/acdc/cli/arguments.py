"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acdc.cli.output import processes_started
from acdc.errors import InputError

if TYPE_CHECKING:
    from acdc.runs.recipe import Recipe

Commands = Any  # argparse's own type for the result of add_subparsers is private


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int] | None,
    about: str,
    more: str = "",
) -> argparse.ArgumentParser:
    """Add a command and return its parser.

    Args:
        commands: The result of ``add_subparsers``.
        name: The word on the command line.
        run: Runs the command and returns its exit code; ``None``: the command has commands of its
            own.
        about: One line for ``acdc --help``.
        more: Further sentences for the help of this command.
    """
    sub: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}. {more}".strip(),
        allow_abbrev=False,
    )
    sub.set_defaults(command=run)
    return sub


def add_recipe(sub: argparse.ArgumentParser) -> None:
    """Add the name of a recipe, and ``--set``."""
    sub.add_argument("recipe", metavar="RECIPE", help="a name of 'acdc list'")
    sub.add_argument(
        "--set",
        metavar="PATH=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change a value of the recipe, such as method.pattern.sparsity=0.95; 'acdc show' "
        "lists all paths",
    )


def add_run(sub: argparse.ArgumentParser) -> None:
    """Add the folder of a run."""
    sub.add_argument("run", metavar="RUN", type=Path, help="the folder of a run")


def add_json(sub: argparse.ArgumentParser, what: str) -> None:
    """Add the flag ``--json``."""
    sub.add_argument(
        "--json",
        action="store_true",
        help=f"print {what} as the last line on standard output, and everything else on standard "
        f"error",
    )


def chosen_recipe(args: argparse.Namespace) -> tuple[Recipe, dict[str, str]]:
    """Return the recipe as changed by ``--set``, ``--seed`` and ``--devices``, and the changes.

    Under ``torchrun``, the number of processes that it has started is the number of devices.
    """
    from acdc import recipes
    from acdc.runs.recipe import change

    changed: dict[str, str] = {}
    for word in args.set:
        path, equals, value = word.partition("=")
        if not (path and equals):
            raise InputError(
                f"--set {word}: write PATH=VALUE, such as --set method.pattern.sparsity=0.95, and "
                f"the name of the recipe before it."
            )
        changed[path] = value
    if getattr(args, "seed", None) is not None:
        changed["seed"] = str(args.seed)
    if hasattr(args, "devices"):
        if args.devices is not None:
            changed["devices"] = str(args.devices)
        elif (started := processes_started()) > 1:
            changed.setdefault("devices", str(started))
    return change(recipes.get(args.recipe), changed), changed


class Version(argparse.Action):
    """Print the version and exit."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print the version and exit."""
        from acdc import __version__

        print(f"acdc {__version__}")
        parser.exit()
