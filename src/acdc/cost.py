"""What a network costs, by one convention.

* A *position* is one place at which a layer's weights are applied to one sample: every output pixel
  of a convolution, padding included, every input pixel of a transposed one, every time step of an
  RNN, and once for a linear layer on ``[N, F]``.
* One weight at one position is one multiply-add (MAC), and one MAC is 2 FLOPs.
* Convolutions, linear layers, RNNs, attention projections and stacked experts count; biases,
  normalisation, activations, pooling and the products of attention do not.
* A weight that is zero *by the support* costs nothing. A weight that happens to be zero costs the
  same as any other, so a dense step has the dense cost, also right after a decompression.
* A training step costs 3 forward passes per sample: forward, and the gradients of inputs and of
  weights, at one forward each. In a sparse phase all three are done on the kept weights alone.

Everything is counted in Python integers and is exact; only ratios are floats.

>>> from torch import nn, zeros
>>> network = measure(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), zeros(1, 1, 28, 28))
>>> network.flops(), network.flops({"1.weight": 784}), network.inference_ratio({"1.weight": 784})
(15680, 1568, 0.1)

Source of the 3: Evci et al., RigL, ICML 2020, appendix H.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Any, Literal

from torch import Tensor, nn

from acdc.errors import InputError
from acdc.kinds import Kind
from acdc.positions import applied
from acdc.schedule import Kind as PhaseKind
from acdc.schedule import Schedule
from acdc.support import Support

Kept = Mapping[str, int] | Support
"""Kept weights: their number by parameter name, or a support. Layers that are missing are dense."""


@dataclass(frozen=True)
class LayerCost:
    """One weight of a layer.

    Args:
        name: Its name among the model's parameters, such as ``"layer1.0.conv1.weight"``.
        kind: The kind of its layer, such as ``"conv"``; ``"other"`` for a weight whose FLOPs are
            not counted.
        shape: Shape of the weight.
        positions: How often one sample meets every weight; 0 for a layer the network never calls,
            and for a layer whose FLOPs are not counted.
        bias: Whether the layer adds a bias, which no figure here counts.
    """

    name: str
    kind: Kind | Literal["other"]
    shape: tuple[int, ...]
    positions: int
    bias: bool

    @property
    def weights(self) -> int:
        """Number of weights, without the bias."""
        return math.prod(self.shape)

    @property
    def macs(self) -> int:
        """Multiply-adds for one sample with every weight."""
        return self.weights * self.positions


@dataclass(frozen=True)
class Network:
    """The layers of a network, in the order of its modules.

    Raises:
        InputError: No layer is ever called: there is nothing to count.
    """

    layers: tuple[LayerCost, ...]

    def __post_init__(self) -> None:
        if not self.macs:
            raise InputError(
                "The network calls no convolution (1d, 2d, 3d) and no linear layer, so it has no "
                "cost to count. Measure the model whose forward pass runs them."
            )

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense network for one sample."""
        return sum(layer.macs for layer in self.layers)

    @property
    def weights(self) -> int:
        """Weights of all layers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by name: what the counts of a pattern are computed from."""
        return {layer.name: layer.shape for layer in self.layers}

    def kept(self, counts: Kept | None = None) -> dict[str, int]:
        """Return the kept weights of every layer; without ``counts``, all of them.

        Raises:
            InputError: A name is no layer of the network, or a count does not fit its layer.
        """
        if isinstance(counts, Support):
            counts = counts.counts()
        found = dict(counts or {})
        if strange := [name for name in found if name not in self.shapes]:
            raise InputError(
                f"{strange[0]!r} is no layer of this network. Its layers are: "
                f"{', '.join(self.shapes)}."
            )
        kept = {layer.name: found.get(layer.name, layer.weights) for layer in self.layers}
        for layer in self.layers:
            number = kept[layer.name]
            if not isinstance(number, int) or not 0 <= number <= layer.weights:
                raise InputError(
                    f"{number!r} weights of {layer.name!r} were given as kept, and it has "
                    f"{layer.weights}. Give a whole number from 0 to {layer.weights}."
                )
        return kept

    def flops(self, counts: Kept | None = None) -> int:
        """Return the FLOPs of inference on one sample, dense or with these weights kept."""
        kept = self.kept(counts)
        return sum(2 * kept[layer.name] * layer.positions for layer in self.layers)

    def inference_ratio(self, counts: Kept) -> float:
        """Return the FLOPs with these weights kept as a share of the dense network's."""
        return self.flops(counts) / self.flops()

    def rows(self, counts: Kept | None = None) -> list[tuple[str, str, str, str, str, str]]:
        """Return the layers as text: layer, shape, weights, kept, density, MACs of one sample."""
        kept = self.kept(counts)
        return [
            _row(layer.name, "×".join(map(str, layer.shape)), layer.weights, k, k * layer.positions)
            for layer, k in ((layer, kept[layer.name]) for layer in self.layers)
        ]

    def table(self, counts: Kept | None = None) -> str:
        """Return the layers as a table of plain text, a line each, totals last."""
        head = ("layer", "shape", "weights", "kept", "density", "MACs")
        total = _row(
            "total", "", self.weights, sum(self.kept(counts).values()), self.flops(counts) // 2
        )
        lines = [head, *self.rows(counts), total]
        width = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text_columns = 2
        return "\n".join(
            "  ".join(
                cell.ljust(w) if column < text_columns else cell.rjust(w)
                for column, (cell, w) in enumerate(zip(line, width, strict=True))
            ).rstrip()
            for line in lines
        )

    def __str__(self) -> str:
        return self.table()


def _row(
    name: str, shape: str, weights: int, kept: int, macs: int
) -> tuple[str, str, str, str, str, str]:
    return (name, shape, f"{weights:,}", f"{kept:,}", f"{kept / weights:.4f}", f"{macs:,}")


# --- the FLOPs of training ----------------------------------------------------------------------

Seen = Callable[[int], int]
"""Function from executed steps to the training samples that they have seen."""

StepsFlops = Callable[[range, Seen, int, int], Fraction]
"""Function from steps of a sparse phase, the samples seen, and the FLOPs of a sparse and of a dense
forward pass on one sample to the FLOPs of these steps (``Training.flops``)."""


@dataclass(frozen=True)
class PhaseCost:
    """Training FLOPs of one phase.

    Args:
        kind: ``"dense"`` or ``"sparse"``.
        start: First step.
        stop: Step after the last one.
        samples: Training samples that the phase sees.
        flops: Training FLOPs.
        dense_flops: Training FLOPs of as many steps of the dense network.
    """

    kind: PhaseKind
    start: int
    stop: int
    samples: int
    flops: int
    dense_flops: int


@dataclass(frozen=True)
class Ledger:
    """Training FLOPs of a run, by phase. The only place that counts them.

    Args:
        phases: Costs of the phases, in order. The phase in which a run stopped is cut short.
        exact: Whether the counts are those of the run; ``False`` for an estimate before it.
    """

    phases: tuple[PhaseCost, ...]
    exact: bool = True

    @classmethod
    def of(
        cls,
        network: Network,
        schedule: Schedule,
        supports: Sequence[tuple[int, Kept | None]],
        sparse_steps: StepsFlops,
        samples_per_step: int,
        samples_per_epoch: int | None = None,
        until: int | None = None,
        exact: bool = True,
    ) -> Ledger:
        """Count the FLOPs of a run.

        Args:
            network: What is trained.
            schedule: The phases in executed optimizer steps.
            supports: ``(step, kept weights)`` of every change of the support, in order; ``None``
                for dense. Before the first one the network is dense. The supports of a run are its
                ``Sparsifier.changes``; those of a run to come are ``Method.forecast``.
            sparse_steps: The cost of steps in a sparse phase: ``method.training.flops``.
            samples_per_step: Samples that an optimizer step sees, over all its batches and
                processes.
            samples_per_epoch: Size of the training set, where the last step of an epoch sees the
                samples that are left; ``None`` where every step is full.
            until: Executed steps so far; ``None``: the whole schedule.
            exact: Whether ``supports`` are certain.

        Raises:
            InputError: The supports do not belong to the network, or the samples do not belong to
                the schedule.
        """
        seen = _samples_seen(schedule, samples_per_step, samples_per_epoch)
        end = schedule.total if until is None else until
        dense = network.flops()
        starts = [0, *(step for step, _ in supports)]
        counts = [None, *(kept for _, kept in supports)]
        stops = [*starts[1:], schedule.total]
        segments = [
            (start, stop, dense if kept is None else network.flops(kept), kept is None)
            for start, stop, kept in zip(starts, stops, counts, strict=True)
        ]
        phases = []
        for phase in schedule.phases:
            stop = min(phase.stop, end)
            if phase.start >= stop:
                break
            spent = Fraction(0)
            for first, last, sparse, is_dense in segments:
                first, last = max(first, phase.start), min(last, stop)
                if first >= last:
                    continue
                if is_dense:
                    spent += 3 * dense * (seen(last) - seen(first))
                else:
                    spent += sparse_steps(range(first, last), seen, sparse, dense)
            samples = seen(stop) - seen(phase.start)
            phases.append(
                PhaseCost(phase.kind, phase.start, stop, samples, round(spent), 3 * dense * samples)
            )
        return cls(tuple(phases), exact)

    @property
    def flops(self) -> int:
        """Training FLOPs in total."""
        return sum(phase.flops for phase in self.phases)

    @property
    def dense_flops(self) -> int:
        """Training FLOPs of as many steps of the dense network."""
        return sum(phase.dense_flops for phase in self.phases)

    @property
    def ratio(self) -> float:
        """Training FLOPs as a share of those of dense training for as many steps."""
        return self.flops / self.dense_flops if self.dense_flops else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the ledger as plain values, for a record."""
        return {"exact": self.exact, "phases": [asdict(phase) for phase in self.phases]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Ledger:
        """Inverse of :meth:`to_dict`."""
        names = [field.name for field in fields(PhaseCost)]  # a later version may write more
        costs = ({name: phase[name] for name in names} for phase in data["phases"])
        return cls(tuple(PhaseCost(**cost) for cost in costs), data["exact"])


def _samples_seen(schedule: Schedule, per_step: int, per_epoch: int | None) -> Seen:
    """Return the function from executed steps to the samples they have seen."""
    if per_step < 1:
        raise InputError(f"samples_per_step is {per_step}. Give a whole number from 1 up.")
    if per_epoch is None:
        return lambda step: step * per_step
    size, needed = per_epoch, -(-per_epoch // per_step)
    if any(steps != needed for steps in schedule.steps_per_epoch):
        raise InputError(
            f"An epoch of {per_epoch} samples at {per_step} a step has {needed} steps, and the "
            f"schedule has epochs of {sorted(set(schedule.steps_per_epoch))}. Leave out "
            f"samples_per_epoch where every step is full."
        )

    def seen(step: int) -> int:
        epochs, steps = divmod(step, needed)
        return epochs * size + steps * per_step

    return seen


# --- measuring a model --------------------------------------------------------------------------


def measure(model: nn.Module, example: Tensor, also: Iterable[str] = ()) -> Network:
    """Return the cost of a model, found by one forward pass of one sample.

    The pass runs in evaluation mode without gradients; BatchNorm statistics do not move, and the
    mode and hooks of every module are afterwards what they were. A layer that is called several
    times has the sum of its positions, as has a weight that layers share, under its first name.
    Operations that are no modules (attention products, ``functional.linear``) are not seen. Stacked
    experts count for the tokens that an expert takes on average, where the call names them.

    Args:
        model: On any device. On ``"meta"`` nothing is computed, and no weight takes memory.
        example: One batch of inputs, ``[N, ...]`` with ``N >= 1``, on the model's device. Its first
            sample is used.
        also: Names of parameters to list beside the layers, such as those of an embedding that is
            pruned. Their FLOPs are not counted.

    Raises:
        InputError: The example has no sample, or the model calls no layer that counts.
    """
    layers = applied(model, example)
    known = dict(model.named_parameters())
    others = [name for name in also if name not in layers]
    return Network(
        (
            *(
                LayerCost(name, use.kind, tuple(use.shape), use.positions, use.bias)
                for name, use in layers.items()
            ),
            *(LayerCost(name, "other", tuple(known[name].shape), 0, False) for name in others),
        )
    )
