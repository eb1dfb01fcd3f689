"""The page of the study of a run's twins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from acdc.pages.figure import DENSE, FAINT, GREY, INK, SPARSE, Form, Plate, entry, legend, plate
from acdc.pages.study import Section, Study, Table
from acdc.pages.tables import short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Json = dict[str, Any]

KINDS = {
    "twins": "twins",
    "pruned": "dense network, pruned and trained on",
    "cut": "dense network, cut once",
    "seeds": "two dense runs",
}


def page(found: Json, command: str) -> Study:
    """Return the page.

    Args:
        found: What :func:`acdc.studies.twins.study.study` returned.
        command: The command that writes it again.
    """
    return Study(
        f"Twins of {found['run']}",
        f"{found['method']} on {found['data']}: how alike the sparse and the dense twin are.",
        [_agreement(found), _layers(found), _calibration(found), _classes(found), _uses(found)],
        command,
    )


def _agreement(found: Json) -> Section:
    rows, who = [], []
    for couple in found["couples"]:
        rows.append(
            [
                couple["name"],
                KINDS[couple["kind"]],
                *(f"{value:.2f}" for value in couple["accuracy"]),
                f"{100 * couple['agreement']:.2f}",
                *(f"{value:.4f}" for value in couple["cross_entropy"]),
            ]
        )
        counts = couple["contingency"]
        names = ("both", "first", "second", "neither", "same_mistake")
        who.append([couple["name"], *(f"{counts[name]:,}" for name in names)])
    return Section(
        "Agreement",
        [_verdict(found["claim"])],
        tables=[
            Table(
                "kinds",
                "Means over the couples of a kind: agreement in percent of the test samples, "
                "cross-entropy in nats over both directions, linear CKA over all layers.",
                ["Kind", "Couples", "Agreement", "Cross-entropy", "Linear CKA"],
                [
                    [
                        KINDS[kind["kind"]],
                        f"{kind['couples']}",
                        f"{100 * kind['agreement']:.2f}",
                        f"{kind['cross_entropy']:.4f}",
                        f"{kind['alignment']:.4f}",
                    ]
                    for kind in found["kinds"]
                ],
            ),
            Table(
                "agreement",
                "First and second: the sparse and the dense network of a couple, or two dense "
                "ones. Accuracy and agreement in percent of the test samples; cross-entropy in "
                "nats of the outputs of the second under those of the first, and the reverse.",
                ["Couple", "Kind", "First", "Second", "Agreement", "H(1, 2)", "H(2, 1)"],
                rows,
            ),
            Table(
                "contingency",
                "Who is right: numbers of test samples. “Same mistake” is a part of “neither”.",
                ["Couple", "Both", "First only", "Second only", "Neither", "Same mistake"],
                who,
            ),
        ],
    )


def _verdict(claim: Json) -> str:
    share = f"{100 * claim['agreement']:.2f}\u202f%"
    if not claim["compared"]:
        return (
            f"The twins agree on {share} of the test samples. To compare them with a dense network "
            f"and its pruned version, name other runs with --against."
        )
    more = len(claim["more_than"])
    return (
        f"Do the twins agree more than a dense network and its pruned version? They agree on "
        f"{share} of the test samples: more than {more} of {claim['compared']} couples of a dense "
        f"network and its pruned version. One sample is {100 / claim['samples']:.2f} percentage "
        f"points."
    )


def _layers(found: Json) -> Section:
    names = list(found["couples"][0]["layers"])
    colours = {"twins": SPARSE, "pruned": DENSE, "cut": GREY, "seeds": INK}

    def draw(figure: Figure, form: Form) -> None:
        axes = figure.subplots()
        for couple in reversed(found["couples"]):
            values = [couple["layers"][name] for name in names]
            axes.plot(range(1, len(names) + 1), values, color=colours[couple["kind"]],
                      marker="o", markersize=2.5)  # fmt: skip
        axes.set_ylim(None, 1.01)
        axes.set_xlabel("layer, in the order of the model")
        axes.set_ylabel("linear CKA")
        used = dict.fromkeys(couple["kind"] for couple in found["couples"])
        keys = [entry(colours[kind], KINDS[kind]) for kind in used]
        legend(axes, keys, form, 2)

    caption = (
        f"Linear CKA of the outputs of each convolution and linear layer on {found['samples']} "
        f"test samples: 1 where the features of both networks are alike up to a rotation. The "
        f"first layer is {short(names[0])}, the last one {short(names[-1])}."
    )
    return Section(
        "Along the layers",
        plates=[plate("layers", "Distance along the layers", caption, draw,
                      {"wide": 3.0, "narrow": 3.2})],
    )  # fmt: skip


def _calibration(found: Json) -> Section:
    twins = found["couples"][0]["calibration"]

    def draw(figure: Figure, form: Form) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
        for side, colour in zip(twins, (SPARSE, DENSE), strict=True):
            x = [row["confidence"] for row in side["bins"]]
            y = [row["accuracy"] for row in side["bins"]]
            axes.plot(x, y, color=colour, marker="o", markersize=3)
        axes.set_xlabel("mean probability of the predicted class")
        axes.set_ylabel("accuracy")
        legend(axes, [entry(SPARSE, "sparse twin"), entry(DENSE, "dense twin")], form)

    rows = [
        [couple["name"], *(f"{100 * side['error']:.2f}" for side in couple["calibration"])]
        for couple in found["couples"]
    ]
    caption = (
        "Reliability: accuracy in bins of the largest probability, 15 bins of equal width. On the "
        "grey line a network is as often right as it says."
    )
    return Section(
        "Calibration",
        plates=[plate("reliability", "Reliability of the twins", caption, draw,
                      {"wide": 3.0, "narrow": 3.0})],
        tables=[
            Table("ece", "Expected calibration error, in percentage points.",
                  ["Couple", "First", "Second"], rows)
        ],
    )  # fmt: skip


def _classes(found: Json) -> Section:
    sparse, dense = found["couples"][0]["classes"]
    if len(sparse) > 100:
        return Section("Classes", [f"Of {len(sparse)} classes; study.json has the accuracies."])
    rows = [
        [f"class {label}", _number(one), _number(two), _gap(one, two)]
        for label, (one, two) in enumerate(zip(sparse, dense, strict=True))
    ]
    return Section(
        "Classes",
        tables=[
            Table("classes", "Accuracy of the twins in each class, in percent of its test samples.",
                  ["Class", "Sparse", "Dense", "Sparse minus dense"], rows)
        ],
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _gap(one: float | None, two: float | None) -> str:
    return "–" if one is None or two is None else f"{one - two:+.2f}".replace("-", "−")


def _uses(found: Json) -> Section:
    return Section(
        "What the dense twin is good for",
        plates=[_path(found["path"], found["bn_batches"])],
        tables=[_cuts(found), *_taught(found["taught"])],
    )


def _path(rows: Sequence[Json], batches: int) -> Plate:
    def draw(figure: Figure, form: Form) -> None:
        panels = figure.subplots(2, 1, sharex=True)
        x = [row["dense"] for row in rows]
        panels[0].plot(x, [row["loss"] for row in rows], color=INK, marker="o", markersize=3)
        panels[0].set_ylabel("test loss")
        panels[1].plot(x, [row["accuracy"] for row in rows], color=INK, marker="o", markersize=3)
        panels[1].set_ylabel("test accuracy, %")
        panels[1].set_xlabel("share of the dense twin")
        figure.align_ylabels()

    ends = max(rows[0]["loss"], rows[-1]["loss"])
    worst = max(row["loss"] for row in rows)
    barrier = (
        f"The loss is {worst:.4f} at most, {worst - ends:.4f} above the worse end."
        if worst > ends
        else "No point of the line has a higher loss than the worse end."
    )
    caption = (
        f"Loss and accuracy on the straight line from the sparse twin (0) to the dense twin (1). "
        f"BatchNorm statistics are estimated anew at every point, over {batches} training "
        f"batches, also at the ends. {barrier}"
    )
    heights = {"wide": 3.4, "narrow": 3.6}
    return plate("line", "The line between the twins", caption, draw, heights)  # type: ignore[arg-type]


def _cuts(found: Json) -> Table:
    starts = list(dict.fromkeys(row["from"] for row in found["cuts"]))
    sparsities = list(dict.fromkeys(row["sparsity"] for row in found["cuts"]))
    value = {(row["from"], row["sparsity"]): row["accuracy"] for row in found["cuts"]}
    return Table(
        "cuts",
        f"The start of another sparsity: test accuracy in percent of a dense network that is cut "
        f"once, by magnitude, with BatchNorm statistics estimated over {found['bn_batches']} "
        f"training batches and no further training.",
        ["Dense network", *(f"{100 * sparsity:g}\u202f%" for sparsity in sparsities)],
        [[start, *(f"{value[start, s]:.2f}" for s in sparsities)] for start in starts],
    )


def _taught(rows: Sequence[Json]) -> list[Table]:
    if not rows:
        return []
    return [
        Table(
            "taught",
            f"The dense twin as a teacher: cuts of the dense twin, trained for "
            f"{rows[0]['epochs']} epochs with the support as it was cut, on the labels alone, and "
            f"with half of the loss the cross-entropy with the twin's outputs.",
            ["Sparsity", "Teacher", "Test accuracy, %"],
            [
                [
                    f"{100 * row['sparsity']:g}\u202f%",
                    "dense twin" if row["teacher"] else "none",
                    f"{row['accuracy']:.2f}",
                ]
                for row in rows
            ],
        )
    ]
