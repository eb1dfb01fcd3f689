"""Training steps of networks that other people define: ``acdc bench zoo``.

Dense PyTorch in each memory format is timed beside the engine in a sparse phase, as ``bench step``
does it. A network that fails is a row with the reason, and the others are timed all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from acdc.bench.networks import Network
from acdc.bench.peers import reason
from acdc.bench.race import Row, Workload, race, summary
from acdc.bench.step import WARM_UP, OnEngine, Peaks, Training, choices, memory, peaks_mb
from acdc.bench.zoo import find
from acdc.cost import measure as flops_of
from acdc.engine.engine import Engine
from acdc.errors import InputError
from acdc.pattern import Scope

T = TypeVar("T", bound=Training)

SLOWER = "dense was faster when the layer was timed"
SLOWER_AS_A_WHOLE = "whole steps were faster without the engine"


class Bf16(Training):
    """One network in training by dense PyTorch, in bfloat16 where autocast takes it."""

    def _loss(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super()._loss()


class Compiled(Training):
    """One network in training by dense PyTorch, compiled by ``torch.compile``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._compiled: Callable[[Tensor], Any] = torch.compile(self.net)

    def _loss(self) -> Tensor:
        return self.network.loss(self._compiled, self.x, self.y)


COLUMNS: dict[str, type[Training]] = {"bf16": Bf16, "compile": Compiled}
"""Further competitors, by the name of their column."""


def check_columns(asked: str) -> tuple[str, ...]:
    """Return the names of columns in a text such as ``"bf16,compile"``.

    Raises:
        InputError: There is no such column.
    """
    names = tuple(dict.fromkeys(name for name in asked.split(",") if name))
    if wrong := [name for name in names if name not in COLUMNS]:
        raise InputError(f"--columns holds {wrong[0]!r}. The columns are {', '.join(COLUMNS)}.")
    return names


@dataclass(frozen=True)
class Settings:
    """How the networks are timed.

    Args:
        sparsities: Fractions of weights that are zero.
        rounds: Timed steps of each training, taken in turn.
        scope: Scope in which the weights compete.
        optimizer: Its name in ``OPTIMIZERS``.
        columns: Names of further competitors, of ``COLUMNS``.
    """

    sparsities: Sequence[float]
    rounds: int
    scope: Scope = "uniform"
    optimizer: str = "sgd"
    columns: Sequence[str] = ()


def measure(chosen: Sequence[Network], settings: Settings) -> Iterator[Row]:
    """Yield a row for every network and sparsity, as soon as the network has been timed."""
    for network in chosen:
        try:
            yield from _rows(network, settings)
        except Exception as error:  # another library may raise any exception
            for sparsity in settings.sparsities:
                yield _failed(network, sparsity, reason(error), settings)


def _rows(network: Network, settings: Settings) -> Iterator[Row]:
    formats, kind = network.formats, settings.optimizer
    trainings: dict[tuple[str, float | None], Training] = {
        (setting, None): _warm(Training(network, formats[setting], kind)) for setting in formats
    }
    notes: dict[float | None, dict[str, str]] = {s: {} for s in (None, *settings.sparsities)}
    for name in settings.columns:
        try:
            column = COLUMNS[name](network, list(formats.values())[-1], kind)
            trainings[name, None] = _warm(column)
        except Exception as error:  # no compiler, or an operation that does not take bfloat16
            notes[None][name] = reason(error)
    engines: dict[float, OnEngine] = {}
    for sparsity in settings.sparsities:
        try:
            engine = OnEngine(network, sparsity, settings.scope, kind)
            trainings["engine", sparsity] = engines[sparsity] = _warm(engine)
            engine.settle()
            if engine.engine.off:
                notes[sparsity]["engine"] = engine.engine.off
        except Exception as error:  # the network may fail in the engine alone
            notes[sparsity]["engine"] = reason(error)
    seconds = race({key: Workload((t.step,)) for key, t in trainings.items()}, settings.rounds)

    dense = {setting: seconds[setting, None] for setting in formats}
    columns = {name: seconds[name, None] for name in settings.columns if (name, None) in seconds}
    dense_peaks: Peaks | None = None
    for sparsity in settings.sparsities:
        row: Row = {"case": network.name, "sparsity": sparsity, "optimizer": kind}
        sparse = {"engine": seconds["engine", sparsity]} if sparsity in engines else {}
        row |= summary(dense, sparse | columns, settings.columns)
        dense_setting = formats[row["dense_setting"]]
        dense_peaks = dense_peaks or peaks_mb(network.name, dense_setting, kind, find=find)
        row |= memory(dense_peaks, None) | {"sparse_percent": None}
        row |= {"layers": {}, "not_sparse": {}, "verdicts": []}
        if (training := engines.get(sparsity)) is not None:
            peaks = peaks_mb(network.name, sparsity, settings.scope, kind, find=find)
            row |= memory(dense_peaks, peaks)
            row["sparse_percent"] = sparse_percent(training)
            row["layers"] = choices(training.engine)
            row["not_sparse"] = not_sparse(training)
            row["verdicts"] = [str(v) for v in training.engine.verdicts if v.off]
        yield row | {"notes": notes[None] | notes[sparsity]}


def _warm(training: T) -> T:
    for _ in range(WARM_UP):
        training.step()
    return training


def _failed(network: Network, sparsity: float, why: str, settings: Settings) -> Row:
    """Return the row of a network that PyTorch alone does not train."""
    row: Row = {"case": network.name, "sparsity": sparsity, "optimizer": settings.optimizer}
    empty = ("ratio", "dense_ms", "engine_ms", *(f"{name}_ms" for name in settings.columns))
    row |= dict.fromkeys((*empty, "sparse_percent")) | memory(None, None)
    row |= {"dense_setting": "failed", "dense_settings_ms": {}, "quartiles": {}, "rounds": 0}
    return row | {"layers": {}, "not_sparse": {}, "verdicts": [], "notes": {"dense": why}}


# --- what does not run sparse -------------------------------------------------------------------


def _pruned_macs(training: OnEngine) -> dict[str, int]:
    """Return the multiply-adds of each pruned weight for one sample."""
    params = training.sparsifier.params
    # Of a network of its own: hooks count the operations, and the engine traces around hooks.
    found = flops_of(training.network.build(), training.x[:1], also=params)
    return {layer.name: layer.macs for layer in found.layers if layer.name in params}


def sparse_percent(training: OnEngine) -> float | None:
    """Return the part in a hundred of the pruned weights' multiply-adds that runs sparse.

    ``None``: the network calls no pruned layer that :func:`acdc.cost.measure` counts.
    """
    macs = _pruned_macs(training)
    sparse = _sparse(training.engine)
    whole = sum(macs.values())
    part = sum(n for name, n in macs.items() if _layer_of(name) in sparse)
    return 100 * part / whole if whole else None


def _is_off(engine: Engine) -> bool:
    """Return whether whole steps have switched the engine off."""
    return any(verdict.dense for verdict in engine.verdicts)


def _sparse(engine: Engine) -> set[str]:
    if _is_off(engine):
        return set()
    return {name for name, choice in engine.choices.items() if choice.sparse}


def _layer_of(weight: str) -> str:
    """Return the engine's name for the layer of a weight."""
    # The second is a parameter without a module of its own: `in_proj_weight` of an attention.
    return weight.removesuffix(".weight").removesuffix("_weight")


def not_sparse(training: OnEngine) -> dict[str, str]:
    """Return for each pruned weight that runs dense the reason."""
    engine, found = training.engine, {}
    for name in training.sparsifier.params:
        layer = _layer_of(name)
        if layer in _sparse(engine):
            continue
        if engine.off is not None:
            found[name] = engine.off
        elif layer in engine.choices:
            found[name] = SLOWER_AS_A_WHOLE if engine.choices[layer].sparse else SLOWER
        else:
            found[name] = engine.refused.get(layer, "the engine has no kernels for such a layer")
    return found


def reasons(rows: Sequence[Row]) -> list[str]:
    """Return the lines below the table: what failed, and why weights do not run sparse."""
    lines = []
    for row in rows:
        case = f"{row['case']} at {100 * row['sparsity']:g} %"
        lines += [f"{case}: {name} failed: {why}" for name, why in row["notes"].items()]
        lines += [f"{case}: {line}" for line in (*row["verdicts"], *_grouped(row["not_sparse"]))]
    return lines


def _grouped(found: Mapping[str, str]) -> list[str]:
    first: dict[str, str] = {}
    for name, why in found.items():
        first.setdefault(why, name)
    counts = Counter(found.values())
    return [
        f"{count} {'weight runs' if count == 1 else 'weights run'} dense, "
        f"{first[why]}{' first' if count > 1 else ''}: {why}"
        for why, count in counts.most_common()
    ]
