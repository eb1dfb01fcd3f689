"""Dropout: masks that the kernels draw beside PyTorch's, alone and in training steps.

    python benchmarks/dropout.py [--rounds 15] [--seconds 0.2]

A mask is filled by ``bernoulli_`` and ``div_``, or by the kernels of each instruction set: the
numbers are the same. An attention with dropout is a forward and a backward pass. A step is one of a
network of ``acdc bench zoo`` in a sparse phase: dense PyTorch, the engine with PyTorch's masks, and
the engine as it is take turns. A ratio is the median over the rounds, with its quartiles.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from acdc.bench.step import OnEngine, Training
from acdc.bench.zoo import find
from acdc.engine import dropout, native
from common import Contenders, measure, save

MASKS = {"mask, 512 x 384": (512, 384), "mask, 1024 x 1536": (1024, 1536)}
ATTENTIONS = {"attention, 16 x 6 heads x 64 words of 64": (16, 6, 64, 64)}
NETWORKS = ("hf_bert", "hf_gpt2", "torch_encoder")
SPARSITIES = (0.9, 0.95)
P = 0.1


@contextmanager
def masks_of_pytorch() -> Iterator[None]:
    """Let PyTorch draw all masks inside this context."""
    plain = dropout.draws_as_pytorch
    dropout.draws_as_pytorch = lambda: False
    try:
        yield
    finally:
        dropout.draws_as_pytorch = plain


def masks(shape: tuple[int, ...]) -> Contenders:
    """Return who fills a mask."""
    mask, state = torch.empty(shape), torch.get_rng_state()

    def draw(isa: str) -> Callable[[], object]:
        return lambda: native.bernoulli(state, mask, 1 - P, 1 / (1 - P), isa)

    sets = {isa: draw(isa) for isa in native.instruction_sets()}
    return {
        "pytorch": lambda: mask.bernoulli_(1 - P).div_(1 - P),
        **sets,
        "engine": lambda: dropout.draw(mask, P),
    }


def attentions(shape: tuple[int, ...]) -> Contenders:
    """Return who computes an attention with dropout."""
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))

    def passes(function: Callable[..., Any]) -> Callable[[], object]:
        return lambda: function(q, k, v, dropout_p=P).sum().backward()

    return {
        "pytorch": passes(F.scaled_dot_product_attention),
        "engine": passes(dropout.attention),
    }


def steps(name: str, sparsity: float) -> Contenders:
    """Return who takes a training step of a network."""
    network = find(name)
    dense, engine = Training(network), OnEngine(network, sparsity, "uniform")
    engine.settle()

    def plain() -> None:
        with masks_of_pytorch():
            engine.step()

    return {"dense": dense.step, "pytorch": plain, "engine": engine.step}


def main() -> None:
    """Measure all cases, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a turn, at least one call")
    args = parser.parse_args()
    if not dropout.draws_as_pytorch():
        raise SystemExit("This build of PyTorch draws in its own way: there is nothing to measure.")
    cases: dict[str, Callable[[], Contenders]] = {
        **{case: lambda s=shape: masks(s) for case, shape in MASKS.items()},
        **{case: lambda s=shape: attentions(s) for case, shape in ATTENTIONS.items()},
        **{
            f"{name} at {100 * s:g} %": lambda n=name, s=s: steps(n, s)
            for name in NETWORKS
            for s in SPARSITIES
        },
    }
    rows = []
    for case, contenders in cases.items():
        row = {"case": case} | measure(contenders(), args.rounds, args.seconds)
        rows.append(row)
        ratios = [f"{k} x{v:.2f}" for k, v in row.items() if k.endswith("_ratio")]
        print(f"{case:42} {', '.join(ratios).replace('_ratio', '')}", flush=True)
    print(save("dropout", rows, rounds=args.rounds, seconds=args.seconds))


if __name__ == "__main__":
    main()
