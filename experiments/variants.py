"""Variants of AC/DC beside other methods with the same options: chosen first, then run afresh.

    acdc compare experiments/variants.py:select_fashion_mnist --jobs 2 --resume --out experiments
    acdc compare experiments/variants.py:select_tinyshakespeare --jobs 2 --resume --out experiments
    python experiments/choose.py --write
    acdc compare experiments/variants.py:variants_fashion_mnist --jobs 2 --resume --out experiments

The ``select_`` grids train every trial on one seed, and evaluate it on a tenth of the training
data that no trial trains on. ``choose.py`` takes the best trial of each family of methods and
writes their names into ``chosen.json``. The ``variants_`` grids train these on other seeds, and
evaluate them on the test data. On CIFAR-10 nothing is chosen: it takes what was chosen on
Fashion-MNIST. All families have the same number of trials. Each cell computes on one thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from acdc import ACDC, GMP, RigL, TopKAST, Unstructured, phases, recipes
from acdc.compare import Budget, Candidate, Grid, GridMethod, Task
from acdc.errors import InputError
from acdc.methods.base import Method, Reset
from acdc.methods.dense import Dense
from acdc.recipes import grids
from acdc.recipes.grids import OFTEN, SCOPE
from acdc.runs.optim import Rewarm
from acdc.runs.recipe import Recipe
from acdc.schedule import Plan, constant

CHOSEN = Path(__file__).parent / "chosen.json"
FAMILIES = ("dense", "acdc", "gmp", "topkast", "rigl")  # a trial's name begins with its family
SELECTED_AT = 0.95  # sparsity
SEED = 7
VALIDATION = 0.1

# --- options, which every method may have -------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """A change of a recipe.

    Args:
        name: Part of the names of trials.
        label: Part of their names on the page.
        change: Returns the changed recipe.
    """

    name: str
    label: str
    change: Callable[[Recipe], Recipe]


def _of_optimizer(name: str, label: str, values: Callable[[Any], Mapping[str, Any]]) -> Option:
    def change(recipe: Recipe) -> Recipe:
        return replace(recipe, optimizer=replace(recipe.optimizer, **values(recipe.optimizer)))

    return Option(name, label, change)


def mirror(alpha: float) -> Option:
    """The mirror step (HAM); with AdamW in its normalised form."""
    return _of_optimizer(
        f"mirror{alpha:g}", f"mirror {alpha:g}", lambda _: {"mirror_alpha": float(alpha)}
    )


def rate(factor: float) -> Option:
    """Another learning rate."""
    return _of_optimizer(
        f"lr{factor:g}", f"{factor:g} x rate", lambda optimizer: {"lr": factor * optimizer.lr}
    )


ROWS = _of_optimizer("rows", "rows", lambda _: {"scale_rows": True})
RESTART = Option(
    "restart",
    "restart",
    lambda recipe: replace(recipe, lr=Rewarm(recipe.lr, low=0.05, share=0.4)),
)


def trial(base: GridMethod, *options: Option) -> GridMethod:
    """Return a method with options."""

    def build(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
        candidate, recipe = base.build(task, sparsity, epochs, seed), task.recipe
        for option in options:
            recipe = option.change(recipe)
        changes = {"optimizer": recipe.optimizer, "lr": recipe.lr} if options else {}
        return replace(candidate, changes={**candidate.changes, **changes})

    name = "_".join([base.name, *(option.name for option in options)])
    label = " + ".join([base.label, *(option.label for option in options)])
    return replace(base, name=name, label=label, build=build)


# --- methods and their own schedules ------------------------------------------------------------

Make = Callable[[float, int, int], Method[Any]]
"""From sparsity, epochs and seed."""


def _line(name: str, label: str, make: Make, **changes: Any) -> GridMethod:
    def build(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
        return Candidate(make(sparsity, epochs, seed), changes=changes)

    return GridMethod(name, label, build)


def _plan(text: str, epochs: int) -> Plan:
    """Return the plan of a text: D for a dense phase, S for a sparse one, and percents."""
    kinds = {"D": "dense", "S": "sparse"}
    parts = [(kinds[part[0]], f"{part[1:]}%") for part in text.split()]
    return phases(epochs, parts)


LONG = "D20 S10 D10 S10 D10 S40"  # the plan of the grids with a longer last sparse phase


def _ramped(ramp: float, plan: str | None = None, reset: Reset = "all") -> Make:
    """AC/DC with gradual compressions over a share of each sparse phase."""

    def make(sparsity: float, epochs: int, _: int) -> ACDC:
        phases = grids.alternation(epochs) if plan is None else _plan(plan, epochs)
        return ACDC(Unstructured(sparsity, SCOPE), phases, reset=reset, ramp=ramp)

    return make


def _gmp(plan: str, length: str) -> Make:
    def make(sparsity: float, epochs: int, _: int) -> GMP:
        pattern = Unstructured(sparsity, SCOPE)
        return GMP(pattern, _plan(plan, epochs), every=OFTEN, length=length)

    return make


def _topkast(share: float) -> Make:
    """Train so many times the weights that are used."""

    def make(sparsity: float, epochs: int, _: int) -> TopKAST:
        backward = max(0.0, round(1 - share * (1 - sparsity), 6))
        plan = constant("sparse", epochs)
        return TopKAST(Unstructured(sparsity, SCOPE), plan, backward=backward, every=OFTEN)

    return make


def _rigl(drop: float) -> Make:
    def make(sparsity: float, epochs: int, seed: int) -> RigL:
        plan = constant("sparse", epochs)
        return RigL(Unstructured(sparsity, SCOPE), plan, drop=drop, every=OFTEN, seed=seed)

    return make


DENSE, ACDC_PAPER, PARTIAL, GMP_75, TOPKAST_2, RIGL_30 = grids.methods(
    "dense", "acdc", "acdc_partial", "gmp", "topkast", "rigl_erk"
)
TWIN = {"dense_finetune": True}
RAMP_LONG = _line("acdc_long", "AC/DC ramp long", _ramped(0.5, LONG), **TWIN)
RAMP_ENTERED = _line(
    "acdc_entered",
    "AC/DC ramp long, entered",
    _ramped(0.5, LONG, "entered"),
    **TWIN,
)
GMP_50 = _line("gmp_50", "GMP to 50 %", _gmp("S100", "50%"))
GMP_25_75 = _line("gmp_25to75", "GMP 25 to 75 %", _gmp("D25 S75", "50%"))
TOPKAST_5 = _line("topkast_x5", "Top-KAST 5 x", _topkast(5))
RIGL_50 = _line("rigl_drop50", "RigL, ERK, drop .5", _rigl(0.5))

M25, M50 = mirror(25), mirror(50)

# --- trials: as many for every family -----------------------------------------------------------

FASHION_MNIST = (
    *(trial(DENSE, *options) for options in (
        (), (mirror(10),), (M25,), (M50,),
        (rate(0.5),), (rate(2),), (rate(0.5), M25), (rate(2), M25),
    )),
    *(trial(ACDC_PAPER, *options) for options in ((), (M25,))),
    *(trial(PARTIAL, *options) for options in ((), (M50,))),
    *(trial(RAMP_LONG, *options) for options in ((), (M25,), (M50,), (M50, ROWS))),
    *(trial(GMP_75, *options) for options in ((), (M25,), (M50,), (M50, ROWS))),
    trial(GMP_50, M50),
    *(trial(GMP_25_75, *options) for options in ((), (M25,), (M50,))),
    *(trial(base, *options) for base in (TOPKAST_2, RIGL_30)
      for options in ((), (M25,), (M50,), (rate(2),))),
    *(trial(base, *options) for base in (TOPKAST_5, RIGL_50)
      for options in ((), (M25,), (M50,), (M50, ROWS))),
)  # fmt: skip

TINYSHAKESPEARE = (
    *(trial(DENSE, *options) for options in (
        (), (mirror(10),), (M25,), (M50,),
        (rate(0.5),), (rate(2),), (rate(0.5), M25), (rate(2), M25),
    )),
    *(trial(ACDC_PAPER, *options) for options in ((), (M25,))),
    trial(PARTIAL, M25),
    trial(RAMP_LONG, M25, RESTART),
    *(trial(RAMP_ENTERED, *options) for options in ((), (M25,), (M50,), (rate(2), M25))),
    *(trial(GMP_75, *options) for options in ((), (M25,), (M50,), (rate(2),), (rate(2), M25))),
    trial(GMP_50, M25),
    *(trial(GMP_25_75, *options) for options in ((), (M25,))),
    *(trial(base, *options) for base in (TOPKAST_2, RIGL_30)
      for options in ((), (M25,), (M50,), (rate(2),), (rate(2), M25))),
    *(trial(base, *options) for base in (TOPKAST_5, RIGL_50)
      for options in ((), (M25,), (rate(2), M25))),
)  # fmt: skip

# --- the grids ----------------------------------------------------------------------------------


def _task(grid: Grid, validation: float = 0.0) -> Task:
    """Return the task of a grid, on one thread."""
    recipe = grid.task.recipe
    data = replace(recipe.data, validation=validation)
    return replace(grid.task, recipe=replace(recipe, data=data, threads=1))


def _select(name: str, of: Grid, trials: tuple[GridMethod, ...]) -> Grid:
    return Grid(
        name=f"select_{name}",
        about=f"chooses options on a validation split of {of.task.name}",
        task=_task(of, VALIDATION),
        methods=trials,
        sparsities=(SELECTED_AT,),
        seeds=(SEED,),
    )


def select_fashion_mnist() -> Grid:
    """The trials on Fashion-MNIST."""
    return _select("fashion_mnist", grids.compare_fashion_mnist(), FASHION_MNIST)


def select_tinyshakespeare() -> Grid:
    """The trials on Shakespeare."""
    return _select("tinyshakespeare", grids.compare_tinyshakespeare(), TINYSHAKESPEARE)


SELECTIONS: dict[str, Callable[[], Grid]] = {
    "fashion_mnist": select_fashion_mnist,
    "tinyshakespeare": select_tinyshakespeare,
}


def chosen(selection: str) -> tuple[tuple[GridMethod, ...], str]:
    """Return dense training and AC/DC as published with the best trial of each family, and the name
    of the best AC/DC.

    Raises:
        InputError: Nothing was chosen yet.
    """
    if not CHOSEN.exists():
        raise InputError(
            f"Nothing is chosen yet: {CHOSEN.name} is missing. Train the select_ grids, then run "
            f"python experiments/choose.py --write."
        )
    best = json.loads(CHOSEN.read_text(encoding="utf-8"))[selection]
    names = {"dense", "acdc", *best.values()}
    found = tuple(method for method in SELECTIONS[selection]().methods if method.name in names)
    return found, best["acdc"]


def _variants(
    name: str,
    of: Grid,
    selection: str,
    sparsities: tuple[float, ...],
    seeds: int,
    budgets: tuple[Budget, ...] = ("epochs",),
) -> Grid:
    methods, ours = chosen(selection)
    return Grid(
        name=f"variants_{name}",
        about=f"compares the chosen variants on {of.task.name}",
        task=_task(of),
        methods=methods,
        sparsities=sparsities,
        seeds=tuple(range(seeds)),
        budgets=budgets,
        baseline=ours,
    )


def variants_fashion_mnist() -> Grid:
    """What was chosen on Fashion-MNIST, on the test data and five other seeds."""
    task = grids.compare_fashion_mnist()
    return _variants("fashion_mnist", task, "fashion_mnist", (0.9, 0.95, 0.98), 5)


def variants_tinyshakespeare() -> Grid:
    """What was chosen on Shakespeare, on the test text and five other seeds."""
    task = grids.compare_tinyshakespeare()
    return _variants("tinyshakespeare", task, "tinyshakespeare", (0.9, 0.95), 5)


def variants_cifar10() -> Grid:
    """What was chosen on Fashion-MNIST, on CIFAR-10."""
    return _variants("cifar10", grids.compare_cifar10(), "fashion_mnist", (0.95,), 3)


def variants_cifar10_long() -> Grid:
    """What was chosen on Fashion-MNIST, on CIFAR-10 at the paper's length, with one seed.

    Model, data and learning rates are those of the recipe ``cifar10_resnet20``. AC/DC as published
    has the recipe's phases.
    """
    recipe = recipes.get("cifar10_resnet20")
    phases = recipe.method.schedule
    dense = replace(recipe, method=Dense(constant("dense", phases.epochs)), about="", threads=1)
    task = Task("CIFAR-10, ResNet-20, 200 epochs", dense)
    published = _line(
        "acdc", "AC/DC", lambda s, *_: ACDC(Unstructured(s, SCOPE), phases), dense_finetune=True
    )
    methods, ours = chosen("fashion_mnist")
    return Grid(
        name="variants_cifar10_long",
        about="compares the chosen variants on CIFAR-10 in 200 epochs",
        task=task,
        methods=tuple(published if method.name == "acdc" else method for method in methods),
        sparsities=(0.95,),
        baseline=ours,
    )


BUDGETS: tuple[Budget, ...] = ("epochs", "flops", "seconds")


def variants_fashion_mnist_budgets() -> Grid:
    """The same at equal epochs, equal training FLOPs and equal measured seconds, on three seeds."""
    task = grids.compare_fashion_mnist()
    return _variants("fashion_mnist_budgets", task, "fashion_mnist", (0.95,), 3, BUDGETS)


def variants_tinyshakespeare_budgets() -> Grid:
    """The same at equal epochs, equal training FLOPs and equal measured seconds, on three seeds."""
    task = grids.compare_tinyshakespeare()
    return _variants("tinyshakespeare_budgets", task, "tinyshakespeare", (0.95,), 3, BUDGETS)
