"""What may be kept, and how many.

A pattern turns scores into a support. Counts are exact, ties go to the lower index (global scope:
parameter order first), and the result is the same on every device and for every number of threads.
Scores are read one layer at a time and never copied as a whole: see :func:`largest`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from acdc import shards
from acdc.errors import InputError
from acdc.layers import Layers, matches
from acdc.score import Scores
from acdc.shape import Shape
from acdc.support import Support, check_sparsity, kept
from acdc.topk import check_floor, largest, largest_with_floor, refuse_nan
from acdc.transposable import LARGEST, best_masks

Scope = Literal["global", "uniform", "erk"]
Shapes = Mapping[str, tuple[int, ...]]
Overrides = tuple[tuple[str, float], ...] | Mapping[str, float]


@dataclass(frozen=True)
class Pattern(ABC):
    """What may be kept. A subclass says how scores become a support."""

    @property
    @abstractmethod
    def target(self) -> float:
        """The sparsity that was asked for, of the layers that the pattern admits."""

    @abstractmethod
    def counts(self, shapes: Shapes) -> dict[str, int] | None:
        """Return the kept weights of every layer, or ``None`` where they depend on the scores.

        Raises:
            InputError: The request cannot be met on these shapes.
        """

    @abstractmethod
    def total(self, shapes: Shapes) -> int:
        """Return the kept weights of all layers together, which no score changes.

        Raises:
            InputError: The request cannot be met on these shapes.
        """

    @abstractmethod
    def select(self, scores: Mapping[str, Tensor]) -> Support:
        """Return the support that keeps the largest scores this pattern allows.

        Args:
            scores: Float tensors by name, larger is kept; read one at a time.

        Raises:
            InputError: A score is NaN, or the request cannot be met.
        """

    def at(self, sparsity: float) -> Pattern:
        """Return the same pattern at another sparsity, for methods that raise it step by step.

        Raises:
            InputError: The pattern has only the one.
        """
        raise InputError(f"{self} has the sparsity {self.target} and no other. Use Unstructured.")

    def refuses(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Return why a layer of this shape must stay dense, or ``None`` where it need not."""
        return None

    def cut_by_shards(self, shape: Shape, weight: Tensor) -> str | None:
        """Return why a sharded weight cannot be pruned, or ``None`` where it can. Collective.

        Args:
            shape: Of the whole weight.
            weight: A DTensor.
        """
        return None

    def default_layers(self) -> Layers:
        """Return the layers that are pruned where the user names none."""
        return Layers()


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Single weights.

    Args:
        sparsity: Fraction of zeros, over all layers together.
        scope: ``"global"``: the largest scores of all layers together. ``"uniform"``: the same
            fraction in every layer. ``"erk"``: layers with few weights for their dimensions are
            kept denser (Erdős–Rényi kernel), layers that would exceed 1 become dense and the rest
            is redistributed, so that the total is met exactly.
        overrides: Glob → sparsity; a layer whose name matches gets this sparsity for itself, the
            first match counts, and ``sparsity`` then speaks of the other layers.
        floor: Every layer keeps at least this many weights (or all, if it has fewer).

    Source: scopes as in Peste et al. 2021; ERK as in Evci et al., RigL, ICML 2020, appendix.
    """

    sparsity: float
    scope: Scope = "global"
    overrides: Overrides = ()
    floor: int = 1

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        _check_scope(self.scope)
        if not isinstance(self.floor, int) or self.floor < 0:
            raise InputError(
                f"floor is {self.floor!r}. It is the least number of weights that a layer keeps: "
                f"a whole number from 0 up."
            )
        if isinstance(self.overrides, Mapping):
            object.__setattr__(self, "overrides", tuple(self.overrides.items()))
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in self.overrides):
            raise InputError(
                f"overrides is {self.overrides!r}. Give pairs of a glob and a sparsity, such as "
                f'(("fc", 0.5),), or a dictionary.'
            )
        for glob, sparsity in self._overrides():
            check_sparsity(sparsity, f"The override for {glob!r}")

    def _overrides(self) -> tuple[tuple[str, float], ...]:
        return tuple(dict(self.overrides).items())

    def at(self, sparsity: float) -> Unstructured:
        """Return the same pattern at another sparsity; overrides change in proportion."""
        if sparsity == self.sparsity:
            return self
        share = sparsity / self.sparsity if self.sparsity else 1.0
        own = tuple((glob, value * share) for glob, value in self._overrides())
        return replace(self, sparsity=sparsity, overrides=own)

    @property
    def target(self) -> float:
        """The sparsity that was asked for."""
        return self.sparsity

    def default_layers(self) -> Layers:
        """Return every convolution and linear layer; for uniform, all but the first and last."""
        uniform = self.scope == "uniform"
        return Layers(skip_first=uniform, skip_last=uniform)

    def _groups(self, shapes: Shapes) -> tuple[dict[str, int], list[str]]:
        """Split the layers: those with a sparsity of their own, and the names of the rest."""
        own: dict[str, int] = {}
        for glob, _ in self._overrides():
            if not any(matches(name, (glob,)) for name in shapes):
                raise InputError(
                    f"The override for {glob!r} matches no pruned layer. They are: "
                    f"{', '.join(n.removesuffix('.weight') for n in shapes)}."
                )
        for name, shape in shapes.items():
            for glob, sparsity in self._overrides():
                if matches(name, (glob,)):
                    numel = math.prod(shape)
                    own[name] = max(kept(numel, sparsity), min(self.floor, numel))
                    break
        return own, [name for name in shapes if name not in own]

    def counts(self, shapes: Shapes) -> dict[str, int] | None:
        """Return the kept weights of every layer; ``None`` for the global scope."""
        own, rest = self._groups(shapes)
        if self.scope == "global" and rest:
            return None
        budget = _budgets(self.scope, {n: shapes[n] for n in rest}, self.sparsity, self.floor)
        return {name: own.get(name, budget.get(name, 0)) for name in shapes}

    def total(self, shapes: Shapes) -> int:
        """Return the kept weights of all layers together."""
        counts = self.counts(shapes)
        if counts is not None:
            return sum(counts.values())
        own, rest = self._groups(shapes)
        sizes = [math.prod(shapes[name]) for name in rest]
        budget = kept(sum(sizes), self.sparsity)
        check_floor(budget, [min(self.floor, size) for size in sizes])
        return sum(own.values()) + budget

    def select(self, scores: Mapping[str, Tensor]) -> Support:
        """Return the support of the largest scores."""
        scores = Scores.of(scores)
        shapes = scores.shapes
        own, rest = self._groups(shapes)
        counts = self.counts(shapes)
        masks: dict[str, Tensor] = {}
        if counts is None:
            budget = kept(sum(math.prod(shapes[n]) for n in rest), self.sparsity)
            masks |= largest_with_floor(scores.subset(rest), budget, self.floor)
        for name, k in (own if counts is None else counts).items():
            masks |= largest(scores.subset([name]), k)
        return Support({name: masks[name] for name in shapes})


@dataclass(frozen=True)
class NM(Pattern):
    """``n`` of every ``m`` consecutive weights along the reduction axis.

    Groups run along the input channels of one output row (``in_features`` of a linear layer), at
    one kernel position; none crosses an output channel, nor the groups of a convolution. Which axis
    that is depends on the layer: see :class:`~acdc.shape.Shape`. A layer whose reduction axis ``m``
    does not divide stays dense and is reported.

    Args:
        n: Kept weights of every group.
        m: Weights of a group.
        transposable: Whether the groups along the output channels keep ``n`` of ``m`` as well, so
            that the transposed weight has the pattern, too. Weights are then chosen in tiles of
            ``m`` outputs by ``m`` inputs at one kernel position: of all masks of a tile, the one
            with the largest sum of scores (:func:`~acdc.transposable.best_masks`). ``m`` is at most
            4. A layer whose output or input channels ``m`` does not divide stays dense and is
            reported; no tile crosses the groups of a convolution.

    Raises:
        InputError: ``n`` and ``m`` are no pattern, or ``m`` is too large for tiles.

    Source: Mishra et al. 2021 (2:4); Zhou et al., ICLR 2021 (N:M from scratch); Hubara et al.,
    NeurIPS 2021 (transposable masks; there by linear programs and by an approximation).
    """

    n: int = 2
    m: int = 4
    transposable: bool = field(default=False, metadata={"added": True})

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 1 <= self.n < self.m):
            raise InputError(
                f"NM({self.n!r}, {self.m!r}) is no pattern: it keeps n of every m weights, "
                f"with whole numbers 1 <= n < m, such as NM(2, 4)."
            )
        if not isinstance(self.transposable, bool):
            raise InputError(f"transposable is {self.transposable!r}. It is True or False.")
        if self.transposable and self.m > LARGEST:
            raise InputError(
                f"NM({self.n}, {self.m}, transposable=True) has tiles of {self.m} x {self.m} "
                f"weights, whose masks are too many to compare. m is at most {LARGEST}, such as "
                f"NM(2, 4, transposable=True)."
            )

    def __repr__(self) -> str:
        # Checkpoints hold this text: a field that was added is named where it is used.
        added = ", transposable=True" if self.transposable else ""
        return f"NM(n={self.n!r}, m={self.m!r}{added})"

    @property
    def target(self) -> float:
        """The sparsity ``1 - n/m``."""
        return 1 - self.n / self.m

    def refuses(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Return why a layer cannot be grouped."""
        shape = Shape.of(shape)
        if shape.inputs is None:
            return _AXES
        if shape.input_channels % self.m:
            return f"its {shape.input_channels} inputs do not divide into groups of {self.m}"
        if self.transposable and shape.group_outputs % self.m:
            return f"its {shape.group_outputs} outputs do not divide into tiles of {self.m}"
        return None

    def counts(self, shapes: Shapes) -> dict[str, int]:
        """Return the kept weights of every layer."""
        for name, shape in shapes.items():
            if why := self.refuses(name, shape):
                raise InputError(f"The layer {name!r} cannot be {self.n}:{self.m}: {why}.")
        return {name: math.prod(shape) // self.m * self.n for name, shape in shapes.items()}

    def total(self, shapes: Shapes) -> int:
        """Return the kept weights of all layers together."""
        return sum(self.counts(shapes).values())

    def select(self, scores: Mapping[str, Tensor]) -> Support:
        """Return the support of the ``n`` largest scores of every group."""
        scores = Scores.of(scores)
        self.counts(scores.shapes)
        mask = self._tiled if self.transposable else self._grouped
        return Support({name: mask(name, scores) for name in scores})

    def cut_by_shards(self, shape: Shape, weight: Tensor) -> str | None:
        """Return why a sharded weight has groups or tiles that no rank holds as a whole."""
        axes, what = [shape.inputs], f"groups of {self.m} inputs"
        if self.transposable:
            axes, what = [shape.inputs, shape.outputs], f"tiles of {self.m} x {self.m}"
        cut = next((a for a in axes if a is not None and shards.cuts(weight, a, self.m)), None)
        return None if cut is None else _cut(cut, what)

    def _grouped(self, name: str, scores: Scores) -> Tensor:
        score, axis = scores[name], scores.shapes[name].inputs
        assert axis is not None
        refuse_nan(name, score)
        inputs_last = shards.local(score).movedim(axis, -1)
        groups = inputs_last.reshape(-1, self.m)
        largest = groups.sort(dim=1, descending=True, stable=True).indices[:, : self.n]
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, largest, True)
        mask = mask.reshape(inputs_last.shape).movedim(-1, axis).contiguous()
        return shards.like(score, mask)

    def _tiled(self, name: str, scores: Scores) -> Tensor:
        score, shape, m = scores[name], scores.shapes[name], self.m
        assert shape.inputs is not None
        refuse_nan(name, score)
        axes = (shape.outputs, shape.inputs)
        last = shards.local(score).movedim(axes, (-2, -1))
        *others, outputs, inputs = last.shape
        tiles = last.reshape(*others, outputs // m, m, inputs // m, m).transpose(-3, -2)
        mask = best_masks(tiles.reshape(-1, m, m), self.n, m).view(tiles.shape)
        whole = mask.transpose(-3, -2).reshape(last.shape)
        return shards.like(score, whole.movedim((-2, -1), axes).contiguous())


@dataclass(frozen=True)
class Block(Pattern):
    """Whole blocks of ``shape`` (output channels, input channels), at one kernel position.

    No block crosses the matrices that one tensor stacks, such as the gates of an LSTM. A block
    counts as the sum of its scores. A layer that does not divide into blocks stays dense and is
    reported. Counts are exact in blocks: ``kept(number of blocks, sparsity)``.

    Args:
        shape: (rows, columns) of a block.
        sparsity: Fraction of zeros.
        scope: As in :class:`Unstructured`, over blocks.
        floor: Every layer keeps at least this many blocks.
    """

    shape: tuple[int, int] = (4, 1)
    sparsity: float = 0.9
    scope: Scope = "global"
    floor: int = 1

    def __post_init__(self) -> None:
        self._inner()  # checks sparsity, scope and floor
        if len(self.shape) != 2 or any(not isinstance(n, int) or n < 1 for n in self.shape):
            raise InputError(
                f"Block(shape={self.shape!r}): a block has (output channels, input channels), two "
                f"whole numbers from 1 up, such as (4, 1)."
            )

    @property
    def target(self) -> float:
        """The sparsity that was asked for."""
        return self.sparsity

    def default_layers(self) -> Layers:
        """Return every convolution and linear layer; for uniform, all but the first and last."""
        uniform = self.scope == "uniform"
        return Layers(skip_first=uniform, skip_last=uniform)

    def refuses(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Return why a layer cannot be cut into blocks."""
        shape, (rows, columns) = Shape.of(shape), self.shape
        if shape.inputs is None:
            return _AXES
        outputs, inputs = shape.output_channels, shape.input_channels
        if outputs % rows or inputs % columns:
            return f"its {outputs} x {inputs} channels do not divide into {rows} x {columns}"
        return None

    def cut_by_shards(self, shape: Shape, weight: Tensor) -> str | None:
        """Return why a sharded weight has blocks that no rank holds as a whole."""
        rows, columns = self.shape
        for axis, size in ((shape.outputs, rows), (shape.inputs, columns)):
            if axis is not None and shards.cuts(weight, axis, size):
                return _cut(axis, f"blocks of {rows} x {columns}")
        return None

    def _blocks(self, shapes: Shapes) -> dict[str, Shape]:
        """Return the shapes of the layers, counted in blocks."""
        for name, shape in shapes.items():
            if why := self.refuses(name, shape):
                raise InputError(f"The layer {name!r} cannot be pruned in blocks: {why}.")
        return {name: Shape.of(shape).in_blocks(*self.shape) for name, shape in shapes.items()}

    def at(self, sparsity: float) -> Block:
        """Return the same pattern at another sparsity."""
        return replace(self, sparsity=sparsity)

    def _inner(self) -> Unstructured:
        return Unstructured(self.sparsity, self.scope, floor=self.floor)

    def counts(self, shapes: Shapes) -> dict[str, int] | None:
        """Return the kept weights of every layer; ``None`` for the global scope."""
        counts = self._inner().counts(self._blocks(shapes))
        return counts and {name: k * math.prod(self.shape) for name, k in counts.items()}

    def total(self, shapes: Shapes) -> int:
        """Return the kept weights of all layers together."""
        return self._inner().total(self._blocks(shapes)) * math.prod(self.shape)

    def select(self, scores: Mapping[str, Tensor]) -> Support:
        """Return the support of the blocks with the largest sums."""
        scores = Scores.of(scores)
        rows, columns = self.shape
        inner = self._blocks(scores.shapes)

        def axes(name: str) -> tuple[int, int]:
            shape = scores.shapes[name]
            assert shape.inputs is not None
            return shape.outputs, shape.inputs

        def sums(name: str) -> Tensor:
            score = scores[name]
            first = shards.local(score).movedim(axes(name), (0, 1))
            sizes = (len(first) // rows, rows, first.shape[1] // columns, columns)
            parts = first.reshape(*sizes, *first.shape[2:])
            summed = parts.sum(dim=(1, 3)).movedim((0, 1), axes(name)).contiguous()
            return shards.like(score, summed, inner[name])

        def weights(name: str, blocks: Tensor) -> Tensor:
            outputs, inputs = axes(name)
            part = shards.local(blocks).repeat_interleave(rows, outputs)
            part = part.repeat_interleave(columns, inputs)
            return shards.like(blocks, part, scores.shapes[name])

        chosen = self._inner().select(Scores(inner, sums, scores.dtype))
        return Support({name: weights(name, blocks) for name, blocks in chosen.items()})


# --- budgets ---------------------------------------------------------------------------------

_AXES = "the axis over which it is summed is not known: Layers(axes=...) gives it"


def _cut(axis: int, what: str) -> str:
    return (
        f"it is sharded along axis {axis} so that {what} lie on two ranks. Shard along another "
        f"axis, or over a number of ranks with which every rank holds whole ones"
    )


def _check_scope(scope: str) -> None:
    if scope not in ("global", "uniform", "erk"):
        raise InputError(f"scope is {scope!r}. It is 'global', 'uniform' or 'erk'.")


def _budgets(scope: Scope, shapes: Shapes, sparsity: float, floor: int) -> dict[str, int]:
    """Return the kept weights of every layer under a scope that no score changes."""
    if scope == "erk":
        return erk(shapes, sparsity, floor)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return {name: max(kept(n, sparsity), min(floor, n)) for name, n in sizes.items()}


def erk(shapes: Shapes, sparsity: float, floor: int = 1) -> dict[str, int]:
    """Return the kept weights of every layer by the Erdős–Rényi-kernel rule.

    The density of a layer is proportional to ``sum(dims) / prod(dims)`` of its matrix or kernel
    (each of them, where one tensor stacks several), held between its floor and 1, by the one factor
    with which the total is met: what dense layers cannot take goes to the others. The total is
    exactly ``kept(all, sparsity)``:
    shares are rounded by largest remainder (ties to the earlier layer), where the RigL code rounds
    each layer by itself and keeps a few weights too many.

    Raises:
        InputError: The total is smaller than the floors of the layers together.

    Source: Evci et al., RigL, ICML 2020.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    fans = {name: Shape.of(shape).fans for name, shape in shapes.items()}
    total = kept(sum(sizes.values()), sparsity)
    least = {name: min(floor, n) for name, n in sizes.items()}
    check_floor(total, least.values())
    if not shapes:
        return {}

    def shares(eps: Fraction) -> dict[str, Fraction]:
        """Density times size is eps·sum(dims), held between the floor and the size."""
        return {
            name: min(max(eps * fans[name], Fraction(least[name])), Fraction(sizes[name]))
            for name in shapes
        }

    # The total grows with eps, in straight lines between the places where a layer meets a bound.
    bounds = sorted({Fraction(n[name], fans[name]) for n in (least, sizes) for name in shapes})
    totals = [sum(shares(eps).values()) for eps in bounds]
    index = bisect_left(totals, total)
    eps = bounds[index]
    if totals[index] > total:
        slope = (eps - bounds[index - 1]) / (totals[index] - totals[index - 1])
        eps -= slope * (totals[index] - total)
    share = shares(eps)
    counts = {name: math.floor(part) for name, part in share.items()}
    short = total - sum(counts.values())
    for name in sorted(shapes, key=lambda name: counts[name] - share[name])[:short]:
        counts[name] += 1
    return counts
