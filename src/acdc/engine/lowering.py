"""From the nodes of a run of layers to a program: values with their halos, and operations in which
BatchNorm, addition and ReLU are one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from acdc.engine.graph import (
    ActivationSpec,
    AddSpec,
    ConvSpec,
    Known,
    NormSpec,
    PoolSpec,
    ReluSpec,
    SameSpec,
    inputs_of,
    shape_of,
)
from acdc.engine.layout import TOKEN_COLUMNS
from acdc.engine.operations import Activation, Add, Conv, Norm, Normalise, Op, Pool, Relu
from acdc.engine.tape import Value


class Program:
    """What a run of layers computes, for any batch size.

    Args:
        graph: The run: placeholders, one output, and nodes that carry what they are in
            ``meta["engine"]``.

    Attributes:
        ops: The operations in order.
        inputs, outputs: The values at both ends.
        params: All parameters that may take a gradient, each once.

    """

    def __init__(self, graph: fx.Graph) -> None:
        self.ops: list[Op] = []
        self._made: dict[fx.Node, Value | _Pending] = {}
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for node in placeholders:
            self._made[node] = value_of(node, self._holds_tokens(node))
        self.inputs = [self._value(node) for node in placeholders]
        for node in graph.nodes:
            if node.op not in ("placeholder", "output"):
                self._lower(node, node.meta["engine"])
        results: Any = graph.output_node().args[0]
        self.returns_one = isinstance(results, fx.Node)
        self.outputs = [self._value(n) for n in ([results] if self.returns_one else results)]
        self._set_halos()
        every: dict[int, Tensor] = {id(p): p for op in self.ops for p in op.params()}
        self.params = list(every.values())

    @property
    def convs(self) -> list[Conv]:
        """The layers."""
        return [op for op in self.ops if isinstance(op, Conv)]

    @property
    def norms(self) -> list[Norm]:
        """The BatchNorms."""
        return [norm for op in self.ops if isinstance(op, Normalise) for norm in op.norms]

    # --- lowering ---------------------------------------------------------------------------------

    def _holds_tokens(self, node: fx.Node) -> bool:
        return any(u.meta["engine"].kind == "tokens" for u in node.users if u.op != "output")

    def _lower(self, node: fx.Node, known: Known) -> None:
        spec, inputs = known.spec, inputs_of(node, known.spec)
        if isinstance(spec, SameSpec):
            self._made[node] = self._value(inputs[0])
        elif isinstance(spec, NormSpec):
            norm = Norm(spec.module, self._value(inputs[0]))
            maker = self._maker(norm.y)
            if isinstance(maker, Conv) and maker.norm is None and not norm.y.tokens:
                maker.norm, norm.gathered = norm, True
            self._put(node, _Pending(norm, value_of(node, False)))
        elif isinstance(spec, AddSpec):
            self._lower_sum(node, inputs, known.kind == "tokens")
        elif isinstance(spec, ReluSpec):
            before = self._pending(inputs[0])
            if before is not None:
                before.relu, before.out = True, value_of(node, False)
                self._put(node, before)
            else:
                self._emit(node, known, lambda x, out: Relu(x, out))
        elif isinstance(spec, ConvSpec):
            self._emit(node, known, lambda x, out: Conv(spec, x, out))
        elif isinstance(spec, PoolSpec):
            self._emit(node, known, lambda x, out: Pool(spec, x, out))
        else:
            assert isinstance(spec, ActivationSpec)
            self._emit(node, known, lambda x, out: Activation(spec, x, out))

    def _emit(self, node: fx.Node, known: Known, make: Callable[[Value, Value], Op]) -> None:
        out = value_of(node, known.kind == "tokens")
        self.ops.append(make(self._value(inputs_of(node, known.spec)[0]), out))
        self._made[node] = out

    def _lower_sum(self, node: fx.Node, inputs: tuple[fx.Node, ...], tokens: bool) -> None:
        growing = [n for n in inputs if (p := self._pending(n)) is not None and not p.is_sum]
        if not growing or inputs[0] is inputs[1]:
            x, y = map(self._value, inputs)
            self.ops.append(Add(x, y, out := value_of(node, tokens)))
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
        first.out = value_of(node, False)
        self._put(node, first)

    def _put(self, node: fx.Node, pending: _Pending) -> None:
        """Wait with an operation while its only reader may become part of it."""
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

    def _set_halos(self) -> None:
        for conv in self.convs:
            if conv.x.tokens:
                continue
            geometry = conv.spec.geometry
            conv.x.halo = max(conv.x.halo, geometry.halo)
            conv.out.grad_halo = geometry.grad_halo(conv.x.height, conv.x.width)


@dataclass
class _Pending:
    """A ``Normalise`` that is still growing."""

    norm: Norm
    out: Value
    second: Norm | None = None
    residual: Value | None = None
    relu: bool = False

    @property
    def is_sum(self) -> bool:
        return self.second is not None or self.residual is not None


def value_of(node: fx.Node, tokens: bool) -> Value:
    """Return the value that a node makes."""
    shape = shape_of(node)
    assert shape is not None
    dtype = node.meta["tensor_meta"].dtype
    if tokens:
        return Value(shape[-1], 1, TOKEN_COLUMNS, True, dtype)
    _, channels, height, width = shape
    return Value(channels, height, width, False, dtype)
