"""Networks of timm and torchvision with random weights, small enough for a CPU.

Where a small network of a family can be made by its public function, that is used; otherwise its
class, with few layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.zoo import Case, images


def _loss(size: int) -> Callable[[nn.Module, int], Tensor]:
    """Return the loss on images of this size; networks with auxiliary heads return several."""

    def loss(model: nn.Module, index: int) -> Tensor:
        out = model(images(index, size))
        every = [part for part in out if part is not None] if isinstance(out, tuple) else [out]
        return torch.stack([F.cross_entropy(part, torch.arange(4)) for part in every]).sum()

    return loss


def _case(build: Callable[[], nn.Module], size: int, weights: int) -> Case:
    return Case(lambda: build().train(), _loss(size), images(0, size), weights)


def _timm(name: str, size: int, weights: int, **options: Any) -> Case:
    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, num_classes=4, **options)
        return model

    return _case(build, size, weights)


def _torchvision(name: str, size: int, weights: int, **options: Any) -> Case:
    def build() -> nn.Module:
        import torchvision

        model: nn.Module = getattr(torchvision.models, name)(num_classes=4, **options)
        return model

    return _case(build, size, weights)


def _standardised() -> nn.Module:
    """A ResNetV2 whose convolutions standardise their weights (BiT)."""
    from timm.layers import StdConv2d
    from timm.models.resnetv2 import ResNetV2

    sizes = {"layers": (1, 1), "channels": (128, 128), "stem_chs": 32}
    model: nn.Module = ResNetV2(**sizes, num_classes=4, conv_layer=StdConv2d)
    return model


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=4)


def _densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(8, (2, 2), 16, num_classes=4)


_SMALL_VIT = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}

TIMM: dict[str, Case] = {
    "vit_small": _timm("vit_small_patch16_224", 32, 10, **_SMALL_VIT),
    "beit": _timm("beit_base_patch16_224", 32, 6, **_SMALL_VIT | {"depth": 1}),
    "mobilenetv3": _timm("mobilenetv3_small_050", 32, 54),
    "convnext": _timm("convnext_atto", 32, 41),
    "swin": _timm("swin_tiny_patch4_window7_224", 32, 11, img_size=32, window_size=4,
                  depths=(1, 1), embed_dim=16, num_heads=(2, 2)),
    "regnet": _timm("regnety_002", 32, 71),
    "xcit": _timm("xcit_nano_12_p16_224", 64, 30, img_size=64, depth=2),
    "standardised resnet": _case(_standardised, 32, 1),
    "normalizer-free resnet": _timm("nf_resnet26", 32, 1),
}  # fmt: skip

TORCHVISION: dict[str, Case] = {
    "resnet18": _torchvision("resnet18", 32, 21),
    "mobilenet_v2": _torchvision("mobilenet_v2", 32, 53),
    "mobilenet_v3_small": _torchvision("mobilenet_v3_small", 32, 54),
    "efficientnet_b0": _torchvision("efficientnet_b0", 32, 82),
    "convnext_tiny": _torchvision("convnext_tiny", 32, 59),
    "vit_b_16": _case(_vit, 32, 10),
    "vgg11_bn": _torchvision("vgg11_bn", 32, 11),
    "densenet": _case(_densenet, 32, 11),
    "googlenet": _torchvision("googlenet", 64, 58, aux_logits=False, init_weights=False),
    "googlenet with auxiliary heads": _torchvision("googlenet", 64, 64, init_weights=False),
    "shufflenet": _torchvision("shufflenet_v2_x0_5", 32, 57),
    "squeezenet": _torchvision("squeezenet1_1", 64, 26),
}

# Small enough to be trained twice, once on the engine.
ON_ENGINE = (
    "vit_small", "mobilenetv3", "convnext", "swin", "xcit", "vit_b_16", "densenet", "shufflenet",
)  # fmt: skip
