"""The frozen file of a runtime: without the model, and against damage and hostile contents."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import acdc
from acdc.bitmask import deserialize, read_metadata, serialize
from acdc.engine import native
from acdc.runtime import file
from acdc.runtime.checking import check_program
from support.engine_nets import NETWORKS, Gpt, Written
from support.fuzz import damaged
from test_runtime import batch, ready

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a compiler")

WHOLE = [
    "ResNet-8 for CIFAR", "bottleneck", "pre-activation", "WideResNet", "MobileNet", "functions",
    "squeeze-and-excitation", "several outputs", "MLPs", "DenseNet", "gated MLPs", "odd LayerNorms",
]  # fmt: skip


def runtime_of(name: str, dtype: torch.dtype = torch.float32) -> acdc.Runtime:
    model = ready(NETWORKS[name].build(), dtype=dtype)
    return acdc.Runtime(model, batch(NETWORKS[name].shape, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WHOLE)
def test_a_loaded_network_computes_the_same_bits(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    runtime = runtime_of(name, dtype)
    path = runtime.save(tmp_path / "net.acdcrt")
    loaded = acdc.Runtime.load(path)
    for samples in (2, 1, 3):  # first as the example, for `explain`
        x = batch(NETWORKS[name].shape, samples, dtype)
        torch.testing.assert_close(loaded(x), runtime(x), rtol=0, atol=0)
    assert loaded.get_inputs() == runtime.get_inputs()
    assert loaded.get_outputs() == runtime.get_outputs()
    assert loaded.explain().rows == runtime.explain().rows
    again = loaded.save(tmp_path / "again.acdcrt")
    assert again.read_bytes() == path.read_bytes()


def test_loading_needs_no_model(tmp_path: Path) -> None:
    """No class of the network is imported, and nothing is unpickled."""
    runtime = runtime_of("bottleneck")
    x = batch((3, 20, 20), 2, torch.float32)
    runtime.save(tmp_path / "net.acdcrt")
    torch.save({"x": x, "y": runtime(x)}, tmp_path / "call.pt")
    code = f"""
        import pickle, sys
        import torch, acdc
        call = torch.load({str(tmp_path / "call.pt")!r})
        pickle.loads = pickle.load = pickle.Unpickler = None
        loaded = acdc.Runtime.load({str(tmp_path / "net.acdcrt")!r})
        got = loaded.run(None, {{"x": call["x"].numpy()}})
        assert torch.equal(torch.from_numpy(got[0]), call["y"])
        assert not [m for m in sys.modules if m.startswith("acdc.runs")]
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_file_is_small(tmp_path: Path) -> None:
    model = ready(NETWORKS["bottleneck"].build(), 0.95, torch.float32)
    layers = [w for w in model.parameters() if w.dim() > 1]
    runtime = acdc.Runtime(model, batch((3, 20, 20), dtype=torch.float32))
    tensors = deserialize(runtime.save(tmp_path / "net.acdcrt").read_bytes())
    values = sum(t.numel() for name, t in tensors.items() if name.endswith("values"))
    (program,) = runtime._network.programs
    assert values == sum(op.weight.values.numel() for op in program.convs)
    assert values <= sum(int(w.count_nonzero()) for w in layers)
    packed = sum(t.numel() for name, t in tensors.items() if name.endswith(("mask", "gaps")))
    # At 95 % gaps take a byte for each kept weight, and masks two and a half.
    assert packed <= sum(int(w.count_nonzero()) for w in layers) * 1.05


def test_what_pytorch_computes_is_not_saved(tmp_path: Path) -> None:
    model = ready(Written(lambda m, x: m.a(x).sin(), a=Gpt()))
    runtime = acdc.Runtime(model, batch((6, 16)))
    with pytest.raises(acdc.InputError, match=r"holds no code.*sin \(sin\)"):
        runtime.save(tmp_path / "net.acdcrt")
    assert list(tmp_path.iterdir()) == []
    dense = acdc.Runtime(NETWORKS["bottleneck"].build().eval(), batch((3, 20, 20)).float())
    with pytest.raises(acdc.InputError, match="100% of its weights are not zero"):
        dense.save(tmp_path / "net.acdcrt")


def test_every_program_of_the_networks_passes_the_check() -> None:
    for network in NETWORKS.values():
        runtime = acdc.Runtime(
            ready(network.build(), dtype=torch.float32), batch(network.shape).float()
        )
        for program in runtime._network.programs:
            check_program(program)


def test_a_loaded_network_refuses_other_calls_in_words(tmp_path: Path) -> None:
    loaded = acdc.Runtime.load(runtime_of("bottleneck").save(tmp_path / "net.acdcrt"))
    x = batch((3, 20, 20), 2, torch.float32)
    for args, kwargs, words in (
        ((x.double(),), {}, "float64, and the example's is torch.float32"),
        ((x[:, :, 1:],), {}, "sizes"),
        ((x[:, :2],), {}, "sizes"),
        ((x[0],), {}, "sizes"),
        ((x[0, 0, 0],), {}, "batch first"),
        ((x, x), {}, "takes"),
        ((), {"y": x}, "takes"),
        ((x.numpy(),), {}, "got a ndarray"),
    ):  # fmt: skip
        with pytest.raises(acdc.InputError, match=words):
            loaded(*args, **kwargs)
    assert torch.equal(loaded(x=x), loaded(x))
    assert loaded(x[:0]).shape == (0, 10)


# --- damage ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "net.acdcrt"
    return runtime_of("squeeze-and-excitation").save(path).read_bytes()


def test_any_damage_is_refused_in_words(saved: bytes, tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "net.acdcrt"
    for _ in range(300):
        data = damaged(saved, rng)
        path.write_bytes(data)
        if data == saved:
            continue
        with pytest.raises(acdc.InputError, match="no frozen network") as caught:
            acdc.Runtime.load(path)
        assert len(str(caught.value)) < 1000


Note = dict[str, Any]
Tensors = dict[str, Tensor]


def forged(saved: bytes, change: Callable[[Note, Tensors], None]) -> bytes:
    """Return a file whose program was changed, with a checksum that agrees."""
    note, tensors = json.loads(read_metadata(saved)[file.ENTRY]), deserialize(saved)
    change(note, tensors)
    if len(note["ops"]) == 1:
        tensors.clear()
    note["sha256"] = file._digest(note, tensors)
    return serialize(tensors, {file.ENTRY: json.dumps(note)})


def conv_of(note: Note) -> Note:
    return next(op for op in note["ops"] if op["op"] == "conv")


def enlarge(note: Note, size: int) -> None:
    """Let the program be one pointwise operation on images of this size."""
    channels = note["values"][note["inputs"][0]][0]
    note.update(values=[[channels, size, size, 0]] * 2, inputs=[0], outputs=[1], sources=[0])
    note["ops"] = [
        {
            "op": "map",
            "name": "a",
            "x": 0,
            "out": 1,
            "y": None,
            "multiply": False,
            "activation": "relu",
        }
    ]


FORGERIES: dict[str, tuple[Callable[[Note, Tensors], None], str]] = {
    "a newer version": (lambda n, t: n.update(version=3), "newer version of acdc.*update acdc"),
    "no version": (lambda n, t: n.pop("version"), "version"),
    "another kind": (lambda n, t: n["ops"][0].update(op="exec"), "one of"),
    "huge channels": (lambda n, t: n["values"][1].__setitem__(0, 2**60), "can be"),
    "huge images": (lambda n, t: enlarge(n, 2**22), "bytes for one sample"),
    "images that do not fit": (lambda n, t: n["values"][1].__setitem__(1, 77), "fit"),
    "a huge filter": (
        lambda n, t: conv_of(n).update(geometry=[2**24, 2**24, 2**24, 2**24, 1, 1, 0, 0, 1, 1, 1]),
        "can have 2147483647",
    ),
    "a huge dilation": (
        lambda n, t: conv_of(n)["geometry"].__setitem__(slice(8, 10), [2**23, 2**23]), "too large"
    ),
    "stride 0": (lambda n, t: conv_of(n)["geometry"].__setitem__(4, 0), "at least 1"),
    "a value that is read too early": (lambda n, t: n["ops"][0].update(x=2), "not made before"),
    "a value beyond all": (lambda n, t: n["ops"][0].update(out=4000), "not those|not made"),
    "a value made twice": (lambda n, t: n["ops"][1].update(out=n["ops"][0]["out"]), "made"),
    "no input": (lambda n, t: n.update(inputs=[], sources=[]), "inputs"),
    "an input from nowhere": (lambda n, t: n.update(sources=[7]), "arguments"),
    "an unknown output": (lambda n, t: n.update(outputs=[10**4]), "can be|not made"),
    "a result of another form": (lambda n, t: n.update(result=["code", "x"]), "form"),
    "a result that is not there": (lambda n, t: n.update(result=["tensor", 3]), "names an output"),
    "no result": (lambda n, t: n.pop("result"), "form"),
    "no weights": (lambda n, t: t.pop("0.values"), "operation 0 has no weights"),
    "no mask": (lambda n, t: t.pop("0.mask"), "operation 0 has .* values and no mask"),
    "a short mask": (lambda n, t: t.update({"0.mask": t["0.mask"][1:]}), "mask that does not fit"),
    "two forms": (lambda n, t: t.update({"0.gaps": t["0.mask"]}), "both a mask and gaps"),
    "gaps that are no bytes": (
        lambda n, t: t.update({"0.gaps": t.pop("0.mask").float()}), "gaps that are no bytes"
    ),
    "gaps of other values": (lambda n, t: t.update({"0.gaps": t.pop("0.mask")}), "it has gaps"),
    "a long mask": (lambda n, t: t.update({"0.mask": t["0.mask"].repeat(2)}), "mask"),
    "too few values": (lambda n, t: t.update({"0.values": t["0.values"][1:]}), "as many values"),
    "other values": (lambda n, t: t.update({"0.values": t["0.values"].double()}), "no vector of"),
    "a bias of another size": (lambda n, t: t.update({"0.bias": t["0.bias"][1:]}), "a vector of"),
    "a tensor too many": (lambda n, t: t.update(more=torch.zeros(1)), "tensor of no operation"),
    "another dtype": (lambda n, t: n.update(dtype="float64"), "float64"),
    "nested": (lambda n, t: n.update(result=json.loads("[" * 80 + "]" * 80)), "nested"),
    "many operations": (lambda n, t: n.update(ops=n["ops"][:1] * 5000), "operations"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FORGERIES))
def test_hostile_files_are_refused_in_words(name: str, saved: bytes, tmp_path: Path) -> None:
    change, words = FORGERIES[name]
    path = tmp_path / "net.acdcrt"
    path.write_bytes(forged(saved, change))
    began = time.perf_counter()
    with pytest.raises(acdc.InputError, match=words):
        acdc.Runtime.load(path)
    assert time.perf_counter() - began < 5


def test_a_forged_file_that_changes_nothing_loads(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.acdcrt"
    path.write_bytes(forged(saved, lambda note, tensors: None))
    acdc.Runtime.load(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "none", "cannot be read"),
        (tmp_path, "no regular file"),
        (Path("/dev/zero"), "no regular file"),
    ):
        with pytest.raises(acdc.InputError, match=words):
            acdc.Runtime.load(path)
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(acdc.InputError, match="no frozen network"):
        acdc.Runtime.load(tmp_path / "empty")
