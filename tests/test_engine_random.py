"""Random networks in a sparse phase, against masked dense PyTorch."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from acdc.engine import segment
from support.engine_nets import BACKENDS, Pair, backward, tensors

# Derandomized: the same every time, in half a minute on one thread. What fails is shown as it was
# found: to look for a smaller network takes minutes.
EXAMPLES = int(os.environ.get("ACDC_EXAMPLES", "50"))
many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
)

EPS = 0.1  # a BatchNorm over equal numbers divides rounding errors by its root
small = st.integers(1, 9)
densities = st.sampled_from([0.0, 0.05, 0.3, 1.0])


def columns_apart(x: Tensor) -> Tensor:
    """Return the same values, with gaps between them in memory."""
    return torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]


LAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "columns apart": columns_apart,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


class Residual(nn.Module):
    """A branch, added to a second branch."""

    def __init__(self, branch: nn.Module, past: nn.Module) -> None:
        super().__init__()
        self.branch, self.past = branch, past

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.past(x)


class Gated(nn.Module):
    """A branch that is multiplied by another one, or by what both read."""

    def __init__(self, branch: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.branch, self.gate = branch, gate

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) * self.gate(x)


class SideBySide(nn.Module):
    """Two branches, and what both read, one after the other."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, *(branch(x) for branch in self.branches)], 1)


class Pixels(nn.Module):
    """Layers over images with the channels last, as in a ConvNeXt."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormAct(nn.BatchNorm2d):
    """A BatchNorm that calls the function, as in ``timm``."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        stats = (self.running_mean, self.running_var)
        settings = (self.training, self.momentum, self.eps)
        return F.relu_(F.batch_norm(x, *stats, self.weight, self.bias, *settings))


ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Dropout)


class Builder:
    """Draws a chain of layers with matching shapes.

    Attributes:
        shape: Channels, height and width of the last layer's output.
        least: The least pixels that a BatchNorm sees.
    """

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw
        self.shape: tuple[int, int, int] = (draw(small), draw(small), draw(small))
        self.least = 2

    def conv(self, keep: bool = False, channels: int | None = None) -> nn.Conv2d:
        """Return a convolution; ``keep`` leaves the image its size."""
        draw, (c_in, *size) = self.draw, self.shape
        out = draw(small) if channels is None else channels
        groups = draw(st.sampled_from([g for g in range(1, 10) if not (c_in % g or out % g)]))
        sides = []
        for length in size:
            kernel = draw(st.sampled_from([1, 3, 5]) if keep else st.integers(1, 5))
            dilation = draw(st.integers(1, 2))
            reach = dilation * (kernel - 1)
            least = max(0, -((length - reach - 1) // 2))  # so that one pixel comes out
            padding = reach // 2 if keep else max(least, draw(st.integers(0, 2)))
            stride = 1 if keep else draw(st.integers(1, 2))
            sides.append((kernel, stride, padding, dilation))
        kernel, stride, padding, dilation = zip(*sides, strict=True)
        bias = draw(st.booleans())
        made = nn.Conv2d(c_in, out, kernel, stride, padding, dilation, groups, bias)
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, (k, s, p, d) in zip(size, sides, strict=True)
        )
        self.shape = (out, height, width)
        return made

    def norm(self) -> nn.BatchNorm2d:
        affine = self.draw(st.booleans())
        kind = self.draw(st.sampled_from([nn.BatchNorm2d, nn.BatchNorm2d, NormAct]))
        made: nn.BatchNorm2d = kind(self.shape[0], eps=EPS, affine=affine)
        if affine:
            nn.init.uniform_(made.weight, 0.5, 1.5)
            nn.init.normal_(made.bias)
        self.least = min(self.least, self.shape[1] * self.shape[2])
        return made

    def pool(self) -> nn.Module:
        channels, *size = self.shape
        window = tuple(self.draw(st.integers(1, min(3, n))) for n in size)
        stride = self.draw(st.integers(1, 2))
        self.shape = (channels, *((n - k) // stride + 1 for n, k in zip(size, window, strict=True)))
        kind = self.draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))
        made: nn.Module = kind(window, stride)
        return made

    def residual(self) -> nn.Module:
        """Return a sum of a convolution, normalised or not, and of what it read, a convolution of
        that, or a normalised one.
        """
        before, draw = self.shape, self.draw
        kind = draw(st.sampled_from(["plain", "plain", "conv", "norm"]))
        branch: list[nn.Module] = []
        if draw(st.booleans()):
            branch += [self.conv(keep=True), self.norm(), nn.ReLU()]
        branch += [self.conv(keep=True, channels=before[0] if kind == "plain" else None)]
        after, self.shape = self.shape, before
        past = [] if kind == "plain" else [self.conv(keep=True, channels=after[0])]
        self.shape = after
        branch += [self.norm()] if draw(st.sampled_from([True, True, False])) else []
        past += [self.norm()] if kind == "norm" else []
        return Residual(nn.Sequential(*branch), nn.Sequential(*past))

    def activation(self) -> nn.Module:
        made: nn.Module = self.draw(st.sampled_from(ACTIVATIONS))()
        return made

    def squeeze(self) -> nn.Module:
        """Return squeeze-and-excitation, or a product of two branches."""
        channels = self.shape[0]
        if self.draw(st.booleans()):
            gate = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), self.activation()]
            return Gated(nn.Identity(), nn.Sequential(*gate))
        gate = [self.conv(keep=True, channels=channels), self.activation()]
        return Gated(nn.Identity(), nn.Sequential(*gate))

    def side_by_side(self) -> nn.Module:
        """Return branches whose results stand beside what they read."""
        before = self.shape
        branches, channels = [], before[0]
        for _ in range(self.draw(st.integers(1, 2))):
            self.shape = before
            layers = [self.conv(keep=True), *([self.norm()] if self.draw(st.booleans()) else [])]
            branches.append(nn.Sequential(*layers))
            channels += self.shape[0]
        self.shape = (channels, *before[1:])
        return SideBySide(*branches)

    def pixels(self) -> nn.Module:
        """Return a LayerNorm and linear layers over pixels; a residual sum around them, or none."""
        before = self.shape[0]
        inner, out = self.draw(small), before if self.draw(st.booleans()) else self.draw(small)
        activation = self.draw(st.sampled_from([nn.GELU, nn.ReLU, nn.SiLU]))()
        layers = (self.token_norm(before), nn.Linear(before, inner), activation)
        self.shape = (out, *self.shape[1:])
        made = Pixels(*layers, nn.Linear(inner, out))
        return Residual(made, nn.Identity()) if out == before else made

    def token_norm(self, features: int) -> nn.Module:
        draw, settings = self.draw, {"eps": EPS, "elementwise_affine": self.draw(st.booleans())}
        if draw(st.booleans()):
            return nn.RMSNorm(features, **settings)
        return nn.LayerNorm(features, **settings, bias=draw(st.booleans()))

    def head(self) -> list[nn.Module]:
        sizes = [self.shape[0], self.draw(small), self.draw(small)]
        first, second = (nn.Linear(a, b) for a, b in pairwise(sizes))
        branch: nn.Module = nn.Sequential(self.token_norm(sizes[1]), self.activation())
        kind = self.draw(st.sampled_from([Residual, Gated, None]))
        if kind is not None:
            branch = kind(branch, self.draw(st.sampled_from([nn.Identity(), nn.SiLU()])))
        return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), first, branch, second]


@st.composite
def networks(draw: Callable[[Any], Any]) -> tuple[nn.Module, tuple[int, ...], int]:
    """Return a network, the shape of a sample, and a batch size."""
    torch.manual_seed(draw(st.integers(0, 99)))
    build = Builder(draw)
    shape = build.shape
    others = [build.conv, build.norm, nn.ReLU, build.pool, build.activation, build.squeeze]
    others += [build.side_by_side, build.pixels]
    parts = others + len(others) * [build.residual]  # where most can go wrong
    layers: list[nn.Module] = [build.conv()]
    layers += [draw(st.sampled_from(parts))() for _ in range(draw(st.integers(0, 5)))]
    if draw(st.booleans()):
        layers += build.head()
    few = st.sampled_from([1, 2, 3, 8, 9, 16, 17, 33, 130])
    samples = max(draw(few | st.integers(1, 130)), 2 if build.least < 2 else 1)
    return nn.Sequential(*layers), shape, samples


@st.composite
def supports(draw: Callable[[Any], Any], model: nn.Module) -> dict[str, Tensor]:
    """Return masks of every density, some with rows or columns without kept weights."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    masks = {}
    for name, param in model.named_parameters():
        if param.dim() > 1:
            mask = torch.rand(param.shape, generator=generator) < draw(densities)
            empty = draw(st.sampled_from(["nothing", "an output", "an input"]))
            if empty == "an output":
                mask[-1] = False
            elif empty == "an input":
                mask[:, 0] = False
            masks[name] = mask
    return masks


def rounding_errors(pair: Pair, samples: int, seed: int) -> set[str]:
    """Return the names of what would be zero in a step, with exact arithmetic: gradients of biases
    that a BatchNorm takes away, or all that follows a layer that is empty. Float64 is exact enough.
    """
    exact, x = copy.deepcopy(pair.plain).double(), pair.batch(samples, seed).double()
    outs = tensors(exact(x.requires_grad_()))
    backward(outs)
    found = {n: p.grad for n, p in exact.named_parameters()}
    found |= {"input": x.grad, "output": outs[0]}
    return {name for name, t in found.items() if t is not None and t.double().norm() < 1e-12}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@many
@given(data=st.data())
def test_any_network(dtype: torch.dtype, data: st.DataObject) -> None:
    limit = 1e-9 if dtype == torch.float64 else 1e-5
    model, shape, samples = data.draw(networks())
    pair = Pair(
        model,
        shape,
        samples,
        dtype,
        backend_name=data.draw(st.sampled_from(BACKENDS)),
        support=data.draw(supports(model)),
        lay=LAYS[data.draw(st.sampled_from(list(LAYS)))],
    )
    ran, compute = [], segment.compute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment, "compute", lambda *args: ran.append(1) or compute(*args))
        if dtype == torch.float32:  # somewhere in a network of any kind, something nearly cancels
            pair.zero = {*dict(pair.plain.named_parameters()), "input", "output"}
        else:
            pair.zero = rounding_errors(pair, samples, seed=1)
        pair.step(samples, seed=1, limit=limit)
        pair.train(False)
        pair.step(max(1, samples // 2), seed=2, limit=limit)
    assert ran
