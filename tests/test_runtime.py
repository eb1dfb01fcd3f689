"""``acdc.Runtime``: as PyTorch computes, for networks, batches, threads and bad input."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import acdc
from acdc.engine import native
from acdc.engine.caches import Caches
from acdc.runtime import placing
from acdc.runtime.handle import MOST_IMAGES, PLANS
from acdc.runtime.program import Conv, Map, Pool
from support.engine_nets import NETWORKS, Gpt, Written, block, bottleneck_resnet, conv

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a compiler")


def ready(model: nn.Module, sparsity: float = 0.8, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a network in evaluation mode with zeros, and with statistics that are not trivial."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.weight is not None:
                module.weight.data.normal_(generator=generator)
                module.bias.data.normal_(generator=generator)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data[torch.rand(weight.shape, generator=generator) < sparsity] = 0
    model.to(dtype)
    for module in model.modules():  # `eval` of some of these networks leaves parts as they are
        module.training = False
    return model


def batch(shape: tuple[int, ...], samples: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(samples)
    return torch.randn(samples, *shape, generator=generator, dtype=dtype)


def compare(model: nn.Module, runtime: Any, x: Tensor, tolerance: float = 1e-10) -> None:
    with torch.no_grad():
        wanted = model(x)
    torch.testing.assert_close(runtime(x), wanted, rtol=tolerance, atol=tolerance)


# --- networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "unlike towers"])
def test_computes_what_pytorch_computes_for_any_batch(name: str) -> None:
    model = ready(NETWORKS[name].build())
    runtime = acdc.Runtime(model, batch(NETWORKS[name].shape), threads=2)
    for samples in (2, 1, 5, 0):
        compare(model, runtime, batch(NETWORKS[name].shape, samples))
    assert any(row.how == "sparse" for row in runtime.explain().rows)


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("name", ["bottleneck", "MobileNet", "squeeze-and-excitation", "MLPs"])
def test_every_instruction_set_computes_in_float32(name: str, isa: str) -> None:
    """The reference is PyTorch in float64."""
    model = ready(NETWORKS[name].build(), dtype=torch.float32)
    exact = copy.deepcopy(model).double()
    runtime = acdc.Runtime(model, batch(NETWORKS[name].shape, dtype=torch.float32), isa=isa)
    for samples in (1, 3, 17):
        x = batch(NETWORKS[name].shape, samples, torch.float32)
        with torch.no_grad():
            wanted = exact(x.double())
        error = (runtime(x).double() - wanted).abs().max() / wanted.abs().max()
        assert error < 3e-6


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "3x3": (lambda: nn.Conv2d(4, 6, 3, padding=1), (9, 7)),
    "without padding": (lambda: nn.Conv2d(4, 6, 3), (9, 7)),
    "more padding than the filter needs": (lambda: nn.Conv2d(4, 6, 1, padding=2), (5, 4)),
    "padding of one side": (lambda: nn.Conv2d(4, 6, (3, 1), padding=(1, 0)), (9, 7)),
    "padding of the other side": (lambda: nn.Conv2d(4, 6, (1, 3), padding=(0, 1)), (9, 7)),
    "stride 2": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (9, 7)),
    "stride 2, even": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (8, 8)),
    "stride 2, 7x7": (lambda: nn.Conv2d(3, 6, 7, stride=2, padding=3), (17, 18)),
    "stride 2, 1x1": (lambda: nn.Conv2d(4, 6, 1, stride=2), (7, 8)),
    "stride 3, dilation 2": (
        lambda: nn.Conv2d(4, 6, 3, stride=3, padding=2, dilation=2), (13, 11)
    ),
    "strides and dilations that differ": (
        lambda: nn.Conv2d(4, 6, (3, 2), (1, 2), (2, 1), (2, 1)), (11, 10)
    ),
    "patches": (lambda: nn.Conv2d(3, 8, 4, stride=4), (12, 16)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (7, 7)),
    "depthwise, stride 2": (lambda: nn.Conv2d(6, 12, 3, 2, 1, groups=6), (7, 7)),
    "groups": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4), (6, 5)),
    "one pixel": (lambda: nn.Conv2d(4, 6, 3, padding=1), (1, 1)),
    "many channels": (lambda: nn.Conv2d(150, 40, 3, padding=1), (6, 6)),
    "wide": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 300)),
}  # fmt: skip


@pytest.mark.parametrize("sparsity", [0.5, 0.99])
@pytest.mark.parametrize("name", list(LAYERS))
def test_layers_of_all_sizes(name: str, sparsity: float) -> None:
    torch.manual_seed(0)
    make, size = LAYERS[name]
    layer = make()
    first = nn.Conv2d(3, layer.in_channels, 3, padding=1)
    model = ready(nn.Sequential(first, nn.ReLU(), layer, nn.Hardswish()), sparsity)
    runtime = acdc.Runtime(model, batch((3, *size)), threads=3)
    assert all(row.how != "torch" for row in runtime.explain().rows) or sparsity == 0.5
    for samples in (1, 4):
        compare(model, runtime, batch((3, *size), samples))


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 31, 64, 513])
def test_linear_layers_take_any_number_of_tokens(tokens: int) -> None:
    torch.manual_seed(0)
    model = ready(nn.Sequential(nn.Linear(70, 33), nn.GELU(), nn.LayerNorm(33), nn.Linear(33, 20)))
    runtime = acdc.Runtime(model, batch((70,), tokens))
    compare(model, runtime, batch((70,), tokens))
    compare(model, runtime, batch((3, 70), tokens)[:2])


@pytest.mark.parametrize("window", ["max", "average", "average without padding", "whole", "mean"])
def test_pooling(window: str) -> None:
    pools: dict[str, Callable[[Tensor], Tensor]] = {
        "max": lambda x: F.max_pool2d(x, 3, 2, 1),
        "average": lambda x: F.avg_pool2d(x, (3, 2), 2, 1),
        "average without padding": lambda x: F.avg_pool2d(x, 3, 1, 1, False, False),
        "whole": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
        "mean": lambda x: x.mean((-1, 2)),
    }
    torch.manual_seed(0)
    layers = {"a": conv(3, 6), "b": nn.Linear(6, 6)}
    model = Written(lambda m, x: pools[window](m.a(x)), **layers)
    runtime = acdc.Runtime(ready(model), batch((3, 9, 8)), strict=True)
    compare(model, runtime, batch((3, 9, 8), 3))


def test_a_mean_over_other_dimensions_is_pytorchs() -> None:
    """The shape of the result is that of a mean over the pixels."""
    model = ready(Written(lambda m, x: m.b(m.a(x).mean((1, 3))), a=conv(3, 6), b=nn.Linear(6, 4)))
    compare(model, acdc.Runtime(model, batch((3, 6, 5))), batch((3, 6, 5), 3))


def test_a_mixed_network_runs_in_parts_and_says_so() -> None:
    model = ready(Written(lambda m, x: m.a(x).sin(), a=Gpt()))
    runtime = acdc.Runtime(model, batch((6, 16)))
    compare(model, runtime, batch((6, 16), 3))
    how = {row.layer: row for row in runtime.explain().rows}
    assert how["a.blocks.0.qkv"].how == "sparse"
    for name in ("sin", "scaled_dot"):
        part = next(row for row in runtime.explain().rows if name in row.layer)
        assert part.how == "torch"
        assert "not one of the engine's operations" in part.why


def test_bert_with_other_tokens_runs_in_pytorch() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ready(transformers.BertModel(config), 0.9, torch.float32)
    ids = torch.randint(0, 50, (2, 9))
    runtime = acdc.Runtime(model, {"input_ids": ids})
    rows = {row.layer: row.how for row in runtime.explain().rows}
    assert rows["encoder.layer.0.intermediate.dense"] == "sparse"
    assert rows["encoder.layer.1.attention.self.query"] == "sparse"
    for tokens in (ids, ids[:1], torch.randint(0, 50, (3, 5))):
        with torch.no_grad():
            wanted = model(input_ids=tokens)
        got = runtime(input_ids=tokens)
        torch.testing.assert_close(
            got.last_hidden_state, wanted.last_hidden_state, atol=2e-5, rtol=0
        )
        torch.testing.assert_close(got.pooler_output, wanted.pooler_output, atol=2e-5, rtol=0)


@pytest.mark.parametrize("sizes", [(5,), (3, 4)])
def test_concatenations_of_channels_are_operations_of_the_program(sizes: tuple[int, ...]) -> None:
    """Parts of one value, of values that are read again, and of values with other paddings."""

    def forward(m: Any, x: Tensor) -> Tensor:
        first = torch.cat((m.a(x), x, m.b(x)), 1 if x.dim() == 4 else -1)
        return m.d(torch.cat([m.c(first), first, first], 1 if x.dim() == 4 else -1))

    torch.manual_seed(0)
    if len(sizes) == 2:
        layers: dict[str, nn.Module] = {
            "a": conv(3, 6), "b": conv(3, 5, 1), "c": conv(14, 4), "d": conv(32, 5)
        }  # fmt: skip
    else:
        layers = {
            "a": nn.Linear(5, 6), "b": nn.Linear(5, 7), "c": nn.Linear(18, 4), "d": nn.Linear(40, 3)
        }  # fmt: skip
    model = ready(Written(forward, **layers))
    shape = (3, *sizes) if len(sizes) == 2 else sizes
    runtime = acdc.Runtime(model, batch(shape), strict=True, threads=2)
    for samples in (2, 1, 5):
        compare(model, runtime, batch(shape, samples))


def test_batchnorm_sum_and_relu_are_part_of_the_layers() -> None:
    model = ready(bottleneck_resnet())
    runtime = acdc.Runtime(model, batch((3, 20, 20)), strict=True)
    (program,) = runtime._network.programs
    kinds = [type(op).__name__ for op in program.ops]
    assert set(kinds) == {"Conv", "Pool", "Map"}
    assert kinds.count("Map") == 1  # the flattened pixels of the pooling
    residuals = [op for op in program.convs if op.residual is not None]
    assert len(residuals) == 2
    assert all(op.activation == "relu" for op in residuals)


# --- what a user may rely on ----------------------------------------------------------------------


def test_results_are_the_same_bit_for_bit_for_any_number_of_threads() -> None:
    for name in ("bottleneck", "MobileNet", "MLPs"):
        model = ready(NETWORKS[name].build(), dtype=torch.float32)
        x = batch(NETWORKS[name].shape, 1, torch.float32)
        results = [acdc.Runtime(model, x, threads=n)(x) for n in (1, 2, 3, 7)]
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_results_belong_to_the_caller() -> None:
    model = ready(NETWORKS["several outputs"].build())
    runtime = acdc.Runtime(model, batch((3, 6, 6)))
    first = runtime(batch((3, 6, 6), 2))
    noted = copy.deepcopy(first)
    second = runtime(batch((3, 6, 6), 2) * 2)
    torch.testing.assert_close(first, noted, rtol=0, atol=0)
    assert not torch.equal(first[0], second[0])


def test_later_changes_of_the_model_change_nothing() -> None:
    model = ready(bottleneck_resnet())
    runtime = acdc.Runtime(model, batch((3, 20, 20)))
    before = runtime(batch((3, 20, 20)))
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    assert torch.equal(runtime(batch((3, 20, 20))), before)


def test_the_model_stays_as_it_is() -> None:
    model = ready(bottleneck_resnet())
    before = copy.deepcopy(model.state_dict())
    acdc.Runtime(model, batch((3, 20, 20)))
    assert "forward" not in vars(model)
    assert all(p.requires_grad for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_large_batches_are_computed_in_pieces() -> None:
    model = ready(block(3, 8))
    runtime = acdc.Runtime(model, batch((3, 6, 6)))
    compare(model, runtime, batch((3, 6, 6), 3 * MOST_IMAGES + 2))
    for samples in range(1, PLANS + 4):
        compare(model, runtime, batch((3, 6, 6), samples))
    (plans,) = runtime._handle._plans.values()
    assert len(plans) == PLANS


def test_pieces_are_so_small_that_their_values_fit_into_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ready(block(3, 8))
    whole = acdc.Runtime(model, batch((3, 6, 6)))
    whole(batch((3, 6, 6), 8))
    (plan,) = whole._handle.latest
    for share, most in ((1, 8), (0.5, 4), (0, 1)):
        monkeypatch.setattr(placing, "caches", lambda s=share: Caches(last=int(s * plan.bytes)))
        runtime = acdc.Runtime(model, batch((3, 6, 6)))
        compare(model, runtime, batch((3, 6, 6), 8))
        assert runtime._handle.latest[0].samples == most


def test_handles_share_index_lists() -> None:
    model = ready(bottleneck_resnet())
    runtime = acdc.Runtime(model, batch((3, 20, 20)))
    other = runtime.fork()
    assert torch.equal(other(batch((3, 20, 20))), runtime(batch((3, 20, 20))))
    plans = [r._handle.latest[0] for r in (runtime, other)]
    lists = [[c.args.entries for op, c in plan.steps if isinstance(op, Conv)] for plan in plans]
    values = [[c.args.y.origin for op, c in plan.steps if isinstance(op, Conv)] for plan in plans]
    assert lists[0] == lists[1]
    assert not set(values[0]) & set(values[1])


@pytest.mark.skipif(
    native.instruction_sets()[-1:] != ["avx512"], reason="this CPU has registers of one size"
)
def test_small_images_take_registers_of_half_the_size() -> None:
    def used(samples: int, side: int) -> str:
        model = ready(nn.Sequential(conv(3, 4), conv(4, 4)), dtype=torch.float32)
        x = batch((3, side, side), samples, torch.float32)
        runtime = acdc.Runtime(model, x, isa="avx512")
        exact = copy.deepcopy(model).double()
        compare(exact, lambda given: runtime(given.float()).double(), x.double(), 1e-5)
        return str(runtime.explain().rows[0].kernel).split()[1]

    assert used(1, 7) == "avx2"
    assert used(4, 7) == used(1, 14) == "avx512"


def test_inputs_of_all_strides() -> None:
    model = ready(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)))
    runtime = acdc.Runtime(model, batch((3, 6, 5)))
    x = batch((3, 6, 5), 4)
    for other in (
        x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3),
        x.expand(4, 3, 6, 5)[::2], x[:1].expand(3, 3, 6, 5), x.flip(0),
    ):  # fmt: skip
        compare(model, runtime, other)
    tokens = ready(nn.Sequential(nn.Linear(9, 40), nn.ReLU(), nn.Linear(40, 17)))
    runtime = acdc.Runtime(tokens, batch((9,)))
    compare(tokens, runtime, batch((20,), 9).t())
    compare(tokens, runtime, batch((7, 9), 3).transpose(0, 1))


def test_runs_as_an_onnx_session_does() -> None:
    model = ready(bottleneck_resnet(), dtype=torch.float32)
    runtime = acdc.Runtime(model, batch((3, 20, 20), dtype=torch.float32))
    (given,) = runtime.get_inputs()
    assert (given.shape, given.type) == (("batch", 3, 20, 20), "tensor(float)")
    (result,) = runtime.get_outputs()
    assert (result.name, result.shape) == ("output", ("batch", 10))
    x = batch((3, 20, 20), 3, torch.float32)
    (got,) = runtime.run(None, {given.name: x.numpy()})
    assert isinstance(got, np.ndarray)
    assert np.array_equal(got, runtime(x).numpy())
    assert np.array_equal(runtime.run(["output"], {given.name: x.numpy()})[0], got)
    with pytest.raises(acdc.InputError, match=r"The outputs are \['output'\], got 'y'"):
        runtime.run(["y"], {given.name: x.numpy()})
    with pytest.raises(acdc.InputError, match="The inputs are"):
        runtime.run(None, {})


def test_several_outputs_have_names() -> None:
    model = ready(NETWORKS["several outputs"].build(), dtype=torch.float32)
    runtime = acdc.Runtime(model, batch((3, 6, 6), dtype=torch.float32))
    names = [output.name for output in runtime.get_outputs()]
    assert len(set(names)) == 4
    x = batch((3, 6, 6), dtype=torch.float32).numpy()
    got = runtime.run(names[::-1], {runtime.get_inputs()[0].name: x})
    for array, wanted in zip(got[::-1], runtime.run(None, {"x": x}), strict=True):
        assert np.array_equal(array, wanted)


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("maximum", [True, False])
def test_pooling_and_strides_of_every_width(maximum: bool, step: int, isa: str) -> None:
    """Registers are filled in part or whole, and NaN and infinity are what they are in PyTorch."""
    torch.manual_seed(0)
    for width in (*range(3, 20), 31, 32, 33, 48, 63, 64, 65):
        pool = nn.MaxPool2d(3, step, 1) if maximum else nn.AvgPool2d((2, 3), step, 1)
        strided = nn.Conv2d(2, 2, 3, step, 1, bias=False)
        strided.weight.data[0, 1] = strided.weight.data[1, 0] = 0
        model = nn.Sequential(pool, strided).to(torch.float32).eval()
        x = batch((2, 5, width), 2, torch.float32)
        x[0, 0, 0, 0], x[0, 0, 3, width // 2] = float("nan"), float("inf")
        with torch.no_grad():
            wanted = model(x)
        got = acdc.Runtime(model, x, isa=isa, strict=True)(x)
        # The other channel of the first image multiplies NaN by pruned weights in PyTorch.
        for there in ((1,), (0, 0)):
            torch.testing.assert_close(
                got[there], wanted[there], rtol=1e-5, atol=1e-5, equal_nan=True
            )


def test_every_kernel_is_used() -> None:
    transformers = pytest.importorskip("transformers")
    calls: list[tuple[nn.Module, Any]] = [
        (ready(NETWORKS[name].build()), batch(NETWORKS[name].shape))
        for name in ("bottleneck", "squeeze-and-excitation", "MLPs", "DenseNet")
    ]
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    bert = ready(transformers.BertModel(config))
    calls.append((bert, {"input_ids": torch.zeros(2, 9).long()}))
    calls.append((with_dense_head(), batch((3, 17, 19))))
    used = set()
    for model, example in calls:
        runtime = acdc.Runtime(model, example)
        used |= {call.kernel for plan in runtime._handle.plans for call in plan._every}
    assert used == set(native.point_kernel_names())


# --- bad input ------------------------------------------------------------------------------------


def test_a_model_in_training_mode_is_refused() -> None:
    model = ready(bottleneck_resnet())
    list(model.modules())[5].training = True
    with pytest.raises(acdc.InputError, match=r"training mode \(.+\).*model.eval\(\) first"):
        acdc.Runtime(model, batch((3, 20, 20)))


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(acdc.InputError, match=r"takes a torch\.nn\.Module, got a str"):
        acdc.Runtime("model.pt", batch((3,)))  # type: ignore[arg-type]
    with pytest.raises(acdc.InputError, match="for CPUs"):
        acdc.Runtime(nn.Linear(3, 3, device="meta").eval(), batch((3,)))
    with pytest.raises(acdc.InputError, match=r"does not fit Linear\.forward"):
        acdc.Runtime(nn.Linear(3, 3).eval(), (batch((3,)), 1))
    for threads in (0, True, 1.5, 10**9):
        with pytest.raises(acdc.InputError, match="whole number from 1 to 1024"):
            acdc.Runtime(nn.Linear(3, 3).eval(), batch((3,)), threads=threads)  # type: ignore[arg-type]
    with pytest.raises(acdc.InputError, match="This machine has the kernels"):
        acdc.Runtime(nn.Linear(3, 3).eval(), batch((3,)), isa="mmx")


def test_a_model_without_zeros_runs_in_pytorch_and_says_so() -> None:
    torch.manual_seed(0)
    model = bottleneck_resnet().eval()
    x = batch((3, 20, 20), dtype=torch.float32)
    runtime = acdc.Runtime(model, x, strict=True)
    with torch.no_grad():
        assert torch.equal(runtime(x), model(x))
    rows = runtime.explain().rows
    assert {row.how for row in rows} == {"torch"}
    assert "100% of its weights are not zero" in rows[0].why
    assert "0 layers run sparse" in str(runtime.explain())


def test_strict_names_what_would_run_in_pytorch() -> None:
    model = ready(Written(lambda m, x: m.a(x).cos(), a=conv(3, 6)))
    with pytest.raises(acdc.InputError, match=r"strict=True.*cos \(cos\)"):
        acdc.Runtime(model, batch((3, 8, 8)), strict=True)


def test_other_shapes_and_dtypes_run_in_pytorch(caplog: pytest.LogCaptureFixture) -> None:
    model = ready(nn.Sequential(block(3, 8), conv(8, 4)))
    runtime = acdc.Runtime(model, batch((3, 6, 6)))
    with caplog.at_level(logging.WARNING):
        compare(model, runtime, batch((3, 8, 7)))
    assert "the example's has (3, 6, 6)" in caplog.text
    half = batch((3, 6, 6)).float()
    with pytest.raises(RuntimeError), torch.no_grad():
        model(half)
    with pytest.raises(RuntimeError):  # as PyTorch
        runtime(half)
    with pytest.raises(RuntimeError):
        runtime(batch((4, 6, 6)))
    compare(model, runtime, batch((3, 6, 6), 2))


def test_nan_stays_in_its_sample() -> None:
    model = ready(bottleneck_resnet())
    runtime = acdc.Runtime(model, batch((3, 20, 20)))
    clean = batch((3, 20, 20), 3)
    dirty = clean.clone()
    dirty[1, :, 3:9, 3:9] = float("nan")
    dirty[2, :, -1, -1] = float("inf")
    before, got = runtime(clean), runtime(dirty)
    assert torch.equal(got[0], before[0])
    assert got[1].isnan().any()
    assert torch.equal(runtime(clean), before)  # nothing of it stays in the buffers


def test_autocast_and_transforms_are_pytorchs() -> None:
    model = ready(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), dtype=torch.float32)
    x = batch((8,), dtype=torch.float32)
    runtime = acdc.Runtime(model, x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(runtime(x), model(x))
    mapped = torch.func.vmap(runtime)(x[:, None])
    torch.testing.assert_close(mapped[:, 0], model(x).detach())


# --- memory, threads and processes ----------------------------------------------------------------


@pytest.mark.parametrize("isa", native.instruction_sets())
def test_points_that_are_no_pixels_stay_zero(isa: str) -> None:
    """Padding needs no code because of it. A stray write would be seen here, too."""
    for name in ("bottleneck", "MobileNet", "functions"):
        model = ready(NETWORKS[name].build(), dtype=torch.float32)
        runtime = acdc.Runtime(model, batch(NETWORKS[name].shape, 3, torch.float32), isa=isa)
        runtime(torch.full((3, *NETWORKS[name].shape), 1e3))
        (plan,) = (p for p in runtime._handle.latest if p.layers[0].op.geometry.kernel != (1, 1))
        seen = 0
        for op, _ in plan.steps:
            buffer = plan._buffers[op.out]
            if not isinstance(op, Conv | Map | Pool) or buffer.live is None:
                continue
            grid = buffer.grid
            for channel in range(buffer.channels):
                start = channel * grid.channel
                points = buffer.memory[start : start + grid.channel].clone()
                pixels = points[grid.before : grid.before + buffer.live.numel()]
                pixels[buffer.live.bool()] = 0
                assert not points.any()
                seen += 1
        assert seen > 20


def test_threads_on_one_handle_and_on_forked_handles() -> None:
    model = ready(bottleneck_resnet(), dtype=torch.float32)
    runtime = acdc.Runtime(model, batch((3, 20, 20), dtype=torch.float32), threads=1)
    inputs = [batch((3, 20, 20), n, torch.float32) for n in (1, 2, 3, 4)]
    wanted = [runtime(x) for x in inputs]
    handles = [runtime, runtime, runtime.fork(), runtime.fork(threads=2)]
    assert [handle.threads for handle in handles] == [1, 1, 1, 2]
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(20):
            x = (number + turn) % 4
            if not torch.equal(handles[number](inputs[x]), wanted[x]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert handles[2]._network is runtime._network
    assert "sparse" in str(runtime.fork().explain())


def _in_child(runtime: Any, x: Tensor, results: Any) -> None:
    results.put((runtime(x).numpy(), runtime(x[:1]).numpy()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_computes_on_one_thread() -> None:
    model = ready(bottleneck_resnet(), dtype=torch.float32)
    x = batch((3, 20, 20), 2, torch.float32)
    runtime = acdc.Runtime(model, x, threads=2)
    wanted, wanted_one = runtime(x), runtime(x[:1])  # the parent has threads of OpenMP now
    processes = multiprocessing.get_context("fork")
    results = processes.Queue()
    child = processes.Process(target=_in_child, args=(runtime, x, results))
    child.start()
    got, one = results.get(timeout=60)
    child.join(timeout=60)
    assert child.exitcode == 0
    assert np.array_equal(got, wanted.numpy())
    assert np.array_equal(one, wanted_one.numpy())
    assert torch.equal(runtime(x), wanted)


def test_a_profile_times_every_step() -> None:
    model = ready(bottleneck_resnet(), dtype=torch.float32)
    x = batch((3, 20, 20), 3, torch.float32)
    runtime = acdc.Runtime(model, x)
    rows = runtime.profile(x).rows
    plan = runtime._handle.latest[0]
    assert len(rows) == len(plan.steps) > len(plan.layers)
    assert all(row.milliseconds is not None and row.milliseconds > 0 for row in rows)
    layers = [row for row in rows if row.kept is not None]
    assert len(layers) == len(plan.layers)
    assert all(row.gflops is not None and row.gflops > 0 for row in layers)
    assert "GF/s" in str(runtime.profile(x))


def test_a_residual_network_of_transformers_adds_in_place() -> None:
    """Its sums change the result of an identity in place."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.same(m.norm(m.b(F.relu(m.a(x)))))
        y += m.a(x)
        return m.c(F.relu(y))

    model = ready(
        Written(
            forward,
            a=conv(3, 8),
            b=conv(8, 8),
            norm=nn.BatchNorm2d(8),
            same=nn.Identity(),
            c=conv(8, 4),
        )
    )
    runtime = acdc.Runtime(model, batch((3, 6, 6)), strict=True)
    compare(model, runtime, batch((3, 6, 6), 3))


# --- removed channels -----------------------------------------------------------------------------


def with_dead_channels(padding: int, activation: nn.Module) -> nn.Module:
    model = ready(
        nn.Sequential(
            conv(3, 12), nn.BatchNorm2d(12), activation, conv(12, 10, padding=padding),
            nn.BatchNorm2d(10), nn.ReLU(), conv(10, 6), nn.Conv2d(6, 4, 1),
        ),
        0.5,
    )  # fmt: skip
    layers: Any = model
    layers[0].weight.data[[0, 3, 4]] = 0  # constants
    layers[3].weight.data[:, [1, 3]] = 0  # not read
    layers[6].weight.data[:, 5:] = 0  # not read: its layer, and perhaps the one before, shrink
    return model


@pytest.mark.parametrize("activation", ["ReLU", "Sigmoid", "SiLU", "GELU", "Hardswish", "ReLU6"])
@pytest.mark.parametrize("padding", [0, 1])
def test_channels_without_weights_are_removed(padding: int, activation: str) -> None:
    model = with_dead_channels(padding, getattr(nn, activation)())
    runtime = acdc.Runtime(model, batch((3, 9, 9)))
    compare(model, runtime, batch((3, 9, 9), 3))
    (program,) = runtime._network.programs
    channels = [op.geometry.out_channels for op in program.convs]
    assert channels[1:] == [5, 6, 4]
    # Of the constants 0, 3 and 4, padding keeps those that are not zero.
    assert 8 <= channels[0] <= 10 if padding else channels[0] == 8
    assert f"{12 + 10 - sum(channels[:2])} channels that no kept weight" in str(runtime.explain())


def test_a_channel_that_others_read_stays() -> None:
    """Outputs, residuals and groups need all channels."""

    def forward(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        y = m.b(F.relu(x))
        return m.d(m.c(y) + x), y

    model = ready(
        Written(forward, a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), d=conv(8, 4, groups=4)), 0.5
    )
    model.a.weight.data[:3] = 0  # type: ignore[union-attr, operator]
    model.b.weight.data[2:4] = 0  # type: ignore[union-attr, operator]
    model.d.weight.data[1] = 0  # type: ignore[union-attr, operator]
    runtime = acdc.Runtime(model, batch((3, 6, 6)))
    compare(model, runtime, batch((3, 6, 6), 3))
    assert sum(program.removed for program in runtime._network.programs) == 0


class Around(nn.Module):
    """Channels that a layer reads or writes, with operations that compute channel by channel."""

    def __init__(self, between: nn.Module, inputs: int = 8, outputs: int = 8) -> None:
        super().__init__()
        self.first, self.between = conv(3, inputs, bias=True), between
        self.last = nn.Conv2d(outputs, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.between(self.first(x)))


class Sum(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(8, 8, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.relu(x)) + x)


class Excited(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.wide(F.relu(self.narrow(x.mean((2, 3), keepdim=True)))))


class Beside(nn.Module):
    """A concatenation with what it reads, as in a DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(8, 6, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(x)], 1)


def half(model: nn.Module) -> Any:
    """Return a network every channel of which keeps half of its weights."""
    model = ready(model, 0.0)
    for weight in model.parameters():
        if weight.dim() > 1:
            index = torch.ones(weight.shape).nonzero().sum(1).reshape(weight.shape)
            weight.data[index % 2 == 1] = 0
    return model


def depthwise(padding: int = 1) -> nn.Module:
    return nn.Conv2d(8, 8, 3, padding=padding, groups=8, bias=True)


# What is between, its outputs, which layers lose which channels (of the outputs or of the inputs of
# their weights), and how many channels of layers go.
TIED: dict[str, tuple[Callable[[], nn.Module], int, dict[str, tuple[str, list[int]]], int]] = {
    "a sum that nothing reads": (Sum, 8, {"last": ("in", [1, 2]), "between.conv": ("in", [2])}, 2),
    "a sum of constants": (
        Sum, 8, {"first": ("out", [1, 2]), "between.conv": ("out", [2, 3])}, 2
    ),
    "a depthwise layer that nothing reads": (depthwise, 8, {"last": ("in", [0, 5])}, 4),
    "a depthwise layer without weights": (depthwise, 8, {"between": ("out", [0, 5])}, 4),
    "constants in a depthwise layer": (
        lambda: depthwise(padding=0), 8, {"first": ("out", [0, 5])}, 4
    ),
    "constants that padding changes": (depthwise, 8, {"first": ("out", [0, 5])}, 0),
    "maximum pooling": (lambda: nn.MaxPool2d(3, 2, 1), 8, {"first": ("out", [0, 5])}, 2),
    "average pooling, which counts zeros": (
        lambda: nn.AvgPool2d(3, 2, 1), 8, {"first": ("out", [0, 5])}, 0
    ),
    "average pooling": (
        lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), 8, {"first": ("out", [0, 5])}, 2
    ),
    "pooling that nothing reads": (lambda: nn.MaxPool2d(3, 2, 1), 8, {"last": ("in", [0])}, 1),
    "squeeze-and-excitation that nothing reads": (
        Excited, 8, {"last": ("in", [0, 5]), "between.narrow": ("in", [0])}, 2
    ),
    "a concatenation, a part of which nothing reads": (
        Beside, 14, {"last": ("in", [1, 2, 10]), "between.conv": ("in", [2])}, 2
    ),
    "a concatenation with constants": (Beside, 14, {"between.conv": ("out", [0, 5])}, 2),
    "a part of a concatenation": (Beside, 14, {"last": ("in", [8, 9, 10, 11, 12, 13])}, 5),
    "all channels of a layer": (Sum, 8, {"last": ("in", [*range(8)])}, 14),
}  # fmt: skip


@pytest.mark.parametrize("name", TIED)
def test_channels_are_removed_through_operations_that_tie_them(name: str) -> None:
    between, outputs, dead, removed = TIED[name]
    model = half(Around(between(), outputs=outputs))
    for layer, (side, channels) in dead.items():
        weight: Any = model.get_submodule(layer).weight
        if side == "out":
            weight.data[channels] = 0
        else:
            weight.data[:, channels] = 0
    runtime = acdc.Runtime(model, batch((3, 9, 9)), strict=True)
    compare(model, runtime, batch((3, 9, 9), 3))
    (program,) = runtime._network.programs
    assert program.removed == removed


def test_removed_channels_of_a_concatenation_are_in_the_file(tmp_path: Path) -> None:
    model = half(Around(Beside(), outputs=14))
    model.last.weight.data[:, [1, 8, 9]] = 0
    model.between.conv.weight.data[:, 1] = 0
    runtime = acdc.Runtime(model, batch((3, 9, 9)))
    loaded = acdc.Runtime.load(runtime.save(tmp_path / "net"))
    x = batch((3, 9, 9), 3)
    assert torch.equal(loaded(x), runtime(x))
    compare(model, loaded, x)
    assert "3 channels that no kept weight" in str(loaded.explain())


def test_a_network_without_any_weights_still_computes() -> None:
    model = ready(nn.Sequential(conv(3, 8, bias=True), nn.ReLU(), conv(8, 4), nn.ReLU()), 1.1)
    runtime = acdc.Runtime(model, batch((3, 6, 6)))
    compare(model, runtime, batch((3, 6, 6), 3))


# --- without what is needed -----------------------------------------------------------------------


def test_without_compiled_kernels_pytorch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_kernels", None)
    model = ready(bottleneck_resnet())
    runtime = acdc.Runtime(model, batch((3, 20, 20)))
    compare(model, runtime, batch((3, 20, 20), 3))
    rows = runtime.explain().rows
    assert {row.how for row in rows} == {"torch"}
    assert "compiled kernels are missing" in rows[0].why
    with pytest.raises(acdc.AcdcError, match="compiled kernels are missing"):
        acdc.Runtime.load("net.acdcrt")


def test_what_is_too_large_for_a_plan_runs_in_pytorch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = ready(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)))
    runtime = acdc.Runtime(model, batch((3, 6, 6)))
    monkeypatch.setattr("acdc.runtime.lists.index_list", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        compare(model, runtime, batch((3, 6, 6), 3))
    assert "too large for 3 samples at once" in caplog.text


def test_a_runtime_is_not_pickled_or_copied() -> None:
    runtime = acdc.Runtime(ready(bottleneck_resnet()), batch((3, 20, 20)))
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(acdc.InputError, match=r"use runtime\.fork\(\)"):
            attempt(runtime)


def test_a_forward_that_asks_whether_gradients_are_computed() -> None:
    """It is served without."""

    def forward(layers: Any, x: Tensor) -> Any:
        y = layers.first(x)
        return layers.second(y) if torch.is_grad_enabled() else y

    model = ready(Written(forward, first=conv(3, 8), second=conv(8, 8)))
    compare(model, acdc.Runtime(model, batch((3, 6, 6))), batch((3, 6, 6), 3))


# --- layers that keep all weights -----------------------------------------------------------------


def with_dense_head() -> nn.Module:
    """Return a network whose head keeps all weights, and computes images of one pixel."""
    body = ready(nn.Sequential(conv(3, 24), conv(24, 24)), 0.9)
    torch.manual_seed(0)
    head = nn.Linear(24, 10).double()
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


def test_a_dense_head_holds_its_weight_as_a_matrix() -> None:
    model = with_dense_head()
    runtime = acdc.Runtime(model, batch((3, 17, 19), 1), strict=True)
    (head,) = [row for row in runtime.explain().rows if row.how == "dense"]
    assert head.kernel.endswith("dense")
    assert head.bytes == 10 * 32 * 8
    for samples in (1, 2, 7, 16, 40):
        compare(model, runtime, batch((3, 17, 19), samples))


def test_a_dense_layer_with_one_position_and_several_pixels_has_a_list() -> None:
    model = ready(nn.Sequential(conv(3, 24), conv(24, 24)), 0.9)
    torch.manual_seed(0)
    model.append(nn.Conv2d(24, 10, 1).double().eval())
    runtime = acdc.Runtime(model, batch((3, 3, 4)), strict=True)
    (row,) = [row for row in runtime.explain().rows if row.how == "dense"]
    assert not row.kernel.endswith("dense")
    compare(model, runtime, batch((3, 3, 4)))


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("channels", [1, 4, 7, 16])
def test_dense_layers_among_sparse_ones(channels: int, isa: str) -> None:
    """The first layer and the head of a network often keep all weights."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, channels, 5, stride=2, padding=2)
    head = nn.Linear(24, channels)
    rest = (nn.ReLU(), conv(channels, 24), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = ready(nn.Sequential(nn.Sequential(*rest[:2]), conv(24, 24)), 0.9, dtype)
        body: Any = nn.Sequential(first, *model[0], model[1], *rest[2:], head).to(dtype).eval()  # type: ignore[index]
        x = batch((3, 17, 19), 2, dtype)
        results = []
        for threads in (1, 2, 5):
            runtime = acdc.Runtime(body, x, isa=isa, threads=threads, strict=True)
            compare(body, runtime, batch((3, 17, 19), 3, dtype), tolerance)
            results.append(runtime(x))
        assert all(torch.equal(results[0], other) for other in results)
        dense = [row.layer for row in runtime.explain().rows if row.how == "dense"]
        assert len(dense) == 2
