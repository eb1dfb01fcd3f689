"""What the commands print: messages, tables in plain text, and JSON for programs."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO


def say(message: str) -> None:
    """Print a message on standard error, wrapped to the terminal."""
    if is_helper():
        return
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    print(
        textwrap.fill(message, width, break_long_words=False, break_on_hyphens=False),
        file=sys.stderr,
    )


def percent(part: int, whole: int) -> str:
    """Write a share; a dash if the whole is zero.

    >>> percent(1, 8), percent(0, 0)
    ('12.50 %', '–')
    """
    return f"{100 * part / whole:.2f} %" if whole else "–"


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


def forgive_encoding(*streams: TextIO) -> None:
    """Print a question mark for characters that the terminal's encoding lacks."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


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
    return int(os.environ.get("LOCAL_RANK", "0")) > 0
