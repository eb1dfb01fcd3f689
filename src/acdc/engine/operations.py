"""The operations of a segment. Each writes its forward and its backward pass onto a tape."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from acdc.engine.calls import NormCall
from acdc.engine.contract import Call, Fold, Pointwise, WeightGradCall
from acdc.engine.dropout import draw
from acdc.engine.graph import ActivationSpec, ConvSpec, DropoutSpec, LayerNormSpec, PoolSpec
from acdc.engine.layout import Buffer
from acdc.engine.tape import Binder, GradientRequest, Op, Slot, Tape, Value


@dataclass(frozen=True)
class Program:
    """What a segment computes, for any batch size.

    Args:
        ops: The operations in order.
        inputs, outputs: The values at both ends.
        last: Whether each output has its channels last in the memory of PyTorch.
        returns_one: The result is one tensor, not a tuple.
        params: All parameters that may take a gradient, each once.
        dropouts: Node of the graph -> dropout that draws a mask.

    """

    ops: tuple[Op, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    last: tuple[bool, ...]
    returns_one: bool
    params: tuple[Tensor, ...]
    dropouts: Mapping[fx.Node, Dropout]

    @property
    def is_current(self) -> bool:
        """Whether the modules still hold the parameters that the program was built for."""
        now = params_of(self.ops)
        return len(now) == len(self.params) and all(map(operator.is_, now, self.params))

    @property
    def has_layouts(self) -> bool:
        """Whether the weights lie in memory as they did when the program was built."""
        return all(conv.spec.weight.stride() == conv.strides for conv in self.convs)

    @property
    def convs(self) -> list[Conv]:
        """The sparse layers."""
        return [op for op in self.ops if isinstance(op, Conv)]

    @property
    def norms(self) -> list[Norm]:
        """The BatchNorms."""
        return [norm for op in self.ops if isinstance(op, Normalise) for norm in op.norms]

    def tape(self, request: GradientRequest | None) -> Tape:
        """Return the instructions of the operations."""
        return Tape(self.ops, self.inputs, self.outputs, request, self.last)


def params_of(ops: Iterable[Op]) -> tuple[Tensor, ...]:
    """Return the parameters that the modules hold at present, each once."""
    return tuple({id(p): p for op in ops for p in op.params()}.values())


# --- layers ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class Conv(Op):
    """A sparse convolution, or a linear layer.

    Args:
        spec: The layer.
        x, out: Its input and its output.
        norm: The BatchNorm of ``out``, if the convolution also computes its sums.

    Attributes:
        strides: Those that the weight had. The index lists are made for them.

    """

    spec: ConvSpec
    x: Value
    out: Value
    norm: Norm | None = None
    strides: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.strides = self.spec.weight.stride()

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.x,)

    def params(self) -> tuple[Tensor, ...]:
        weight, bias = self.spec.weight, self.spec.bias
        return (weight,) if bias is None else (weight, bias)

    def read_by_address(self) -> tuple[Tensor | None, ...]:
        return (self.spec.bias,)  # the weight is copied at each call

    def read_again(self) -> tuple[Tensor | None, ...]:
        return (self.spec.weight,)

    def forward(self, tape: Tape) -> None:
        x, y, spec = tape.value(self.x), tape.value(self.out), self.spec

        def conv(f: Binder) -> Call:
            plan = f.plan(self)
            f.before.append(lambda _: plan.refresh(spec.by_output(spec.weight)))
            if tape.has_backward:  # now: the weights may change before the backward pass
                f.before.append(lambda _: plan.refresh(spec.by_output(spec.weight), True))
            more: dict[str, Any] = {"bias": spec.bias}
            if self.norm is not None and self.norm.of_batch:
                shift = self.norm.module.running_mean
                more |= {"statistics": True, "shift": shift, "sums": self.norm.sums(f)}
            return f.backend.bind(f.backend.conv, plan, f.buffer(x), f.buffer(y), **more)

        tape.do(self, conv, x, y)

    def backward(self, tape: Tape) -> None:
        dy = tape.grad(self.out)
        if tape.takes(self.spec.weight):
            x = tape.value_in_backward(self.x)
            tape.do(self, lambda f: self._weight_grad(f, f.buffer(x), f.buffer(dy)), x, dy)
        if tape.takes(self.spec.bias):
            tape.do(self, lambda f: self._bias_grad(f, f.buffer(dy)), dy)
        if tape.needs(self.x):
            accumulate, dx = tape.has_grad(self.x), tape.grad(self.x)
            tape.do(
                self,
                lambda f: f.backend.bind(
                    f.backend.conv_input_grad,
                    f.plan(self),
                    f.buffer(dy),
                    f.buffer(dx),
                    accumulate=accumulate,
                ),
                dy,
                dx,
            )

    def _weight_grad(self, f: Binder, x: Buffer, dy: Buffer) -> WeightGradCall:
        # The result starts at zero. A layer that is used twice adds to it twice.
        call = f.backend.weight_grad_call(f.plan(self), x, dy, accumulate=True)
        f.targets.append((call, self.spec))
        return call

    def _bias_grad(self, f: Binder, dy: Buffer) -> Call:
        bias = self.spec.bias
        assert bias is not None
        sums = torch.zeros(dy.shape.channels, dtype=torch.float64, device="cpu")
        f.after.append(lambda frame: frame.results[id(bias)].add_(sums))
        return f.backend.bind(f.backend.channel_sums, dy, sums=sums)


@dataclass(eq=False)
class Norm:
    """A BatchNorm over ``y``: a part of ``Normalise``.

    Args:
        module: The module.
        y: What is normalized.
        has_sums: The convolution before it computes the sums of the batch.

    """

    module: nn.BatchNorm2d | NormCall
    y: Value
    has_sums: bool = False

    @property
    def of_batch(self) -> bool:
        """Whether the statistics are those of the batch."""
        if isinstance(self.module, NormCall):
            return self.module.of_batch
        return self.module.training or self.module.running_mean is None

    def fold(self, f: Binder) -> Fold:
        """Return its scale, offset and gradients in this frame."""
        return f.once(self, lambda: Fold(self.y.channels, self.y.dtype))

    def sums(self, f: Binder) -> Tensor:
        """Return float64 ``[2, channels]``, the sums of its batch, in this frame."""
        return _sums(f, (self, "sums"), 2, self.y)

    def write_fold(self, tape: Tape, op: Op, other: Norm | None) -> None:
        """Append the instructions that compute its scale and its offset.

        Args:
            tape: The tape.
            op: The operation that this is a part of.
            other: A BatchNorm whose offset is added to this one's.

        """
        y, module = tape.value(self.y), self.module
        settings: dict[str, Any] = {
            "weight": module.weight,
            "bias": module.bias,
            "running_mean": module.running_mean,
            "running_var": module.running_var,
            "eps": module.eps,
        }
        if self.of_batch:
            settings |= {"shift": module.running_mean, "momentum": module.momentum}
            settings["batches"] = module.num_batches_tracked
        if self.of_batch and not self.has_sums:
            tape.do(
                op,
                lambda f: f.backend.bind(
                    f.backend.statistics,
                    f.buffer(y),
                    shift=module.running_mean,
                    sums=self.sums(f),
                ),
                y,
            )

        def fold(f: Binder) -> Call:
            more: dict[str, Any] = {"sums": self.sums(f)} if self.of_batch else {}
            before = None if other is None else other.fold(f)
            return f.backend.bind(
                f.backend.norm_fold, self.fold(f), f.buffer(y), other=before, **more, **settings
            )

        tape.do(op, fold, y, alone=True)

    def unfold(self, f: Binder, y: Buffer, sums: Tensor, second: bool) -> Call:
        """Return the call that computes its gradients and the coefficients of ``norm_grad``."""
        module, fold = self.module, self.fold(f)
        for param, grad in ((module.weight, fold.weight_grad), (module.bias, fold.bias_grad)):
            if param is not None:
                f.after.append(partial(_add_result, param=param, grad=grad))
        return f.backend.bind(
            f.backend.norm_unfold,
            fold,
            y,
            sums,
            second=second,
            training=self.of_batch,
            weight=module.weight,
        )


def _sums(f: Binder, key: object, rows: int, value: Value) -> Tensor:
    """Return float64 ``[rows, channels]`` that belongs to this key in this frame."""
    shape = (rows, value.channels)
    return f.once(key, lambda: torch.zeros(shape, dtype=torch.float64, device="cpu"))


def _add_result(f: Binder, param: Tensor, grad: Tensor) -> None:
    if id(param) in f.results:
        f.results[id(param)] += grad


@dataclass(eq=False)
class Normalise(Op):
    """``out = f(norm(y) [+ second(y2)] [+ residual])``, where f is ReLU or nothing.

    Args:
        norm, second: The BatchNorms of ``y`` and of ``y2``.
        out: The output.
        residual: Another value that is added.
        relu: A ReLU follows.

    """

    norm: Norm
    out: Value
    second: Norm | None = None
    residual: Value | None = None
    relu: bool = False

    @property
    def norms(self) -> tuple[Norm, ...]:
        """One or two."""
        return (self.norm,) if self.second is None else (self.norm, self.second)

    @property
    def reads(self) -> tuple[Value, ...]:
        rest = () if self.residual is None else (self.residual,)
        return (*(norm.y for norm in self.norms), *rest)

    def params(self) -> tuple[Tensor, ...]:
        return tuple(
            p for n in self.norms for p in (n.module.weight, n.module.bias) if p is not None
        )

    def read_by_address(self) -> tuple[Tensor | None, ...]:
        names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return tuple(getattr(norm.module, name) for norm in self.norms for name in names)

    def read_again(self) -> tuple[Tensor | None, ...]:
        return tuple(norm.module.weight for norm in self.norms)

    def settings(self) -> Hashable:
        return tuple((n.of_batch, n.module.momentum, n.module.eps) for n in self.norms)

    @property
    def _is_simple(self) -> bool:
        """Whether ``out`` depends on ``y`` alone."""
        return self.second is None and self.residual is None

    def forward(self, tape: Tape) -> None:
        self.norm.write_fold(tape, self, None)
        if self.second is not None:
            self.second.write_fold(tape, self, self.norm)
        self._apply(tape, tape.value(self.out))

    def recompute(self, tape: Tape) -> Slot:
        # The backward pass reads `y` anyway. A multiply-add and a ReLU cost less than to write the
        # result to memory and to read it again, and half of the memory is saved.
        if not self._is_simple:
            return super().recompute(tape)
        out = tape.new(self.out, self.out.halo)
        self._apply(tape, out)
        return out

    def _apply(self, tape: Tape, out: Slot) -> None:
        slots = {"y": tape.value(self.norm.y), "out": out}
        if self.second is not None:
            slots["y2"] = tape.value(self.second.y)
        if self.residual is not None:
            slots["residual"] = tape.value(self.residual)

        def bind(f: Binder) -> Call:
            buffers = {name: f.buffer(slot) for name, slot in slots.items()}
            y, out = buffers.pop("y"), buffers.pop("out")
            first, last = self.norm.fold(f), self.norms[-1].fold(f)
            more: dict[str, Any] = dict(buffers)
            if self.second is not None:
                more["scale2"] = last.scale
            return f.backend.bind(
                f.backend.norm, y, first.scale, last.offset, out, relu=self.relu, **more
            )

        tape.do(self, bind, *slots.values())

    def backward(self, tape: Tape) -> None:
        grad, y = tape.grad(self.out), tape.value(self.norm.y)
        y2 = None if self.second is None else tape.value(self.second.y)
        # The residual receives the masked gradient unchanged, so `norm_reduce` stores it in place
        # of the gradient of `out`.
        store = self.residual is not None and tape.needs(self.residual) and self.relu
        # The ReLU's mask is read from `out`. If `out` depends on `y` alone, the mask is recomputed
        # from `y`, which is read anyway.
        out = tape.value(self.out) if self.relu and not self._is_simple else None
        used = [s for s in (grad, out, y, y2) if s is not None]

        def mask(f: Binder) -> dict[str, Any]:
            fold = self.norm.fold(f)
            if self.relu and self._is_simple:
                return {"scale": fold.scale, "offset": fold.offset}
            return {"out": _optional(f, out)}

        def sums_in(f: Binder) -> Tensor:
            return _sums(f, self, 3, self.out)

        def reduce(f: Binder) -> Call:
            return f.backend.bind(
                f.backend.norm_reduce,
                f.buffer(grad),
                f.buffer(y),
                self.norm.fold(f).mean,
                y2=_optional(f, y2),
                mean2=None if self.second is None else self.second.fold(f).mean,
                dz=f.buffer(grad) if store else None,
                sums=sums_in(f),
                **mask(f),
            )

        tape.do(self, reduce, *used)
        tape.do(self, lambda f: self.norm.unfold(f, f.buffer(y), sums_in(f), False), y, alone=True)
        if self.second is not None and y2 is not None:
            second = self.second
            tape.do(
                self, lambda f: second.unfold(f, f.buffer(y2), sums_in(f), True), y2, alone=True
            )

        dy, give_y = _share(tape, self, self.norm.y)
        dy2, give_y2 = (None, None) if self.second is None else _share(tape, self, self.second.y)

        def apply(f: Binder) -> Call:
            fold = self.norm.fold(f)
            more: dict[str, Any] = {}
            if self.second is not None and y2 is not None and dy2 is not None:
                other = self.second.fold(f)
                more = {"y2": f.buffer(y2), "dy2": f.buffer(dy2)}
                more |= {"a2": other.a, "b2": other.b, "c2": other.c}
            return f.backend.bind(
                f.backend.norm_grad,
                f.buffer(grad),
                f.buffer(y),
                fold.a,
                fold.b,
                fold.c,
                f.buffer(dy),
                **({} if store else mask(f)),
                **more,
            )

        tape.do(self, apply, *used, dy, *(() if dy2 is None else (dy2,)))
        give_y()
        if give_y2 is not None:
            give_y2()
        if self.residual is not None and tape.needs(self.residual):
            tape.give(self, tape.release(self.out), self.residual)


def _optional(f: Binder, slot: Slot | None) -> Buffer | None:
    return None if slot is None else f.buffer(slot)


def _share(tape: Tape, op: Op, value: Value) -> tuple[Slot, Callable[[], None]]:
    """Return a slot for a share of a value's gradient, and a function that then adds the share.

    The first share is written in place.
    """
    if not tape.has_grad(value):
        return tape.grad(value), lambda: None
    share = tape.new(value, value.grad_halo)
    return share, lambda: tape.give(op, share, value)


@dataclass(eq=False)
class LayerNorm(Op):
    """A LayerNorm or RMSNorm over the channels of each token."""

    spec: LayerNormSpec
    x: Value
    out: Value

    def __post_init__(self) -> None:
        x = self.x
        self._stats = Value(2, x.height, x.width, x.tokens, x.dtype)

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.x,)

    def params(self) -> tuple[Tensor, ...]:
        return tuple(p for p in (self.spec.weight, self.spec.bias) if p is not None)

    def read_by_address(self) -> tuple[Tensor | None, ...]:
        return self.params()

    def read_again(self) -> tuple[Tensor | None, ...]:
        return self.params()

    def settings(self) -> Hashable:
        return self.spec.eps

    def forward(self, tape: Tape) -> None:
        self._apply(tape, tape.value(self.x), tape.value(self.out), known=False)

    def recompute(self, tape: Tape) -> Slot:
        # The statistics are kept, two numbers per token. The backward pass reads `x` anyway.
        x, out = tape.value_in_backward(self.x), tape.new(self.out, self.out.halo)
        self._apply(tape, x, out, known=True)
        return out

    def _apply(self, tape: Tape, x: Slot, out: Slot, known: bool) -> None:
        stats, spec = tape.value(self._stats), self.spec

        def bind(f: Binder) -> Call:
            return f.backend.bind(
                f.backend.layer_norm,
                f.buffer(x),
                f.buffer(stats),
                f.buffer(out),
                weight=spec.weight,
                bias=spec.bias,
                eps=spec.eps,
                centered=spec.centered,
                known=known,
            )

        tape.do(self, bind, x, stats, out)

    def backward(self, tape: Tape) -> None:
        grad, x, stats = (
            tape.grad(self.out),
            tape.value_in_backward(self.x),
            tape.value(self._stats),
        )
        takes = [tape.takes(p) for p in (self.spec.bias, self.spec.weight)]
        accumulate = tape.has_grad(self.x)
        dx = tape.grad(self.x) if tape.needs(self.x) else None

        def bind(f: Binder) -> Call:
            more: dict[str, Any] = {"sums": _sums(f, self, 2, self.out)} if any(takes) else {}
            if more:
                for param, total in zip(
                    (self.spec.bias, self.spec.weight), more["sums"], strict=True
                ):
                    if param is not None:
                        f.after.append(partial(_add_result, param=param, grad=total))
            return f.backend.bind(
                f.backend.layer_norm_grad,
                f.buffer(grad),
                f.buffer(x),
                f.buffer(stats),
                _optional(f, dx),
                weight=self.spec.weight,
                centered=self.spec.centered,
                accumulate=accumulate,
                **more,
            )

        tape.do(self, bind, grad, x, stats, *(() if dx is None else (dx,)))


# --- between layers -------------------------------------------------------------------------------


@dataclass(eq=False)
class Relu(Op):
    """A ReLU that is not part of a ``Normalise``."""

    x: Value
    out: Value

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.x,)

    def forward(self, tape: Tape) -> None:
        x, out = tape.value(self.x), tape.value(self.out)
        _pointwise(tape, self, "relu", x, out=out)

    def backward(self, tape: Tape) -> None:
        grad, out = tape.grad(self.out), tape.value(self.out)
        dx, give = _share(tape, self, self.x)
        _pointwise(tape, self, "relu_grad", grad, out, out=dx)
        give()


@dataclass(eq=False)
class _OfTwo(Op):
    """An operation on two tensors of one shape, element by element."""

    x: Value
    y: Value
    out: Value
    kernel: ClassVar[Pointwise]

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.x, self.y)

    def forward(self, tape: Tape) -> None:
        x, y, out = (tape.value(v) for v in (self.x, self.y, self.out))
        _pointwise(tape, self, self.kernel, x, y, out=out)


class Add(_OfTwo):
    """A sum."""

    kernel = "add"

    def backward(self, tape: Tape) -> None:
        grad = tape.release(self.out)
        needed = [value for value in (self.x, self.y) if tape.needs(value)]
        # Copies come first: the last share may take over the memory of `grad`, and then add to it.
        for value in needed[:-1]:
            if not tape.has_grad(value):
                tape.copy(self, grad, tape.grad(value))
            else:
                tape.give(self, grad, value)
        tape.give(self, grad, needed[-1])


class Mul(_OfTwo):
    """A product."""

    kernel = "mul"

    def backward(self, tape: Tape) -> None:
        grad = tape.grad(self.out)
        for value, other in ((self.x, self.y), (self.y, self.x)):
            if tape.needs(value):
                factor = tape.value_in_backward(other)
                share, give = _share(tape, self, value)
                _pointwise(tape, self, "mul", grad, factor, out=share)
                give()


@dataclass(eq=False)
class Concat(Op):
    """Tensors side by side: their channels one after the other."""

    parts: tuple[Value, ...]
    out: Value

    @property
    def reads(self) -> tuple[Value, ...]:
        return self.parts

    def _places(self) -> list[tuple[Value, int]]:
        """Return each part with the number of its first channel."""
        ends = accumulate(part.channels for part in self.parts)
        return [(part, end - part.channels) for part, end in zip(self.parts, ends, strict=True)]

    def forward(self, tape: Tape) -> None:
        self._fill(tape, tape.value(self.out), tape.value)

    def recompute(self, tape: Tape) -> Slot:
        # The parts are kept anyway. A copy takes less time than BatchNorm's pass over it.
        out = tape.new(self.out, self.out.halo)
        self._fill(tape, out, tape.value_in_backward)
        return out

    def _fill(self, tape: Tape, out: Slot, slot_of: Callable[[Value], Slot]) -> None:
        for part, first in self._places():
            source, count = slot_of(part), part.channels

            def copy(
                f: Binder, source: Slot = source, first: int = first, count: int = count
            ) -> Call:
                into = f.buffer(out).part(first, count)
                return f.backend.bind(f.backend.pointwise, "copy", f.buffer(source), out=into)

            tape.do(self, copy, source, out)

    def backward(self, tape: Tape) -> None:
        grad = tape.grad(self.out)
        for part, first in self._places():
            if not tape.needs(part):
                continue
            adds, into, count = tape.has_grad(part), tape.grad(part), part.channels

            def give(
                f: Binder,
                adds: bool = adds,
                into: Slot = into,
                first: int = first,
                count: int = count,
            ) -> Call:
                share, to, b = f.buffer(grad).part(first, count), f.buffer(into), f.backend
                if adds:
                    return b.bind(b.pointwise, "add", to, share, out=to)
                return b.bind(b.pointwise, "copy", share, out=to)

            tape.do(self, give, grad, into)


@dataclass(eq=False)
class Gate(Op):
    """A product of an image and an image of one pixel: squeeze-and-excitation."""

    x: Value
    gate: Value
    out: Value

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.x, self.gate)

    def forward(self, tape: Tape) -> None:
        x, gate, out = (tape.value(v) for v in (self.x, self.gate, self.out))
        self._scale(tape, x, gate, out)

    def recompute(self, tape: Tape) -> Slot:
        # The backward pass reads `x` anyway, and the gate is small.
        x, gate = tape.value_in_backward(self.x), tape.value_in_backward(self.gate)
        out = tape.new(self.out, self.out.halo)
        self._scale(tape, x, gate, out)
        return out

    def _scale(self, tape: Tape, x: Slot, gate: Slot, out: Slot) -> None:
        tape.do(
            self,
            lambda f: f.backend.bind(f.backend.gate, *map(f.buffer, (x, gate, out))),
            x,
            gate,
            out,
        )

    def backward(self, tape: Tape) -> None:
        grad = tape.grad(self.out)
        if tape.needs(self.gate):
            x = tape.value_in_backward(self.x)
            dgate, give = _share(tape, self, self.gate)
            tape.do(
                self,
                lambda f: f.backend.bind(f.backend.gate_grad, *map(f.buffer, (grad, x, dgate))),
                grad,
                x,
                dgate,
            )
            give()
        if tape.needs(self.x):
            dx, give = _share(tape, self, self.x)
            self._scale(tape, grad, tape.value_in_backward(self.gate), dx)
            give()


@dataclass(eq=False)
class Dropout(Op):
    """A dropout in training. Its mask is drawn before the first instruction.

    Args:
        spec: It holds the probability of a zero.
        x, out: Its input and its output.
        mask: Zeros, and ``1 / (1 - p)`` where a number is kept.
        last: PyTorch would hold ``x`` with channels last. Otherwise it lies as the first input of
            the segment.

    """

    spec: DropoutSpec
    x: Value
    out: Value
    mask: Value
    last: bool

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.x,)

    def forward(self, tape: Tape) -> None:
        x, mask, out = tape.value(self.x), tape.filled_before(self.mask), tape.value(self.out)

        def bind(f: Binder) -> Call:
            f.before.append(partial(self._draw, mask=f.buffer(mask)))
            return f.backend.bind(
                f.backend.pointwise, "mul", f.buffer(x), f.buffer(mask), out=f.buffer(out)
            )

        tape.do(self, bind, x, mask, out)

    def _draw(self, f: Binder, mask: Buffer) -> None:
        """Draw the numbers that ``torch.nn.functional.dropout`` draws."""
        s = mask.shape
        size = (s.samples, s.channels) if s.tokens else (s.samples, s.channels, s.height, s.width)
        lies = torch.channels_last if self.last else f.memory_format
        lies = torch.contiguous_format if s.tokens else lies
        noise = torch.empty(size, dtype=s.dtype, device="cpu", memory_format=lies)
        f.backend.to_layout(draw(noise, self.spec.p), mask)

    def recompute(self, tape: Tape) -> Slot:
        x, out = tape.value_in_backward(self.x), tape.new(self.out, self.out.halo)
        _pointwise(tape, self, "mul", x, tape.value(self.mask), out=out)
        return out

    def backward(self, tape: Tape) -> None:
        grad, mask = tape.grad(self.out), tape.value(self.mask)
        dx, give = _share(tape, self, self.x)
        _pointwise(tape, self, "mul", grad, mask, out=dx)
        give()


@dataclass(eq=False)
class Pool(Op):
    """Max or average pooling."""

    spec: PoolSpec
    x: Value
    out: Value

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.x,)

    def _settings(self) -> dict[str, Any]:
        spec = self.spec
        settings: dict[str, Any] = {
            "window": spec.window or (self.x.height, self.x.width),
            "stride": spec.stride,
            "padding": spec.padding,
        }
        return settings if spec.kind == "max" else settings | {"count_padding": spec.count_padding}

    def forward(self, tape: Tape) -> None:
        x, out = tape.value(self.x), tape.value(self.out)
        settings = self._settings()

        def pool(f: Binder) -> Call:
            kernel = f.backend.max_pool if self.spec.kind == "max" else f.backend.avg_pool
            return f.backend.bind(kernel, f.buffer(x), f.buffer(out), **settings)

        tape.do(self, pool, x, out)

    def backward(self, tape: Tape) -> None:
        grad = tape.grad(self.out)
        x, out = tape.value(self.x), tape.value(self.out)
        dx, give = _share(tape, self, self.x)
        settings = self._settings()

        def pool_grad(f: Binder) -> Call:
            b, dy, to = f.backend, f.buffer(grad), f.buffer(dx)
            if self.spec.kind == "max":
                return b.bind(b.max_pool_grad, f.buffer(x), f.buffer(out), dy, to, **settings)
            return b.bind(b.avg_pool_grad, dy, to, **settings)

        tape.do(self, pool_grad, *((x, out) if self.spec.kind == "max" else ()), grad, dx)
        give()


@dataclass(eq=False)
class Activation(Op):
    """A GELU, SiLU or the like: its gradient follows from its input."""

    spec: ActivationSpec
    x: Value
    out: Value

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.x,)

    def forward(self, tape: Tape) -> None:
        _pointwise(tape, self, self.spec.kernel, tape.value(self.x), out=tape.value(self.out))

    def recompute(self, tape: Tape) -> Slot:
        # An exponential costs more than a multiply-add. But the backward pass reads `x` anyway, and
        # half of the memory is saved.
        x, out = tape.value_in_backward(self.x), tape.new(self.out, self.out.halo)
        _pointwise(tape, self, self.spec.kernel, x, out=out)
        return out

    def backward(self, tape: Tape) -> None:
        grad, x = tape.release(self.out), tape.value_in_backward(self.x)
        in_place = grad.halo == self.x.grad_halo
        dx, give = (grad, None) if in_place else _share(tape, self, self.x)
        _pointwise(tape, self, _GRADIENTS[self.spec.kernel], grad, x, out=dx)
        if give is None:
            tape.give(self, grad, self.x)
        else:
            give()


_GRADIENTS: dict[str, Pointwise] = {
    "gelu": "gelu_grad",
    "gelu_tanh": "gelu_tanh_grad",
    "silu": "silu_grad",
    "sigmoid": "sigmoid_grad",
    "relu6": "relu6_grad",
    "hardsigmoid": "hardsigmoid_grad",
    "hardswish": "hardswish_grad",
}


def _pointwise(tape: Tape, op: Op, kernel: Pointwise, *inputs: Slot, out: Slot) -> None:
    """Append an instruction that runs a pointwise kernel."""

    def bind(f: Binder) -> Call:
        buffers = map(f.buffer, inputs)
        return f.backend.bind(f.backend.pointwise, kernel, *buffers, out=f.buffer(out))

    tape.do(op, bind, *inputs, out)
