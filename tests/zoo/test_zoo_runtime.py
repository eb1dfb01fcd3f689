"""Networks of other libraries in the runtime, beside themselves in PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import acdc
from acdc.bench.zoo import ZOO
from acdc.engine.graph import is_layer

LIMIT = 1e-5  # of the largest number of the result


def prune(model: nn.Module, sparsity: float = 0.9) -> None:
    """Prune every layer but the last by magnitude, and give BatchNorms statistics of a run."""
    layers = [module for module in model.modules() if is_layer(module)]
    with torch.no_grad():
        nn.init.normal_(layers[-1].weight)  # some heads start at zero
        for layer in layers[:-1]:
            size = layer.weight.abs()
            layer.weight *= size > size.flatten().kthvalue(int(sparsity * size.numel())).values
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)


@pytest.mark.parametrize("name", ZOO)
def test_a_network_in_the_runtime_computes_what_it_computes_in_pytorch(name: str) -> None:
    network = ZOO[name]
    if network.missing:
        pytest.skip(network.missing)
    torch.manual_seed(0)
    model, x = network.build().eval(), network.data()[0][:2]
    prune(model)
    runtime = acdc.Runtime(model, x)
    for batch in (x, x[:1]):
        with torch.no_grad():
            want, got = model(batch), runtime(batch)
        want, got = getattr(want, "logits", want), getattr(got, "logits", got)
        assert (got - want).abs().max() <= LIMIT * want.abs().max()
    rows = runtime.explain().rows
    assert sum(row.how == "sparse" for row in rows) >= 4
