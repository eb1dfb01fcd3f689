"""Layers of other libraries, and normalisations called as functions, in a sparse phase."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import acdc
from acdc.engine import segment
from acdc.engine.known import activation_of, is_known, rms_norm_eps
from support.beside import Beside
from support.engine_nets import Written, cut

transformers = pytest.importorskip("transformers")
from transformers.activations import ACT2FN  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

# --- Conv1D: a linear layer with the weight [inputs, outputs] ------------------------------------


@pytest.mark.parametrize("act", ["gelu_new", "gelu_pytorch_tanh", "gelu", "gelu_fast", "silu"])
def test_conv1d_with_an_activation_is_one_segment(act: str, runs: list[int]) -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(Conv1D(24, 10), ACT2FN[act], Conv1D(10, 24)).double()
    x = torch.randn(3, 5, 10, dtype=torch.float64)
    both = Beside(mlp, x)
    # `gelu_fast` has the constant sqrt(2 / pi) with ten digits.
    both.check(x, **({"limit": 1e-6} if act == "gelu_fast" else {}))
    assert both.sparse == {"0", "2"}
    assert len(runs) == 1


def test_conv1d_alone_and_its_optimizer(runs: list[int]) -> None:
    """Steps with the sparsifier: weights and momentum are those of the masked dense network."""
    steps = []
    for on_engine in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(Conv1D(320, 256), nn.ReLU(), Conv1D(256, 320))
        x = torch.randn(16, 256)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        engine = acdc.Engine(net, x, choose=False) if on_engine else None
        method = acdc.ACDC(
            acdc.Unstructured(0.9, "uniform"),
            acdc.constant("sparse", epochs=1).resolve(100),
            layers=acdc.Layers(skip_first=False, skip_last=False),
        )
        acdc.Sparsifier(method, net, optimizer, engine=engine)
        for _ in range(4):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        momentum = [optimizer.state[p]["momentum_buffer"] for p in net.parameters()]
        steps.append([*(p.detach().clone() for p in net.parameters()), *momentum])
    for got, want in zip(*steps, strict=True):
        assert ((got != 0) == (want != 0)).all()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert runs


def test_a_class_of_another_module_with_that_name_stays_with_pytorch() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nf, self.weight = 8, nn.Parameter(torch.randn(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return 2 * x @ self.weight

    assert not is_known(Conv1D())


@pytest.mark.parametrize("cache", [False, True])
def test_gpt2_runs_sparse(
    cache: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a cache a block is one graph. With a cache the same layers run sparse, in parts."""
    count: list[int] = []
    compute = segment.compute
    monkeypatch.setattr(segment, "compute", lambda *args: count.append(1) or compute(*args))
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    masks = {
        n: torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.4
        for n, p in model.named_parameters()
        if ".h." in n and p.dim() == 2
    }
    cut(model, masks)
    plain = copy.deepcopy(model)
    engine = acdc.Engine(model, {"input_ids": ids, "labels": ids}, choose=False)
    engine.compress(masks)
    losses = []
    for net in (plain, model):
        net.zero_grad()
        loss = net(input_ids=ids, labels=ids, use_cache=cache).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, want), got in zip(plain.named_parameters(), model.parameters(), strict=True):
        mask = masks.get(name, torch.tensor(True))
        torch.testing.assert_close(
            got.grad * mask, want.grad * mask, rtol=1e-3, atol=1e-5, msg=name
        )
    sparse = {f"{name}.weight" for name, choice in engine.choices.items() if choice.sparse}
    assert sparse == masks.keys() | {"lm_head.weight"}
    assert model.config.use_cache
    said = [r.getMessage() for r in caplog.records if r.name.startswith("acdc")]
    if cache:
        assert len(count) > 5
        assert said == [
            f"transformer.h.{i} runs in parts: its argument 'cache' is a DynamicCache."
            for i in (0, 1)
        ]
        said.clear(), count.clear()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    # The head; of each block, what comes before its attention, and what comes after it.
    assert len(count) == 5
    assert said == []
    engine.decompress()
    for module in model.modules():
        assert "forward" not in vars(module)


# --- activations and norms ------------------------------------------------------------------------


def test_each_known_activation_computes_its_kernel() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    known = {name: a for name in ACT2FN if (a := activation_of(ACT2FN[name])) is not None}
    assert {"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"} <= known.keys()
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu,
    }  # fmt: skip
    for name, kernel in known.items():
        torch.testing.assert_close(ACT2FN[name](x), functions[kernel](x), rtol=1e-6, atol=1e-7)


class _Times(nn.Module):
    """An RMSNorm, or nearly one."""

    def __init__(self, more: float = 0.0, power: float = 2.0, detached: bool = False) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-5
        self.more, self.power, self.detached = more, power, detached

    def forward(self, x: Tensor) -> Tensor:
        size = x.abs().pow(self.power).mean(-1, keepdim=True)
        size = size.detach() if self.detached else size
        return (self.more + self.weight) * x * torch.rsqrt(size + self.eps)


def test_rms_norms_are_recognised_by_what_they_compute() -> None:
    assert rms_norm_eps(_Times()) == "eps"
    for other in (_Times(more=1.0), _Times(power=1.0), _Times(detached=True)):
        assert rms_norm_eps(other) is None


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("llama.modeling_llama", "LlamaRMSNorm"), ("t5.modeling_t5", "T5LayerNorm"),
        ("qwen2.modeling_qwen2", "Qwen2RMSNorm"), ("mistral.modeling_mistral", "MistralRMSNorm"),
    ],
)  # fmt: skip
def test_rms_norms_of_transformers(path: str, name: str, runs: list[int]) -> None:
    module = pytest.importorskip(f"transformers.models.{path}")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), getattr(module, name)(16), nn.Linear(16, 8))
    nn.init.normal_(net[1].weight)
    x = torch.randn(5, 7, 12)
    both = Beside(net, x)
    both.check(x)
    assert len(runs) == 1


def test_gemma_multiplies_by_one_plus_weight_and_stays_with_pytorch() -> None:
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    assert not is_known(gemma.GemmaRMSNorm(8))


# --- normalisations called as functions -----------------------------------------------------------


class BatchNormAct(nn.BatchNorm2d):
    """As ``timm`` writes it: the function, and an activation in place."""

    def __init__(self, channels: int, act: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.act = act or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias,
            self.training, self.momentum, self.eps,
        )  # fmt: skip
        return self.act(x)


def _conv_net(norm: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), norm(), nn.Conv2d(8, 8, 3, padding=1), norm()
    ).double()


@pytest.mark.parametrize("act", [None, nn.Hardswish(inplace=True), nn.SiLU()], ids=str)
def test_a_batch_norm_with_an_activation_stays_in_the_segment(
    act: nn.Module | None, runs: list[int]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    both = Beside(_conv_net(lambda: BatchNormAct(8, act)), x)
    both.check(x, least=0.1)
    assert len(runs) == 1
    assert both.sparse == {"0", "2"}
    both.check(2 * x, least=0.1)
    both.model.eval(), both.plain.eval()
    both.check(x, least=0.1)
    assert len(runs) == 3


def test_a_batch_norm_function_that_is_used_twice_stays_with_pytorch(runs: list[int]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.b(m.norm(m.a(x))))

    torch.manual_seed(0)
    a, b = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
    layers = {"a": a, "b": b, "norm": BatchNormAct(8)}
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    both = Beside(Written(forward, **layers).double(), x)
    both.check(x)
    assert len(runs) == 2  # each convolution by itself


class Norm2d(nn.LayerNorm):
    """A LayerNorm of another library: a class of its own, that calls the function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class NormRms(nn.RMSNorm):
    """The same for an RMSNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


@pytest.mark.parametrize("norm", [Norm2d(16), NormRms(16), NormRms(16, eps=1e-3)], ids=str)
def test_layer_norms_called_as_functions(norm: nn.Module, runs: list[int]) -> None:
    torch.manual_seed(0)
    for p in norm.parameters():
        nn.init.normal_(p)
    x = torch.randn(5, 7, 12, dtype=torch.float64)
    both = Beside(nn.Sequential(nn.Linear(12, 16), norm, nn.Linear(16, 8)).double(), x)
    both.check(x)
    assert len(runs) == 1


def test_a_changed_statistic_is_followed(runs: list[int]) -> None:
    """Another buffer or another parameter may be assigned between two steps."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    both = Beside(_conv_net(lambda: BatchNormAct(8)), x)
    both.check(x, least=0.1)
    for net in (both.model, both.plain):
        net.eval()
        net[1].running_mean = torch.full((8,), 0.5, dtype=torch.float64)
    both.check(x, least=0.1)


# --- changes in place -----------------------------------------------------------------------------


def test_a_new_tensor_of_pytorch_may_be_changed_in_place(runs: list[int]) -> None:
    """PyTorch's normalisation has one reader here, and its input has two."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.b(F.relu_(F.instance_norm(x))) + x

    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    both = Beside(Written(forward, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 8, 1)).double(), x)
    both.check(x)
    assert both.sparse == {"a", "b"}


def test_a_view_with_other_readers_is_not_changed_in_place() -> None:
    """A view of ``y`` is changed: the engine must not compute with the old ``y``."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z = y.view(y.shape)
        z.mul_(2)
        return m.b(y)

    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    Beside(Written(forward, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 8, 1)).double(), x).check(x)
