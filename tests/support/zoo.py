"""Small models of every kind that people bring, with random weights, and a loss for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EVERY = ("conv", "linear", "rnn", "attention", "experts")
WORDS = 24


class Tagger(nn.Module):
    """An LSTM and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.lstm = nn.LSTM(8, 12, num_layers=2, bidirectional=True, proj_size=4, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(words))[0])


class UNet(nn.Module):
    """Two levels, with transposed convolutions on the way up, one of them grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.up1 = nn.ConvTranspose2d(16, 8, 2, stride=2, groups=2)
        self.up2 = nn.ConvTranspose2d(16, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x).relu()
        up = self.up1(self.middle(self.down2(first).relu()).relu()).relu()
        return self.out(self.up2(torch.cat([up, first], 1)).relu())


class Translator(nn.Module):
    """An attention of which keys and values have sizes of their own, beside an encoder."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.embed = nn.Embedding(WORDS, 16)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.cross = nn.MultiheadAttention(16, 2, kdim=8, vdim=4, batch_first=True)
        self.head = nn.Linear(16, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.encoder(self.embed(words))
        hidden = hidden + self.cross(hidden, hidden[..., :8], hidden[..., :4])[0]
        return self.head(hidden)


@dataclass(frozen=True)
class Case:
    """A model and how it is trained.

    Args:
        build: Returns the model.
        loss: Returns the loss of a model on the batch with a number.
        example: The inputs of a call, by keyword or in order.
        weights: How many weights a ``Layers`` of all types must find.
    """

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, int], Tensor]
    example: Any
    weights: int


def words(index: int, length: int = 6) -> Tensor:
    """Return the batch of words with this number."""
    return torch.randint(0, WORDS, (4, length), generator=torch.Generator().manual_seed(index))


def images(index: int, size: int = 8) -> Tensor:
    """Return the batch of images with this number."""
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(index))


def _own(model: nn.Module, index: int) -> Tensor:
    x = words(index)
    out = model(x)
    return F.cross_entropy(out.flatten(0, 1), x.flatten() % out.shape[-1])


def _pixels(model: nn.Module, index: int) -> Tensor:
    x = images(index)
    return F.mse_loss(model(x), x[:, :2])


OWN: dict[str, Case] = {
    "lstm tagger": Case(Tagger, _own, words(0), 13),
    "u-net": Case(UNet, _pixels, images(0), 6),
    "nn.TransformerEncoder": Case(Translator, _own, words(0), 8 + 4 + 1),
}


def _text(model: nn.Module, index: int) -> Tensor:
    x = words(index)
    return model(input_ids=x, labels=x).loss


def _class(model: nn.Module, index: int) -> Tensor:
    x = images(index, 32)
    return model(pixel_values=x, labels=torch.arange(4) % 2).loss


TEXT = {"input_ids": words(0)}
IMAGES = {"pixel_values": images(0, 32)}


def _tiny(name: str, config: str, **values: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        known: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
        return getattr(transformers, name)(
            getattr(transformers, config)(**(known | values))
        ).train()

    return build


_SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip
_LLAMA = _SIZES | {"num_key_value_heads": 1, "max_position_embeddings": 16}

TRANSFORMERS: dict[str, Case] = {
    "ResNet": Case(
        _tiny("ResNetForImageClassification", "ResNetConfig", embedding_size=8,
              hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        _class, IMAGES, 7),
    "MobileNetV2": Case(
        _tiny("MobileNetV2ForImageClassification", "MobileNetV2Config", image_size=32,
              depth_multiplier=0.25), _class, IMAGES, 53),
    "ViT": Case(
        _tiny("ViTForImageClassification", "ViTConfig", **_SIZES, image_size=32, patch_size=8),
        _class, IMAGES, 2 * 6 + 2),
    "BERT": Case(_tiny("BertForMaskedLM", "BertConfig", **_SIZES), _text, TEXT, 2 * 6 + 1),
    "DistilBERT": Case(
        _tiny("DistilBertForMaskedLM", "DistilBertConfig", vocab_size=WORDS, dim=16, hidden_dim=32,
              n_layers=2, n_heads=2), _text, TEXT, 2 * 6 + 1),
    "GPT-2": Case(
        _tiny("GPT2LMHeadModel", "GPT2Config", vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2,
              n_positions=16), _text, TEXT, 2 * 4),
    "Llama": Case(_tiny("LlamaForCausalLM", "LlamaConfig", **_LLAMA), _text, TEXT, 2 * 7 + 1),
    "T5": Case(
        _tiny("T5ForConditionalGeneration", "T5Config", vocab_size=WORDS, d_model=16, d_kv=8,
              d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0),
        _text, TEXT | {"decoder_input_ids": words(1)}, 2 * 6 + 2 * 10),
    "Mixtral": Case(
        _tiny("MixtralForCausalLM", "MixtralConfig", **_LLAMA, num_local_experts=4),
        _text, TEXT, 2 * 6 + 1),
}  # fmt: skip
