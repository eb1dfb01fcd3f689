"""The history of a run, from the files in its folder.

The folder holds ``recipe.json``, ``metrics.jsonl`` and ``record.json``. A run may have been killed
at any moment. Half a line at the end of the metrics, a step that a resumed run wrote twice, and a
missing record are accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acdc.cost import Ledger
from acdc.errors import InputError
from acdc.index import Twin
from acdc.runs.record import Folder, events, networks
from acdc.schedule import Schedule

Json = dict[str, Any]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Steps:
    """Measurements of executed steps, one entry each, in order.

    Args:
        step: Executed steps so far, this one included.
        loss: Training loss; NaN if it was not finite.
        rate: Learning rate.
        seconds: Time the step took.
    """

    step: Array
    loss: Array
    rate: Array
    seconds: Array

    @classmethod
    def of(cls, events: Sequence[Json]) -> Steps:
        """Gather the events of steps; a value that is missing becomes NaN."""

        def column(name: str) -> Array:
            values = [event.get(name) for event in events]
            array = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
            array[~np.isfinite(array)] = np.nan
            return array

        return cls(column("step"), column("loss"), column("lr"), column("seconds"))

    def __len__(self) -> int:
        return len(self.step)

    def within(self, start: int, stop: int) -> slice:
        """Return the slice of the steps of the phase ``[start, stop)``."""
        # The event of a phase's first step has the step start + 1, because it was written after it.
        first, last = np.searchsorted(self.step, [start, stop], side="right")
        return slice(int(first), int(last))


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer, its weights, and how many of them the sparse twin keeps."""

    name: str
    shape: tuple[int, ...]
    numel: int
    positions: int | None
    prunable: bool
    nnz: int | None = None

    @property
    def density(self) -> float | None:
        """Share of the weights that are kept."""
        return None if self.nnz is None else self.nnz / self.numel


@dataclass(frozen=True)
class Run:
    """The contents of the three files of a run."""

    recipe: Json
    record: Json | None
    start: Json | None
    steps: Steps
    branch: Steps  # steps of the dense twin's fine-tuning, on the clock of the run
    evals: tuple[Json, ...]
    branch_evals: tuple[Json, ...]
    changes: tuple[Json, ...]
    engines: tuple[Json, ...] = ()  # what the engine did at each compression
    verdicts: tuple[Json, ...] = ()  # of the engine, on whole steps: those of each moment
    ledgers: tuple[Json, ...] = ()  # the training FLOPs so far, after each evaluation
    damaged: int = 0  # lines of metrics.jsonl that are not JSON

    @property
    def details(self) -> Json:
        """The record's details, empty for a run that stopped."""
        return dict((self.record or {}).get("details") or {})

    @property
    def networks(self) -> dict[Twin, Json]:
        """The numbers of the networks that the run left; none for a run that stopped."""
        return {} if self.record is None else networks(self.record)

    @cached_property
    def schedule(self) -> Schedule | None:
        """The phases, or ``None`` for a run that wrote no start event."""
        return None if self.start is None else Schedule.from_dict(self.start)

    def epochs(self, steps: Any) -> Array:
        """Turn executed steps into epochs, fractions included."""
        assert self.schedule is not None
        ends = [0, *accumulate(self.schedule.steps_per_epoch)]
        return np.interp(np.asarray(steps, dtype=np.float64), ends, np.arange(len(ends)))

    @property
    def reached(self) -> int:
        """Executed steps of the run itself, the twin's fine-tuning not counted."""
        seen = [int(self.steps.step[-1])] if len(self.steps) else [0]
        seen += [int(event["step"]) for event in self.evals]
        return max(seen)

    @property
    def refused(self) -> dict[str, str]:
        """Weights that were not pruned → the reason."""
        return dict((self.start or {}).get("refused") or self.details.get("refused") or {})

    @property
    def engine(self) -> Json:
        """The engine of the sparse phases: its kind, choices, verdicts, and the refused layers."""
        engine = dict((self.start or {}).get("engine") or {})
        for event in self.engines:
            engine |= {key: event[key] for key in ("choices", "refused") if key in event}
        # A kind may be judged again, where a network has become much sparser.
        last = {v["kind"]: v for event in self.verdicts for v in event["verdicts"]}
        return engine | ({"verdicts": list(last.values())} if last else {})

    @property
    def finished(self) -> bool:
        """Whether the run came to its end, and wrote its record there."""
        return self.record is not None

    @property
    def compressions(self) -> list[Json]:
        """The changes to a sparse support."""
        return [change for change in self.changes if change["to"] == "sparse"]

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Convolutions and linear layers in the order of the model."""
        named = {str(layer["name"]): layer for layer in (self.start or {}).get("layers", [])}
        for layer in self.details.get("layers", []):
            named[str(layer["name"])] = {**named.get(str(layer["name"]), {}), **layer}
        last = self.compressions[-1]["counts"] if self.compressions else None
        sparse = "sparse" in self.networks if self.record else last is not None

        def one(name: str, layer: Json) -> Layer:
            numel = int(layer["numel"])
            prunable = bool(layer.get("prunable", layer.get("pruned", True)))
            nnz = layer.get("nnz", (last or {}).get(name)) if sparse else None
            if sparse and not prunable:
                nnz = numel
            shape = tuple(int(n) for n in layer["shape"])
            return Layer(name, shape, numel, layer.get("positions"), prunable, nnz)

        return tuple(one(name, layer) for name, layer in named.items())

    @property
    def weights(self) -> int:
        """Weights of the convolutions and linear layers."""
        return sum(layer.numel for layer in self.layers)

    @property
    def prunable(self) -> int | None:
        """Weights that may be pruned."""
        return sum(layer.numel for layer in self.layers if layer.prunable) or None

    @cached_property
    def ledger(self) -> Ledger | None:
        """The training FLOPs by phase: of the record, or of the last event before a stop."""
        stored = self.details.get("ledger", self.ledgers[-1] if self.ledgers else None)
        return None if stored is None else Ledger.from_dict(stored)


def read(run: Path) -> Run:
    """Read the files of a run.

    Raises:
        InputError: The folder is not the folder of a run, or one of its files is damaged.
    """
    if not run.is_dir():
        raise InputError(f"There is no folder {str(run)!r}. Give the folder of a run.")
    folder = Folder(run)
    recipe = folder.find(folder.recipe)
    if recipe is None:
        raise InputError(
            f"The folder {str(run)!r} holds no recipe.json, so it is not the folder of a run. "
            f"Give the folder that training wrote into: one level below --out."
        )
    written, damaged = events(folder.metrics)

    def pick(event: str, twin: str | None) -> list[Json]:
        # A run that was killed and resumed may have written a step twice: the last one counts.
        found = {e["step"]: e for e in written if e.get("event") == event and e.get("twin") == twin}
        return [found[step] for step in sorted(found)]

    starts = [e for e in written if e.get("event") == "start"]
    return Run(
        recipe=recipe,
        record=folder.find(folder.record),
        start=starts[-1] if starts else None,
        steps=Steps.of(pick("step", None)),
        branch=Steps.of(pick("step", "dense")),
        evals=tuple(pick("eval", None)),
        branch_evals=tuple(pick("eval", "dense")),
        changes=tuple(pick("change", None)),
        engines=tuple(pick("engine", None)),
        verdicts=tuple(pick("verdict", None)),
        ledgers=tuple(pick("ledger", None)),
        damaged=len(damaged),
    )
