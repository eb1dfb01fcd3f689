"""The gate of sparse kernels: are PyTorch's 2:4 and block kernels faster than dense ones?

Shapes are those of the MLPs of ViT-L and of two GPTs, in bfloat16. A pattern is worth an engine
only where the forward pass and the gradient of the input both gain 1.3x at 16,384 tokens and more;
what does not is not built. The gradient of the weight has two dense factors: it stays dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import acdc
from measuring import Bench, Row

WANTED, FROM_TOKENS = 1.3, 16384
SHAPES = {"ViT-L": (1024, 4096), "GPT 2048": (2048, 6144), "GPT 4096": (4096, 11008)}
TOKENS = (4096, 16384, 45056)
BLOCKS = ((64, 0.8), (64, 0.9))


def rows(bench: Bench) -> Iterator[Row]:
    """Yield the gains over dense by shape, and a verdict for each pattern."""
    gains: dict[str, list[float]] = {"2:4": [], "blocks": []}
    shapes = {"tiny": (128, 256)} if bench.quick else SHAPES
    for name, (inputs, outputs) in shapes.items():
        for tokens in (64,) if bench.quick else TOKENS:
            if bench.left < 8:
                yield Row(f"{name}, {tokens} tokens", note="no time was left")
                continue
            yield from _shape(bench, name, inputs, outputs, tokens, gains)
    for pattern, found in gains.items():
        if not found:
            yield Row(f"gate of {pattern}", note="nothing was measured: it needs a GPU")
            continue
        passed = min(found) >= WANTED
        text = "an engine is worth it" if passed else "no engine is built"
        yield Row(f"gate of {pattern}: the least gain", value=min(found), unit="x", note=text)


def _shape(
    bench: Bench,
    name: str,
    inputs: int,
    outputs: int,
    tokens: int,
    gains: dict[str, list[float]],
) -> Iterator[Row]:
    """Yield the times and gains of one linear layer."""
    x, w, gy = (
        torch.randn(shape, device=bench.device, dtype=torch.bfloat16)
        for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    dense: dict[str, Callable[[], object]] = {
        "forward": lambda: F.linear(x, w),
        "input gradient": lambda: gy @ w,
        "weight gradient": lambda: gy.t() @ x,
    }
    rounds = 2 if bench.quick else 20
    with torch.no_grad():
        taken = bench.interleaved(dense, rounds)
        for case, milliseconds in taken.items():
            flops = 2 * tokens * inputs * outputs
            note = f"{flops / milliseconds / 1e9:.0f} TFLOP/s"
            yield Row(f"{name}, {tokens} tokens, dense {case}", None, milliseconds, "ms", note)
        cases = [("2:4", "2:4", lambda: _two_of_four(x, w, gy))]
        for size, sparsity in BLOCKS:
            text = f"blocks of {size} at {sparsity:.0%}"
            cases.append(("blocks", text, lambda n=size, s=sparsity: _blocks(x, w, gy, n, s)))
        for pattern, text, build in cases:
            counted = gains[pattern] if bench.cuda and tokens >= FROM_TOKENS else []
            yield from _gain(
                bench, f"{name}, {tokens} tokens, {text}", build, dense, rounds, counted
            )


def _gain(
    bench: Bench,
    case: str,
    build: Callable[[], dict[str, Callable[[], Tensor]]],
    dense: dict[str, Callable[[], object]],
    rounds: int,
    gains: list[float],
) -> Iterator[Row]:
    """Yield the gains of one pattern over dense, each timed beside it."""
    try:
        for part, sparse in build().items():
            taken = bench.interleaved({"dense": dense[part], "sparse": sparse}, rounds)
            gain = taken["dense"] / taken["sparse"]
            gains.append(gain)
            yield Row(f"{case}, {part}", value=gain, unit="x", note=f"wanted: {WANTED}")
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        why = "" if bench.cuda else "it needs a GPU: "
        yield Row(case, note=f"{why}{type(error).__name__}: {error}"[:200])


def _two_of_four(x: Tensor, w: Tensor, gy: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the products with a weight that is 2:4, and whose transpose is 2:4, too."""
    mask = acdc.NM(2, 4, transposable=True).select({"w": w.abs().float()})["w"]
    kept = w * mask
    forward = torch.sparse.to_sparse_semi_structured(kept)
    backward = torch.sparse.to_sparse_semi_structured(kept.t().contiguous())
    return {
        "forward": lambda: F.linear(x, forward),
        "input gradient": lambda: F.linear(gy, backward),
    }


def _blocks(
    x: Tensor, w: Tensor, gy: Tensor, size: int, sparsity: float
) -> dict[str, Callable[[], Tensor]]:
    """Return the products with a weight in which whole blocks are zero."""
    from torch.sparse._triton_ops import bsr_dense_mm

    pattern = acdc.Block((size, size), sparsity)
    kept = w * pattern.select({"w": w.abs().float()})["w"]
    forward = kept.to_sparse_bsr((size, size))
    backward = kept.t().contiguous().to_sparse_bsr((size, size))
    columns, gy_columns = x.t().contiguous(), gy.t().contiguous()
    return {
        "forward": lambda: bsr_dense_mm(forward, columns),
        "input gradient": lambda: bsr_dense_mm(backward, gy_columns),
    }
