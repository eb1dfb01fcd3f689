"""From an exported graph to a program.

Each node is known before the network is called (weights, sizes, and all that follows from them),
or it is a view of a value of the program, a mask, or a tuple of views. The reader computes the
known nodes for two numbers of samples. So it finds nodes that differ between samples, or with their
number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from acdc.runtime.exported import Exported, module_of, number_of, shape_of
from acdc.runtime.program import Join, Map, Op, Part, Program, Value
from acdc.runtime.views import SAMPLES, Dim, Unknown, View, channels, points, size_of

TRIED = (2, 3)  # numbers of samples


@dataclass(frozen=True)
class Known:
    """Something that is known before the network is called, for each number in ``TRIED``."""

    values: tuple[Any, ...]

    @property
    def only(self) -> Any:
        """What it is for any number of samples.

        Raises:
            Unknown: It depends on the number of samples.

        """
        first, second = self.values
        if isinstance(first, Tensor):
            same = first is second or (first.shape == second.shape and torch.equal(first, second))
        else:
            same = type(first) is type(second) and first == second
        if not same:
            raise Unknown("a constant that depends on the number of samples")
        return first

    @property
    def of_sample(self) -> Tensor:
        """The tensor of one sample, with a first dimension of size 1.

        Raises:
            Unknown: Samples differ.

        """
        first: Tensor = self.values[0][:1]
        for tensor in self.values:
            if not torch.equal(tensor, first.expand_as(tensor)):
                raise Unknown("a constant that differs between samples")
        return first


@dataclass(frozen=True)
class Mask:
    """Which keys each query attends to: those of a view of integers that are not 0, and known ones.

    Args:
        keys: Integers of the samples and their keys.
        known: Bool tensors that must be true, too.

    """

    keys: View
    known: tuple[Known, ...] = ()


Thing = Known | View | Mask | tuple[Any, ...]
Handler = Callable[["Reader", fx.Node, list[Any], dict[str, Any]], Any]


class Reader:
    """Reads a graph.

    Args:
        exported: The graph.
        dtype: Of all numbers.
        handlers: Name of an operation -> the function that reads a node of it.

    Attributes:
        program: What was read so far.
        sources: For each input of the program: the number of the tensor among the arguments.

    """

    def __init__(
        self, exported: Exported, dtype: torch.dtype, handlers: Mapping[str, Handler]
    ) -> None:
        self.exported, self.program, self.handlers = exported, Program(dtype), handlers
        self.sources: list[int] = []
        self._things: dict[fx.Node, Thing] = {}

    def read(self) -> None:
        """Read all nodes. The results become the outputs of the program, in their order.

        Raises:
            Unknown: The runtime cannot compute a node.

        """
        for node in self.exported.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "call_function":
                self._things[node] = self._read(node)
            elif node.op != "output":
                raise Unknown(f"a node {node.op}")
        results: Any = self.exported.program.graph.output_node().args[0]
        for node in results:
            self._result(node)

    # --- inputs and results -----------------------------------------------------------------------

    def _placeholder(self, node: fx.Node) -> None:
        if node.name in self.exported.stored:
            tensor = self.exported.stored[node.name]
            self._things[node] = Known((tensor,) * len(TRIED))
        elif node.name in self.exported.given:
            if node.users:
                self._things[node] = self._input(node)
        else:  # no tensor: the graph holds its value
            self._things[node] = Known((node.meta.get("val"),) * len(TRIED))

    def _input(self, node: fx.Node) -> View:
        shape = shape_of(node)
        if not shape or size_of(SAMPLES) != shape[0] or any(size < 1 for size in shape):
            raise Unknown(f"the argument {node.name} does not have the samples first")
        dtype = node.meta["val"].dtype
        dims: tuple[Dim, ...]
        if not dtype.is_floating_point:
            if len(shape) != 2 or shape[1] < 2:
                raise Unknown(f"integers of the sizes {shape[1:]} for each sample")
            value, dims = Value(1, 1, shape[1], tokens=True, integers=True), (points(shape[1]),)
        elif dtype != self.program.dtype:
            raise Unknown(f"the argument {node.name} is {dtype}")
        elif len(shape) == 4:
            value = Value(*shape[1:])
            dims = (channels(shape[1]), points(shape[2], shape[3]), points(shape[3]))
        elif len(shape) == 3 and shape[1] > 1:
            value = Value(shape[2], 1, shape[1], tokens=True)
            dims = (points(shape[1]), channels(shape[2]))
        elif len(shape) == 2:
            value, dims = Value(shape[1], tokens=True), (channels(shape[1]),)
        else:
            raise Unknown(f"an argument of the sizes {shape[1:]} for each sample")
        self.sources.append(self.exported.given[node.name])
        self.program.inputs.append(self.program.new(value))
        return View(self.program.inputs[-1], (SAMPLES, *dims))

    def _result(self, node: Any) -> None:
        """Make an output of a result: a whole value."""
        thing = self._things.get(node) if isinstance(node, fx.Node) else None
        if not isinstance(thing, View) or self.program.values[thing.value].integers:
            raise Unknown("a result that the network does not compute")
        view = self.whole(thing, "result")
        dims = len(view.dims)
        value = self.program.values[view.value]
        if view.dims[:1] != (SAMPLES,):
            raise Unknown("a result that does not have the samples first")
        if dims == 4:
            view = self.images(view, "result")
            tokens = False
        elif dims in (2, 3) and view.dims[-1] == channels(value.channels):
            if dims == 3 and value.points < 2:
                raise Unknown("a result with one token for each sample")
            view, tokens = self.row(view, "result"), True
            if size_of(view.dims[1]) != (value.points if dims == 3 else value.channels):
                raise Unknown(f"a result of the sizes {view.shape[1:]}")
        else:
            raise Unknown(f"a result of the sizes {view.shape[1:]}")
        value = self.program.values[view.value]
        if value.tokens != tokens:
            if view.value in (*self.program.inputs, *self.program.outputs):
                copied = replace(value, tokens=tokens)
                view = replace(view, value=self.copied(view.value, copied, "result"))
            self.program.values[view.value] = replace(value, tokens=tokens)
        if view.value in self.program.inputs:
            view = replace(view, value=self.copied(view.value, value, "result"))
        self.program.outputs.append(view.value)

    # --- nodes ------------------------------------------------------------------------------------

    def _read(self, node: fx.Node) -> Thing:
        target = str(node.target)
        if getattr(node.target, "__name__", "") == "getitem":
            parts: Any = self._thing(node.args[0])
            if isinstance(parts, Known):
                return Known(tuple(value[node.args[1]] for value in parts.values))
            thing: Thing = parts[node.args[1]]
            return thing
        if "_assert" in target:
            return Known((None,) * len(TRIED))
        things = [self._things.get(source) for source in node.all_input_nodes]
        if all(isinstance(thing, Known) for thing in things):
            return self._computed(node)
        if target == "aten.sym_size.int":
            return self._sizes(node.meta["val"])
        if target in _OF_SHAPE:
            return self._of_shape(node)
        if target not in self.handlers:
            raise Unknown(f"{module_of(node)}: {target.removeprefix('aten.')} is not known")
        args = fx.map_arg(node.args, cast(Any, self._thing))
        kwargs = fx.map_arg(node.kwargs, cast(Any, self._thing))
        try:
            read: Thing = self.handlers[target](self, node, list(args), dict(kwargs))
        except Unknown as error:
            raise Unknown(f"{module_of(node)}: {error}") from error
        return read

    def _thing(self, node: Any) -> Thing:
        return self._things[node]

    def _sizes(self, size: Any) -> Known:
        return Known(tuple(number_of(size, samples) for samples in TRIED))

    def _computed(self, node: fx.Node) -> Known:
        """Compute a node whose inputs are known."""
        target: Any = node.target
        tags = getattr(target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags and "dropout" not in str(target):
            raise Unknown(f"{module_of(node)}: random numbers")
        known: list[Any] = [self._things[source] for source in node.all_input_nodes]
        same = all(all(v is thing.values[0] for v in thing.values) for thing in known)
        results: list[Any] = []
        for number in range(1 if same else len(TRIED)):

            def value(source: fx.Node, number: int = number) -> Any:
                thing: Any = self._things[source]
                return thing.values[number]

            args = fx.map_arg(node.args, value)
            results.append(target(*args, **fx.map_arg(node.kwargs, value)))
        return Known(tuple(results) * (len(TRIED) if same else 1))

    def _of_shape(self, node: fx.Node) -> Known:
        """Compute a node that reads nothing but the shape of its first argument."""
        source: Any = node.args[0]
        meta, target = source.meta["val"], node.target
        results = []
        for number, samples in enumerate(TRIED):

            def value(other: fx.Node, number: int = number) -> Any:
                thing = self._things[other]
                return thing.values[number] if isinstance(thing, Known) else None

            like = torch.zeros(shape_of(source, samples), dtype=meta.dtype)
            rest = fx.map_arg(node.args[1:], value)
            results.append(target(like, *rest, **fx.map_arg(node.kwargs, value)))  # type: ignore[operator]
        return Known(tuple(results))

    # --- what handlers use ------------------------------------------------------------------------

    def emit(self, op: Op) -> int:
        """Add an operation, and return the number of its result."""
        self.program.ops.append(op)
        return op.out

    def new(self, like: int, count: int | None = None) -> int:
        """Return a new value with the points of another one."""
        value = self.program.values[like]
        return self.program.new(Value(count or value.channels, value.height, value.width))

    def value(self, view: View) -> Value:
        """Return the value that a view shows."""
        return self.program.values[view.value]

    def copied(self, number: int, out: Value, name: str) -> int:
        """Return a value that holds all points of another one in another form."""
        x = self.program.values[number]
        part = Part(number, 0, 0, x.channels, x.points, 0, 0)
        return self.emit(Join(name, number, self.program.new(out), (part,)))

    def whole(self, view: View, name: str) -> View:
        """Return a view of a whole value. A part of a value is first copied to one of its own."""
        value = self.value(view)
        if value.integers:
            raise Unknown("numbers that are integers")
        count, length = view.extent("channels"), view.extent("points")
        if (count, length) == (value.channels, value.points):
            return view
        height, width = (value.height, value.width) if length == value.points else (1, length)
        part = Part(view.value, view.channel, view.point, count, length, 0, 0)
        out = self.program.new(Value(count, height, width))
        return View(self.emit(Join(name, view.value, out, (part,))), view.dims)

    def row(self, view: View, name: str) -> View:
        """Return a view of a value with one row."""
        value = self.value(view)
        if value.height == 1:
            return view
        out = Value(value.channels, 1, value.points)
        return replace(view, value=self.copied(view.value, out, name))

    def images(self, view: View, name: str) -> View:
        """Return a view of a whole value as ``[N, C, H, W]``."""
        view = self.whole(view, name)
        value, shape = self.value(view), view.shape
        if len(shape) != 4:
            raise Unknown(f"images of the sizes {shape[1:]}")
        wanted = (SAMPLES, channels(shape[1]), points(shape[2], shape[3]), points(shape[3]))
        if view.dims != wanted or shape[1] != value.channels:
            raise Unknown("images with their dimensions in another order")
        if (value.height, value.width) != shape[2:]:
            out = Value(shape[1], shape[2], shape[3])
            view = replace(view, value=self.copied(view.value, out, name))
        return view

    def over_channels(self, view: View, name: str) -> View:
        """Return a view of a whole value whose last dimension is its channels."""
        view = self.whole(view, name)
        if not view.dims or view.dims[-1] != channels(self.value(view).channels):
            raise Unknown("a layer over another dimension than the channels")
        return view

    def with_last(self, view: View, number: int) -> View:
        """Return a view of another value that differs in its last dimension, the channels."""
        last = channels(self.program.values[number].channels)
        return View(number, (*view.dims[:-1], last))

    def mapped(self, view: View, node: fx.Node, **settings: Any) -> View:
        """Return a view of a value that is computed number by number."""
        view = self.whole(view, node.name)
        out = self.new(view.value)
        self.emit(Map(module_of(node), view.value, out, **settings))
        return replace(view, value=out)

    def table(self, known: Any, view: View) -> Tensor:
        """Return a constant that is broadcast to a view, as ``[channels, points]``.

        Raises:
            Unknown: It differs between samples.

        """
        value = self.value(view)
        if not isinstance(known, Known):  # a number
            known = Known((torch.as_tensor(known, dtype=self.program.dtype),) * len(TRIED))
        tensor: Tensor = known.values[0]
        if not isinstance(tensor, Tensor):
            return self.table(known.only, view)
        whole = tensor.dim() == len(view.dims) and tensor.dim() and tensor.shape[0] != 1
        tensor = known.of_sample if whole and view.dims[0] == SAMPLES else known.only
        sizes = [_without_samples(dim) for dim in view.dims]
        if tensor.dim() > len(sizes):
            raise Unknown("a constant with more dimensions than what it is added to")
        try:
            tensor = tensor.expand(sizes)
        except RuntimeError as error:
            raise Unknown("a constant that makes a tensor larger") from error
        pieces = [p for dim in view.dims for p in dim if p.axis != "samples"]
        tensor = tensor.reshape([piece.size for piece in pieces])
        order = sorted(range(len(pieces)), key=lambda i: (pieces[i].axis, -pieces[i].stride))
        tensor = tensor.permute(order).reshape(value.channels, value.points)
        return tensor.to(self.program.dtype)


def _without_samples(dim: Dim) -> int:
    return size_of(tuple(piece for piece in dim if piece.axis != "samples"))


_OF_SHAPE = {
    f"aten.{name}"
    for name in (
        "new_ones.default", "new_zeros.default", "new_full.default", "zeros_like.default",
        "ones_like.default", "full_like.default", "new_empty.default",
    )
}  # fmt: skip


def constant(thing: Any) -> Any:
    """Return what a handler was given, if that is known: a number, a list or a tensor.

    Raises:
        Unknown: It depends on the samples.

    """
    if isinstance(thing, Known):
        return thing.only
    if isinstance(thing, Sequence) and not isinstance(thing, str):
        return [constant(part) for part in thing]
    if isinstance(thing, View | Mask):
        raise Unknown("a setting that the network computes")
    return thing
