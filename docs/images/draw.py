"""The picture of README: Figure 1 of a committed report page, as a file of its own.

    python docs/images/draw.py

``python experiments/fashion_mnist/run.py`` trains the run and writes the page
``experiments/fashion_mnist/report.html``. The first drawing of that page is copied here, unchanged
but for its size and its typeface, which an SVG file has to name itself.
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "experiments" / "fashion_mnist" / "report.html"
OUT = HERE / "accuracy.svg"
WIDTH = 760  # pixels
FONT = "Helvetica Neue, Helvetica, Arial, Liberation Sans, Noto Sans, sans-serif"


def drawing(page: str) -> str:
    """Return the first drawing of a report page as a whole SVG file."""
    svg = re.search(r"<svg viewBox=\"0 0 (\S+) (\S+)\"[^>]*>(.*?)</svg>", page, flags=re.S)
    if svg is None:
        raise SystemExit(f"There is no drawing in {PAGE}.")
    width, height, content = svg.groups()
    lines = [line.rstrip() for line in content.strip().splitlines()]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{WIDTH}" height="{WIDTH * float(height) / float(width):.0f}" '
            f'font-family="{FONT}" stroke-linejoin="round">',
            "<!-- Written by docs/images/draw.py from experiments/fashion_mnist/report.html -->",
            *lines,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    OUT.write_text(drawing(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
