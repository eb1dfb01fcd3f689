"""The grids of variants, the choice among their trials, and the ablation."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from acdc import recipes
from acdc.compare.cells import cells, prepare
from acdc.compare.grid import Grid, locate
from acdc.errors import InputError
from acdc.runs import train
from support.runs import tiny

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The scripts of the experiments, which import one another."""
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        import ablation
        import choose
        import variants
        import why

        yield {"variants": variants, "choose": choose, "ablation": ablation, "why": why}
    finally:
        sys.path.remove(str(EXPERIMENTS))


def grid(file: str, function: str) -> Grid:
    return locate(f"{EXPERIMENTS / file}.py:{function}")


def labels(found: Grid) -> list[str]:
    """The runs of a grid; every cell can be prepared, and every phase has steps."""
    names = []
    for cell in cells(found):
        run = prepare(found, cell, found.task.epochs)
        assert run.recipe.threads == 1
        run.recipe.method.resolve(run.recipe.data.steps_per_epoch(run.recipe.batch_size))
        names.append(run.label)
    return names


@pytest.mark.parametrize("task", ["fashion_mnist", "tinyshakespeare"])
def test_no_family_has_more_trials_than_another(task: str, modules: dict[str, Any]) -> None:
    found = grid("variants", f"select_{task}")
    assert len(set(labels(found))) == len(found.methods)  # no trial twice under two names
    assert found.task.recipe.data.validation == 0.1
    trials = Counter(modules["choose"].family(method.name) for method in found.methods)
    assert trials.keys() == set(modules["variants"].FAMILIES)
    assert all(count >= trials["acdc"] for count in trials.values())
    for method in found.methods:
        assert set(method.label) - set(method.name)


def test_an_option_changes_the_recipe_it_names(modules: dict[str, Any]) -> None:
    module = modules["variants"]
    found = grid("variants", "select_tinyshakespeare")
    options = module.mirror(25), module.rate(2), module.ROWS, module.RESTART
    candidate = module.trial(module.ACDC_PAPER, *options).build(found.task, 0.95, 24, 7)
    plain = found.task.recipe
    optimizer = candidate.changes["optimizer"]
    assert (optimizer.mirror_alpha, optimizer.lr, optimizer.scale_rows) == (25.0, 4e-3, True)
    assert candidate.changes["lr"].curve == plain.lr
    assert candidate.changes["dense_finetune"]
    assert module.trial(module.ACDC_PAPER).build(found.task, 0.95, 24, 7).changes == {
        "dense_finetune": True
    }


def selection(folder: Path, found: Grid, best: dict[str, float]) -> None:
    """Write results in which every trial has the quality 1, but for these."""
    folder.mkdir(parents=True)
    rows = [
        {
            "method": method.name,
            "sparse_quality": None if method.name.startswith("dense") else best.get(method.name, 1),
            "dense_quality": best.get(method.name, 1),
        }
        for method in found.methods
        if method.name not in ("gmp", "gmp_50_mirror50")
    ]
    (folder / "results.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lost = {"method": "gmp", "reason": "The loss is nan."}
    waiting = {"method": "gmp_50_mirror50", "reason": "Not trained yet."}
    (folder / "failed.jsonl").write_text("\n".join(map(json.dumps, (lost, waiting))))


def test_the_best_trial_of_each_family_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: dict[str, Any]
) -> None:
    choose, variants = modules["choose"], modules["variants"]
    best = {"dense_mirror25": 2.0, "acdc_mirror25": 3.0, "rigl_drop50": 4.0}
    for task in variants.SELECTIONS:
        selection(tmp_path / f"select_{task}", grid("variants", f"select_{task}"), best)
    found = grid("variants", "select_fashion_mnist")
    trials = [method.name for method in found.methods]
    families, missing = choose.ranked(tmp_path / "select_fashion_mnist", trials)
    assert missing == ["gmp_50_mirror50"]
    assert {name: each[0][1] for name, each in families.items()} == {
        "dense": "dense_mirror25",
        "acdc": "acdc_mirror25",
        "gmp": "gmp_mirror25",  # gmp diverged, and the next one stands first
        "topkast": "topkast",
        "rigl": "rigl_drop50",
    }
    chosen = tmp_path / "chosen.json"
    for module in (choose, variants):
        monkeypatch.setattr(module, "CHOSEN", chosen)
    monkeypatch.setattr(sys, "argv", ["choose.py", "--write", "--folder", str(tmp_path)])
    assert choose.main() == 1
    assert not chosen.exists()
    with pytest.raises(InputError, match=r"Nothing is chosen yet: chosen.json is missing"):
        variants.variants_cifar10()
    for task in variants.SELECTIONS:
        failed = tmp_path / f"select_{task}" / "failed.jsonl"
        failed.write_text(failed.read_text().replace("Not trained yet.", "The loss is inf."))
    assert choose.main() == 0
    assert set(json.loads(chosen.read_text())) == set(variants.SELECTIONS)
    for name, runs, seeds in (
        ("variants_fashion_mnist", 5 * 2 + 3 * 5 * 5, 5),
        ("variants_tinyshakespeare", 5 * 2 + 2 * 5 * 5, 5),
        ("variants_cifar10", 3 * 2 + 3 * 5, 3),
    ):
        built = getattr(variants, name)()
        assert built.name == name
        assert len(labels(built)) == runs
        assert built.seeds == tuple(range(seeds))
        assert built.task.recipe.data.validation == 0
    long = variants.variants_cifar10_long()
    assert len(set(labels(long))) == len(long.methods) == 7
    plan = long.method("acdc").build(long.task, 0.95, 200, 0).method.schedule
    assert plan == recipes.get("cifar10_resnet20").method.schedule
    equal = variants.variants_tinyshakespeare_budgets()
    assert equal.budgets == ("epochs", "flops", "seconds")
    assert equal.baseline == "acdc_mirror25"


def test_the_script_runs_by_itself(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXPERIMENTS / "choose.py", "--folder", tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "trials are not trained yet" in done.stdout


def test_the_ablation_changes_one_factor_at_a_time(modules: dict[str, Any]) -> None:
    ablation = modules["ablation"]
    found = grid("ablation", "ablation_fashion_mnist")
    assert len(set(labels(found))) == 3 * len(found.methods)
    for plan in (ablation.stretched(0, 10), ablation.stretched(-1, 45), ablation.middle(5, 20, 5)):
        assert sum(plan) == pytest.approx(100)
    assert ablation.stretched(-2, 20) == ablation.BASE
    assert ablation.stretched(0, 60) == (60, 5, 5, 5, 10, 15)


@pytest.mark.parametrize("task", ["fashion_mnist", "tinyshakespeare"])
def test_every_test_of_a_cause_has_its_rows(task: str, modules: dict[str, Any]) -> None:
    why = modules["why"]
    found = grid("why", f"why_{task}")
    rows = {method.name for method in found.methods}
    assert len(set(labels(found))) == len(rows) * len(why.SEEDS)
    used = set()
    for cause in why.CAUSES:
        assert sum(cause.contrast.values()) == 0
        if found.name in cause.least:
            assert cause.contrast.keys() <= rows
            used |= cause.contrast.keys()
    assert used == rows


def test_the_rows_of_a_cause_change_what_they_name(modules: dict[str, Any]) -> None:
    why = modules["why"]
    found = grid("why", "why_tinyshakespeare")
    plain, built = found.task.recipe, {}
    for method in found.methods:
        built[method.name] = method.build(found.task, 0.95, 24, 0)
    paper = built["acdc"].method
    decay = built["gmp_decay3"].changes["optimizer"].weight_decay
    assert decay == pytest.approx(3 * plain.optimizer.weight_decay)
    assert built["acdc_sparse2"].changes["lr"].sparse == 2
    assert built["acdc_tail"].changes["lr"].curve == plain.lr
    for name, option in (("ramp", 0.6), ("average", 0.4), ("taper", 2.0), ("reset", "entered")):
        row = {"reset": "acdc_entered"}.get(name, f"acdc_{name}")
        assert replace(built[row].method, **{name: getattr(paper, name)}) == paper
        assert getattr(built[row].method, name) == option
    assert why.NORMS.build(found.task, 0.95, 24, 0).method.restore_norms


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "not run yet"),
        ([0.3], "undecided"),
        ([0.3, 0.31, 0.32], "supported"),
        ([0.05, 0.06, 0.04], "refuted"),
        ([0.0, 0.3, 0.6], "undecided"),  # the interval reaches below zero
        ([0.13, 0.14, 0.13], "refuted"),  # it is there, and too small
        ([0.14, 0.15, 0.14], "undecided"),
    ],
)
def test_a_cause_is_decided_by_its_interval(
    values: list[float], said: str, modules: dict[str, Any]
) -> None:
    assert modules["why"].verdict(values, 0.15).endswith(said)


def test_contrasts_are_of_seeds_that_have_all_rows(tmp_path: Path, modules: dict[str, Any]) -> None:
    why, folder = modules["why"], tmp_path / "why_fashion_mnist"
    folder.mkdir()
    rows = [
        {"method": name, "seed": seed, "sparse_quality": 90 + seed + 0.5 * (name == "acdc_ramp")}
        for name in ("acdc", "acdc_ramp")
        for seed in (0, 1, 2)[: 2 if name == "acdc" else 3]
    ]
    (folder / "results.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = why.qualities(folder)
    assert why.contrasts({"acdc_ramp": 1, "acdc": -1}, found) == [0.5, 0.5]
    assert "+0.500 (+0.500 to +0.500), 2 seeds: supported" in why.table(tmp_path)


def test_the_ledger_has_the_losses_at_the_ends_of_phases(
    tmp_path: Path, modules: dict[str, Any]
) -> None:
    settings = {"method__schedule__epochs": "7", "data__train_examples": "128"}
    train.run(tiny(**settings), tmp_path / "run", device="cpu")
    lines = modules["why"].ledger(tmp_path / "run").splitlines()
    kinds = [line.split()[0] for line in lines[1:]]
    assert kinds == ["dense", "sparse", "dense", "sparse", "dense", "sparse"]
    assert len(lines[1].split()) == 5  # no jump before the first phase
    assert len(lines[2].split()) == 6
