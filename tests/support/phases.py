"""A training of a ``Case`` through four phases, with counts and zeros checked after every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import acdc
from acdc.layers import Layers
from acdc.pattern import NM, Pattern
from support.helpers import SCHEDULE, TOTAL, is_plus_zero, sgd
from support.zoo import EVERY, Case


def train(
    case: Case,
    pattern: Pattern,
    *,
    engine: bool = False,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
) -> tuple[nn.Module, acdc.Sparsifier]:
    """Train through four phases, and check counts and zeros after every step."""
    torch.manual_seed(0)
    model = case.build()
    stepper = optimizer(model)
    runs = acdc.Engine(model, case.example, choose=False) if engine else None
    method = acdc.ACDC(pattern, SCHEDULE, layers=Layers(types=EVERY))
    sparsifier = acdc.Sparsifier(method, model, stepper, engine=runs)
    shapes = {name: method.layers.select(model).shapes[name] for name in sparsifier.params}  # type: ignore[union-attr]
    budget, exact = pattern.total(shapes), pattern.counts(shapes)
    for step in range(TOTAL):
        kind = sparsifier.phase.kind
        stepper.zero_grad()
        case.loss(model, step).backward()
        stepper.step()
        after = sparsifier.phase.kind
        assert sparsifier.step == step + 1
        support = sparsifier.support
        assert support.nnz == (support.numel if after == "dense" else budget), (step, kind)
        if after == "sparse":
            assert exact is None or support.counts() == exact
            for name, mask in support.items():
                weight = model.get_parameter(name)
                assert is_plus_zero(weight[~mask]), (step, name)
                assert mask.any()
                if isinstance(pattern, NM):
                    groups = mask.movedim(shapes[name].inputs, -1).unflatten(-1, (-1, pattern.m))
                    assert (groups.sum(-1) == pattern.n).all(), (step, name)
    assert [change.to for change in sparsifier.changes] == ["sparse", "dense", "sparse"]
    return model, sparsifier


def every_other_stands_in_refused(model: nn.Module, sparsifier: acdc.Sparsifier) -> None:
    large = {name for name, param in model.named_parameters() if param.ndim > 1}
    assert sparsifier.refused.keys() | sparsifier.params.keys() == large
    assert not sparsifier.refused.keys() & sparsifier.params.keys()
