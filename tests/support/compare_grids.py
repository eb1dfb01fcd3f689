"""Grids for ``test_compare.py``: blobs in the plane, learned by a perceptron in half a second.

The process of a cell builds its grid itself, so that what a test changes is said in variables of
the environment.
"""

from __future__ import annotations

import ctypes
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from acdc import ACDC, NM, Unstructured, alternate, constant
from acdc.compare import Candidate, Grid, GridMethod, Task
from acdc.errors import InputError
from acdc.layers import Layers
from acdc.methods.dense import Dense
from acdc.recipes.grids import methods
from acdc.runs.data import Source, Tensors
from acdc.runs.models import Model
from acdc.runs.optim import SGD, Cosine
from acdc.runs.recipe import Recipe

EPOCHS, BATCH, TRAIN = 10, 16, 80  # five steps an epoch


@dataclass(frozen=True)
class Perceptron(Model):
    """Three inputs, two hidden layers."""

    width: int = 16

    @property
    def input_shape(self) -> tuple[int]:
        return (3,)

    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(3, self.width),
            nn.ReLU(),
            nn.Linear(self.width, self.width),
            nn.ReLU(),
            nn.Linear(self.width, 3),
        )


@dataclass(frozen=True)
class Blobs(Source):
    """Three clouds of points."""

    name: ClassVar[str] = "blobs"
    published: ClassVar[tuple[int, int]] = (TRAIN, 40)
    classes: ClassVar[int] = 3  # type: ignore[assignment,misc]

    def load(self, root: Path | None = None, download: bool = False) -> Tensors:
        y = torch.arange(120) % 3
        noise = torch.randn(120, 3, generator=torch.Generator().manual_seed(0))
        x = nn.functional.one_hot(y, 3) + 0.4 * noise
        return Tensors(self.name, (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:]), 3)


def task() -> Task:
    return Task(
        "blobs, perceptron",
        Recipe(
            name="blobs",
            about="",
            model=Perceptron(),
            data=Blobs(),
            method=Dense(constant("dense", epochs=EPOCHS)),
            optimizer=SGD(lr=0.1, weight_decay=0.0),
            lr=Cosine(every="step"),
            batch_size=BATCH,
            checkpoint_steps=7,
            engine="off",
        ),
    )


def _plan(epochs: int) -> object:
    return alternate(
        epochs=epochs, warmup="20%", sparse="20%", dense="20%", last_dense="40%", last_sparse="20%"
    )


def _dense(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    return Candidate(Dense(constant("dense", epochs=epochs)))


def _acdc(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    pattern = Unstructured(sparsity, scope="uniform")
    return Candidate(ACDC(pattern, _plan(epochs), layers=Layers()))


def _one_shot(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    pattern = Unstructured(sparsity, scope="uniform")
    plan = constant("sparse", epochs=epochs - epochs // 2)
    return Candidate(ACDC(pattern, plan, layers=Layers()), dense_epochs=epochs // 2)


def _nm24(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    """Prunes the first layer alone, which has three inputs."""
    return Candidate(ACDC(NM(2, 4), _plan(epochs), layers=Layers(include=("0",))))


def _wild(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    return replace(_acdc(task, sparsity, epochs, seed), changes={"optimizer": SGD(lr=1e30)})


def _refuses(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    raise InputError("Not on Sundays.")


def _broken(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    raise KeyError("a slip")


def _killer(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    """Kills the process of its cell, and not the process that started it."""
    if os.environ["ACDC_TEST_PARENT"] != str(os.getpid()):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(_acdc(task, sparsity, epochs, seed), changes={"clip": 5.0})


def _crasher(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    """Reads where no memory is in the process of its cell, and not in the one that started it."""
    if os.environ["ACDC_TEST_PARENT"] != str(os.getpid()):
        ctypes.string_at(0)
    return replace(_acdc(task, sparsity, epochs, seed), changes={"clip": 5.0})


DENSE = GridMethod("dense", "Dense", _dense, sparsities=(0.0,))
ACDC_ = GridMethod("acdc", "AC/DC", _acdc)
ONE_SHOT = GridMethod("one_shot", "One-shot", _one_shot)


def _grid(name: str, *methods: GridMethod, **more: object) -> Grid:
    return Grid(name, "for the tests", task(), methods, **more)  # type: ignore[arg-type]


def whole() -> Grid:
    return _grid(
        "whole", DENSE, ACDC_, ONE_SHOT, sparsities=(0.5, 0.75), seeds=(0, 1),
        budgets=("epochs", "flops"),
    )  # fmt: skip


def small() -> Grid:
    return _grid("small", DENSE, ACDC_, ONE_SHOT, sparsities=(0.5,))


def failing() -> Grid:
    return _grid(
        "failing",
        DENSE,
        GridMethod("nm24", "2:4", _nm24, sparsities=(0.5,)),
        GridMethod("wild", "Wild", _wild),
        GridMethod("refuses", "Refuses", _refuses),
        GridMethod("broken", "Broken", _broken),
        ACDC_,
        sparsities=(0.5,),
        budgets=("epochs", "flops"),
    )


def ends_dense() -> Grid:
    return _grid("ends_dense", DENSE, *methods("dsd"), ACDC_, sparsities=(0.5,))


def _long(grid: Grid, epochs: int) -> Grid:
    recipe = replace(task().recipe, method=Dense(constant("dense", epochs=epochs)))
    return replace(grid, task=replace(grid.task, recipe=recipe))


def deadly() -> Grid:
    killer = GridMethod("killer", "Killer", _killer)
    return _long(_grid("deadly", DENSE, killer, ACDC_, sparsities=(0.5,)), 40)


def crashing() -> Grid:
    crasher = GridMethod("crasher", "Crasher", _crasher)
    return _grid("crashing", crasher, DENSE, ACDC_, sparsities=(0.5,))


def slow() -> Grid:
    """Three cells that train long enough for a kill in between, and for reports after it."""
    return _long(_grid("slow", DENSE, ACDC_, sparsities=(0.5, 0.75)), 180)


def two() -> Grid:
    """Two cells as long as those of ``slow``."""
    return _long(_grid("two", DENSE, ACDC_, sparsities=(0.5,)), 180)


def endless() -> Grid:
    return _long(_grid("endless", DENSE, ACDC_, sparsities=(0.5,)), 100_000)


def no_grid() -> int:
    return 5
