"""The time of a training step on the engine by its parts: ``acdc bench where``.

The parts sum up to the step. Two further steps are timed in turn for comparison: the same step
without the profile, and the step of dense PyTorch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from acdc.bench.networks import Network
from acdc.bench.race import Row, Workload, quartiles, race
from acdc.bench.step import WARM_UP, OnEngine, Training
from acdc.bench.table import number
from acdc.engine.profile import CONVERSIONS, LISTS, Timing
from acdc.pattern import Scope

PARTS = {
    "forward": "forward",
    "input_grad": "input grad",
    "weight_grad": "weight grad",
    "between": "between",
    "conversions": "convert",
    "lists": "lists",
    "waiting": "waiting",
    "inside": "in segments",
    "pytorch": "PyTorch",
    "optimizer": "optimizer",
}
"""Parts of a step, and the titles of their columns."""


class ProfiledTraining(OnEngine):
    """A training on the engine that also times its optimizer.

    Attributes:
        optimizer_seconds: Total time of the optimizer's steps, sparsifier included.
    """

    optimizer_seconds = 0.0

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = super()._optimizer()
        plain = optimizer.step

        def step(*args: Any) -> Any:
            began = time.perf_counter()
            result = plain(*args)
            self.optimizer_seconds += time.perf_counter() - began
            return result

        optimizer.step = step  # type: ignore[assignment, method-assign]
        return optimizer


def part(timing: Timing) -> str:
    """Return the part of a step that a kernel's time belongs to."""
    if timing.layer in (CONVERSIONS, LISTS):
        return timing.layer
    if timing.kernel == "weight_grad":
        return timing.kernel
    if timing.kernel == "conv":
        return "input_grad" if timing.backward else "forward"
    return "between"


def measure(
    chosen: Sequence[Network], sparsities: Sequence[float], rounds: int, scope: Scope
) -> Iterator[Row]:
    """Yield a row for every network and sparsity.

    Args:
        chosen: What to train.
        sparsities: Fractions of weights that are zero.
        rounds: Timed steps of each training.
        scope: Scope in which the weights compete.
    """
    for network in chosen:
        dense = Training(network)
        for sparsity in sparsities:
            yield _row(network, dense, ProfiledTraining(network, sparsity, scope), rounds) | {
                "case": network.name,
                "sparsity": sparsity,
            }


def _row(network: Network, dense: Training, engine: ProfiledTraining, rounds: int) -> Row:
    engine.settle()
    trainings: dict[str, Training] = {"dense": dense, "engine": engine}
    for training in trainings.values():
        for _ in range(WARM_UP):
            training.step()
    workloads = {name: Workload((training.step,)) for name, training in trainings.items()}
    seconds = race(workloads, rounds)
    row: Row = {f"{name}_ms": 1e3 * statistics.median(s) for name, s in seconds.items()}
    row["quartiles"] = {f"{name}_ms": quartiles(s, 1000) for name, s in seconds.items()}
    row |= {"rounds": rounds, "notes": {} if engine.engine.off is None else _off(engine)}
    return row | _parts(engine, rounds)


def _off(engine: ProfiledTraining) -> dict[str, str]:
    return {"engine": str(engine.engine.off)}


def _parts(engine: ProfiledTraining, steps: int) -> Row:
    """Return the mean time of a profiled step, and the means of its parts."""
    with engine.engine.profile() as profile:
        for _ in range(WARM_UP):
            engine.step()
        profile.clear()
        engine.optimizer_seconds = 0.0
        began = time.perf_counter()
        for _ in range(steps):
            engine.step()
        whole = 1e3 * (time.perf_counter() - began)
    ms = dict.fromkeys(PARTS, 0.0)
    operations = dict.fromkeys(("forward", "input_grad", "weight_grad"), 0.0)
    for timing in profile.rows:
        ms[part(timing)] += timing.ms
        if timing.multiply_adds:
            operations[part(timing)] += 2e-6 * timing.multiply_adds
    ms |= {"waiting": profile.waiting_ms, "inside": profile.rest_ms}
    ms["optimizer"] = 1e3 * engine.optimizer_seconds
    ms["pytorch"] = whole - profile.segments_ms - ms["optimizer"]
    return {
        "clocked_ms": whole / steps,
        "parts_ms": {name: value / steps for name, value in ms.items()},
        "gflops": {
            name: done / ms[name] if ms[name] else None for name, done in operations.items()
        },
        "kernels": [_kernel(timing, steps) for timing in profile.rows],
    }


def _kernel(timing: Timing, steps: int) -> dict[str, Any]:
    row = asdict(timing) | {"gflops": timing.gflops if timing.multiply_adds else None}
    return row | {key: row[key] / steps for key in ("ms", "calls", "multiply_adds")}


class Table:
    """Lines of the parts of steps, in milliseconds.

    Args:
        cases: Names in the first column.
    """

    def __init__(self, cases: Iterable[str]) -> None:
        self.case = max(map(len, cases))

    def header(self) -> str:
        """Return the header line."""
        left = (
            f"{'case':{self.case}}  {'zeros':>6}  {'dense ms':>8}  {'engine ms':>9}  {'clocked':>8}"
        )
        return left + "".join(f"  {title:>{_width(title)}}" for title in PARTS.values())

    def line(self, row: Row) -> str:
        """Return a row's two lines: milliseconds, and GF/s on kept weights."""
        line = f"{row['case']:{self.case}}  {100 * row['sparsity']:4g} %"
        line += f"  {number(row['dense_ms']):>8}  {number(row['engine_ms']):>9}"
        line += f"  {number(row['clocked_ms']):>8}"
        speeds = " " * (len(line) - len("GF/s")) + "GF/s"
        for name, title in PARTS.items():
            line += f"  {number(row['parts_ms'][name]):>{_width(title)}}"
            speed = number(row["gflops"][name]) if row["gflops"].get(name) else ""
            speeds += f"  {speed:>{_width(title)}}"
        return f"{line}\n{speeds.rstrip()}"


def _width(title: str) -> int:
    return max(len(title), 7)
