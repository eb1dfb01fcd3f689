"""Random networks in the runtime, beside PyTorch: the networks of ``test_engine_random.py``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import acdc
from acdc.engine import native
from support.engine_nets import cut
from test_engine_random import networks, supports

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a compiler")


def settle(model: nn.Module) -> None:
    """Put a model into evaluation mode, with statistics that are not trivial."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        module.training = False


@pytest.mark.slow
@settings(
    max_examples=int(os.environ.get("ACDC_EXAMPLES", "60")),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_any_network(data: st.DataObject) -> None:
    model, shape, samples = data.draw(networks())
    masks = data.draw(supports(model))
    model.double()
    cut(model, masks)
    settle(model)
    x = torch.randn(samples, *shape, dtype=torch.float64)
    isa = data.draw(st.sampled_from(native.instruction_sets()))
    runtime = acdc.Runtime(model, x, isa=isa, threads=data.draw(st.sampled_from([1, 2, 3])))
    for given_x in (x, x[:1]):
        with torch.no_grad():
            wanted = model(given_x)
        torch.testing.assert_close(runtime(given_x), wanted, rtol=1e-9, atol=1e-9)
    if not runtime._network.in_torch:
        with tempfile.TemporaryDirectory() as folder:
            loaded = acdc.Runtime.load(runtime.save(Path(folder) / "net"), isa=isa)
        torch.testing.assert_close(loaded(x), runtime(x), rtol=0, atol=0)
