"""The kernels in plain PyTorch, on the same buffers: what runs where there is no compiler, and the
measure of what the native kernels must give. Slow, and written to be read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from acdc.engine.geometry import ConvGeometry, Pair
from acdc.engine.layout import Buffer, Shape
from acdc.engine.native import Fold, Strides, check_plan
from acdc.errors import InputError


class Plan:
    """One layer's support and, after ``refresh``, its masked dense weight."""

    def __init__(
        self,
        geometry: ConvGeometry,
        support: torch.Tensor,
        x: Shape,
        dy: Shape,
        strides: Strides | None = None,
    ) -> None:
        check_plan(geometry, support, x, dy, strides)
        self.geometry, self.x, self.dy = geometry, x, dy
        self.support = support.clone()
        self.nnz = support.numel()
        self.weight = torch.zeros(geometry.weight_shape, dtype=x.dtype)

    def refresh(self, weight: torch.Tensor, input_grad: bool = False) -> None:
        """Copy the values of the kept weights."""
        flat = weight.detach().reshape(-1)
        self.weight.view(-1)[self.support] = flat[self.support]


class _WeightGradCall:
    """The weight gradient of a layer, for any tensor to put it into."""

    scratch = 0

    def __init__(self, call: Callable[[torch.Tensor], None]) -> None:
        self.call = call

    def into(self, grad: torch.Tensor, _: torch.Tensor) -> None:
        """Put the gradients of the kept weights into ``grad`` from now on."""
        self.grad = grad

    def __call__(self) -> None:
        self.call(self.grad)


class Reference:
    """The functions of ``native.Native``, in the same words."""

    plan = Plan
    isa = "reference"

    def __init__(self, lanes: int = 8) -> None:
        self.lanes = lanes

    def bind(self, name: str, *args: Any, **kwargs: Any) -> Callable[[], object]:
        """Return the call of a method, to run again and again."""
        return partial(getattr(self, name), *args, **kwargs)

    def weight_grad_call(
        self, plan: Plan, x: Buffer, dy: Buffer, *, accumulate: bool = False
    ) -> _WeightGradCall:
        """Return the call of ``conv_weight_grad``, which wants to be told ``into`` which tensor."""
        return _WeightGradCall(partial(self.conv_weight_grad, plan, x, dy, accumulate=accumulate))

    def to_layout(self, plain: torch.Tensor, out: Buffer) -> Buffer:
        """Copy a plain tensor into a buffer."""
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

    def from_layout(self, buffer: Buffer, out: torch.Tensor | None = None) -> torch.Tensor:
        """Copy a buffer into a plain tensor."""
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
        plan: Plan,
        x: Buffer,
        y: Buffer,
        *,
        bias: torch.Tensor | None = None,
        accumulate: bool = False,
        statistics: bool = False,
        shift: torch.Tensor | None = None,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Compute ``y = conv(x)``, or ``y += conv(x)``; with ``statistics`` return its sums."""
        if accumulate and bias is not None:
            raise InputError(
                "A bias starts a sum; it cannot be added to one: leave out bias or accumulate."
            )
        g = plan.geometry
        out = F.conv2d(self._nchw(x), plan.weight, bias, g.stride, g.padding, g.dilation, g.groups)
        self._put(out + self._nchw(y) if accumulate else out, y)
        return self.statistics(y, shift=shift, sums=sums) if statistics else None

    def conv_input_grad(
        self, plan: Plan, dy: Buffer, dx: Buffer, *, accumulate: bool = False
    ) -> None:
        """Compute ``dx`` from ``dy``, or add it to what ``dx`` holds."""
        grad = self._backward(plan, dy, torch.empty_like(self._nchw(dx)), (True, False, False))[0]
        self._put(grad + self._nchw(dx) if accumulate else grad, dx)

    def conv_weight_grad(
        self, plan: Plan, x: Buffer, dy: Buffer, grad: torch.Tensor, *, accumulate: bool = False
    ) -> None:
        """Write (or add) the gradients of the kept weights into ``grad``."""
        values = self._backward(plan, dy, self._nchw(x), (False, True, False))[1].reshape(-1)[
            plan.support
        ]
        flat = grad.reshape(-1)  # a copy, unless grad is contiguous
        flat[plan.support] = flat[plan.support] + values if accumulate else values
        if flat.data_ptr() != grad.data_ptr():
            grad.copy_(flat.view(grad.shape))

    def channel_sums(self, x: Buffer, *, sums: torch.Tensor | None = None) -> torch.Tensor:
        """Return the sums of a buffer by channel."""
        return _into(sums, self._nchw(x).double().sum((0, 2, 3)))

    def statistics(
        self, x: Buffer, *, shift: torch.Tensor | None = None, sums: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the sums of ``x - shift`` and of its square."""
        d = self._nchw(x).double()
        if shift is not None:
            d = d - shift.detach().double()[:, None, None]
        return _into(sums, torch.stack([d.sum((0, 2, 3)), d.square().sum((0, 2, 3))]))

    def norm_fold(
        self,
        fold: Fold,
        y: Buffer,
        *,
        sums: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        running_mean: torch.Tensor | None = None,
        running_var: torch.Tensor | None = None,
        batches: torch.Tensor | None = None,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        other: Fold | None = None,
    ) -> None:
        """Fill ``fold`` for a BatchNorm over ``y``; see ``native.Native.norm_fold``."""
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
        sums: torch.Tensor,
        *,
        second: bool = False,
        training: bool = True,
        weight: torch.Tensor | None = None,
    ) -> None:
        """Fill the gradients of a fold, and the ``a, b, c`` of ``norm_grad``."""
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
        scale: torch.Tensor,
        offset: torch.Tensor,
        out: Buffer,
        *,
        relu: bool = False,
        residual: Buffer | None = None,
        y2: Buffer | None = None,
        scale2: torch.Tensor | None = None,
    ) -> None:
        """Compute ``out = f(scale*y + offset [+ scale2*y2] [+ residual])``."""
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
        mean: torch.Tensor,
        *,
        out: Buffer | None = None,
        scale: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
        y2: Buffer | None = None,
        mean2: torch.Tensor | None = None,
        dz: Buffer | None = None,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the sums of dz, of dz*(y - mean) and of dz*(y2 - mean2)."""
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
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        dy: Buffer,
        *,
        out: Buffer | None = None,
        scale: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
        y2: Buffer | None = None,
        a2: torch.Tensor | None = None,
        b2: torch.Tensor | None = None,
        c2: torch.Tensor | None = None,
        dy2: Buffer | None = None,
    ) -> None:
        """Compute ``dy = a*dz + b*y + c`` and ``dy2 = a2*dz + b2*y2 + c2``."""

        def line(d: torch.Tensor, v: Buffer, *abc: torch.Tensor) -> torch.Tensor:
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

    def relu(self, x: Buffer, out: Buffer) -> None:
        """Compute ``out = max(x, 0)``."""
        self._put(self._nchw(x).relu(), out)

    def relu_grad(self, grad: Buffer, y: Buffer, out: Buffer) -> None:
        """Compute ``out = grad`` where ``y`` is positive, and 0 elsewhere."""
        self._put(self._masked(grad, y), out)

    def add(self, x: Buffer, y: Buffer, out: Buffer) -> None:
        """Compute ``out = x + y``."""
        self._put(self._nchw(x) + self._nchw(y), out)

    def gelu(self, x: Buffer, out: Buffer) -> None:
        """Compute ``out = gelu(x)``."""
        self._put(F.gelu(self._nchw(x)), out)

    def gelu_grad(self, grad: Buffer, x: Buffer, out: Buffer) -> None:
        """Compute the gradient of what ``gelu`` read."""
        self._put(torch.ops.aten.gelu_backward(self._nchw(grad), self._nchw(x)), out)

    def gelu_tanh(self, x: Buffer, out: Buffer) -> None:
        """Compute ``out = gelu(x)``, approximated by tanh."""
        self._put(F.gelu(self._nchw(x), approximate="tanh"), out)

    def gelu_tanh_grad(self, grad: Buffer, x: Buffer, out: Buffer) -> None:
        """Compute the gradient of what ``gelu_tanh`` read."""
        slope, at = self._nchw(grad), self._nchw(x)
        self._put(torch.ops.aten.gelu_backward(slope, at, approximate="tanh"), out)

    def silu(self, x: Buffer, out: Buffer) -> None:
        """Compute ``out = silu(x)``."""
        self._put(F.silu(self._nchw(x)), out)

    def silu_grad(self, grad: Buffer, x: Buffer, out: Buffer) -> None:
        """Compute the gradient of what ``silu`` read."""
        self._put(torch.ops.aten.silu_backward(self._nchw(grad), self._nchw(x)), out)

    def max_pool(
        self, x: Buffer, y: Buffer, window: Pair, stride: Pair, padding: Pair = (0, 0)
    ) -> None:
        """Compute the maximum over windows."""
        self._put(F.max_pool2d(self._nchw(x), window, stride, padding), y)

    def max_pool_grad(
        self,
        x: Buffer,
        y: Buffer,
        dy: Buffer,
        dx: Buffer,
        window: Pair,
        stride: Pair,
        padding: Pair = (0, 0),
    ) -> None:
        """Give each maximum's gradient to the first pixel that equals it."""
        with torch.enable_grad():
            leaf = self._nchw(x).requires_grad_()
            F.max_pool2d(leaf, window, stride, padding).backward(self._nchw(dy))
        assert leaf.grad is not None
        self._put(leaf.grad, dx)

    def avg_pool(
        self,
        x: Buffer,
        y: Buffer,
        window: Pair,
        stride: Pair,
        padding: Pair = (0, 0),
        count_padding: bool = True,
    ) -> None:
        """Compute averages over windows."""
        self._put(F.avg_pool2d(self._nchw(x), window, stride, padding, False, count_padding), y)

    def avg_pool_grad(
        self,
        dy: Buffer,
        dx: Buffer,
        window: Pair,
        stride: Pair,
        padding: Pair = (0, 0),
        count_padding: bool = True,
    ) -> None:
        """Spread each average's gradient over its window."""
        with torch.enable_grad():
            leaf = self._nchw(dx).requires_grad_()
            F.avg_pool2d(leaf, window, stride, padding, False, count_padding).backward(
                self._nchw(dy)
            )
        assert leaf.grad is not None
        self._put(leaf.grad, dx)

    def _nchw(self, buffer: Buffer) -> torch.Tensor:
        plain = self.from_layout(buffer)
        return plain[:, :, None, None] if buffer.shape.tokens else plain

    def _put(self, plain: torch.Tensor, buffer: Buffer) -> None:
        self.to_layout(plain[:, :, 0, 0] if buffer.shape.tokens else plain, buffer)

    def _passed(
        self,
        grad: Buffer,
        y: Buffer,
        out: Buffer | None,
        scale: torch.Tensor | None,
        offset: torch.Tensor | None,
    ) -> torch.Tensor:
        if scale is None or offset is None:
            return self._masked(grad, out)
        before = scale[:, None, None] * self._nchw(y) + offset[:, None, None]
        return self._nchw(grad) * (before > 0)

    def _masked(self, grad: Buffer, out: Buffer | None) -> torch.Tensor:
        d = self._nchw(grad)
        return d if out is None else torch.where(self._nchw(out) > 0, d, torch.zeros_like(d))

    def _backward(
        self, plan: Plan, dy: Buffer, x: torch.Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        g = plan.geometry
        grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = (
            torch.ops.aten.convolution_backward(
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
        )
        return grads


def _into(sums: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    """Return the values, written into ``sums`` if there is one."""
    return values if sums is None else sums.copy_(values)
