"""The networks of ``acdc bench zoo``: of other libraries, of PyTorch, and our own.

Weights are random, and nothing is downloaded. Networks of ``transformers`` are smaller than the
published ones, so that a step takes about a second on two cores. A further network is a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acdc.bench import networks
from acdc.bench.networks import Network
from acdc.errors import InputError
from acdc.layers import Layers
from acdc.runs.models import MobileNetV1, ResNet50

INSTALL = {
    "transformers": "pip install transformers",
    "timm": "pip install timm",
    "torchvision": "pip install torchvision",
}
CLASSES, _WORDS = 100, 1000


@dataclass(frozen=True)
class ZooNetwork(Network):
    """A network that other people define, and its batch.

    Args:
        library: The package that defines it.
        size: Height and width of its images, or words of a text.
    """

    library: str = "torch"
    size: int = 96

    @property
    def missing(self) -> str | None:
        """Why the network cannot be built here, or ``None``."""
        if self.library not in INSTALL or find_spec(self.library) is not None:
            return None
        return f"needs {self.library}, which is not installed: {INSTALL[self.library]}"

    def data(self) -> tuple[Tensor, Tensor]:
        """Return one batch of random inputs, and a class for each sample."""
        generator = torch.Generator().manual_seed(0)
        y = torch.randint(CLASSES, (self.batch,), generator=generator)
        if self.images:
            return torch.randn(self.batch, 3, self.size, self.size, generator=generator), y
        return torch.randint(1, _WORDS, (self.batch, self.size), generator=generator), y

    def loss(self, net: Callable[[Tensor], Any], x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of a batch; of outputs for every word, the loss of their mean."""
        out = net(x)
        logits: Tensor = getattr(out, "logits", out)
        return F.cross_entropy(logits.mean(1) if logits.ndim == 3 else logits, y)


def of_transformers(name: str, config: str, **values: Any) -> nn.Module:
    """Return a network of ``transformers`` with random weights.

    Args:
        name: Of its class.
        config: Of the class of its configuration.
        values: Of the configuration.
    """
    import transformers

    known: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    sizes = known | {"num_labels": CLASSES} | values
    return cast(nn.Module, getattr(transformers, name)(getattr(transformers, config)(**sizes)))


def _of_timm(name: str, **options: Any) -> nn.Module:
    import timm

    return cast(nn.Module, timm.create_model(name, num_classes=CLASSES, **options))


def _of_torchvision(name: str, **options: Any) -> nn.Module:
    import torchvision

    return cast(nn.Module, getattr(torchvision.models, name)(num_classes=CLASSES, **options))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(_WORDS, 256), encoder, nn.Linear(256, CLASSES))


_VIT = {
    "image_size": 96, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
    "intermediate_size": 1536,
}  # fmt: skip
_TEXT = {
    "vocab_size": _WORDS, "hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6,
    "intermediate_size": 1536,
}  # fmt: skip
_NO_CACHE = {"use_cache": False}  # as the Trainer of transformers sets it
_GPT2 = {"vocab_size": _WORDS, "n_embd": 384, "n_layer": 4, "n_head": 6, **_NO_CACHE}
_DISTIL = {"vocab_size": _WORDS, "dim": 384, "hidden_dim": 1536, "n_layers": 4, "n_heads": 6}
_RESNET18 = {
    "layer_type": "basic", "embedding_size": 64, "hidden_sizes": [64, 128, 256, 512],
    "depths": [2, 2, 2, 2],
}  # fmt: skip

Build = Callable[[], nn.Module]
_ROWS: tuple[tuple[str, str, Build, int, bool, int], ...] = (
    # name, library, how it is built, samples, images or text, size of a sample
    ("hf_resnet18", "transformers", partial(
        of_transformers, "ResNetForImageClassification", "ResNetConfig", **_RESNET18),
        16, True, 96),
    ("hf_vit", "transformers", partial(
        of_transformers, "ViTForImageClassification", "ViTConfig", **_VIT), 16, True, 96),
    ("hf_bert", "transformers", partial(
        of_transformers, "BertForSequenceClassification", "BertConfig", **_TEXT), 16, False, 64),
    ("hf_distilbert", "transformers", partial(
        of_transformers, "DistilBertForSequenceClassification", "DistilBertConfig", **_DISTIL),
        16, False, 64),
    ("hf_gpt2", "transformers", partial(
        of_transformers, "GPT2LMHeadModel", "GPT2Config", **_GPT2), 8, False, 64),
    ("hf_llama", "transformers", partial(
        of_transformers, "LlamaForCausalLM", "LlamaConfig", **_TEXT, **_NO_CACHE), 8, False, 64),
    ("timm_vit_small", "timm", partial(
        _of_timm, "vit_small_patch16_224", img_size=96), 16, True, 96),
    ("timm_mobilenetv3_large", "timm", partial(_of_timm, "mobilenetv3_large_100"), 16, True, 96),
    ("timm_convnext_atto", "timm", partial(_of_timm, "convnext_atto"), 16, True, 96),
    ("tv_resnet18", "torchvision", partial(_of_torchvision, "resnet18"), 16, True, 96),
    ("tv_resnet50", "torchvision", partial(_of_torchvision, "resnet50"), 16, True, 96),
    ("tv_mobilenet_v2", "torchvision", partial(_of_torchvision, "mobilenet_v2"), 16, True, 96),
    ("tv_mobilenet_v3_large", "torchvision", partial(
        _of_torchvision, "mobilenet_v3_large"), 16, True, 96),
    ("tv_efficientnet_b0", "torchvision", partial(
        _of_torchvision, "efficientnet_b0"), 16, True, 96),
    ("tv_convnext_tiny", "torchvision", partial(_of_torchvision, "convnext_tiny"), 16, True, 96),
    ("tv_densenet121", "torchvision", partial(_of_torchvision, "densenet121"), 16, True, 96),
    ("tv_vgg11_bn", "torchvision", partial(_of_torchvision, "vgg11_bn"), 16, True, 64),
    ("tv_vit_b_16", "torchvision", partial(_of_torchvision, "vit_b_16", image_size=96),
        4, True, 96),
    ("torch_encoder", "torch", _encoder, 16, False, 64),
    ("resnet50_224", "acdc", ResNet50().build, 16, True, 224),
    ("mobilenet_v1_224", "acdc", MobileNetV1().build, 16, True, 224),
)  # fmt: skip
_PRUNED = Layers(types=("conv", "linear", "attention"), skip_first=True, skip_last=True)
ZOO: dict[str, ZooNetwork] = {
    name: ZooNetwork(name, build, batch, images, _PRUNED, library, size)
    for name, library, build, batch, images, size in _ROWS
}
OWN = ("resnet20_w16_n128", "resnet14_w64_n64", "gpt_d768_l4_t512")


def find(name: str) -> Network | None:
    """Return the network with this name, with ``@N`` behind the name a batch of N; or ``None``."""
    plain, at, batch = name.partition("@")
    found = ZOO.get(plain) or networks.parse(plain)
    if found is None or not at:
        return found
    return replace(found, batch=int(batch), name=name) if batch.isdigit() and int(batch) else None


def find_installed(name: str) -> Network | None:
    """Return the network with this name, or ``None``.

    Raises:
        InputError: Its library is missing.
    """
    network = find(name)
    if isinstance(network, ZooNetwork) and network.missing:
        raise InputError(f"The network {name} {network.missing}.")
    return network


def choose(asked: Sequence[str], batch: int | None) -> tuple[list[Network], list[str]]:
    """Return the networks to time, and a sentence for each library that is missing.

    Args:
        asked: Names of networks; none: all whose library is installed.
        batch: Samples of a batch; ``None``: as listed. A GPT of ours takes tokens.

    Raises:
        InputError: There is no such network, or it was asked for and its library is missing.
    """
    if batch is not None and batch < 1:
        raise InputError(f"--batch is {batch}. It is a whole number from 1 up.")
    chosen: list[Network] = []
    missing: dict[str, list[str]] = {}
    for name in dict.fromkeys(asked or (*ZOO, *OWN)):
        network = find(f"{name}@{batch}" if batch else name)
        if network is None:
            raise InputError(
                f"--network {name} is no network of the list, and spells none. The networks are "
                f"{', '.join((*ZOO, *OWN))}; write another one of ours as {networks.SPELLING}."
            )
        why = network.missing if isinstance(network, ZooNetwork) else None
        if why is None:
            chosen.append(network)
        elif asked:
            raise InputError(f"--network {name} {why}.")
        else:
            missing.setdefault(why, []).append(name)
    return chosen, [f"Not timed: {', '.join(names)} ({why})." for why, names in missing.items()]


def listing() -> list[str]:
    """Return a line for each network: name, library, batch, and what is missing."""
    every = [network for name in (*ZOO, *OWN) if (network := find(name))]
    width = max(len(network.name) for network in every)
    lines = []
    for network in every:
        if isinstance(network, ZooNetwork):
            sample = f"{network.size}x{network.size}" if network.images else f"{network.size} words"
            what = f"{network.library:12}  {network.batch} x {sample}"
            what += f"  ({network.missing})" if network.missing else ""
        else:
            what = f"{'acdc':12}  {network.batch} {'x 32x32' if network.images else 'tokens'}"
        lines.append(f"{network.name:{width}}  {what}")
    return lines
