"""The page of the study of convergence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from acdc.pages.figure import DENSE, GREY, SPARSE, Form, Plate, entry, legend, plate
from acdc.pages.study import Section, Study, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Json = dict[str, Any]


def page(found: Json, command: str) -> Study:
    """Return the page.

    Args:
        found: What :func:`acdc.studies.convergence.study.study` returned.
        command: The command that writes it again.
    """
    return Study(
        "Convergence",
        f"Iterative hard thresholding, plain, stochastic and alternating, beside proven bounds; "
        f"{found['seeds']} seeds from {found['seed']}.",
        [_bounds(found), _violations(found), _recovery(found), _network(found)],
        command,
    )


def _bounds(found: Json) -> Section:
    return Section(
        "The bounds",
        [
            "docs/convergence.md states and proves the bounds T0 to T3. The library's own method "
            "ACDC makes every cut. A step of IHT is a dense phase of one step, and the cut after "
            "it. Each seed draws a problem of its own.",
        ],
        [_paths(found["paths"])],
        [_iht(found), _stochastic(found), _cycles(found)],
    )


def _paths(lines: Sequence[Json]) -> Plate:
    def draw(figure: Figure, form: Form) -> None:
        wide = form == "wide"
        shape = (1, len(lines)) if wide else (len(lines), 1)
        for axes, line in zip(figure.subplots(*shape, squeeze=False).flat, lines, strict=True):
            axes.plot(line["steps"], line["bounds"], color=GREY, linestyle=(0, (3, 1.6)))
            gaps = [max(gap, 1e-16) for gap in line["gaps"]]
            axes.plot(line["steps"], gaps, color=SPARSE, marker="o", markersize=2)
            axes.set_yscale("log")
            axes.set_ylim(1e-16, 1e2)
            axes.set_title(f"{line['method']}\n{line['problem']}", fontsize=8.5, loc="left")
            axes.set_xlabel("steps")
        figure.axes[0].set_ylabel("f − f*")
        keys = [entry(SPARSE, "measured"), entry(GREY, "bound", linestyle=(0, (3, 1.6)))]
        figure.axes[-1].legend(handles=keys, loc="upper right")

    caption = (
        "The gap f − f* after each cut, on a logarithmic axis, and the bound that starts at the "
        "same point: T1 for IHT, T2 for stochastic IHT, T3 for AC/DC. One seed. The axis ends at "
        "rounding."
    )
    return plate("paths", "The gap over steps", caption, draw, {"wide": 2.7, "narrow": 6.6})


def _iht(found: Json) -> Table:
    rows = []
    for cell in found["iht"]:
        seeds = cell["rows"]
        held = sum(row["ratio"] <= row["bound"] for row in seeds)
        fell = sum(row["descent"] >= 0 for row in seeds)
        worst = max(seeds, key=lambda row: row["ratio"] - row["bound"])
        kappas = [row["kappa"] for row in seeds]
        rows.append(
            [
                cell["problem"],
                _span(kappas),
                f"{cell['wanted']}",
                _span([row["kept"] for row in seeds]),
                f"{worst['ratio']:.4f}",
                f"{worst['bound']:.4f}",
                f"{held} of {len(seeds)}",
                f"{fell} of {len(seeds)}",
            ]
        )
    return Table(
        "iht",
        f"IHT with η = 1/β and the k that T1 asks for, of N = {found['iht'][0]['numel']} weights. "
        f"Factor: the largest of the gap from one step to the next, on the worst seed. T1, T0: "
        f"seeds on which the bound held in every step. A factor of 0: the first step reaches "
        f"f(θ*), or falls below it.",
        ["Problem", "κ", "k*", "k", "Factor", "Bound", "T1 held", "T0 held"],
        rows,
    )


def _stochastic(found: Json) -> Table:
    rows = [
        [
            f"{cell['problem']}, noise {cell['noise']:g}",
            f"{max(row['worst'] for row in cell['rows']):.4f}",
            f"{sum(row['worst'] <= 1 for row in cell['rows'])} of {len(cell['rows'])}",
        ]
        for cell in found["stochastic"]
    ]
    rows += [
        [f"isotropic, η = {row['rate']:g}/β, noise {row['noise']:g}",
         f"floor {row['floor']:.1f} σ²", "trend only"]
        for row in found["floors"]
    ]  # fmt: skip
    cell = found["stochastic"][0]
    return Table(
        "stochastic",
        f"Stochastic IHT. Upper rows: η = 1/(2β), the k that T2 asks for, and the mean gap over "
        f"{cell['draws']} draws of the noise as a share of the bound, in the worst of "
        f"{cell['steps']} steps on the worst seed. Lower rows: with fewer weights than T2 asks "
        f"for, the mean gap of the last 100 of 200 steps, in units of the variance σ² of the noise "
        f"of one entry of the gradient. The floor is proportional to σ², and falls with η.",
        ["Problem", "Measured", "T2 held"],
        rows,
    )


def _cycles(found: Json) -> Table:
    rows = []
    for cell in found["cycles"]:
        seeds = cell["rows"]
        worst = max(row["ratio"] for row in seeds)
        rows.append(
            [
                cell["problem"],
                f"{cell['dense']}",
                f"{cell['masked']}",
                f"{cell['nu']:.3f}",
                f"{worst:.1e}",
                f"{cell['bound']:.4f}",
                f"{sum(row['ratio'] <= cell['bound'] for row in seeds)} of {len(seeds)}",
                f"{sum(row['truncation'] >= 0 for row in seeds)} of {len(seeds)}",
            ]
        )
    return Table(
        "cycles",
        f"AC/DC with η = 1/β, k = 4k* = {found['cycles'][0]['kept']}, and the shortest dense phase "
        f"for which T3 promises that the gap shrinks. Factor: the largest of the gap from one cut "
        f"to the next, on the worst seed.",
        ["Problem", "Dense", "Sparse", "ν", "Factor", "Bound", "T3 held", "T0' held"],
        rows,
    )


def _violations(found: Json) -> Section:
    rows = [
        [
            f"{row['bound']}: {row['violated']}",
            row["problem"],
            f"{row['measured']:.3g}",
            f"{row['allowed']:.3g}",
            "yes" if row["breaks"] else "no",
        ]
        for row in found["violations"]
    ]
    table = Table(
        "violations",
        "Paths that violate one assumption. T0: the relative margin of the fall of f, which may "
        "not be negative. T1 and T3: the largest factor of the gap; T3 promises a factor below 1. "
        "T2: the gap where it is largest beside the bound.",
        ["Assumption", "Problem", "Measured", "Allowed", "Bound broken"],
        rows,
    )
    exact = found["dense_phase"]
    shown = [[f"{row['dense']} steps", f"{row['gap']:.2e}"] for row in exact["exact"]]
    shown += [
        [f"{row['dense']} steps, random problems", f"support found on {row['found']} of "
         f"{exact['seeds']} seeds"]
        for row in exact["random"]
    ]  # fmt: skip
    lengths = Table(
        "dense-phase",
        f"The length of the dense phase. Upper rows: two weights with the correlation 0.9 "
        f"(κ = {exact['kappa']:.0f}), begun at the wrong weight: the gap after 20 cycles. A phase "
        f"of 11 steps stays at the wrong weight for ever, one of 12 does not, and T3 asks for "
        f"{exact['needed']}. Lower rows: isotropic designs of 160 rows and 400 weights, k = k* = "
        f"8, sparse phases of 10 steps, 180 steps in all.",
        ["Dense phase", "Result"],
        shown,
    )
    return Section(
        "Without an assumption",
        ["Each assumption is needed: where it is violated, the bound or its promise breaks."],
        tables=[table, lengths],
    )


def _recovery(found: Json) -> Section:
    cells = found["recovery"]
    problems = list(dict.fromkeys(cell["problem"] for cell in cells))
    colours = {"IHT": DENSE, "AC/DC": SPARSE}

    def draw(figure: Figure, form: Form) -> None:
        shape = (1, len(problems)) if form == "wide" else (len(problems), 1)
        for axes, problem in zip(
            figure.subplots(*shape, squeeze=False).flat, problems, strict=True
        ):
            for cell in cells:
                if cell["problem"] == problem:
                    axes.plot(
                        cell["shares"], cell["found"], color=colours[cell["method"]], marker="o",
                        markersize=3.5,
                    )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_xticks(cells[0]["shares"], [f"{share}" for share in cells[0]["shares"]])
            axes.set_ylim(-0.5, cells[0]["seeds"] + 0.5)
            axes.yaxis.get_major_locator().set_params(integer=True)
            axes.set_title(problem, fontsize=8.5, loc="left")
            axes.set_xlabel("k / k*")
        figure.axes[0].set_ylabel("seeds with the support")
        figure.axes[-1].legend(handles=[entry(colours[m], m) for m in colours], loc="lower right")

    caption = (
        f"On how many of {cells[0]['seeds']} seeds the k* largest weights at the end are those of "
        f"θ*, after 90 gradient steps: IHT cuts after each step, AC/DC after dense phases of 20 "
        f"steps, with sparse phases of 10 between them. No bound applies to these problems."
    )
    return Section(
        "Recovery of the support",
        plates=[plate("recovery", "Support recovery", caption, draw, {"wide": 2.7, "narrow": 4.6})],
        tables=[
            Table(
                "recovered",
                f"Seeds of {cells[0]['seeds']} with the support.",
                ["Problem", "Method", *(f"k = {share} k*" for share in cells[0]["shares"])],
                [[c["problem"], c["method"], *(f"{n}" for n in c["found"])] for c in cells],
            )
        ],
    )


def _network(found: Json) -> Section:
    net = found["network"]

    def draw(figure: Figure, form: Form) -> None:
        axes = figure.subplots()
        axes.plot(range(1, len(net["iht"]) + 1), net["iht"], color=DENSE)
        step, x, y = 0, [], []
        for point in net["acdc"]:
            step += point["after"] in ("dense", "masked")
            x.append(step)
            y.append(point["value"])
        axes.plot(x, y, color=SPARSE)
        axes.set_yscale("log")
        axes.set_xlabel("gradient steps")
        axes.set_ylabel("f")
        legend(axes, [entry(DENSE, "IHT"), entry(SPARSE, "AC/DC")], form)

    caption = (
        f"A network of two layers and {net['numel']} weights, k = {net['kept']}, which is not "
        f"convex. IHT after each cut; AC/DC after each step and each cut, with dense and sparse "
        f"phases of 20 steps."
    )
    ledger = Table(
        "ledger",
        "The ledger of AC/DC on this network: what f loses in each dense phase, gains in the cut, "
        "and loses in the sparse phase.",
        ["Cycle", "Dense phase", "Cut", "Sparse phase", "Sum"],
        [
            [
                f"{number}",
                f"−{row['dense']:.4f}",
                f"+{row['cut']:.4f}",
                f"−{row['masked']:.4f}",
                f"{row['cut'] - row['dense'] - row['masked']:+.4f}".replace("-", "−"),
            ]
            for number, row in enumerate(net["ledger"], start=1)
        ],
    )
    held = "held" if net["descent"] >= 0 else "did not hold"
    return Section(
        "A small network",
        [
            f"T0 needs no convexity. With η = {net['rate']:g}, and β = {net['smooth']:.3g} along "
            f"the moves of the path, T0 {held} in all {len(net['iht'])} steps of IHT.",
        ],
        [plate("network", "f on a small network", caption, draw, {"wide": 2.8, "narrow": 2.8})],
        [ledger],
    )


def _span(values: Sequence[float]) -> str:
    """Write the smallest and the largest of some numbers."""
    low, high = (f"{value:.3g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
