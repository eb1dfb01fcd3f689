"""Every kernel of every instruction set of this machine, and the reference, against dense
PyTorch.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from acdc.engine import native
from acdc.engine.caches import Caches
from acdc.engine.contract import DTYPES, Fold
from acdc.engine.geometry import ConvGeometry
from acdc.engine.layout import Buffer, Shape
from acdc.engine.native import Native
from acdc.engine.reference import Reference
from acdc.engine.tile import Tiling
from acdc.errors import InputError
from support.kernel_calls import CALLED, verdict

BACKENDS = [*native.instruction_sets(), "reference"]
backends = pytest.mark.parametrize("name", BACKENDS)
# Derandomized: the same every time. 100 examples keep the file under a minute on one thread.
EXAMPLES = int(os.environ.get("ACDC_EXAMPLES", "100"))
many = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)

dtypes = st.sampled_from(DTYPES)
batches = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 61, 130]) | st.integers(1, 130)
densities = st.sampled_from([0.0, 0.05, 1.0]) | st.floats(0.0, 1.0)
empties = st.sampled_from(["nothing", "output channels", "input channels"])


def strided(t: torch.Tensor, axes: tuple[int, ...], step: int = 1) -> torch.Tensor:
    """Return the same values, with the axes in this order in memory, and gaps in the last axis."""
    wide = t.new_full([t.shape[i] * (step if i == axes[-1] else 1) for i in axes], math.nan)
    back = [axes.index(i) for i in range(t.dim())]
    return wide[..., ::step].permute(back).copy_(t)


# How a tensor [N, C, H, W] may lie in memory.
MEMORY = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "columns apart": lambda t: strided(t, (0, 1, 2, 3), 2),
    "channels_last apart": lambda t: strided(t, (0, 2, 3, 1), 2),
    "transposed images": lambda t: strided(t, (0, 1, 3, 2)),
    "samples last": lambda t: strided(t, (1, 2, 3, 0)),
    "channels first": lambda t: strided(t, (1, 0, 2, 3)),
    "a part of more channels": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
}
memories = st.sampled_from(list(MEMORY))


@pytest.fixture(scope="module", autouse=True)
def recorder():
    """Note every kernel call of the compiled code. When all tests are over, a
    kernel of the table that none of these tests called fails the run.
    """
    run = native.NativeCall.__call__

    def noting(call):
        run(call)
        CALLED.add((call.function.__name__, native._kernels.isa(call.index), call.is_double))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native.NativeCall, "__call__", noting)
        yield


@pytest.fixture(scope="module", autouse=True)
def exact_memory():
    """In the sanitized build, buffers and workspaces end where they must: no spare numbers behind
    them, where a kernel could read unseen. It is torch that aligns them there.
    """

    def zeros(shape):
        buffer = Buffer(shape, torch.zeros(shape.numel, dtype=shape.dtype))
        assert buffer.data.data_ptr() % 64 == 0
        return buffer

    def scratch(self, rows, buffer):
        count = torch.get_num_threads() * buffer.shape.channels * rows * self.lanes
        return torch.empty(count, dtype=buffer.shape.dtype)  # the call keeps it alive

    with pytest.MonkeyPatch.context() as patch:
        if native.available() and native._kernels.sanitized:
            patch.setattr(Buffer, "zeros", staticmethod(zeros))
            patch.setattr(Native, "_scratch", scratch)
        yield


def backend(name: str):
    return Reference() if name == "reference" else Native(name)


def close(
    got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, terms: torch.Tensor | None = None
) -> None:
    """Compare, relative to the largest number wanted. Where that number is a sum of ``terms`` of
    any sign, they may cancel by chance: the measure is then the usual size of such a sum.
    """
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    scale = want.abs().max().clamp(min=1e-3) if want.numel() else 1.0
    if terms is not None:
        scale = torch.maximum(scale, terms.double().norm())
    error = ((got.double() - want.double()).abs().max() / scale).item() if want.numel() else 0.0
    assert error <= limit, f"relative error {error:.2e}"


def dead_lanes_are_zero(buffer: Buffer) -> None:
    s = buffer.shape
    flat = (
        buffer.pixels().permute(0, 3, 4, 1, 2)
        if s.tokens
        else buffer.pixels().permute(0, 4, 1, 2, 3)
    )
    assert not flat.reshape(s.blocks * s.per_block, -1)[s.samples :].any()


def halo_is_zero(buffer: Buffer) -> None:
    rest = Buffer(buffer.shape, buffer.data.clone())
    rest.pixels().zero_()
    assert not rest.data.any()


@st.composite
def layers(draw):
    size = st.integers(1, 4)
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 16]))
    # 36: more than one tile of channels. 16 groups of one: depthwise.
    wide = 2 if groups == 16 else draw(st.sampled_from([6, 6, 6, 36]))
    g = ConvGeometry(
        groups * draw(st.integers(1, wide)),
        groups * draw(st.integers(1, wide)),
        (draw(size), draw(size)),
        (draw(size), draw(size)),
        (draw(st.integers(0, 3)), draw(st.integers(0, 3))),
        (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        groups,
    )
    least = [max(1, g.dilation[i] * (g.kernel[i] - 1) + 1 - 2 * g.padding[i]) for i in (0, 1)]
    height, width = (low + draw(st.integers(0, 9)) for low in least)
    return g, draw(batches), height, width


def tensors(seed, layer, dtype, density, empty):
    g, samples, height, width = layer
    torch.manual_seed(seed)
    x = torch.randn(samples, g.in_channels, height, width, dtype=dtype)
    weight = torch.randn(g.weight_shape, dtype=dtype)
    support = torch.rand(g.weight_shape) < density
    # Rows without a kept weight: of the forward pass and the weight gradient, or of the input
    # gradient.
    if empty == "output channels":
        support[seed % g.out_channels :: 3] = False
    if empty == "input channels":
        support[:, seed % support.shape[1] :: 3] = False
    grad = torch.randn(samples, g.out_channels, *g.out_size(height, width), dtype=dtype)
    return x, weight, support, grad, torch.randn(g.out_channels, dtype=dtype)


EDGES = {"layer": (ConvGeometry(5, 6, (3, 3), (2, 1), (1, 2), (1, 2)), 130, 9, 11), "seed": 0}
EDGES |= {"x_memory": "channels_last", "grad_memory": "contiguous", "weight_memory": "contiguous"}


@backends
@many
@given(
    layer=layers(),
    dtype=dtypes,
    density=densities,
    empty=empties,
    x_memory=memories,
    grad_memory=memories,
    weight_memory=memories,
    seed=st.integers(0, 99),
)
@example(dtype=torch.float32, density=0.0, empty="nothing", **EDGES)
@example(dtype=torch.float64, density=0.0, empty="nothing", **EDGES)
@example(dtype=torch.float32, density=1.0, empty="nothing", **EDGES)
def test_a_sparse_convolution_equals_the_masked_dense_one(
    name, layer, dtype, density, empty, x_memory, grad_memory, weight_memory, seed
):
    g, samples, height, width = layer
    k = backend(name)
    x, weight, support, grad, bias = tensors(seed, layer, dtype, density, empty)
    wide, masked = x.double().requires_grad_(), (weight * support).double().requires_grad_()
    want = F.conv2d(wide, masked, bias.double(), g.stride, g.padding, g.dilation, g.groups)
    want.backward(grad.double())
    x, grad = MEMORY[x_memory](x), MEMORY[grad_memory](grad)

    x_shape = Shape.of_images(x.shape, k.lanes, g.halo, dtype)
    y_shape = Shape(
        samples, g.out_channels, *want.shape[2:], k.lanes, g.grad_halo(height, width), False, dtype
    )
    plan = k.plan(g, support.reshape(-1).nonzero()[:, 0], x_shape, y_shape)
    plan.refresh(MEMORY[weight_memory](weight))
    plan.refresh(MEMORY[weight_memory](weight), True)
    x_buffer = k.to_layout(x, Buffer.zeros(x_shape))
    dy = k.to_layout(grad, Buffer.zeros(y_shape))
    y, dx = Buffer.zeros(y_shape), Buffer.zeros(x_shape)
    for buffer in (y, dx):
        buffer.pixels().fill_(7)  # a buffer that was used before holds anything

    sums = k.conv(plan, x_buffer, y, bias=bias, statistics=True, shift=bias)
    close(k.from_layout(y), want.detach(), dtype)
    shifted = want.detach() - bias.double()[:, None, None]
    close(sums, torch.stack([shifted.sum((0, 2, 3)), shifted.square().sum((0, 2, 3))]), dtype)
    k.conv(plan, x_buffer, y, accumulate=True)
    close(k.from_layout(y), 2 * want.detach() - bias.double()[:, None, None], dtype)

    k.conv_input_grad(plan, dy, dx)
    close(k.from_layout(dx), wide.grad, dtype)
    k.conv_input_grad(plan, dy, dx, accumulate=True)
    close(k.from_layout(dx), 2 * wide.grad, dtype)

    found = torch.full_like(weight, 7)
    k.conv_weight_grad(plan, x_buffer, dy, found)
    assert (found[~support] == 7).all(), "only the support is written"
    close(found * support, masked.grad * support, dtype)
    close(k.channel_sums(dy), grad.double().sum((0, 2, 3)), dtype, terms=grad[:, 0])
    for buffer in (y, dx):
        dead_lanes_are_zero(buffer)
        halo_is_zero(buffer)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [(3, 2), (1, 1)])
def test_a_plan_reads_and_writes_weights_by_their_strides(name, dtype, kernel):
    torch.manual_seed(0)
    g, k = ConvGeometry(6, 8, kernel, padding=(1, 0), groups=2), backend(name)
    x, weight = torch.randn(5, 6, 7, 7, dtype=dtype), torch.randn(g.weight_shape, dtype=dtype)
    support = torch.rand(g.weight_shape) < 0.4
    masked = (weight * support).requires_grad_()
    want = F.conv2d(x, masked, None, 1, (1, 0), 1, 2)
    grad = torch.randn_like(want)
    want.backward(grad)
    x_shape = Shape.of_images(x.shape, k.lanes, g.halo, dtype)
    y_shape = Shape.of_images(want.shape, k.lanes, g.grad_halo(7, 7), dtype)
    last = weight.to(memory_format=torch.channels_last)
    kept = support.reshape(-1).nonzero()[:, 0]
    plan = k.plan(g, kept, x_shape, y_shape, strides=last.stride())
    x_buffer, y = k.to_layout(x, Buffer.zeros(x_shape)), Buffer.zeros(y_shape)
    for values in (last, weight):  # the second has other strides, and is copied
        plan.refresh(values)
        k.conv(plan, x_buffer, y)
        close(k.from_layout(y), want.detach(), dtype)
    found = torch.full_like(last, 7)
    k.conv_weight_grad(plan, x_buffer, k.to_layout(grad, Buffer.zeros(y_shape)), found)
    assert found.stride() == last.stride()
    assert (found[~support] == 7).all(), "only the support is written"
    close(found * support, masked.grad * support, dtype)
    with pytest.raises(InputError, match="gaps or overlaps"):
        k.plan(g, kept, x_shape, y_shape, strides=(100, 1, 1, 1))
    if name != "reference" and kernel != (1, 1):
        with pytest.raises(InputError, match="plan's strides"):
            k.conv_weight_grad(plan, x_buffer, y, torch.zeros_like(weight))


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("panel", [1024, 2**20])
@pytest.mark.parametrize("kernel", [(3, 2), (1, 1)])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3)], ids=str)
def test_a_weight_gradient_with_zeros_beside_it(name, dtype, panel, kernel, order):
    """The memory may hold anything, and may lie in any order. A second call adds."""
    torch.manual_seed(0)
    g, k = ConvGeometry(48, 8, kernel, padding=(1, 0)), backend(name)
    x, weight = torch.randn(5, 48, 7, 7, dtype=dtype), torch.randn(g.weight_shape, dtype=dtype)
    support = torch.rand(g.weight_shape) < 0.3
    support[3] = False
    masked = (weight * support).requires_grad_()
    want = F.conv2d(x, masked, None, 1, (1, 0))
    grad = torch.randn_like(want)
    want.backward(grad)
    x_shape = Shape.of_images(x.shape, k.lanes, g.halo, dtype)
    y_shape = Shape.of_images(want.shape, k.lanes, g.grad_halo(7, 7), dtype)
    found = strided(torch.full_like(weight, math.nan), order)
    kept = support.reshape(-1).nonzero()[:, 0]
    plan = k.plan(g, kept, x_shape, y_shape, strides=found.stride(), tiling=Tiling(panel))
    dy = k.to_layout(grad, Buffer.zeros(y_shape))
    call = k.weight_grad_call(plan, k.to_layout(x, Buffer.zeros(x_shape)), dy, accumulate=True)
    scratch = torch.empty(call.scratch + 16, dtype=dtype)
    scratch = scratch[-scratch.data_ptr() % 64 // dtype.itemsize :]
    for times in (1, 2):
        call.into(found, scratch, whole=times == 1)
        call()
        assert not found[~support].any()
        close(found, times * masked.grad * support, dtype)


class Layer:
    """One layer on the kernels, with plain tensors at both ends. A plan serves all batch sizes."""

    def __init__(self, k, g, support, x):
        self.k, self.g = k, g
        flat = support.reshape(-1).nonzero()[:, 0]
        self.plan = k.plan(g, flat, *self.shapes(x))

    def shapes(self, x):
        """Return the shapes of the buffers of input and output, for this input."""
        lanes, g = self.k.lanes, self.g
        if x.dim() == 2:
            shape = Shape.of_tokens(*x.shape, lanes, x.dtype)
            return shape, shape.with_channels(g.out_channels)
        size, halo = g.out_size(*x.shape[2:]), g.grad_halo(*x.shape[2:])
        return (
            Shape.of_images(x.shape, lanes, g.halo, x.dtype),
            Shape(len(x), g.out_channels, *size, lanes, halo, False, x.dtype),
        )

    def forward(self, x, weight, bias=None):
        k, (x_shape, y_shape) = self.k, self.shapes(x)
        self.plan.refresh(weight)
        y = Buffer.zeros(y_shape)
        k.conv(self.plan, k.to_layout(x, Buffer.zeros(x_shape)), y, bias=bias)
        return k.from_layout(y)

    def backward(self, x, weight, grad):
        """Return the gradients of input, weight and bias."""
        k, (x_shape, y_shape) = self.k, self.shapes(x)
        self.plan.refresh(weight, True)
        x_buffer, dy = Buffer.zeros(x_shape), k.to_layout(grad, Buffer.zeros(y_shape))
        dx, dw = torch.empty_like(x), torch.zeros(weight.shape, dtype=weight.dtype)
        k.conv_weight_grad(self.plan, k.to_layout(x, x_buffer), dy, dw)
        k.conv_input_grad(self.plan, dy, x_buffer)
        return k.from_layout(x_buffer, dx), dw, k.channel_sums(dy)


class OnKernels(torch.autograd.Function):
    """The same as an autograd function, for numerical differentiation."""

    @staticmethod
    def forward(ctx, x, weight, bias, layer):
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return layer.forward(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        return *ctx.layer.backward(*ctx.saved_tensors, grad), None


def agree(layer, tensors, support, wants, want, terms):
    """Compare a layer's output and the gradients of its input, weight and bias. The gradient of a
    weight is a sum of ``terms``: of one channel of the input.
    """
    x, weight, bias = tensors
    close(layer.forward(x, weight, bias), want.detach(), x.dtype)
    grad = torch.ones((), dtype=x.dtype).expand(want.shape)  # one number, expanded
    want.backward(grad.double())
    for got, ideal, mask, sums in zip(
        layer.backward(x, weight, grad), wants, (1, support, 1), (None, terms, None), strict=True
    ):
        close(got, ideal.grad * mask, x.dtype, terms=sums)


@backends
@many
@given(
    layer=layers(),
    dtype=dtypes,
    density=densities,
    empty=empties,
    x_memory=memories,
    weight_memory=memories,
    seed=st.integers(0, 99),
)
def test_one_plan_serves_one_batch_after_another(
    name, layer, dtype, density, empty, x_memory, weight_memory, seed
):
    g = layer[0]
    x, weight, support, _, bias = tensors(seed, layer, dtype, density, empty)
    sparse = Layer(backend(name), g, support, x)
    weight = MEMORY[weight_memory](weight)
    for batch in (x, x[: seed % len(x) + 1]):
        wants = [t.double().clone().requires_grad_() for t in (batch, weight * support, bias)]
        want = F.conv2d(*wants, g.stride, g.padding, g.dilation, g.groups)
        batch = MEMORY[x_memory](batch)
        agree(sparse, (batch, weight, bias), support, wants, want, batch[:, 0])


@backends
@many
@given(
    tokens=batches,
    features=st.tuples(st.integers(1, 150), st.integers(1, 40)),
    dtype=dtypes,
    density=densities,
    empty=empties,
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
@example(130, (150, 37), torch.float32, 0.0, "nothing", False, 0)
@example(130, (150, 37), torch.float32, 1.0, "nothing", True, 0)
def test_a_sparse_linear_layer_equals_the_masked_dense_one(
    name, tokens, features, dtype, density, empty, transposed, seed
):
    g = ConvGeometry.linear(*features)
    x, weight, support, _, bias = tensors(seed, (g, tokens, 1, 1), dtype, density, empty)
    x, weight, support = x[:, :, 0, 0], weight[:, :, 0, 0], support[:, :, 0, 0]
    if transposed:
        x = strided(x, (1, 0))
    layer = Layer(backend(name), g, support, x)
    wants = [t.double().clone().requires_grad_() for t in (x, weight * support, bias)]
    agree(layer, (x, weight, bias), support, wants, F.linear(*wants), x[:, 0])
    dead_lanes_are_zero(layer.k.to_layout(x, Buffer.zeros(layer.shapes(x)[0])))


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [1, 5, 8, 19])
def test_plain_tensors_of_any_strides_survive_a_round_trip(name, dtype, samples):
    k = backend(name)
    base = torch.randn(samples, 21, 5, 11, dtype=dtype)
    for x in (
        base,
        base.to(memory_format=torch.channels_last),
        base[:, 2:19, 1:, ::2],
        base.transpose(2, 3),
    ):
        buffer = k.to_layout(x, Buffer.zeros(Shape.of_images(x.shape, k.lanes, 2, dtype)))
        assert torch.equal(k.from_layout(buffer), x)
        assert torch.equal(k.from_layout(buffer, torch.empty_like(x)), x)
        dead_lanes_are_zero(buffer)
        halo_is_zero(buffer)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [1, 6, 16, 61])
def test_batchnorm_with_relu_and_residual_equals_autograd(name, dtype, samples):
    torch.manual_seed(samples)
    k, count = backend(name), samples * 6 * 5
    shape = Shape(samples, 7, 6, 5, k.lanes, 1, False, dtype)
    y, y2, residual, grad = (torch.randn(samples, 7, 6, 5, dtype=dtype) + 0.5 for _ in range(4))
    gamma, beta, gamma2, beta2 = (torch.randn(7, dtype=dtype) for _ in range(4))
    leaves = [t.double().requires_grad_() for t in (y, y2, residual)]
    first = F.batch_norm(leaves[0], None, None, gamma.double(), beta.double(), True)
    second = F.batch_norm(leaves[1], None, None, gamma2.double(), beta2.double(), True)
    want = F.relu(first + second + leaves[2])
    want.backward(grad.double())

    def moments(t):
        d = t.double()
        return d.mean((0, 2, 3)), (d.var((0, 2, 3), correction=0) + 1e-5).rsqrt()

    (mean, inverse), (mean2, inverse2) = moments(y), moments(y2)
    scale, scale2 = gamma * inverse, gamma2 * inverse2
    offset = beta + beta2 - scale * mean - scale2 * mean2
    put = lambda t: k.to_layout(t, Buffer.zeros(shape))  # noqa: E731
    b_y, b_y2, b_residual, b_grad = put(y), put(y2), put(residual), put(grad)
    out, dz, dy, dy2 = (Buffer.zeros(shape) for _ in range(4))
    t = lambda v: v.to(dtype)  # noqa: E731
    k.norm(b_y, t(scale), t(offset), out, relu=True, residual=b_residual, y2=b_y2, scale2=t(scale2))
    close(k.from_layout(out), want.detach(), dtype)

    # The gate comes from the exact output: a sign that float rounding flips is not a kernel's
    # error.
    gate = put(want.detach().to(dtype))
    sums = k.norm_reduce(b_grad, b_y, t(mean), out=gate, y2=b_y2, mean2=t(mean2), dz=dz)
    close(k.from_layout(dz), leaves[2].grad, dtype)
    lines = []
    for scale_i, inverse_i, mean_i, projected in (
        (scale, inverse, mean, sums[1]),
        (scale2, inverse2, mean2, sums[2]),
    ):
        on_y = -scale_i * inverse_i**2 * projected / count
        lines += [t(scale_i), t(on_y), t(-scale_i * sums[0] / count - on_y * mean_i)]
    a, b, c, a2, b2, c2 = lines
    k.norm_grad(b_grad, b_y, a, b, c, dy, out=gate, y2=b_y2, a2=a2, b2=b2, c2=c2, dy2=dy2)
    close(k.from_layout(dy), leaves[0].grad, dtype)
    close(k.from_layout(dy2), leaves[1].grad, dtype)
    for buffer in (out, dz, dy, dy2):
        dead_lanes_are_zero(buffer)
        halo_is_zero(buffer)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
def test_a_batchnorm_folds_into_scale_and_offset_and_back(name, dtype, momentum, affine):
    k = backend(name)
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(5, momentum=momentum, affine=affine, dtype=dtype)
    norm.running_mean.uniform_(-1, 1)
    plain = copy.deepcopy(norm)
    shape = Shape.of_images((11, 5, 3, 4), k.lanes, dtype=dtype)
    y, out, grad, dy = (Buffer.zeros(shape) for _ in range(4))
    fold = Fold(5, dtype)
    sums2, sums3 = torch.zeros(2, 5).double(), torch.zeros(3, 5).double()
    statistics = k.bind(k.statistics, y, shift=norm.running_mean, sums=sums2)
    settings = {
        "weight": norm.weight,
        "bias": norm.bias,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
        "eps": norm.eps,
    }
    in_training = {
        "sums": sums2,
        "shift": norm.running_mean,
        "batches": norm.num_batches_tracked,
        "momentum": momentum,
    }
    training = k.bind(k.norm_fold, fold, y, **in_training, **settings)
    for _ in range(2):  # bound once, run twice: on new numbers, with new running statistics
        x = (torch.randn(11, 5, 3, 4, dtype=dtype) * 3 + 2).requires_grad_()
        want = plain(x)
        slope = torch.randn_like(want)
        want.backward(slope)
        k.to_layout(x, y)
        statistics()
        training()
        k.norm(y, fold.scale, fold.offset, out)
        close(k.from_layout(out), want.detach(), dtype)
        close(norm.running_mean, plain.running_mean, dtype)
        close(norm.running_var, plain.running_var, dtype)
        assert norm.num_batches_tracked == plain.num_batches_tracked
        k.to_layout(slope, grad)
        k.norm_reduce(grad, y, fold.mean, sums=sums3)
        k.norm_unfold(fold, y, sums3, weight=norm.weight)
        k.norm_grad(grad, y, fold.a, fold.b, fold.c, dy)
        close(k.from_layout(dy), x.grad, dtype)
        if affine:
            close(fold.weight_grad, plain.weight.grad, dtype)
            close(fold.bias_grad, plain.bias.grad, dtype)
            plain.zero_grad()

    other = Fold(5, dtype)
    other.offset.fill_(2.0)
    k.norm_fold(fold, y, other=other, **settings)
    k.norm(y, fold.scale, fold.offset, out)
    want = plain.eval()(x.detach().requires_grad_())
    close(k.from_layout(out), want.detach() + 2.0, dtype)
    k.norm_reduce(grad, y, fold.mean, sums=sums3)
    k.norm_unfold(fold, y, sums3, training=False, weight=norm.weight)
    k.norm_grad(grad, y, fold.a, fold.b, fold.c, dy)
    close(k.from_layout(dy), torch.autograd.grad(plain(x), x, slope)[0], dtype)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_and_add_equal_pytorch_and_keep_nan(name, dtype):
    k = backend(name)
    shape = Shape(5, 3, 4, 6, k.lanes, 1, False, dtype)
    x, y = torch.randn(5, 3, 4, 6, dtype=dtype), torch.randn(5, 3, 4, 6, dtype=dtype)
    x[0, 0, 0, 0], x[1, 0, 0, 0] = math.nan, math.inf
    b_x, b_y, out = (
        k.to_layout(x, Buffer.zeros(shape)),
        k.to_layout(y, Buffer.zeros(shape)),
        Buffer.zeros(shape),
    )
    k.pointwise("relu", b_x, out=out)
    torch.testing.assert_close(k.from_layout(out), x.relu(), rtol=0, atol=0, equal_nan=True)
    k.pointwise("relu_grad", b_y, out, out=out)
    assert torch.equal(k.from_layout(out), y * (x > 0))
    for kernel, want in (("add", x + y), ("mul", x * y), ("copy", x)):
        k.pointwise(kernel, *(b_x, b_y)[: 1 if kernel == "copy" else 2], out=out)
        torch.testing.assert_close(k.from_layout(out), want, rtol=0, atol=0, equal_nan=True)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "neither"])
@pytest.mark.parametrize("function", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize(
    "size", [(1, 7), (61, 7), (130, 200), (3, 7, 1, 1), (5, 66, 3, 6), (33, 7, 4, 4)]
)
def test_a_norm_over_channels_equals_autograd(name, dtype, affine, function, size):
    torch.manual_seed(0)
    k, centered, channels = backend(name), function == "LayerNorm", size[1]
    if len(size) == 2:
        shape = Shape.of_tokens(*size, k.lanes, dtype)
    else:
        shape = Shape.of_images(size, k.lanes, 1, dtype)
    x, grad = torch.randn(size, dtype=dtype) * 3 + 5, torch.randn(size, dtype=dtype)
    weight = torch.randn(channels, dtype=dtype) if "weight" in affine else None
    bias = torch.randn(channels, dtype=dtype) if "bias" in affine and centered else None
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    last = leaves[0].movedim(1, -1)
    if centered:
        want = F.layer_norm(last, (channels,), *leaves[1:], eps=0.1)
    else:
        want = F.rms_norm(last, (channels,), leaves[1], eps=0.1)
    want = want.movedim(-1, 1)
    want.backward(grad.double())

    stats, out, dx = (Buffer.zeros(s) for s in (replace(shape, channels=2, halo=0), shape, shape))
    b_x, b_grad = (k.to_layout(t, Buffer.zeros(shape)) for t in (x, grad))
    more = {"weight": weight, "bias": bias, "eps": 0.1, "centered": centered}
    for known in (False, True):
        out.pixels().fill_(7)
        k.layer_norm(b_x, stats, out, known=known, **more)
        close(k.from_layout(out), want.detach(), dtype)
        dead_lanes_are_zero(out)
        halo_is_zero(out)
    sums = torch.full((2, channels), 7.0, dtype=torch.float64)
    more = {"weight": weight, "centered": centered}
    k.layer_norm_grad(b_grad, b_x, stats, dx, sums=sums, **more)
    close(k.from_layout(dx), leaves[0].grad, dtype)
    for got, leaf in zip(sums, (leaves[2], leaves[1]), strict=True):
        if leaf is not None:
            close(got, leaf.grad, dtype, terms=leaf.new_ones(x.numel() // channels))
    k.layer_norm_grad(b_grad, b_x, stats, dx, accumulate=True, **more)
    close(k.from_layout(dx), 2 * leaves[0].grad, dtype)
    dead_lanes_are_zero(dx)
    halo_is_zero(dx)
    again = torch.zeros_like(sums)
    k.layer_norm_grad(b_grad, b_x, stats, None, sums=again, **more)
    assert torch.equal(sums, again)
    k.layer_norm_grad(b_grad, b_x, stats, b_grad, **more)  # in place
    close(k.from_layout(b_grad), leaves[0].grad, dtype)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_over_channels_keeps_its_digits_beside_a_large_mean(name, dtype):
    """The sum of squares minus the square of the mean would lose all digits here."""
    k = backend(name)
    x = (torch.randn(9, 500, dtype=torch.float64) + 3000).to(dtype)
    shape = Shape.of_tokens(9, 500, k.lanes, dtype)
    stats, out = Buffer.zeros(replace(shape, channels=2)), Buffer.zeros(shape)
    k.layer_norm(k.to_layout(x, Buffer.zeros(shape)), stats, out)
    want = F.layer_norm(x.double(), (500,))
    limit = 1e-3 if dtype == torch.float32 else 1e-10  # 3000 has a rounding error of 1e-4 in float
    assert (k.from_layout(out).double() - want).abs().max() < limit


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [1, 8, 37])
def test_a_gate_equals_the_product_of_pytorch(name, dtype, samples):
    torch.manual_seed(0)
    k = backend(name)
    leaves = [torch.randn(samples, 5, *hw, dtype=dtype).requires_grad_() for hw in ((6, 7), (1, 1))]
    want = leaves[0] * leaves[1]
    grad = torch.randn_like(want)
    want.backward(grad)
    shape = Shape.of_images(want.shape, k.lanes, 1, dtype)
    one = Shape.of_images((samples, 5, 1, 1), k.lanes, 2, dtype)
    x, gate, b_grad = (
        k.to_layout(t, Buffer.zeros(s))
        for t, s in ((leaves[0], shape), (leaves[1], one), (grad, shape))
    )
    out, dx, dgate = Buffer.zeros(shape), Buffer.zeros(shape), Buffer.zeros(one)
    k.gate(x, gate, out)
    k.gate(b_grad, gate, dx)
    k.gate_grad(b_grad, x, dgate)
    found = zip((out, dx, dgate), (want.detach(), *(t.grad for t in leaves)), strict=True)
    for got, ideal in found:
        close(k.from_layout(got), ideal, dtype)
        dead_lanes_are_zero(got)
        halo_is_zero(got)


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": F.sigmoid,
    "relu6": F.relu6,
    # PyTorch's own has the slope 1 / 6 of float in float64, too.
    "hardsigmoid": lambda x: F.relu6(x + 3) / 6,
    "hardswish": F.hardswish,
}


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", ACTIVATIONS)
def test_activations_equal_pytorch_number_by_number(name, dtype, function):
    k, kernel = backend(name), ACTIVATIONS[function]
    x = torch.cat([torch.linspace(-14, 14, 40_001), torch.tensor([0.0, -1e-30, 90.0, -90.0])])
    x = x.to(dtype)[:, None]
    leaf = x.double().requires_grad_()
    want = kernel(leaf)
    want.sum().backward()
    shape = Shape.of_tokens(len(x), 1, k.lanes, dtype)
    b_x, out, grad = k.to_layout(x, Buffer.zeros(shape)), Buffer.zeros(shape), Buffer.zeros(shape)
    k.to_layout(torch.ones_like(x), grad)
    k.pointwise(function, b_x, out=out)
    k.pointwise(f"{function}_grad", grad, b_x, out=grad)  # in place
    # Relative to the number itself, down to a tenth: below, its terms cancel. In float, so they do
    # in PyTorch's sums of one and erf or tanh, which the reference has.
    limit = 1e-12 if dtype == torch.float64 else 2e-5 if name == "reference" else 1e-6
    for got, ideal in ((out, want), (grad, leaf.grad)):
        error = (k.from_layout(got).double() - ideal.detach()).abs()
        assert (error <= limit * ideal.detach().abs().clamp(min=0.1)).all(), error.max()
        dead_lanes_are_zero(got)


@backends
def test_the_exponential_in_double_is_exact_to_the_last_digits(name):
    """Where the logistic function is small, it is the exponential itself."""
    k = backend(name)
    x = torch.cat([torch.linspace(-705, 0, 100_001), torch.tensor([-800.0])]).double()[:, None]
    shape = Shape.of_tokens(len(x), 1, k.lanes, torch.float64)
    b_x, out = k.to_layout(x, Buffer.zeros(shape)), Buffer.zeros(shape)
    k.pointwise("sigmoid", b_x, out=out)
    torch.testing.assert_close(k.from_layout(out), torch.sigmoid(x), rtol=4e-15, atol=1e-307)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", ACTIVATIONS)
def test_activations_of_nan_and_infinity_are_those_of_pytorch(name, dtype, function):
    k, kernel = backend(name), ACTIVATIONS[function]
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0])[:, None].to(dtype)
    exact = dtype if name == "reference" else torch.float64
    leaf = x.to(exact).requires_grad_()  # in float, PyTorch's GELU of infinity is NaN
    want = kernel(leaf)
    want.sum().backward()
    shape = Shape.of_tokens(4, 1, k.lanes, dtype)
    b_x, out, grad = k.to_layout(x, Buffer.zeros(shape)), Buffer.zeros(shape), Buffer.zeros(shape)
    k.pointwise(function, b_x, out=out)
    k.pointwise(f"{function}_grad", k.to_layout(torch.ones_like(x), grad), b_x, out=grad)
    # The slope of a line at NaN is 0 or 1 in PyTorch, by the dtype.
    lines = function in ("relu6", "hardsigmoid", "hardswish")
    for got, ideal, first in ((out, want, 0), (grad, leaf.grad, int(lines))):
        got = k.from_layout(got).to(exact)[first:]
        torch.testing.assert_close(got, ideal.detach()[first:], equal_nan=True, rtol=1e-6, atol=0)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("window", "stride", "padding"),
    [
        ((2, 2), (2, 2), (0, 0)),
        ((3, 2), (2, 1), (1, 1)),
        ((3, 3), (1, 2), (0, 1)),
        ((7, 9), (7, 9), (0, 0)),
    ],
)
def test_pooling_equals_pytorch(name, dtype, window, stride, padding):
    torch.manual_seed(0)
    k = backend(name)
    x = torch.randn(11, 3, 7, 9, dtype=dtype).round(decimals=1)  # with ties
    x_shape = Shape.of_images(x.shape, k.lanes, 1, dtype)
    b_x = k.to_layout(x, Buffer.zeros(x_shape))
    for kind in ("max", True, False):
        leaf = x.clone().requires_grad_()
        if kind == "max":
            want = F.max_pool2d(leaf, window, stride, padding)
        else:
            want = F.avg_pool2d(leaf, window, stride, padding, False, kind)
        grad = torch.randn_like(want)
        want.backward(grad)
        y_shape = Shape.of_images(want.shape, k.lanes, 0, dtype)
        y, dx, dy = (
            Buffer.zeros(y_shape),
            Buffer.zeros(x_shape),
            k.to_layout(grad, Buffer.zeros(y_shape)),
        )
        if kind == "max":
            k.max_pool(b_x, y, window, stride, padding)
            k.max_pool_grad(b_x, y, dy, dx, window, stride, padding)
        else:
            k.avg_pool(b_x, y, window, stride, padding, kind)
            k.avg_pool_grad(dy, dx, window, stride, padding, kind)
        close(k.from_layout(y), want.detach(), dtype)
        close(k.from_layout(dx), leaf.grad, dtype)


@backends
def test_the_gradients_of_a_layer_pass_gradcheck(name):
    torch.manual_seed(0)
    convolution = ConvGeometry(4, 6, (3, 2), (2, 1), (1, 1), (1, 2), 2)
    for g, size in ((convolution, (3, 4, 5, 6)), (ConvGeometry.linear(5, 6), (18, 5))):
        shape = g.weight_shape if len(size) == 4 else g.weight_shape[:2]
        x = torch.randn(size, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
        layer = Layer(backend(name), g, torch.rand(shape) < 0.4, x)
        assert torch.autograd.gradcheck(OnKernels.apply, (x, weight, bias, layer))


@backends
def test_results_are_bitwise_the_same_from_run_to_run(name):
    torch.manual_seed(0)
    g = ConvGeometry(20, 24, (3, 3), padding=(1, 1))
    x, weight = torch.randn(37, 20, 12, 12), torch.randn(24, 20, 3, 3)
    layer = Layer(backend(name), g, torch.rand(24, 20, 3, 3) < 0.2, x)
    grad = torch.ones(37, 24, 12, 12)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs = [layer.backward(x, weight, grad)[1] for _ in range(3)]
            assert all(torch.equal(runs[0], run) for run in runs)
    finally:
        torch.set_num_threads(threads)


@backends
def test_nan_and_infinity_of_kept_weights_and_inputs_come_through(name):
    g = ConvGeometry(3, 4, (3, 3), padding=(1, 1))
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(g.weight_shape)
    x[0, 1, 2, 2], x[1, 0, 0, 0] = math.nan, math.inf
    layer = Layer(backend(name), g, torch.ones(g.weight_shape, dtype=torch.bool), x)
    got, want = layer.forward(x, weight), F.conv2d(x, weight, None, 1, 1)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())


@pytest.mark.parametrize("isa", native.instruction_sets())
def test_an_output_larger_than_the_caches_goes_to_memory_whole(isa, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(native, "caches", lambda: Caches(last=2 * 4096))
    k, g = Native(isa), ConvGeometry(3, 64, (1, 1))
    x, weight = torch.randn(17, 3, 9, 9), torch.randn(g.weight_shape)
    support = torch.rand(g.weight_shape) < 0.5
    x_shape = Shape.of_images(x.shape, k.lanes)
    y = Buffer.zeros(x_shape.with_channels(64))
    assert y.data.numel() * 4 > 4096
    plan = k.plan(g, support.flatten().nonzero()[:, 0], x_shape, y.shape)
    plan.refresh(weight)
    sums = k.conv(plan, k.to_layout(x, Buffer.zeros(x_shape)), y, statistics=True)
    want = F.conv2d(x.double(), (weight * support).double())
    close(k.from_layout(y), want, torch.float32)
    close(sums[0], want.sum((0, 2, 3)), torch.float32, terms=want[:, 0])


@pytest.mark.parametrize("isa", native.instruction_sets())
def test_buffers_that_do_not_fit_a_plan_are_refused(isa):
    k, g = Native(isa), ConvGeometry(3, 4, (3, 3), padding=(1, 1))
    good, out = Shape(2, 3, 5, 5, k.lanes, 1), Shape(2, 4, 5, 5, k.lanes, 1)
    support = torch.arange(108)
    plan = k.plan(g, support, good, out)
    x, y = Buffer.zeros(good), Buffer.zeros(out)
    with pytest.raises(InputError, match="halo"):
        k.conv(plan, Buffer.zeros(Shape(2, 3, 5, 5, k.lanes, 0)), y)
    with pytest.raises(InputError, match="halo"):
        k.plan(g, support, good, Shape(2, 4, 5, 5, k.lanes, 0))
    with pytest.raises(InputError, match="same samples"):
        k.conv(plan, x, Buffer.zeros(Shape(9, 4, 5, 5, k.lanes, 1)))
    with pytest.raises(InputError, match="plan was made"):
        k.conv(plan, x, Buffer.zeros(Shape(2, 4, 5, 6, k.lanes, 1)))
    with pytest.raises(InputError, match="ascend"):
        k.plan(g, support.flip(0), good, out)
    wide = Buffer.zeros(Shape(2, 3, 5, 5, 2 * k.lanes))
    with pytest.raises(InputError, match="lanes"):
        k.pointwise("relu", wide, out=wide)


def test_the_check_of_the_called_kernels_can_fail():
    """The check itself runs when all tests are over: see ``support/kernel_calls.py``."""
    relu, add = ("relu", "avx2", False), ("add", "avx2", True)
    assert verdict([relu, add], [relu, add], []) == (
        False,
        "kernels: all 2 of the table were called",
    )
    assert verdict([relu, add], [relu], []) == (
        True,
        "kernels: 1 of 2 were never called: add (avx2, f64)",
    )
    assert verdict([relu], [relu, add], [])[0]
    fails, sentence = verdict([relu, add], [relu], ["test_b", "test_a"])
    assert not fails
    assert sentence == "kernels: NOT CHECKED, because test_a and 1 more did not run and pass"


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_buffer_is_converted_again_and_again(name, dtype):
    """Each time with other memory, and with other strides."""
    kernels = backend(name)
    for shape, size in (
        (Shape.of_images((5, 3, 4, 6), kernels.lanes, 1, dtype), (5, 3, 4, 6)),
        (Shape.of_tokens(37, 6, kernels.lanes, dtype), (37, 6)),
    ):
        buffer, numel = Buffer.zeros(shape), math.prod(size)
        for turn in range(6):
            plain = torch.arange(numel, dtype=dtype).add(turn).view(size)
            if turn % 3 == 1:
                plain = plain.transpose(0, 1).contiguous().transpose(0, 1)
            elif turn % 3 == 2 and len(size) == 4:
                plain = plain.to(memory_format=torch.channels_last)
            kernels.to_layout(plain, buffer)
            assert torch.equal(kernels.from_layout(buffer), plain)
            assert torch.equal(kernels.from_layout(buffer, torch.empty_like(plain)), plain)
