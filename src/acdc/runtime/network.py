"""A network whose layers run in the runtime: traced, as a whole or in parts."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from acdc.engine import native
from acdc.engine.arguments import Arguments, NoFixedArguments
from acdc.engine.example import Call, calls_of
from acdc.engine.graph import Recognised, is_layer, recognise
from acdc.engine.host import Single, own_forward
from acdc.engine.locks import Lock
from acdc.engine.modes import why_not_kernels
from acdc.engine.partition import fuse, samples_of, segments_of
from acdc.engine.shape_reads import read_from_stand_ins
from acdc.engine.tracing import Untraceable, follow_tensors, propagate, trace
from acdc.errors import InputError
from acdc.runtime.channels import remove_channels
from acdc.runtime.frozen import Frozen, freeze, freeze_whole
from acdc.runtime.lowering import extend, lower, share_kept
from acdc.runtime.program import Program
from acdc.runtime.segment import Segment
from acdc.runtime.views import Unknown
from acdc.runtime.whole import Whole

log = logging.getLogger(__name__)

DENSE = 0.5  # with a larger share of kept weights, PyTorch computes a segment


@dataclass(frozen=True)
class InTorch:
    """Something that PyTorch computes.

    Args:
        name: Of a module, or of an operation.
        why: The reason.
        weights: How many weights it has, and how many of them are not zero.
        few_zeros: The kernels could compute it, and PyTorch is faster.

    """

    name: str
    why: str
    weights: tuple[int, int] | None = None
    few_zeros: bool = False


class Network:
    """A model whose layers run in the runtime.

    Args:
        model: The model in evaluation mode. The forwards of its parts are replaced.
        args, kwargs: What it is called with.
        whole: Make one program of a module where that is possible. Such a program has the number of
            tokens of the example. Without it PyTorch computes attention, and the kernels take any
            number of tokens.

    Attributes:
        programs: What the kernels compute.
        in_torch: What PyTorch computes.

    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        whole: bool = True,
    ) -> None:
        self.model = model
        self.args, self.kwargs, self._whole = args, kwargs, whole
        self.programs: list[Program] = []
        self.in_torch: list[InTorch] = []
        self._calls: dict[nn.Module, Call] | None = None
        self._add("", self.model, args, kwargs)
        self._calls = None  # the activations of the example

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the network."""
        return self.model(*args, **kwargs)

    def frozen(self, names: Sequence[str]) -> Frozen:
        """Return the network as one program.

        Args:
            names: Of its arguments.

        Raises:
            InputError: PyTorch computes a part of it.

        """
        part = vars(self.model).get("forward")
        if isinstance(part, Whole):
            return freeze_whole(part, names)
        if self.in_torch or not isinstance(part, _Part):
            parts = "; ".join(f"{p.name} ({p.why})" for p in self.in_torch) or "everything"
            raise InputError(
                "A frozen file holds no code, and PyTorch computes a part of this network: "
                f"{parts}. Save a network of which everything runs in the runtime."
            )
        return freeze(part.graph, names)

    def _add(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Let the largest parts of a module that can be traced run in the runtime."""
        part: _Part | Untraceable
        try:
            part = _Part(name, module, args, kwargs)
        except Untraceable as error:
            part = error
        if not _is_program(part) and self._whole:
            whole = _whole(name, module, args, kwargs)
            if whole is not None:
                self.programs.append(whole.program)
                if "forward" not in vars(module):
                    whole.others = _InParts(module, args, kwargs)
                module.forward = whole
                return
        if isinstance(part, Untraceable):
            log.info("%s is traced in parts: %s.", name or type(module).__name__, part)
            children = dict(module.named_children())
            if not children:
                self.in_torch.append(InTorch(name or type(module).__name__, str(part)))
            for child_name, child in children.items():
                self._add_child(f"{name}.{child_name}".removeprefix("."), child)
            return
        self.in_torch += part.in_torch
        self.programs += part.programs
        if part.programs:
            module.forward = part

    def _add_child(self, name: str, child: nn.Module) -> None:
        if self._calls is None:
            self._calls = calls_of(self.model, self.args, self.kwargs, values=True)
        if child in self._calls:
            self._add(name, child, *self._calls[child])
            return
        for child_name, grandchild in child.named_children():
            self._add_child(f"{name}.{child_name}", grandchild)


def _is_program(part: _Part | Untraceable) -> bool:
    """Return whether a part is one program, or would be one if it had more zeros."""
    if isinstance(part, Untraceable):
        return False
    dense = any(found.few_zeros for found in part.in_torch)
    rest = any(not found.few_zeros for found in part.in_torch)
    return not rest and (dense or len(part.programs) == 1)


def _whole(
    name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Whole | None:
    """Return a module as one program, or None if it is none, or has too few zeros for one."""
    if not any(is_layer(layer) for layer in module.modules()):
        return None
    try:
        whole = Whole(name, module, args, kwargs)
        share = share_kept(whole.program, 1)
    except Unknown as error:
        log.info("%s is no single program: %s.", name or type(module).__name__, error)
        return None
    except InputError:  # it has no layers
        return None
    if share > DENSE:
        return None
    remove_channels(whole.program)
    return whole


class _InParts:
    """A module traced in parts, for calls that its program does not take; made when it is needed.

    Args:
        module: A module that is one program. Its weights are shared, not copied.
        args, kwargs: What it is called with in the example.

    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._module, self._args, self._kwargs = module, args, kwargs
        self._network: Network | None = None
        self._lock = Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            if self._network is None:
                twin = self._twin()
                self._network = Network(twin, self._args, self._kwargs, whole=False)
        return self._network(*args, **kwargs)

    def _twin(self) -> nn.Module:
        """Return a copy of the module with the same tensors and with its own forward."""
        module = self._module
        tensors = (*module.parameters(), *module.buffers())
        memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
        memo[id(vars(module)["forward"])] = None
        twin = copy.deepcopy(module, memo)
        del twin.__dict__["forward"]
        return twin


class _Part:
    """The forward of a module that could be traced. Other calls are PyTorch's.

    Raises:
        Untraceable: it is no fixed graph.

    """

    def __init__(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.name, self.prefix = name or type(module).__name__, f"{name}." if name else ""
        self.plain: Callable[..., Any] = own_forward(module)
        self.root = module if list(module.children()) else Single(module)
        self.signature = inspect.signature(self.root.forward)
        self.example = self._arguments(args, kwargs)
        self.programs: list[Program] = []
        self.in_torch: list[InTorch] = []
        self._said: set[str] = set()
        graph = trace(self.root, self.example)
        propagate(graph, self.example.tensors)
        self.graph = self._with_segments(graph)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reason = why_not_kernels(args, kwargs)
        if reason is None:
            try:
                arguments = self._arguments(args, kwargs)
            except Untraceable as error:
                reason = str(error)
            else:
                if arguments.key != self.example.key:
                    reason = arguments.difference(self.example)
                elif not follow_tensors(self.graph, self.root):
                    reason = "a tensor has another shape or dtype than when it was traced"
        if reason is not None:
            if reason not in self._said:
                self._said.add(reason)
                log.warning("%s runs in PyTorch: %s.", self.name, reason)
            return self.plain(*args, **kwargs)
        return self.graph.forward(*arguments.tensors)

    def _arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        try:
            return Arguments.of(self.signature, args, kwargs)
        except NoFixedArguments as error:
            raise Untraceable(str(error)) from error

    def _with_segments(self, graph: fx.GraphModule) -> fx.GraphModule:
        """Return the graph with segments in place of what the kernels compute."""
        found: dict[fx.Node, Recognised | str] = recognise(graph)
        extend(found, graph)
        known = {n: r for n, r in found.items() if isinstance(r, Recognised)}
        read_from_stand_ins(graph, known)
        segments = segments_of(graph, known, known.keys())
        inside = {node for segment in segments for node in segment.nodes}
        for node, what in found.items():
            if node not in inside and _computes(node):
                why = what if isinstance(what, str) else "no layer is connected with it"
                title = self._full(_title(node))
                self.in_torch.append(InTorch(title, why, _weights(node, graph)))
        for name, plain in fuse(graph, known, segments).items():
            program, sources = lower(plain.graph)
            for op in program.ops:
                op.name = self._full(op.name)
            inputs = [node for node in plain.graph.nodes if node.op == "placeholder"]
            number, kind = sources[0]
            share = share_kept(program, samples_of(inputs[number], kind))
            why = f"{share:.0%} of its weights are not zero, and PyTorch is faster"
            if not native.available():
                why = "the compiled kernels are missing: reinstall acdc-train with a C++ compiler"
            if share > DENSE or not native.available():
                for op in program.convs:
                    weights = (op.weight_numel, op.weight.values.numel())
                    self.in_torch.append(InTorch(op.name, why, weights, few_zeros=True))
                continue
            remove_channels(program)
            self.programs.append(program)
            setattr(graph, name, Segment(plain, program, sources))
        graph.recompile()
        return graph

    def _full(self, name: str) -> str:
        """Return the name in the network of something of this part."""
        if isinstance(self.root, Single) and name == "layer":
            return self.name
        return f"{self.prefix}{name}"


def _computes(node: fx.Node) -> bool:
    """Return whether a node is more than a look at a shape or at a part of a tuple."""
    name = getattr(node.target, "__name__", str(node.target))
    return name not in ("getattr", "getitem", "size", "dim")


def _title(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    name = getattr(node.target, "__name__", str(node.target))
    return f"{node.name} ({name})"


def _weights(node: fx.Node, graph: fx.GraphModule) -> tuple[int, int] | None:
    if node.op != "call_module":
        return None
    weight = getattr(graph.get_submodule(str(node.target)), "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return None
    return weight.numel(), int(weight.count_nonzero())
