"""From the nodes of a segment to a program: values with their halos, and operations.

BatchNorm, addition and ReLU become one operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

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
    shape_of,
)
from acdc.engine.layout import TOKEN_COLUMNS
from acdc.engine.operations import (
    Activation,
    Add,
    Concat,
    Conv,
    Dropout,
    Gate,
    LayerNorm,
    Mul,
    Norm,
    Normalise,
    Pool,
    Program,
    Relu,
    params_of,
)
from acdc.engine.tape import Op, Value


def lower(graph: fx.Graph) -> Program:
    """Return the program of a segment.

    Args:
        graph: The segment: placeholders, nodes with a ``Recognised`` in ``meta["engine"]``, and one
            output.

    """
    return _Lowering().lower(graph)


class _Lowering:
    """Lowers one graph. It maps each node to its value, or to an operation that still grows."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self._dropouts: dict[fx.Node, Dropout] = {}
        self._made: dict[fx.Node, Value | _Pending] = {}
        self._last: set[fx.Node] = set()  # of images that PyTorch would hold with channels last

    def lower(self, graph: fx.Graph) -> Program:
        """Return the program of a graph."""
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for node in placeholders:
            self._made[node] = value_of(node, _read_as(node))
        inputs = tuple(self._value(node) for node in placeholders)
        for node in graph.nodes:
            if node.op not in ("placeholder", "output"):
                self._note_format(node, node.meta["engine"])
                self._lower(node, node.meta["engine"])
        results: Any = graph.output_node().args[0]
        returns_one = isinstance(results, fx.Node)
        ends = (results,) if returns_one else tuple(results)
        outputs = tuple(map(self._value, ends))
        last = tuple(end in self._last for end in ends)
        ops = tuple(self.ops)
        _set_halos(ops)
        return Program(ops, inputs, outputs, last, returns_one, params_of(ops), self._dropouts)

    def _note_format(self, node: fx.Node, known: Recognised) -> None:
        """Note whether a node's images have their channels last in memory: behind pixels."""
        if isinstance(known.spec, PermuteSpec):
            last = not known.spec.last
        else:
            last = not self._last.isdisjoint(inputs_of(node, known.spec))
        if last:
            self._last.add(node)

    def _lower(self, node: fx.Node, known: Recognised) -> None:
        spec, inputs = known.spec, inputs_of(node, known.spec)
        if isinstance(spec, IdentitySpec | PermuteSpec):
            self._made[node] = self._value(inputs[0])
        elif isinstance(spec, NormSpec):
            norm = Norm(spec.module, self._value(inputs[0]))
            maker = self._maker(norm.y)
            if isinstance(maker, Conv) and maker.norm is None and not norm.y.tokens:
                maker.norm, norm.has_sums = norm, True
            self._put(node, _Pending(norm, value_of(node, known.kind)))
        elif isinstance(spec, AddSpec):
            self._lower_sum(node, inputs, known.kind)
        elif isinstance(spec, ReluSpec):
            before = self._pending(inputs[0])
            if before is not None:
                before.relu, before.out = True, value_of(node, known.kind)
                self._put(node, before)
            else:
                self._emit(node, known, lambda x, out: Relu(x, out))
        elif isinstance(spec, ConvSpec):
            self._emit(node, known, lambda x, out: Conv(spec, x, out))
        elif isinstance(spec, PoolSpec):
            self._emit(node, known, lambda x, out: Pool(spec, x, out))
        elif isinstance(spec, LayerNormSpec):
            self._emit(node, known, lambda x, out: LayerNorm(spec, x, out))
        elif isinstance(spec, DropoutSpec):
            self._emit(node, known, lambda x, out: self._dropout(node, spec, x, out))
        elif isinstance(spec, ConcatSpec):
            out = value_of(node, known.kind)
            self.ops.append(Concat(tuple(map(self._value, inputs)), out))
            self._made[node] = out
        elif isinstance(spec, MulSpec):
            self._lower_product(node, inputs, known.kind)
        else:
            assert isinstance(spec, ActivationSpec)
            self._emit(node, known, lambda x, out: Activation(spec, x, out))

    def _dropout(self, node: fx.Node, spec: DropoutSpec, x: Value, out: Value) -> Op:
        self._dropouts[node] = op = Dropout(spec, x, out, replace(out), node in self._last)
        return op

    def _lower_product(self, node: fx.Node, inputs: tuple[fx.Node, ...], kind: Kind) -> None:
        x, y = map(self._value, inputs)
        out = self._made[node] = value_of(node, kind)
        if (x.height, x.width) == (y.height, y.width):
            self.ops.append(Mul(x, y, out))
        elif (y.height, y.width) == (1, 1):
            self.ops.append(Gate(x, y, out))
        else:
            self.ops.append(Gate(y, x, out))

    def _emit(self, node: fx.Node, known: Recognised, make: Callable[[Value, Value], Op]) -> None:
        out = value_of(node, known.kind)
        self.ops.append(make(self._value(inputs_of(node, known.spec)[0]), out))
        self._made[node] = out

    def _lower_sum(self, node: fx.Node, inputs: tuple[fx.Node, ...], kind: Kind) -> None:
        growing = [n for n in inputs if (p := self._pending(n)) is not None and not p.is_sum]
        if not growing or inputs[0] is inputs[1]:
            x, y = map(self._value, inputs)
            self.ops.append(Add(x, y, out := value_of(node, kind)))
            self._made[node] = out
            return
        first = self._pending(growing[0])
        other = inputs[1] if growing[0] is inputs[0] else inputs[0]
        second = self._pending(other)
        assert first is not None
        if second is not None and not second.is_sum:
            first.second = second.norm
        else:
            first.residual = self._value(other)
        first.out = value_of(node, kind)
        self._put(node, first)

    def _put(self, node: fx.Node, pending: _Pending) -> None:
        """Keep an operation open while its only reader may become part of it."""
        self._made[node] = pending
        alone = len(node.users) == 1 and next(iter(node.users)).op != "output"
        if pending.relu or not alone:
            self._value(node)

    def _pending(self, node: fx.Node) -> _Pending | None:
        made = self._made[node]
        return made if isinstance(made, _Pending) else None

    def _value(self, node: fx.Node) -> Value:
        made = self._made[node]
        if isinstance(made, _Pending):
            self.ops.append(Normalise(made.norm, made.out, made.second, made.residual, made.relu))
            made = self._made[node] = made.out
        return made

    def _maker(self, value: Value) -> Op | None:
        return next((op for op in reversed(self.ops) if op.out is value), None)


@dataclass
class _Pending:
    """A ``Normalise`` that may still take in a sum or a ReLU."""

    norm: Norm
    out: Value
    second: Norm | None = None
    residual: Value | None = None
    relu: bool = False

    @property
    def is_sum(self) -> bool:
        return self.second is not None or self.residual is not None


def _read_as(node: fx.Node) -> Kind:
    kind: Kind = next(user.meta["engine"].reads for user in node.users if user.op != "output")
    return kind


def _set_halos(ops: tuple[Op, ...]) -> None:
    for op in ops:
        if not isinstance(op, Conv) or op.x.tokens:
            continue
        geometry = op.spec.geometry
        op.x.halo = max(op.x.halo, geometry.halo)
        op.out.grad_halo = geometry.grad_halo(op.x.height, op.x.width)


def value_of(node: fx.Node, kind: Kind) -> Value:
    """Return the value of a node that the layout holds in this way."""
    shape = shape_of(node)
    assert shape is not None
    dtype = node.meta["tensor_meta"].dtype
    if kind == "tokens":
        return Value(shape[-1], 1, TOKEN_COLUMNS, True, dtype)
    if kind == "pixels":
        shape = (shape[0], shape[3], shape[1], shape[2])
    _, channels, height, width = shape
    return Value(channels, height, width, False, dtype)
