"""Transformers of PyTorch in a sparse phase, against their own forward in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.beside import Beside
from support.engine_nets import Outer

CAUSAL = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
BANNED = torch.eye(5, dtype=torch.bool)
PADDED = torch.tensor([[False] * 4 + [True], [False] * 5, [False] * 2 + [True] * 3])
BY_HEAD = torch.randn(12, 5, 5, generator=torch.Generator().manual_seed(3)).double()


def on_engine(model: nn.Module, *args: Any, **kwargs: Any) -> Beside:
    """Return a network on the engine, with random biases: PyTorch starts some of them at zero."""
    for p in model.double().parameters():
        nn.init.normal_(p, std=0.3)
    return Beside(model, *args, **kwargs)


def x_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Self(nn.Module):
    """Attention of a tensor to itself, between two layers."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.into = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 4, **settings)

    def forward(self, x: Tensor, attn: Any = None, padding: Any = None, **more: Any) -> Any:
        x = self.into(x)
        return self.attention(x, x, x, attn_mask=attn, key_padding_mask=padding, **more)


@pytest.mark.parametrize("settings", [{}, {"batch_first": True}, {"bias": False, "dropout": 0.3}])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize(
    "call",
    [
        {}, {"attn": CAUSAL}, {"attn": BANNED}, {"attn": BY_HEAD}, {"padding": PADDED},
        {"attn": CAUSAL, "padding": PADDED}, {"attn": CAUSAL, "is_causal": True},
        {"attn": CAUSAL, "padding": PADDED, "is_causal": True}, {"average_attn_weights": False},
    ],
    ids=str,
)  # fmt: skip
def test_self_attention(
    settings: dict[str, Any], weights: bool, call: dict[str, Any], runs: list[int]
) -> None:
    x = x_of(3, 5, 8) if settings.get("batch_first") else x_of(5, 3, 8)
    beside = on_engine(Outer(Self(**settings)), x=x, need_weights=weights, **call)
    beside.check(x, need_weights=weights, **call)
    assert beside.sparse == {"part.into", "part.attention.in_proj", "part.attention.out_proj"}
    assert len(runs) == 2
    beside.model.eval(), beside.plain.eval()
    beside.check(x, need_weights=weights, **call)


def test_attention_without_samples(runs: list[int]) -> None:
    for weights in (True, False):
        beside = on_engine(Outer(Self()), x=x_of(5, 8), need_weights=weights)
        beside.check(x_of(5, 8), need_weights=weights)
    assert len(runs) == 4


def test_an_attention_that_is_called_by_itself(runs: list[int]) -> None:
    x = x_of(5, 3, 8)
    beside = on_engine(Outer(nn.MultiheadAttention(8, 4)), x, x, x)
    beside.check(x, x, x)
    assert beside.sparse == {"part.in_proj", "part.out_proj"}
    assert len(runs) == 2


class Cross(nn.Module):
    """Attention to another tensor, and attention with keys of another size."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.other = nn.Linear(8, 8), nn.Linear(8, 6)
        self.cross = nn.MultiheadAttention(8, 4)
        self.sizes = nn.MultiheadAttention(8, 4, kdim=6, vdim=6)

    def forward(self, x: Tensor) -> Any:
        y, z = self.into(x), self.other(x)
        return self.cross(y, x, x)[0] + self.sizes(y, z, z)[0]


def test_attention_between_tensors_stays_with_pytorch_and_has_a_reason(runs: list[int]) -> None:
    beside = on_engine(Cross(), x_of(5, 3, 8))
    beside.check(x_of(5, 3, 8))
    assert beside.sparse == {"into", "other"}
    assert "called as a whole" in beside.engine.refused["cross.in_proj"]
    assert "called as a whole" in beside.engine.refused["cross.out_proj"]
    assert "called as a whole" in beside.engine.refused["sizes.out_proj"]
    assert runs


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("drop", [0.0, 0.2])
@pytest.mark.parametrize("padding", [None, PADDED], ids=["whole", "padded"])
def test_an_encoder(
    norm_first: bool, activation: str, drop: float, padding: Tensor | None, runs: list[int]
) -> None:
    # PyTorch's attention computes with the tokens first. With the samples first, its output lies
    # transposed in memory, and the dropout behind it draws its numbers in that order.
    first = drop == 0
    layer = nn.TransformerEncoderLayer(
        8, 4, 16, drop, activation, batch_first=first, norm_first=norm_first, dtype=torch.float64
    )
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
    src = x_of(3, 5, 8) if first else x_of(5, 3, 8)
    call = {"src": src, "mask": CAUSAL, "src_key_padding_mask": padding}
    beside = on_engine(model, **call)
    beside.check(**call)
    names = ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
    assert beside.sparse == {f"layers.{i}.{name}" for i in (0, 1) for name in names}
    assert beside.engine.refused == {}
    assert len(runs) == 3  # before, between and after the two attentions
    beside.model.eval(), beside.plain.eval()
    beside.check(**call)


def test_a_hook_inside_of_an_encoder_is_called(runs: list[int]) -> None:
    layer = nn.TransformerEncoderLayer(8, 4, 16, 0.0, batch_first=True)
    seen: list[int] = []
    layer.self_attn.register_forward_hook(lambda *_: seen.append(1))
    beside = on_engine(nn.Sequential(layer), x_of(3, 5, 8))
    seen.clear()
    beside.check(x_of(3, 5, 8))
    assert len(seen) == 2
    assert beside.sparse == {"0.linear1", "0.linear2"}
    assert runs


def test_a_weight_that_was_replaced_is_left_to_pytorch() -> None:
    beside = on_engine(Outer(Self()), x=x_of(5, 3, 8))
    beside.check(x_of(5, 3, 8))
    for net in (beside.model, beside.plain):
        attention = net.part.attention
        attention.in_proj_weight = nn.Parameter(attention.in_proj_weight.detach() * 2)
    beside.check(x_of(5, 3, 8))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(**sizes, num_hidden_layers=2, image_size=32))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
    drop = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**sizes, **drop, num_hidden_layers=2, vocab_size=50)
    return BertForSequenceClassification(config)


TOKENS = torch.arange(15).view(3, 5)


@pytest.mark.parametrize(
    ("build", "example", "calls", "segments"),
    [
        (_vit, {"pixel_values": x_of(3, 3, 32, 32)}, [{}], 6),
        (
            _bert,
            {"input_ids": TOKENS},
            [{}, {"attention_mask": (TOKENS % 5 < 3).long(), "labels": torch.tensor([0, 1, 1])}],
            5,
        ),
    ],
    ids=["ViT", "BERT"],
)
def test_transformers(
    build: Any,
    example: dict[str, Tensor],
    calls: list[dict[str, Tensor]],
    segments: int,
    runs: list[int],
) -> None:
    """A layer is one graph. Training may give a mask and labels that the example had not."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    beside = on_engine(build(), **example)
    for more in calls:
        runs.clear()
        beside.check(**example, **more)
        assert len(runs) == segments
    assert beside.engine.refused == {}
