"""Networks in a sparse phase on the engine, against masked dense PyTorch in float64."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from acdc.engine import segment
from engine_nets import BACKENDS, NETWORKS, Pair

networks = pytest.mark.parametrize("name", NETWORKS)
backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def runs(monkeypatch, caplog):
    """The runs of layers that the kernels computed; a fallback to PyTorch fails the test."""
    caplog.set_level(logging.WARNING, "acdc.engine")
    count = []
    compute = segment.compute
    monkeypatch.setattr(segment, "compute", lambda *args: count.append(1) or compute(*args))
    yield count
    assert [r.message for r in caplog.records] == []


def fresh(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = NETWORKS[name].build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


@networks
@backends
def test_training(name: str, backend: str, runs: list[int]) -> None:
    network = NETWORKS[name]
    pair = Pair(fresh(name), network.shape, backend_name=backend)
    for seed, samples in enumerate((5, 33, 2, 20)):  # ragged, and frames that grow
        runs.clear()
        pair.step(samples, seed)
        assert len(runs) == network.runs


@networks
@backends
def test_evaluation(name: str, backend: str, runs: list[int]) -> None:
    network = NETWORKS[name]
    pair = Pair(fresh(name), network.shape, backend_name=backend)
    pair.step(6)
    pair.train(False)
    for seed, (samples, grad) in enumerate([(1, False), (9, True), (4, False)]):
        runs.clear()
        pair.step(samples, seed, grad)
        assert len(runs) == network.runs_eval
    pair.train(True)
    pair.step(6, seed=9, grad=False)  # statistics move without gradients, too
