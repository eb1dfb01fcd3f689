"""The page of a study: paragraphs, figures and tables, in sections.

A page loads nothing and runs no script, like that of a run. Its values are beside it, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acdc.errors import InputError
from acdc.outfile import write
from acdc.pages.figure import DENSE, GREY, INK, SHADE, SPARSE, Plate, environment, publish
from acdc.runs.record import machine, versions


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the row.

    Args:
        id: Its id in the page.
        caption: What it shows.
        head: The heads of the columns.
        rows: The cells of each row, as many as there are heads.
    """

    id: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, and what they speak of."""

    heading: str
    paragraphs: Sequence[str] = ()
    plates: Sequence[Plate] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Study:
    """What a page shows.

    Args:
        title: What was studied.
        about: One sentence.
        sections: The sections.
        command: The command that writes the page again.
    """

    title: str
    about: str
    sections: Sequence[Section]
    command: str


def publish_study(folder: Path, study: Study, values: Mapping[str, Any]) -> Path:
    """Write ``study.json`` and ``report.html`` into a folder, and return the path of the page.

    Args:
        folder: The folder; it is made if needed.
        study: The page.
        values: All figures, as JSON can hold them.

    Raises:
        InputError: A file cannot be written.
        MissingDependency: matplotlib or jinja2 is not installed.
    """
    text = render(study)
    facts = {"command": study.command, "machine": machine(), "versions": versions()}
    body = json.dumps(facts | dict(values), indent=None, separators=(",", ":"))
    write(folder / "study.json", (body + "\n").encode())
    return publish(folder / "report.html", text)


def render(study: Study) -> str:
    """Return the text of the page.

    Raises:
        MissingDependency: jinja2 is not installed.
    """
    return (
        environment()
        .get_template("study.html.jinja")
        .render(
            study=study,
            colours={"dense": DENSE, "sparse": SPARSE, "shade": SHADE, "ink": INK, "grey": GREY},
            origin=[(key, str(value)) for key, value in {**machine(), **versions()}.items()],
        )
    )


def check_folder(folder: Path) -> None:
    """See that a study may write into a folder, before minutes are spent.

    Raises:
        InputError: The path is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file. Name a folder; it is made if needed.")
