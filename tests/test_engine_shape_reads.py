"""Sizes and numbers of dimensions that a forward reads: no tensor leaves the layout for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import acdc
from acdc.engine.segment import Segment
from support.engine_nets import Pair, Written


def segments(pair: Pair) -> list[Segment]:
    return [segment for host in pair.engine._hosts for segment in host.segments()]


def ends(pair: Pair) -> int:
    """Return how many tensors all segments return."""
    return sum(len(segment.program.outputs) for segment in segments(pair))


class Checked(nn.BatchNorm2d):
    """A BatchNorm that checks its input, as in ``timm``."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        torch._assert(x.dim() > 3, "expected 4D input")
        if x.dim() != 4:
            raise ValueError("expected 4D input")
        if self.training:
            self.num_batches_tracked.add_(1)
        stats = (self.running_mean, self.running_var)
        settings = (self.training, self.momentum, self.eps)
        return F.relu(F.batch_norm(x, *stats, self.weight, self.bias, *settings))


class Squeeze(nn.Module):
    """Squeeze-and-excitation with a mean, as in ``timm``."""

    def __init__(self, channels: int, **how: Any) -> None:
        super().__init__()
        self.how = how or {"dim": (2, 3), "keepdim": True}
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean(**self.how)))))


def images(**how: Any) -> Pair:
    def conv(c: int, d: int) -> nn.Module:
        return nn.Conv2d(c, d, 3, padding=1, bias=False)

    body = (conv(3, 8), Checked(8), Squeeze(8, **how), conv(8, 6), Checked(6), conv(6, 6))
    return Pair(nn.Sequential(*body), (3, 6, 6))


@pytest.mark.parametrize("samples", [3, 5])
def test_assertions_about_dimensions_end_no_segment(samples: int) -> None:
    pair = images()
    pair.step(samples)
    (segment,) = segments(pair)
    assert len(segment.program.outputs) == 1


@pytest.mark.parametrize("dims", [(2, 3), [-1, -2], (3, -2)])
def test_a_mean_over_height_and_width_is_pooling(dims: Any) -> None:
    pair = images(dim=dims, keepdim=True)
    pair.step(3)
    assert len(segments(pair)) == 1


@pytest.mark.parametrize(
    "how",
    [{"dim": (1, 2, 3), "keepdim": True}, {"dim": 3, "keepdim": True}],
)
def test_another_mean_stays_with_pytorch(how: dict[str, Any]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.last(x * x.mean(**how))

    pair = Pair(Written(forward, first=nn.Conv2d(3, 8, 1), last=nn.Conv2d(8, 4, 1)), (3, 6, 6))
    pair.step(3)
    assert len(segments(pair)) == 2


def test_an_assertion_that_does_not_hold_still_fails() -> None:
    class Wrong(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            torch._assert(x.ndim == 3, "three dimensions, please")
            return super().forward(x)

    with pytest.raises(AssertionError, match="three dimensions"):
        acdc.Engine(nn.Sequential(Wrong(3, 4, 1)), torch.randn(2, 3, 5, 5))


def attention(m: Any, x: Tensor) -> Tensor:
    """An attention that reads the sizes of what its layers read, as in ``transformers``."""
    x = m.norm(x)
    lead = x.shape[:-1]
    heads = (*lead, 2, -1)
    q, k, v = (layer(x).view(heads).transpose(1, 2) for layer in (m.q, m.k, m.v))
    mixed = F.scaled_dot_product_attention(q, k, v)
    return m.out(mixed.transpose(1, 2).reshape(*lead, -1))


def sizes_of_features(m: Any, x: Tensor) -> Tensor:
    """All that can be read but values: sizes, their product, dtype and device."""
    y = m.q(m.norm(x))
    scale = torch.ones(y.size(0), y.size()[1], y.shape[-1], dtype=y.dtype, device=y.device)
    return m.out(m.v(y) * scale * (y.numel() / y.numel()) * len(y.shape) / y.dim())


def sizes_of_what_is_given(m: Any, x: Tensor) -> Tensor:
    """The last size of a tensor that no layer has made."""
    y = F.gelu(x)
    return m.out(m.v(m.norm(y))) + torch.ones(y.shape, dtype=y.dtype)


def sizes_of_a_concatenation(m: Any, x: Tensor) -> Tensor:
    y = torch.cat([m.q(x), m.k(x)], -1)
    return m.wide(y) + x.sum(-1, keepdim=True) * (y.shape[2] / 16)


FORWARDS = {
    "attention": (attention, 4),
    "features": (sizes_of_features, 3),
    "given": (sizes_of_what_is_given, 1),
    "concatenation": (sizes_of_a_concatenation, 1),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_the_shape_of_tokens_is_read_without_them(name: str) -> None:
    forward, wanted = FORWARDS[name]
    layers = {name: nn.Linear(8, 8) for name in ("q", "k", "v", "out")}
    model = Written(forward, norm=nn.LayerNorm(8), wide=nn.Linear(16, 8), **layers)
    pair = Pair(model, (5, 8), zero=("k.bias",))
    for samples in (3, 2, 4):
        pair.step(samples, seed=samples)
    assert ends(pair) == wanted
