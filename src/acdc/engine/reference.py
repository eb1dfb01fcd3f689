"""The kernels in plain PyTorch, on the same buffers.

They run where there is no compiler, and the tests compare the compiled kernels with them. They are
slow, and written to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from acdc.engine.contract import Call, Fold, KernelPlan, Kernels, P, Pointwise, Step, Strides
from acdc.engine.geometry import ConvGeometry, Size2
from acdc.engine.layout import Buffer, Shape
from acdc.engine.tile import Tiling
from acdc.errors import InputError


class ReferencePlan(KernelPlan):
    """One layer's support and, after ``refresh``, its masked dense weight."""

    def __init__(
        self,
        geometry: ConvGeometry,
        support: Tensor,
        x: Shape,
        dy: Shape,
        strides: Strides | None = None,
    ) -> None:
        super().__init__(geometry, support, x, dy, strides)
        self.support = support.clone()
        self.weight = torch.zeros(geometry.weight_shape, dtype=x.dtype, device="cpu")

    def refresh(self, weight: Tensor, input_grad: bool = False) -> None:
        flat = weight.detach().reshape(-1)
        self.weight.view(-1)[self.support] = flat[self.support]


def _reference(plan: KernelPlan) -> ReferencePlan:
    if not isinstance(plan, ReferencePlan):
        raise InputError(f"A {type(plan).__name__} is not a plan of the reference kernels.")
    return plan


class _WeightGradCall:
    """The weight gradient of a layer; ``into`` sets where it is written."""

    scratch = 0

    def __init__(self, call: Callable[[Tensor], None]) -> None:
        self.call = call

    def into(self, grad: Tensor, scratch: Tensor, *, whole: bool = False) -> None:
        """Write to this tensor from now on."""
        self.grad, self.whole = grad, whole

    def __call__(self) -> None:
        if self.whole:
            self.grad.zero_()
        self.call(self.grad)


class Reference(Kernels):
    """The kernels in plain PyTorch.

    Args:
        lanes: How many samples a block has.

    """

    isa = "reference"
    by_block = False

    def __init__(self, lanes: int = 8) -> None:
        self.lanes = lanes

    def plan(
        self,
        geometry: ConvGeometry,
        support: Tensor,
        x: Shape,
        dy: Shape,
        *,
        strides: Strides | None = None,
        tiling: Tiling | None = None,
    ) -> ReferencePlan:
        return ReferencePlan(geometry, support, x, dy, strides)

    def bind(self, kernel: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> Call:
        return partial(kernel, *args, **kwargs)

    def sequence(self, steps: Sequence[Step], blocks: int) -> list[Call]:
        return [step.call for step in steps]

    def weight_grad_call(
        self, plan: KernelPlan, x: Buffer, dy: Buffer, *, accumulate: bool = False
    ) -> _WeightGradCall:
        return _WeightGradCall(partial(self.conv_weight_grad, plan, x, dy, accumulate=accumulate))

    def to_layout(self, plain: Tensor, out: Buffer) -> Buffer:
        s = out.shape
        if s.tokens:
            padded = plain.detach().new_zeros(s.blocks * s.per_block, s.channels)
            padded[: s.samples] = plain.detach()
            lanes = padded.view(s.blocks, s.width, s.lanes, s.channels)
            out.pixels().copy_(lanes.permute(0, 3, 1, 2).unsqueeze(2))
            return out
        padded = plain.detach().new_zeros(s.blocks * s.lanes, s.channels, s.height, s.width)
        padded[: s.samples] = plain.detach()
        blocks = padded.view(s.blocks, s.lanes, s.channels, s.height, s.width)
        out.pixels().copy_(blocks.permute(0, 2, 3, 4, 1))
        return out

    def from_layout(self, buffer: Buffer, out: Tensor | None = None) -> Tensor:
        s = buffer.shape
        if s.tokens:
            tokens = buffer.pixels().squeeze(2).permute(0, 2, 3, 1)
            plain = tokens.reshape(s.blocks * s.per_block, s.channels)[: s.samples]
        else:
            images = buffer.pixels().permute(0, 4, 1, 2, 3)
            plain = images.reshape(s.blocks * s.lanes, s.channels, s.height, s.width)[: s.samples]
        return plain.contiguous() if out is None else out.copy_(plain)

    def conv(
        self,
        plan: KernelPlan,
        x: Buffer,
        y: Buffer,
        *,
        bias: Tensor | None = None,
        accumulate: bool = False,
        statistics: bool = False,
        shift: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> Tensor | None:
        if accumulate and bias is not None:
            raise InputError(
                "A convolution that adds to its output has no bias: leave out bias or accumulate."
            )
        plan = _reference(plan)
        g = plan.geometry
        out = F.conv2d(self._nchw(x), plan.weight, bias, g.stride, g.padding, g.dilation, g.groups)
        self._put(out + self._nchw(y) if accumulate else out, y)
        return self.statistics(y, shift=shift, sums=sums) if statistics else None

    def conv_input_grad(
        self, plan: KernelPlan, dy: Buffer, dx: Buffer, *, accumulate: bool = False
    ) -> None:
        grad = self._backward(plan, dy, torch.empty_like(self._nchw(dx)), (True, False, False))[0]
        self._put(grad + self._nchw(dx) if accumulate else grad, dx)

    def conv_weight_grad(
        self, plan: KernelPlan, x: Buffer, dy: Buffer, grad: Tensor, *, accumulate: bool = False
    ) -> None:
        plan = _reference(plan)
        values = self._backward(plan, dy, self._nchw(x), (False, True, False))[1].reshape(-1)[
            plan.support
        ]
        flat = grad.reshape(-1)  # a copy, unless grad is contiguous
        flat[plan.support] = flat[plan.support] + values if accumulate else values
        if flat.data_ptr() != grad.data_ptr():
            grad.copy_(flat.view(grad.shape))

    def channel_sums(self, x: Buffer, *, sums: Tensor | None = None) -> Tensor:
        return _into(sums, self._nchw(x).double().sum((0, 2, 3)))

    def statistics(
        self, x: Buffer, *, shift: Tensor | None = None, sums: Tensor | None = None
    ) -> Tensor:
        d = self._nchw(x).double()
        if shift is not None:
            d = d - shift.detach().double()[:, None, None]
        return _into(sums, torch.stack([d.sum((0, 2, 3)), d.square().sum((0, 2, 3))]))

    def norm_fold(
        self,
        fold: Fold,
        y: Buffer,
        *,
        sums: Tensor | None = None,
        shift: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        batches: Tensor | None = None,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        other: Fold | None = None,
    ) -> None:
        if sums is None:
            assert running_mean is not None
            assert running_var is not None
            mean, variance = running_mean.double(), running_var.double()
        else:
            count = self._nchw(y)[:, 0].numel()
            shifted = sums[0] / count
            mean = shifted if shift is None else shifted + shift.detach().double()
            variance = (sums[1] / count - shifted.square()).clamp(min=0)
            if batches is not None:
                batches += 1
            if running_mean is not None and running_var is not None:
                assert momentum is not None or batches is not None
                rate = 1 / float(batches) if momentum is None else momentum  # type: ignore[arg-type]
                running_mean.lerp_(mean.to(y.shape.dtype), rate)
                running_var.lerp_((variance * count / (count - 1)).to(y.shape.dtype), rate)
        fold.mean.copy_(mean)
        fold.inverse.copy_((variance + eps).rsqrt())
        fold.scale.copy_(fold.inverse if weight is None else weight.detach() * fold.inverse)
        fold.offset.copy_(-fold.mean * fold.scale)
        for more in (
            None if bias is None else bias.detach(),
            None if other is None else other.offset,
        ):
            if more is not None:
                fold.offset += more

    def norm_unfold(
        self,
        fold: Fold,
        y: Buffer,
        sums: Tensor,
        *,
        second: bool = False,
        training: bool = True,
        weight: Tensor | None = None,
    ) -> None:
        count = self._nchw(y)[:, 0].numel()
        fold.bias_grad.copy_(sums[0])
        fold.weight_grad.copy_(sums[2 if second else 1] * fold.inverse)
        fold.a.copy_(fold.inverse if weight is None else weight.detach() * fold.inverse)
        fold.b.zero_()
        fold.c.zero_()
        if training:
            fold.b.copy_(-fold.a * fold.weight_grad * fold.inverse / count)
            fold.c.copy_(-fold.a * fold.bias_grad / count - fold.b * fold.mean)

    def norm(
        self,
        y: Buffer,
        scale: Tensor,
        offset: Tensor,
        out: Buffer,
        *,
        relu: bool = False,
        residual: Buffer | None = None,
        y2: Buffer | None = None,
        scale2: Tensor | None = None,
    ) -> None:
        v = scale[:, None, None] * self._nchw(y) + offset[:, None, None]
        if y2 is not None and scale2 is not None:
            v = v + scale2[:, None, None] * self._nchw(y2)
        if residual is not None:
            v = v + self._nchw(residual)
        self._put(v.relu() if relu else v, out)

    def norm_reduce(
        self,
        grad: Buffer,
        y: Buffer,
        mean: Tensor,
        *,
        out: Buffer | None = None,
        scale: Tensor | None = None,
        offset: Tensor | None = None,
        y2: Buffer | None = None,
        mean2: Tensor | None = None,
        dz: Buffer | None = None,
        sums: Tensor | None = None,
    ) -> Tensor:
        d = self._passed(grad, y, out, scale, offset)
        rows = [
            d.double().sum((0, 2, 3)),
            (d * (self._nchw(y) - mean[:, None, None])).double().sum((0, 2, 3)),
        ]
        if y2 is not None and mean2 is not None:
            rows.append((d * (self._nchw(y2) - mean2[:, None, None])).double().sum((0, 2, 3)))
        else:
            rows.append(torch.zeros_like(rows[0]))
        if dz is not None:
            self._put(d, dz)
        return _into(sums, torch.stack(rows))

    def norm_grad(
        self,
        grad: Buffer,
        y: Buffer,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        dy: Buffer,
        *,
        out: Buffer | None = None,
        scale: Tensor | None = None,
        offset: Tensor | None = None,
        y2: Buffer | None = None,
        a2: Tensor | None = None,
        b2: Tensor | None = None,
        c2: Tensor | None = None,
        dy2: Buffer | None = None,
    ) -> None:

        def line(d: Tensor, v: Buffer, *abc: Tensor) -> Tensor:
            p, q, r = (t[:, None, None] for t in abc)
            return p * d + q * self._nchw(v) + r

        d = self._passed(grad, y, out, scale, offset)
        if (
            y2 is not None
            and dy2 is not None
            and a2 is not None
            and b2 is not None
            and c2 is not None
        ):
            self._put(line(d, y2, a2, b2, c2), dy2)
        self._put(line(d, y, a, b, c), dy)

    def layer_norm(
        self,
        x: Buffer,
        stats: Buffer,
        out: Buffer,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        centered: bool = True,
        known: bool = False,
    ) -> None:
        plain = self._nchw(x)
        if not known:
            mean = plain.mean(1, keepdim=True) if centered else torch.zeros_like(plain[:, :1])
            inverse = ((plain - mean).square().mean(1, keepdim=True) + eps).rsqrt()
            self._put(torch.cat([mean, inverse], 1), stats)
        normal = self._normalised(plain, stats)
        normal = normal if weight is None else normal * weight.detach()[:, None, None]
        self._put(normal if bias is None else normal + bias.detach()[:, None, None], out)

    def layer_norm_grad(
        self,
        grad: Buffer,
        x: Buffer,
        stats: Buffer,
        dx: Buffer | None,
        *,
        weight: Tensor | None = None,
        centered: bool = True,
        accumulate: bool = False,
        sums: Tensor | None = None,
    ) -> None:
        g, normal = self._nchw(grad), self._normalised(self._nchw(x), stats)
        if sums is not None:
            sums.copy_(torch.stack([t.double().sum((0, 2, 3)) for t in (g, g * normal)]))
        if dx is None:
            return
        g = g if weight is None else g * weight.detach()[:, None, None]
        d = g - normal * (g * normal).mean(1, keepdim=True)
        d = (d - g.mean(1, keepdim=True) if centered else d) * self._nchw(stats)[:, 1:]
        self._put(d + self._nchw(dx) if accumulate else d, dx)

    def _normalised(self, x: Tensor, stats: Buffer) -> Tensor:
        known = self._nchw(stats)
        return (x - known[:, :1]) * known[:, 1:]

    def gate(self, x: Buffer, gate: Buffer, out: Buffer) -> None:
        self._put(self._nchw(x) * self._nchw(gate), out)

    def gate_grad(self, grad: Buffer, x: Buffer, dgate: Buffer) -> None:
        self._put((self._nchw(grad) * self._nchw(x)).sum((2, 3), keepdim=True), dgate)

    def pointwise(self, kernel: Pointwise, *inputs: Buffer, out: Buffer) -> None:
        self._put(_POINTWISE[kernel](*map(self._nchw, inputs)), out)

    def max_pool(
        self, x: Buffer, y: Buffer, window: Size2, stride: Size2, padding: Size2 = (0, 0)
    ) -> None:
        self._put(F.max_pool2d(self._nchw(x), window, stride, padding), y)

    def max_pool_grad(
        self,
        x: Buffer,
        y: Buffer,
        dy: Buffer,
        dx: Buffer,
        window: Size2,
        stride: Size2,
        padding: Size2 = (0, 0),
    ) -> None:
        with torch.enable_grad():
            leaf = self._nchw(x).requires_grad_()
            F.max_pool2d(leaf, window, stride, padding).backward(self._nchw(dy))
        assert leaf.grad is not None
        self._put(leaf.grad, dx)

    def avg_pool(
        self,
        x: Buffer,
        y: Buffer,
        window: Size2,
        stride: Size2,
        padding: Size2 = (0, 0),
        count_padding: bool = True,
    ) -> None:
        self._put(F.avg_pool2d(self._nchw(x), window, stride, padding, False, count_padding), y)

    def avg_pool_grad(
        self,
        dy: Buffer,
        dx: Buffer,
        window: Size2,
        stride: Size2,
        padding: Size2 = (0, 0),
        count_padding: bool = True,
    ) -> None:
        with torch.enable_grad():
            leaf = self._nchw(dx).requires_grad_()
            F.avg_pool2d(leaf, window, stride, padding, False, count_padding).backward(
                self._nchw(dy)
            )
        assert leaf.grad is not None
        self._put(leaf.grad, dx)

    def _nchw(self, buffer: Buffer) -> Tensor:
        plain = self.from_layout(buffer)
        return plain[:, :, None, None] if buffer.shape.tokens else plain

    def _put(self, plain: Tensor, buffer: Buffer) -> None:
        self.to_layout(plain[:, :, 0, 0] if buffer.shape.tokens else plain, buffer)

    def _passed(
        self,
        grad: Buffer,
        y: Buffer,
        out: Buffer | None,
        scale: Tensor | None,
        offset: Tensor | None,
    ) -> Tensor:
        if scale is None or offset is None:
            return self._nchw(grad) if out is None else _masked(self._nchw(grad), self._nchw(out))
        before = scale[:, None, None] * self._nchw(y) + offset[:, None, None]
        return self._nchw(grad) * (before > 0)

    def _backward(
        self, plan: KernelPlan, dy: Buffer, x: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        plan = _reference(plan)
        g = plan.geometry
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            self._nchw(dy),
            x,
            plan.weight,
            None,
            list(g.stride),
            list(g.padding),
            list(g.dilation),
            False,
            [0, 0],
            g.groups,
            list(wanted),
        )
        return grads


def _masked(grad: Tensor, out: Tensor) -> Tensor:
    """Return the gradient where a ReLU's output is positive, and 0 elsewhere."""
    return torch.where(out > 0, grad, torch.zeros_like(grad))


_POINTWISE: dict[Pointwise, Callable[..., Tensor]] = {
    "relu": torch.relu,
    "relu_grad": _masked,
    "add": torch.add,
    "mul": torch.mul,
    "copy": torch.clone,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "relu6": F.relu6,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "gelu_grad": torch.ops.aten.gelu_backward,
    "gelu_tanh_grad": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "silu_grad": torch.ops.aten.silu_backward,
    "sigmoid_grad": lambda grad, x: torch.ops.aten.sigmoid_backward(grad, x.sigmoid()),
    "relu6_grad": lambda grad, x: torch.ops.aten.hardtanh_backward(grad, x, 0.0, 6.0),
    "hardsigmoid_grad": lambda grad, x: torch.where(x.abs() < 3, grad / 6, torch.zeros_like(grad)),
    "hardswish_grad": torch.ops.aten.hardswish_backward,
}


def _into(sums: Tensor | None, values: Tensor) -> Tensor:
    """Return the values, written into ``sums`` if there is one."""
    return values if sums is None else sums.copy_(values)
