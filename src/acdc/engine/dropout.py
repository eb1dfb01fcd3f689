"""Dropout with the numbers that PyTorch draws, many of them at a time.

PyTorch draws each number of a mask with a call and a branch. In a sparse step of a transformer that
is a large part of the time (``docs/engine.md``). ``csrc/draws.h`` draws the same numbers from the
same generator. A build of PyTorch that draws in another way keeps its own functions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from acdc.engine import native
from acdc.engine.contract import DTYPES
from acdc.engine.locks import Lock

log = logging.getLogger(__name__)


def draw(mask: Tensor, p: float) -> Tensor:
    """Fill a mask with zeros, and with ``1 / (1 - p)`` with probability ``1 - p``.

    Args:
        mask: A tensor on the CPU without gaps in memory, as ``torch.empty_like`` returns it. The
            numbers are drawn in the order of memory.
        p: The probability of a zero.

    Returns:
        The mask.

    """
    if not (mask.dtype in DTYPES and draws_as_pytorch()):
        return mask.bernoulli_(1 - p).div_(1 - p)
    generator = torch.default_generator
    with _drawing:
        while True:
            before = generator.get_state()
            after = before.clone()
            native.bernoulli(after, mask, 1 - p, _scale(p, mask.dtype))
            # Another thread may have drawn by PyTorch meanwhile. None can between these two lines:
            # NumPy compares, because torch.equal lets other threads run.
            if generator.get_state().numpy().tobytes() == before.numpy().tobytes():
                generator.set_state(after)
                return mask


_drawing = Lock(rank=3)  # two threads must not draw from one state


@lru_cache(maxsize=256)
def _scale(p: float, dtype: torch.dtype) -> float:
    """Return the factor of kept elements, rounded as PyTorch rounds it."""
    return float(torch.ones((), dtype=dtype, device="cpu").div_(1 - p))


@cache
def draws_as_pytorch() -> bool:
    """Return whether the kernels draw the numbers that this build of PyTorch draws."""
    if not native.available():
        return False
    agrees = all(_same_draws(count, dtype) for count in (1, 700) for dtype in DTYPES)
    if not agrees:
        log.info("This build of PyTorch draws random numbers in its own way: dropout is PyTorch's.")
    return agrees


def _same_draws(count: int, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(count)
    state = generator.get_state()
    if state.numel() < native.generator_bytes():
        return False
    want, got = (torch.empty(count, dtype=dtype, device="cpu") for _ in range(2))
    want.bernoulli_(0.7, generator=generator)
    native.bernoulli(state, got, 0.7, 1.0)
    return torch.equal(got, want) and torch.equal(state, generator.get_state())


# --- functions of PyTorch, with these numbers -----------------------------------------------------


def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """Compute ``torch.nn.functional.dropout``, with the same arguments."""
    if inplace or not _drops(input, p, training):
        return F.dropout(input, p, training, inplace)
    return _dropped(input, p)


def _torch_dropout(input: Any, p: float, train: bool) -> Any:
    """Compute ``torch.dropout``, with the same arguments."""
    return _dropped(input, p) if _drops(input, p, train) else torch.dropout(input, p, train)


def _drops(input: Any, p: float, training: bool) -> bool:
    """Return whether a dropout draws a mask, and the kernels can draw it."""
    return training is True and _fit(input) and 0 < p < 1 and input.numel() > 0


def _dropped(input: Tensor, p: float) -> Tensor:
    return input * draw(torch.empty_like(input), float(p))


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Compute ``torch.nn.functional.scaled_dot_product_attention``, with the same arguments.

    Without dropout this is PyTorch's own function. With dropout PyTorch has no fused kernel on the
    CPU: this function does the operations that it does there, in the same order.
    """
    if (
        not 0 < dropout_p < 1
        or enable_gqa
        or type(is_causal) is not bool
        or (is_causal and attn_mask is not None)
        or not (scale is None or (type(scale) is float and scale > 0))
        or not _fit(query, key, value)
        or not _fits_as_mask(attn_mask, query)
        or not query.dim() == key.dim() == value.dim() >= 2
        or not query.numel() * key.numel() * value.numel()
        or not torch.backends.cuda.math_sdp_enabled()  # by `torch.nn.attention.sdpa_kernel`
    ):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    root = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = (query * root) @ (key.transpose(-2, -1) * root)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device="cpu").tril()
    if attn_mask is not None:
        hides = attn_mask.logical_not() if attn_mask.dtype == torch.bool else attn_mask
        scores.add_(added(hides, scores))
    return _dropped(torch._safe_softmax(scores, -1), dropout_p) @ value


def added(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask that is added: minus infinity where a bool mask is True."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)
    return mask


def _fits_as_mask(mask: Any, query: Tensor) -> bool:
    """Return whether PyTorch takes a mask, and adds or converts it as ``attention`` does."""
    if mask is None:
        return True
    plain = type(mask) in (Tensor, nn.Parameter) and mask.device.type == "cpu"
    return plain and mask.dtype in (torch.bool, query.dtype)


def _fit(*tensors: Any) -> bool:
    """Return whether these are plain tensors on the CPU of one dtype that the kernels know.

    A mode of the user sees the functions of PyTorch.
    """
    return (
        not torch._C._len_torch_function_stack()
        and all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)
        and len({t.dtype for t in tensors}) == 1
        and tensors[0].dtype in DTYPES
        and tensors[0].layout == torch.strided
        and draws_as_pytorch()
    )


# --- in place of PyTorch's ------------------------------------------------------------------------


REPLACED: Mapping[Any, Callable[..., Any]] = {
    F.dropout: dropout,
    torch.dropout: _torch_dropout,
    F.scaled_dot_product_attention: attention,
}
"""Function of PyTorch -> the function here that computes the same."""


class _Replacing(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        return REPLACED.get(func, func)(*args, **(kwargs or {}))


def replaced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose calls of dropout and of attention are those of this module."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _Replacing():
            return function(*args, **kwargs)

    return call


def replace_in(graph: fx.GraphModule, is_opaque: Callable[[nn.Module], bool]) -> None:
    """Call the functions of this module in a graph, where PyTorch computes a node.

    Args:
        graph: The graph.
        is_opaque: Whether a module must be called as it is.

    """
    for node in list(graph.graph.nodes):
        if node.op == "call_function":
            node.target = REPLACED.get(node.target, node.target)
        elif node.op == "call_module":
            module = graph.get_submodule(node.target)
            if type(module) is not nn.Dropout or is_opaque(module):
                continue
            with graph.graph.inserting_before(node):
                new = graph.graph.call_function(_of_module(module), node.args, node.kwargs)
            node.replace_all_uses_with(new)
            graph.graph.erase_node(node)


def _of_module(module: nn.Dropout) -> Callable[..., Any]:
    def dropout_module(input: Any) -> Any:
        return dropout(input, module.p, module.training, module.inplace)

    return dropout_module
