"""What the commands print: messages, tables in plain text, and JSON for programs."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TextIO


def say(message: str) -> None:
    """Print a message on standard error, wrapped to the terminal."""
    if is_helper():
        return
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    text = textwrap.fill(message, width, break_long_words=False, break_on_hyphens=False)
    with contextlib.suppress(OSError):  # a full disk under a log must not hide the exit code
        print(text, file=sys.stderr, flush=True)


def percent(part: int, whole: int) -> str:
    """Write a share; a dash if the whole is zero.

    >>> percent(1, 8), percent(0, 0)
    ('12.50 %', '–')
    """
    return f"{100 * part / whole:.2f} %" if whole else "–"


def without_folder(command_line: str, path: Path) -> str:
    """Return a command with the name of a file or folder in place of its path.

    A recorded command is published, and the path says nothing to readers on other machines.

    >>> without_folder("acdc compare a.py:grid --out /some/where/a", Path("/some/where/a"))
    'acdc compare a.py:grid --out a'
    """
    name = path.name or path.resolve().name or str(path)

    def short(word: str) -> str:
        option, equals, value = word.partition("=")
        if equals and option.startswith("--"):
            return f"{option}={short(value)}"
        return name if word and Path(word) == path else word

    return shlex.join(map(short, shlex.split(command_line)))


def print_json(data: Mapping[str, Any]) -> None:
    """Print one JSON object as the last line on standard output."""
    sys.stderr.flush()
    print(json.dumps(data), flush=True)


def print_rows(
    rows: Sequence[tuple[str, ...]],
    left: int,
    last_left: bool = False,
    file: TextIO | None = None,
) -> None:
    """Print rows in columns.

    Args:
        rows: The cells of every row.
        left: Number of columns, from the first, that are aligned to the left.
        last_left: Whether the last column is aligned to the left, too.
        file: Where to print; ``None``: standard output.
    """
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(width) - 1
    for row in rows:
        cells = [
            cell.ljust(w) if i < left or (last_left and i == last) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, width, strict=True))
        ]
        print("  ".join(cells).rstrip(), file=file)


# --- standard streams that are missing, full or closed ------------------------------------------


class _Output(io.FileIO):
    """Standard output. It remembers the error of a write: argparse, for one, passes over it."""

    error: ClassVar[OSError | None] = None

    def write(self, data: Any) -> int:
        """Write bytes."""
        try:
            return super().write(data)
        except OSError as error:
            _Output.error = error
            raise


def prepare_streams() -> None:
    """Put streams in the place of those that are closed, and watch standard output.

    The next file that is opened would get the number of a closed stream, and with it what is
    printed. Printing to closed standard output fails, as it does in other programs.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # gets the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None or sys.stdout is sys.__stdout__:  # not where a test captures it
        number = os.open(os.devnull, os.O_RDONLY) if sys.stdout is None else sys.stdout.fileno()
        raw = io.BufferedWriter(_Output(number, "w", closefd=False))
        encoding = getattr(sys.stdout, "encoding", "utf-8")
        sys.stdout = io.TextIOWrapper(raw, encoding, line_buffering=raw.isatty())
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A question mark for characters that the terminal's encoding lacks.
            stream.reconfigure(errors="replace")


def output_error() -> OSError | None:
    """Return why standard output could not be written, if it could not."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    return _Output.error


def drop_output() -> None:
    """Drop what could not be written: Python would raise once more at exit."""
    _Output.error = None
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    with contextlib.suppress(OSError):
        sys.stdout.flush()


_REMEDIES = {
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ENOTDIR: "A part of the path is a file, not a folder. Choose another path.",
    errno.ELOOP: "Its symbolic links lead in a circle. Remove one of them, or choose another path.",
    errno.EACCES: "Choose a path that you may read and write.",
    errno.EPERM: "Choose a path that you may read and write.",
    errno.EROFS: "The disk is read-only. Choose another path.",
    errno.ENOSPC: "Free some space, or choose another disk.",
    errno.EDQUOT: "Free some space, or choose another disk.",
}


def explain(error: OSError) -> str:
    """Return what the system refused, and what to do, in sentences."""
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    cause = (error.strerror or str(error)).rstrip(".")
    remedy = _REMEDIES.get(error.errno or 0, "Check the path, the disk and the permissions.")
    return f"{where}{cause}. {remedy}"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the log messages and warnings of the libraries that a run uses."""
    import logging
    import warnings

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for module in ("lightning", "torch.jit", "tensorboard"):
                warnings.filterwarnings("ignore", module=module.replace(".", r"\."))
            yield
    finally:
        logging.disable(before)


def is_helper() -> bool:
    """Whether this process is not the first one of a run on several devices. It prints nothing."""
    rank = os.environ.get("RANK" if processes_started() > 1 else "LOCAL_RANK", "0")
    return int(rank) > 0


def processes_started() -> int:
    """Return how many processes ``torchrun`` has started for this run; 1: it started none."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1
