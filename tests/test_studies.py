"""The studies of runs: twins, supports, memorisation; the options of a run that they need."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from acdc import recipes
from acdc.cli import main
from acdc.errors import InputError
from acdc.layers import Layers
from acdc.methods import OneShot
from acdc.pair import Pair
from acdc.pattern import Unstructured
from acdc.recipes.grids import GRIDS
from acdc.runs import train
from acdc.runs.batchnorm import reestimate
from acdc.runs.data import Digits
from acdc.runs.recipe import change, decode_data, encode
from acdc.runs.record import Folder
from acdc.runs.supports import keep, saved
from acdc.schedule import Constant
from acdc.studies.masks.study import dynamics
from acdc.studies.twins import measures, teacher
from acdc.studies.twins.networks import Bench, Trained, cut
from acdc.studies.twins.study import between
from acdc.studies.twins.study import study as twins
from acdc.studies.twins.teacher import taught
from acdc.support import Support
from support.runs import BRANCH, assert_same_run, events, tiny

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny runs: AC/DC, two dense ones, one-shot after a dense phase, RigL."""
    out = tmp_path_factory.mktemp("runs")
    acdc = tiny(dense_finetune="false", supports="true", data__random_labels="40")
    train.run(acdc, out / "acdc", device="cpu")
    for seed in ("0", "1"):
        dense = change(acdc, {"method": "dense", "seed": seed, "supports": "false"})
        train.run(dense, out / f"dense{seed}", device="cpu")
    for name in ("digits_oneshot", "digits_static_erk"):
        method = change(recipes.get(name), {"method.schedule.epochs": "4"}).method
        train.run(replace(acdc, method=method, supports=False), out / name, device="cpu")
    return out


def told(capsys: Capture) -> str:
    return " ".join(capsys.readouterr().err.split())


# --- measures -------------------------------------------------------------------------------------


def test_the_measures_of_a_small_example() -> None:
    one = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0], [2.0, 0, 0]])
    two = torch.tensor([[2.0, 0, 0], [2.0, 0, 0], [0, 2.0, 0], [2.0, 0, 0]])
    labels = torch.tensor([0, 1, 0, 2])
    assert measures.agreement(one, two) == 0.5
    assert measures.contingency(one, two, labels) == {
        "both": 1,
        "first": 1,
        "second": 0,
        "neither": 2,
        "same_mistake": 1,
    }
    assert measures.accuracy(one, labels) == 50
    assert measures.per_class(one, labels) == [50.0, 100.0, 0.0]
    assert measures.per_class(one, torch.tensor([0, 0, 1, 1]))[2] is None
    expected = torch.nn.functional.cross_entropy(two.double(), one.double().softmax(1))
    assert measures.cross_entropy(one, two) == pytest.approx(float(expected))
    assert measures.cross_entropy(one, two) > measures.cross_entropy(one, one)


def test_the_calibration_error_of_a_network_that_is_always_as_sure() -> None:
    outputs = torch.tensor([[0.7, 0.3]]).log().repeat(10, 1)
    labels = torch.tensor([0] * 4 + [1] * 6)
    found = measures.calibration(outputs, labels, bins=10)
    assert found["error"] == pytest.approx(0.3)
    (row,) = found["bins"]
    assert (row["count"], row["accuracy"]) == (10, pytest.approx(0.4))


def test_alignment_does_not_see_rotation_and_scale() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=draw, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64))
    other = torch.randn(40, 6, generator=draw, dtype=torch.float64)
    assert measures.alignment(measures.gram(x), measures.gram(3 * x @ turn + 1)) == pytest.approx(1)
    assert measures.alignment(measures.gram(x), measures.gram(other)) < 0.6
    # The formula by features: |YᵀX|² / (|XᵀX| |YᵀY|), centred.
    a, b = x - x.mean(0), other - other.mean(0)
    norm = torch.linalg.norm
    expected = norm(b.T @ a) ** 2 / (norm(a.T @ a) * norm(b.T @ b))
    assert measures.alignment(measures.gram(x), measures.gram(other)) == pytest.approx(
        float(expected)
    )


# --- twins ----------------------------------------------------------------------------------------


def test_the_study_of_twins_measures_every_couple(runs: Path, tmp_path: Path) -> None:
    against = [str(runs / name) for name in ("dense0", "dense1", "digits_oneshot")]
    words = ["study", "twins", str(runs / "acdc"), "--against", *against, "--out", str(tmp_path)]
    assert main([*words, "--samples", "50", "--bn-batches", "2", "--teach", "1"]) == 0
    found = json.loads((tmp_path / "study.json").read_text("utf-8"))
    kinds = [couple["kind"] for couple in found["couples"]]
    assert kinds == ["twins", "pruned", "cut", "cut", "seeds"]
    assert (found["claim"]["compared"], found["claim"]["samples"]) == (3, 100)
    means = {kind["kind"]: kind for kind in found["kinds"]}
    cuts = [couple for couple in found["couples"] if couple["kind"] == "cut"]
    assert means["cut"]["couples"] == 2
    assert means["cut"]["agreement"] == pytest.approx(sum(c["agreement"] for c in cuts) / 2)
    record = json.loads((runs / "acdc" / "record.json").read_text("utf-8"))
    first = found["couples"][0]
    assert first["accuracy"] == [record[twin]["accuracy"] for twin in ("sparse", "dense")]
    assert sum(v for k, v in first["contingency"].items() if k != "same_mistake") == 100
    alike = first["contingency"]["both"] + first["contingency"]["same_mistake"]
    assert first["agreement"] == alike / 100
    assert all(0 <= value <= 1 + 1e-9 for value in first["layers"].values())
    assert len(first["layers"]) == 10
    assert [row["dense"] for row in found["path"]] == [n / 10 for n in range(11)]
    assert {row["from"] for row in found["cuts"]} == {
        "dense twin",
        "dense run dense0",
        "dense run dense1",
    }
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "more than" in page
    assert page.count("<figure") == 3
    assert len(found["taught"]) == page.count("<td>dense twin</td>") * 2 == 4


def test_a_network_and_itself_agree(runs: Path, tmp_path: Path) -> None:
    """The path begins and ends at the twins, and the twins of a pair of one network are alike."""
    pair = Pair.load(runs / "acdc" / "pair")
    same = tmp_path / "same"
    same.mkdir()
    (same / "recipe.json").write_bytes((runs / "acdc" / "recipe.json").read_bytes())
    Pair(pair.sparse, pair.sparse, pair.support, pair.facts).save(same / "pair")
    found = twins(same / "pair", samples=20, batches=2)  # a saved pair beside its recipe
    (couple,) = found["couples"]
    assert couple["agreement"] == 1
    assert couple["contingency"]["first"] == couple["contingency"]["second"] == 0
    assert all(value == pytest.approx(1) for value in couple["layers"].values())
    losses = {round(row["loss"], 6) for row in found["path"]}
    assert len(losses) == 1
    assert found["claim"] == {"agreement": 1, "samples": 100, "compared": 0, "more_than": []}


def test_the_line_begins_at_the_sparse_twin_with_statistics_estimated_anew(runs: Path) -> None:
    run = Trained.read(runs / "acdc")
    bench = Bench(run, 0, 2)
    assert run.sparse is not None
    assert run.dense is not None
    rows = between(bench, run.sparse, run.dense)
    assert rows[0]["loss"] != pytest.approx(rows[-1]["loss"])
    for row, state in ((rows[0], run.sparse), (rows[-1], run.dense)):
        net = tiny().model.build()
        net.load_state_dict(dict(state))
        batches = bench.data.train_batches(0, 32, 0)
        reestimate(net, (x for x, _ in batches), 2)
        assert not torch.equal(net.bn1.running_mean, state["bn1.running_mean"])
        net.eval()
        ((x, y),) = bench.data.eval_batches("test", 100)
        loss = torch.nn.functional.cross_entropy(net(x), y).detach()
        assert row["loss"] == pytest.approx(float(loss), rel=1e-4)


def test_a_cut_keeps_the_largest_weights_of_the_support(runs: Path) -> None:
    pair = Pair.load(runs / "acdc" / "pair")
    state = cut(pair.dense, pair.support, 0.8, "global")
    left = sum(int(torch.count_nonzero(state[name])) for name in pair.support)
    assert left == pair.support.numel - round(0.8 * pair.support.numel)
    gone = [pair.dense[n][state[n] == 0].abs() for n in pair.support]
    stayed = [state[n][state[n] != 0].abs() for n in pair.support]
    assert float(torch.cat(gone).max()) <= float(torch.cat(stayed).min())
    assert all(torch.equal(state[n], pair.dense[n]) for n in state if n not in pair.support)


def test_cuts_of_the_dense_twin_are_trained_with_it_and_without(runs: Path) -> None:
    run = Trained.read(runs / "acdc")
    bench, told_of = Bench(run, 0, 2), list[str]()
    rows = taught(bench, run, 3, told_of.append)
    assert [(row["sparsity"], row["teacher"]) for row in rows] == [
        (0.95, False),
        (0.95, True),
        (0.98, False),
        (0.98, True),
    ]
    assert len({row["accuracy"] for row in rows}) > 1
    assert len(told_of) == 4
    assert taught(bench, run, 0, told_of.append) == []
    assert run.support is not None
    assert run.dense is not None
    layers = Layers(types=(), params=tuple(run.support))
    method = OneShot(Unstructured(0.95), Constant(1, "sparse"), layers=layers)
    alone, helped = (teacher._trained(bench, run.dense, method, share) for share in (0.0, 0.5))
    kept = sum(int(torch.count_nonzero(alone[name])) for name in run.support)
    assert kept == run.support.numel - round(0.95 * run.support.numel)
    assert not torch.equal(alone["fc.weight"], helped["fc.weight"])
    again = teacher._trained(bench, run.dense, method, 0.0)
    assert all(torch.equal(again[name], alone[name]) for name in alone)


def test_runs_that_do_not_fit_are_refused(runs: Path, tmp_path: Path, capsys: Capture) -> None:
    acdc = str(runs / "acdc")
    assert main(["study", "twins", str(runs / "dense0")]) == 2
    assert "left a dense network alone, and this study compares twins" in told(capsys)
    assert main(["study", "twins", acdc, "--against", str(runs / "digits_static_erk")]) == 2
    assert "left a sparse network alone, and names no dense network" in told(capsys)
    assert main(["study", "twins", str(tmp_path / "none")]) == 2
    assert "There is no folder" in told(capsys)
    assert main(["study", "twins", acdc, "--samples", "1"]) == 2
    assert "Give 2 samples" in told(capsys)
    other = tmp_path / "other"
    other.mkdir()
    recipe = json.loads((runs / "dense0" / "recipe.json").read_text("utf-8"))
    recipe["values"]["model"]["width"] = 12
    (other / "recipe.json").write_text(json.dumps(recipe))
    (other / "pair").symlink_to(runs / "dense0" / "pair")
    assert main(["study", "twins", acdc, "--against", str(other)]) == 2
    assert "was trained with another model" in told(capsys)


def test_every_data_source_is_read_back_from_a_recipe() -> None:
    sources = [recipes.get(name).data for name in recipes.names()]
    sources += [grid().task.recipe.data for grid in GRIDS.values()]
    for source in sources:
        assert decode_data(json.loads(json.dumps(encode(source)))) == source
    for wrong in ({}, {"type": "Recipe"}, {"type": "Digits", "pages": 3}):
        with pytest.raises(InputError, match="not known to this version"):
            decode_data(wrong)


# --- supports -------------------------------------------------------------------------------------


def test_dynamics_of_a_small_example() -> None:
    rows = ["11100", "01110", "11010", "00011"]
    found = dynamics([{"w": torch.tensor([letter == "1" for letter in row])} for row in rows])
    assert found["kept"] == [3, 3, 3, 2]
    assert found["entered"] == [1 / 3, 1 / 3, 1 / 2]
    assert found["first"] == [1, 2 / 3, 2 / 3, 0]
    assert found["last"] == [0, 1 / 3, 1 / 3, 1]
    assert (found["always"], found["ever"]) == (0, 5)
    assert found["returns"] == {"0": 4, "1": 1}  # the first weight left and came back


def test_the_event_of_a_compression_measures_the_weights_that_came_back(tmp_path: Path) -> None:
    rows = ["11100", "01110", "11010"]
    masks = [Support({"w": torch.tensor([letter == "1" for letter in row])}) for row in rows]
    found = []
    for step, support in enumerate(masks):
        weights = {"w": torch.tensor([2.0, 3, 4, 5, 6]).masked_fill(~support["w"], 0)}
        event = keep(Folder(tmp_path), step, support, weights)
        found.append(event["layers"]["w"])
    assert [layer["entered"] for layer in found] == [0, 1, 1]
    assert [layer["norm"] for layer in found] == [None, 5, 2]
    stayed = [(29 / 3) ** 0.5, (25 / 2) ** 0.5, (34 / 2) ** 0.5]
    assert [layer["stayed"] for layer in found] == pytest.approx(stayed)
    weights = {"w": torch.tensor([0.0, 3, 4, 5, 0])}
    again = keep(Folder(tmp_path), 1, masks[1], weights)  # as after a stop
    assert again["layers"]["w"] == found[1]
    assert [support for _, support in saved(Folder(tmp_path), {"w": (5,)})] == masks


def test_a_run_keeps_its_supports_where_it_is_asked_to(runs: Path) -> None:
    folder = Folder(runs / "acdc")
    pair = Pair.load(folder.result)
    shapes = {name: tuple(mask.shape) for name, mask in pair.support.items()}
    kept = saved(folder, shapes)
    changes = [e for e in events(folder.path, "change") if e["to"] == "sparse"]
    assert [step for step, _ in kept] == [change["step"] for change in changes] == [4, 12, BRANCH]
    assert kept[-1][1] == pair.support
    assert [support.counts() for _, support in kept] == [change["counts"] for change in changes]
    for (_, one), (_, two), noted in zip(kept, kept[1:], changes[1:], strict=False):
        assert two.regrown(one) == noted["regrown"]
    first, *later = events(folder.path, "revived")
    assert all(
        layer["entered"] == 0 and layer["norm"] is None for layer in first["layers"].values()
    )
    for event, ((_, one), (_, two)) in zip(later, pairwise(kept), strict=True):
        entered = two.entered(one).counts()
        assert {name: layer["entered"] for name, layer in event["layers"].items()} == entered


def test_a_run_keeps_no_supports_by_default_and_its_files_are_as_before(runs: Path) -> None:
    assert not (runs / "dense0" / "supports").exists()
    values = encode(tiny())
    assert "supports" not in values
    assert not {"random_labels", "label_seed"} & values["data"].keys()


def test_a_resumed_run_keeps_the_same_supports(tmp_path: Path) -> None:
    recipe = tiny(dense_finetune="false", supports="true")
    train.run(recipe, tmp_path / "straight", device="cpu")

    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 14:
            raise Stop

    with pytest.raises(Stop):
        train.run(recipe, tmp_path / "stopped", device="cpu", watch=stop)
    train.run(recipe, tmp_path / "stopped", device="cpu", resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    one, two = (sorted((tmp_path / n / "supports").iterdir()) for n in ("straight", "stopped"))
    assert [p.name for p in one] == [p.name for p in two]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_the_study_of_supports(runs: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["study", "masks", str(runs / "acdc"), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "study.json").read_text("utf-8"))
    changes = [e for e in events(runs / "acdc", "change") if e["to"] == "sparse"]
    shares = [change["regrown"] / change["nnz"] for change in changes[1:]]
    assert found["whole"]["entered"] == pytest.approx(shares)
    assert found["whole"]["kept"] == [change["nnz"] for change in changes]
    whole = found["whole"]
    layers = found["layers"].values()
    assert sum(layer["always"] for layer in layers) == whole["always"]
    assert sum(whole["returns"].values()) == whole["ever"] == sum(layer["ever"] for layer in layers)
    assert len(found["norms"]) == 2
    assert "<figure" in (tmp_path / "report.html").read_text("utf-8")
    capsys.readouterr()
    assert main(["study", "masks", str(runs / "dense0")]) == 2
    assert "holds 0 supports" in told(capsys)


def test_a_damaged_support_is_a_sentence(runs: Path, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.supports.mkdir()
    (folder.supports / "000000004.safetensors").write_bytes(b"none")
    with pytest.raises(InputError, match="holds no support of this run"):
        saved(folder, {"conv1.weight": (2, 2)})


# --- random labels --------------------------------------------------------------------------------


def labels(source: Digits) -> Tensor:
    return torch.cat([y for _, y in source.load().eval_batches("train", 500)])


def test_random_labels_are_drawn_from_their_seed() -> None:
    plain, drawn = labels(Digits()), labels(Digits(random_labels=300))
    assert torch.equal(drawn, labels(Digits(random_labels=300)))
    assert not torch.equal(drawn, labels(Digits(random_labels=300, label_seed=1)))
    changed = int((plain != drawn).sum())
    assert 250 <= changed <= 290  # the true class is drawn one time in ten
    data = Digits(random_labels=300).load()
    parts = list(data.relabelled_batches(128))
    assert [len(x) for x, _, _ in parts] == [128, 128, 44]
    given, own = (torch.cat(part) for part in list(zip(*parts, strict=True))[1:])
    assert int((given != own).sum()) == changed
    assert torch.bincount(given, minlength=10).min() > 10
    images = torch.cat([x for x, _ in data.eval_batches("train", 2000)])
    rows = (images[:, None] == parts[0][0][None, :5]).flatten(2).all(2).nonzero()
    found = {int(column): (int(drawn[row]), int(plain[row])) for row, column in rows}
    assert found == {n: (int(given[n]), int(own[n])) for n in range(5)}
    assert list(Digits().load().relabelled_batches(10)) == []


def test_the_published_split_is_not_touched_by_random_labels() -> None:
    one, two = Digits(random_labels=300).load(), Digits().load()
    for (x, y), (a, b) in zip(
        one.eval_batches("test", 50), two.eval_batches("test", 50), strict=True
    ):
        assert torch.equal(x, a)
        assert torch.equal(y, b)
    assert one.digest() != two.digest()


@pytest.mark.parametrize("wrong", [-1, 2000])
def test_a_wrong_number_of_random_labels_is_refused(wrong: int) -> None:
    with pytest.raises(InputError, match="Give a number from 0 to 1437"):
        Digits(random_labels=wrong)


def test_a_run_with_random_labels_is_evaluated_on_both(runs: Path) -> None:
    evals = events(runs / "acdc", "eval")
    assert len(evals) == 7
    assert all(0 <= e["random_accuracy"] <= 100 and 0 <= e["true_accuracy"] <= 100 for e in evals)
    record = json.loads((runs / "acdc" / "record.json").read_text("utf-8"))
    last = evals[-1]
    assert record["sparse"]["random_accuracy"] == last["random_accuracy"]
    assert record["sparse"]["true_loss"] == pytest.approx(last["true_loss"])
    net = Pair.load(runs / "acdc" / "pair").sparse_model(tiny().model.build()).eval()
    source = tiny(data__random_labels="40").data
    ((x, given, own),) = source.load().relabelled_batches(40)
    predicted = net(x).argmax(1)
    for name, y in (("random", given), ("true", own)):
        share = 100 * float((predicted == y).double().mean())
        assert record["sparse"][f"{name}_accuracy"] == pytest.approx(share)
    assert record["sparse"]["random_accuracy"] != record["sparse"]["true_accuracy"]


def test_the_study_of_memorisation(runs: Path, tmp_path: Path, capsys: Capture) -> None:
    words = [str(runs / "acdc"), str(runs / "dense0")]
    assert main(["study", "memorisation", *words, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "study.json").read_text("utf-8"))
    acdc, dense = found["runs"]
    assert acdc["random"] == [e["random_accuracy"] for e in events(runs / "acdc", "eval")]
    assert (acdc["labels"], dense["sparsity"]) == (40, 0)
    assert acdc["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert [end["kind"] for end in acdc["ends"]] == ["dense", "sparse"] * 3
    assert [end["epoch"] for end in acdc["ends"]] == [1, 2, 3, 4, 5, 7]
    assert "<figure" in (tmp_path / "report.html").read_text("utf-8")
    plain = tmp_path / "plain"  # as if the labels were the true ones
    plain.mkdir()
    (plain / "recipe.json").write_bytes((runs / "acdc" / "recipe.json").read_bytes())
    text = (runs / "acdc" / "metrics.jsonl").read_text("utf-8")
    (plain / "metrics.jsonl").write_text(text.replace("random_", "other_"))
    capsys.readouterr()
    assert main(["study", "memorisation", str(plain)]) == 2
    assert "has no evaluation on random labels" in told(capsys)


def test_the_grid_of_memorisation_has_the_data_and_the_network_of_the_recipe() -> None:
    grid, paper = GRIDS["memorisation_cifar10"](), recipes.get("cifar10_memorisation")
    assert (grid.task.recipe.data, grid.task.recipe.model) == (paper.data, paper.model)
    assert (paper.data.random_labels, paper.data.augment.flip) == (1000, False)  # type: ignore[attr-defined]
    assert grid.sparsities == (0.5, 0.75, 0.9, 0.95)
