"""Transformers and other networks that ask for sizes: one program each, as PyTorch computes."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import acdc
from acdc.bitmask import deserialize, read_metadata, serialize
from acdc.engine import native
from acdc.runtime import file
from acdc.runtime.lists import SharedLists
from acdc.runtime.plan import Plan, Settings
from acdc.runtime.program import Attention, Embed, Join, Map, Op, Part, Program, Value
from support.engine_nets import Gpt, Written, conv
from test_runtime import ready

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a compiler")

LIMIT = 1e-5  # of the largest number of a result

Example = dict[str, Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def ids(*shape: int, high: int = 50) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(0))


def padding(samples: int, tokens: int) -> Tensor:
    """Return a mask with another number of tokens in each sample."""
    return (torch.arange(tokens) < tokens - torch.arange(samples)[:, None] % tokens).long()


def of_transformers(name: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
        settings.setdefault(special, 0)
    config = getattr(transformers, f"{name.partition('_')[0]}Config")(**settings)
    model: nn.Module = getattr(transformers, name.replace("_", ""))(config)
    return model


BERT = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 32,
}  # fmt: skip
VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 24, "patch_size": 8, "num_labels": 5,
}  # fmt: skip
GPT = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}


def encoder(**settings: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(24, 3, 40, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def patches() -> nn.Module:
    """Patches with a class token and positions, and the mean of all other tokens."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((m.token.expand(x.shape[0], -1, -1), x), 1) + m.position
        return m.head(m.norm(m.encoder(x))[:, 1:].mean(1))

    model = Written(
        forward, patch=nn.Conv2d(3, 24, 4, 4), encoder=encoder(), norm=nn.LayerNorm(24),
        head=nn.Linear(24, 5),
    )  # fmt: skip
    model.token = nn.Parameter(normal(1, 1, 24))
    model.position = nn.Parameter(normal(1, 10, 24))
    return model


def flattening() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 7))


def pools() -> nn.Module:
    """Pooling in ceil_mode without windows beyond the image, and to several pixels."""
    return nn.Sequential(
        conv(3, 8), nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(2, ceil_mode=True),
        conv(8, 8), nn.AdaptiveAvgPool2d((3, 2)), conv(8, 4), nn.AdaptiveAvgPool2d((3, 2)),
    )  # fmt: skip


def channels_last() -> nn.Module:
    """A block of ConvNeXt, with its scale for each channel."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.depthwise(x).permute(0, 2, 3, 1)
        y = m.scale * m.second(F.gelu(m.first(m.norm(y))))
        x = x + y.permute(0, 3, 1, 2)
        return m.head(m.last(x.mean((2, 3), keepdim=True).permute(0, 2, 3, 1)).flatten(1))

    model = Written(
        forward, depthwise=conv(8, 8, 7, groups=8), norm=nn.LayerNorm(8), first=nn.Linear(8, 32),
        second=nn.Linear(32, 8), last=nn.LayerNorm(8), head=nn.Linear(8, 5),
    )  # fmt: skip
    model.scale = nn.Parameter(normal(8))
    return model


def gates() -> nn.Module:
    """A product of two halves of the channels, and sums and products with constants."""

    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x).chunk(2, -1)
        y = (a * F.silu(b) - 0.5) / 3 + m.offset
        return m.b(2 - y) + torch.tanh(m.c(x)) - m.d(x)

    layers = {"a": nn.Linear(12, 20), "c": nn.Linear(12, 6), "d": nn.Linear(12, 6)}
    model = Written(forward, b=nn.Linear(10, 6), **layers)
    model.offset = nn.Parameter(normal(7, 10))
    return model


WHOLE: dict[str, tuple[Callable[[], nn.Module], Example]] = {
    "ViT": (lambda: of_transformers("ViT_ForImageClassification", **VIT), {
        "pixel_values": normal(2, 3, 24, 24),
    }),
    "BERT": (lambda: of_transformers("Bert_Model", **BERT), {"input_ids": ids(2, 9)}),
    "BERT with a mask": (lambda: of_transformers("Bert_ForSequenceClassification", **BERT), {
        "input_ids": ids(3, 9), "attention_mask": padding(3, 9),
        "token_type_ids": ids(3, 9, high=2),
    }),
    "GPT-2": (lambda: of_transformers("GPT2_LMHeadModel", use_cache=False, **GPT), {
        "input_ids": ids(1, 19),
    }),
    "GPT-2 with a mask": (lambda: of_transformers("GPT2_LMHeadModel", use_cache=False, **GPT), {
        "input_ids": ids(3, 7), "attention_mask": padding(3, 7),
    }),
    "encoder": (encoder, {"src": normal(2, 9, 24)}),
    "encoder with norms first": (
        lambda: encoder(norm_first=True, activation="gelu"), {"src": normal(1, 21, 24)}
    ),
    "decoder": (lambda: nn.TransformerDecoderLayer(24, 3, 40, batch_first=True), {
        "tgt": normal(2, 5, 24), "memory": normal(2, 8, 24),
    }),
    "packed projections": (lambda: Gpt(width=16, heads=2), {"x": normal(2, 6, 16)}),
    "patches": (patches, {"x": normal(2, 3, 12, 12)}),
    "flattened images": (flattening, {"input": normal(2, 3, 6, 8)}),
    "pools": (pools, {"input": normal(2, 3, 12, 16)}),
    "channels last": (channels_last, {"x": normal(2, 8, 5, 6)}),
    "gates": (gates, {"x": normal(2, 7, 12)}),
}  # fmt: skip


def built(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Example]:
    torch.manual_seed(0)
    build, example = WHOLE[name]
    model = ready(build(), 0.7, dtype)
    for parameter in model.parameters():  # biases and norms that are not trivial
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model, tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, example)


def resized(example: Example, samples: int) -> Example:
    return {k: torch.cat([x] * samples)[:samples].flip(0) for k, x in example.items()}


def check(model: nn.Module, runtime: Any, example: Example, limit: float = LIMIT) -> None:
    exact = copy.deepcopy(model).double()
    doubles = {k: x.double() if x.is_floating_point() else x for k, x in example.items()}
    with torch.no_grad():
        wanted = tree_leaves(exact(**doubles))
    got = tree_leaves(runtime(**example))
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= limit * b.abs().max()


@pytest.mark.parametrize("name", list(WHOLE))
def test_it_is_one_program_that_computes_what_pytorch_computes(name: str, tmp_path: Path) -> None:
    model, example = built(name)
    runtime = acdc.Runtime(model, example, strict=True, threads=2)
    assert len(runtime._network.programs) == 1
    assert all(row.how != "torch" for row in runtime.explain().rows)
    loaded = acdc.Runtime.load(runtime.save(tmp_path / "net"))
    assert loaded.get_inputs() == runtime.get_inputs()
    for samples in (1, 2, 5, 90):
        call = resized(example, samples)
        check(model, runtime, call)
        results = tree_leaves(runtime(**call))
        assert all(map(torch.equal, tree_leaves(loaded(**call)), results))


@pytest.mark.parametrize("name", ["ViT", "BERT with a mask", "GPT-2", "decoder", "gates"])
def test_the_bits_are_the_same_for_all_threads_and_runs(name: str) -> None:
    model, example = built(name)
    results = []
    for threads in (1, 2, 3, 7):
        runtime = acdc.Runtime(model, example, threads=threads)
        results += [tree_leaves(runtime(**example)), tree_leaves(runtime(**example))]
    assert all(all(map(torch.equal, results[0], other)) for other in results)


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("name", ["BERT with a mask", "GPT-2", "patches"])
def test_every_instruction_set_and_both_dtypes(name: str, isa: str) -> None:
    for dtype, limit in ((torch.float32, LIMIT), (torch.float64, 1e-12)):
        model, example = built(name, dtype)
        runtime = acdc.Runtime(model, example, isa=isa)
        for samples in (1, 4):
            check(model, runtime, resized(example, samples), limit)


def test_a_saved_transformer_needs_no_model(tmp_path: Path) -> None:
    model, example = built("BERT with a mask")
    runtime = acdc.Runtime(model, example)
    runtime.save(tmp_path / "net")
    call = resized(example, 4)
    torch.save({"x": call, "y": runtime(**call).logits}, tmp_path / "call.pt")
    code = f"""
        import sys, torch, acdc
        call = torch.load({str(tmp_path / "call.pt")!r})
        loaded = acdc.Runtime.load({str(tmp_path / "net")!r})
        assert torch.equal(loaded(**call["x"])["logits"], call["y"])
        got = loaded.run(["logits"], {{name: x.numpy() for name, x in call["x"].items()}})
        assert torch.equal(torch.from_numpy(got[0]), call["y"])
        assert "transformers" not in sys.modules
    """
    # The kernels of this process: a sanitized build rounds in other places, and is run with -S.
    flags = ["-S"] if sys.flags.no_site else []
    done = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_results_keep_their_class() -> None:
    model, example = built("BERT")
    result = acdc.Runtime(model, example)(**example)
    assert type(result) is type(model(**example))
    assert result.pooler_output.shape == (2, 32)


def test_calls_that_the_program_does_not_hold_for(tmp_path: Path) -> None:
    model, example = built("BERT with a mask")
    runtime = acdc.Runtime(model, example)
    for other in (
        {"input_ids": ids(2, 9)},
        {name: x[:, :5] for name, x in example.items()},
        example | {"output_hidden_states": True},
    ):
        got, wanted = runtime(**other), model(**other)
        assert (got.logits - wanted.logits).abs().max() <= LIMIT * wanted.logits.abs().max()
    assert len(got.hidden_states) == len(wanted.hidden_states)
    with pytest.raises(IndexError):
        runtime(**example | {"input_ids": example["input_ids"] + 50})
    loaded = acdc.Runtime.load(runtime.save(tmp_path / "net"))
    for change, words in (
        ({"input_ids": example["input_ids"] + 50}, "table has 50 rows"),
        ({"input_ids": example["input_ids"] - 50}, "table has 50 rows"),
        ({"input_ids": example["input_ids"][:, 1:]}, "sizes"),
        ({"input_ids": example["input_ids"].float()}, "holds integers"),
        ({"input_ids": example["input_ids"][:1]}, "different numbers of samples"),
    ):
        with pytest.raises(acdc.InputError, match=words):
            loaded(**example | change)


# --- networks that are no program -----------------------------------------------------------------


def of_batch_size(m: Any, x: Tensor) -> Tensor:
    return m.a(x) * x.shape[0]


def of_position(m: Any, x: Tensor) -> Tensor:
    return m.a(x) + torch.arange(x.shape[0])[:, None, None]


def over_samples(m: Any, x: Tensor) -> Tensor:
    return m.a(x) - m.a(x).mean(0)


def over_tokens(m: Any, x: Tensor) -> Tensor:
    return m.a(x.transpose(1, 2)).transpose(1, 2)


def random(m: Any, x: Tensor) -> Tensor:
    return m.a(x) + torch.rand(6)


def counting(m: Any, x: Tensor) -> Tensor:
    m.calls = getattr(m, "calls", 0) + 1
    return m.a(x).flatten(0, 1).view(x.shape)


def folding(m: Any, x: Tensor) -> Tensor:
    """Tokens of one sample are shared out to others."""
    return m.a(x.reshape(x.shape[1], x.shape[0], 6).transpose(0, 1))


def beyond(m: Any, x: Tensor) -> Tensor:
    """A window of ceil_mode that is partly beyond the image."""
    return F.max_pool2d(m.a(x)[:, None], 4, 4, ceil_mode=True)


@pytest.mark.parametrize(
    "forward",
    [beyond, of_batch_size, of_position, over_samples, over_tokens, random, counting, folding],
)
def test_what_is_no_program_for_any_batch_is_pytorchs(forward: Any) -> None:
    torch.manual_seed(0)
    model = ready(Written(forward, a=nn.Linear(6, 6)), dtype=torch.float32)
    x = normal(4, 6, 6)
    runtime = acdc.Runtime(model, x)
    for given in (x, x[:1], torch.cat((x, x))):
        torch.manual_seed(1)
        wanted = model(given)
        torch.manual_seed(1)
        torch.testing.assert_close(runtime(given), wanted)


def test_a_hook_is_called_each_time() -> None:
    model, example = built("encoder")
    seen = []
    model.layers[0].linear1.register_forward_hook(lambda *args: seen.append(1))
    runtime = acdc.Runtime(model, example)
    seen.clear()
    for count in (1, 2, 3):
        runtime(**example)
        assert len(seen) == count


# --- kernels --------------------------------------------------------------------------------------


def attention(
    heads: int, tokens: tuple[int, int], sizes: tuple[int, int], causal: bool, masked: bool,
    dtype: torch.dtype,
) -> Program:  # fmt: skip
    """Return a program that is one attention, of values with more channels than its own."""
    program = Program(dtype)
    for count, size in zip((tokens[0], tokens[1], tokens[1]), (*sizes[:1], *sizes), strict=True):
        program.inputs.append(program.new(Value(heads * size + 3, 1, count, tokens=True)))
    mask = None
    if masked:
        mask = program.new(Value(1, 1, tokens[1], tokens=True, integers=True))
        program.inputs.append(mask)
    out = program.new(Value(heads * sizes[1], 1, tokens[0], tokens=True))
    scale = 1 / math.sqrt(sizes[0])
    program.ops = [
        Attention("a", 0, out, 1, 2, (0, 1, 3), heads, *sizes, scale, causal, mask)
    ]  # fmt: skip
    program.outputs = [out]
    return program


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize(
    ("heads", "tokens", "sizes"),
    [
        (1, (2, 2), (1, 1)), (2, (3, 5), (4, 6)), (3, (16, 16), (8, 8)), (2, (17, 33), (5, 13)),
        (1, (64, 64), (64, 64)), (2, (65, 70), (16, 16)), (1, (130, 3), (32, 7)),
        (2, (197, 197), (24, 24)),
    ],
)  # fmt: skip
def test_attention_computes_what_pytorch_computes(
    heads: int, tokens: tuple[int, int], sizes: tuple[int, int], isa: str
) -> None:
    torch.manual_seed(0)
    samples = 3
    for dtype, limit in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        for causal, masked in ((False, False), (True, False), (False, True), (True, True)):
            program = attention(heads, tokens, sizes, causal, masked, dtype)
            inputs = [
                torch.randn(samples, program.values[n].width, program.values[n].channels)
                for n in program.inputs[:3]
            ]
            inputs = [x.to(dtype) for x in inputs]
            q, k, v = (
                x[..., first : first + heads * size].double()
                .unflatten(-1, (heads, size)).transpose(1, 2)
                for x, first, size in zip(inputs, (0, 1, 3), (*sizes[:1], *sizes), strict=True)
            )  # fmt: skip
            allowed = torch.ones(samples, 1, *tokens, dtype=torch.bool)
            allowed = allowed.tril() if causal else allowed
            if masked:
                mask = padding(samples, tokens[1])
                mask[2] = 0  # no key at all
                allowed &= mask.bool()[:, None, None]
                inputs.append(mask.to(dtype)[..., None])
            scores = (q @ k.transpose(-1, -2) / math.sqrt(sizes[0])).masked_fill(
                ~allowed, -math.inf
            )
            wanted = (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2).flatten(2)
            results = [
                Plan(program, samples, Settings(isa, threads), SharedLists())(inputs, threads)[0]
                for threads in (1, 2, 5)
            ]
            assert (results[0] - wanted).abs().max() <= limit * wanted.abs().max()
            assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("isa", native.instruction_sets())
def test_the_exponentials_of_an_attention_are_exact_to_a_few_bits(isa: str) -> None:
    """With one channel of ones as values, a sum of shares is 1; of one-hot values, each share."""
    tokens = 48
    program = attention(1, (tokens, tokens), (1, tokens), False, False, torch.float32)
    q = torch.linspace(-30, 30, tokens).view(1, tokens, 1)
    k = torch.linspace(-3, 3, tokens).view(1, tokens, 1)
    v = torch.zeros(1, tokens, tokens + 3)
    v[..., 3:] = torch.eye(tokens)
    inputs = [F.pad(q, (0, 3)), F.pad(k, (1, 2)), v]
    (got,) = Plan(program, 1, Settings(isa, 1), SharedLists())(inputs, 1)
    scores = q @ k.transpose(1, 2)  # one product each, and the differences are those of float32
    wanted = (scores - scores.amax(-1, keepdim=True)).double().softmax(-1)
    large = wanted > 1e-30
    assert ((got - wanted).abs() / wanted)[large].max() < 1e-6
    assert got[~large].max() < 1e-29


@pytest.mark.parametrize("isa", native.instruction_sets())
def test_tanh_is_exact_to_three_bits_beyond_its_last_one(isa: str) -> None:
    program = Program(torch.float32, [Value(4001, tokens=True)] * 2, inputs=[0], outputs=[1])
    program.ops = [Map("a", 0, 1, activation="tanh")]
    for scale in (1e-6, 0.1, 0.5, 3, 100):
        x = torch.linspace(-scale, scale, 4001).view(1, -1)
        (got,) = Plan(program, 1, Settings(isa, 1), SharedLists())([x], 1)
        wanted = x.double().tanh()
        assert ((got - wanted).abs() <= 3e-7 * wanted.abs()).all()
    x[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    (got,) = Plan(program, 1, Settings(isa, 1), SharedLists())([x], 1)
    assert got[0, 0].isnan()
    assert got[0, 1:3].tolist() == [1, -1]


@pytest.mark.parametrize("isa", native.instruction_sets())
def test_rows_of_tables_and_parts_of_values(isa: str) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        values = [
            Value(1, 1, 21, tokens=True, integers=True), Value(37, 1, 21), Value(40, 1, 24, True)
        ]  # fmt: skip
        table, added = torch.randn(9, 37, dtype=dtype), torch.randn(40, 24, dtype=dtype)
        parts = (Part(1, 2, 1, 35, 20, 4, 3), Part(1, 0, 0, 1, 1, 0, 23))
        program = Program(dtype, values, inputs=[0], outputs=[2])
        ops: list[Op] = [Embed("a", 0, 1, table), Join("b", 1, 2, parts, added)]
        program.ops = ops
        numbers = torch.randint(9, (3, 21))
        rows = table[numbers].transpose(1, 2)
        wanted = added.repeat(3, 1, 1)
        wanted[:, 4:39, 3:23] += rows[:, 2:, 1:]
        wanted[:, 0, 23] += rows[:, 0, 0]
        for threads in (1, 3):
            plan = Plan(program, 3, Settings(isa, threads), SharedLists())
            (got,) = plan([numbers.to(dtype)[..., None]], threads)
            assert torch.equal(got, wanted.transpose(1, 2))


# --- hostile files --------------------------------------------------------------------------------

Note = dict[str, Any]
Tensors = dict[str, Tensor]


def of_kind(note: Note, kind: str) -> Note:
    op: Note = next(op for op in note["ops"] if op["op"] == kind)
    return op


def tensor_of(note: Note, kind: str, name: str = "table") -> str:
    numbers = [i for i, op in enumerate(note["ops"]) if op["op"] == kind]
    return f"{numbers[0]}.{name}"


def change_table(note: Note, tensors: Tensors, kind: str, change: Callable[[Tensor], Any]) -> None:
    name = tensor_of(note, kind)
    tensors[name] = change(tensors[name]).contiguous()


FORGERIES: dict[str, tuple[Callable[[Note, Tensors], Any], str]] = {
    "no heads": (lambda n, t: of_kind(n, "attention").update(heads=0), "no size"),
    "too many heads": (lambda n, t: of_kind(n, "attention").update(heads=2**20), "a part from"),
    "large heads": (lambda n, t: of_kind(n, "attention").update(size=17), "a part from"),
    "channels beyond": (
        lambda n, t: of_kind(n, "attention").update(first=[1, 0, 0]), "a part from"
    ),
    "two first channels": (
        lambda n, t: of_kind(n, "attention").update(first=[0, 0]), "three first"
    ),
    "a scale of no size": (
        lambda n, t: of_kind(n, "attention").update(scale=float("nan")), "scale|NaN|number"
    ),
    "keys that are integers": (
        lambda n, t: of_kind(n, "attention").update(keys=n["inputs"][0]), "integers as numbers"
    ),
    "a mask of numbers": (
        lambda n, t: of_kind(n, "attention").update(mask=of_kind(n, "attention")["x"]), "integers"
    ),
    "rows of numbers": (
        lambda n, t: next(op for op in n["ops"] if op["op"] == "attention").update(
            op="embed", x=of_kind(n, "attention")["x"]
        ),
        "integers|table",
    ),
    "other numbers of tokens": (
        lambda n, t: n["values"][n["inputs"][0]].__setitem__(2, 8), "different sizes|other number"
    ),
    "integers with channels": (
        lambda n, t: n["values"][n["inputs"][0]].__setitem__(0, 2), "integers have more"
    ),
    "integers with rows": (
        lambda n, t: n["values"][n["inputs"][0]].__setitem__(1, 2), "more than one row"
    ),
    "integers as a result": (lambda n, t: n.update(outputs=[n["inputs"][0]]), "integers are no"),
    "an argument of floats": (
        lambda n, t: n["arguments"][n["sources"][0]].update(dtype="float32"), "another dtype"
    ),
    "an argument of unknown kind": (
        lambda n, t: n["arguments"][0].update(dtype="object"), "one of"
    ),
    "no table": (lambda n, t: t.pop(tensor_of(n, "embed")), "has no table"),
    "a table of doubles": (
        lambda n, t: change_table(n, t, "embed", lambda x: x.double()), "no matrix"
    ),
    "a table of one dimension": (
        lambda n, t: change_table(n, t, "embed", lambda x: x.flatten()), "no matrix"
    ),
    "a narrow table": (lambda n, t: change_table(n, t, "embed", lambda x: x[:, 1:]), "a table of"),
    "an empty table": (lambda n, t: change_table(n, t, "embed", lambda x: x[:0]), "0 rows|empty"),
    "positions of other sizes": (
        lambda n, t: change_table(n, t, "join", lambda x: x[:, 1:]), "a table of"
    ),
    "no parts": (lambda n, t: of_kind(n, "join").update(parts=[]), "joins 0 parts"),
    "a part of six sizes": (
        lambda n, t: of_kind(n, "join")["parts"][0].pop(), "no seven sizes"
    ),
    "another first part": (
        lambda n, t: of_kind(n, "join").update(x=of_kind(n, "join")["x"] + 1), "joins 1 parts"
    ),
    "a value beyond all": (
        lambda n, t: of_kind(n, "join")["parts"][0].__setitem__(0, 4000), "not made before|joins"
    ),
    **{
        f"a part beyond its value, {place}": (
            lambda n, t, i=place: of_kind(n, "join")["parts"][0].__setitem__(i, 10**6),
            "a part from",
        )
        for place in range(1, 7)
    },
    "an empty part": (
        lambda n, t: of_kind(n, "join")["parts"][0].__setitem__(3, 0), "a part from"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    model, example = built("BERT with a mask")
    path = tmp_path_factory.mktemp("saved") / "net"
    return acdc.Runtime(model, example).save(path).read_bytes()


@pytest.mark.parametrize("name", list(FORGERIES))
def test_hostile_files_are_refused_in_words(name: str, saved: bytes, tmp_path: Path) -> None:
    change, words = FORGERIES[name]
    note, tensors = json.loads(read_metadata(saved)[file.ENTRY]), deserialize(saved)
    change(note, tensors)
    note["sha256"] = file._digest(note, tensors)
    path = tmp_path / "net"
    path.write_bytes(serialize(tensors, {file.ENTRY: json.dumps(note)}))
    with pytest.raises(acdc.InputError, match=words):
        acdc.Runtime.load(path)


# --- parts that are programs ----------------------------------------------------------------------


class Steered(nn.Module):
    """A value steers its forward, so that only its parts can be programs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = encoder(), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Any:
        if float(x.sum()) > 1e9:
            x = x / 2
        return self.head(self.encoder(x))


def test_an_encoder_within_a_model_that_is_no_graph_is_one_program() -> None:
    model = ready(Steered()).float()
    runtime = acdc.Runtime(model, normal(2, 7, 24))
    assert "attend" not in str(runtime.explain())  # an attention that PyTorch computes
    network = runtime._network
    assert not isinstance(network, acdc.runtime.frozen.Frozen)
    assert network._calls is None  # the activations of the example are not kept
    for shape in ((3, 7, 24), (2, 11, 24), (1, 7, 24)):
        with torch.no_grad():
            expected = model(normal(*shape))
        assert (runtime(normal(*shape)) - expected).abs().max() <= LIMIT * expected.abs().max()


# --- calls that a program does not take -----------------------------------------------------------


def test_a_text_of_another_length_runs_in_parts(caplog: pytest.LogCaptureFixture) -> None:
    model = ready(of_transformers("Bert_Model", **BERT))
    runtime = acdc.Runtime(model, {"input_ids": ids(2, 16)}, strict=True)
    assert len(runtime._handle._plans) == 1
    with caplog.at_level("WARNING"):
        for tokens in (9, 16, 24, 9):
            x = ids(3, tokens)
            with torch.no_grad():
                expected = model(input_ids=x).last_hidden_state
            found = runtime(input_ids=x).last_hidden_state
            assert (found - expected).abs().max() <= LIMIT * expected.abs().max()
    said = [record.message for record in caplog.records if "runs in parts" in record.message]
    assert len(said) == 2  # once for each length
    assert not any("runs in PyTorch" in record.message for record in caplog.records)
    assert len(runtime._handle._plans) > 2  # the kernels have computed the layers of the parts


def test_parts_share_the_weights_of_the_program_and_its_copy_alone() -> None:
    model = ready(of_transformers("Bert_Model", **BERT))
    runtime = acdc.Runtime(model, {"input_ids": ids(2, 16)})
    network = runtime._network
    assert not isinstance(network, acdc.runtime.frozen.Frozen)
    weight = network.model.get_parameter("pooler.dense.weight")
    runtime(input_ids=ids(2, 8))
    whole = vars(network.model)["forward"]
    parts = whole.others._network
    assert parts.model.get_parameter("pooler.dense.weight") is weight
    assert weight is not model.get_parameter("pooler.dense.weight")
    assert vars(network.model)["forward"] is whole  # of the copy; the parts have another one
    other = runtime.fork()
    x = ids(2, 11)
    assert torch.equal(other(input_ids=x)[0], runtime(input_ids=x)[0])
