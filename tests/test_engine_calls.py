"""Layers that a forward calls as functions run sparse, as those that it calls as modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import acdc
from acdc.engine import native
from support.engine_nets import Pair, Written


class OwnLinear(nn.Linear):
    """As in ``timm``: a linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class OwnConv(nn.Conv2d):
    """As in many libraries: all arguments by position."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Named(nn.Conv2d):
    """The same by name."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(input=x, weight=self.weight, stride=self.stride, groups=self.groups)


def images() -> nn.Module:
    return nn.Sequential(
        OwnConv(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        OwnConv(8, 8, 3, padding=1, groups=8, bias=False), nn.ReLU(), Named(8, 6, 1, bias=False),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), OwnLinear(6, 5),
    )  # fmt: skip


def tokens() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(8), OwnLinear(8, 12), nn.GELU(), OwnLinear(12, 8, bias=False))


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "images": (images, (3, 9, 8)), "tokens": (tokens, (5, 8)), "one layer": (
        lambda: OwnLinear(8, 6), (8,)
    ),
}  # fmt: skip


def layers_of(pair: Pair) -> set[str]:
    return {
        conv.spec.name
        for host in pair.engine._hosts
        for segment in host.segments()
        for conv in segment.program.convs
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_functions_of_the_weights_of_a_module_are_its_layer(name: str) -> None:
    build, shape = NETWORKS[name]
    pair = Pair(build(), shape)
    for samples in (3, 2, 5):
        pair.step(samples, seed=samples)
    assert not pair.engine.refused
    sparse = sum(len(s.program.convs) for h in pair.engine._hosts for s in h.segments())
    assert sparse == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in pair.model.modules())


def test_a_layer_that_is_called_as_a_function_has_its_own_name() -> None:
    pair = Pair(images(), (3, 9, 8))
    assert layers_of(pair) >= {"0", "3", "5"}


def test_a_weight_that_another_module_reads_belongs_to_its_owner() -> None:
    """Tied weights: the output layer reads the weight of the first one."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(F.gelu(m.up(x)), m.down.weight, m.down.bias) + F.linear(x, m.other.weight)

    model = Written(
        forward, up=nn.Linear(8, 12), down=nn.Linear(12, 8), other=nn.Linear(8, 8, bias=False)
    )
    pair = Pair(model, (5, 8))
    pair.step(3)
    pair.step(3, seed=1)


def test_a_weight_that_the_forward_computes_stays_with_pytorch() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias, self.stride, self.padding)

    pair = Pair(nn.Sequential(nn.Conv2d(3, 6, 1), Standardised(6, 8, 3), nn.ReLU()), (3, 6, 6))
    assert layers_of(pair) == {"0"}
    with torch.no_grad():
        x = pair.batch(2)
        torch.testing.assert_close(pair.model(x), pair.plain(x))


def test_a_linear_function_over_other_dimensions_or_dtypes_is_as_in_pytorch() -> None:
    pair = Pair(images(), (3, 9, 8))
    with torch.no_grad():
        for shape in ((2, 3, 12, 12), (0, 3, 9, 8)):
            x = torch.randn(shape, dtype=torch.float64)
            torch.testing.assert_close(pair.model(x), pair.plain(x))


@pytest.mark.skipif(not native.available(), reason="installed without a compiler")
@pytest.mark.parametrize("name", NETWORKS)
def test_in_the_runtime(name: str) -> None:
    build, shape = NETWORKS[name]
    model = build().eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data[torch.rand(weight.shape) < 0.7] = 0
    plain = copy.deepcopy(model)
    x = torch.randn(2, *shape)
    runtime = acdc.Runtime(model, x)
    with torch.no_grad():
        torch.testing.assert_close(runtime(x), plain(x), rtol=1e-4, atol=1e-5)
    assert not any(row.how == "torch" and row.kept is not None for row in runtime.explain().rows)
