"""Which layers run sparse. Each layer is timed dense and sparse, at the batch size of the example.

A layer outside of a segment needs two conversions; a layer inside a segment needs none. So the
layers are timed one by one, and each segment is then compared, as a whole, with the conversions at
its ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from torch import fx
from torch.fx.passes.infra.partitioner import Partition

from acdc.engine.contract import KernelPlan, Kernels
from acdc.engine.gradients import LARGE
from acdc.engine.graph import ConvSpec, Kind, Recognised, inputs_of
from acdc.engine.lowering import value_of
from acdc.engine.partition import ends_of, layers_of, samples_of, segments_of
from acdc.engine.plans import Plans
from acdc.engine.tile import Tiling
from acdc.engine.timing import Candidate, Timings, conversion_ms, time_layer
from acdc.engine.tuning import WORK, Tilings, class_of
from acdc.engine.verdict import Verdict
from acdc.processes import ALONE

FAR = 1.5  # with densities further apart, a choice is made again


@dataclass(frozen=True)
class Choice:
    """Whether a layer runs sparse, and the times that this follows from.

    Args:
        sparse: It runs on the kernels.
        density: The share of kept weights when it was timed.
        dense_ms, sparse_ms, convert_ms: Its times, as in ``timing.LayerTimes``. None if it was not
            timed.
        tiling: How its passes are cut into tiles. None: by the rule, for the caches of the machine.

    """

    sparse: bool
    density: float
    dense_ms: float | None = None
    sparse_ms: float | None = None
    convert_ms: float | None = None
    tiling: Tiling | None = None

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """Return the choice of a state; states of older versions have no tiling."""
        tiling = state.get("tiling")
        return cls(**{**state, "tiling": None if tiling is None else Tiling(**tiling)})

    def fits(self, density: float) -> bool:
        """Return whether the choice still holds at this density.

        >>> [Choice(False, 0.6).fits(density) for density in (0.89, 0.6, 0.41, 0.39, 0.0)]
        [True, True, True, False, False]
        """
        low, high = sorted((self.density, density))
        return high <= FAR * low or high == low

    @property
    def gain_ms(self) -> float:
        """The time that the kernels save, without conversions."""
        return (self.dense_ms or 0.0) - (self.sparse_ms or 0.0)


def measure(
    layer: Candidate, plan: KernelPlan, backend: Kernels, density: float, known: Timings
) -> Choice:
    """Time one layer, dense and sparse, and choose the faster one.

    Inside a segment, a sparse layer may be slower than dense by up to the two conversions that
    leaving the segment would add.

    Args:
        layer: The layer.
        plan: Its index lists.
        backend: The kernels.
        density: The share of kept weights.
        known: The timings so far; new ones are added.

    """
    times = time_layer(layer, plan, backend, density, known)
    sparse = times.sparse_ms < times.dense_ms + times.convert_ms
    return Choice(sparse, density, **asdict(times))


def segment_pays(choices: Iterable[Choice], conversions_ms: float) -> bool:
    """Return whether the layers of a segment save more than the conversions at its ends cost."""
    return sum(choice.gain_ms for choice in choices) > conversions_ms


class Policy:
    """Chooses the layers that run sparse.

    Args:
        plans: The index lists.
        times_layers: Time each layer. Otherwise every layer that can run sparse does.

    Attributes:
        choices: Name of a layer -> its choice.
        compressing: A compression is in progress. Several processes can agree on choices only then.
        peers: The processes that train the network together.

    """

    def __init__(self, plans: Plans, times_layers: bool) -> None:
        self.plans, self.times_layers = plans, times_layers
        self.choices: dict[str, Choice] = {}
        self.compressing = False
        self.peers = ALONE
        self._timings: Timings = {}
        self._tilings = Tilings(plans.kernels)

    def tiling(self, name: str) -> Tiling | None:
        """Return how the passes of a layer are cut into tiles. None: by the rule."""
        return self.choices[name].tiling if name in self.choices else None

    @property
    def sparse(self) -> set[str]:
        """The names of the layers that run sparse."""
        return {name for name, choice in self.choices.items() if choice.sparse}

    def forget_stale(self) -> bool:
        """Forget all choices if one layer has become much sparser, or much denser.

        A layer's gain depends on whether its neighbours are in the layout, so all choices are made
        again. A method that prunes in many small steps is nearly dense at its first compression,
        and would otherwise stay dense.

        Returns:
            Whether choices were forgotten.

        """
        fits = (c.fits(self.plans.density(name)) for name, c in self.choices.items())
        stale = self.times_layers and not all(fits)
        if stale:
            self.choices = {}
        return stale

    def doubt(self, layers: Iterable[str]) -> float:
        """Return how doubtful it is that the layers of a segment gain.

        It is their sparse time, with the conversions before the first and after the last layer, as
        a share of their dense time.
        """
        chosen = [self.choices[name] for name in layers if name in self.choices]
        dense = sum(choice.dense_ms or 0.0 for choice in chosen)
        if not dense:
            return 0.0
        ends = sum(choice.convert_ms or 0.0 for choice in (chosen[0], chosen[-1])) / 2
        return (sum(choice.sparse_ms or 0.0 for choice in chosen) + ends) / dense

    def choose(
        self,
        graph: fx.GraphModule,
        recognised: Mapping[fx.Node, Recognised],
        name_of: Callable[[ConvSpec], str],
    ) -> list[Partition]:
        """Choose for the layers of a graph that have no choice yet; return the sparse segments.

        Earlier choices stay: a checkpoint may hold them, and steps were computed with them.

        Args:
            graph: The traced graph.
            recognised: What its nodes are.
            name_of: Returns the name of a layer in the network.

        """
        names: dict[fx.Node, str] = {}
        new: dict[str, Candidate] = {}
        for node, what in recognised.items():
            if isinstance(what.spec, ConvSpec):
                name = names[node] = name_of(what.spec)
                if name not in self.choices:
                    new.setdefault(name, _candidate(name, what.spec, node, what.kind))
        self.choices |= self._measured(new) if self._may_time else self._untimed(new)
        if new and self._may_time:
            for segment in self._segments(graph, recognised, names):
                layers = [names[node] for node in layers_of(segment, recognised)]
                conversions = self._conversions_ms(segment, recognised)
                if not segment_pays([self.choices[name] for name in layers], conversions):
                    for name in new.keys() & set(layers):
                        self.choices[name] = replace(self.choices[name], sparse=False)
        self.plans.keep(self.sparse)
        return self._segments(graph, recognised, names)

    @property
    def _may_time(self) -> bool:
        return self.times_layers and (self.compressing or not self.peers)

    def _segments(
        self,
        graph: fx.GraphModule,
        recognised: Mapping[fx.Node, Recognised],
        names: Mapping[fx.Node, str],
    ) -> list[Partition]:
        chosen = {n for n in recognised if n not in names or self.choices[names[n]].sparse}
        return segments_of(graph, recognised, chosen)

    def _work(self, layer: Candidate) -> int:
        """Return the multiply-adds of the kept weights in a forward pass."""
        positions = layer.samples * (1 if layer.out.tokens else layer.out.height * layer.out.width)
        return round(positions * self.plans.density(layer.name) * layer.spec.weight.numel())

    def _untimed(self, new: Iterable[str]) -> dict[str, Choice]:
        """Return the choices for new layers where nothing is timed."""
        return {name: Choice(not self.times_layers, self.plans.density(name)) for name in new}

    def _measured(self, new: Mapping[str, Candidate]) -> dict[str, Choice]:
        """Return the choices for new layers by their times."""
        work: Counter[str | None] = Counter()
        for layer in new.values():
            work[self._class(layer)] += self._work(layer)
        return {name: self._measure(layer, work[self._class(layer)]) for name, layer in new.items()}

    def _class(self, layer: Candidate) -> str | None:
        return class_of(layer.spec.geometry, layer.out.tokens, self.plans.density(layer.name))

    def _measure(self, layer: Candidate, work: int) -> Choice:
        """Time a layer.

        Args:
            layer: The layer.
            work: The multiply-adds of its class. Measuring tiles takes some tenths of a second,
                which few of them never get back.

        """
        density, spec = self.plans.density(layer.name), layer.spec
        if spec.is_linear and not self.plans.is_pruned(layer.name) and spec.weight.numel() >= LARGE:
            # Its lists would need six times the memory of the weight, and it would not be chosen: a
            # matrix product does several times as many operations per second.
            return Choice(False, density)
        tiling = self._tilings.of(self._class(layer)) if work >= WORK else None
        plan = self.plans.plan(layer.name, spec, layer.x, layer.out, tiling)
        choice = measure(layer, plan, self.plans.kernels, density, self._timings)
        return replace(choice, tiling=tiling)

    def _conversions_ms(
        self, segment: Partition, recognised: Mapping[fx.Node, Recognised]
    ) -> float:
        """Return the time of the conversions at the ends of a segment."""
        return sum(
            conversion_ms(
                value_of(end, kind), samples_of(end, kind), self.plans.kernels, self._timings
            )
            for end, kind in ends_of(segment, recognised).items()
        )


def _candidate(name: str, spec: ConvSpec, node: fx.Node, kind: Kind) -> Candidate:
    (source,) = inputs_of(node, spec)
    x, out = value_of(source, kind), value_of(node, kind)
    if kind == "images":
        x.halo = spec.geometry.halo
        out.grad_halo = spec.geometry.grad_halo(x.height, x.width)
    return Candidate(name, spec, x, out, samples_of(source, kind))


def table(
    choices: Mapping[str, Choice], refused: Mapping[str, str], verdicts: Iterable[Verdict] = ()
) -> str:
    """Return the choices as text, one line per layer, and why other layers had none.

    A line for each verdict on whole steps follows.
    """
    width = max(len(name) for name in ("layer", *choices, *refused))
    lines = [f"{'layer':<{width}}  density  dense ms  sparse ms  convert ms  runs"]
    for name, c in choices.items():
        times = ["-" if t is None else f"{t:.2f}" for t in (c.dense_ms, c.sparse_ms, c.convert_ms)]
        runs = "sparse" if c.sparse else "dense"
        cells = f"{c.density:7.3f}  {times[0]:>8}  {times[1]:>9}  {times[2]:>10}  {runs}"
        lines.append(f"{name:<{width}}  {cells}")
    lines += [f"{name:<{width}}  PyTorch: {reason}" for name, reason in refused.items()]
    lines += map(str, verdicts)
    return "\n".join(lines)
