"""The results of training: bitwise loading of all three, and refusal of damaged files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from acdc.errors import InputError
from acdc.files import Staging
from acdc.index import FILES
from acdc.pair import Pair
from acdc.result import DenseNetwork, Result, SparseNetwork, kind_in, load, sizes
from acdc.support import Support


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))


def made(kind: type[Result], seed: int = 0) -> Result:
    """Return a result of this kind."""
    dense = {name: value.clone() for name, value in net(seed).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    masks = {
        name: torch.rand(dense[name].shape, generator=generator) < 0.5
        for name in ("0.weight", "3.weight")
    }
    sparse = {
        name: torch.where(masks[name], value, torch.zeros_like(value)) if name in masks else value
        for name, value in dense.items()
    }
    facts = {"seed": seed, "method": "ü"}
    if kind is Pair:
        return Pair(sparse, dense, Support(masks), facts)
    if kind is SparseNetwork:
        return SparseNetwork(sparse, Support(masks), facts)
    return DenseNetwork(dense, facts)


KINDS: tuple[type[Result], ...] = (Pair, SparseNetwork, DenseNetwork)
ALONE: tuple[type[Result], ...] = (SparseNetwork, DenseNetwork)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
every_lone_kind = pytest.mark.parametrize("kind", ALONE, ids=lambda kind: kind.__name__)


def bits(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    flat = {name: value.contiguous().reshape(-1) for name, value in state.items()}
    return {name: value.view(torch.uint8).tolist() for name, value in flat.items()}


@every_kind
def test_a_result_comes_back_bit_for_bit_whichever_it_is(
    tmp_path: Path, kind: type[Result]
) -> None:
    result = made(kind)
    assert result.save(tmp_path) == tmp_path
    loaded = load(tmp_path)
    assert type(loaded) is kind_in(tmp_path) is kind
    assert loaded == result
    assert loaded != made(kind, seed=1)
    assert loaded.facts == {"seed": 0, "method": "ü"}
    for twin, state in result.networks().items():
        again = loaded.state(twin)
        assert list(again) == list(state)  # the order too
        assert bits(again) == bits(state)
    if not isinstance(result, DenseNetwork):
        assert not isinstance(loaded, DenseNetwork)
        assert loaded.support == result.support
    names = {kind.index.name, *(FILES[twin] for twin in result.networks())}
    assert set(os.listdir(tmp_path)) == names
    assert sizes(tmp_path) == {
        twin: (tmp_path / FILES[twin]).stat().st_size for twin in result.networks()
    }


@every_lone_kind
def test_a_lone_network_has_the_file_that_it_would_have_in_a_pair(
    tmp_path: Path, kind: type[Result]
) -> None:
    made(Pair).save(tmp_path / "pair")
    made(kind).save(tmp_path / "alone")
    (twin,) = made(kind).networks()
    files = [(tmp_path / name / FILES[twin]).read_bytes() for name in ("pair", "alone")]
    assert files[0] == files[1]


@every_kind
def test_equality_looks_at_facts_and_bits(kind: type[Result]) -> None:
    result = made(kind)
    assert result != "a result"
    assert dataclasses.replace(result, facts={}) != result
    for twin, state in result.networks().items():
        other = {**state, "3.bias": torch.nextafter(state["3.bias"], torch.tensor(9.0))}
        if kind is not Pair or twin == "dense":
            assert dataclasses.replace(result, **{twin: other}) != result  # type: ignore[arg-type]


def test_a_network_loads_into_a_model_and_another_model_is_refused() -> None:
    sparse, dense = made(SparseNetwork), made(DenseNetwork)
    assert isinstance(sparse, SparseNetwork)
    assert isinstance(dense, DenseNetwork)
    for twin, load_it in (("sparse", sparse.sparse_model), ("dense", dense.dense_model)):
        model = load_it(net(seed=3))
        expected = sparse.sparse if twin == "sparse" else dense.dense
        assert bits(dict(model.state_dict())) == bits(expected)
        with pytest.raises(InputError, match=rf"The {twin} network is of another model"):
            load_it(nn.Linear(2, 2))


# --- damage -------------------------------------------------------------------------------------


def only_file(kind: type[Result]) -> str:
    (twin,) = made(kind).networks()
    return FILES[twin]


@every_lone_kind
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_truncated_file_is_refused(tmp_path: Path, kind: type[Result], share: float) -> None:
    for name in (only_file(kind), kind.index.name):
        made(kind).save(tmp_path)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: min(int(len(data) * share), len(data) - 1)])
        with pytest.raises(InputError, match=r"(it is|was) truncated"):
            load(tmp_path)


@every_lone_kind
def test_one_flipped_bit_anywhere_is_refused(tmp_path: Path, kind: type[Result]) -> None:
    made(kind).save(tmp_path)
    for name in (only_file(kind), kind.index.name):
        data = (tmp_path / name).read_bytes()
        # Every byte of the index: no other checksum covers it.
        for position in range(0, len(data), 1 if name == kind.index.name else 13):
            damaged = bytearray(data)
            damaged[position] ^= 1 << (position % 8)
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(InputError, match=r"altered|not the index|version"):
                load(tmp_path)
        (tmp_path / name).write_bytes(data)
    assert load(tmp_path) == made(kind)


@every_lone_kind
def test_files_of_two_saves_are_refused(tmp_path: Path, kind: type[Result]) -> None:
    made(kind).save(tmp_path / "one")
    made(kind, seed=1).save(tmp_path / "two")
    name = only_file(kind)
    (tmp_path / "one" / name).write_bytes((tmp_path / "two" / name).read_bytes())
    with pytest.raises(InputError, match=r"of another save"):
        load(tmp_path / "one")


@every_lone_kind
def test_a_missing_file_is_named(tmp_path: Path, kind: type[Result]) -> None:
    made(kind).save(tmp_path)
    (tmp_path / only_file(kind)).unlink()
    for reading in (load, sizes):
        with pytest.raises(InputError, match=rf"There is no {only_file(kind)} .*not whole"):
            reading(tmp_path)
    (tmp_path / kind.index.name).unlink()
    with pytest.raises(InputError, match=r"none of pair\.json, sparse\.json, dense\.json"):
        load(tmp_path)
    with pytest.raises(InputError, match=rf"There is no {kind.index.name}"):
        kind.load(tmp_path)


@every_lone_kind
def test_an_index_of_a_newer_format_or_of_another_kind_is_refused(
    tmp_path: Path, kind: type[Result]
) -> None:
    made(kind).save(tmp_path)
    path = tmp_path / kind.index.name
    text = path.read_text()
    path.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(InputError, match=r"version 2, and this acdc reads up to 1. Upgrade"):
        load(tmp_path)
    path.write_text(text.replace(kind.index.format, "acdc.other"))
    with pytest.raises(InputError, match=rf"is not the index of a {kind.index.noun}"):
        load(tmp_path)


def forge(folder: Path, kind: type[Result], change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the index of a saved result as another program might: with a correct checksum."""
    path = folder / kind.index.name
    index = json.loads(path.read_text())
    change(index)
    index["sha256"] = "0" * 64
    text = json.dumps(index)
    path.write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest()))


@every_lone_kind
def test_files_with_right_checksums_that_do_not_fit_are_refused(
    tmp_path: Path, kind: type[Result]
) -> None:
    made(kind).save(tmp_path)
    forge(tmp_path, kind, lambda index: None)
    assert load(tmp_path) == made(kind)  # the forge itself is sound
    (twin,) = made(kind).networks()

    def other_file(index: dict[str, Any]) -> None:
        data = safetensors.torch.save({"w": torch.zeros(2)})
        (tmp_path / FILES[twin]).write_bytes(data)
        index["files"][twin] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    attempts: list[Callable[[dict[str, Any]], Any]] = [
        lambda index: index["tensors"].pop(),
        lambda index: index["tensors"].append("more"),
        lambda index: index.update(files=[]),
        other_file,
    ]
    if kind is SparseNetwork:
        attempts += [
            lambda index: index["support"].update(sha256="1" * 64),
            lambda index: index["support"].pop("layers"),
        ]
    for attempt in attempts:
        made(kind).save(tmp_path)
        forge(tmp_path, kind, attempt)
        with pytest.raises(InputError, match=rf"the {kind.index.noun} in .* do not fit together"):
            load(tmp_path)


# --- saving -------------------------------------------------------------------------------------


@every_lone_kind
def test_a_save_that_dies_leaves_the_old_network_or_the_new(
    tmp_path: Path, kind: type[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = made(kind), made(kind, seed=1)
    replace, outcomes = os.replace, []
    for fatal in (1, 2, 3):
        folder = old.save(tmp_path / str(fatal))
        calls = [fatal]

        def dying(source: Any, target: Any, calls: list[int] = calls) -> None:
            calls[0] -= 1
            if not calls[0]:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            with pytest.raises(KeyboardInterrupt):
                new.save(folder)
        assert kind_in(folder) is kind
        outcomes.append("old" if load(folder) == old else "new")
        new.save(folder)
        assert load(folder) == new
    assert outcomes == ["old", "new", "new"]


@every_lone_kind
def test_a_first_save_that_dies_is_found(
    tmp_path: Path, kind: type[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is in its place yet, and everything is on the disk."""
    replace = os.replace

    def dying(source: Any, target: Any) -> None:
        if Path(source).name != ".acdc-saving":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            made(kind).save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".acdc-saved"]
    assert load(tmp_path) == made(kind)
    assert all(size > 0 for size in sizes(tmp_path).values())
    other = next(one for one in KINDS if one is not kind)
    with pytest.raises(InputError, match="already holds a"):
        made(other).save(tmp_path)


@every_lone_kind
def test_a_full_disk_leaves_the_old_network(
    tmp_path: Path, kind: type[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    made(kind).save(tmp_path)

    def full(self: Staging, name: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "add", full)
        with pytest.raises(InputError, match=rf"Cannot write the {kind.index.noun} .*Free some"):
            made(kind, seed=1).save(tmp_path)
    assert load(tmp_path) == made(kind)


def test_a_folder_holds_one_result(tmp_path: Path) -> None:
    made(Pair).save(tmp_path)
    for kind in ALONE:
        with pytest.raises(InputError, match=rf"already holds a pair .*for the {kind.index.noun}"):
            made(kind).save(tmp_path)
    assert load(tmp_path) == made(Pair)
    (tmp_path / "dense.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds pair\.json and dense\.json"):
        load(tmp_path)


# --- what is accepted ---------------------------------------------------------------------------

W = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
M = torch.tensor([[True, False], [False, True]])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SparseNetwork({"w": W}, Support({"v": M})), r"'v', which the sparse network does"),
        (lambda: SparseNetwork({"w": W}, Support({"w": ~M})), r"not \+0.0 in the sparse network"),
        (lambda: SparseNetwork({"w": W}, Support({"w": M[0]})), r"shape \(2,\) for 'w'"),
        (lambda: SparseNetwork({"w": 3}, Support({})), r"'w' of the sparse network is a int"),  # type: ignore[dict-item]
        (lambda: DenseNetwork({"w": 3}), r"'w' of the dense network is a int"),  # type: ignore[dict-item]
        (lambda: DenseNetwork({"w": W.to("meta")}), r"on meta"),
        (lambda: DenseNetwork({"w": W}, {"best": float("nan")}), r"fact 'best' cannot be written"),
        (lambda: SparseNetwork({"w": W}, Support({"w": M}), {"a": {1}}), r"fact 'a' cannot be"),
    ],
)
def test_what_cannot_be_saved_is_refused(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make()


def test_a_network_that_was_not_trained_is_refused_with_what_there_is() -> None:
    with pytest.raises(InputError, match=r"no dense network: the run left a sparse network alone"):
        made(SparseNetwork).state("dense")
    with pytest.raises(InputError, match=r"no sparse network: .* --twin dense"):
        made(DenseNetwork).state("sparse")
    for kind in KINDS:
        with pytest.raises(InputError, match=r'"sparse" or "dense"'):
            made(kind).state("middle")  # type: ignore[arg-type]
