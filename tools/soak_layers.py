"""Trials of which weights are pruned: random models, patterns and choices."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import acdc
from acdc.errors import InputError
from acdc.kinds import KINDS

_SIZES = (4, 8, 12)


def _conv(draw: random.Random, transposed: bool) -> tuple[nn.Module, tuple[int, ...]]:
    dims, groups = draw.choice((1, 2, 3)), draw.choice((1, 2, 4))
    inputs, outputs = draw.choice(_SIZES), draw.choice(_SIZES)
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    layer = kind(
        inputs, outputs, draw.choice((1, 2, 3)), draw.choice((1, 2)), groups=groups,
        dilation=draw.choice((1, 2)),
    )  # fmt: skip
    return layer, (3, inputs, *(5,) * dims)


def _layer(draw: random.Random) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a random layer, and the inputs of a call."""
    kind = draw.choice(("conv", "transposed", "linear", "rnn", "cell", "attention"))
    if kind in ("conv", "transposed"):
        layer, shape = _conv(draw, kind == "transposed")
        return layer, (torch.randn(shape),)
    size = draw.choice(_SIZES)
    if kind == "linear":
        return nn.Linear(size, draw.choice(_SIZES)), (torch.randn(3, size),)
    if kind == "rnn":
        family = draw.choice((nn.RNN, nn.GRU, nn.LSTM))
        more: dict[str, Any] = {"proj_size": 4} if family is nn.LSTM and draw.random() < 0.5 else {}
        hidden, two = draw.choice((8, 12)), draw.random() < 0.5
        layer = family(size, hidden, draw.choice((1, 2)), bidirectional=two, **more)
        return layer, (torch.randn(4, 3, size),)
    if kind == "cell":
        cell = draw.choice((nn.RNNCell, nn.GRUCell, nn.LSTMCell))
        return cell(size, draw.choice(_SIZES)), (torch.randn(3, size),)
    keys, values = draw.choice(((size, size), (4, 8)))
    layer = nn.MultiheadAttention(size, 2, kdim=keys, vdim=values)
    return layer, (torch.randn(3, 2, size), torch.randn(5, 2, keys), torch.randn(5, 2, values))


class _Several(nn.Module):
    """Layers beside one another, an embedding, and parameters that belong to no layer."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        made = [_layer(draw) for _ in range(draw.randint(1, 4))]
        self.layers = nn.ModuleList(layer for layer, _ in made)
        self.calls = [inputs for _, inputs in made]
        self.embedding, self.table = nn.Embedding(4, 8), nn.Parameter(torch.randn(4, 8))
        self.head = nn.Linear(8, 4)
        if draw.random() < 0.5:
            self.head.weight = self.embedding.weight

    def forward(self) -> Tensor:
        total = self.head(self.embedding(torch.arange(4)) + self.table).square().mean()
        for layer, inputs in zip(self.layers, self.calls, strict=True):
            out = layer(*inputs)
            out = out[0] if isinstance(out, tuple) else out
            total = total + out.square().mean()
        return total


def _pattern(draw: random.Random) -> acdc.Pattern:
    scope = draw.choice(("global", "uniform", "erk"))
    return draw.choice(
        (
            acdc.Unstructured(draw.choice((0.3, 0.5, 0.8)), scope),
            acdc.NM(draw.choice((1, 2)), draw.choice((4, 3))),
            acdc.Block(draw.choice(((4, 1), (2, 2), (1, 4))), 0.5, scope),
        )
    )


def contract(seed: int) -> str | None:
    """Train a random model in four phases; count and look at the zeros after each step."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = _Several(draw)
    types = tuple(kind for kind in KINDS if draw.random() < 0.8)
    params = draw.choice(((), ("table",), ("embedding",)))
    pattern = _pattern(draw)
    layers = acdc.Layers(types=types, params=params, skip_first=draw.random() < 0.2)
    phases = [(kind, "1ep") for kind in ("dense", "sparse", "dense", "sparse")]
    method = acdc.ACDC(pattern, acdc.phases(4, phases).resolve(2), layers=layers)
    optimizer = draw.choice((torch.optim.SGD, torch.optim.AdamW))(model.parameters(), lr=0.01)
    try:
        sparsifier = acdc.Sparsifier(method, model, optimizer)
    except InputError as error:
        return None if "Nothing to prune" in str(error) else f"refused: {error}"
    what = f"{pattern} on {[type(layer).__name__ for layer in model.layers]}, types {types}"
    large = {name for name, param in model.named_parameters() if param.ndim > 1}
    if set(sparsifier.refused) | set(sparsifier.params) != large:
        return f"{what}: a parameter is neither pruned nor refused"
    budget = pattern.total(method.select(model)[0].shapes)  # type: ignore[attr-defined]
    for step in range(8):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
        support = sparsifier.support
        wanted = support.numel if sparsifier.phase.kind == "dense" else budget
        if support.nnz != wanted:
            return f"{what}: {support.nnz} weights kept at step {step}, and not {wanted}"
        for name, mask in support.items():
            bits = model.get_parameter(name).detach()[~mask].view(torch.int32)
            if bits.any():
                return f"{what}: a weight of {name} outside of the support is not +0.0"
    str(sparsifier)
    return None


def groups(seed: int) -> str | None:
    """Compare N:M and the axes of a random layer with loops over single weights."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model, _ = _layer(draw)
    n, m = draw.choice(((1, 2), (2, 4), (1, 4)))
    for name, shape in acdc.Layers(types=KINDS).select(model).shapes.items():
        pattern = acdc.NM(n, m)
        weight = dict(model.named_parameters())[name].detach().abs()
        axis = 0 if isinstance(model, nn.modules.conv._ConvTransposeNd) else 1
        part = shape[axis] // (model.groups if axis == 0 else 1)
        if part % m:
            if pattern.refuses(name, shape) is None:
                return f"{model}: {name} does not divide into groups of {m}, and is not refused"
            continue
        chosen = acdc.Layers(types=KINDS, params=(name,)).select(model)
        only = acdc.score.Scores({name: chosen.shapes[name]}, lambda _, w=weight: w)
        mask = pattern.select(only)[name]
        others = [range(size) if i != axis else (0,) for i, size in enumerate(shape)]
        for place in itertools.product(*others):
            for start in range(0, shape[axis], m):
                index = tuple(
                    slice(start, start + m) if i == axis else p for i, p in enumerate(place)
                )
                kept, rest = weight[index][mask[index]], weight[index][~mask[index]]
                if len(kept) != n or kept.min() < rest.max():
                    return f"{model}: the group of {name} at {index} does not keep its {n} largest"
    return None


TRIALS: dict[str, Callable[[int], str | None]] = {"layers": contract, "groups": groups}
