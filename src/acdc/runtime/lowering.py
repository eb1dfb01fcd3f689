"""From the nodes of a segment to a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from acdc.engine.calls import NormCall
from acdc.engine.contract import DTYPES
from acdc.engine.graph import (
    ActivationSpec,
    AddSpec,
    ConcatSpec,
    ConvSpec,
    DropoutSpec,
    IdentitySpec,
    Kind,
    LayerNormSpec,
    MulSpec,
    NormSpec,
    PermuteSpec,
    PoolSpec,
    Recognised,
    ReluSpec,
    inputs_of,
    meta_of,
    shape_of,
)
from acdc.errors import InputError
from acdc.runtime.fusion import fuse
from acdc.runtime.program import (
    Conv,
    Gate,
    Join,
    Kept,
    Map,
    Norm,
    Part,
    Pool,
    Program,
    Value,
)


class FlattenSpec:
    """A view of images of one pixel as tokens: nothing is computed."""


class MeanSpec:
    """The mean over the pixels of images, as tokens."""


def extend(recognised: dict[fx.Node, Recognised | str], graph: fx.GraphModule) -> None:
    """Recognise what the runtime can do and the engine cannot; refuse what the runtime cannot.

    Args:
        recognised: As the engine recognises the nodes; changed in place.
        graph: The graph.

    """
    for node, known in recognised.items():
        if isinstance(known, str):
            spec = _pixels_as_tokens(graph, node)
            if spec is not None:
                recognised[node] = Recognised(cast(Any, spec), "tokens", read_as="images")
        elif (why := _why_not(known)) is not None:
            recognised[node] = why


def _pixels_as_tokens(graph: fx.GraphModule, node: fx.Node) -> FlattenSpec | MeanSpec | None:
    """Return the operation of a node that makes ``[N, C]`` of images, or None."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or len(node.all_input_nodes) != 1:
        return None
    before, after, meta = shape_of(source), shape_of(node), meta_of(node)
    if before is None or len(before) != 4 or after != before[:2] or meta is None:
        return None
    if meta.dtype not in DTYPES or (before[0] == 1 and node.target in _SQUEEZES):
        return None  # a squeeze would remove the batch of one sample, and no other
    target: Any = node.target
    if node.op == "call_module":
        target = type(graph.get_submodule(str(node.target)))
    if target in _MEANS:
        return MeanSpec() if _is_over_pixels(node) else None
    return FlattenSpec() if before[2:] == (1, 1) and target in _FLATTENS else None


def _is_over_pixels(node: fx.Node) -> bool:
    dims = node.args[1] if len(node.args) == 2 else node.kwargs.get("dim")
    if node.kwargs.keys() - {"dim"} or not isinstance(dims, tuple | list):
        return False
    return {dim % 4 if isinstance(dim, int) else None for dim in dims} == {2, 3}


_SQUEEZES = ("squeeze", torch.squeeze)
_FLATTENS = ("flatten", torch.flatten, nn.Flatten, *_SQUEEZES)
_MEANS = ("mean", torch.mean)


def _why_not(known: Recognised) -> str | None:
    spec = known.spec
    if isinstance(spec, NormSpec):
        module = spec.module
        of_batch = module.of_batch if isinstance(module, NormCall) else module.training
        if of_batch or module.running_mean is None:
            return "a BatchNorm that uses the statistics of its batch"
    if isinstance(spec, DropoutSpec):
        return "a dropout that drops"
    return None


def lower(graph: fx.Graph) -> tuple[Program, list[tuple[int, Kind]]]:
    """Return the program of a segment, and where each of its inputs comes from.

    An input is the number of an argument of the graph, and how the program reads it.

    Args:
        graph: Placeholders, nodes with a ``Recognised`` in ``meta["engine"]``, and one output.

    """
    return _Lowering(graph).lower()


class _Lowering:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self.sources: list[tuple[int, Kind]] = []
        self._made: dict[fx.Node, int] = {}
        dtype = self.placeholders[0].meta["tensor_meta"].dtype
        self.program = Program(dtype)

    def lower(self) -> tuple[Program, list[tuple[int, Kind]]]:
        for node in self.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self._lower(node, node.meta["engine"])
        results: Any = self.graph.output_node().args[0]
        nodes: Sequence[fx.Node] = [results] if isinstance(results, fx.Node) else results
        self.program.outputs = [self._made[node] for node in nodes]
        fuse(self.program)
        return self.program, self.sources

    def _read(self, node: fx.Node, kind: Kind) -> int:
        """Return the number of a value. An argument that is read in two ways is two inputs."""
        if node.op != "placeholder":
            return self._made[node]
        source = (self.placeholders.index(node), kind)
        if source not in self.sources:
            self.sources.append(source)
            self.program.inputs.append(self.program.new(value_of(node, kind)))
        return self.program.inputs[self.sources.index(source)]

    def _lower(self, node: fx.Node, known: Recognised) -> None:
        spec: Any = known.spec
        sources = inputs_of(node, known.spec)
        kind = known.reads
        x = self._read(sources[0], kind)
        if isinstance(spec, IdentitySpec | PermuteSpec):
            self._made[node] = x
            return
        out = self._made[node] = self.program.new(value_of(node, known.kind))
        emit = self.program.ops.append
        if isinstance(spec, ConvSpec):
            weight = Kept.of(spec.by_output(spec.weight.detach()).contiguous())
            bias = _frozen(spec.bias)
            emit(Conv(spec.name, x, out, spec.geometry, weight, bias))
        elif isinstance(spec, NormSpec):
            scale, offset = _folded(spec.module)
            emit(Map(node.name, x, out, scale=scale, offset=offset))
        elif isinstance(spec, AddSpec):
            emit(Map(node.name, x, out, y=self._read(sources[1], kind)))
        elif isinstance(spec, MulSpec):
            self._lower_product(node.name, x, self._read(sources[1], kind), out)
        elif isinstance(spec, ReluSpec):
            emit(Map(node.name, x, out, activation="relu"))
        elif isinstance(spec, ActivationSpec):
            emit(Map(node.name, x, out, activation=spec.kernel))
        elif isinstance(spec, LayerNormSpec):
            vectors = _frozen(spec.weight), _frozen(spec.bias)
            emit(Norm(node.name, x, out, spec.eps, spec.centered, *vectors))
        elif isinstance(spec, ConcatSpec):
            emit(joined(self.program, node.name, [self._read(s, kind) for s in sources], out))
        elif isinstance(spec, PoolSpec):
            self._lower_pool(node.name, spec, x, out)
        elif isinstance(spec, MeanSpec):
            self._lower_pool(node.name, PoolSpec("avg", None), x, out)
        else:
            assert isinstance(spec, FlattenSpec)
            emit(Map(node.name, x, out))

    def _lower_product(self, name: str, x: int, y: int, out: int) -> None:
        first, second = self.program.values[x], self.program.values[y]
        if (first.height, first.width) == (second.height, second.width):
            self.program.ops.append(Map(name, x, out, y=y, multiply=True))
        elif (second.height, second.width) == (1, 1):
            self.program.ops.append(Gate(name, x, out, y))
        else:
            self.program.ops.append(Gate(name, y, out, x))

    def _lower_pool(self, name: str, spec: PoolSpec, x: int, out: int) -> None:
        value = self.program.values[x]
        window = spec.window or (value.height, value.width)
        self.program.ops.append(
            Pool(
                name,
                x,
                out,
                spec.kind == "max",
                window,
                spec.stride,
                spec.padding,
                spec.count_padding,
            )
        )


def joined(program: Program, name: str, sources: Sequence[int], out: int) -> Join:
    """Return the operation that puts the channels of values one after the other."""
    parts, channel = [], 0
    for number in sources:
        value = program.values[number]
        parts.append(Part(number, 0, 0, value.channels, value.points, channel, 0))
        channel += value.channels
    return Join(name, sources[0], out, tuple(parts))


def value_of(node: fx.Node, kind: Kind) -> Value:
    """Return the value of a node."""
    shape = shape_of(node)
    assert shape is not None
    if kind == "tokens":
        return Value(shape[-1], tokens=True)
    if kind == "pixels":
        shape = (shape[0], shape[3], shape[1], shape[2])
    _, channels, height, width = shape
    return Value(channels, height, width)


def _frozen(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _folded(module: nn.BatchNorm2d | NormCall) -> tuple[Tensor, Tensor]:
    """Return scale and offset of a BatchNorm in evaluation mode."""
    assert module.running_mean is not None
    assert module.running_var is not None
    assert module.eps is not None
    mean, variance = module.running_mean.double(), module.running_var.double()
    scale = (variance + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach().double()
    offset = -mean * scale
    if module.bias is not None:
        offset = offset + module.bias.detach().double()
    dtype = module.running_mean.dtype
    return scale.to(dtype), offset.to(dtype)


def share_kept(program: Program, samples: int) -> float:
    """Return the multiply-adds with kept weights, as a share of those with all weights."""
    kept = whole = 0
    for op in program.convs:
        pixels = program.values[op.out].height * program.values[op.out].width * samples
        kept += op.weight.values.numel() * pixels
        whole += op.weight_numel * pixels
    if not whole:
        raise InputError("A program without layers has no share of kept weights.")
    return kept / whole
