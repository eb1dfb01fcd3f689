"""AC/DC's phases, reset and scope, one factor at a time, on Fashion-MNIST.

    acdc compare experiments/ablation.py:ablation_fashion_mnist --jobs 2 --resume --out experiments

The base is the plan of the grids: a fifth of the run is the first dense phase, three phases of a
tenth follow, then a dense phase of a fifth and a sparse one of three tenths. Where one phase gets
another length, the other phases share the rest of the run as they do in the base.
"""

from __future__ import annotations

from dataclasses import replace

from acdc import ACDC, Unstructured, phases
from acdc.compare import Candidate, Grid, GridMethod, Task
from acdc.methods.base import Reset
from acdc.pattern import Scope
from acdc.recipes import grids
from acdc.schedule import Kind

BASE = (20.0, 10.0, 10.0, 10.0, 20.0, 30.0)  # percent; dense and sparse phases in turn
WARMUP, LAST_DENSE, LAST_SPARSE = 0, -2, -1


def stretched(phase: int, percent: float) -> tuple[float, ...]:
    """Return the plan in which one phase has another length."""
    others = (100 - percent) / (100 - BASE[phase])
    position = phase % len(BASE)
    return tuple(percent if i == position else others * p for i, p in enumerate(BASE))


def middle(*percents: float) -> tuple[float, ...]:
    """Return the plan with other phases between the first and the last two."""
    assert abs(sum(percents) - sum(BASE[1:-2])) < 1e-9
    return (BASE[0], *percents, *BASE[-2:])


def spans(plan: tuple[float, ...]) -> list[tuple[Kind, str]]:
    """Return kinds and durations. Percents are rounded, and the last phase fills the run."""
    percents = [round(percent, 4) for percent in plan[:-1]]
    percents.append(round(100 - sum(percents), 4))
    return [("sparse" if i % 2 else "dense", f"{p:.4f}%") for i, p in enumerate(percents)]


def _line(
    name: str,
    label: str,
    plan: tuple[float, ...] = BASE,
    scope: Scope = grids.SCOPE,
    reset: Reset = "all",
) -> GridMethod:
    def build(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
        schedule = phases(epochs, spans(plan))
        method = ACDC(Unstructured(sparsity, scope), schedule, reset=reset)
        return Candidate(method, changes={"dense_finetune": True})

    return GridMethod(name, label, build)


LINES = (
    _line("acdc", "AC/DC"),
    _line("warmup_10", "first dense phase 10 %", stretched(WARMUP, 10)),
    _line("warmup_30", "first dense phase 30 %", stretched(WARMUP, 30)),
    _line("last_dense_10", "last dense phase 10 %", stretched(LAST_DENSE, 10)),
    _line("last_dense_30", "last dense phase 30 %", stretched(LAST_DENSE, 30)),
    _line("last_sparse_15", "last sparse phase 15 %", stretched(LAST_SPARSE, 15)),
    _line("last_sparse_45", "last sparse phase 45 %", stretched(LAST_SPARSE, 45)),
    _line("sparse_14", "sparse phases 14 %, dense 2 %", middle(14, 2, 14)),
    _line("dense_20", "sparse phases 5 %, dense 20 %", middle(5, 20, 5)),
    _line("compressions_2", "2 compressions", middle(30)),
    _line("compressions_4", "4 compressions", middle(6, 6, 6, 6, 6)),
    _line("compressions_6", "6 compressions", middle(*[30 / 9] * 9)),
    _line("reset_entered", "reset of what comes back", reset="entered"),
    _line("reset_none", "no reset", reset="none"),
    _line("scope_global", "global", scope="global"),
    _line("scope_uniform", "uniform", scope="uniform"),
)


def ablation_fashion_mnist() -> Grid:
    """Every factor at 95 %, on three seeds and one thread."""
    base = grids.compare_fashion_mnist()
    task = replace(base.task, recipe=replace(base.task.recipe, threads=1))
    return Grid(
        name="ablation_fashion_mnist",
        about="changes one factor of AC/DC at a time on Fashion-MNIST at 95 %",
        task=task,
        methods=(*grids.methods("dense"), *LINES),
        sparsities=(0.95,),
        seeds=(0, 1, 2),
    )
