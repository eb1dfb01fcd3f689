"""Single layers, forward and backward: which of them gain, and how much.

A convolution is timed in the engine's layout, as inside a network. The conversion of its four
activations to and from the layout is a column of its own (``convert_ms``). A network pays it only
at the ends of a segment. A linear layer's time includes it.

By default passes follow each other, and a small layer finds its tensors in the last-level cache.
With ``--caches emptied`` the caches are flushed before each pass. A layer inside a network is
between the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acdc.bench import peers
from acdc.bench.peers import ENTRANTS, PEERS, Contender, Dense, Engine, Problem, Unable
from acdc.bench.race import Caches, Row, Workload, median_ms, race, summary
from acdc.errors import InputError
from acdc.support import kept

CASES = (
    "conv3x3_16x16_h32_n128",
    "conv3x3_32x32_h16_n128",
    "conv3x3_64x64_h8_n128",
    "conv3x3_64x64_h32_n64",
    "conv3x3_128x64_s2_h32_n64",
    "conv3x3_128x128_h16_n64",
    "conv3x3_256x256_h8_n64",
    "conv3x3_512x512_h4_n64",
    "conv3x3_128x128_h28_n32",
    "conv1x1_256x64_h32_n64",
    "conv1x1_64x256_h32_n64",
    "conv1x1_512x2048_h7_n64",
    "linear_3072x768_t512",
    "linear_768x3072_t512",
)
_CONV = re.compile(r"conv(\d+)x\1_(\d+)x(\d+)(?:_s(\d+))?_h(\d+)_n(\d+)")
_LINEAR = re.compile(r"linear_(\d+)x(\d+)_t(\d+)")
SPELLING = (
    "conv3x3_128x64_s2_h32_n64 (kernel, channels out x in, stride, height and width, batch) or "
    "linear_3072x768_t512 (features out x in, tokens)"
)


@dataclass(frozen=True)
class Layer:
    """The sizes of one layer."""

    name: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int = 1

    @staticmethod
    def parse(name: str) -> Layer | None:
        """Return the layer that a name spells out, or ``None``."""
        if found := _LINEAR.fullmatch(name):
            out, in_, tokens = map(int, found.groups())
            return Layer(name, (tokens, in_), (out, in_))
        if found := _CONV.fullmatch(name):
            kernel, out, in_, stride, size, batch = (int(text or 1) for text in found.groups())
            return Layer(name, (batch, in_, size, size), (out, in_, kernel, kernel), stride)
        return None

    def problem(self) -> Problem:
        """Return the layer with random tensors; nothing is masked."""
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(size, generator=generator) for size in (self.x, self.weight))
        y = Problem(x, weight, x, self.stride).apply(x[:1], weight)
        grad = torch.randn(len(x), *y.shape[1:], generator=generator)
        return Problem(x, weight, grad, self.stride)


def choose(asked: Sequence[str]) -> list[Layer]:
    """Return the layers to time: all, or those whose names contain one of the texts.

    A text may also spell out another layer.

    Raises:
        InputError: A text selects nothing.
    """
    names: list[str] = []
    for text in asked or ("",):
        found = [name for name in CASES if text in name] or [text]
        if Layer.parse(found[0]) is None:
            raise InputError(
                f"--case {text} is in the name of no layer, and spells none. The layers are "
                f"{', '.join(CASES)}; write another one as {SPELLING}."
            )
        names += [name for name in found if name not in names]
    return [layer for name in names if (layer := Layer.parse(name))]


def measure(
    layers: Sequence[Layer], sparsities: Sequence[float], rounds: int, caches: str = "left"
) -> Iterator[Row]:
    """Yield a row for every layer and sparsity, as soon as the layer has been timed.

    Args:
        layers: What to time.
        sparsities: Fractions of weights that are zero.
        rounds: Timings of each competitor.
        caches: ``"left"`` as the passes before left them, or ``"emptied"`` before every pass.
    """
    state = Caches(caches)
    for layer in layers:
        yield from _Comparison(layer, sparsities, state).rows(rounds)


class _Comparison:
    """The competitors for one layer at all sparsities. Dense PyTorch competes once for all."""

    def __init__(self, layer: Layer, sparsities: Sequence[float], caches: Caches) -> None:
        self.layer, self.caches = layer, caches
        problem = layer.problem()
        formats = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
        if problem.linear:
            formats = {"plain": torch.contiguous_format}
        self.dense: dict[str, Contender] = {
            setting: Dense(problem, memory_format) for setting, memory_format in formats.items()
        }
        for contender in self.dense.values():
            peers.answer(contender)
        self.sparse: dict[float, dict[str, Contender]] = {}
        self.notes: dict[float, dict[str, str]] = {}
        for sparsity in sparsities:
            self._enter(_masked(problem, sparsity), sparsity)

    def _enter(self, problem: Problem, sparsity: float) -> None:
        """Prepare the engine and the peers for one sparsity."""
        self.sparse[sparsity], self.notes[sparsity] = {}, {}
        expected = peers.answer(Dense(problem, torch.contiguous_format))
        for name, entrant in ENTRANTS.items():
            try:
                contender = peers.enter(entrant, problem, expected, self._seconds)
                self.sparse[sparsity][name] = contender
            except Unable as reason:
                self.notes[sparsity][name] = str(reason)

    def _workload(self, contender: Contender) -> Workload:
        passes = (contender.forward, contender.backward)
        return self.caches.workload(*passes, own_threads=contender.own_threads)

    def _seconds(self, contender: Contender) -> float:
        workload = self._workload(contender)
        return min(workload.seconds() for _ in range(3))

    def rows(self, rounds: int) -> Iterator[Row]:
        """Time all competitors, and yield a row for every sparsity."""
        workloads: dict[tuple[str, float | None], Workload] = {}
        for setting, contender in self.dense.items():
            workloads[setting, None] = self._workload(contender)
        for sparsity, contenders in self.sparse.items():
            for name, contender in contenders.items():
                workloads[name, sparsity] = self._workload(contender)
                if isinstance(contender, Engine):  # the same at every sparsity
                    workloads["convert", None] = self.caches.workload(contender.convert)
        seconds = race(workloads, rounds)
        dense = {setting: seconds[setting, None] for setting in self.dense}
        for sparsity, contenders in self.sparse.items():
            sparse = {name: seconds[name, sparsity] for name in contenders}
            row = {"case": self.layer.name, "sparsity": sparsity, "caches": self.caches.state}
            row |= summary(dense, sparse, PEERS)
            convert = seconds.get(("convert", None))
            row["convert_ms"] = median_ms(convert) if convert else None
            yield row | {"notes": self.notes[sparsity]}


def _masked(problem: Problem, sparsity: float) -> Problem:
    """Return the problem with the largest weights only."""
    return Problem(problem.x, _largest(problem.weight, sparsity), problem.grad, problem.stride)


def _largest(weight: Tensor, sparsity: float) -> Tensor:
    flat = torch.zeros(weight.numel())
    largest = weight.flatten().abs().topk(kept(weight.numel(), sparsity)).indices
    flat[largest] = weight.flatten()[largest]
    return flat.view_as(weight)
