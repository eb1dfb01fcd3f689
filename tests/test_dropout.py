"""Dropout with the numbers of PyTorch, drawn by the kernels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from acdc.engine import dropout, native
from acdc.engine.contract import DTYPES
from support.beside import Beside
from support.engine_nets import Pair, Written

needs_kernels = pytest.mark.skipif(not native.available(), reason="needs the compiled kernels")


def beside_pytorch(
    plain: Callable[[], Any], ours: Callable[[], Any], first: int = 0
) -> tuple[Any, Any]:
    """Return both results, computed from one state of the generator; both must leave the same."""
    found = []
    for function in (plain, ours):
        torch.manual_seed(7)
        torch.rand(first)
        found.append((function(), torch.rand(3), torch.randn(1)))
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])
    return found[0][0], found[1][0]


# --- draws ----------------------------------------------------------------------------------------


@needs_kernels
def test_this_build_of_pytorch_draws_as_the_kernels_do() -> None:
    assert dropout.draws_as_pytorch()


@needs_kernels
@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 2 / 3, 0.9, 1 - 1e-9, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws(isa: str, p: float, dtype: torch.dtype) -> None:
    def ours(count: int) -> Tensor:
        state, out = torch.get_rng_state(), torch.empty(count, dtype=dtype)
        native.bernoulli(state, out, p, 1.5, isa)
        torch.set_rng_state(state)
        return out

    for count in (0, 1, 2, 311, 312, 313, 624, 1025, 3000):
        for first in (0, 1, 6, 623):
            want, got = beside_pytorch(
                lambda n=count: torch.empty(n, dtype=dtype).bernoulli_(p) * 1.5,
                lambda n=count: ours(n),
                first,
            )
            assert torch.equal(got, want), (count, first)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.7])
def test_a_mask(dtype: torch.dtype, memory: torch.memory_format, p: float) -> None:
    empty = torch.empty(3, 5, 7, 11, dtype=dtype, memory_format=memory)
    want, got = beside_pytorch(
        lambda: torch.empty_like(empty).bernoulli_(1 - p).div_(1 - p),
        lambda: dropout.draw(torch.empty_like(empty), p),
    )
    assert torch.equal(got, want)
    assert got.is_contiguous(memory_format=memory)


@pytest.fixture
def asked_again() -> Iterator[None]:
    """Forget whether this build of PyTorch draws as the kernels do, before the test and after."""
    dropout.draws_as_pytorch.cache_clear()
    yield
    dropout.draws_as_pytorch.cache_clear()


@needs_kernels
def test_a_build_of_pytorch_that_draws_in_another_way(
    asked_again: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def others(state: Tensor, out: Tensor, p: float, one: float) -> None:
        out.fill_(one)

    monkeypatch.setattr(native, "bernoulli", others)
    assert not dropout.draws_as_pytorch()
    x = torch.ones(4, 300)
    want, got = beside_pytorch(lambda: F.dropout(x, 0.4), lambda: dropout.dropout(x, 0.4))
    assert torch.equal(got, want)
    want, got = beside_pytorch(
        lambda: torch.empty(40).bernoulli_(0.6).div_(0.6),
        lambda: dropout.draw(torch.empty(40), 0.4),
    )
    assert torch.equal(got, want)


@needs_kernels
def test_a_state_in_another_form(asked_again: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "generator_bytes", lambda: 10_000)
    assert not dropout.draws_as_pytorch()


@needs_kernels
def test_another_thread_draws_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers are not drawn a second time, and it does not get ours."""
    plain, seen = native.bernoulli, []

    def disturbed(*args: Any) -> None:
        plain(*args)
        if not seen:
            seen.append(torch.rand(5))

    assert dropout.draws_as_pytorch()
    monkeypatch.setattr(native, "bernoulli", disturbed)

    def pytorch() -> Tensor:
        torch.rand(5)
        return torch.empty(1000).bernoulli_(0.6).div_(0.6)

    want, got = beside_pytorch(pytorch, lambda: dropout.draw(torch.empty(1000), 0.4))
    assert seen
    assert torch.equal(got, want)


def test_threads_draw_one_after_the_other() -> None:
    """No two threads draw the same numbers, and all draws together leave the state they should."""
    counts, drawn = 300, ([], [])

    def work(into: list[bytes]) -> None:
        for _ in range(counts):
            into.append(dropout.draw(torch.empty(500), 0.4).numpy().tobytes())

    dropout.draws_as_pytorch()
    torch.manual_seed(0)
    threads = [threading.Thread(target=work, args=(into,)) for into in drawn]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = torch.rand(3)
    torch.manual_seed(0)
    want = {torch.empty(500).bernoulli_(0.6).div_(0.6).numpy().tobytes() for _ in range(2 * counts)}
    assert set(drawn[0]) | set(drawn[1]) == want
    assert torch.equal(after, torch.rand(3))


# --- functions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize(
    ("p", "more"),
    [(0.3, {}), (0.0, {}), (1.0, {}), (0.5, {"training": False}), (0.2, {"inplace": True})],
    ids=str,
)
def test_dropout_is_that_of_pytorch(dtype: torch.dtype, p: float, more: dict[str, Any]) -> None:
    x = torch.randn(6, 9, 40, dtype=dtype).transpose(0, 1)

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out = function(leaf * 2, p, **more)
        (out * torch.arange(40)).sum().backward()
        assert leaf.grad is not None
        return [out.detach(), leaf.grad]

    want, got = beside_pytorch(lambda: run(F.dropout), lambda: run(dropout.dropout))
    assert all(map(torch.equal, want, got))
    assert got[0].stride() == want[0].stride()


def test_dropout_of_nothing_draws_nothing() -> None:
    want, got = beside_pytorch(
        lambda: F.dropout(torch.ones(0, 3)), lambda: dropout.dropout(torch.ones(0, 3))
    )
    assert got.shape == want.shape


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_a_probability_of_numpy(kind: type) -> None:
    x = torch.randn(50, 40)
    want, got = beside_pytorch(
        lambda: F.dropout(x, kind(0.3)), lambda: dropout.dropout(x, kind(0.3))
    )
    assert torch.equal(got, want)


class Seen(TorchFunctionMode):
    """A mode of the user, which sees the functions of PyTorch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def test_a_mode_of_the_user_sees_the_functions_of_pytorch() -> None:
    x = torch.randn(2, 3, 5, 4)
    with Seen() as seen:
        dropout.dropout(x, 0.3)
        dropout.attention(x, x, x, dropout_p=0.3)
    assert {F.dropout, F.scaled_dot_product_attention} <= set(seen.calls)


@pytest.mark.parametrize("function", [F.dropout, dropout.dropout])
def test_a_probability_out_of_range_is_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="probability"):
        function(torch.ones(3), 1.5)


NOTHING_SEEN = torch.ones(5, 7, dtype=torch.bool).index_fill_(0, torch.tensor(2), False)
SEEN = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.6
ADDED = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    "more",
    [
        {}, {"is_causal": True}, {"attn_mask": SEEN}, {"attn_mask": ADDED},
        {"attn_mask": NOTHING_SEEN}, {"scale": 0.3}, {"scale": -0.3}, {"heads": 1},
        {"heads": 1, "enable_gqa": True}, {"samples": 1},
    ],
    ids=lambda more: ",".join(more) + str([v for v in more.values() if not torch.is_tensor(v)]),
)  # fmt: skip
def test_attention_is_that_of_pytorch(dtype: torch.dtype, p: float, more: dict[str, Any]) -> None:
    more = dict(more)
    heads, samples = more.pop("heads", 3), more.pop("samples", 2)
    if isinstance(mask := more.get("attn_mask"), Tensor) and mask.dtype != torch.bool:
        more["attn_mask"] = mask.to(dtype)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(*shape, generator=generator, dtype=dtype).transpose(1, 2)
        for shape in ((2, 5, 3, 4), (samples, 7, heads, 4), (samples, 7, heads, 6))
    )

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = function(*leaves, dropout_p=p, **more)
        (out * torch.arange(6)).sum().backward()
        return [out.detach(), *(t.grad for t in leaves if t.grad is not None)]

    want, got = beside_pytorch(
        lambda: run(F.scaled_dot_product_attention), lambda: run(dropout.attention)
    )
    assert len(want) == len(got) == 4
    for one, other in zip(want, got, strict=True):
        torch.testing.assert_close(other, one, equal_nan=True)


@pytest.mark.parametrize(
    ("shapes", "more"),
    [
        (((2, 3, 5, 4), (2, 3, 5, 6), (2, 3, 5, 4)), {}),
        (((2, 3, 5, 4), (3, 5, 4), (3, 5, 4)), {}),
        (((5,), (5,), (5,)), {}),
        (((2, 3, 5, 4),) * 3, {"attn_mask": torch.zeros(5, 5), "is_causal": True}),
        (((2, 3, 5, 4),) * 3, {"attn_mask": torch.zeros(4, 4)}),
        (((2, 3, 5, 4),) * 3, {"attn_mask": torch.zeros(5, 5, dtype=torch.long)}),
        (((2, 3, 5, 4),) * 3, {"attn_mask": torch.zeros(5, 5, dtype=torch.float16)}),
        (((2, 3, 5, 4),) * 3, {"attn_mask": torch.zeros(5, 5, dtype=torch.float64)}),
        (((2, 3, 5, 4),) * 3, {"attn_mask": [[0.0]]}),
        (((2, 3, 5, 4),) * 3, {"scale": torch.tensor(0.3, requires_grad=True)}),
    ],
)
def test_attention_refuses_what_pytorch_refuses(
    shapes: tuple[tuple[int, ...], ...], more: dict[str, Any]
) -> None:
    tensors = [torch.zeros(shape) for shape in shapes]
    results = []
    for function in (F.scaled_dot_product_attention, dropout.attention):
        try:
            results.append(tuple(function(*tensors, dropout_p=0.5, **more).shape))
        except (RuntimeError, ValueError, TypeError) as error:
            results.append(type(error))
    assert results[0] == results[1]


# --- in networks ----------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the masks that this module has drawn."""
    plain, shapes = dropout.draw, []

    def draw(mask: Tensor, p: float) -> Tensor:
        shapes.append(tuple(mask.shape))
        return plain(mask, p)

    for module in ("dropout", "operations"):
        monkeypatch.setattr(f"acdc.engine.{module}.draw", draw)
    return shapes


def attend(m: Any, x: Tensor) -> Tensor:
    """Compute dropouts and attentions that no segment holds, and two layers."""
    x = F.dropout(m.first(x).sin(), 0.2)
    q, k, v = m.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    seen = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, is_causal=True)
    return torch.dropout(m.out(seen.transpose(1, 2).flatten(2)).cos(), 0.1, train=True)


def test_a_network(runs: list[int], drawn: list[tuple[int, ...]]) -> None:
    model = Written(attend, first=nn.Dropout(0.4), qkv=nn.Linear(8, 24), out=nn.Linear(8, 8))
    pair = Pair(model, (5, 8))
    drawn.clear()
    pair.step(6)
    assert runs
    # The second dropout is a part of the segment of the layer behind it.
    assert drawn == [(6, 5, 8), (30, 8), (6, 2, 5, 5), (6, 5, 8)]


def test_a_dropout_with_a_hook_is_called(runs: list[int], drawn: list[tuple[int, ...]]) -> None:
    model = Written(attend, first=nn.Dropout(0.4), qkv=nn.Linear(8, 24), out=nn.Linear(8, 8))
    seen: list[int] = []
    model.first.register_forward_hook(lambda *_: seen.append(1))
    pair = Pair(model, (5, 8))
    seen.clear(), drawn.clear()
    pair.step(6)
    assert runs
    assert len(seen) == 2  # on the engine and in plain PyTorch
    assert len(drawn) == 3


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_a_transformer(kind: str, runs: list[int], drawn: list[tuple[int, ...]]) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=16, intermediate_size=32, num_attention_heads=4, num_hidden_layers=2,
        vocab_size=50, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3,
        attn_implementation=kind,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).double()
    tokens = torch.arange(15).view(3, 5)
    mask = (tokens % 5 < 3).long()
    beside = Beside(model, input_ids=tokens)
    for more in ({}, {"attention_mask": mask}):
        drawn.clear()
        beside.check(input_ids=tokens, **more)
        assert [s for s in drawn if len(s) == 4] == [(3, 4, 5, 5)] * 2
    assert runs


@needs_kernels
def test_an_attention_without_the_one_kernel_that_has_dropout() -> None:
    """PyTorch refuses it: the user has asked for another one."""
    q = torch.randn(2, 2, 5, 8)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for function in (F.scaled_dot_product_attention, dropout.attention):
            with pytest.raises(RuntimeError, match="No available kernel"):
                function(q, q, q, dropout_p=0.2)
