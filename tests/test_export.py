"""Exported twins: a plain safetensors file, and ONNX in another runtime."""

import copy
import logging
import os
import sys
import types
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import acdc.export.onnx_file
from acdc.errors import AcdcError, InputError, MissingDependency
from acdc.export import onnx_inputs, to_onnx, to_safetensors
from acdc.pair import Pair
from acdc.support import Support

FULL = pytest.mark.skipif(not os.environ.get("ACDC_FULL"), reason="takes 10 s; ACDC_FULL=1 runs it")


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
    with pytest.raises(
        MissingDependency, match=rf"'{package}'.* pip install \"acdc-train\[onnx\]\""
    ):
        to_onnx(nn.Linear(3, 4), torch.zeros(2, 3), tmp_path / "m.onnx")


# language models, keywords, dimensions that vary


class Words(nn.Module):
    """A small language model, called by keywords: tokens, and a mask that may be absent."""

    def __init__(self, longest=64):
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.places = nn.Parameter(torch.randn(longest, 16))
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)
        self.head = nn.Linear(16, 50, bias=False)

    def forward(self, input_ids, attention_mask=None, scale=1.0, as_dict=True):
        x = self.tokens(input_ids) + self.places[: input_ids.shape[1]]
        if attention_mask is not None:
            x = x * attention_mask.unsqueeze(-1)
        q = x.unsqueeze(1)
        x = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).squeeze(1)
        x = x + self.down(torch.relu(self.up(x)))
        logits = self.head(x) * scale
        return {"logits": logits, "hidden": x} if as_dict else logits


class Fixed(Words):
    """Its places are added whole: it takes sequences of one length."""

    def forward(self, input_ids):
        return self.head(self.tokens(input_ids) + self.places)


def sparse_words(kind=Words, **settings):
    """Return the model with 90 % zeros in its linear layers."""
    torch.manual_seed(0)
    model = kind(**settings)
    with torch.no_grad():
        for layer in (model.up, model.down, model.head):
            layer.weight[torch.rand(layer.weight.shape) < 0.9] = 0
    return model.eval()


def ids_of(batch, length, words=50):
    return torch.randint(0, words, (batch, length), generator=torch.Generator().manual_seed(3))


SIZES = [(1, 1), (1, 7), (3, 12), (2, 24)]


def session_of(path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def agrees(session, model, inputs, names=None):
    """Compare what ONNX Runtime and PyTorch compute from these inputs, by name."""
    with torch.no_grad():
        wanted = model(**inputs)
    wanted = list(wanted.values()) if isinstance(wanted, dict) else [wanted]
    given = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
    for got, want in zip(session.run(names, given), wanted, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-5)


def dims_of(session):
    return {i.name: i.shape for i in session.get_inputs()}


def test_a_language_model_by_keywords_at_every_length(tmp_path):
    model = sparse_words()
    example = {"input_ids": ids_of(1, 16), "attention_mask": torch.ones(1, 16, dtype=torch.long)}
    session = session_of(to_onnx(model, example, tmp_path / "m.onnx", sparse=True))
    assert dims_of(session) == {name: ["batch", "sequence"] for name in example}
    for batch, length in SIZES:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[:, 4:6] = 0
        inputs = {"input_ids": ids_of(batch, length), "attention_mask": mask}
        agrees(session, model, inputs, ["logits", "hidden"])


@pytest.mark.parametrize("example", [ids_of(1, 1), (ids_of(2, 16),)])
def test_the_length_of_tokens_varies_by_itself(example, tmp_path):
    model = sparse_words()
    session = session_of(to_onnx(model, example, tmp_path / "m.onnx"))
    for batch, length in SIZES:
        agrees(session, model, {"input_ids": ids_of(batch, length)})


@pytest.mark.parametrize(
    "example",
    [
        (ids_of(2, 8), None, 3.0, False),
        {"as_dict": False, "scale": 3.0, "input_ids": ids_of(2, 8)},
    ],
)
def test_what_is_no_tensor_becomes_a_part_of_the_file(example, tmp_path):
    model = sparse_words()
    session = session_of(to_onnx(model, example, tmp_path / "m.onnx"))
    assert dims_of(session) == {"input_ids": ["batch", "sequence"]}
    ids = ids_of(3, 5)
    with torch.no_grad():
        wanted = model(ids, None, 3.0, False).numpy()
    (got,) = session.run(None, {"input_ids": ids.numpy()})
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert model(ids).keys() == {"logits", "hidden"}  # the model itself is as it was


def test_the_dimensions_that_vary_can_be_named(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    path = to_onnx(
        model, torch.zeros(1, 1, 8, 1), tmp_path / "m.onnx",
        dynamic={"input": {2: "height", 3: "width"}},
    )  # fmt: skip
    assert dims_of(session_of(path)) == {"input": ["batch", 1, "height", "width"]}
    for shape in ((1, 1, 3, 5), (2, 1, 9, 4)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model(x).numpy()
        np.testing.assert_allclose(run_onnx(path, x), expected, rtol=1e-4, atol=1e-5)


def test_a_model_of_one_length_is_exported_with_it_and_that_is_said(tmp_path, caplog):
    model = sparse_words(Fixed, longest=12)
    session = session_of(to_onnx(model, ids_of(1, 12), tmp_path / "m.onnx"))
    assert dims_of(session) == {"input_ids": ["batch", 12]}
    (said,) = [r.getMessage() for r in caplog.records if r.name.startswith("acdc")]
    assert "takes sequences of one length only" in said
    agrees(session, model, {"input_ids": ids_of(3, 12)})
    with pytest.raises(InputError, match=r"PyTorch cannot export this Fixed|depends on the seq"):
        to_onnx(model, ids_of(1, 12), tmp_path / "n.onnx", dynamic={"input_ids": {1: "sequence"}})
    assert os.listdir(tmp_path) == ["m.onnx"]


IDS = {"input_ids": ids_of(1, 8), "attention_mask": torch.ones(1, 6)}


@pytest.mark.parametrize(
    ("example", "dynamic", "sentence"),
    [
        ({"tokens": ids_of(1, 8)}, None, r"cannot run the example, of shapes .*'tokens'"),
        ({}, None, r"holds no tensor"),
        ((), None, r"holds no tensor|cannot run"),
        ({"input_ids": None}, None, r"holds no tensor"),
        ({"input_ids": ids_of(0, 8)}, None, r"\[\(0, 8\)\]. Give one sample at least"),
        ({"input_ids": ids_of(1, 0)}, None, r"\[\(1, 0\)\]. Give one sample at least"),
        ({"input_ids": ids_of(1, 8), "scale": [1]}, None, r"has a list for 'scale'"),
        ((ids_of(1, 8), None, 1.0, True, 5), None, r"does not fit the model"),
        ("words", None, r"holds no tensor"),
        (IDS, {"ids": {1: "s"}}, r"names 'ids', which is no input .*'input_ids', 'attention_mask'"),
        (IDS, {"input_ids": {2: "s"}}, r"dimension 2 of 'input_ids', which has .* 0 to 1"),
        (IDS, {"input_ids": {-1: "s"}}, r"dimension -1 of 'input_ids'"),
        (IDS, {"input_ids": {"1": "s"}}, r"dimension '1' of 'input_ids'"),
        (IDS, {"input_ids": [1]}, r"has \[1\] for 'input_ids'"),
        (IDS, {"input_ids": {1: "a b"}}, r"calls dimension 1 of 'input_ids' 'a b'"),
        (IDS, {n: {1: "s"} for n in IDS}, r"one name, 's', and the sizes 6 and 8"),
    ],
)  # fmt: skip
def test_inputs_that_cannot_work_are_sentences(example, dynamic, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        to_onnx(sparse_words(), example, tmp_path / "m.onnx", dynamic=dynamic)
    assert os.listdir(tmp_path) == []


# sparse initializers


def kept_in(path):
    """Return the kept weights of each sparse initializer."""
    import onnx

    graph = onnx.load(path).graph
    return {t.values.name: len(t.values.raw_data) // 4 for t in graph.sparse_initializer}


def test_sparse_weights_make_the_file_small(net, pair, tmp_path):
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    dense = to_onnx(net, x, tmp_path / "dense.onnx", result=pair)
    small = to_onnx(net, x, tmp_path / "small.onnx", result=pair, sparse=True)
    pytest.importorskip("onnx").checker.check_model(small)
    wanted = {name: int(mask.sum()) for name, mask in pair.support.items()}
    assert sorted(kept_in(small).values()) == sorted(wanted.values())
    assert zeros_in(small) == []  # no dense weight is left
    saved = sum(4 * m.numel() - 12 * wanted[n] for n, m in pair.support.items())
    assert os.path.getsize(dense) - os.path.getsize(small) > saved - 150 * len(wanted)
    assert np.array_equal(run_onnx(small, x), run_onnx(dense, x))


def test_only_weights_that_become_smaller_are_sparse(tmp_path):
    model = nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 30)).eval()
    with torch.no_grad():
        for layer, zeros in ((model[0], 590), (model[2], 610)):  # of 900: two in three are 600
            layer.weight.view(-1)[:zeros] = 0
    path = to_onnx(model, torch.randn(2, 30), tmp_path / "m.onnx", sparse=True)
    assert kept_in(path) == {"2.weight": 290}
    x = torch.randn(5, 30)
    with torch.no_grad():
        np.testing.assert_allclose(run_onnx(path, x), model(x).numpy(), rtol=1e-4, atol=1e-5)


def test_sparse_weights_leave_large_dense_ones_beside_the_graph(net, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(acdc.export.onnx_file, "_ONE_FILE", 100)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    path = to_onnx(net, x, tmp_path / "m.onnx", result=pair, sparse=True)
    assert len(kept_in(path)) == 5
    with torch.no_grad():
        expected = copy_of(net, pair, "sparse")(x).numpy()
    np.testing.assert_allclose(run_onnx(path, x), expected, rtol=1e-4, atol=1e-5)


def test_a_network_without_zeros_has_nothing_to_write_sparse(net, tmp_path):
    with pytest.raises(InputError, match=r"sparse=True makes nothing smaller"):
        to_onnx(net, torch.zeros(2, 3, 8, 8), tmp_path / "m.onnx", sparse=True)
    assert os.listdir(tmp_path) == []


def test_lost_zeros_of_a_sparse_weight_are_an_error(tmp_path, monkeypatch):
    model = sparse_words()
    make_sparse = acdc.export.onnx_file.make_sparse

    def lossy(onnx, graph):
        make_sparse(onnx, graph)
        for tensor in graph.graph.sparse_initializer:
            count = 700
            array = np.ones(count, np.float32)
            name = tensor.values.name
            tensor.values.CopyFrom(onnx.numpy_helper.from_array(array, name))
            tensor.indices.CopyFrom(onnx.numpy_helper.from_array(np.arange(count)))

    monkeypatch.setattr(acdc.export.onnx_file, "make_sparse", lossy)
    with pytest.raises(AcdcError, match=r"lost zeros of"):
        to_onnx(model, ids_of(2, 8), tmp_path / "m.onnx", sparse=True)
    assert os.listdir(tmp_path) == []


# transformers


def test_encoder_and_decoder_have_lengths_of_their_own():
    masks = {"input_ids": ids_of(2, 8), "attention_mask": ids_of(2, 8)}
    tensors = masks | {"decoder_input_ids": ids_of(2, 8), "decoder_attention_mask": ids_of(2, 8)}
    encoder, decoder = {0: "batch", 1: "sequence"}, {0: "batch", 1: "sequence_2"}
    assert onnx_inputs._token_dims(tensors) == (encoder, encoder, decoder, decoder)


class Attends(nn.Module):
    """With an attention that cannot be exported, and with one that can, as in transformers."""

    def __init__(self, has_other=True):
        super().__init__()
        self.fc, self.has_other = nn.Linear(4, 4), has_other
        self.config = types.SimpleNamespace(_attn_implementation="sdpa")

    def set_attn_implementation(self, name):
        if not self.has_other:
            raise ValueError("no eager attention")
        self.config._attn_implementation = name

    def forward(self, x):
        y = self.fc(x)
        if self.config._attn_implementation == "sdpa" and y.sum() > 1e9:  # not traceable
            return y + 1
        return y


def test_a_fused_attention_that_cannot_be_exported_is_switched_off(tmp_path):
    model = nn.Sequential(Attends())  # also in a module around it
    path = to_onnx(model, torch.randn(2, 4), tmp_path / "m.onnx")
    assert model[0].config._attn_implementation == "sdpa"  # of the user's model
    x = torch.randn(5, 4)
    got = session_of(path).run(None, {session_of(path).get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(got, model(x).detach(), rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="cannot export this Attends"):
        to_onnx(Attends(has_other=False), torch.randn(2, 4), tmp_path / "n.onnx")


def tiny(name):
    """Return a model of transformers with random weights, and its inputs of a batch and length."""
    t = pytest.importorskip("transformers")
    shape = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    bert = dict(vocab_size=50, hidden_size=16, num_attention_heads=2, intermediate_size=24)
    image = dict(image_size=16, patch_size=8, num_channels=1)

    def text(batch, length):
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[1:, length // 2 :] = 0
        return {"input_ids": ids_of(batch, length), "attention_mask": mask}

    def tokens(batch, length):
        return {"input_ids": ids_of(batch, length)}

    def images(batch, length):
        return {"pixel_values": torch.randn(batch, 1, 16, 16)}

    torch.manual_seed(0)
    if name == "gpt2":
        config = t.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **shape)
        return t.GPT2LMHeadModel(config).eval(), tokens
    if name == "bert":
        return t.BertForSequenceClassification(
            t.BertConfig(num_hidden_layers=1, **bert)
        ).eval(), text
    if name == "llama":
        config = t.LlamaConfig(num_hidden_layers=1, bos_token_id=0, eos_token_id=0, **bert)
        return t.LlamaForCausalLM(config).eval(), text
    if name == "distilbert":
        config = t.DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
        return t.DistilBertModel(config).eval(), text
    if name == "t5":
        sizes = dict(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
        config = t.T5Config(vocab_size=50, decoder_start_token_id=0, **sizes)

        def both(batch, length):  # of one length in the example, of others later
            decoder = {"decoder_input_ids": ids_of(batch, max(2, 16 - length))}
            return text(batch, length) | decoder

        return t.T5ForConditionalGeneration(config).eval(), both
    if name == "resnet":
        config = t.ResNetConfig(
            num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"
        )
        return t.ResNetForImageClassification(config).eval(), images
    del bert["vocab_size"]
    return t.ViTForImageClassification(
        t.ViTConfig(num_hidden_layers=1, **bert, **image)
    ).eval(), images


# The script of docs/howto/language_models.md, which every run of the tests executes, has a Llama.
@FULL
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "distilbert", "t5", "vit", "resnet"])
def test_a_model_of_transformers(name, tmp_path):
    model, inputs = tiny(name)
    masks = {}
    for parameter, weight in model.named_parameters():
        if weight.dim() > 1 and "embed" not in parameter and weight.numel() > 200:
            masks[parameter] = torch.rand(weight.shape) < 0.1
            weight.data[~masks[parameter]] = 0
    caches = getattr(model.config, "use_cache", None)
    path = to_onnx(model, inputs(1, 8), tmp_path / "m.onnx", sparse=True)
    assert getattr(model.config, "use_cache", None) is caches
    assert kept_in(path)
    session = session_of(path)
    for batch, length in SIZES:
        given = inputs(batch, length)
        with torch.no_grad():
            wanted = model(**given)
        got = session.run([next(iter(wanted))], {k: v.numpy() for k, v in given.items()})[0]
        np.testing.assert_allclose(got, next(iter(wanted.values())), rtol=1e-3, atol=1e-5)
