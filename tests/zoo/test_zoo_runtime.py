"""Networks of other libraries in the runtime, beside themselves in PyTorch."""

from __future__ import annotations

from pathlib import Path

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
        for name, weight in model.named_parameters():
            if name.endswith("in_proj_weight"):
                weight *= torch.rand_like(weight) > sparsity


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


ONE_PROGRAM = {
    "timm": {
        "vit_tiny_patch16_224": 224, "deit3_small_patch16_224": 224, "convnext_atto": 64,
        "efficientnet_b0": 64, "mobilenetv3_small_100": 64, "densenet121": 64, "regnety_002": 64,
        "repvgg_a0": 64, "resnet26": 64,
    },
    "torchvision": {
        "vit_b_16": 224, "convnext_tiny": 64, "efficientnet_b0": 64, "mobilenet_v2": 64,
        "mobilenet_v3_small": 64, "densenet121": 64, "mnasnet0_5": 64, "regnet_y_400mf": 64,
        "resnet18": 64, "vgg11_bn": 224,
    },
}  # fmt: skip


def built(library: str, name: str) -> nn.Module:
    if library == "timm":
        model: nn.Module = pytest.importorskip("timm").create_model(name, num_classes=10)
    else:
        models = pytest.importorskip("torchvision").models
        model = getattr(models, name)(num_classes=10)
    return model.eval()


@pytest.mark.parametrize(
    ("library", "name"),
    [(library, name) for library in ONE_PROGRAM for name in ONE_PROGRAM[library]],
)
def test_it_is_one_program_that_can_be_saved(library: str, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, size = built(library, name), ONE_PROGRAM[library][name]
    prune(model)
    x = torch.randn(2, 3, size, size)
    runtime = acdc.Runtime(model, x, strict=True)
    loaded = acdc.Runtime.load(runtime.save(tmp_path / "net"))
    for batch in (x, x[:1]):
        with torch.no_grad():
            want, got = model(batch), runtime(batch)
        assert (got - want).abs().max() <= LIMIT * want.abs().max()
        assert torch.equal(loaded(batch), got)
