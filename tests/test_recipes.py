"""The paper's recipes against its published configurations, and changes of a recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from acdc import recipes
from acdc.errors import InputError
from acdc.methods import METHODS
from acdc.pattern import NM
from acdc.runs import train
from acdc.runs.models import SmallResNet
from acdc.runs.recipe import Recipe, change, encode, label

# Epochs at which a published run prunes and restores.
IMAGENET = {
    100: (range(10, 71, 10), [85], range(15, 76, 10)),
    150: (range(10, 121, 10), [135], range(15, 126, 10)),
    200: (range(10, 171, 10), [185], range(15, 176, 10)),
}
FREQ20 = ([10, 50, 90, 130, 170], [], [30, 70, 110, 150])
DENSE13 = ([10, 43, 76, 109, 142, 175], [], [30, 63, 96, 129, 162])

# Recipe -> phases, epochs, pruned layers, sparsity, (lr, momentum, weight decay, Nesterov), batch.
SGD_IMAGENET = (0.256, 0.875, 2**-15, False)
SGD_C100 = (0.08, 0.9, 5e-4, True)
SGD_C10 = (0.1, 0.9, 5e-4, False)
PAPER = {
    "cifar10_resnet20": (FREQ20, 200, 20, 0.9, SGD_C10, 128),
    "cifar10_resnet20_s50": (FREQ20, 200, 22, 0.5, SGD_C10, 128),
    "cifar10_memorisation": (FREQ20, 200, 20, 0.9, SGD_C10, 128),
    "cifar100_wrn28_10": (FREQ20, 200, 29, 0.9, SGD_C100, 128),
    "cifar100_wrn28_10_dense13": (DENSE13, 225, 29, 0.9, SGD_C100, 128),
    "imagenet_resnet50": (IMAGENET[100], 100, 54, 0.9, SGD_IMAGENET, 256),
    "imagenet_resnet50_150ep": (IMAGENET[150], 150, 54, 0.9, SGD_IMAGENET, 256),
    "imagenet_resnet50_200ep": (IMAGENET[200], 200, 54, 0.9, SGD_IMAGENET, 256),
    "imagenet_resnet50_no_conv1_fc": (IMAGENET[100], 100, 52, 0.9, SGD_IMAGENET, 256),
    "imagenet_resnet50_uniform": (IMAGENET[100], 100, 52, 0.9, SGD_IMAGENET, 256),
    "imagenet_resnet50_uniform_200ep": (IMAGENET[200], 200, 52, 0.9, SGD_IMAGENET, 256),
    "imagenet_resnet50_nm24": (IMAGENET[100], 100, 53, 0.5, SGD_IMAGENET, 256),
    "imagenet_mobilenetv1": (IMAGENET[100], 100, 28, 0.9, SGD_IMAGENET, 256),
    "imagenet_mobilenetv1_no_conv1_dw": (IMAGENET[100], 100, 14, 0.9, SGD_IMAGENET, 256),
}


# Those of single methods, one for each. At these sparsities digits are no trouble.
SINGLE = {recipes.get(name).method.name: name for name in recipes.methods.RECIPES}
QUICK = {"method.schedule.epochs": "10", "data.train_examples": "400", "batch_size": "25",
         "threads": "1", "engine": "off"}  # fmt: skip


def test_every_recipe_of_the_paper_is_checked() -> None:
    rest = {"digits", "fashion_mnist", *recipes.methods.RECIPES}
    assert set(recipes.names()) == {*rest, *PAPER}
    assert all(recipes.get(name).name == name for name in recipes.names())


def test_every_method_has_a_recipe() -> None:
    assert SINGLE.keys() == METHODS.keys()


@pytest.mark.parametrize("name", SINGLE.values())
def test_the_recipe_of_a_method_trains_it_to_the_exact_count(name: str, tmp_path: Path) -> None:
    recipe = change(recipes.get(name), QUICK)
    record = train.run(recipe, tmp_path / "run", device="cpu")
    method = recipe.method.resolve(recipe.data.steps_per_epoch(recipe.batch_size))
    sparse = record["sparse"]
    assert (sparse or record["dense"])["accuracy"] > 80  # a tenth is chance
    assert (sparse is None) == (method.name in ("dense", "dsd"))
    if sparse is not None:
        weights, _ = method.select(recipe.model.build())
        total = method.pattern.total({n: tuple(w.shape) for n, w in weights.items()})  # type: ignore[attr-defined]
        assert sparse["nnz"] == total


def test_what_is_trained_beforehand_is_the_first_phase() -> None:
    """Gradual pruning: shares of its ten epochs are half of those shares of all twenty."""
    method = recipes.get("digits_gradual").method.resolve(10)
    assert [(p.kind, len(p)) for p in method.resolved.phases] == [("dense", 100), ("sparse", 100)]
    cuts = [step for step in range(100, 200) if method.cuts(step, method.resolved.phases[1])]  # type: ignore[attr-defined]
    assert cuts == [100, *range(105, 141, 5)]


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_is_the_published_configuration(name: str) -> None:
    (prune, last, restore), epochs, layers, sparsity, sgd, batch = PAPER[name]
    recipe = recipes.get(name)
    schedule = recipe.method.resolve(7).resolved
    sparse_from = [p.start // 7 for p in schedule.phases if p.kind == "sparse"]
    dense_from = [p.start // 7 for p in schedule.phases if p.kind == "dense"]
    assert sparse_from == [*prune, *last]
    assert dense_from == [0, *restore]
    assert schedule.epochs == epochs
    with torch.device("meta"):
        net = recipe.model.build()
    pruned, refused = recipe.method.select(net)
    assert len(pruned) == layers
    misfits = {layer for layer, why in refused.items() if "do not divide" in why}
    assert misfits == ({"conv1.weight"} if "nm24" in name else set())
    assert all("conv" in x or "fc" in x or "downsample" in x or "wise" in x for x in refused)
    assert recipe.method.sparsity == sparsity
    opt = recipe.optimizer
    assert (opt.lr, opt.momentum, opt.weight_decay, opt.nesterov) == sgd  # type: ignore[attr-defined]
    assert recipe.batch_size == batch
    assert recipe.method.reset == "all"
    assert recipe.label_smoothing == 0


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        # The rate changes at the END of the named epoch.
        ("cifar10_resnet20", {65: 1, 66: 0.1, 125: 0.1, 126: 0.01, 185: 0.01, 186: 0.001}),
        ("cifar100_wrn28_10", {75: 1, 76: 0.1, 115: 0.1, 116: 0.01, 155: 0.01, 156: 0.001}),
        ("imagenet_resnet50", {0: 0.2, 3: 0.8, 4: 1, 5: 1, 99: 0.000273, 52: 0.512}),
    ],
)
def test_the_learning_rate_at_named_epochs(name: str, factors: dict[int, float]) -> None:
    recipe = recipes.get(name)
    schedule = recipe.method.resolve(10).resolved
    for epoch, factor in factors.items():
        # Constant over an epoch, and no switch of phase touches it.
        first, final = (recipe.lr.factor(10 * epoch + i, schedule) for i in (0, 9))
        assert first == final
        # 1/2 (1 + cos(pi 47/95)) = 0.5083; at epoch 52 the published formula gives this.
        expected = 0.5082664 if epoch == 52 else factor
        assert first == pytest.approx(expected, rel=2e-3)


def test_a_recipe_holds_an_added_field_of_a_pattern_only_if_it_is_used() -> None:
    # Labels of runs, and the folders of a grid, are made of this.
    assert encode(NM(2, 4)) == {"type": "NM", "n": 2, "m": 4}
    both = {"type": "NM", "n": 2, "m": 4, "transposable": True}
    assert encode(NM(2, 4, transposable=True)) == both


def test_an_unknown_recipe_names_its_neighbours() -> None:
    with pytest.raises(InputError, match="Did you mean fashion_mnist"):
        recipes.get("fashion_minst")


@pytest.mark.parametrize(
    ("settings", "read", "value"),
    [
        ({"method.pattern.sparsity": "0.95"}, lambda r: r.method.pattern.sparsity, 0.95),
        ({"method.schedule.last_sparse": "none"}, lambda r: r.method.schedule.last_sparse, None),
        ({"dense_finetune": "false"}, lambda r: r.dense_finetune, False),
        ({"method.layers.exclude": "[fc]"}, lambda r: r.method.layers.exclude, ("fc",)),
        ({"method": "dense"}, lambda r: r.method.name, "dense"),
        ({"method": "dense"}, lambda r: r.method.schedule.epochs, 40),
        ({"method.pattern": "nm"}, lambda r: (r.method.pattern.n, r.method.pattern.m), (2, 4)),
        (
            {"method.pattern": "nm", "method.pattern.transposable": "true"},
            lambda r: r.method.pattern,
            NM(2, 4, transposable=True),
        ),
        ({"method.pattern": "block"}, lambda r: r.method.pattern.sparsity, 0.9),
        ({"optimizer": "adamw", "optimizer.lr": "0.01"}, lambda r: r.optimizer.lr, 0.01),
        ({"clip": "1.5"}, lambda r: r.clip, 1.5),
        ({"engine": "off"}, lambda r: r.engine, "off"),  # a word, and not the opposite of "on"
        ({"method.reset": "none"}, lambda r: r.method.reset, "none"),  # a word, and not None
        (
            {"method.layers.exclude": "conv1, fc"},
            lambda r: r.method.layers.exclude,
            ("conv1", "fc"),
        ),
        ({"method.layers.exclude": "()"}, lambda r: r.method.layers.exclude, ()),
        (
            {"method.pattern.overrides": "[[fc,0.5],[conv1,0]]"},
            lambda r: r.method.pattern.overrides,
            (("fc", 0.5), ("conv1", 0.0)),
        ),
    ],
)
def test_a_value_is_changed_by_its_path(settings: dict, read: object, value: object) -> None:
    recipe = change(recipes.get("digits"), settings)
    assert read(recipe) == value  # type: ignore[operator]
    assert recipe != recipes.get("digits")


@pytest.mark.parametrize(
    ("path", "text", "sentence"),
    [
        ("method.patern.sparsity", "0.9", "has no field 'patern'"),
        ("nothing", "1", "the recipe .Recipe. has no field 'nothing'"),
        ("batch_size", "many", "not of the type whole number"),
        ("method.pattern.sparsity", "1.0", "from 0"),
        ("method.pattern.sparsity", "90", "write 0.9 for 90 %"),
        ("method.pattern.scope", "local", "not of the type"),
        ("method.pattern", "diamond", "can be replaced by unstructured, nm, block"),
        ("batch_size.x", "1", "has no fields of its own"),
        ("model", "5", "has fields of its own"),
        ("optimizer.lr", ".nan", "NaN is no value"),
        ("clip", "many", "not of the type number or none"),
        ("dense_finetune", "maybe", "not of the type true or false"),
        ("engine", "on", "'on' is not of the type auto, off or reference"),
    ],
)
def test_a_wrong_setting_is_a_sentence(path: str, text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        change(recipes.get("digits"), {path: text})


def test_an_engine_that_is_none_is_a_sentence() -> None:
    with pytest.raises(InputError, match=r"engine is 'gpu'\. It is one of: auto, off, reference"):
        replace(recipes.get("digits"), engine="gpu")  # type: ignore[arg-type]


def test_a_run_is_named_by_what_differs() -> None:
    assert label("digits", {}) == "digits"
    one = label("digits", {"seed": "1", "batch_size": "32"})
    assert one == label("digits", {"batch_size": "32", "seed": "1"})
    assert one != label("digits", {"seed": "2", "batch_size": "32"})
    assert one.startswith("digits-")


def test_an_encoded_recipe_holds_every_value() -> None:
    recipe: Recipe = recipes.get("digits")
    data = encode(recipe)
    assert data["model"] == {"type": "SmallResNet"} | vars(SmallResNet(width=16))
    assert data["method"]["pattern"]["sparsity"] == 0.9
    assert data["method"]["schedule"]["type"] == "Alternate"
    assert data["engine"] == "auto"
