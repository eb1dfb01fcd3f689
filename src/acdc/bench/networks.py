"""Whole networks to time, named by their sizes: ``resnet20_w16_n128``, ``gpt_d768_l4_t512``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acdc.errors import InputError
from acdc.layers import Layers
from acdc.runs.models import CifarResNet

SPELLING = (
    "resnet14_w64_n64 (layers, channels of the first stage, batch) or gpt_d768_l4_t512 (features, "
    "layers, tokens)"
)
_IMAGES = re.compile(r"resnet(\d+)_w(\d+)_n(\d+)")
_BYTES = re.compile(r"gpt_d(\d+)_l(\d+)_t(\d+)")
_VOCABULARY, _LENGTH = 256, 128  # values of a byte, bytes of a sequence


@dataclass(frozen=True)
class Network:
    """A network and the shape of its batch.

    Args:
        name: Name of the network.
        build: Makes the network with fresh weights.
        batch: Images, or tokens, of a batch.
        images: Whether the input is 32x32 images; otherwise it is sequences of tokens.
        layers: The layers to prune; ``None``: the default layers of the pattern.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: int
    images: bool
    layers: Layers | None = None

    def data(self) -> tuple[Tensor, Tensor]:
        """Return one batch of random inputs and targets."""
        generator = torch.Generator().manual_seed(0)
        if self.images:
            x = torch.randn(self.batch, 3, 32, 32, generator=generator)
            return x, torch.randint(10, (self.batch,), generator=generator)
        length = min(_LENGTH, self.batch)
        shape = (self.batch // length, length)
        x, y = (torch.randint(_VOCABULARY, shape, generator=generator) for _ in range(2))
        return x, y.flatten()

    def loss(self, net: Callable[[Tensor], Any], x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of a batch."""
        return F.cross_entropy(net(x), y)

    @property
    def formats(self) -> dict[str, torch.memory_format]:
        """The memory formats that dense PyTorch is timed in, by name."""
        if self.images:
            return {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
        return {"plain": torch.contiguous_format}


def parse(name: str) -> Network | None:
    """Return the network that a name spells out, or ``None``."""
    if found := _IMAGES.fullmatch(name):
        depth, width, batch = map(int, found.groups())
        return Network(name, CifarResNet(depth=depth, width=width).build, batch, images=True)
    if found := _BYTES.fullmatch(name):
        features, layers, tokens = map(int, found.groups())
        pruned = Layers(exclude=("head",))
        return Network(name, lambda: _GPT(features, layers), tokens, images=False, layers=pruned)
    return None


def choose(
    asked: Sequence[str],
    cases: Sequence[str],
    find: Callable[[str], Network | None] = parse,
) -> list[Network]:
    """Return the networks to time: all, or those whose names contain one of the texts.

    A text may also spell out another network.

    Args:
        asked: The texts.
        cases: The names of the networks.
        find: Returns the network that a text spells out, or ``None``.

    Raises:
        InputError: A text selects nothing.
    """
    names: list[str] = []
    for text in asked or ("",):
        found = [name for name in cases if text in name] or [text]
        if find(found[0]) is None:
            raise InputError(
                f"--case {text} is in the name of no network, and spells none. The networks are "
                f"{', '.join(cases)}; write another one as {SPELLING}."
            )
        names += [name for name in found if name not in names]
    return [network for name in names if (network := find(name))]


class _Block(nn.Module):
    """Attention and a four times wider MLP, each behind a LayerNorm (Radford et al., 2019)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.heads = max(1, features // 64)
        self.ln1, self.ln2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.qkv = nn.Linear(features, 3 * features)
        self.proj = nn.Linear(features, features)
        self.up = nn.Linear(features, 4 * features)
        self.down = nn.Linear(4 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.ln1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return cast(Tensor, x + self.down(F.gelu(self.up(self.ln2(x)))))


class _GPT(nn.Module):
    """A small GPT over bytes. Returns logits ``[batch * length, vocabulary]``."""

    def __init__(self, features: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_VOCABULARY, features)
        self.positions = nn.Parameter(torch.zeros(_LENGTH, features))
        self.blocks = nn.Sequential(*(_Block(features) for _ in range(layers)))
        self.ln = nn.LayerNorm(features)
        self.head = nn.Linear(features, _VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.blocks(self.tokens(x) + self.positions[: x.shape[1]])
        return cast(Tensor, self.head(self.ln(hidden)).flatten(0, 1))
