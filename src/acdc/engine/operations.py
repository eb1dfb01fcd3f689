"""The operations of a program: each writes its way forward and its way back onto a tape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from acdc.engine.graph import ActivationSpec, ConvSpec, PoolSpec
from acdc.engine.layout import Buffer
from acdc.engine.native import Fold
from acdc.engine.tape import Binder, Call, Slot, Tape, Value


class Op(ABC):
    """What it reads, what it makes, and both ways."""

    out: Value

    @property
    @abstractmethod
    def reads(self) -> tuple[Value, ...]:
        """What goes in."""

    def params(self) -> tuple[Tensor, ...]:
        """Return the parameters that may take a gradient."""
        return ()

    @abstractmethod
    def forward(self, tape: Tape) -> None:
        """Append the instructions that make ``out``."""

    def again(self, tape: Tape) -> Slot:
        """Return the slot of ``out`` on the way back: as it was kept, or, where that costs less,
        one that is made a second time.
        """
        return tape.value(self.out)

    @abstractmethod
    def backward(self, tape: Tape) -> None:
        """Append the instructions from the gradient of ``out`` to the gradients of what it read."""


# --- layers ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class Conv(Op):
    """A sparse convolution, or a linear layer.

    Args:
        spec: The layer.
        x, out: What it reads and makes.
        norm: The BatchNorm of ``out``, whose sums are gathered on the way.

    """

    spec: ConvSpec
    x: Value
    out: Value
    norm: Norm | None = None

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.x,)

    def params(self) -> tuple[Tensor, ...]:
        module = self.spec.module
        return (module.weight,) if module.bias is None else (module.weight, module.bias)

    def forward(self, tape: Tape) -> None:
        x, y, module = tape.value(self.x), tape.value(self.out), self.spec.module

        def conv(f: Binder) -> Any:
            plan = f.plan(self)
            f.before.append(lambda: plan.refresh(module.weight))
            if tape.keeps:  # now: the weights may have moved when the gradient comes
                f.before.append(lambda: plan.refresh(module.weight, True))
            more: dict[str, Any] = {"bias": module.bias}
            if self.norm is not None and self.norm.of_batch:
                shift = self.norm.module.running_mean
                more |= {"statistics": True, "shift": shift, "sums": self.norm.sums(f)}
            return f.backend.bind("conv", plan, f.buffer(x), f.buffer(y), **more)

        tape.do(conv, x, y)

    def backward(self, tape: Tape) -> None:
        dy, module = tape.grad(self.out), self.spec.module
        if tape.takes(module.weight):
            x = tape.value_again(self.x)
            tape.do(lambda f: self._weight_grad(f, f.buffer(x), f.buffer(dy)), x, dy)
        if tape.takes(module.bias):
            tape.do(lambda f: self._bias_grad(f, f.buffer(dy)), dy)
        if tape.needs(self.x):
            accumulate, dx = tape.has_grad(self.x), tape.grad(self.x)
            tape.do(
                lambda f: f.backend.bind(
                    "conv_input_grad",
                    f.plan(self),
                    f.buffer(dy),
                    f.buffer(dx),
                    accumulate=accumulate,
                ),
                dy,
                dx,
            )

    def _weight_grad(self, f: Binder, x: Buffer, dy: Buffer) -> Call:
        weight = self.spec.module.weight
        # The result starts at zero, and a layer that is used twice adds to it twice.
        call: Call = f.backend.weight_grad_call(f.plan(self), x, dy, accumulate=True)
        f.targets.append((call, weight))
        return call

    def _bias_grad(self, f: Binder, dy: Buffer) -> Call:
        bias = self.spec.module.bias
        sums = torch.zeros(dy.shape.channels, dtype=torch.float64)
        f.after.append(lambda: f.results[id(bias)].add_(sums))
        call: Call = f.backend.bind("channel_sums", dy, sums=sums)
        return call


@dataclass(eq=False)
class Norm:
    """A BatchNorm over ``y``: a part of ``Normalise``."""

    module: nn.BatchNorm2d
    y: Value
    gathered: bool = False  # the convolution before it gathers the sums

    @property
    def of_batch(self) -> bool:
        """Whether the statistics are those of the batch."""
        return self.module.training or self.module.running_mean is None

    def fold(self, f: Binder) -> Fold:
        """Return its scale, offset and gradients in this frame."""
        made = f.numbers(self, lambda: Fold(self.y.channels, self.y.dtype))
        assert isinstance(made, Fold)
        return made

    def sums(self, f: Binder) -> Tensor:
        """Return float64 ``[2, channels]``, the sums of its batch, in this frame."""
        return _sums(f, (self, "sums"), 2, self.y)

    def write_fold(self, tape: Tape, other: Norm | None) -> None:
        """Append what makes its scale and its offset, to which that of ``other`` is added."""
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
        if self.of_batch and not self.gathered:
            tape.do(
                lambda f: f.backend.bind(
                    "statistics", f.buffer(y), shift=module.running_mean, sums=self.sums(f)
                ),
                y,
            )

        def fold(f: Binder) -> Any:
            more = {"sums": self.sums(f)} if self.of_batch else {}
            before = None if other is None else other.fold(f)
            return f.backend.bind(
                "norm_fold", self.fold(f), f.buffer(y), other=before, **more, **settings
            )

        tape.do(fold, y, alone=True)

    def unfold(self, f: Binder, y: Buffer, sums: Tensor, second: bool) -> Call:
        """Return what makes its coefficients on the way back, and its gradients."""
        module, fold = self.module, self.fold(f)
        for param, grad in ((module.weight, fold.weight_grad), (module.bias, fold.bias_grad)):
            if param is not None:
                f.after.append(partial(_add_result, f, param, grad))
        call: Call = f.backend.bind(
            "norm_unfold",
            fold,
            y,
            sums,
            second=second,
            training=self.of_batch,
            weight=module.weight,
        )
        return call


def _sums(f: Binder, owner: object, rows: int, value: Value) -> Tensor:
    """Return float64 ``[rows, channels]`` that belongs to ``owner`` in this frame."""
    made = f.numbers(owner, lambda: torch.zeros(rows, value.channels, dtype=torch.float64))
    assert isinstance(made, Tensor)
    return made


def _add_result(f: Binder, param: Tensor, grad: Tensor) -> None:
    if id(param) in f.results:
        f.results[id(param)] += grad


@dataclass(eq=False)
class Normalise(Op):
    """``out = f(norm(y) [+ second(y2)] [+ residual])``, where f is ReLU or nothing."""

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

    @property
    def _is_simple(self) -> bool:
        """Whether ``out`` follows from ``y`` alone."""
        return self.second is None and self.residual is None

    def forward(self, tape: Tape) -> None:
        self.norm.write_fold(tape, None)
        if self.second is not None:
            self.second.write_fold(tape, self.norm)
        self._apply(tape, tape.value(self.out))

    def again(self, tape: Tape) -> Slot:
        # One multiply-add and a ReLU on what the way back reads anyway: cheaper than to write the
        # result to memory and to read it back, and half of what would be kept.
        if not self._is_simple:
            return super().again(tape)
        out = tape.new(self.out, self.out.halo)
        self._apply(tape, out)
        return out

    def _apply(self, tape: Tape, out: Slot) -> None:
        slots = {"y": tape.value(self.norm.y), "out": out}
        if self.second is not None:
            slots["y2"] = tape.value(self.second.y)
        if self.residual is not None:
            slots["residual"] = tape.value(self.residual)

        def bind(f: Binder) -> Any:
            buffers = {name: f.buffer(slot) for name, slot in slots.items()}
            y, out = buffers.pop("y"), buffers.pop("out")
            first, last = self.norm.fold(f), self.norms[-1].fold(f)
            more: dict[str, Any] = dict(buffers)
            if self.second is not None:
                more["scale2"] = last.scale
            return f.backend.bind("norm", y, first.scale, last.offset, out, relu=self.relu, **more)

        tape.do(bind, *slots.values())

    def backward(self, tape: Tape) -> None:
        grad, y = tape.grad(self.out), tape.value(self.norm.y)
        y2 = None if self.second is None else tape.value(self.second.y)
        # The residual's gradient is that of the sum: stored over the gradient of `out`, once.
        store = self.residual is not None and tape.needs(self.residual) and self.relu
        # Where the ReLU passed: what went into it says so, if that was only `y`, and saves reading.
        out = tape.value(self.out) if self.relu and not self._is_simple else None
        used = [s for s in (grad, out, y, y2) if s is not None]

        def mask(f: Binder) -> dict[str, Any]:
            fold = self.norm.fold(f)
            if self.relu and self._is_simple:
                return {"scale": fold.scale, "offset": fold.offset}
            return {"out": _optional(f, out)}

        def sums_in(f: Binder) -> Tensor:
            return _sums(f, self, 3, self.out)

        def reduce(f: Binder) -> Any:
            return f.backend.bind(
                "norm_reduce",
                f.buffer(grad),
                f.buffer(y),
                self.norm.fold(f).mean,
                y2=_optional(f, y2),
                mean2=None if self.second is None else self.second.fold(f).mean,
                dz=f.buffer(grad) if store else None,
                sums=sums_in(f),
                **mask(f),
            )

        tape.do(reduce, *used)
        tape.do(lambda f: self.norm.unfold(f, f.buffer(y), sums_in(f), False), y, alone=True)
        if self.second is not None and y2 is not None:
            second = self.second
            tape.do(lambda f: second.unfold(f, f.buffer(y2), sums_in(f), True), y2, alone=True)

        dy, give_y = _target(tape, self.norm.y)
        dy2, give_y2 = (None, None) if self.second is None else _target(tape, self.second.y)

        def apply(f: Binder) -> Any:
            fold = self.norm.fold(f)
            more: dict[str, Any] = {}
            if self.second is not None and y2 is not None and dy2 is not None:
                other = self.second.fold(f)
                more = {"y2": f.buffer(y2), "dy2": f.buffer(dy2)}
                more |= {"a2": other.a, "b2": other.b, "c2": other.c}
            return f.backend.bind(
                "norm_grad",
                f.buffer(grad),
                f.buffer(y),
                fold.a,
                fold.b,
                fold.c,
                f.buffer(dy),
                **({} if store else mask(f)),
                **more,
            )

        tape.do(apply, *used, dy, *(() if dy2 is None else (dy2,)))
        give_y()
        if give_y2 is not None:
            give_y2()
        if self.residual is not None and tape.needs(self.residual):
            tape.give(tape.release(self.out), self.residual)


def _optional(f: Binder, slot: Slot | None) -> Buffer | None:
    return None if slot is None else f.buffer(slot)


def _target(tape: Tape, value: Value) -> tuple[Slot, Callable[[], None]]:
    """Return a slot to write a share of a value's gradient into, and what then adds it.

    The first share is written in place.
    """
    if not tape.has_grad(value):
        return tape.grad(value), lambda: None
    share = tape.new(value, value.grad_halo)
    return share, lambda: tape.give(share, value)


# --- between layers -------------------------------------------------------------------------------


@dataclass(eq=False)
class Relu(Op):
    """A ReLU that stands alone."""

    x: Value
    out: Value

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.x,)

    def forward(self, tape: Tape) -> None:
        x, out = tape.value(self.x), tape.value(self.out)
        tape.do(lambda f: f.backend.bind("relu", f.buffer(x), f.buffer(out)), x, out)

    def backward(self, tape: Tape) -> None:
        grad, out = tape.grad(self.out), tape.value(self.out)
        dx, give = _target(tape, self.x)
        tape.do(
            lambda f: f.backend.bind("relu_grad", f.buffer(grad), f.buffer(out), f.buffer(dx)),
            grad,
            out,
            dx,
        )
        give()


@dataclass(eq=False)
class Add(Op):
    """A sum."""

    x: Value
    y: Value
    out: Value

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.x, self.y)

    def forward(self, tape: Tape) -> None:
        x, y, out = (tape.value(v) for v in (self.x, self.y, self.out))
        tape.do(lambda f: f.backend.bind("add", f.buffer(x), f.buffer(y), f.buffer(out)), x, y, out)

    def backward(self, tape: Tape) -> None:
        grad = tape.release(self.out)
        wanted = [value for value in (self.x, self.y) if tape.needs(value)]
        # Copies first: the last one may take over the memory, and then adds to it.
        for value in wanted[:-1]:
            if not tape.has_grad(value):
                tape.copy(grad, tape.grad(value))
            else:
                tape.give(grad, value)
        tape.give(grad, wanted[-1])


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
        name, settings = f"{self.spec.kind}_pool", self._settings()
        tape.do(lambda f: f.backend.bind(name, f.buffer(x), f.buffer(out), **settings), x, out)

    def backward(self, tape: Tape) -> None:
        grad = tape.grad(self.out)
        x, out = tape.value(self.x), tape.value(self.out)
        dx, give = _target(tape, self.x)
        slots = (x, out, grad, dx) if self.spec.kind == "max" else (grad, dx)
        name, settings = f"{self.spec.kind}_pool_grad", self._settings()
        tape.do(lambda f: f.backend.bind(name, *map(f.buffer, slots), **settings), *slots)
        give()


@dataclass(eq=False)
class Activation(Op):
    """A GELU or SiLU."""

    spec: ActivationSpec
    x: Value
    out: Value

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.x,)

    def forward(self, tape: Tape) -> None:
        self._apply(tape, tape.value(self.x), tape.value(self.out))

    def again(self, tape: Tape) -> Slot:
        # An exponential is dearer than a multiply-add, but the way back reads `x` anyway, and this
        # is half of what would be kept.
        x, out = tape.value_again(self.x), tape.new(self.out, self.out.halo)
        self._apply(tape, x, out)
        return out

    def _apply(self, tape: Tape, x: Slot, out: Slot) -> None:
        name = self.spec.kernel
        tape.do(lambda f: f.backend.bind(name, f.buffer(x), f.buffer(out)), x, out)

    def backward(self, tape: Tape) -> None:
        grad, x = tape.release(self.out), tape.value_again(self.x)
        dx, give = _target(tape, self.x) if grad.halo != self.x.grad_halo else (grad, None)
        name = f"{self.spec.kernel}_grad"
        tape.do(
            lambda f: f.backend.bind(name, f.buffer(grad), f.buffer(x), f.buffer(dx)), grad, x, dx
        )
        if give is None:  # in place
            tape.give(grad, self.x)
        else:
            give()
