"""What a sparsifier keeps alive, and what keeps a sparsifier alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import acdc

METHODS: dict[str, Callable[..., Any]] = {
    "acdc": lambda plan, pattern: acdc.ACDC(pattern, plan),
    "rigl": lambda plan, pattern: acdc.RigL(pattern, plan),
    "topkast": lambda plan, pattern: acdc.TopKAST(pattern, plan),
}


def train(method: str, engine: bool, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a network in a sparse phase, and its optimizer. Nobody holds the sparsifier."""
    net = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(16, 300)
    plan = acdc.constant("sparse", epochs=1).resolve(100)
    made = METHODS[method](plan, acdc.Unstructured(0.9))
    runs = acdc.Engine(net, x, choose=False) if engine else None
    acdc.Sparsifier(made, net, optimizer, engine=runs)
    for _ in range(steps):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    return net, optimizer


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_trained_network_is_freed(method: str, engine: bool, steps: int) -> None:
    """A process that trains many networks, such as a grid, has memory for one at a time."""
    net, optimizer = train(method, engine, steps)
    weak = [weakref.ref(thing) for thing in (net, optimizer, net[0].weight)]
    del net, optimizer
    gc.collect()
    assert [ref() for ref in weak] == [None, None, None]


def test_a_sparsifier_that_nobody_holds_masks_on() -> None:
    net, optimizer = train("acdc", False, 2)
    gc.collect()
    pruned = net[0].weight.detach() == 0
    assert 0.5 < pruned.float().mean() < 1
    optimizer.zero_grad()
    net(torch.randn(16, 300)).square().sum().backward()
    assert net[0].weight.grad is not None
    assert not net[0].weight.grad[pruned].any()
    optimizer.step()
    assert not net[0].weight.detach()[pruned].any()
