"""A part of the network that could be traced, and its ``forward`` in a sparse phase.

In a sparse phase the forward is the traced graph, with segments in place of the layers that run
sparse.
"""

from __future__ import annotations

import copy
import inspect
import logging
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from acdc.engine.arguments import Arguments, NoFixedArguments
from acdc.engine.attention import has_in_projection
from acdc.engine.choice import Policy
from acdc.engine.contract import KernelPlan
from acdc.engine.dropout import replace_in
from acdc.engine.gradients import KernelGradients
from acdc.engine.graph import ConvSpec, Recognised, is_layer, note_settings, recognise
from acdc.engine.guards import Guards, Variants
from acdc.engine.judge import Judge, Pass
from acdc.engine.lowering import lower
from acdc.engine.memory import Workspace
from acdc.engine.modes import why_not_traced, why_plain
from acdc.engine.operations import Conv, Program
from acdc.engine.partition import fuse
from acdc.engine.plans import Plans
from acdc.engine.segment import Segment
from acdc.engine.shape_reads import read_from_stand_ins
from acdc.engine.tape import Op
from acdc.engine.tracing import (
    Untraceable,
    follow_tensors,
    has_other_forward,
    hooks_of,
    is_opaque,
    propagate,
    trace,
)

log = logging.getLogger(__name__)

UNREACHED = (
    "the example does not reach it; give one that does, and call the layer itself where only its "
    "weight is used"
)

ARGUMENTS = 4  # for so many kinds of calls a module is traced; PyTorch computes the others


@dataclass(frozen=True)
class _Traced:
    """A graph as it was traced, when it holds, and what its nodes are."""

    graph: fx.GraphModule
    guards: Guards
    found: dict[fx.Node, Recognised | str]


class Host:
    """A module whose forward is replaced while the network is sparse.

    Args:
        name: Of the module in the network.
        module: The module.
        args, kwargs: Arguments of a call.
        plans: The index lists of all layers.
        policy: Chooses the layers that run sparse.
        judge: Says what is switched off in a pass.
        workspace: The memory that all segments share.
        refused: Name of a layer -> why it stays with PyTorch; filled here.
        parts_of: Returns hosts of the parts of a module.

    Raises:
        Untraceable: its forward is no fixed graph.

    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        plans: Plans,
        policy: Policy,
        judge: Judge,
        workspace: Workspace,
        refused: dict[str, str],
        parts_of: Callable[[Host], list[Host]],
    ) -> None:
        self.module, self.name, self.refused = module, name, refused
        self.plans, self.policy, self.judge, self.workspace = plans, policy, judge, workspace
        self._parts_of = parts_of
        self._parts: list[Host] | None = None  # made at the first call that no graph can hold
        self.written = KernelGradients()
        self._started = False
        self._warned: set[str] = set()
        self._say = log.warning
        self._difference = ""  # of the first call that was one too many
        if has_other_forward(module):
            raise Untraceable("its forward was replaced by other code")
        self._root = module
        if is_layer(module):
            self._root = Single(module)
        self._signature = inspect.signature(self._root.forward)
        self._example = self._arguments(args, kwargs)
        if not name and _takes_any(self._example.signature):
            raise Untraceable("its forward takes any number of arguments")
        # By modes and arguments.
        self._graphs: dict[tuple[Hashable, Hashable], Variants] = {}
        self._sparse: set[str] = set()  # the layers that the graphs run sparse
        self._chosen: set[str] = set()  # the layers that had a choice when the graphs were built
        self._note_modules()
        # The first graph is built from this trace, if the modes are still the same.
        self._traced: tuple[Hashable, _Traced] | None
        self._traced = (self._modes(), self._trace(self._example))
        self._note_refused(self._traced[1].found)

    @property
    def active(self) -> bool:
        """Whether some layer runs sparse now."""
        return isinstance(vars(self.module).get("forward"), _Forward)

    def start(self, written: KernelGradients) -> None:
        """Replace the forward, if some layer gains by it.

        Graphs and buffers stay from one compression to the next. Only the index lists are new.

        Args:
            written: Where weight gradients are noted from now on.

        """
        self.written = written
        if not self._is_current():
            self.stop()
            self._graphs.clear()
            self._traced = None
            self._note_modules()
        for segment in self._own_segments():
            segment.start(self._plans_of(segment.program), written)
        self._started = True
        reason = self._graph(self._example)
        if isinstance(reason, str) and reason:
            self._warn(reason)
        self._sparse, self._chosen = self.policy.sparse, set(self.policy.choices)
        self._replace_forward()

    def _replace_forward(self) -> None:
        if has_other_forward(self.module) and not self.active:
            # As accelerate wraps it for autocast. The wrapper stays: it may call the engine's
            # forward, if it was made in a sparse phase, or the module's own.
            self._warn_once(
                "other forward",
                f"{self._title} keeps the forward that other code has given it. It runs sparse "
                f"only if that code calls the forward of a sparse phase.",
            )
        elif self._own_segments():
            self.module.forward = _Forward(self)

    def pause(self) -> None:
        """Give the module its own forward back. Buffers stay for the next compression."""
        for segment in self._own_segments():
            segment.pause()
        for part in self._parts or ():
            part.pause()
        self._restore_forward()

    def stop(self) -> None:
        """Give the module its own forward back, and free all buffers."""
        for segment in self._own_segments():
            segment.stop()
        for part in self._parts or ():
            part.stop()
        self._restore_forward()

    def _restore_forward(self) -> None:
        self._started = False
        self._hide()

    def segments(self) -> list[Segment]:
        """Return the segments of all graphs so far, also of the parts."""
        of_parts = [segment for part in self._parts or () for segment in part.segments()]
        return self._own_segments() + of_parts

    def _own_segments(self) -> list[Segment]:
        graphs = [graph for variants in self._graphs.values() for graph in variants.graphs]
        return [segment for graph in graphs for segment in _segments_of(graph)]

    def _note_modules(self) -> None:
        """Note the modules and parameters that graphs are built for."""
        self._modules = list(self.module.modules())
        self._params = list(self.module.parameters())
        self._hooks = [hooks for m in self._modules[1:] for hooks in hooks_of(m)]

    def _follow_modules(self) -> None:
        """Note modules that took the place of others, unless they bring parameters."""
        if self._modules != list(self.module.modules()) and self._has_own_params():
            self._note_modules()

    def _has_own_params(self) -> bool:
        """Return whether the modules hold the parameters that graphs are built for."""
        now = list(self.module.parameters())
        return len(now) == len(self._params) and all(map(operator.is_, now, self._params))

    def _is_current(self) -> bool:
        """Return whether network and choices are those that the graphs were built for."""
        return (
            self.policy.sparse == self._sparse
            and self._chosen <= self.policy.choices.keys()
            and self._modules == list(self.module.modules())
            and self._has_own_params()
            and all(s.program.is_current and s.program.has_layouts for s in self._own_segments())
        )

    def begin(self, *args: Any, **kwargs: Any) -> Pass:
        """Return how a call is computed."""
        self._hide_parts()
        values = (*args, *kwargs.values())
        if why_plain(values) is not None:
            return Pass()
        tensors = [value for value in values if isinstance(value, Tensor)]
        return self.judge.begin(self.name, self.module.training, tensors)

    def end(self, this: Pass) -> None:
        """Note the end of a call."""
        if this.evaluation is not None:
            self.judge.end(this)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module."""
        reason = why_not_traced(args, kwargs)
        if reason is not None:
            self._warn(reason)
            return self.original(*args, **kwargs)
        try:
            arguments = self._arguments(args, kwargs)
        except Untraceable as error:
            return self._in_parts(str(error), args, kwargs)
        graph = self._graph(arguments)
        if isinstance(graph, str):
            if not graph and self._started:
                self._warn("a parameter was replaced by another")
            return self._in_parts(graph, args, kwargs)
        if not follow_tensors(graph, self._root):
            self._warn("a tensor has another shape or dtype than when it was traced")
            return self.original(*args, **kwargs)
        return graph.forward(*arguments.tensors)  # the graph has names of its own for them

    def _in_parts(self, reason: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Compute a call that no graph holds: the module's own forward, and its parts sparse.

        Args:
            reason: Why no graph holds it. Empty: the sparse phase is over, or the parameters are
                others for the time of a call.
            args, kwargs: The arguments.

        """
        parts: list[Host] = []
        if reason and self._started and not isinstance(self._root, Single):
            with self.workspace.lock:
                if self._parts is None:
                    self._parts = self._parts_of(self)
                    for part in self._parts:
                        part._say = log.info  # the warning about the whole says it
                for part in self._parts:
                    if not part._started:
                        part.start(self.written)
                        part._hide()
                parts = [p for p in self._parts if not has_other_forward(p.module)]
        if reason:
            self._warn(reason, parts)
        for part in parts:  # until the next call of the whole: checkpointing calls a part once more
            part._replace_forward()
        return self.original(*args, **kwargs)

    def _hide_parts(self) -> None:
        """Give the parts their own forwards back, and their parts."""
        for part in self._parts or ():
            part._hide()
            part._hide_parts()

    def _hide(self) -> None:
        """Give the module its own forward back, and stay ready."""
        if self.active:
            del self.module.forward

    def _arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        try:
            return Arguments.of(self._signature, args, kwargs)
        except NoFixedArguments as error:
            raise Untraceable(str(error)) from error

    def _warn(self, reason: str, parts: Sequence[Host] = ()) -> None:
        how = "in parts" if parts else "on plain PyTorch"
        self._warn_once(reason, f"{self._title} runs {how}: {reason}.")

    def _warn_once(self, key: str, sentence: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            self._say("%s", sentence)

    @property
    def original(self) -> Callable[..., Any]:
        """The module's own forward."""
        return own_forward(self.module)

    # --- graphs -----------------------------------------------------------------------------------

    def _graph(self, arguments: Arguments) -> fx.GraphModule | str:
        """Return the graph for these arguments in the present modes and with the present hooks.

        Or return why there is none. The reason is empty if there may be one at another time.
        """
        if (known := self._known(arguments)) is not None:
            return known
        with self.workspace.lock:
            self._follow_modules()
            if (known := self._known(arguments)) is not None:
                return known
            # `functional_call` puts other parameters into the modules for the time of a call.
            if not (self._started and self._has_own_params()):
                return ""
            if self._is_one_too_many(arguments):
                self._difference = self._difference or arguments.difference(self._example)
                return self._difference
            return self._add(arguments)

    def _known(self, arguments: Arguments) -> fx.GraphModule | str | None:
        """Return a graph that was made before, or why there is none. None: it may be made."""
        variants = self._graphs.get((self._modes(), arguments.key))
        return None if variants is None else variants.find()

    def _add(self, arguments: Arguments) -> fx.GraphModule | str:
        """Make a graph for these arguments, or return why there is none."""
        key = (self._modes(), arguments.key)
        variants = self._graphs.setdefault(key, Variants())
        for segment in _segments_of(variants.make_room()):
            segment.stop()
        if variants.refused is None:
            try:
                variants.add(*self._build(key, arguments))
            except Untraceable as error:
                variants.refused = str(error)
        return variants.refused or variants.graphs[-1]

    def _is_one_too_many(self, arguments: Arguments) -> bool:
        """Return whether the module is called with ever new values: each would be traced again."""
        known = {key for _, key in self._graphs}
        return arguments.key not in known and len(known) >= ARGUMENTS

    def _modes(self) -> Hashable:
        """Return everything that a graph depends on: training modes and hooks."""
        hooked = tuple(i for i, hooks in enumerate(self._hooks) if hooks)
        return tuple(m.training for m in self._modules), hooked

    @property
    def _title(self) -> str:
        return self.name or type(self.module).__name__

    def _trace(self, arguments: Arguments) -> _Traced:
        guards, single = Guards(self.module), isinstance(self._root, Single)
        with with_own_forward(self.module):
            if single:
                self._root = Single(self.module)  # with the present attributes of the layer
            graph = trace(self._root, arguments, guards)
        propagate(graph, arguments.tensors)
        found = recognise(graph)
        for node, known in found.items():
            if node.op == "call_module" and isinstance(known, Recognised):
                module = self.module if single else graph.get_submodule(str(node.target))
                if module in self._modules:
                    note_settings(guards, module, known.spec)
        return _Traced(graph, guards, found)

    def _build(
        self, key: tuple[Hashable, Hashable], arguments: Arguments
    ) -> tuple[fx.GraphModule, Guards]:
        first, self._traced = self._traced, None
        if first and (first[0], self._example.key) == key and first[1].guards.hold():
            traced = first[1]
        else:
            traced = self._trace(arguments)
        graph = traced.graph
        recognised = {n: r for n, r in traced.found.items() if isinstance(r, Recognised)}
        layers = {self._name(r.spec) for r in recognised.values() if isinstance(r.spec, ConvSpec)}
        new = layers - self.policy.choices.keys()
        read_from_stand_ins(graph, recognised)
        segments = self.policy.choose(graph, recognised, self._name)
        for name in new:  # a layer may be refused in another mode
            self.refused.pop(name, None)
        for name, plain in fuse(graph, recognised, segments).items():
            setattr(graph, name, self._segment(plain))
        replace_in(graph, is_opaque)
        graph.recompile()
        return graph, traced.guards

    def _segment(self, plain: fx.GraphModule) -> Segment:
        program = lower(plain.graph)
        layers = tuple(self._name(conv.spec) for conv in program.convs)
        segment = Segment(plain, program, self.plans.kernels, self.workspace, layers, self.judge)
        segment.start(self._plans_of(program), self.written)
        return segment

    def _plans_of(self, program: Program) -> dict[Op, KernelPlan]:
        return {conv: self._plan_of(conv) for conv in program.convs}

    def _plan_of(self, conv: Conv) -> KernelPlan:
        name = self._name(conv.spec)
        return self.plans.plan(name, conv.spec, conv.x, conv.out, self.policy.tiling(name))

    def _name(self, spec: ConvSpec) -> str:
        return self._full_name(spec.name)

    def _full_name(self, target: str) -> str:
        """Return the name in the network of a layer of this module."""
        if self._root is not self.module:
            return self.name
        return f"{self.name}.{target}" if self.name else target

    def _note_refused(self, found: Mapping[fx.Node, Recognised | str]) -> None:
        """Note why layers stay with PyTorch."""
        called: dict[str, Recognised | str] = {}
        for node, known in found.items():
            if node.op == "call_module":
                target = str(node.target)
                if isinstance(known, Recognised) and isinstance(known.spec, ConvSpec):
                    target = known.spec.name  # a call of a function has a name of its own
                called[target] = known
        for target, module in self._root.named_modules():
            if has_in_projection(module):
                target = f"{target}.in_proj".removeprefix(".")
            elif not is_layer(module):
                continue
            reason = _reason(target, called)
            if isinstance(reason, str):
                self.refused[self._full_name(target)] = reason


def _segments_of(graph: fx.GraphModule | None) -> list[Segment]:
    return [] if graph is None else [m for m in graph.children() if isinstance(m, Segment)]


def _reason(target: str, called: Mapping[str, Recognised | str]) -> Recognised | str:
    """Return what a layer was recognised as, or why it stays with PyTorch."""
    if target in called:
        return called[target]
    parents = (whole for whole in called if target.startswith(f"{whole}."))
    if (whole := next(parents, None)) is not None:
        return f"it is a part of {whole}, which is called as a whole ({called[whole]})"
    return UNREACHED


def _takes_any(signature: inspect.Signature) -> bool:
    """Return whether a forward takes any keywords: training may call it in another way."""
    any_number = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.kind in any_number for p in signature.parameters.values())


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the forward of a module's class, bound to the module."""
    return MethodType(type(module).forward, module)


class _Forward:
    """The forward of a module in a sparse phase.

    An engine belongs to one model, so copies and pickles of the module get the module's own
    forward.
    """

    def __init__(self, host: Host) -> None:
        self._begin = torch.compiler.disable(host.begin)
        self._run = torch.compiler.disable(host.run)
        self._end = torch.compiler.disable(host.end)
        self._original = host.original
        # Trainers read from the signature which columns of a data set the model takes.
        self.__signature__ = inspect.signature(host.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting() or torch._C._is_tracing() or is_fx_symbolic_tracing():
            return self._original(*args, **kwargs)
        this = self._begin(*args, **kwargs)
        compute = self._original if this.plain else self._run
        result = compute(*args, **kwargs)
        self._end(this)
        return result

    @property
    def __code__(self) -> Any:
        """The code that ``torch.export`` reads the names of arguments from."""
        return self._original.__code__

    @property
    def __globals__(self) -> Any:
        # Others look here too, and go on without it: so it is no InputError.
        raise AttributeError(
            "torch.jit.script cannot read the forward of a network that runs on the engine. Give "
            "it a copy, which is plain: torch.jit.script(copy.deepcopy(model))."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return own_forward, (self._original.__self__,)  # type: ignore[attr-defined]


class Single(nn.Module):
    """A single layer as a graph of one node."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # A copy with the same parameters, whose forward is never replaced. The hooks of the layer
        # run where the layer is called, so the copy has none.
        self.layer = copy.copy(layer)
        for name, hooks in vars(layer).items():
            if name.endswith("_hooks") or "_hooks_" in name:
                setattr(self.layer, name, type(hooks)())

    def forward(self, input: Tensor) -> Any:
        """Call the layer."""
        return self.layer(input)


@contextmanager
def with_own_forward(module: nn.Module) -> Iterator[None]:
    """Give a module its own forward back inside this context."""
    replaced = vars(module).pop("forward", None)
    try:
        yield
    finally:
        if replaced is not None:
            module.forward = replaced
