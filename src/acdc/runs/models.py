"""The networks of the recipes, short enough to be read.

A frozen *specification* describes a network. Recipes hold it and records show it. ``build`` makes
the module, with fresh random weights from torch's generator.

>>> net = CifarResNet(depth=20).build()
>>> sum(p.numel() for p in net.parameters())
272474

Shapes: every network takes float images ``[N, C, H, W]`` and returns logits ``[N, classes]``,
except the transformer, which takes and returns sequences.
ResNets have torchvision's layer names (``conv1``, ``layer1.0.conv1``, ``layer2.0.downsample.0``,
``fc``). Networks that torchvision does not have use the same words.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acdc.cost import Network, measure
from acdc.errors import InputError


@dataclass(frozen=True)
class Model(ABC):
    """The specification of a network, without weights."""

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample: channels, height and width of an image."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the network in training mode, with fresh weights, on torch's default device."""

    def example(self, samples: int) -> Tensor:
        """Return a batch of zeros of the network's input, on torch's default device."""
        return torch.zeros(samples, *self.input_shape)

    def network(self) -> Network:
        """Return the layers and the cost of the network, without making its weights."""
        with torch.device("meta"):
            return measure(self.build(), self.example(1))


def _whole(spec: Model, **fields: int) -> None:
    """Refuse fields that are not whole numbers from 1 up."""
    for field, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(
                f"{type(spec).__name__} was given {field}={value!r}. Give a whole number from 1 up."
            )


def _blocks(spec: Model, depth: int, layers_per_block: int, other_layers: int) -> int:
    """Return the blocks of each of three stages in a network of ``depth`` weighted layers."""
    blocks, rest = divmod(depth - other_layers, 3 * layers_per_block)
    if rest or blocks < 1:
        allowed = ", ".join(str(3 * layers_per_block * n + other_layers) for n in (1, 2, 3, 4))
        raise InputError(
            f"{type(spec).__name__} was given depth={depth}. Its three stages have equally many "
            f"blocks of {layers_per_block} layers, so depth is one of {allowed}, ..."
        )
    return blocks


# --- ResNets ------------------------------------------------------------------------------------


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the image size at stride 1. BatchNorm follows: there is no bias."""
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)


def _shortcut(c_in: int, c_out: int, stride: int) -> nn.Module:
    """The path around a block: a 1x1 convolution if the shape changes, otherwise the identity."""
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    return nn.Sequential(_conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))


class _Basic(nn.Module):
    """Two 3x3 convolutions (He et al., CVPR 2016)."""

    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(c_in, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(c_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return cast(Tensor, self.relu(out + self.downsample(x)))


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 (He et al., CVPR 2016). v1.5 strides in the 3x3, v1 in the first 1x1."""

    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int, stride_in_1x1: bool = False) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        c_out = self.expansion * width
        self.conv1 = _conv(c_in, width, 1, first)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, second)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, c_out, 1)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return cast(Tensor, self.relu(out + self.downsample(x)))


class _ResNet(nn.Module):
    """Stem, stages whose width doubles and whose image halves, global average, linear layer.

    Args:
        conv1: The stem's convolution.
        maxpool: The layer after the stem.
        block: Makes a block from input channels, width and stride.
        expansion: Output channels of a block, as a multiple of its width.
        blocks: Number of blocks of each stage; the first stage keeps the image size.
        classes: Number of logits.
    """

    def __init__(
        self,
        conv1: nn.Conv2d,
        maxpool: nn.Module,
        block: Callable[[int, int, int], nn.Module],
        expansion: int,
        blocks: Sequence[int],
        classes: int,
    ) -> None:
        super().__init__()
        channels = conv1.out_channels
        self.conv1 = conv1
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = maxpool
        self.stages = [f"layer{number + 1}" for number in range(len(blocks))]
        width = conv1.out_channels
        for stage, (name, depth) in enumerate(zip(self.stages, blocks, strict=True)):
            layers = []
            for number in range(depth):
                layers.append(block(channels, width, 2 if stage > 0 and number == 0 else 1))
                channels = expansion * width
            self.add_module(name, nn.Sequential(*layers))
            width *= 2
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # Standard deviation sqrt(2 / (k * k * C_out)), as in the paper's code.
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return cast(Tensor, self.fc(self.avgpool(x).flatten(1)))


@dataclass(frozen=True)
class SmallResNet(Model):
    """Three stages of basic blocks on small grey or colour images: digits, Fashion-MNIST.

    Args:
        width: Channels of the first stage; the others have twice and four times as many.
        blocks: Basic blocks of each stage.
        stem_stride: Stride of the first convolution.
        stem_pool: Size of the max-pooling after the stem; 1: none. With a stride of 2 and a pooling
            of 2, as in the stem of an ImageNet ResNet, 28x28 images are affordable on a CPU.
        channels: Channels of the images.
        size: Height and width of the images.
        classes: Number of logits.
    """

    width: int = 16
    blocks: int = 1
    stem_stride: int = 1
    stem_pool: int = 1
    channels: int = 1
    size: int = 8
    classes: int = 10

    def __post_init__(self) -> None:
        _whole(self, width=self.width, blocks=self.blocks, stem_stride=self.stem_stride)
        _whole(self, stem_pool=self.stem_pool, channels=self.channels, size=self.size)
        _whole(self, classes=self.classes)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        return (self.channels, self.size, self.size)

    def build(self) -> nn.Module:
        """Return the network with fresh weights, He's normal initialisation."""
        stem = _conv(self.channels, self.width, 3, self.stem_stride)
        pool = nn.MaxPool2d(self.stem_pool) if self.stem_pool > 1 else nn.Identity()
        return _ResNet(stem, pool, _Basic, 1, (self.blocks,) * 3, self.classes)


@dataclass(frozen=True)
class CifarResNet(Model):
    """The ResNets for 32x32 images, of ``6n + 2`` layers (He et al., CVPR 2016, section 4.2).

    As in the AC/DC paper's code the shortcuts between stages are 1x1 convolutions with BatchNorm,
    not padding: ResNet-20 has 22 layers that can be pruned.

    Args:
        depth: 20, 32, 44, 56, ...
        width: Channels of the first stage; the others have twice and four times as many.
        classes: Number of logits.
    """

    depth: int = 20
    width: int = 16
    classes: int = 10

    def __post_init__(self) -> None:
        _whole(self, depth=self.depth, width=self.width, classes=self.classes)
        _blocks(self, self.depth, layers_per_block=2, other_layers=2)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        return (3, 32, 32)

    def build(self) -> nn.Module:
        """Return the network with fresh weights, He's normal initialisation."""
        blocks = _blocks(self, self.depth, layers_per_block=2, other_layers=2)
        stem = _conv(3, self.width, 3)
        return _ResNet(stem, nn.Identity(), _Basic, 1, (blocks,) * 3, self.classes)


def _imagenet_stem() -> tuple[nn.Conv2d, nn.Module]:
    return _conv(3, 64, 7, 2), nn.MaxPool2d(3, stride=2, padding=1)


@dataclass(frozen=True)
class ResNet50(Model):
    """ResNet-50 for 224x224 images, v1.5: the stride of a stage is in its first 3x3 convolution.

    Args:
        classes: Number of logits.
        stride_in_1x1: Put the stride into the first 1x1 convolution, as the original v1 does.
    """

    classes: int = 1000
    stride_in_1x1: bool = False

    def __post_init__(self) -> None:
        _whole(self, classes=self.classes)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        return (3, 224, 224)

    def build(self) -> nn.Module:
        """Return the network with fresh weights, He's normal initialisation."""
        block = partial(_Bottleneck, stride_in_1x1=self.stride_in_1x1)
        return _ResNet(*_imagenet_stem(), block, 4, (3, 4, 6, 3), self.classes)


# --- WideResNet ---------------------------------------------------------------------------------


class _Wide(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions, dropout between them."""

    def __init__(self, c_in: int, c_out: int, strides: tuple[int, int], dropout: float) -> None:
        super().__init__()
        first, second = strides
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, first, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, second, padding=1)
        self.downsample: nn.Module = nn.Identity()
        if c_in != c_out or first * second != 1:
            self.downsample = nn.Conv2d(c_in, c_out, 1, first * second)

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        out = self.conv2(F.relu(self.bn2(out)))
        return cast(Tensor, out + self.downsample(x))


class _WideResNet(nn.Module):
    def __init__(
        self, blocks: int, widen: int, dropout: float, classes: int, stride_in_conv2: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        channels = 16
        for stage in range(3):
            width = 16 * widen * 2**stage
            layers = []
            for number in range(blocks):
                stride = 2 if stage > 0 and number == 0 else 1
                strides = (1, stride) if stride_in_conv2 else (stride, 1)
                layers.append(_Wide(channels, width, strides, dropout))
                channels = width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        # In torch momentum is the weight of the new batch, so these statistics are almost those of
        # the last batch. The published runs have this momentum.
        self.bn1 = nn.BatchNorm2d(channels, momentum=0.9)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for name in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(name)(x)
        return cast(Tensor, self.fc(F.relu(self.bn1(x)).mean((2, 3))))


@dataclass(frozen=True)
class WideResNet(Model):
    """WideResNet for 32x32 images (Zagoruyko and Komodakis, BMVC 2016), as the AC/DC paper ran it.

    The code of the AC/DC paper differs from the original: convolutions have biases, the stride of a
    stage is in the *second* convolution of its first block, the last BatchNorm has momentum 0.9,
    and the initialisation is torch's.

    Args:
        depth: 10, 16, 22, 28, 34, ...
        widen: The first stage has ``16 * widen`` channels, the others twice and four times as many.
        dropout: Share of activations dropped between the convolutions of a block.
        classes: Number of logits.
        stride_in_conv2: ``False`` puts the stride into the first convolution, as the original does.
    """

    depth: int = 28
    widen: int = 10
    dropout: float = 0.3
    classes: int = 100
    stride_in_conv2: bool = True

    def __post_init__(self) -> None:
        _whole(self, depth=self.depth, widen=self.widen, classes=self.classes)
        _blocks(self, self.depth, layers_per_block=2, other_layers=4)
        if not 0 <= self.dropout < 1:
            raise InputError(
                f"WideResNet was given dropout={self.dropout!r}, which is the share of "
                f"activations to drop. Give a number from 0 up to, and without, 1."
            )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        return (3, 32, 32)

    def build(self) -> nn.Module:
        """Return the network with fresh weights, torch's own initialisation."""
        blocks = _blocks(self, self.depth, layers_per_block=2, other_layers=4)
        return _WideResNet(blocks, self.widen, self.dropout, self.classes, self.stride_in_conv2)


# --- MobileNet ----------------------------------------------------------------------------------


class _Separable(nn.Module):
    """A depthwise 3x3 convolution, then a 1x1 convolution across channels."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(c_in, c_in, 3, stride, padding=1, groups=c_in, bias=False)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.pointwise = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.depthwise(x)))
        return cast(Tensor, self.relu(self.bn2(self.pointwise(x))))


class _MobileNetV1(nn.Module):
    def __init__(self, blocks: Sequence[tuple[int, int]], classes: int) -> None:
        super().__init__()
        channels = 32
        self.conv1 = _conv(3, channels, 3, 2)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        layers = []
        for width, stride in blocks:
            layers.append(_Separable(channels, width, stride))
            channels = width
        self.blocks = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn1(self.conv1(x))))
        return cast(Tensor, self.fc(self.avgpool(x).flatten(1)))


@dataclass(frozen=True)
class MobileNetV1(Model):
    """MobileNetV1 for 224x224 images (Howard et al., arXiv:1704.04861).

    The layers that can be pruned are ``conv1``, ``blocks.*.depthwise``, ``blocks.*.pointwise`` and
    ``fc``.

    Args:
        classes: Number of logits.
    """

    classes: int = 1000

    def __post_init__(self) -> None:
        _whole(self, classes=self.classes)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        return (3, 224, 224)

    def build(self) -> nn.Module:
        """Return the network with fresh weights, torch's own initialisation."""
        blocks = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)]  # width, stride
        blocks += [(512, 1)] * 5 + [(1024, 2), (1024, 1)]
        return _MobileNetV1(blocks, self.classes)


# --- a transformer ------------------------------------------------------------------------------


class _TransformerBlock(nn.Module):
    """Attention and a four times wider MLP, each behind a LayerNorm (Radford et al., 2019)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.proj(mixed.transpose(1, 2).flatten(2)))
        return cast(Tensor, x + self.dropout(self.down(F.gelu(self.up(self.ln2(x))))))


class _Transformer(nn.Module):
    def __init__(
        self, vocabulary: int, context: int, width: int, depth: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(
            *(_TransformerBlock(width, heads, dropout) for _ in range(depth))
        )
        self.ln = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:  # keeps the residual stream's variance independent of the depth
            for layer in (block.proj, block.down):
                nn.init.normal_(cast(nn.Linear, layer).weight, std=0.02 / math.sqrt(2 * depth))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.blocks(self.tokens(x) + self.places[: x.shape[1]])
        return cast(Tensor, self.head(self.ln(hidden))).transpose(1, 2)


@dataclass(frozen=True)
class SmallGPT(Model):
    """A small transformer over characters, in the style of GPT-2.

    It takes int64 ``[N, T]`` with ``T <= context`` and returns logits ``[N, vocabulary, T]``, with
    the classes as second dimension, as in PyTorch's losses. The initialisation is GPT-2's.

    Args:
        width: Features of a character.
        depth: Number of blocks.
        heads: Heads of the attention; they share the width.
        context: Largest number of characters of an input.
        vocabulary: Number of different characters.
        dropout: Probability of zero in the outputs that a block adds, while training.
    """

    width: int = 128
    depth: int = 4
    heads: int = 4
    context: int = 128
    vocabulary: int = 65
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _whole(self, width=self.width, depth=self.depth, heads=self.heads)
        _whole(self, context=self.context, vocabulary=self.vocabulary)
        if self.width % self.heads:
            raise InputError(
                f"SmallGPT was given width={self.width} and heads={self.heads}. The heads share "
                f"the width: choose a multiple of {self.heads}."
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"SmallGPT was given dropout={self.dropout!r}. It is in [0, 1).")

    @property
    def input_shape(self) -> tuple[int]:
        """Characters of a window."""
        return (self.context,)

    def example(self, samples: int) -> Tensor:
        """Return windows of the first character, on torch's default device."""
        return torch.zeros(samples, self.context, dtype=torch.int64)

    def build(self) -> nn.Module:
        """Return the network in training mode, with fresh weights, on torch's default device."""
        return _Transformer(
            self.vocabulary, self.context, self.width, self.depth, self.heads, self.dropout
        )
