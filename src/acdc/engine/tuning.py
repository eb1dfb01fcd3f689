"""Which tilings are fast on this machine, measured once and kept in the user's cache folder.

Layers are sorted into a few classes. For each class that a network asks for, a layer of fixed sizes
is timed with some tilings. The tiling of the rule (``tile.py``) stays unless another one is clearly
faster. A network asks only for classes in which it computes enough for this to matter.

The environment variable ``ACDC_TILES`` is ``measured``, the default, or ``rule``: then nothing is
measured, and no file is read or written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from acdc import files, schema
from acdc.engine import native
from acdc.engine.caches import caches
from acdc.engine.contract import Kernels
from acdc.engine.geometry import ConvGeometry
from acdc.engine.layout import TOKEN_COLUMNS, Buffer, Shape
from acdc.engine.native import Native
from acdc.engine.tile import MOST_ROWS, Tiling
from acdc.errors import InputError
from acdc.processor import processor_name

log = logging.getLogger(__name__)

VARIABLE = "ACDC_TILES"
MEASURED, RULE = "measured", "rule"

WORK = 100e6  # multiply-adds in a forward pass of the kept weights of a class, for tiles to matter
BUDGET = 2.0  # seconds that are measured for one network, at most
CLEAR = 1.03  # how much faster than the rule a tiling must be
ROUNDS = 3  # each tiling is timed once in each; the fastest time counts
PANELS = (0.5, 1.0, 2.0)  # of the first-level cache
DENSITIES = (0.2, 0.1, 0.05, 0.02)  # that are measured; a layer has the class of the nearest one

_TILING = {
    "panel_bytes": schema.Number(int, 1024, 2**26),
    "rows": schema.Maybe(schema.Number(int, 1, MOST_ROWS)),
    "grad_rows": schema.Maybe(schema.Number(int, 1, MOST_ROWS)),
}
_FILE = {"machine": dict, "tilings": schema.Each(str, _TILING)}


def clock() -> float:
    """Return the time in seconds."""
    return time.perf_counter()


def measures() -> bool:
    """Return whether tilings may be measured, as ``ACDC_TILES`` says.

    Raises:
        InputError: The variable has another value.

    """
    value = os.environ.get(VARIABLE, "").strip() or MEASURED
    if value not in (MEASURED, RULE):
        raise InputError(
            f"The environment variable {VARIABLE} is {value!r}. It can be {MEASURED!r}, the "
            f"default, or {RULE!r}: no tiles are measured."
        )
    return value == MEASURED


# --- classes of layers ----------------------------------------------------------------------------

# The layer that is timed for a class: its geometry, and the size of its image. None: tokens.
_LAYERS: dict[str, tuple[ConvGeometry, int | None]] = {
    "3x3, few channels": (ConvGeometry(16, 16, (3, 3), padding=(1, 1)), 32),
    "3x3": (ConvGeometry(128, 128, (3, 3), padding=(1, 1)), 16),
    "1x1": (ConvGeometry(256, 256, (1, 1)), 16),
    "linear": (ConvGeometry.linear(768, 768), None),
}


def class_of(geometry: ConvGeometry, tokens: bool, density: float) -> str | None:
    """Return the class of a layer. None: nothing is measured for it.

    >>> class_of(ConvGeometry(64, 128, (3, 3)), False, 0.08)
    '3x3 at 0.1'
    >>> class_of(ConvGeometry(64, 64, (3, 3), groups=64), False, 0.08)
    """
    if geometry.groups > 1 or density <= 0:
        return None
    nearest = min(DENSITIES, key=lambda d: max(d / density, density / d))
    if tokens:
        kind = "linear"
    elif geometry.kernel == (1, 1):
        kind = "1x1"
    else:
        kind = "3x3, few channels" if geometry.in_channels <= 32 else "3x3"
    return f"{kind} at {nearest:g}"


# --- measuring ------------------------------------------------------------------------------------


class _Layer:
    """The layer that is timed for a class."""

    def __init__(self, name: str, kernels: Native) -> None:
        kind, _, density = name.rpartition(" at ")
        self.kernels = kernels
        self.geometry, size = _LAYERS[kind]
        lanes, g = kernels.lanes, self.geometry
        blocks = torch.get_num_threads()
        if size is None:
            x = Shape.of_tokens(blocks * TOKEN_COLUMNS * lanes, g.in_channels, lanes)
            y = x.with_channels(g.out_channels)
        else:
            x = Shape(blocks * lanes, g.in_channels, size, size, lanes, g.halo)
            halo = g.grad_halo(size, size)
            y = Shape(blocks * lanes, g.out_channels, size, size, lanes, halo)
        generator = torch.Generator("cpu").manual_seed(0)
        kept = torch.rand(g.weight_shape, generator=generator, device="cpu") < float(density)
        self.support = kept.reshape(-1).nonzero()[:, 0]
        self.x, self.y = Buffer.zeros(x), Buffer.zeros(y)
        self.grad = torch.zeros(g.weight_shape, device="cpu")

    def passes(self, tiling: Tiling) -> Callable[[], None]:
        """Return the three passes of the layer with this tiling."""
        k, x, y = self.kernels, self.x, self.y
        plan = k.plan(self.geometry, self.support, x.shape, y.shape, tiling=tiling)
        plan.refresh(self.grad)
        plan.refresh(self.grad, True)

        def run() -> None:
            k.conv(plan, x, y)
            k.conv_weight_grad(plan, x, y, self.grad)
            k.conv_input_grad(plan, y, x)

        return run


class OutOfTime(Exception):
    """A measurement was given up."""


def fastest(
    start: Tiling,
    others: Iterable[Tiling],
    passes: Callable[[Tiling], Callable[[], None]],
    until: float,
) -> Tiling:
    """Return the fastest tiling: another one only if it is clearly faster than the first.

    Args:
        start: The first tiling.
        others: The other tilings.
        passes: Returns the computation that is timed with a tiling.
        until: The time when the measurement is given up.

    Raises:
        OutOfTime: It is later than that.

    """
    tilings = [start, *others]
    calls = [passes(tiling) for tiling in tilings]
    times = [float("inf")] * len(calls)
    for turn in range(1 + ROUNDS):
        for i, call in enumerate(calls):
            if (began := clock()) > until:
                raise OutOfTime
            call()
            if turn > 0:  # the first one is to warm up
                times[i] = min(times[i], clock() - began)
    best = min(range(len(times)), key=times.__getitem__)
    return tilings[best] if times[best] * CLEAR < times[0] else start


def measure(name: str, kernels: Native, until: float) -> Tiling:
    """Time the layer of a class with some tilings, and return the fastest.

    Raises:
        OutOfTime: It is later than ``until``.

    """
    layer, first = _Layer(name, kernels), caches().first
    panels = [Tiling(int(first * share)) for share in PANELS if share != 1.0]
    best = fastest(Tiling(first), panels, layer.passes, until)
    if layer.y.shape.tokens:
        return best  # tokens have one row
    rows = range(1, MOST_ROWS + 1)
    best = fastest(best, [replace(best, rows=n) for n in rows], layer.passes, until)
    return fastest(best, [replace(best, grad_rows=n) for n in rows], layer.passes, until)


# --- the table of a machine -----------------------------------------------------------------------


@cache
def _hash_of_kernels() -> str:
    return hashlib.sha256(Path(native.library()).read_bytes()).hexdigest()[:16]


def machine(kernels: Native) -> dict[str, Any]:
    """Return what a measurement depends on. The tilings of another machine do not count here."""
    return {
        "processor": processor_name(),
        "first-level cache": caches().first,
        "kernels": _hash_of_kernels(),
        "instruction set": kernels.isa,
    }


class Store:
    """The file of the tilings of one machine. Machines that share a home folder have one each.

    A file that is broken, belongs to another machine or cannot be written costs a measurement, and
    a line in the log.

    Args:
        folder: Where the file is. None: there is none, as for a user without a home folder.
        machine: What the tilings were measured for.

    """

    def __init__(self, folder: Path | None, machine: Mapping[str, Any]) -> None:
        self.machine = dict(machine)
        text = json.dumps(self.machine, sort_keys=True)
        self.name = f"tiles-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        self.folder = folder

    def read(self) -> dict[str, Tiling]:
        """Return the tilings by class."""
        if self.folder is None:
            return {}
        try:
            value = schema.parse(files.read(self.folder / self.name))
            schema.check(value, _FILE, "the file")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.info("The tiles of this machine are measured again: %s: %s", self.name, error)
            return {}
        if value["machine"] != self.machine:
            log.info("%s has the tiles of another machine: they are measured again.", self.name)
            return {}
        keys = _TILING.keys()
        return {name: Tiling(**{k: t[k] for k in keys}) for name, t in value["tilings"].items()}

    def add(self, name: str, tiling: Tiling) -> None:
        """Add a tiling to those in the file."""
        if self.folder is None:
            return
        tilings = {k: asdict(t) for k, t in {name: tiling, **self.read()}.items()}
        text = json.dumps({"machine": self.machine, "tilings": tilings}, indent=1)
        try:
            with files.Staging(self.folder, "the tiles of this machine") as staging:
                staging.add(self.name, text.encode())
                staging.commit()
        except InputError as error:
            log.info("%s", error)


class Tilings:
    """The tilings of this machine, by class of layers.

    Args:
        kernels: The kernels. Nothing is measured for the reference, which has no tiles.

    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels if isinstance(kernels, Native) and measures() else None
        self._left = BUDGET

    @cached_property
    def _store(self) -> Store:
        assert self._kernels is not None
        return Store(files.cache_folder(), machine(self._kernels))

    @cached_property
    def _known(self) -> dict[str, Tiling]:
        return self._store.read()

    def of(self, name: str | None) -> Tiling | None:
        """Return the tiling for the layers of a class. None: that of the rule."""
        if self._kernels is None or name is None:
            return None
        if name not in self._known and self._left > 0:
            tiling = self._measured(name, self._kernels)
            if tiling is not None:
                self._known[name] = tiling
                self._store.add(name, tiling)
        return self._known.get(name)

    def _measured(self, name: str, kernels: Native) -> Tiling | None:
        """Return the fastest tiling for a class. None: the time was over before it was known."""
        began = clock()
        try:
            tiling = measure(name, kernels, began + self._left)
        except OutOfTime:
            self._left = 0
            log.info("There was no time left to measure the tiles of %s.", name)
            return None
        seconds = clock() - began
        self._left -= seconds
        log.info("Layers of the class %s have %s, measured in %.2f s.", name, tiling, seconds)
        return tiling
