"""The study of convergence: the bounds of docs/convergence.md on every seed, and without them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from acdc import score
from acdc.cli import main
from acdc.studies.convergence import bounds, checks, study
from acdc.studies.convergence.paths import Walk, cuts, gaps, recovered, walk
from acdc.studies.convergence.problems import (
    Problem,
    conditioned,
    isotropic,
    logistic,
    network,
    toeplitz,
    two_weights,
)

ROOT = Path(__file__).parent.parent
SEEDS = range(20)

PROBLEMS = {
    "condition 1": lambda seed: conditioned(1.0, 120, 2, seed),
    "condition 2": lambda seed: conditioned(2.0, 120, 1, seed),
    "isotropic": lambda seed: isotropic(3000, 80, 1, seed),
    "Toeplitz": lambda seed: toeplitz(0.05, 4000, 100, 1, seed),
    "logistic": lambda seed: logistic(0.5, 400, 100, 1, seed),
}


def easy(seed: int) -> Problem:
    return conditioned(2.0, 120, 1, seed)


# --- the problems are what they are said to be ----------------------------------------------------


@pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)
def test_the_constants_hold_between_any_two_points(make: study.Make) -> None:
    """β and α bound f by parabolas; the gradient is that of f."""
    problem, draw = make(3), torch.Generator().manual_seed(0)
    assert problem.best is not None
    for scale in (0.01, 1.0, 3.0):
        one, two = (
            scale * torch.randn(len(problem.best), generator=draw, dtype=torch.float64)
            for _ in range(2)
        )
        move = two - one
        rest = problem.at(two) - problem.at(one) - float(problem.gradient(one) @ move)
        squared = float(move.square().sum())
        slack = 1e-9 * max(1.0, abs(problem.at(two)))
        assert problem.convex / 2 * squared - slack <= rest <= problem.smooth / 2 * squared + slack


def test_the_best_point_of_logistic_regression_has_no_slope_on_its_support() -> None:
    problem = logistic(0.5, 400, 100, 3, 0)
    assert problem.best is not None
    assert problem.wanted == 3
    slope = problem.gradient(problem.best)
    assert float(slope[problem.best != 0].abs().max()) < 1e-12
    assert float(slope.abs().max()) > 1e-3


# --- the bounds hold ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)
def test_t0_and_t1_hold_in_every_step_on_every_seed(make: study.Make) -> None:
    found = study.iht(make, SEEDS, steps=6)
    assert all(row["kept"] >= 16 * row["kappa"] ** 2 * found["wanted"] for row in found["rows"])
    assert all(row["kept"] < len(make(0).best) for row in found["rows"])  # type: ignore[arg-type]
    assert [row["seed"] for row in found["rows"] if row["ratio"] > row["bound"]] == []
    assert [row["seed"] for row in found["rows"] if row["descent"] < 0] == []


def test_t2_holds_in_every_step_on_every_seed() -> None:
    found = study.stochastic(lambda s: conditioned(1.1, 120, 1, s), 0.02, SEEDS, steps=8, draws=2)
    assert all(row["kept"] == 78 for row in found["rows"])
    assert [row["seed"] for row in found["rows"] if row["worst"] > 1] == []


def test_the_floor_is_proportional_to_the_variance_and_falls_with_the_rate() -> None:
    problem = isotropic(960, 120, 2, 0)

    def floor(share: float, noise: float) -> float:
        points = walk(problem, Walk(20, share / problem.smooth, 100, noise=noise))
        return math.fsum(gaps(problem, points)[50:]) / 51 / noise**2

    half = floor(0.5, 0.03)
    assert half == pytest.approx(floor(0.5, 0.003), rel=0.05)
    assert floor(0.125, 0.03) < 0.5 * half < 0.5 * floor(1.0, 0.03)


def test_t3_and_t0_prime_hold_in_every_cycle_on_every_seed() -> None:
    found = study.cycles(lambda seed: conditioned(3.0, 80, 2, seed), SEEDS, count=4, masked=2)
    assert found["bound"] < 1
    assert bounds.cycle_rate(3.0, found["nu"], found["dense"] - 1) >= 1  # the shortest such phase
    assert [row["seed"] for row in found["rows"] if row["ratio"] > found["bound"]] == []
    assert [row["seed"] for row in found["rows"] if row["truncation"] < 0] == []
    assert all(row["recovered"] for row in found["rows"])


def test_t0_holds_on_a_network_which_is_not_convex() -> None:
    for seed in range(3):
        problem = network(seed, inputs=8, width=6, samples=40)
        how, points, smooth = study.descending(problem, 20, 40)
        assert how.rate <= 1 / smooth
        assert checks.descent(problem, how, points, smooth) >= 0
        assert points[-1].value < cuts(points)[0].value


def test_the_bounds_are_those_of_the_page() -> None:
    """Worked out by hand from docs/convergence.md."""
    assert (bounds.iht_kept(1.5, 4), bounds.iht_kept(2, 4)) == (144, 256)
    assert bounds.stochastic_kept(1.5, 2) == 288
    assert [bounds.iht_rate(kappa) for kappa in (1, 1.5, 2)] == pytest.approx([3 / 4, 5 / 6, 7 / 8])
    # (15/16)^2 of a gap of 8, and 4 * 0.3 / 0.5
    assert bounds.stochastic_gap(2, 0.5, 0.3, 8, 2) == pytest.approx(7.03125 + 2.4)
    assert bounds.fall(3, 0.25, 6) == 3
    assert bounds.fall(3, 1, 6) == 0
    assert bounds.price(3, -1, 6) == 8
    assert bounds.nu(16, 4, 400) == pytest.approx(1 + (0.25 + math.sqrt(4.25 * 0.25)) / 2)
    assert bounds.cycle_rate(2, bounds.nu(16, 4, 400), 4) == pytest.approx(0.2050, abs=5e-5)
    assert bounds.cycle_rate(5, bounds.nu(16, 4, 400), 12) == pytest.approx(0.5636, abs=5e-5)
    assert (bounds.dense_steps(1, 2.618), bounds.dense_steps(19, 2.618)) == (1, 73)


def test_nu_bounds_what_a_cut_does_to_the_distance() -> None:
    """Shen and Li's bound on random vectors, and the vectors on which it is tight."""
    draw = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(300):
        best = torch.zeros(12, dtype=torch.float64)
        best[:3] = torch.randn(3, generator=draw, dtype=torch.float64)
        near = best + torch.randn(12, generator=draw, dtype=torch.float64)
        for kept in (3, 5, 8):
            left = torch.zeros_like(near)
            places = near.abs().topk(kept).indices
            left[places] = near[places]
            share = float((left - best).square().sum() / (near - best).square().sum())
            worst = max(worst, share / bounds.nu(kept, 3, 12))
    assert worst <= 1
    golden = (1 + math.sqrt(5)) / 2
    assert bounds.nu(1, 1, 2) == pytest.approx(golden**2)
    best, near = torch.tensor([golden, 0.0]), torch.tensor([1.0, 1.0])  # the cut keeps the second
    cut = torch.tensor([0.0, 1.0])
    share = float((cut - best).square().sum() / (near - best).square().sum())
    assert share == pytest.approx(bounds.nu(1, 1, 2))


# --- and break where an assumption is violated ----------------------------------------------------


def test_every_assumption_is_needed() -> None:
    found = study.violations(0)
    assert {row["bound"] for row in found} == {"T0", "T1", "T2", "T3"}
    assert [row for row in found if not row["breaks"]] == []


@pytest.mark.parametrize("seed", range(5))
def test_a_step_that_is_too_long_breaks_t0_and_t1_on_every_seed(seed: int) -> None:
    problem = easy(seed)
    how = Walk(64, 2.5 / problem.smooth, 6)
    points = walk(problem, how)
    assert checks.descent(problem, how, points, problem.smooth) < 0
    assert checks.ratio(problem, points) > bounds.iht_rate(problem.kappa)


def test_a_dense_phase_that_is_too_short_stays_at_the_wrong_weight() -> None:
    problem = two_weights(0.9)
    ratio = bounds.nu(1, 1, 2)
    needed = bounds.dense_steps(problem.kappa, ratio)
    ends = {}
    for dense in (1, 11, 12, needed):
        points = walk(problem, Walk(1, 1 / problem.smooth, 8, dense, 3))
        ends[dense] = gaps(problem, points)[-1]
    assert ends[1] == pytest.approx((1 - 0.9**2) / 2)
    assert ends[11] > 0.05
    assert ends[12] < 1e-3
    assert ends[needed] < 1e-6
    assert (
        bounds.cycle_rate(problem.kappa, ratio, 12)
        > 1
        > bounds.cycle_rate(problem.kappa, ratio, needed)
    )


def test_a_cut_that_keeps_other_weights_breaks_t0(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's top-k makes the cuts: with the smallest weights kept, the bound breaks."""

    def smallest(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: -weight.detach().abs() for name, weight in weights.items()}

    monkeypatch.setattr(score, "magnitude", smallest)
    problem = easy(0)
    how = Walk(64, 1 / problem.smooth, 12)
    points = walk(problem, how)
    assert checks.ratio(problem, points) > bounds.iht_rate(problem.kappa)
    assert not recovered(problem, points)


# --- the ledger, the command, the committed page --------------------------------------------------


def test_the_ledger_adds_up() -> None:
    problem = network(1, inputs=8, width=6, samples=40)
    points = walk(problem, Walk(20, 0.1, 4, 3, 2))
    rows = study.ledger(points)
    assert len(rows) == 4
    total = sum(row["cut"] - row["dense"] - row["masked"] for row in rows)
    assert total == pytest.approx(points[-1].value - points[0].value)
    assert all(row["cut"] > 0 for row in rows)


def test_the_command_refuses_what_it_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["study", "convergence", "--out", str(tmp_path / "file")]) == 2
    assert "is a file. Name a folder" in " ".join(capsys.readouterr().err.split())
    assert main(["study", "convergence", "--seeds", "0"]) == 2
    assert "--seeds is 0. It is a whole number" in " ".join(capsys.readouterr().err.split())


def test_the_committed_study_holds_every_bound_and_breaks_every_violated_one() -> None:
    folder = ROOT / "experiments" / "convergence"
    found = json.loads((folder / "study.json").read_text("utf-8"))
    page = (folder / "report.html").read_text("utf-8")
    assert found["seeds"] == 20
    for cell in found["iht"]:
        assert len(cell["rows"]) == 20
        assert all(row["ratio"] <= row["bound"] and row["descent"] >= 0 for row in cell["rows"])
    assert all(row["worst"] <= 1 for cell in found["stochastic"] for row in cell["rows"])
    for cell in found["cycles"]:
        assert all(r["ratio"] <= cell["bound"] and r["truncation"] >= 0 for r in cell["rows"])
    assert all(row["breaks"] for row in found["violations"])
    assert page.count("<td>20 of 20</td>") == 2 * len(found["iht"]) + len(
        found["stochastic"]
    ) + 2 * len(found["cycles"])
    assert found["command"] in page
