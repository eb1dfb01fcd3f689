"""Other plans of AC/DC than that of the grids, to see whether its phases are at fault.

    acdc compare experiments/plans.py:plans_fashion_mnist --jobs 2 --resume --out experiments

trains them on ``compare_fashion_mnist``'s task at 95 %, one seed: D stands for a dense phase and S
for a sparse one, each with its share of the run.
"""

from __future__ import annotations

from dataclasses import replace

from acdc import ACDC, Unstructured
from acdc.compare import Candidate, Grid, GridMethod, Task
from acdc.recipes import grids
from acdc.schedule import phases

KINDS = {"D": "dense", "S": "sparse"}
PLANS = {
    "once_back": "D10 S40 D10 S40",
    "long_first": "D20 S30 D10 S40",
    "short_dense": "D10 S20 D10 S20 D10 S30",
}


def method(name: str, plan: str) -> GridMethod:
    """Return AC/DC with these phases."""

    def build(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
        parts = [(KINDS[part[0]], f"{part[1:]}%") for part in plan.split()]
        return Candidate(ACDC(Unstructured(sparsity, grids.SCOPE), phases(epochs, parts)))

    return GridMethod(name, plan, build)


def plans_fashion_mnist() -> Grid:
    """The plans beside that of the grids, which is tried with a global scope, too."""
    return replace(
        grids.compare_fashion_mnist(),
        name="plans_fashion_mnist",
        about="compares plans of AC/DC on Fashion-MNIST with a small ResNet at 95 %",
        methods=(
            *grids.methods("acdc", "acdc_global"),
            *(method(name, plan) for name, plan in PLANS.items()),
        ),
        sparsities=(0.95,),
        seeds=(0,),
    )
