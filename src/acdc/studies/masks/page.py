"""The page of the study of a run's supports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from acdc.pages.figure import DENSE, FAINT, SHADE, SPARSE, Form, entry, legend, plate
from acdc.pages.study import Section, Study, Table
from acdc.pages.tables import short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Json = dict[str, Any]


def page(found: Json, command: str) -> Study:
    """Return the page.

    Args:
        found: What :func:`acdc.studies.masks.study.study` returned.
        command: The command that writes it again.
    """
    return Study(
        f"Supports of {found['run']}",
        f"{len(found['steps'])} compressions of {found['numel']:,} prunable weights: how much "
        f"changes, what stays, and what comes back.",
        [_change(found), _back(found)],
        command,
    )


def _change(found: Json) -> Section:
    def draw(figure: Figure, form: Form) -> None:
        axes = figure.subplots()
        for kind, start, stop in found["phases"]:
            if kind == "sparse":
                axes.axvspan(start, stop, facecolor=SHADE, edgecolor="none", zorder=0)
        for layer in found["layers"].values():
            axes.plot(found["epochs"][1:], _percent(layer["entered"]), color=FAINT, linewidth=0.8)
        whole = found["whole"]
        axes.plot(found["epochs"][1:], _percent(whole["entered"]), color=SPARSE, marker="o",
                  markersize=3.5)  # fmt: skip
        axes.plot(found["epochs"], _percent(whole["last"]), color=DENSE, marker="o",
                  markersize=3.5)  # fmt: skip
        axes.set_ylim(-2, 102)
        axes.set_xlabel("training, epochs")
        axes.set_ylabel("% of the support")
        keys = [
            entry(SPARSE, "new since the last compression"),
            entry(FAINT, "the same, each layer"),
            entry(DENSE, "also in the last support"),
        ]
        legend(axes, keys, form, 3)

    whole = found["whole"]
    first, last = 100 * whole["entered"][0], 100 * whole["entered"][-1]
    rows = [
        [
            f"{number}",
            f"{found['epochs'][number - 1]:g}",
            f"{whole['kept'][number - 1]:,}",
            "–" if number == 1 else f"{100 * whole['entered'][number - 2]:.2f}",
            f"{100 * whole['first'][number - 1]:.2f}",
            f"{100 * whole['last'][number - 1]:.2f}",
        ]
        for number in range(1, len(found["steps"]) + 1)
    ]
    caption = (
        "The share of the support that is new at each compression, of the whole network and of "
        "each layer, and the share that the last support keeps, too. Sparse phases are shaded."
    )
    return Section(
        "Change",
        [
            f"At the second compression {first:.1f}\u202f% of the support were new, at the last "
            f"one {last:.1f}\u202f%. {whole['always']:,} weights are in all supports, "
            f"{100 * whole['always'] / whole['kept'][-1]:.1f}\u202f% of the last one; "
            f"{whole['ever']:,} of {found['numel']:,} prunable weights are in one at least."
        ],
        [plate("change", "Change of the support", caption, draw, {"wide": 3.0, "narrow": 3.2})],
        [
            Table("compressions", "The compressions. New: not kept at the compression before; in "
                  "percent of the support, like the share that the first and the last support "
                  "keep, too.", ["No.", "Epoch", "Kept", "New", "In the first", "In the last"],
                  rows)
        ],
    )  # fmt: skip


def _percent(shares: list[float]) -> list[float]:
    return [100 * share for share in shares]


def _back(found: Json) -> Section:
    whole = found["whole"]
    returns = [
        [f"{times} times", f"{count:,}", f"{100 * count / whole['ever']:.2f}"]
        for times, count in whole["returns"].items()
    ]
    layers = [
        [
            short(name),
            f"{layer['kept'][-1]:,}",
            *(f"{100 * layer['entered'][at]:.1f}" for at in (0, -1)),
            f"{100 * layer['always'] / max(layer['kept'][-1], 1):.1f}",
            f"{_came_back(layer):,}",
            *(_size(found, name, at) for at in (0, -1)),
        ]
        for name, layer in found["layers"].items()
    ]
    return Section(
        "What comes back",
        [
            "A weight that left the support is zero, and a dense phase begins it there. It comes "
            "back if that phase makes it large enough."
        ],
        tables=[
            Table("returns", "How often weights left the support and came back: weights that were "
                  "kept once at least, and their share of these in percent.",
                  ["Came back", "Weights", "%"], returns),
            Table("layers", "The layers. New: percent of the support at the second and at the last "
                  "compression. Always: weights in all supports, in percent of the last one. Came "
                  "back: weights that left and came back. Size: root mean square of the new "
                  "weights after the cut, divided by that of the others, at the second and at the "
                  "last compression.",
                  ["Layer", "Kept", "New, 2nd", "New, last", "Always", "Came back", "Size, 2nd",
                   "Size, last"], layers),
        ],
    )  # fmt: skip


def _came_back(layer: Json) -> int:
    return sum(count for times, count in layer["returns"].items() if times != "0")


def _size(found: Json, name: str, at: int) -> str:
    if not found["norms"] or (row := found["norms"][at]["layers"].get(name)) is None:
        return "–"
    if not row["norm"] or not row["stayed"]:
        return "–"
    return f"{row['norm'] / row['stayed']:.2f}"
