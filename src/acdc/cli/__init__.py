"""The command line: list, show, run, compare, report, cost, export, cite, bench, doctor.

Each command is a module with a function ``add`` that declares its arguments. Modules are imported
for ``acdc --help``, too: a command imports torch and everything else that is heavy in the function
that runs it.

Output for people and output for programs are separate: with ``--json`` the last line on standard
output is one JSON object, and everything else is on standard error. Exit codes: 0 for success; 2
with a sentence for a mistake that the user can correct; 128 + signal for a run that was stopped by
a signal; 1 with a traceback for a defect of acdc.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence

from acdc.cli import bench, cite, compare, cost, doctor, export, listing, report, run, show
from acdc.cli.arguments import Version
from acdc.cli.output import forgive_encoding, is_helper, say
from acdc.errors import AcdcError

# In the order of 'acdc --help'.
COMMANDS = (listing, show, run, compare, report, cost, export, cite, bench, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: The words after ``acdc``; ``None``: those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    args.command_line = shlex.join(["acdc", *words])
    forgive_encoding(sys.stdout, sys.stderr)
    try:
        code: int = args.command(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader closed the pipe, as in 'acdc list | head -1'. Python would raise once more
        # when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        say("Stopped at once. The last checkpoint is safe: go on with --resume.")
        return 128 + signal.SIGINT
    except AcdcError as error:
        number = getattr(error, "signal", None)  # of signals.Interrupted, which imports torch
        say(str(error) if number else f"error: {error}")
        # A helper process that was stopped by its first process has not failed.
        return 2 if number is None else 0 if is_helper() else 128 + int(number)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="acdc",
        description="Train one network, get two: an accurate sparse model and its dense twin.",
        epilog="Start with: acdc run digits",
        allow_abbrev=False,
    )
    top.add_argument("--version", action=Version, help="print the version and exit")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return top
