"""The command line: the commands of ``COMMANDS``, in this order in ``acdc --help``.

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

from acdc.cli import (
    bench,
    cite,
    compare,
    cost,
    doctor,
    export,
    infer,
    listing,
    report,
    run,
    show,
    study,
)
from acdc.cli.arguments import Version
from acdc.cli.output import (
    drop_output,
    explain,
    is_helper,
    output_error,
    prepare_streams,
    say,
)
from acdc.errors import AcdcError, InputError

# In the order of 'acdc --help'.
COMMANDS = (
    listing,
    show,
    run,
    compare,
    report,
    cost,
    export,
    infer,
    cite,
    study,
    bench,
    doctor,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: The words after ``acdc``; ``None``: those of this process.
    """
    prepare_streams()
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        say("Stopped at once. The last checkpoint is safe: go on with --resume.")
        code = 128 + signal.SIGINT
    except AcdcError as error:
        number = getattr(error, "signal", None)  # of signals.Interrupted, which imports torch
        say(str(error) if number else f"error: {error}")
        # A helper process that was stopped by its first process has not failed.
        code = 2 if number is None else 0 if is_helper() else 128 + int(number)
    except OSError as error:
        if output_error() is None:
            say(f"error: {explain(error)}")
        code = 2
    if lost := output_error():
        drop_output()
        if isinstance(lost, BrokenPipeError):  # its reader left, as in 'acdc list | head -1'
            return 128 + signal.SIGPIPE
        cause = lost.strerror or str(lost)
        say(f"error: Standard output cannot be written: {cause}. Files that were written are kept.")
        return code or 2
    return code


def _run(words: list[str]) -> int:
    try:
        args = parser().parse_args(words)
    except SystemExit:
        if output_error():  # that of --help or --version
            return 2
        raise
    try:
        os.getcwd()
    except FileNotFoundError:  # torch would end the process
        raise InputError("The current folder was removed. Change to another folder.") from None
    args.command_line = shlex.join(["acdc", *words])
    code: int = args.command(args)
    return code


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
