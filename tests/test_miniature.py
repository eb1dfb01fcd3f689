"""Every recipe of the paper in miniature: its layers, pattern and optimizer, on a few images.

The phases are those of the recipe, shortened to an epoch each: dense warm-up, sparse, dense, and
the last sparse one. ResNet-50 and WideResNet are narrow, with all their layers. The images are
random; ``tests/test_data.py`` reads the standard layouts. ``docs/recipes.md`` has the accuracies
that the recipes aim at.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from acdc import recipes
from acdc.compare import work
from acdc.methods import ACDC
from acdc.pair import Pair
from acdc.recipes import grids, paper
from acdc.runs import models, train
from acdc.runs.data import Augment, Images, Source
from acdc.runs.recipe import Recipe, change, encode
from acdc.schedule import alternate
from support.runs import events

ROOT = Path(__file__).parent.parent


def miniature(name: str) -> Recipe:
    """Return a recipe with phases of one epoch, and two steps of four images in an epoch."""
    small = {"batch_size": "4", "threads": "1", "engine": "off", "checkpoint_steps": "1000"}
    small |= {"data.train_examples": "8", "data.test_examples": "5"}
    if "memorisation" in name:
        small = {"data.random_labels": "3", **small}  # before there are fewer images than labels
    if "wrn" in name:
        small["model.widen"] = "1"
    if "imagenet" in name:
        small |= {"lr.warmup": "1", "optimizer.lr": "0.001"}  # four images do not bear 0.256
    recipe = change(recipes.get(name), small)
    assert isinstance(recipe.method, ACDC)
    phases = alternate(epochs=4, warmup="1ep", sparse="1ep", dense="1ep", last_sparse="1ep")
    return replace(recipe, name="", about="", method=replace(recipe.method, schedule=phases))


NAMES = [function.__name__ for function in paper.RECIPES]
# Recipes that differ in their length alone are the same in miniature.
ALIKE: dict[str, list[str]] = {}
for _name in NAMES:
    ALIKE.setdefault(json.dumps(encode(miniature(_name))), []).append(_name)


def random_images(source: Source, *_: object) -> Images:
    """Return random images of 32x32 in the numbers that a source asks for."""
    draw = torch.Generator().manual_seed(0)

    def part(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randint(256, (count, 3, 32, 32), generator=draw, dtype=torch.uint8)
        return x, torch.arange(count) % source.classes

    relabelled = None
    if drawn := getattr(source, "random_labels", 0):
        relabelled = torch.arange(drawn), torch.zeros(drawn, dtype=torch.int64)
    sizes = source.train_samples, source.test_samples
    train_part, test_part = map(part, sizes)
    middle = (0.5,) * 3
    return Images("random", train_part, test_part, source.classes, middle, middle,
                  getattr(source, "augment", Augment()), relabelled)  # fmt: skip


@pytest.mark.parametrize("names", ALIKE.values(), ids=lambda names: names[0])
def test_a_recipe_trains_through_every_kind_of_phase_to_a_saved_pair(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = miniature(names[0])
    monkeypatch.setattr(type(recipe.data), "load", random_images)
    stem = lambda: (nn.Conv2d(3, 8, 7, 2, padding=3, bias=False), nn.MaxPool2d(3, 2, 1))  # noqa: E731
    monkeypatch.setattr(models, "_imagenet_stem", stem)
    record = train.run(recipe, tmp_path / "run", device="cpu")

    steps = [event["phase"] for event in events(tmp_path / "run", "step")]
    assert steps == ["dense", "dense", "sparse", "sparse"] * 2
    pair = Pair.load(tmp_path / "run" / "pair")
    net = recipe.model.build()
    chosen, _ = recipe.method.resolve(2).select(net)
    assert pair.support.keys() == chosen.keys()
    pattern = recipe.method.pattern  # type: ignore[attr-defined]
    assert pair.support.nnz == pattern.total({n: tuple(w.shape) for n, w in chosen.items()})
    assert record["sparse"]["nnz"] == pair.support.nnz
    for twin in (pair.sparse_model, pair.dense_model):
        assert torch.isfinite(twin(net)(torch.zeros(2, 3, 32, 32))).all()
    dense = sum(int(torch.count_nonzero(pair.dense[name])) for name in chosen)
    assert dense > pair.support.nnz


LONG = """
from dataclasses import replace
from acdc import constant
from acdc.methods.dense import Dense
from acdc.recipes import grids
from acdc.runs.models import CifarResNet
from acdc.runs.recipe import change

def grid():
    grid = grids.compare_cifar10_long()
    small = {"batch_size": "4", "checkpoint_steps": "1000", "engine": "off", "threads": "1"}
    small |= {"data.train_examples": "8", "data.test_examples": "5"}
    recipe = replace(
        change(grid.task.recipe, small),
        method=Dense(constant("dense", epochs=20)),
        model=CifarResNet(depth=8),
    )
    return replace(grid, task=replace(grid.task, recipe=recipe), sparsities=(0.9,))
"""


def test_the_grid_of_the_recipe_on_cifar10_is_that_recipe_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, recipe = grids.compare_cifar10_long(), recipes.get("cifar10_resnet20")
    assert replace(grid.task.recipe, method=recipe.method, about=recipe.about) == recipe
    assert isinstance(recipe.method, ACDC)
    built = {m.name: m.build(grid.task, 0.9, 200, 0).method for m in grid.methods}
    assert list(built) == ["dense", "acdc", "gmp", "topkast", "rigl_erk"]
    phases = built["acdc"].resolve(391).resolved
    assert phases.table() == recipe.method.resolve(391).resolved.table()
    net = recipe.model.build()
    pruned, _ = recipe.method.resolve(391).select(net)
    for name in built.keys() - {"dense"}:
        assert built[name].resolve(391).select(net)[0].keys() == pruned.keys()

    monkeypatch.setattr(type(recipe.data), "load", random_images)
    (tmp_path / "mine.py").write_text(LONG)
    outcomes = work.compare(f"{tmp_path / 'mine.py'}:grid", tmp_path, device="cpu")
    assert [outcome.reason for outcome in outcomes] == [""] * 5
    runs = [
        tmp_path / grid.name / "runs" / outcome.run.label for outcome in outcomes if outcome.run
    ]
    sparse = [json.loads((run / "record.json").read_text())["sparse"] for run in runs[1:]]
    assert len({one["nnz"] for one in sparse}) == 1  # all keep the same number of weights


def test_the_page_of_the_recipes_names_every_recipe_of_the_paper() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    assert [name for name in NAMES if f"`{name}`" not in text] == []
    row = r"ResNet-50, global, (\d+) %[^|]*\|[^|]*\|[^|]*\| ([\d.]+ to [\d.]+)"
    bands = dict(re.findall(row, text))
    assert bands == {"90": "74.7 to 75.05", "95": "72.5 to 73.2"}
