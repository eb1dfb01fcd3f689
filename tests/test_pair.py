"""The pair: accepted twins, bitwise loading, and refusal of damaged files."""

import dataclasses
import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import acdc.pair
from acdc.errors import InputError
from acdc.index import FILES, PAIR
from acdc.pair import Pair
from acdc.result import sizes
from acdc.support import Support, kept

DENSE, SPARSE, INDEX = FILES["dense"], FILES["sparse"], PAIR.name
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Net(nn.Module):
    """About 300 thousand weights in convolutions with real BatchNorms, and a linear layer."""

    def __init__(self, width=64, blocks=3):
        super().__init__()
        self.stem = nn.Conv2d(3, width // 2, 3, bias=False)
        self.stem_bn = nn.BatchNorm2d(width // 2)
        self.grow = nn.Conv2d(width // 2, width, 1, bias=False)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
            for _ in range(blocks)
        )
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        x = self.grow(torch.relu(self.stem_bn(self.stem(x))))
        for layer in self.layers:
            x = torch.relu(x + layer(x))
        return self.fc(x.mean((2, 3)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def support_of(tensors, sparsity, seed=0):
    """Keep exactly ``kept`` weights of every tensor, at random."""
    masks = {}
    for name, tensor in tensors.items():
        flat = torch.zeros(tensor.numel(), dtype=torch.bool)
        permutation = torch.randperm(tensor.numel(), generator=generator(seed))
        flat[permutation[: kept(tensor.numel(), sparsity)]] = True
        masks[name] = flat.view(tensor.shape)
    return Support(masks)


def twins(net, sparsity, seed=0, **facts):
    """Return the pair of a model: its own weights as the dense twin, some zeroed as the sparse."""
    support = support_of(
        {k: v for k, v in net.named_parameters() if v.dim() > 1}, sparsity, seed=seed
    )
    dense = {k: v.detach().clone() for k, v in net.state_dict().items()}
    sparse = {k: v.clone() for k, v in dense.items()}
    for name, mask in support.items():
        sparse[name] = torch.where(mask, sparse[name], torch.zeros_like(sparse[name]))
    return Pair(sparse, dense, support, facts)


def make_net(seed=0, **sizes_):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net(**sizes_)
        net.train()
        with torch.no_grad():
            net(torch.randn(4, 3, 8, 8))  # so that the statistics of BatchNorm are not 0 and 1
    return net


@pytest.fixture(scope="module")
def pair():
    return twins(make_net(width=16, blocks=1), 0.9, steps=1200, recipe={"lr": 0.1, "name": "ü"})


@pytest.fixture
def saved(pair, tmp_path):
    return pair.save(tmp_path / "pair")


def one_layer(weight, mask, **others):
    """Return a pair with the weight ``w.weight`` and other tensors."""
    zero = torch.zeros_like(weight)
    return Pair(
        {"w.weight": torch.where(mask, weight, zero), **others},
        {"w.weight": weight, **others},
        Support({"w.weight": mask}),
    )


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


# What comes back


@st.composite
def pairs(draw):
    """Pairs of one to three layers, of any shape from no dimension up, with special values."""
    special = st.sampled_from([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, 3.5])
    masks = {}
    count = torch.tensor(draw(st.integers(-(2**63), 2**63 - 1)))
    dense = {"bn.num_batches_tracked": count}
    sparse = dict(dense)
    for index in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(["a{}.weight", "{}", "b.{}_proj", "weight{}.weight"]))
        name = name.format(index)
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 17]), max_size=4))
        while np.prod(shape, dtype=int) > 3000:
            shape.pop()
        dtype = draw(st.sampled_from(FLOATS))
        weight = torch.randn(shape, generator=generator(index), dtype=torch.float64).to(dtype)
        if weight.numel():
            weight.view(-1)[0] = draw(special)
        if draw(st.booleans()) and weight.dim() > 1:
            weight = weight.transpose(0, -1)  # not contiguous
        share = draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
        mask = torch.rand(weight.shape, generator=generator(index + 9)) < share
        dense[name], masks[name] = weight, mask
        sparse[name] = torch.where(mask, weight, torch.zeros_like(weight))
    return Pair(sparse, dense, Support(masks))


@settings(max_examples=80, deadline=None)
@given(pairs())
def test_a_saved_pair_comes_back_bit_for_bit(tmp_path_factory, pair):
    folder = pair.save(tmp_path_factory.mktemp("pair"))
    loaded = Pair.load(folder)
    assert loaded.support == pair.support
    for twin in ("sparse", "dense"):
        before, after = pair.state(twin), loaded.state(twin)
        assert list(before) == list(after)  # the order too
        for name in before:
            assert before[name].dtype == after[name].dtype
            assert before[name].shape == after[name].shape
            assert bits(before[name]) == bits(after[name])
    assert loaded == pair


def test_kept_weights_with_odd_values_stay_kept(tmp_path):
    weight = torch.tensor([[0.0, -0.0, float("nan"), float("inf"), 5.0, 7.0, 1e-45, -3.0, 2.0]])
    weight.view(torch.int32)[0, 2] = 0x7FC01234  # a NaN with a payload
    mask = torch.tensor([[True] * 7 + [False] * 2])
    loaded = Pair.load(one_layer(weight, mask).save(tmp_path))
    assert loaded.support.counts() == {"w.weight": 7}
    assert bits(loaded.sparse["w.weight"])[: 7 * 4] == bits(weight)[: 7 * 4]
    assert bits(loaded.sparse["w.weight"])[7 * 4 :] == [0] * 8


def test_facts_come_back_and_the_pair_prints_short(pair, saved):
    loaded = Pair.load(saved)
    assert loaded.facts == {"steps": 1200, "recipe": {"lr": 0.1, "name": "ü"}}
    assert repr(loaded) == repr(pair)
    assert "sparsity 0.9" in repr(pair)
    assert "steps, recipe" in repr(pair)
    assert len(repr(pair)) < 200


def test_equality_looks_at_every_bit(pair):
    other = Pair(dict(pair.sparse), dict(pair.dense), pair.support, pair.facts)
    assert other == pair
    assert other != "a pair"
    bias = pair.dense["fc.bias"].clone()
    bias[0] = torch.nextafter(bias[0], torch.tensor(9.0))
    assert Pair(pair.sparse, {**pair.dense, "fc.bias": bias}, pair.support, pair.facts) != pair
    assert Pair(pair.sparse, pair.dense, pair.support, {}) != pair
    with pytest.raises(dataclasses.FrozenInstanceError):
        pair.facts = {}


def test_another_process_reads_the_pair(pair, saved):
    script = (
        "import sys, torch; from acdc.pair import Pair; pair = Pair.load(sys.argv[1]);"
        "print(pair.support.digest(), pair.sparse['fc.weight'].view(torch.int32).sum().item())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(saved)], capture_output=True, text=True, check=True
    )
    total = pair.sparse["fc.weight"].view(torch.int32).sum().item()
    assert run.stdout.split() == [pair.support.digest(), str(total)]


def test_tied_tensors_are_stored_once_and_come_back_under_both_names(tmp_path):
    weight = torch.randn(64, 64, generator=generator())
    bias = torch.randn(4096, generator=generator(1))
    mask = support_of({"w": weight}, 0.5)["w"]
    pruned = torch.where(mask, weight, torch.zeros_like(weight))
    pair = Pair(
        {"emb.weight": pruned, "head.weight": pruned, "b": bias, "c": bias.view(64, 64)},
        {"emb.weight": weight, "head.weight": weight.clone(), "b": bias, "c": bias.view(64, 64)},
        Support({"emb.weight": mask}),
    )
    loaded = Pair.load(pair.save(tmp_path))
    assert loaded == pair
    stored = safetensors.torch.load_file(tmp_path / SPARSE)
    assert sorted(stored) == ["b", "c", *(f"emb.{f}" for f in sorted(acdc.bitmask.FIELDS))]


def test_names_that_collide_with_the_fields_are_kept_apart(tmp_path):
    weight = torch.randn(3, 5, generator=generator())
    mask = weight > 0
    pruned = torch.where(mask, weight, torch.zeros_like(weight))
    fields = {f"m.{part}": torch.tensor([i]) for i, part in enumerate(acdc.bitmask.FIELDS)}
    other = {"m": weight[:1], "n.shape": torch.tensor(4), "n.weight.shape": torch.tensor(5)}
    names = ("m.weight", "m.weight.weight", "n.weight", "weight")
    pair = Pair(
        {**fields, **other, **dict.fromkeys(names, pruned)},
        {**fields, **other, **dict.fromkeys(names, weight)},
        Support(dict.fromkeys(names, mask)),
    )
    assert Pair.load(pair.save(tmp_path)) == pair


# The files


def test_the_same_pair_is_the_same_bytes_each_time(pair, tmp_path):
    """The order of several metadata entries would be different each time."""
    folders = [pair.save(tmp_path / str(number)) for number in range(8)]
    for name in (DENSE, SPARSE, INDEX):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name


def test_the_layout_is_the_one_that_the_docstring_promises(pair, saved):
    """A reader written from the docstring of acdc.pair alone."""
    stored = safetensors.torch.load_file(saved / SPARSE)
    with safetensors.safe_open(saved / SPARSE, "pt") as file:
        note = json.loads(file.metadata()["acdc"])
    assert note["layout"] == "sparse-bitmask"
    assert note["weights"]["layers.0.0"] == "layers.0.0.weight"
    for prefix, name in note["weights"].items():
        fields = [stored.pop(f"{prefix}.{f}") for f in ("shape", "compressed", "bitmask")]
        shape, values, mask = fields
        offsets = stored.pop(f"{prefix}.row_offsets")
        assert (shape.dtype, mask.dtype, offsets.dtype) == (torch.int64, torch.uint8, torch.int32)
        rows = []
        for row in range(shape[0]):
            columns = int(np.prod(shape[1:].tolist()))
            start = int(offsets[row])
            line = []
            for c in range(columns):
                one = int(mask[row, c // 8]) >> (c % 8) & 1
                line.append(values[start].item() if one else 0.0)
                start += one
            rows.append(line)
        weight = torch.tensor(rows, dtype=values.dtype).view(shape.tolist())
        assert bits(weight) == bits(pair.sparse[name])
    assert {k: bits(v) for k, v in stored.items()} == {
        k: bits(v) for k, v in pair.sparse.items() if k not in pair.support
    }

    dense = safetensors.torch.load_file(saved / DENSE)
    assert {k: bits(v) for k, v in dense.items()} == {k: bits(v) for k, v in pair.dense.items()}

    text = (saved / INDEX).read_text()
    index = json.loads(text)
    blank = text.replace(index["sha256"], "0" * 64)
    assert hashlib.sha256(blank.encode()).hexdigest() == index["sha256"]
    assert index["files"]["sparse"]["bytes"] == (saved / SPARSE).stat().st_size
    assert index["support"]["nnz"] == pair.support.nnz
    assert {k: v["kept"] for k, v in index["support"]["layers"].items()} == pair.support.counts()


def test_a_sparse_file_at_95_percent_takes_at_most_a_tenth(tmp_path):
    net = make_net()
    pair = twins(net, 0.95)
    assert 220_000 < pair.support.numel < 320_000
    measured = sizes(pair.save(tmp_path))
    assert measured == {
        "sparse": (tmp_path / SPARSE).stat().st_size,
        "dense": (tmp_path / DENSE).stat().st_size,
    }
    assert measured["dense"] > 4 * pair.support.numel
    assert measured["sparse"] <= 0.10 * measured["dense"]


@pytest.mark.parametrize("file", [DENSE, SPARSE, INDEX])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 1.0])
def test_a_truncated_file_is_refused(saved, file, share):
    data = (saved / file).read_bytes()
    (saved / file).write_bytes(data[: min(int(len(data) * share), len(data) - 1)])
    with pytest.raises(InputError, match=r"(it is|was) truncated"):
        Pair.load(saved)


@pytest.mark.parametrize("file", [DENSE, SPARSE, INDEX])
def test_one_flipped_bit_anywhere_is_refused(saved, file):
    data = (saved / file).read_bytes()
    step = max(1, len(data) // 97)
    positions = {*range(min(64, len(data))), *range(0, len(data), step), len(data) - 1}
    if file == INDEX:
        positions = set(range(len(data)))  # all bytes: no other checksum covers them
    for position in sorted(positions):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        (saved / file).write_bytes(damaged)
        with pytest.raises(InputError, match=r"altered|not the index|version"):
            Pair.load(saved)
    (saved / file).write_bytes(data)
    Pair.load(saved)


def test_a_file_that_grew_is_refused(saved):
    with open(saved / DENSE, "ab") as file:
        file.write(b" ")
    with pytest.raises(InputError, match=r"bytes, and \d+ were saved"):
        Pair.load(saved)


def test_files_of_two_saves_are_refused(pair, saved, tmp_path):
    other = twins(make_net(seed=3, width=16, blocks=1), 0.9).save(tmp_path / "other")
    assert sizes(other)["dense"] == sizes(saved)["dense"]
    (saved / DENSE).write_bytes((other / DENSE).read_bytes())
    with pytest.raises(InputError, match=r"dense\.safetensors was altered .* another save"):
        Pair.load(saved)


@pytest.mark.parametrize("file", [DENSE, SPARSE, INDEX])
def test_a_missing_file_is_named(saved, file):
    (saved / file).unlink()
    with pytest.raises(InputError, match=rf"There is no {file}"):
        Pair.load(saved)
    if file != INDEX:
        with pytest.raises(InputError, match=rf"There is no {file}"):
            sizes(saved)


def test_the_folder_of_a_run_gets_a_hint(saved):
    with pytest.raises(InputError, match=r"There is one in .*pair"):
        Pair.load(saved.parent)
    with pytest.raises(InputError, match=r"not the folder of a pair"):
        Pair.load(saved / INDEX)


def test_a_newer_format_and_another_json_are_refused(saved):
    text = (saved / INDEX).read_text()
    (saved / INDEX).write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(InputError, match=r"version 2, and this acdc reads up to 1. Upgrade"):
        Pair.load(saved)
    (saved / INDEX).write_text('{"format": "something"}')
    with pytest.raises(InputError, match=r"not the index of a pair"):
        Pair.load(saved)
    (saved / INDEX).write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"altered"):
        Pair.load(saved)


def forge(folder, change_index=lambda index: None, **files):
    """Replace files of a saved pair as another program might: with all checksums right."""
    index = json.loads((folder / INDEX).read_text())
    for twin, data in files.items():
        (folder / f"{twin}.safetensors").write_bytes(data)
        index["files"][twin] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change_index(index)
    index["sha256"] = "0" * 64
    text = json.dumps(index)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / INDEX).write_text(text.replace("0" * 64, digest))


def test_files_with_right_checksums_that_do_not_fit_are_refused(pair, saved):
    stored = safetensors.torch.load_file(saved / SPARSE)
    metadata = acdc.bitmask.read_metadata((saved / SPARSE).read_bytes())
    original = {name: (saved / name).read_bytes() for name in (DENSE, SPARSE, INDEX)}

    def rewritten(name, tensor):
        return safetensors.torch.save({**stored, name: tensor}, metadata)

    forge(saved, sparse=rewritten("fc.compressed", stored["fc.compressed"].clone()))
    assert Pair.load(saved) == pair  # the forge itself is sound

    padding = stored["stem.bitmask"].clone()  # 27 weights a row: five bits to spare
    padding[1, 3] |= 128
    wider = torch.nn.functional.pad(stored["fc.bitmask"], (0, 1))
    flipped = stored["fc.bitmask"].clone()
    flipped[0, 0] ^= 1
    moved = stored["fc.row_offsets"].flip(0)
    other_bits = stored["fc.bitmask"].flip(0)
    attempts = [
        {"dense": b"not safetensors"},
        {"sparse": safetensors.torch.save(stored)},
        {"sparse": rewritten("fc.bitmask", flipped)},
        {"sparse": rewritten("fc.bitmask", other_bits)},
        {"sparse": rewritten("fc.bitmask", stored["fc.bitmask"][:, :1].clone())},
        {"sparse": rewritten("fc.bitmask", wider)},
        {"sparse": rewritten("stem.bitmask", padding)},
        {"sparse": rewritten("fc.row_offsets", moved)},
        {"sparse": rewritten("fc.shape", torch.tensor([-1, -16]))},
        {"sparse": rewritten("extra", torch.zeros(1))},
        {"change_index": lambda index: index["support"].pop("layers")},
        {"change_index": lambda index: index["support"].update(sha256="1" * 64)},
        {"change_index": lambda index: index.update(files=[])},
        {"change_index": lambda index: index["tensors"].pop()},
    ]
    for attempt in attempts:
        for name, data in original.items():
            (saved / name).write_bytes(data)
        forge(saved, **attempt)
        with pytest.raises(InputError, match=r"do not fit together"):
            Pair.load(saved)


# Saving when something goes wrong


class Killed(BaseException):
    """Represents the death of the process."""


def test_a_save_that_dies_at_any_call_leaves_the_old_pair_or_the_new(pair, tmp_path, monkeypatch):
    new = twins(make_net(seed=5, width=16, blocks=1), 0.5)
    outcomes = []
    for fatal in range(1, 100):
        folder = tmp_path / str(fatal)
        pair.save(folder)
        calls = 0

        def dying(function, fatal=fatal):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls >= fatal:  # and the cleaning up does not happen either
                    raise Killed
                return function(*args, **kwargs)

            return call

        def half_written(path, data, fatal=fatal):
            nonlocal calls
            calls += 1
            with open(path, "wb") as file:
                file.write(data if calls < fatal else data[: len(data) // 2])
            if calls >= fatal:
                raise Killed

        with monkeypatch.context() as patch:
            for name in ("replace", "fsync"):
                patch.setattr(os, name, dying(getattr(os, name)))
            for name in ("unlink", "rmdir", "mkdir"):
                patch.setattr(Path, name, dying(getattr(Path, name)))
            patch.setattr(Path, "write_bytes", half_written)
            try:
                new.save(folder)
            except Killed:
                died = True
            else:
                died = False
        loaded = Pair.load(folder)
        assert loaded in (pair, new)
        outcomes.append("old" if loaded == pair else "new")
        assert sizes(folder).keys() == {"sparse", "dense"}
        new.save(folder)
        assert Pair.load(folder) == new
        assert sorted(os.listdir(folder)) == sorted([DENSE, SPARSE, INDEX])  # no litter
        if not died:
            break
    assert outcomes[-1] == "new"
    # In time order: the old pair until all files are on the disk, then the new one.
    assert outcomes == sorted(outcomes, key=["old", "new"].index)
    assert outcomes.count("old") > 9
    assert outcomes.count("new") > 6


def test_all_files_are_on_the_disk_before_the_first_takes_its_name(pair, tmp_path, monkeypatch):
    events = []
    replace, fsync = os.replace, os.fsync

    def replacing(source, target):
        events.append(Path(target).name)
        replace(source, target)

    def syncing(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append(f"sync {kind}")
        fsync(descriptor)

    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(os, "fsync", syncing)
    pair.save(tmp_path)
    aside = [*["sync file"] * 3, "sync folder", ".acdc-saved", "sync folder"]
    assert events == [*aside, DENSE, INDEX, SPARSE, "sync folder", "sync folder"]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_leaves_the_old_pair(pair, tmp_path, monkeypatch, stage, code):
    folder = pair.save(tmp_path)
    new = twins(make_net(seed=5, width=16, blocks=1), 0.5)
    write = Path.write_bytes
    written = []

    def full(path, data):
        written.append(path)
        if len(written) == stage:
            write(path, data[:100])
            raise OSError(code, os.strerror(code))
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(InputError, match=r"Free some space .* is as it was") as caught:
            new.save(folder)
    assert os.strerror(code) in str(caught.value)
    assert sorted(os.listdir(folder)) == sorted([DENSE, SPARSE, INDEX])
    assert Pair.load(folder) == pair


def test_a_real_limit_on_file_size_is_a_sentence(tmp_path):
    """The kernel refuses the write in the middle of the dense file."""
    script = (
        "import resource, sys, torch\n"
        "from acdc.errors import InputError\n"
        "from acdc.pair import Pair\n"
        "from acdc.support import Support\n"
        "w = {'w.weight': torch.ones(100, 100)}\n"
        "pair = Pair(w, w, Support.full(w))\n"
        "pair.save(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n"
        "    pair.save(sys.argv[1])\n"
        "except InputError as error:\n"
        "    print(error)\n"
        "assert Pair.load(sys.argv[1]) == pair\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "File too large. Free some space" in run.stdout
    assert sorted(os.listdir(tmp_path)) == sorted([DENSE, SPARSE, INDEX])


def test_a_folder_that_cannot_be_written_is_a_sentence(pair, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match=r"Cannot write the pair to .* Choose a folder"):
        pair.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "not a folder"


# Into a model


@pytest.mark.parametrize("twin", ["sparse", "dense"])
def test_a_twin_loads_into_a_model_bit_for_bit(pair, saved, twin):
    model = make_net(seed=1, width=16, blocks=1)
    loaded = Pair.load(saved)
    same = loaded.sparse_model(model) if twin == "sparse" else loaded.dense_model(model)
    assert same is model
    state = model.state_dict()
    assert {k: bits(v) for k, v in state.items()} == {
        k: bits(v) for k, v in pair.state(twin).items()
    }
    state["fc.bias"].add_(1)  # the model's own memory, not the pair's
    assert loaded == pair


def test_another_model_is_refused_and_left_alone(pair):
    model = make_net(seed=1, width=16, blocks=2)
    model.fc = nn.Linear(16, 11)
    before = {k: bits(v) for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=r"of another model: .*; .*; .* and \d+ more") as caught:
        pair.sparse_model(model)
    assert "layers.1." in str(caught.value)
    assert {k: bits(v) for k, v in model.state_dict().items()} == before
    model.layers = model.layers[:1]
    with pytest.raises(InputError, match=r"'fc.weight' is float32\[10, 16\] in the pair and float"):
        pair.dense_model(model)
    with pytest.raises(InputError, match=r"the model has no 'stem.weight'"):
        pair.dense_model(nn.Linear(1, 1))
    with pytest.raises(InputError, match=r"float32.* in the pair and float64.* in the model"):
        pair.dense_model(make_net(width=16, blocks=1).double())


# What a pair accepts


W = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
M = torch.tensor([[True, False], [False, True]])


@pytest.mark.parametrize(
    ("sparse", "dense", "masks", "sentence"),
    [
        ({"w": W}, {"v": W}, {}, r"dense twin has no 'w'; the sparse twin has no 'v'"),
        ({"w": W}, {"w": W[0]}, {}, r"float32\[2, 2\] in the sparse twin and float32\[2\] in the"),
        ({"w": W}, {"w": W.double()}, {}, r"float64\[2, 2\] in the dense twin"),
        ({"w": W}, {"w": W}, {"v": M}, r"names 'v', which the sparse twin does not have"),
        ({"w": W}, {"w": W}, {"w": M[0]}, r"shape \(2,\) for 'w', and the weight is of"),
        ({"w": W}, {"w": W}, {"w": ~M}, r"2 weights of 'w' are pruned .* not \+0.0"),
        ({"w": -W}, {"w": W}, {"w": M}, r"2 weights of 'w' are pruned"),
        ({"w": M.int()}, {"w": M.int()}, {"w": M}, r"Only floating point weights are pruned"),
        ({"w": 3}, {"w": W}, {}, r"entry 'w' of the sparse twin is a int"),
        ({"w": W.to_sparse()}, {"w": W}, {}, r"torch.sparse_coo. Only ordinary tensors"),
        ({"w": W}, {"w": W.to("meta")}, {}, r"on meta"),
        ({"w": W.to(torch.complex128)}, {"w": W}, {}, r"is torch.complex128"),
    ],
)
def test_what_does_not_belong_together_is_refused(sparse, dense, masks, sentence):
    with pytest.raises(InputError, match=sentence):
        Pair(sparse, dense, Support(masks))


@pytest.mark.parametrize("fact", [float("nan"), float("inf"), {1, 2}, torch.ones(1), {"a": b""}])
def test_facts_that_json_cannot_hold_are_refused(fact):
    with pytest.raises(InputError, match=r"fact 'best' cannot be written as JSON"):
        Pair({"w": W}, {"w": W}, Support({"w": M}), {"best": fact})


def test_an_unknown_twin_is_refused(pair):
    with pytest.raises(InputError, match=r'"sparse" or "dense"'):
        pair.state("middle")
