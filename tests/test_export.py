"""Exported twins: a plain safetensors file, and ONNX in another runtime."""

import copy
import logging
import os
import sys
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import acdc.export.onnx_file
from acdc.errors import AcdcError, InputError, MissingDependency
from acdc.export import to_onnx, to_safetensors
from acdc.pair import Pair
from acdc.support import Support


class Net(nn.Module):
    """Convolutions with and without BatchNorm behind them, linear layers with and without bias."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.hidden = nn.Linear(8, 24, bias=False)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(24, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        x = self.depthwise(x).mean((2, 3))
        return self.fc(self.drop(torch.relu(self.hidden(x))))


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
        with torch.no_grad():
            for _ in range(3):
                net(torch.randn(8, 3, 8, 8))
            for bn in (net.bn1, net.bn2):
                bn.weight.uniform_(-1, 1)  # a negative scale makes a folded zero -0.0
                bn.bias.normal_()
    return net


@pytest.fixture(scope="module")
def pair(net):
    generator = torch.Generator().manual_seed(1)
    dense = {k: v.detach().clone() for k, v in net.state_dict().items()}
    masks = {
        k: torch.rand(v.shape, generator=generator) < 0.1
        for k, v in net.named_parameters()
        if v.dim() > 1
    }
    sparse = {
        k: torch.where(masks[k], v, torch.zeros_like(v)) if k in masks else v.clone()
        for k, v in dense.items()
    }
    return Pair(sparse, dense, Support(masks))


def copy_of(net, pair, twin):
    """Return a model with the twin's weights, in evaluation mode."""
    model = Net()
    model.load_state_dict(pair.state(twin))
    return model.eval()


def run_onnx(path, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def zeros_in(path):
    """Return sorted shape, size and number of zeros of every weight in the file."""
    import onnx

    arrays = map(onnx.numpy_helper.to_array, onnx.load(path).graph.initializer)
    return sorted((sorted(a.shape), int((a == 0).sum())) for a in arrays if a.ndim > 1)


# safetensors


@pytest.mark.parametrize("twin", ["sparse", "dense"])
def test_a_twin_is_one_plain_file(pair, tmp_path, twin):
    path = to_safetensors(pair, tmp_path / "new" / "model.safetensors", twin)
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == pair.state(twin).keys()
    assert all(torch.equal(loaded[k], v) for k, v in pair.state(twin).items())
    assert os.listdir(path.parent) == ["model.safetensors"]


def test_the_pair_can_be_a_folder_or_a_run(pair, tmp_path):
    pair.save(tmp_path / "run" / "pair")
    for source in (tmp_path / "run" / "pair", str(tmp_path / "run")):
        path = to_safetensors(source, tmp_path / "model.safetensors")
        loaded = safetensors.torch.load_file(path)
        assert all(torch.equal(loaded[k], v) for k, v in pair.sparse.items())
    with pytest.raises(InputError, match=r"There is no result in"):
        to_safetensors(tmp_path / "nothing", tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r'"sparse" or "dense"'):
        to_safetensors(pair, tmp_path / "model.safetensors", "both")


def test_a_path_that_cannot_be_written_is_a_sentence(pair, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"Cannot write model.safetensors to "):
        to_safetensors(pair, tmp_path / "file" / "model.safetensors")


# ONNX


@pytest.mark.parametrize("twin", ["sparse", "dense"])
def test_onnxruntime_agrees_with_pytorch_at_every_batch_size(net, pair, tmp_path, twin):
    path = to_onnx(net, torch.zeros(1, 3, 8, 8), tmp_path / "m.onnx", result=pair, twin=twin)
    assert os.listdir(tmp_path) == ["m.onnx"]
    reference = copy_of(net, pair, twin)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = reference(x).numpy()
        np.testing.assert_allclose(run_onnx(path, x), expected, rtol=1e-4, atol=1e-5)


def test_every_zero_is_in_the_file(net, pair, tmp_path):
    path = to_onnx(net, torch.zeros(2, 3, 8, 8), tmp_path / "m.onnx", result=pair)
    expected = sorted(
        (sorted(mask.shape), mask.numel() - int(mask.sum())) for mask in pair.support.values()
    )
    assert zeros_in(path) == expected


def test_export_of_a_model_leaves_it_alone(net, pair, tmp_path):
    model = copy_of(net, pair, "sparse").train()
    model.bn2.eval()  # as in fine-tuning with frozen statistics
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    path = to_onnx(model, torch.ones(3, 3, 8, 8), tmp_path / "m.onnx")
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = copy_of(net, pair, "sparse")(x).numpy()
    np.testing.assert_allclose(run_onnx(path, x), expected, rtol=1e-4, atol=1e-5)


def test_export_says_nothing_and_leaves_the_loggers_alone(net, tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO, "torch.onnx")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        to_onnx(net, torch.zeros(2, 3, 8, 8), tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []
    assert [str(warning.message) for warning in caught] == []
    assert logging.getLogger("torch.onnx").level == logging.INFO


def test_large_weights_go_beside_the_graph(net, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(acdc.export.onnx_file, "_ONE_FILE", 100)
    path = to_onnx(net, torch.zeros(2, 3, 8, 8), tmp_path / "m.onnx", result=pair)
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = copy_of(net, pair, "sparse")(x).numpy()
    np.testing.assert_allclose(run_onnx(path, x), expected, rtol=1e-4, atol=1e-5)


def test_lost_zeros_are_an_error_and_no_file(tmp_path, monkeypatch):
    export = torch.onnx.export

    def lossy(model, *args, **kwargs):
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.fc.weight.add_(1.0)
        return export(model, *args, **kwargs)

    model = Net()
    with torch.no_grad():
        model.fc.weight[:, 3] = 0
    monkeypatch.setattr(torch.onnx, "export", lossy)
    with pytest.raises(AcdcError, match=r"lost zeros of 'fc.weight': the model has 10, the file 0"):
        to_onnx(model, torch.zeros(2, 3, 8, 8), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


class OneSample(nn.Module):
    """A separate branch for a single sample, with the same result."""

    def forward(self, x):
        return x * 2 if x.shape[0] == 1 else (x * 2).reshape(-1, 3)


def test_an_example_of_one_sample_does_not_fix_the_batch(tmp_path):
    path = to_onnx(OneSample(), torch.zeros(1, 3), tmp_path / "m.onnx")
    for batch in (1, 4):
        assert np.array_equal(run_onnx(path, torch.ones(batch, 3)), np.full((batch, 3), 2.0))


def test_what_a_killed_export_left_is_not_published(tmp_path):
    (tmp_path / ".acdc-saving").mkdir()
    (tmp_path / ".acdc-saving" / "m.onnx.data").write_text("half of the weights")
    to_onnx(OneSample(), torch.zeros(1, 3), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("lost", [False, True])
def test_layers_of_one_size_without_names_are_told_apart(tmp_path, monkeypatch, lost):
    """On sequences the exporter transposes them and drops their names; their zeros remain."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        for layer, zero_rows in ((model[0], 1), (model[2], 3)):
            layer.weight.fill_(1.0)[:zero_rows] = 0
    export = torch.onnx.export

    def lossy(model, *args, **kwargs):
        model = copy.deepcopy(model)
        with torch.no_grad():
            model[0].weight.fill_(1.0)
        return export(model, *args, **kwargs)

    if not lost:
        path = to_onnx(model, torch.zeros(2, 5, 4), tmp_path / "m.onnx")
        assert zeros_in(path) == [([4, 4], 4), ([4, 4], 12)]
        return
    monkeypatch.setattr(torch.onnx, "export", lossy)
    with pytest.raises(AcdcError, match=r"zeros of '0.weight': the model has 4, the file 0"):
        to_onnx(model, torch.zeros(2, 5, 4), tmp_path / "m.onnx")


class TwoSamples(nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[0] == 2 else x


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "example", "sentence"),
    [
        (nn.Linear(3, 4), torch.zeros(2, 5), r"cannot run the example, of shapes \[\(2, 5\)\]"),
        (nn.Linear(3, 4), torch.zeros(0, 3), r"\[\(0, 3\)\]. Give one sample at least"),
        (nn.Linear(3, 4), torch.tensor(1.0), r"\[\(\)\]. Give one sample at least"),
        (TwoSamples(), torch.zeros(2, 3), r"TwoSamples depends on the batch .* of 2 only"),
        (Branching(), torch.zeros(2, 3), r"PyTorch cannot export this Branching to ONNX \(.+\)"),
    ],
)
def test_what_cannot_be_exported_is_a_sentence(model, example, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        to_onnx(model, example, tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_a_pair_of_another_model_and_an_unwritable_path_are_sentences(net, pair, tmp_path):
    with pytest.raises(InputError, match=r"The pair is of another model"):
        to_onnx(nn.Linear(3, 4), torch.zeros(2, 3), tmp_path / "m.onnx", result=pair)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"Cannot write m.onnx to "):
        to_onnx(nn.Linear(3, 4), torch.zeros(2, 3), tmp_path / "file" / "m.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_names_the_install_line(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=rf"'{package}'.* pip install \"acdc\[onnx\]\""):
        to_onnx(nn.Linear(3, 4), torch.zeros(2, 3), tmp_path / "m.onnx")
