"""The networks: exact sizes, names, initialisation, and differences from the originals."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from acdc.errors import InputError
from acdc.layers import Layers
from acdc.runs.models import (
    CifarResNet,
    MobileNetV1,
    Model,
    ResNet50,
    SmallGPT,
    SmallResNet,
    WideResNet,
)

FASHION = SmallResNet(width=32, stem_stride=2, size=28)
SPECS = [
    SmallResNet(),
    FASHION,
    SmallResNet(width=8, blocks=2, channels=3, size=9, classes=3),
    CifarResNet(),
    CifarResNet(depth=32, width=4, classes=100),
    WideResNet(),
    WideResNet(depth=10, widen=1, classes=7),
    ResNet50(),
    ResNet50(stride_in_1x1=True, classes=5),
    MobileNetV1(),
]


@cache
def on_meta(spec: Model) -> nn.Module:
    with torch.device("meta"):
        return spec.build()


def seeded(spec: Model, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return spec.build()


# spec, convolutions and linear layers, their weights, all parameters, multiply-adds
SIZES = [
    (ResNet50(), 54, 25_502_912, 25_557_032, 4_089_184_256),
    (ResNet50(stride_in_1x1=True), 54, 25_502_912, 25_557_032, 3_857_973_248),
    (MobileNetV1(), 28, 4_209_088, 4_231_976, 568_740_352),
    (WideResNet(), 29, 36_518_832, 36_546_980, 5_951_175_168),
    (WideResNet(stride_in_conv2=False), 29, 36_518_832, 36_546_980, 5_243_386_368),
    (CifarResNet(), 22, 270_896, 272_474, 40_813_184),
    # By hand, from the shapes of the ten layers.
    (SmallResNet(), 10, 77_072, 77_754, 763_520),
    (FASHION, 10, 306_720, 308_074, 10_150_272),
]


@pytest.mark.parametrize(("spec", "layers", "weights", "parameters", "macs"), SIZES, ids=str)
def test_sizes(spec: Model, layers: int, weights: int, parameters: int, macs: int) -> None:
    network = spec.network()
    assert len(network.layers) == layers
    assert network.weights == weights
    assert network.macs == macs
    assert sum(p.numel() for p in on_meta(spec).parameters()) == parameters


# spec, what stays dense, layers left, their weights
SUBSETS = [
    (ResNet50(), ("conv1", "fc"), 52, 23_445_504),
    (MobileNetV1(), ("conv1", "*.depthwise"), 14, 4_163_584),
    (MobileNetV1(), ("conv1", "fc", "*.pointwise"), 13, 44_640),
    (MobileNetV1(), ("blocks.*", "fc"), 1, 864),
    (CifarResNet(), ("*.downsample.0",), 20, 268_336),
]


@pytest.mark.parametrize(("spec", "dense", "layers", "weights"), SUBSETS, ids=str)
def test_sizes_without_some_layers(
    spec: Model, dense: tuple[str, ...], layers: int, weights: int
) -> None:
    left = Layers(exclude=dense).select(on_meta(spec))
    assert len(left) == layers
    assert sum(p.numel() for p in left.values()) == weights


# ResNet-50 v1.5, equal to the layer list of google-research/rigl.
RESNET50 = [
    ("conv1", 9_408, 118_013_952),
    ("layer1.0.conv1", 4_096, 12_845_056),
    ("layer1.0.conv2", 36_864, 115_605_504),
    ("layer1.0.conv3", 16_384, 51_380_224),
    ("layer1.0.downsample.0", 16_384, 51_380_224),
    ("layer1.1.conv1", 16_384, 51_380_224),
    ("layer2.0.conv1", 32_768, 102_760_448),
    ("layer2.0.conv2", 147_456, 115_605_504),
    ("layer2.0.conv3", 65_536, 51_380_224),
    ("layer2.0.downsample.0", 131_072, 102_760_448),
    ("layer4.0.downsample.0", 2_097_152, 102_760_448),
    ("fc", 2_048_000, 2_048_000),
]


@pytest.mark.parametrize(("name", "weights", "macs"), RESNET50)
def test_layers_of_resnet50(name: str, weights: int, macs: int) -> None:
    layer = {layer.name: layer for layer in ResNet50().network().layers}[f"{name}.weight"]
    assert (layer.weights, layer.macs) == (weights, macs)


def torchvision_keys(blocks: tuple[int, ...], convs: int, first_downsample: bool) -> set[str]:
    def norm(name: str) -> set[str]:
        parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return {f"{name}.{part}" for part in parts}

    keys = {"conv1.weight", "fc.weight", "fc.bias"} | norm("bn1")
    for stage, depth in enumerate(blocks, 1):
        for block in range(depth):
            path = f"layer{stage}.{block}"
            for conv in range(1, convs + 1):
                keys |= {f"{path}.conv{conv}.weight"} | norm(f"{path}.bn{conv}")
            if block == 0 and (stage > 1 or first_downsample):
                keys |= {f"{path}.downsample.0.weight"} | norm(f"{path}.downsample.1")
    return keys


@pytest.mark.parametrize(
    ("spec", "keys"),
    [
        (ResNet50(), torchvision_keys((3, 4, 6, 3), 3, True)),
        (CifarResNet(), torchvision_keys((3, 3, 3), 2, False)),
        (SmallResNet(), torchvision_keys((1, 1, 1), 2, False)),
    ],
    ids=["ResNet-50", "ResNet-20", "SmallResNet"],
)
def test_resnets_have_torchvision_names(spec: Model, keys: set[str]) -> None:
    assert set(on_meta(spec).state_dict()) == keys


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_images_to_logits(spec: Model) -> None:
    x = torch.empty(2, *spec.input_shape, device="meta")
    classes = dataclasses.asdict(spec)["classes"]
    assert on_meta(spec)(x).shape == (2, classes)


def test_characters_to_logits() -> None:
    """The classes are the second dimension, and a character sees only earlier characters."""
    spec = SmallGPT(width=16, depth=2, heads=2, context=6, vocabulary=11)
    net = seeded(spec).eval()
    assert on_meta(spec)(torch.zeros(3, 6, dtype=torch.int64, device="meta")).shape == (3, 11, 6)
    assert spec.example(3).shape == (3, 6)
    assert spec.example(3).dtype == torch.int64
    x = torch.tensor([[1, 2, 3, 4, 5, 6]])
    later = x.clone()
    later[0, 3] = 9
    one, other = net(x), net(later)
    assert torch.equal(one[..., :3], other[..., :3])
    assert (one[..., 3:] != other[..., 3:]).any(1).all()
    assert net(x[:, :4]).shape == (1, 11, 4)


def test_a_gpt_has_the_cost_of_its_matrices() -> None:
    spec = SmallGPT(width=16, depth=2, heads=2, context=6, vocabulary=11)
    network = spec.network()
    assert network.weights == 2 * 12 * 16**2 + 16 * 11
    assert network.macs == 6 * network.weights
    nn.functional.cross_entropy(seeded(spec)(spec.example(2)), spec.example(2)).backward()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"width": 30}, "a multiple of 4"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"depth": 0}, "depth=0"),
    ],
)
def test_a_gpt_that_cannot_be_is_a_sentence(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        SmallGPT(**fields)


@pytest.mark.parametrize(
    "spec", [SmallResNet(), FASHION, CifarResNet(depth=8), WideResNet(10, 1)], ids=str
)
def test_every_parameter_learns(spec: Model) -> None:
    model = seeded(spec)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, *spec.input_shape, generator=generator)
    y = torch.arange(8)
    nn.functional.cross_entropy(model(x), y).backward()
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        assert grad.isfinite().all(), name
        # All that follows a WideResNet's convolution begins with a BatchNorm, which takes out the
        # mean: the gradient of its biases is zero but for rounding.
        if name.endswith("bias") and isinstance(
            model.get_submodule(name.removesuffix(".bias")), nn.Conv2d
        ):
            assert isinstance(spec, WideResNet)
            continue
        assert grad.abs().max() > 1e-5, name


def test_a_model_is_the_value_of_its_spec_and_the_seed() -> None:
    one, two, other = seeded(SmallResNet()), seeded(SmallResNet()), seeded(SmallResNet(), seed=1)
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.get_parameter("conv1.weight"), other.get_parameter("conv1.weight"))
    assert SmallResNet() == SmallResNet(width=16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SmallResNet().width = 3  # type: ignore[misc]


def test_network_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    ResNet50().network()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("spec", [CifarResNet(), ResNet50(), SmallResNet(width=64)], ids=str)
def test_resnets_start_from_hes_normal(spec: Model) -> None:
    for name, module in seeded(spec).named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5_000:
            k, c_out = module.kernel_size[0], module.out_channels
            expected = math.sqrt(2 / (k * k * c_out))
            # The sample deviation of n normal numbers is off by sigma / sqrt(2 n): 5 of them.
            tolerance = 5 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(expected, rel=tolerance), name
            # Normal, not uniform: 4 to 5 % of the values lie beyond two deviations.
            assert 0.03 < (module.weight.abs() > 2 * expected).float().mean() < 0.06, name
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name


@pytest.mark.parametrize("spec", [MobileNetV1(), WideResNet(depth=10, widen=4)], ids=str)
def test_the_others_start_as_torch_starts(spec: Model) -> None:
    for name, module in seeded(spec).named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5_000:
            bound = 1 / math.sqrt(module.weight[0].numel())  # uniform within it
            assert 0.99 * bound < module.weight.abs().max() <= bound, name


def test_wide_resnet_is_the_papers_variant() -> None:
    model = on_meta(WideResNet())
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.bias is not None for conv in convs)
    for stage, stride in (("layer1", 1), ("layer2", 2), ("layer3", 2)):
        for block in range(4):
            expected = stride if block == 0 else 1
            assert model.get_submodule(f"{stage}.{block}.conv1").stride == (1, 1)
            assert model.get_submodule(f"{stage}.{block}.conv2").stride == (expected, expected)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.3] * 12
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [norm.momentum for norm in norms] == [0.1] * 24 + [0.9]
    assert norms[-1] is model.get_submodule("bn1")


def test_the_stride_of_resnet50_moves() -> None:
    for spec, first, second in ((ResNet50(), 1, 2), (ResNet50(stride_in_1x1=True), 2, 1)):
        model = on_meta(spec)
        for stage in ("layer2.0", "layer3.0", "layer4.0"):
            assert model.get_submodule(f"{stage}.conv1").stride == (first, first)
            assert model.get_submodule(f"{stage}.conv2").stride == (second, second)


def test_shortcuts_are_convolutions_only_where_the_shape_changes() -> None:
    names = [name for name, _ in on_meta(CifarResNet()).named_modules() if "downsample.0" in name]
    assert names == ["layer2.0.downsample.0", "layer3.0.downsample.0"]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: CifarResNet(depth=21), "depth=21.* 8, 14, 20, 26"),
        (lambda: CifarResNet(depth=2), "depth=2.* 8, 14, 20, 26"),
        (lambda: CifarResNet(width=0), "width=0.*from 1 up"),
        (lambda: WideResNet(depth=20), "depth=20.* 10, 16, 22, 28"),
        (lambda: WideResNet(widen=0), "widen=0.*from 1 up"),
        (lambda: WideResNet(dropout=1.0), "dropout=1.0.*from 0"),
        (lambda: WideResNet(dropout=-0.1), "dropout=-0.1.*from 0"),
        (lambda: ResNet50(classes=-1), "ResNet50.*classes=-1"),
        (lambda: MobileNetV1(classes=True), "MobileNetV1.*classes=True"),
        (lambda: SmallResNet(width=1.5), "width=1.5"),  # type: ignore[arg-type]
        (lambda: SmallResNet(blocks=0), "blocks=0"),
        (lambda: SmallResNet(stem_stride=0), "stem_stride=0"),
        (lambda: SmallResNet(channels=0), "channels=0"),
        (lambda: SmallResNet(size=0), "size=0"),
    ],
)
def test_bad_specs_are_refused_with_a_sentence(make: object, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make()  # type: ignore[operator]
