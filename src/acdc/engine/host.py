"""A part of the network that could be traced, and what its ``forward`` is in a sparse phase: the
traced graph, in which runs of layers are segments.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner, Partition
from torch.fx.passes.operator_support import OperatorSupportBase

from acdc.engine.choice import Choice, Site, Timings, conversion_ms, measure, run_pays
from acdc.engine.geometry import ConvGeometry
from acdc.engine.graph import (
    ConvSpec,
    Known,
    Untraceable,
    has_other_forward,
    hooks_of,
    inputs_of,
    propagate,
    recognise,
    shape_of,
    trace,
)
from acdc.engine.layout import Shape
from acdc.engine.lowering import Program, value_of
from acdc.engine.operations import Conv
from acdc.engine.segment import Segment, Workspace
from acdc.engine.tape import Value
from acdc.engine.written import Written

log = logging.getLogger(__name__)

UNREACHED = (
    "the example does not reach it; give one that does, and call the layer itself where only its "
    "weight is used"
)


class Owner(Protocol):
    """What a host asks of the engine."""

    backend: Any
    choices: dict[str, Choice]
    refused: dict[str, str]
    choose: bool
    timed: Timings
    written: Written
    workspace: Workspace

    def plan(self, name: str, weight: Tensor, geometry: ConvGeometry, x: Shape, dy: Shape) -> Any:
        """Return the index lists of a layer."""

    def density(self, name: str) -> float:
        """Return the share of kept weights of a layer."""

    @property
    def measures(self) -> bool:
        """Whether a layer may be timed now."""


class Host:
    """A module whose forward is replaced while the network is sparse.

    Args:
        owner: The engine.
        name: Of the module in the network.
        module: The module.
        args, kwargs: What it is called with.

    Raises:
        Untraceable: its forward is no fixed graph.

    """

    def __init__(
        self,
        owner: Owner,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.owner, self.module, self.name = owner, module, name
        if has_other_forward(module):
            raise Untraceable("its forward was replaced by somebody else")
        self._root = module
        if isinstance(module, nn.Conv2d | nn.Linear):
            self._root = _Single(module)
        self._arguments = _all_arguments(self._root, args, kwargs)
        self._graphs: dict[Hashable, fx.GraphModule | None] = {}
        self._sparse: set[str] = set()  # the layers that the graphs run sparse
        self._measured: set[str] = set()  # those that were measured when they were built
        self._modules = list(module.modules())
        self._hooks = [hooks for m in self._modules[1:] for hooks in hooks_of(m)]
        # What the first graph is made of, if the modes are still the same.
        self._traced: tuple[Hashable, fx.GraphModule] | None
        self._traced = (self._modes(), self._trace())
        self._note_refused(self._traced[1])

    @property
    def active(self) -> bool:
        """Whether some layer runs sparse now."""
        return isinstance(vars(self.module).get("forward"), _Forward)

    def start(self) -> None:
        """Replace the forward, if some layer gains by it.

        Graphs and buffers stay from one compression to the next: only the index lists are new.
        """
        if not self._is_current():
            self.stop()
            self._graphs.clear()
            self._traced = None
            self._modules = list(self.module.modules())
            self._hooks = [hooks for m in self._modules[1:] for hooks in hooks_of(m)]
        for segment in self.segments():
            segment.start(self._plans(segment.program), self.owner.written)
        self._graph()
        self._sparse, self._measured = self._sparse_now(), set(self.owner.choices)
        if self.segments():
            self.module.forward = _Forward(self)

    def pause(self) -> None:
        """Give the module its own forward back; buffers stay for the next compression."""
        for segment in self.segments():
            segment.pause()
        self._give_back()

    def stop(self) -> None:
        """Give the module its own forward back, and free all buffers."""
        for segment in self.segments():
            segment.stop()
        self._give_back()

    def _give_back(self) -> None:
        if self.active:
            del self.module.forward

    def segments(self) -> list[Segment]:
        """Return the runs of all graphs so far."""
        return [
            m for g in self._graphs.values() if g for m in g.children() if isinstance(m, Segment)
        ]

    def _sparse_now(self) -> set[str]:
        return {name for name, choice in self.owner.choices.items() if choice.sparse}

    def _is_current(self) -> bool:
        """Return whether network and choices are those that the graphs were built for."""
        return (
            self._sparse_now() == self._sparse
            and self._measured <= self.owner.choices.keys()
            and self._modules == list(self.module.modules())
            and all(segment.is_current for segment in self.segments())
        )

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module."""
        graph = self._graph()
        if graph is None or not self._as_traced(args, kwargs):
            return self.original(*args, **kwargs)
        return graph.forward(*args, **kwargs)

    @property
    def original(self) -> Callable[..., Any]:
        """The module's own forward."""
        return own_forward(self.module)

    # --- graphs -----------------------------------------------------------------------------------

    def _graph(self) -> fx.GraphModule | None:
        """Return the graph for the present modes and hooks, or None where there is none."""
        key = self._modes()
        if key not in self._graphs:
            try:
                self._graphs[key] = self._build(key)
            except Untraceable as error:
                log.warning("%s runs on plain PyTorch: %s.", self._title, error)
                self._graphs[key] = None
        return self._graphs[key]

    def _modes(self) -> Hashable:
        """Return all that another graph is needed for."""
        hooked = tuple(i for i, hooks in enumerate(self._hooks) if hooks)
        return tuple(m.training for m in self._modules), hooked

    @property
    def _title(self) -> str:
        return self.name or type(self.module).__name__

    def _as_traced(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Return whether all arguments that the graph holds fixed have their values."""
        if not self._arguments.fixed:
            return True
        given = inspect.signature(self.original).bind(*args, **kwargs).arguments
        fixed = self._arguments.fixed
        return all(given.get(name, value) is value for name, value in fixed.items())

    def _trace(self) -> fx.GraphModule:
        with _own_forward(self.module):
            graph = trace(self._root, self._arguments.fixed)
        propagate(graph, self._arguments.values)
        return graph

    def _build(self, modes: Hashable) -> fx.GraphModule:
        traced, self._traced = self._traced, None
        graph = traced[1] if traced and traced[0] == modes else self._trace()
        known = {node: k for node, k in recognise(graph).items() if isinstance(k, Known)}
        self._choose(graph, known)
        runs = [run for run in self._runs(graph, known) if _layers(run, known)]
        for node, what in known.items():
            node.meta["engine"] = what
        partitioner = _partitioner(graph, known)
        partitioner.fuse_partitions(runs, prefix="run_")
        for name, plain in list(graph.named_children()):
            if name.startswith("run_"):
                assert isinstance(plain, fx.GraphModule)
                setattr(graph, name, self._segment(plain))
        graph.recompile()
        return graph

    def _segment(self, plain: fx.GraphModule) -> Segment:
        program = Program(plain.graph)
        segment = Segment(plain, program, self.owner.backend, self.owner.workspace)
        segment.start(self._plans(program), self.owner.written)
        return segment

    def _plans(self, program: Program) -> dict[Conv, Any]:
        return {conv: self._plan(conv.spec, conv.x, conv.out) for conv in program.convs}

    def _plan(self, spec: ConvSpec, x: Value, out: Value) -> Any:
        lanes = self.owner.backend.lanes
        return self.owner.plan(
            self._full(spec.name),
            spec.module.weight,
            spec.geometry,
            x.shape(1, lanes, x.halo),
            out.shape(1, lanes, out.grad_halo),
        )

    # --- choices ----------------------------------------------------------------------------------

    def _choose(self, graph: fx.GraphModule, known: Mapping[fx.Node, Known]) -> None:
        """Measure the layers that were not measured before, and weigh the runs they make.

        What was chosen before stays, as long as the engine does not forget it: it may be in a
        checkpoint, and steps were computed by it.
        """
        choices = self.owner.choices
        fresh: set[str] = set()
        for node, what in known.items():
            if isinstance(what.spec, ConvSpec) and (name := self._name(what)) not in choices:
                fresh.add(name)
                choices[name] = self._measure(name, what.spec, node)
                self.owner.refused.pop(name, None)  # it was, in another mode
        if not fresh or not self.owner.measures:
            return
        for run in self._runs(graph, known):
            layers = [self._name(known[node]) for node in _layers(run, known)]
            if not run_pays([choices[name] for name in layers], self._conversions(run, known)):
                for name in fresh.intersection(layers):
                    choices[name] = replace(choices[name], sparse=False)

    def _measure(self, name: str, spec: ConvSpec, node: fx.Node) -> Choice:
        owner = self.owner
        density = owner.density(name)
        if not owner.measures:
            return Choice(not owner.choose, density)
        site = self._site(name, spec, node)
        plan = self._plan(spec, site.x, site.out)
        return measure(site, plan, owner.backend, density, owner.timed)

    def _site(self, name: str, spec: ConvSpec, node: fx.Node) -> Site:
        (source,) = inputs_of(node, spec)
        tokens = isinstance(spec.module, nn.Linear)
        x, out = value_of(source, tokens), value_of(node, tokens)
        if not tokens:
            x.halo = spec.geometry.halo
            out.grad_halo = spec.geometry.grad_halo(x.height, x.width)
        return Site(name, spec.module, spec.geometry, x, out, _samples(source, tokens))

    def _conversions(self, run: Partition, known: Mapping[fx.Node, Known]) -> float:
        """Return the time of the conversions at the ends of a run."""
        ends: dict[fx.Node, bool] = {}  # what is converted, once however often it is read
        for node in run.nodes:
            tokens = known[node].kind == "tokens"
            outside = [n for n in inputs_of(node, known[node].spec) if n not in run.nodes]
            if any(user not in run.nodes for user in node.users):
                outside.append(node)
            ends |= dict.fromkeys(outside, tokens)
        owner = self.owner
        return sum(
            conversion_ms(value_of(end, tokens), _samples(end, tokens), owner.backend, owner.timed)
            for end, tokens in ends.items()
        )

    def _runs(self, graph: fx.GraphModule, known: Mapping[fx.Node, Known]) -> list[Partition]:
        chosen = {
            node
            for node, what in known.items()
            if not isinstance(what.spec, ConvSpec) or self.owner.choices[self._name(what)].sparse
        }
        proposed = _partitioner(graph, chosen).propose_partitions()
        return [part for run in proposed for part in _connected(run, known)]

    def _name(self, known: Known) -> str:
        assert isinstance(known.spec, ConvSpec)
        return self._full(known.spec.name)

    def _full(self, target: str) -> str:
        """Return the name in the network of a layer of this module."""
        if self._root is not self.module:
            return self.name
        return f"{self.name}.{target}" if self.name else target

    def _note_refused(self, graph: fx.GraphModule) -> None:
        """Tell the engine why layers stay with PyTorch."""
        called: dict[str, Known | str] = {}
        for node, known in recognise(graph).items():
            if node.op == "call_module":
                called[str(node.target)] = known
        for target, module in self._root.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                known = _reason(target, called)
                if isinstance(known, str):
                    self.owner.refused[self._full(target)] = known


def _reason(target: str, called: Mapping[str, Known | str]) -> Known | str:
    """Return what a layer is, or why it stays with PyTorch."""
    if target in called:
        return called[target]
    parents = (whole for whole in called if target.startswith(f"{whole}."))
    if (whole := next(parents, None)) is not None:
        return f"it is a part of {whole}, which is called as a whole ({called[whole]})"
    return UNREACHED


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the forward of a module's class, bound to the module."""
    return MethodType(type(module).forward, module)


class _Forward:
    """The forward of a module in a sparse phase.

    Copies and pickles of the module get its own forward: an engine belongs to one model.
    """

    def __init__(self, host: Host) -> None:
        self._run = torch.compiler.disable(host.run)
        self._original = host.original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting() or torch._C._is_tracing():
            return self._original(*args, **kwargs)
        return self._run(*args, **kwargs)

    @property
    def __code__(self) -> Any:
        """What ``torch.export`` reads the names of arguments from."""
        return self._original.__code__

    def __reduce__(self) -> tuple[Any, ...]:
        return own_forward, (self._original.__self__,)  # type: ignore[attr-defined]


class _Single(nn.Module):
    """A layer that stands alone, as a graph of one node."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # A twin that holds the same parameters, whose forward is its own for good. The layer's
        # hooks run where it is called; the twin has none.
        self.layer = copy.copy(layer)
        for name, hooks in vars(layer).items():
            if name.endswith("_hooks") or "_hooks_" in name:
                setattr(self.layer, name, type(hooks)())

    def forward(self, x: Tensor) -> Any:
        """Call the layer."""
        return self.layer(x)


@dataclass(frozen=True)
class _Arguments:
    """What a forward is called with: all values in order, and those that a graph holds fixed."""

    values: tuple[Any, ...]
    fixed: dict[str, Any]


def _all_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> _Arguments:
    signature = inspect.signature(module.forward)
    kinds = {p.kind for p in signature.parameters.values()}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        raise Untraceable("its forward takes any number of arguments")
    bound = signature.bind(*args, **kwargs)
    fixed = {
        name: p.default for name, p in signature.parameters.items() if name not in bound.arguments
    }
    fixed |= {k: v for k, v in bound.arguments.items() if not isinstance(v, Tensor)}
    bound.apply_defaults()
    return _Arguments(tuple(bound.arguments.values()), fixed)


@contextmanager
def _own_forward(module: nn.Module) -> Iterator[None]:
    """Give a module its own forward back for a while."""
    replaced = vars(module).pop("forward", None)
    try:
        yield
    finally:
        if replaced is not None:
            module.forward = replaced


class _Support(OperatorSupportBase):
    """Which nodes may be part of a run."""

    def __init__(self, nodes: Any) -> None:
        self.nodes = nodes

    def is_node_supported(self, submodules: Mapping[str, nn.Module], node: fx.Node) -> bool:
        return node in self.nodes


def _partitioner(graph: fx.GraphModule, nodes: Any) -> CapabilityBasedPartitioner:
    return CapabilityBasedPartitioner(graph, _Support(nodes), allows_single_node_partition=True)


def _connected(run: Partition, known: Mapping[fx.Node, Known]) -> list[Partition]:
    """Split a run into parts that have no tensor in common: they may differ in batch size and
    dtype, and one does not fall back because of the other.
    """
    parts: list[tuple[set[Any], list[fx.Node]]] = []
    for node in run.nodes:
        what = known[node]
        # What is read as images by one and as tokens by another is converted twice anyway.
        tensors = {(tensor, what.kind) for tensor in (node, *inputs_of(node, what.spec))}
        nodes = [node]
        for part in [part for part in parts if part[0] & tensors]:
            parts.remove(part)
            tensors |= part[0]
            nodes = [*part[1], *nodes]
        parts.append((tensors, nodes))
    return [Partition(id=i, nodes=nodes) for i, (_, nodes) in enumerate(parts)]


def _layers(run: Partition, known: Mapping[fx.Node, Known]) -> list[fx.Node]:
    return [node for node in run.nodes if isinstance(known[node].spec, ConvSpec)]


def _samples(node: fx.Node, tokens: bool) -> int:
    shape = shape_of(node)
    assert shape is not None
    return int(torch.Size(shape[:-1]).numel()) if tokens else shape[0]
