"""How figures and pages are made: drawings as SVG, templates, files that appear as a whole.

Every figure is drawn twice, wide and narrow, and the page shows the drawing that fits the screen.
The labels of a wide drawing would be too small on a telephone.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from acdc.errors import need
from acdc.outfile import write

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Form = Literal["wide", "narrow"]

# One colour per twin, in figures and tables alike. Blue and vermilion stay apart under every common
# form of colour blindness, and both are dark enough to be read as text on white.
DENSE = "#0067a5"
SPARSE = "#c04a00"
SHADE = "#fbeee5"
INK = "#1c1c1c"
GREY = "#6f6f6f"
FAINT = "#d2d2d2"

WIDTH: dict[Form, float] = {"wide": 7.1, "narrow": 3.7}  # inches


@dataclass(frozen=True)
class Plate:
    """A numbered figure with its caption, or the reason why there is no figure."""

    id: str
    heading: str
    caption: str = ""
    drawings: Mapping[Form, str] = field(default_factory=dict)
    absent: str = ""


Draw = Callable[["Figure", Form], None]

# Text stays text (selectable, searchable, in the page's own typeface), so no font is embedded. The
# salt makes the ids, and with them the file, the same every time.
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "acdc",
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.minor.size": 1.8,
    "ytick.minor.size": 1.8,
    "lines.linewidth": 1.3,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "figure.constrained_layout.h_pad": 0.04,
    "figure.constrained_layout.hspace": 0.05,
    "figure.constrained_layout.w_pad": 0.03,
}


def _svg(draw: Draw, form: Form, height: float, prefix: str) -> str:
    """Draw and return the SVG element, its ids made unique in the page by ``prefix``."""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise need("matplotlib", "lab") from error

    # The user's own settings of matplotlib must neither change the page nor be changed by it.
    settings: Any = {k: v for k, v in matplotlib.rcParamsDefault.items() if "backend" not in k}
    with matplotlib.rc_context(settings | STYLE):
        figure = Figure(figsize=(WIDTH[form], height), layout="constrained")
        canvas: Any = FigureCanvasSVG(figure)
        draw(figure, form)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.print_svg(buffer, metadata=nothing)
    return _embed(buffer.getvalue(), prefix)


def _embed(svg: str, prefix: str) -> str:
    """Turn an SVG file into an element of a page that holds several drawings."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.S)  # would style the whole page
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(
        r"<svg[^>]*?viewBox=\"([^\"]*)\"[^>]*>",
        r'<svg viewBox="\1" role="img" aria-labelledby="' + prefix.split("-")[0] + '-caption">',
        svg,
        count=1,
    )
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    # The size of the text is ours, its typeface the page's. matplotlib before 3.11 writes both as
    # one "font:".
    svg = re.sub(r"font: (?:[a-z0-9]+ )*?([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    # A hundredth of a point is finer than any printer; matplotlib's six digits double the file.
    digits = re.compile(r"(\.\d\d)\d+")
    return re.sub(r' d="[^"]*"', lambda path: digits.sub(r"\1", path[0]), svg)


def plate(name: str, heading: str, caption: str, draw: Draw, height: Mapping[Form, float]) -> Plate:
    """Draw a figure in both forms; ``height`` in inches."""
    forms: tuple[Form, ...] = ("wide", "narrow")
    drawings = {form: _svg(draw, form, height[form], f"{name}-{form}") for form in forms}
    return Plate(name, heading, caption, drawings)


def columns_of(labels: Sequence[str], form: Form, most: int) -> int:
    """Return the columns of a legend: so many, or as many as the longest label lets fit."""
    inches = 0.35 + 0.05 * max(map(len, labels), default=0)
    return max(1, min(most if form == "wide" else 2, int(WIDTH[form] / inches)))


def height_with_legend(labels: Sequence[str], most: int) -> dict[Form, float]:
    """Return the heights of a figure in inches, which grow with a legend of many rows."""
    bare: dict[Form, float] = {"wide": 3.6, "narrow": 3.9}
    room: dict[Form, int] = {"wide": 3, "narrow": 7}  # rows of a legend that fit into these heights
    rows = {form: math.ceil(len(labels) / columns_of(labels, form, most)) for form in bare}
    return {form: bare[form] + 0.17 * max(0, rows[form] - room[form]) for form in bare}


def legend(axes: Axes, handles: Sequence[Any], form: Form, columns: int | None = None) -> None:
    """Draw a legend above the axes, with at most this number of columns on a wide page.

    Without a number it is one row there.
    """
    labels = [handle.get_label() for handle in handles]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=len(labels)
        if columns is None and form == "wide"
        else columns_of(labels, form, columns or 2),
        borderaxespad=0.1,
        borderpad=0.2,
        handlelength=1.6,
        columnspacing=1.6,
        labelspacing=0.35,
    )


def entry(color: str, label: str, **style: Any) -> Line2D:
    """Return an entry of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, label=label, **style)


def environment() -> Environment:
    """Return the template engine. It escapes all values, and an unknown name is an error.

    Raises:
        MissingDependency: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise need("jinja2", "lab") from error
    return jinja2.Environment(
        loader=jinja2.PackageLoader("acdc.pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def publish(path: Path, text: str) -> Path:
    """Write a page, as a whole or not at all, and return its path.

    Raises:
        InputError: It cannot be written.
    """
    # Half of a character pair, as a name can have that was no UTF-8, becomes a question mark.
    return write(path, text.encode("utf-8", errors="replace"))
