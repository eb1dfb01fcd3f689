"""Images with the channels last, and tensors side by side, in a sparse phase."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.beside import Beside
from support.engine_nets import Written, conv


class Permute(nn.Module):
    """As in ``torchvision``."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return torch.permute(x, self.dims)


def images(channels: int, samples: int = 3, size: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, channels, size, size, generator=generator, dtype=torch.float64)


def convnext_block(channels: int) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return x + m.block(x)

    block = nn.Sequential(
        conv(channels, channels, 3, groups=channels, bias=True), Permute(0, 2, 3, 1),
        nn.LayerNorm(channels), nn.Linear(channels, 4 * channels), nn.GELU(),
        nn.Linear(4 * channels, channels), Permute(0, 3, 1, 2),
    )  # fmt: skip
    return Written(forward, block=block)


@pytest.mark.parametrize("samples", [1, 3, 17])
def test_a_block_with_the_channels_last_is_one_segment(samples: int, runs: list[int]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 8), convnext_block(8), convnext_block(8), conv(8, 4))
    x = images(3, samples)
    both = Beside(net, x)
    both.check(x)
    assert len(runs) == 1
    assert len(both.sparse) == 8
    both.model.eval(), both.plain.eval()
    both.check(x)


def test_pixels_may_enter_and_leave_a_segment(runs: list[int]) -> None:
    """PyTorch reads the pixels in the middle of the block, and makes those that come back."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = m.a(m.into(x).permute(0, 2, 3, 1))
        z = torch.cumsum(y, -1)  # no operation of the engine
        z = m.b(z + y) + y
        return z.permute((0, 3, 1, 2)) * 2, y

    layers = {"into": conv(3, 8), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}
    both = Beside(Written(forward, **layers), images(3))
    both.check(images(3))
    assert both.sparse == {"into", "a", "b"}


def test_a_permutation_of_other_dimensions_stays_with_pytorch(runs: list[int]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x).permute(0, 3, 2, 1)).permute(0, 3, 1, -2)

    both = Beside(Written(forward, a=conv(3, 8), b=nn.Linear(8, 8)), images(3))
    both.check(images(3))
    assert len(runs) == 2


def test_a_dropout_of_pixels_draws_the_masks_of_pytorch(runs: list[int]) -> None:
    layers = (conv(3, 8), Permute(0, 2, 3, 1), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    both = Beside(nn.Sequential(*layers), images(3))
    both.check(images(3))


def test_a_dropout_behind_pixels_draws_the_masks_of_pytorch(runs: list[int]) -> None:
    """In plain PyTorch, images that were pixels lie with channels last, and so do sums of them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z = m.b(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return m.d(m.drop(m.c(z) + y))

    layers = {"a": conv(3, 8), "b": nn.Linear(8, 8), "c": conv(8, 8), "d": conv(8, 4)}
    both = Beside(Written(forward, drop=nn.Dropout(0.5), **layers), images(3))
    both.check(images(3))
    assert len(runs) == 1


# --- side by side ---------------------------------------------------------------------------------


def dense_block(norm: bool) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        found = [m.stem(x)]
        for layer in (m.a, m.b):
            found.append(layer(torch.cat(found, 1)))
        return m.last(torch.concat(tensors=found, dim=-3))

    def layer(channels: int) -> nn.Module:
        norms = [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)] if norm else []
        return nn.Sequential(*norms, conv(channels, 4, padding=1))

    last = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), conv(16, 4, 1))
    return Written(forward, stem=conv(3, 8), a=layer(8), b=layer(12), last=last)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("samples", [2, 17])
def test_a_dense_block_is_one_segment(norm: bool, samples: int, runs: list[int]) -> None:
    torch.manual_seed(0)
    both = Beside(dense_block(norm), images(3, samples))
    both.check(images(3, samples))
    assert len(runs) == 1


def test_tokens_side_by_side(runs: list[int]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(torch.cat([y, torch.tanh(x), y], -1))

    x = torch.randn(3, 7, 6, dtype=torch.float64)
    both = Beside(Written(forward, a=nn.Linear(6, 5), b=nn.Linear(16, 4)), x)
    both.check(x)
    assert both.sparse == {"a", "b"}


def test_samples_one_after_the_other_stay_with_pytorch(runs: list[int]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(torch.cat([y, y.flip(-1)]))

    both = Beside(Written(forward, a=conv(3, 8), b=conv(8, 4)), images(3))
    both.check(images(3))
    assert len(runs) == 2
