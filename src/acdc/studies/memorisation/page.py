"""The page of the study of memorisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from acdc.pages.figure import DENSE, GREY, SHADE, SPARSE, Form, entry, plate
from acdc.pages.study import Section, Study, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Json = dict[str, Any]


def page(found: Json, command: str) -> Study:
    """Return the page.

    Args:
        found: What :func:`acdc.studies.memorisation.study.study` returned.
        command: The command that writes it again.
    """
    return Study(
        "Memorisation of random labels",
        "Accuracy on training images with random labels, and on the true labels of the same "
        "images, through the phases.",
        [_curves(found), _ends(found)],
        command,
    )


def _title(run: Json) -> str:
    return f"{100 * run['sparsity']:.0f}\u202f% sparse" if run["sparsity"] else "dense"


def _curves(found: Json) -> Section:
    runs = found["runs"]

    def draw(figure: Figure, form: Form) -> None:
        columns = 2 if form == "wide" and len(runs) > 1 else 1
        grid = figure.subplots(-(-len(runs) // columns), columns, squeeze=False, sharey=True)
        for axes in grid.flat[len(runs) :]:
            axes.set_visible(False)
        for axes, run in zip(grid.flat, runs, strict=False):
            for kind, start, stop in run["phases"]:
                if kind == "sparse":
                    axes.axvspan(start, stop, facecolor=SHADE, edgecolor="none", zorder=0)
            axes.plot(run["epochs"], run["random"], color=SPARSE)
            axes.plot(run["epochs"], run["true"], color=DENSE)
            axes.plot(run["epochs"], run["test"], color=GREY, linewidth=0.9)
            axes.set_title(_title(run), fontsize=8.5, loc="left")
            axes.set_xlabel("epochs")
            axes.set_ylim(-2, 102)
        for axes in grid[:, 0]:
            axes.set_ylabel("accuracy, %")
        keys = [entry(SPARSE, "random labels"), entry(DENSE, "true labels"), entry(GREY, "test")]
        figure.legend(handles=keys, loc="outside lower center", ncols=3)

    rows = -(-len(runs) // 2)
    caption = (
        f"Accuracy after each epoch on {runs[0]['labels']} training images against their random "
        f"labels, which the network is trained with, and against their true labels, which it "
        f"never sees; and on the test data. Sparse phases are shaded. No augmentation is applied "
        f"where accuracy is measured."
    )
    heights = {"wide": 0.4 + 2.2 * rows, "narrow": 0.4 + 2.1 * len(runs)}
    return Section(
        "Through the phases",
        plates=[plate("memorised", "Random and true labels", caption, draw, heights)],  # type: ignore[arg-type]
    )


def _ends(found: Json) -> Section:
    rows = [
        [f"{_title(run)}, {run['run']}", end["kind"], f"{end['epoch']:g}",
         *(f"{end[name]:.2f}" for name in ("random", "true", "test"))]
        for run in found["runs"]
        for end in run["ends"]
    ]  # fmt: skip
    return Section(
        "The ends of the phases",
        tables=[
            Table("ends", "Accuracy in percent after the last epoch of each phase. A network that "
                  "guesses has the share of one class.",
                  ["Run", "Phase", "Epoch", "Random labels", "True labels", "Test"], rows)
        ],
    )  # fmt: skip
