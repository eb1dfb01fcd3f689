"""Which weights of which models are pruned, along which axes, and what is said of the others."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import acdc
from acdc.cost import measure
from acdc.errors import InputError
from acdc.kinds import keeps_zeros
from acdc.layers import Layers
from acdc.methods.dense import Dense
from acdc.methods.families import choose
from acdc.pattern import NM, Block, Pattern, Unstructured
from acdc.shape import Shape
from support.helpers import SCHEDULE, TOTAL, sgd
from support.phases import every_other_stands_in_refused, train
from support.zoo import EVERY, OWN, TRANSFORMERS, Tagger, Translator, UNet, images, words

FULL = os.environ.get("ACDC_FULL") == "1"


def names(model: nn.Module, **fields: Any) -> list[str]:
    return list(Layers(**fields).select(model))


def refused(model: nn.Module, **fields: Any) -> dict[str, str]:
    return Layers(**fields).split(model)[1]


# --- the contract, for every kind ----------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(
    "pattern", [Unstructured(0.8), Unstructured(0.8, "erk"), NM(2, 4), Block((2, 2), 0.5)], ids=str
)
def test_four_phases_keep_exact_counts_and_zeros(name: str, pattern: Pattern) -> None:
    model, sparsifier = train(OWN[name], pattern)
    if isinstance(pattern, Unstructured):
        assert len(sparsifier.params) == OWN[name].weights
    every_other_stands_in_refused(model, sparsifier)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_four_phases_of_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    case = TRANSFORMERS[name]
    patterns = (Unstructured(0.9), NM(2, 4)) if FULL else (Unstructured(0.9),)
    for pattern in patterns:
        model, sparsifier = train(case, pattern, optimizer=_adamw)
        assert pattern != Unstructured(0.9) or len(sparsifier.params) == case.weights
        every_other_stands_in_refused(model, sparsifier)
        pair = sparsifier.pair()
        assert pair.support.nnz == sparsifier.support.nnz


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("name", OWN)
def test_layers_that_the_engine_has_no_kernels_for_run_dense_and_right(name: str) -> None:
    plain, by_torch = train(OWN[name], Unstructured(0.8))
    ran, by_engine = train(OWN[name], Unstructured(0.8), engine=True)
    assert by_engine.support.counts().keys() == by_torch.support.counts().keys()
    for (key, mine), other in zip(
        ran.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4, msg=key)


def test_an_engine_leaves_layers_with_a_forward_of_their_own_to_it() -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), Padded(8, 8, 3), nn.Flatten(), Equalised(8 * 36, 8), nn.Linear(8, 4)
        )

    x = images(0)
    outputs = []
    for engine in (False, True):
        model = net()
        optimizer = sgd(model)
        runs = acdc.Engine(model, x, choose=False) if engine else None
        method = acdc.ACDC(Unstructured(0.7), SCHEDULE)
        sparsifier = acdc.Sparsifier(method, model, optimizer, engine=runs)
        for _ in range(TOTAL):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert len(sparsifier.params) == 4
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-5)


def test_the_flat_weights_of_an_lstm_are_the_masked_ones() -> None:
    model, sparsifier = train(OWN["lstm tagger"], Unstructured(0.8))
    assert isinstance(model, Tagger)
    model.lstm.flatten_parameters()
    flat = {id(weight) for weight in model.lstm._flat_weights}
    assert {id(w) for n, w in sparsifier.params.items() if n.startswith("lstm")} < flat
    other = Tagger()
    other.load_state_dict(sparsifier.pair().sparse)
    torch.testing.assert_close(other(words(0)), model(words(0)))


def test_other_rnns_and_cells() -> None:
    for kind, gates in ((nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)):
        shapes = Layers(types=("rnn",)).select(kind(6, 4)).shapes
        assert {n: (s, s.stack) for n, s in shapes.items()} == {
            "weight_ih_l0": ((4 * gates, 6), gates),
            "weight_hh_l0": ((4 * gates, 4), gates),
        }
    for cell, gates in ((nn.RNNCell, 1), (nn.GRUCell, 3), (nn.LSTMCell, 4)):
        shapes = Layers(types=("rnn",)).select(cell(6, 4)).shapes
        assert {n: s.stack for n, s in shapes.items()} == {"weight_ih": gates, "weight_hh": gates}


# --- which layers --------------------------------------------------------------------------------


class Tied(nn.Module):
    """A language model whose head is tied to its embedding."""

    def __init__(self, head_first: bool = False) -> None:
        super().__init__()
        if head_first:
            self.lm_head = nn.Linear(16, 50, bias=False)
        self.wte = nn.Embedding(50, 16)
        self.fc = nn.Linear(16, 16)
        if not head_first:
            self.lm_head = nn.Linear(16, 50, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.lm_head(self.fc(self.wte(words)))


def test_an_embedding_and_what_is_tied_to_it_stay_dense() -> None:
    assert names(Tied()) == ["fc.weight"]
    assert refused(Tied()) == {"wte.weight": "an embedding, tied to lm_head.weight"}
    assert names(Tied(head_first=True)) == ["fc.weight"]
    assert refused(Tied(True)) == {"lm_head.weight": "tied to the embedding wte"}


def test_every_name_of_a_tied_weight_means_it() -> None:
    for model, first in ((Tied(), "wte.weight"), (Tied(True), "lm_head.weight")):
        for own in ("lm_head", "wte", "lm_head.weight", "wte.weight", "lm_*"):
            assert names(model, exclude=(own,)) == ["fc.weight"]
            assert names(model, types=(), params=(own,)) == [first]
        for part in (model.lm_head, model.wte):
            assert names(model, exclude=(part,)) == ["fc.weight"]
            assert names(model, types=(), params=(part,)) == [first]
    layers = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    layers["b"].weight = layers["a"].weight
    layers["again"] = layers["c"]
    assert names(layers) == ["a.weight", "c.weight"]
    assert names(layers, exclude=("b",)) == names(layers, include=("again",)) == ["c.weight"]


def test_an_embedding_can_be_pruned_by_name_and_its_head_with_it() -> None:
    model = Tied()
    layers = Layers(params=("wte.weight",))
    method = acdc.ACDC(Unstructured(0.9), SCHEDULE, layers=layers)
    sparsifier = acdc.Sparsifier(method, model, sgd(model))
    for step in range(TOTAL):
        F.cross_entropy(model(words(step)).flatten(0, 1), words(step).flatten()).backward()
        sparsifier.optimizer.step()
    assert int(model.lm_head.weight.count_nonzero()) == sparsifier.support.counts()["wte.weight"]
    assert sparsifier.support.sparsity == pytest.approx(0.9, abs=1e-3)


def test_gpt2_is_pruned_in_its_conv1d_layers() -> None:
    pytest.importorskip("transformers")
    model = TRANSFORMERS["GPT-2"].build()
    one = Layers(params=("*.c_attn.weight",), types=()).select(model)
    assert list(one) == [f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1)]
    shape = one.shapes["transformer.h.0.attn.c_attn.weight"]
    assert (shape, shape.outputs, shape.inputs) == ((16, 48), 1, 0)
    assert refused(model) == {
        "transformer.wte.weight": "an embedding, tied to lm_head.weight",
        "transformer.wpe.weight": "an embedding",
    }
    assert len(names(model, exclude=("lm_head", "*.h.1.*"))) == 4


class Own(nn.Module):
    """A linear layer and a convolution that share no class with PyTorch's, and bare parameters."""

    class Projection(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 4, 6
            self.weight = nn.Parameter(torch.randn(6, 4))

    class Deformable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_channels, self.out_channels, self.groups, self.kernel_size = 4, 6, 2, (3, 3)
            self.weight = nn.Parameter(torch.randn(6, 2, 3, 3))

    class Sub(nn.Linear):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.projection, self.deformable, self.sub = (
            Own.Projection(),
            Own.Deformable(),
            Own.Sub(4, 4),
        )
        self.table = nn.Parameter(torch.randn(5, 4))
        self.bilinear = nn.Bilinear(2, 3, 4)
        self.norm = nn.LayerNorm((3, 4))
        self.mixed = nn.Parameter(torch.randn(2, 4, 8))


def test_layers_of_any_class_and_parameters_by_name() -> None:
    model = Own()
    assert names(model) == ["projection.weight", "deformable.weight", "sub.weight"]
    why = refused(model)
    assert why["table"] == (
        "a parameter of Own, which is no layer of a known type: params names it"
    )
    assert set(why) == {"table", "mixed", "bilinear.weight", "norm.weight", "norm.bias"}
    assert names(model, types=(), params=("table", "bilinear", "mixed")) == [
        "table", "mixed", "bilinear.weight",
    ]  # fmt: skip
    assert names(model, params=("table",), exclude=("table",)) == names(model)


def test_module_objects_are_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert names(model, exclude=(model[1],)) == ["0.weight"]
    assert names(model, include=(model[1][0], "0")) == ["0.weight", "1.0.weight"]
    assert names(model, exclude=(nn.DataParallel(model[0]),)) == ["1.0.weight", "1.1.weight"]
    with pytest.raises(InputError, match=r"exclude holds a Linear that has no parameter.*not of a"):
        names(model, exclude=(copy.deepcopy(model[0]),))
    method = acdc.ACDC(Unstructured(0.5), SCHEDULE, layers=Layers(exclude=(model[1],)))
    assert list(acdc.Sparsifier(method, model, sgd(model)).params) == ["0.weight"]


def test_a_layer_names_all_of_its_weights() -> None:
    model = Tagger()
    every = names(model, types=EVERY)
    assert names(model, types=EVERY, exclude=("lstm",)) == ["head.weight"]
    assert (
        names(model, types=("rnn",)) == names(model, types=EVERY, include=("lstm",)) == every[:-1]
    )
    assert names(model, types=("rnn",), exclude=("*_reverse", "*_l1")) == [
        "lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.weight_hr_l0",
    ]  # fmt: skip
    overrides = Unstructured(0.9, "uniform", {"lstm": 0.0})
    counts = overrides.counts(Layers(types=EVERY).select(model).shapes)
    assert counts is not None
    assert counts["lstm.weight_ih_l0"] == 48 * 8
    assert counts["head.weight"] == 4


def test_the_first_layer_is_a_whole_layer_of_any_type() -> None:
    assert names(Tagger(), types=EVERY, skip_first=True) == ["head.weight"]
    assert "head.weight" not in names(Tagger(), types=EVERY, skip_last=True)
    assert refused(Tagger(), types=EVERY, skip_first=True)["lstm.weight_hh_l1"] == "the first layer"
    # The embedding is no layer, and the tied head is the last one: it stays dense anyway.
    assert names(Tied(), skip_last=True) == ["fc.weight"]


# --- what stays dense, and why -------------------------------------------------------------------


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(x, w, self.bias)


class Padded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Centered(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean(), self.bias)


class CenteredDepthwise(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Equalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.3, self.bias)


class TwoInputs(nn.Linear):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + y)


class Counting(Equalised):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Counting.calls += 1
        return super().forward(x)


def test_a_layer_whose_zeros_are_no_zeros_is_found_by_trying_it() -> None:
    for layer, keeps in (
        (Standardised(4, 8, 3), False),
        (Standardised(4, 8, 3, groups=4), False),
        (Centered(4, 5), False),
        (CenteredDepthwise(8, 8, 3, groups=8), False),
        (Padded(4, 8, 3, groups=2, dilation=2, stride=2), True),
        (Equalised(4, 5), True),
        (TwoInputs(4, 5), True),  # cannot be called with one tensor: an ordinary layer
        (nn.ConvTranspose2d(4, 6, 3, groups=2), True),
    ):
        before = copy.deepcopy(layer.state_dict())
        state = torch.get_rng_state()
        assert keeps_zeros(layer) is keeps, layer
        assert torch.equal(torch.get_rng_state(), state)
        assert all(
            torch.equal(a, b)
            for a, b in zip(before.values(), layer.state_dict().values(), strict=True)
        )
        assert keeps_zeros(copy.deepcopy(layer).to("meta")) is keeps, layer
        assert keeps_zeros(copy.deepcopy(layer).to(torch.bfloat16).eval()) is keeps, layer
    model = nn.Sequential(*(Counting(4, 4) for _ in range(50)))
    assert len(names(model)) == 50
    assert Counting.calls <= 8  # a class is tried once


def computed() -> nn.Module:
    """Weights that are computed from parameters, in every way that PyTorch has."""
    return nn.ModuleDict(
        {
            "weight_norm": parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
            "spectral": parametrizations.spectral_norm(nn.Linear(4, 4)),
            "orthogonal": parametrizations.orthogonal(nn.Linear(4, 4)),
            "old_weight_norm": nn.utils.weight_norm(nn.Linear(4, 4)),
            "old_spectral": nn.utils.spectral_norm(nn.Linear(4, 4)),
            "pruned": torch.nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5),
            "standardised": Standardised(4, 4, 3),
            "plain": nn.Linear(4, 4),
        }
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_computed_from_other_parameters_stays_dense() -> None:
    model = computed()
    assert names(model) == ["plain.weight"]
    why = refused(model)
    large = {name for name, param in model.named_parameters() if param.ndim > 1}
    assert why.keys() == large - {"plain.weight"}
    for layer, by in (
        ("spectral", "SpectralNorm"), ("weight_norm", "WeightNorm"), ("old_spectral", "Spectral"),
        ("orthogonal", "Orthogonal"), ("old_weight_norm", "WeightNorm"), ("pruned", "L1Unstruct"),
    ):  # fmt: skip
        mine = [reason for name, reason in why.items() if name.startswith(f"{layer}.")]
        assert mine, layer
        assert all(f"the weight of {layer} is computed from it ({by}" in r for r in mine), mine
    assert "Standardised computes with other weights" in why["standardised.weight"]
    assert names(model, types=(), params=("spectral",)) == [
        "spectral.parametrizations.weight.original"
    ]


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.packed = nn.Linear(8, 8)
        self.packed.weight = nn.Parameter(
            torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False
        )
        self.frozen = nn.Linear(8, 8).requires_grad_(False)


def test_quantized_and_frozen_weights_are_refused_even_by_name() -> None:
    why = refused(Quantized(), params=("packed.weight", "frozen"))
    assert why == {
        "packed.weight": "quantized: its values are torch.uint8",
        "frozen.weight": "frozen: it requires no gradient",
    }


class OwnLoRA(nn.Linear):
    """As loralib and torchtune write it: the adapters are in the layer itself."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.zeros(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


class BaseLayer(nn.Module):
    """A network that calls its stem ``base_layer`` (DLA of timm): it has no adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer, self.level = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)


def test_adapters_are_told_from_layers() -> None:
    model = nn.Sequential(OwnLoRA(), nn.Linear(8, 8))
    assert names(model) == ["1.weight"]
    assert refused(model) == {
        "0.weight": "an adapter is added to the layer 0: merge them first",
        "0.lora_A": "an adapter of the layer 0",
        "0.lora_B": "an adapter of the layer 0",
    }
    assert names(model, types=(), params=("*.lora_A",)) == ["0.lora_A"]
    assert names(BaseLayer()) == ["base_layer.weight", "level.weight"]


def test_peft_adapters_are_refused_and_their_frozen_base_too() -> None:
    peft = pytest.importorskip("peft")

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    model = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["0"]))
    sentence = "an adapter of the layer base_model.model.0"
    with pytest.raises(InputError, match=rf"Nothing to prune.*frozen.*{sentence}"):
        Layers().select(model)
    method = acdc.ACDC(Unstructured(0.5), SCHEDULE)
    with pytest.raises(InputError, match=sentence):
        acdc.Sparsifier(method, model, torch.optim.SGD(model.parameters(), lr=0.1))
    config = peft.LoraConfig(target_modules=["0"], modules_to_save=["2"])
    model = peft.get_peft_model(net(), config)
    assert names(model) == ["base_model.model.2.modules_to_save.default.weight"]
    assert set(refused(model).values()) == {sentence, "frozen: it requires no gradient"}
    for param in model.parameters():
        param.requires_grad_(True)
    base = refused(model)["base_model.model.0.base_layer.weight"]
    assert base == "an adapter is added to the layer base_model.model.0: merge them first"
    assert names(model.merge_and_unload()) == ["0.weight", "2.weight"]


def test_a_lazy_layer_is_refused_in_a_sentence() -> None:
    with pytest.raises(InputError, match=r"'0.weight' has no shape yet.*Call the model once"):
        Layers().select(nn.Sequential(nn.LazyLinear(4)))


def test_reasons_of_choice_and_of_shape() -> None:
    model = UNet()
    why = refused(model, types=("conv",), include=("down*", "up*"), exclude=("up1",))
    assert why == {
        "middle.weight": "not among the included layers",
        "up1.weight": "excluded by name",
        "out.weight": "not among the included layers",
    }
    _, why = choose(model, NM(2, 4), Layers(exclude=(model.middle,)))
    assert why == {
        "down1.weight": "its 3 inputs do not divide into groups of 4",
        "middle.weight": "excluded by name",
    }
    assert refused(Tagger())["lstm.weight_ih_l0"] == "of the type 'rnn', which types does not name"
    assert set(Dense(SCHEDULE).select(model)[1].values()) == {"the method dense prunes nothing"}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"types": ("lstm",)}, "holds 'lstm'. The kinds are conv, linear, rnn, attention, exp"),
    "type that is no text": ({"types": (3,)}, "types holds 3. Layers takes a tuple of texts"),
    "one name": ({"params": "fc.weight"}, r"params is 'fc.weight'.*\('fc.weight',\)"),
    "one module": ({"exclude": nn.Linear(2, 2)}, r"exclude is a Linear.*such as \(it,\)"),
    "number": ({"include": (7,)}, "include holds 7. Layers takes a tuple of globs and modules"),
    "no tuple": ({"exclude": 5}, "exclude is 5. Layers takes a tuple of names"),
    "same axes": ({"axes": {"fc": (1, 1)}}, "axes is .*axis of the outputs and the axis of the in"),
    "one axis": ({"axes": {"fc": (1,)}}, "axes is"),
    "axes of a text": ({"axes": "fc"}, "axes is 'fc'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_choices_are_refused_at_construction(case: str) -> None:
    fields, sentence = BAD[case]
    with pytest.raises(InputError, match=sentence):
        Layers(**fields)


def test_names_that_mean_nothing_are_refused() -> None:
    for fields, sentence in (
        ({"params": ("fc.bias",)}, "No parameter of two dimensions or more is called 'fc.bias'"),
        ({"axes": {"nothing": (0, 1)}}, "No parameter of two dimensions or more is called"),
        ({"axes": {"fc": (0, 2)}}, r"axes gives 'fc.weight' the axes 0 and 2.*\(16, 16\): it has"),
        ({"exclude": ("head",)}, r"No layer is called 'head'.*can be pruned are: wte, fc\."),
        ({"types": ("rnn",)}, "Nothing to prune.*fc.weight: of the type 'linear', which types"),
        ({"include": ("lm_head",)}, "Nothing to prune.*tied to lm_head.weight"),
    ):
        with pytest.raises(InputError, match=sentence):
            Layers(**fields).select(Tied())  # type: ignore[arg-type]


# --- the printed table ---------------------------------------------------------------------------


def test_print_shows_every_layer_the_shares_and_what_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = nn.Sequential(
        nn.Embedding(5, 10), nn.LSTM(10, 5), *(nn.Linear(10, 10) for _ in range(3))
    )
    method = acdc.ACDC(Unstructured(0.9, "uniform"), SCHEDULE, layers=Layers(types=("linear",)))
    sparsifier = acdc.Sparsifier(method, model, sgd(model))
    print(sparsifier)
    dense = capsys.readouterr().out
    assert "2.weight          10×10  100 of 100    0.00 %" in dense
    assert "all parameters           720 of 720    0.00 %" in dense
    optimizer = sparsifier.optimizer
    for _ in range(2):
        sum(p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert str(sparsifier).splitlines() == [
        repr(sparsifier),
        "",
        "layer             shape        kept  sparsity",
        "2.weight          10×10   10 of 100   90.00 %",
        "3.weight          10×10   10 of 100   90.00 %",
        "4.weight          10×10   10 of 100   90.00 %",
        "prunable weights          30 of 300   90.00 %",
        "all parameters           450 of 720   37.50 %",
        "",
        "Not pruned:",
        "  0.weight (50): an embedding",
        "  1.weight_ih_l0, 1.weight_hh_l0 (300): of the type 'rnn', which types does not name",
    ]


def test_many_refused_names_of_one_reason_take_one_line() -> None:
    model = nn.Sequential(nn.Linear(4, 4), *(nn.Embedding(3, 4) for _ in range(9)))
    method = acdc.ACDC(Unstructured(0.5), SCHEDULE)
    text = str(acdc.Sparsifier(method, model, sgd(model)))
    last = "  1.weight, 2.weight, 3.weight, 4.weight and 5 more (108): an embedding"
    assert text.splitlines()[-1] == last


# --- axes: N:M, blocks and ERK -------------------------------------------------------------------


def brute_nm(scores: Tensor, shape: Shape, n: int, m: int) -> Tensor:
    """N:M by four loops: for every place outside of the axis of inputs, group by group."""
    assert shape.inputs is not None
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    others = [range(size) if axis != shape.inputs else (0,) for axis, size in enumerate(shape)]
    part = shape[shape.inputs] // shape.groups
    for place in itertools.product(*others):
        for group in range(shape.groups):
            for start in range(group * part, (group + 1) * part, m):
                at = [
                    (*place[: shape.inputs], start + i, *place[shape.inputs + 1 :])
                    for i in range(m)
                ]
                for best in sorted(at, key=lambda index: -float(scores[index]))[:n]:
                    mask[best] = True
    return mask


def brute_blocks(scores: Tensor, shape: Shape, rows: int, columns: int, k: int) -> Tensor:
    """The k blocks with the largest sums, by loops."""
    assert shape.inputs is not None
    steps = [1] * len(shape)
    steps[shape.outputs], steps[shape.inputs] = rows, columns
    starts = [range(0, size, step) for size, step in zip(shape, steps, strict=True)]
    blocks = {
        place: tuple(slice(a, a + step) for a, step in zip(place, steps, strict=True))
        for place in itertools.product(*starts)
    }
    best = sorted(blocks.values(), key=lambda block: -float(scores[block].sum()))[:k]
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for block in best:
        mask[block] = True
    return mask


class Mixture(nn.Module):
    """Experts that say which way round they are."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.experts = MixtureExperts(is_transposed)


class MixtureExperts(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        sizes = (3, 4, 8) if is_transposed else (3, 8, 4)
        self.up = nn.Parameter(torch.randn(sizes))


AXES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "linear": (lambda: nn.Linear(8, 6), 0, 1),
    "conv": (lambda: nn.Conv2d(8, 6, 3), 0, 1),
    "grouped conv": (lambda: nn.Conv1d(8, 6, 3, groups=2), 0, 1),
    "transposed 1d": (lambda: nn.ConvTranspose1d(8, 6, 3), 1, 0),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 2, 2), 1, 0),
    "grouped transposed": (lambda: nn.ConvTranspose2d(8, 8, 3, groups=2), 1, 0),
    "lstm": (lambda: nn.LSTM(8, 4), 0, 1),
    "attention": (lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=12), 0, 1),
    "stacked attention": (lambda: nn.MultiheadAttention(8, 2), 0, 1),
    "experts": (lambda: Mixture(False), 1, 2),
    "experts, transposed": (lambda: Mixture(True), 2, 1),
}


@pytest.mark.parametrize("name", AXES)
def test_groups_and_blocks_run_along_the_inputs(name: str) -> None:
    build, outputs, inputs = AXES[name]
    torch.manual_seed(0)
    chosen = Layers(types=EVERY).select(build())
    scores = acdc.score.magnitude(chosen)
    halves = NM(2, 4).select(scores)
    blocks = Block((2, 4), 0.5, "uniform").select(scores)
    for key, shape in chosen.shapes.items():
        assert (shape.outputs, shape.inputs) == (outputs, inputs)
        assert torch.equal(halves[key], brute_nm(scores[key], shape, 2, 4)), key
        k = (math.prod(shape) // 8) - round((math.prod(shape) // 8) * 0.5)
        assert torch.equal(blocks[key], brute_blocks(scores[key], shape, 2, 4, k)), key


def test_conv1d_and_linear_of_the_same_weights_keep_the_same() -> None:
    utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    conv, linear = utils.Conv1D(6, 8), nn.Linear(8, 6)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
    for pattern in (NM(2, 4), Block((2, 4), 0.5), Block((3, 2), 0.5, "erk")):
        a, b = (
            pattern.select(acdc.score.magnitude(Layers().select(layer)))["weight"]
            for layer in (conv, linear)
        )
        assert torch.equal(a, b.T), pattern


def test_groups_of_a_grouped_transposed_convolution_do_not_cross_it() -> None:
    # 6 inputs in 3 groups of 2: 2 of 4 would mix what is summed apart, though 4 divides nothing.
    layer = nn.ConvTranspose2d(12, 6, 1, groups=6)
    _, why = choose(nn.Sequential(layer, nn.Linear(4, 4)), NM(2, 4), None)
    assert why == {"0.weight": "its 2 inputs do not divide into groups of 4"}
    _, why = choose(nn.Sequential(layer, nn.Linear(4, 4)), Block((1, 4), 0.5), None)
    assert why == {"0.weight": "its 1 x 2 channels do not divide into 1 x 4"}


def test_blocks_do_not_cross_the_gates_of_an_rnn() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(8, 6), "fc": nn.Linear(8, 8)})
    _, why = choose(model, Block((4, 1), 0.5), Layers(types=EVERY))
    assert why["rnn.weight_ih_l0"] == "its 6 x 8 channels do not divide into 4 x 1"


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(3, 8, 4))
        self.fc = nn.Linear(4, 4)


def test_axes_that_are_not_known_are_asked_for() -> None:
    model = Bare()
    for pattern in (NM(2, 4), Block((2, 2), 0.5)):
        _, why = choose(model, pattern, Layers(params=("w1",)))
        assert why == {
            "w1": "the axis over which it is summed is not known: Layers(axes=...) gives it"
        }
        layers = Layers(params=("w1",), axes={"w1": (2, 1)})
        chosen, why = choose(model, pattern, layers)
        assert not why
        assert (chosen.shapes["w1"].outputs, chosen.shapes["w1"].inputs) == (2, 1)
    mask = NM(2, 4).select(acdc.score.magnitude(chosen))["w1"]
    assert mask.sum(1).unique().tolist() == [4]
    assert choose(model, Unstructured(0.5), Layers(params=("w1",)))[0].keys() == {"w1", "fc.weight"}


def test_erk_counts_each_matrix_of_a_stack_by_itself() -> None:
    # The same attention with one stacked weight and with three: the same weights in each.
    apart = {name: Shape((16, 16)) for name in "qkv"} | {"out": Shape((16, 64))}
    stacked = {"qkv": Shape((48, 16), stack=3), "out": Shape((16, 64))}
    by_name, together = (Unstructured(0.8, "erk").counts(s) for s in (apart, stacked))
    assert by_name is not None
    assert together is not None
    assert abs(sum(by_name[n] for n in "qkv") - together["qkv"]) <= 1
    experts = {str(i): Shape((8, 24)) for i in range(4)} | {"out": Shape((16, 64))}
    whole = {"all": Shape((4, 8, 24), outputs=1, inputs=2), "out": Shape((16, 64))}
    by_name, together = (Unstructured(0.8, "erk").counts(s) for s in (experts, whole))
    assert by_name is not None
    assert together is not None
    assert abs(by_name["out"] - together["out"]) <= 1
    # Which axis holds the inputs changes nothing.
    flipped = {"fc": Shape((64, 16), outputs=1, inputs=0), "out": Shape((16, 64))}
    counts = Unstructured(0.8, "erk").counts(flipped)
    assert counts is not None
    assert abs(counts["fc"] - counts["out"]) <= 1


def test_every_scope_meets_its_total_on_every_kind() -> None:
    for build in (Tagger, UNet, Translator):
        chosen = Layers(types=EVERY).select(build())
        for scope in ("global", "uniform", "erk"):
            pattern = Unstructured(0.8, scope)  # type: ignore[arg-type]
            support = pattern.select(acdc.score.magnitude(chosen))
            assert support.nnz == pattern.total(chosen.shapes)


# --- FLOPs ---------------------------------------------------------------------------------------


def macs(model: nn.Module, example: Tensor, **also: Any) -> dict[str, int]:
    return {layer.name: layer.macs for layer in measure(model, example, **also).layers}


def test_multiply_adds_of_an_rnn_are_those_of_its_time_steps() -> None:
    found = macs(Tagger(), words(0))
    assert found["lstm.weight_ih_l1_reverse"] == 6 * 48 * 8
    assert found["lstm.weight_hr_l0"] == 6 * 4 * 12
    assert len(found) == 13
    assert macs(nn.LSTMCell(3, 5), torch.zeros(1, 3)) == {"weight_ih": 60, "weight_hh": 100}
    assert found == macs(Tagger().to("meta"), words(0).to("meta"))


def test_multiply_adds_of_a_transposed_convolution_are_those_of_its_input_pixels() -> None:
    found = macs(UNet(), torch.zeros(1, 3, 8, 8))
    assert found["up1.weight"] == 16 * 4 * 2 * 2 * 16
    # The gradient of a convolution by its input is a transposed one, with as many multiply-adds.
    conv, back = nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.ConvTranspose2d(6, 4, 3, 2, 1, 1)
    (there,) = macs(conv, torch.zeros(1, 4, 8, 8)).values()
    (again,) = macs(back, torch.zeros(1, 6, 4, 4)).values()
    assert there == again


def test_multiply_adds_of_attention_count_projections_that_no_module_call_shows() -> None:
    found = macs(Translator(), words(0))
    assert found["encoder.layers.0.self_attn.in_proj_weight"] == 6 * 48 * 16
    assert found["encoder.layers.1.self_attn.out_proj.weight"] == 6 * 16 * 16
    assert found["encoder.layers.0.linear1.weight"] == 6 * 32 * 16
    assert found["cross.k_proj_weight"] == 6 * 16 * 8
    assert found["cross.q_proj_weight"] == found["cross.out_proj.weight"] == 6 * 16 * 16
    assert torch.backends.mha.get_fastpath_enabled()


def test_multiply_adds_of_transformers() -> None:
    pytest.importorskip("transformers")
    gpt2 = macs(TRANSFORMERS["GPT-2"].build(), words(0))
    assert gpt2["transformer.h.0.attn.c_attn.weight"] == 6 * 16 * 48
    mixtral = macs(TRANSFORMERS["Mixtral"].build(), words(0))
    # 6 tokens, 2 experts each, 4 experts: 3 tokens an expert.
    assert mixtral["model.layers.0.mlp.experts.down_proj"] == 3 * (4 * 16 * 32)


def test_a_pruned_weight_that_no_layer_counts_is_listed_without_flops() -> None:
    chosen = Layers(params=("wte",)).select(Tied())
    network = measure(Tied(), words(0), also=chosen)
    assert network.kept({"wte.weight": 3})["wte.weight"] == 3
    network = measure(Own2(), torch.zeros(1, 4), also=["table"])
    assert [(x.name, x.kind, x.macs) for x in network.layers][-1] == ("table", "other", 0)
    assert network.flops({"table": 1}) == network.flops()


class Own2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.table = nn.Linear(4, 4), nn.Parameter(torch.randn(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + self.table)
