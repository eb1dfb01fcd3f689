"""``nn.TransformerEncoder`` and ``nn.MultiheadAttention`` as their parts.

To ``torch.fx`` each of them is one call. Written here as their parts, their linear layers can run
sparse, and attention itself stays with PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from acdc.engine.dropout import added, attention
from acdc.engine.dropout import dropout as drop


class InProjection(nn.Linear):
    """The first layer of an attention: queries, keys and values at once.

    Its weight and its bias are those that the attention holds at present.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        self.held = (attention,)  # in a tuple, so that it is not a submodule
        self.in_features, self.out_features = attention.embed_dim, 3 * attention.embed_dim

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The weight ``[3 * features, features]``."""
        return self.held[0].in_proj_weight

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """The bias ``[3 * features]``, or None."""
        return self.held[0].in_proj_bias


def parts_of(module: nn.Module) -> Callable[..., Any] | None:
    """Return the forward of a module as its parts, or None if it has no such forward."""
    kind = type(module)
    if kind is nn.TransformerEncoder:
        return _encoder
    if kind is nn.TransformerEncoderLayer:
        return _encoder_layer
    if kind is nn.MultiheadAttention and has_in_projection(module):
        return _attention
    return None


def has_in_projection(module: nn.Module) -> bool:
    """Return whether a module is an attention with one layer for queries, keys and values."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and not module.add_zero_attn
    )


class AsAWhole(Exception):
    """A call that PyTorch must compute as a whole. The message gives the reason."""


# --- the forwards ---------------------------------------------------------------------------------


def _encoder(
    m: nn.TransformerEncoder,
    src: Any,
    mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool | None = None,
) -> Any:
    if src_key_padding_mask is not None and not m.training and m.use_nested_tensor:
        raise AsAWhole("PyTorch sets padded tokens to zero in evaluation")
    x = src
    for layer in m.layers:
        x = layer(
            x,
            src_mask=mask,
            is_causal=is_causal is True,  # otherwise the mask alone says it
            src_key_padding_mask=src_key_padding_mask,
        )
    return x if m.norm is None else m.norm(x)


def _encoder_layer(
    m: nn.TransformerEncoderLayer,
    src: Any,
    src_mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool = False,
) -> Any:
    x, masks = src, (src_mask, src_key_padding_mask)
    if m.norm_first:
        x = x + m._sa_block(m.norm1(x), *masks, is_causal=is_causal)
        return x + m._ff_block(m.norm2(x))
    x = m.norm1(x + m._sa_block(x, *masks, is_causal=is_causal))
    return m.norm2(x + m._ff_block(x))


def _attention(
    m: nn.MultiheadAttention,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    if not (query is key is value):
        raise AsAWhole("its queries, keys and values are several tensors")
    function = attend_with_weights if need_weights else attend
    more = {"average": average_attn_weights} if need_weights else {}
    found = query.tracer.create_proxy(
        "call_function",
        function,
        (InProjection(m)(query), attn_mask, key_padding_mask),
        {
            "heads": m.num_heads,
            "dropout": m.dropout if m.training else 0.0,
            "is_causal": is_causal,
            "batch_first": m.batch_first,
            **more,
        },
    )
    if not need_weights:
        return m.out_proj(found), None
    return m.out_proj(found[0]), found[1]


# --- what PyTorch computes ------------------------------------------------------------------------


def attend(
    qkv: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    *,
    heads: int,
    dropout: float,
    is_causal: bool,
    batch_first: bool,
) -> Tensor:
    """Return what ``nn.MultiheadAttention`` computes between its two layers.

    Args:
        qkv: Queries, keys and values side by side, ``[samples, tokens, 3 * features]`` or, without
            ``batch_first``, ``[tokens, samples, 3 * features]``. There may be no samples.
        attn_mask, key_padding_mask, is_causal, batch_first: As in ``nn.MultiheadAttention``.
        heads: The number of heads.
        dropout: The probability that a weight of the attention is dropped.

    """
    q, k, v = _by_head(qkv, heads, batch_first)
    _check_mask(attn_mask, is_causal)
    causal = is_causal and key_padding_mask is None
    mask = None if causal else _mask(attn_mask, key_padding_mask, q)
    seen = attention(q, k, v, mask, dropout, causal)
    return _side_by_side(seen, qkv, batch_first)


def attend_with_weights(
    qkv: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    *,
    heads: int,
    dropout: float,
    is_causal: bool,
    batch_first: bool,
    average: bool,
) -> tuple[Tensor, Tensor]:
    """Return the same, and the weights of the attention.

    The arguments are those of ``attend``. With ``average``, the weights are averaged over heads.
    """
    q, k, v = _by_head(qkv, heads, batch_first)
    _check_mask(attn_mask, is_causal)
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
    mask = _mask(attn_mask, key_padding_mask, q)
    weights = torch.softmax(scores if mask is None else scores + mask, -1)
    weights = drop(weights, dropout) if dropout > 0 else weights
    shown = weights.mean(1) if average else weights
    return _side_by_side(weights @ v, qkv, batch_first), shown if qkv.dim() == 3 else shown[0]


def _check_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise as ``nn.MultiheadAttention`` does, for a hint without the mask that it is about."""
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")


def _by_head(qkv: Tensor, heads: int, batch_first: bool) -> tuple[Tensor, ...]:
    """Return queries, keys and values, each ``[samples, heads, tokens, features]``."""
    if qkv.dim() == 2:
        qkv = qkv.unsqueeze(0)
    elif not batch_first:
        qkv = qkv.transpose(0, 1)
    found: tuple[Tensor, ...] = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return found


def _side_by_side(seen: Tensor, like: Tensor, batch_first: bool) -> Tensor:
    """Return the heads side by side, with the dimensions in the order of ``like``."""
    if like.dim() == 2:
        return seen[0].transpose(0, 1).flatten(1)
    order = (0, 2, 1, 3) if batch_first else (2, 0, 1, 3)
    return seen.permute(order).flatten(2)


def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Return the sum of both masks for ``[samples, heads, tokens, tokens]``."""
    samples, heads, tokens, _ = q.shape
    mask = None
    if attn_mask is not None:
        mask = added(attn_mask, q)
        if mask.dim() == 3:
            mask = mask.view(samples, heads, *mask.shape[1:])
    if key_padding_mask is not None:
        padded = added(key_padding_mask, q).view(samples, 1, 1, tokens)
        mask = padded if mask is None else mask + padded
    return mask
