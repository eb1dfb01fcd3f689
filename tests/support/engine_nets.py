"""What the tests of the engine share: networks, masks, and a network on the engine beside the same
network in plain PyTorch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import acdc
from acdc.engine import native
from acdc.engine.native import Native
from acdc.engine.reference import Reference
from acdc.engine.segment import Segment
from acdc.runs.models import CifarResNet, SmallResNet, WideResNet, _Bottleneck, _ResNet

BACKENDS = ["default", *native.instruction_sets()[:2], "reference"]


def backend(name: str) -> Native | Reference | None:
    """Return kernels by name; None: the default of the engine."""
    if name == "reference":
        return Reference()
    return None if name == "default" else Native(name)


# --- networks -------------------------------------------------------------------------------------


class Written(nn.Module):
    """Some layers, and a forward that the test writes: ``forward(layers, *inputs)``."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self._written = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Any) -> Any:
        return self._written(self, x)


def conv(c_in: int, c_out: int, kernel: int = 3, **settings: Any) -> nn.Conv2d:
    """Return a convolution that keeps the image size by default."""
    settings = {"padding": kernel // 2, "bias": False} | settings
    return nn.Conv2d(c_in, c_out, kernel, **settings)


def block(c_in: int, c_out: int, **settings: Any) -> nn.Sequential:
    """Return a convolution, BatchNorm and ReLU."""
    return nn.Sequential(conv(c_in, c_out, **settings), nn.BatchNorm2d(c_out), nn.ReLU())


def bottleneck_resnet() -> nn.Module:
    stem = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    return _ResNet(stem, pool, _Bottleneck, 4, (1, 1), 10)


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2),
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(16, 10),
    )  # fmt: skip


def mobile() -> nn.Module:
    return nn.Sequential(
        block(3, 8, stride=2), block(8, 8, groups=8), block(8, 16, kernel=1),
        block(16, 16, groups=16, stride=2), block(16, 24, kernel=1), nn.AdaptiveAvgPool2d((1, 1)),
    )  # fmt: skip


def densenet() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        for layer in (m.a, m.b):
            x = torch.cat([x, layer(x)], 1)
        return m.pool(x)

    return Written(forward, a=block(8, 8), b=block(16, 8), pool=nn.AvgPool2d(3, 2, 1))


def functional() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.norm(m.stem(x)), inplace=True)
        y = torch.add(m.a(x), x).relu()
        y = y + m.b(y)
        z = m.c(F.max_pool2d(y, 2, stride=1))
        z = torch.relu_(m.c_norm(z))
        return F.adaptive_avg_pool2d(F.avg_pool2d(z, 3, 2, 1, count_include_pad=False), 1)

    return Written(
        forward, stem=conv(3, 8), norm=nn.BatchNorm2d(8), a=conv(8, 8), b=conv(8, 8, bias=True),
        c=conv(8, 16, padding=0, stride=2), c_norm=nn.BatchNorm2d(16),
    )  # fmt: skip


def in_place_sum() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.b(F.relu(m.a(x)))
        y += x
        return m.norm(y).relu_()

    return Written(forward, stem=block(3, 8), a=conv(8, 8), b=conv(8, 8), norm=nn.BatchNorm2d(8))


def in_place_late() -> nn.Module:
    """The input of the first layer is changed in place before the second layer runs."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.sigmoid(x)
        y = m.a(x)
        x.mul_(2)
        return m.b(y) + x

    return Written(forward, a=conv(8, 8), b=conv(8, 8))


def residual_twice() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = F.relu(m.n1(m.a(x)) + x)
        return F.relu(m.n2(m.b(y)) + x + y)

    return Written(
        forward, stem=block(3, 8), a=conv(8, 8), n1=nn.BatchNorm2d(8), b=conv(8, 8),
        n2=nn.BatchNorm2d(8),
    )  # fmt: skip


def shared_layers() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.same(m.same(x)) + m.same(x)

    return Written(forward, stem=conv(3, 8), same=conv(8, 8, bias=True))


def shared_norm() -> nn.Module:
    """One BatchNorm for two branches: its running statistics move between them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = F.relu(m.norm(m.a(x)) + m.norm(m.b(x)))
        return m.norm(m.b(x))

    return Written(
        forward, stem=conv(3, 8), a=conv(8, 8), b=conv(8, 8, bias=True), norm=nn.BatchNorm2d(8)
    )


def several_outputs() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        y = m.b(x)
        return x, {"y": y, "z": [m.c(y.relu()), m.nothing(y)]}

    return Written(forward, a=block(3, 8), b=conv(8, 8), c=conv(8, 8), nothing=nn.Identity())


def odd_norms() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.n1(m.a(x)))
        x = F.relu(m.n2(m.b(x)))
        x = F.relu(m.n3(m.c(x)) + m.n4(m.d(x)))
        return m.n5(m.n6(x))  # neither comes after a convolution

    return Written(
        forward,
        a=conv(3, 8), n1=nn.BatchNorm2d(8, affine=False),
        b=conv(8, 8), n2=nn.BatchNorm2d(8, track_running_stats=False),
        c=conv(8, 8), n3=nn.BatchNorm2d(8, momentum=None),
        d=conv(8, 8), n4=nn.BatchNorm2d(8, momentum=0.5, eps=1e-2),
        n5=nn.BatchNorm2d(8), n6=nn.BatchNorm2d(8, affine=False, track_running_stats=False),
    )  # fmt: skip


def frozen_norms() -> nn.Module:
    """Some BatchNorms stay in evaluation mode while the network trains."""
    model = residual_twice()

    class Frozen(type(model)):  # type: ignore[misc]
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.n1.eval()
            self.stem[1].eval()
            return self

    model.__class__ = Frozen
    return model.train()


def frozen_weights() -> nn.Module:
    model = residual_twice()
    model.stem.requires_grad_(False)
    model.a.weight.requires_grad_(False)
    model.n2.bias.requires_grad_(False)
    return model


class Mlp(nn.Module):
    """Attention's neighbour in a GPT block."""

    def __init__(self, activation: nn.Module, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32, bias)
        self.activation = activation
        self.down = nn.Linear(32, 16, bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.activation(self.up(self.norm(x))))


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))


def mlps() -> nn.Module:
    parts = (nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Identity())
    return nn.Sequential(*(Mlp(a, bias) for a, bias in zip(parts, (1, 1, 0, 1), strict=True)))


class Gated(nn.Module):
    """The MLP of Llama."""

    def __init__(self, drop: float = 0.0, **norm: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16, **norm)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.drop(self.down(F.silu(self.gate(y)) * self.up(y)))


def gated() -> nn.Module:
    return nn.Sequential(Gated(), Gated(eps=0.1), Gated(elementwise_affine=False))


def odd_layer_norms() -> nn.Module:
    """Norms of several inputs, without weights, that are frozen, and one that is used twice."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        x = m.plain(x) + m.twice(x)
        y = m.b(m.twice(x))
        z = F.dropout(m.frozen(y * x), 0.5, False)
        return m.c(z) * z + m.no_bias(x * x)

    made = Written(
        forward, a=nn.Linear(16, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 16),
        plain=nn.LayerNorm(16, elementwise_affine=False), twice=nn.LayerNorm(16),
        frozen=nn.LayerNorm(16), no_bias=nn.LayerNorm(16, bias=False, eps=0.1),
    )  # fmt: skip
    made.frozen.requires_grad_(False)
    made.twice.bias.requires_grad_(False)
    return made


def dropouts() -> nn.Module:
    """Dropouts of tokens, of several kinds, each drawing its own mask."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(m.a(x))
        y = F.dropout(m.b(F.gelu(x)), 0.2, m.training)
        return m.c(F.dropout(x + y, p=0.7, training=m.training, inplace=True)) + y

    return Written(
        forward, a=nn.Linear(16, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 16),
        first=nn.Dropout(0.3),
    )  # fmt: skip


class Squeeze(nn.Module):
    """Squeeze-and-excitation, as MobileNetV3 has it."""

    def __init__(self, channels: int, gate_first: bool = False) -> None:
        super().__init__()
        self.down, self.up = conv(channels, 4, 1, bias=True), conv(4, channels, 1, bias=True)
        self.gate_first = gate_first

    def forward(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(x, 1)
        y = self.up(F.relu(self.down(y)))
        return y.sigmoid() * x if self.gate_first else x * F.silu(y)


def squeezes() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.Hardswish(inplace=True), Squeeze(8),
        conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.ReLU6(inplace=True), Squeeze(8, True),
        nn.Dropout(0.2), conv(8, 6, 1), nn.Sigmoid(), conv(6, 6),
    )  # fmt: skip


def pre_activation() -> nn.Module:
    blocks = (PreActivation(8, 8, 1), PreActivation(8, 16, 2))
    return nn.Sequential(conv(3, 8), *blocks, nn.BatchNorm2d(16), nn.ReLU())


class PreActivation(nn.Module):
    """BatchNorm and ReLU come before the convolution."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.n1, self.a = nn.BatchNorm2d(c_in), conv(c_in, c_out, stride=stride)
        self.n2, self.b = nn.BatchNorm2d(c_out), conv(c_out, c_out)
        self.short = conv(c_in, c_out, 1, stride=stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(F.relu(self.n1(x)))
        return self.short(x) + self.b(F.relu(self.n2(y)))


class Branching(nn.Module):
    """The branch depends on values: only its parts can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.odd, self.even = block(8, 8), block(8, 8)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in (self.odd, self.even):
            x = branch(x) if x.abs().sum() > 0 else x
        return self.head(x)


class Towers(nn.Module):
    """Images and tokens that meet at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.words = nn.Sequential(block(3, 8), conv(8, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        words = self.words(x.flatten(1)[:, :8])
        return self.images(x).mean((2, 3)) + words


class Unlike(nn.Module):
    """Towers that share nothing: other batch sizes, other dtypes, another order of dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.crops = block(3, 8), block(3, 8)
        self.words, self.rows, self.pixels = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)

    def to(self, *args: Any) -> Any:
        super().to(*args)
        self.crops.to(torch.float32 if args == (torch.float64,) else torch.float64)
        return self

    def forward(self, x: Tensor) -> Any:
        halves = torch.cat(x.detach().split(3, -1)).to(self.crops[0].weight.dtype)
        rows, flat = x.mean(1), x.reshape(-1, 6)[: x.shape[0] * 6]
        return (
            self.images(x), self.crops(halves), self.pixels(x), self.rows(rows), self.words(flat),
        )  # fmt: skip


class Heads(nn.Module):
    """Layers that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.out(torch.softmax(self.q(x) * self.k(x), -1) * self.v(x))


class Gpt(nn.Module):
    """Blocks of causal attention and an MLP, and a head."""

    def __init__(self, blocks: int = 2, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(GptBlock(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x)))


class GptBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = Mlp(nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).flatten(2))
        return self.mlp(x)


class Network:
    """A row of the table.

    Args:
        build: Makes it.
        shape: Of one sample.
        runs: How many segments one forward in training calls.
        runs_eval: The same in evaluation mode.
        zero: Names of what a BatchNorm makes zero but for rounding errors.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        shape: tuple[int, ...],
        runs: int,
        runs_eval: int | None = None,
        zero: tuple[str, ...] = (),
    ) -> None:
        self.build, self.shape, self.runs, self.zero = build, shape, runs, zero
        self.runs_eval = runs if runs_eval is None else runs_eval


NETWORKS: dict[str, Network] = {
    "ResNet-8 for CIFAR": Network(CifarResNet(8, 8).build, (3, 8, 8), 2),
    "SmallResNet": Network(
        SmallResNet(8, stem_stride=2, stem_pool=2, size=16).build, (1, 16, 16), 2
    ),
    "bottleneck": Network(bottleneck_resnet, (3, 20, 20), 2),
    "pre-activation": Network(pre_activation, (3, 6, 6), 1),
    "WideResNet": Network(
        WideResNet(10, 1, classes=4, dropout=0.3).build, (3, 8, 8), 2, zero=(
            "conv1.bias", *(f"layer{i}.0.conv2.bias" for i in (1, 2, 3)),
            *(f"layer{i}.0.downsample.bias" for i in (2, 3)),
        ),
    ),
    "VGG": Network(vgg, (3, 8, 8), 2),
    "MobileNet": Network(mobile, (3, 8, 8), 1),
    "DenseNet": Network(densenet, (8, 5, 7), 1),
    "functions": Network(functional, (3, 8, 8), 1, zero=("b.bias",)),
    "sum in place": Network(in_place_sum, (3, 6, 6), 1),
    "residual twice": Network(residual_twice, (3, 6, 6), 1),
    "shared layers": Network(shared_layers, (3, 6, 6), 1),
    "shared norm": Network(shared_norm, (3, 6, 6), 2, zero=("b.bias",)),
    "several outputs": Network(several_outputs, (3, 6, 6), 1),
    "odd norms": Network(odd_norms, (3, 6, 6), 1),
    "frozen norms": Network(frozen_norms, (3, 6, 6), 1),
    "frozen weights": Network(frozen_weights, (3, 6, 6), 1),
    "MLPs": Network(mlps, (3, 16), 1),
    "gated MLPs": Network(gated, (3, 16), 1),
    "odd LayerNorms": Network(odd_layer_norms, (3, 16), 1),
    "dropouts": Network(dropouts, (3, 16), 1),
    "squeeze-and-excitation": Network(squeezes, (3, 6, 6), 1, zero=("0.bias",)),
    "linear": Network(linear, (12,), 1),
    "branching": Network(Branching, (3, 6, 6), 4),
    "towers": Network(Towers, (3, 6, 6), 2),
    "unlike towers": Network(Unlike, (3, 6, 6), 5),
    "heads": Network(Heads, (5, 8), 2),
}  # fmt: skip


# --- supports -------------------------------------------------------------------------------------


def support_of(model: nn.Module, density: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
    """Return random masks for the weights of all layers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.weight" if name else "weight": torch.rand(m.weight.shape, generator=generator)
        < density
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    }


@torch.no_grad()
def cut(model: nn.Module, support: Mapping[str, Tensor]) -> None:
    """Set the weights outside the support to zero."""
    for name, mask in support.items():
        model.get_parameter(name).masked_fill_(~mask, 0.0)


# --- beside plain PyTorch -------------------------------------------------------------------------


class Pair:
    """A network on the engine, and its copy in masked plain PyTorch.

    Args:
        model: The network.
        shape: Of one sample, or of a batch if ``samples`` is 0.
        samples: The batch size that the engine is shown.
        dtype: Of everything.
        backend: The kernels, by name.
        density: Of all layers.
        support: Instead of a random one.
        lay: Changes how an input lies in memory.
        zero: Names of what is rounding errors and compared absolutely: parameters whose gradient
            is, "input" for its gradient, "output".
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        samples: int = 3,
        dtype: torch.dtype = torch.float64,
        backend_name: str = "default",
        density: float = 0.3,
        support: dict[str, Tensor] | None = None,
        lay: Callable[[Tensor], Tensor] = lambda x: x,
        zero: Collection[str] = (),
        **engine: Any,
    ) -> None:
        self.model, self.shape, self.dtype = model.to(dtype), shape, dtype
        self.support = support_of(model, density) if support is None else support
        self.lay, self.zero = lay, zero
        cut(model, self.support)
        self.plain = copy.deepcopy(model)
        settings = {"choose": False, "backend": backend(backend_name)} | engine
        self.engine = acdc.Engine(self.model, self.batch(samples), **settings)
        self.engine.compress(self.support)

    def batch(self, samples: int, seed: int = 0) -> Tensor:
        """Return random inputs."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(samples, *self.shape, generator=generator, dtype=self.dtype)

    def train(self, mode: bool) -> None:
        """Set the mode of both networks."""
        self.model.train(mode)
        self.plain.train(mode)

    def step(self, samples: int, seed: int = 0, grad: bool = True, limit: float = 1e-11) -> None:
        """Compare a forward and a backward pass, and let both learn a little."""
        xs = [self.batch(samples, seed).requires_grad_(grad) for _ in range(2)]
        outs = []
        with torch.set_grad_enabled(grad):
            for model, x in zip((self.plain, self.model), xs, strict=True):
                torch.manual_seed(seed)  # dropout
                # a ReLU in place must not change a leaf
                outs.append(tensors(model(self.lay(x * 1.0))))
        assert len(outs[0]) == len(outs[1])
        for want, got in zip(*outs, strict=True):
            assert got.requires_grad == want.requires_grad
            close(got, want, limit, "output", self.least("output"))
        if grad:
            for model, out in zip((self.plain, self.model), outs, strict=True):
                model.zero_grad()
                backward(out)
            close(xs[1].grad, xs[0].grad, limit, "input", self.least("input"))
            self.same_gradients(limit)
            self.learn()
        self.same_buffers(limit)

    def same_gradients(self, limit: float = 1e-11) -> None:
        """Compare the gradients of all parameters; those of plain PyTorch are masked here."""
        grads = [p.grad for p in self.plain.parameters() if p.grad is not None]
        total = nn.utils.get_total_norm(grads).item()
        for (name, want), got in zip(
            self.plain.named_parameters(), self.model.parameters(), strict=True
        ):
            if want.grad is None:
                assert got.grad is None or not got.grad.any(), name
                continue
            if name in self.support:
                want.grad.masked_fill_(~self.support[name], 0.0)
                got.grad.masked_fill_(~self.support[name], 0.0)
            close(got.grad, want.grad, limit, name, self.least(name, total))

    def least(self, name: str, usual: float = 1.0) -> float:
        """Return the norm to measure by where a tensor is rounding errors: of such as are not."""
        return usual if name in self.zero else 0.0

    def same_buffers(self, limit: float = 1e-11) -> None:
        """Compare running statistics and the count of batches. A mean is a sum of numbers of any
        sign: it is measured by how far they spread.
        """
        plain = dict(self.plain.named_buffers())
        for (name, want), got in zip(plain.items(), self.model.buffers(), strict=True):
            spread = plain.get(name.replace("running_mean", "running_var"), want)
            close(got, want, limit, name, spread.double().sqrt().norm().item())

    @torch.no_grad()
    def learn(self) -> None:
        """Move both networks by the same small step."""
        for want, got in zip(self.plain.parameters(), self.model.parameters(), strict=True):
            if want.grad is not None:
                step = want.grad * (0.01 / want.grad.norm().clamp(min=1.0))
                want -= step
                got -= step


def tensors(out: Any) -> list[Tensor]:
    """Return the tensors of a nested result in order."""
    if isinstance(out, Tensor):
        return [out]
    items = out.values() if isinstance(out, Mapping) else out
    return [t for item in items for t in tensors(item)]


def backward(outs: list[Tensor], **settings: Any) -> None:
    """Run the backward pass from random gradients."""
    torch.autograd.backward(outs, gradients(outs), **settings)


def gradients(outs: list[Tensor]) -> list[Tensor]:
    """Return random numbers for each tensor, the same at every call."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outs]


def close(
    got: Tensor, want: Tensor, limit: float = 1e-11, what: str = "", least: float = 0.0
) -> None:
    """Compare by the norm of the difference, relative to that of ``want``.

    One number may be off by more than it is large, where its terms cancel; the norm of a whole
    tensor is not small by chance. Where all of it cancels (a BatchNorm takes away what a bias
    before it adds, and that bias has a gradient of rounding errors) nothing can be relative:
    ``least`` is then the norm to measure by, and whoever gives it names the tensor.
    """
    assert (got.shape, got.dtype) == (want.shape, want.dtype), what
    if not want.is_floating_point():
        assert torch.equal(got, want), what
        return
    if got.dtype == torch.float32:
        limit = max(limit, 1e-5)
    error = (got.detach().double() - want.detach().double()).norm().item()
    scale = max(want.detach().double().norm().item(), least)
    assert error <= limit * scale, f"{what}: {error:.2e} of {scale:.2e}"


def segments(engine: acdc.Engine) -> list[Segment]:
    """Return the segments that exist now."""
    return [segment for host in engine._hosts for segment in host._own_segments()]


class Outer(nn.Module):
    """A forward of any arguments, which is no graph: the engine hosts its part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.part(*args, **kwargs)
