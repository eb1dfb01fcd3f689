"""A part of the network is called with other arguments than those of the example.

The example fixes what a graph is traced with. Every other call must give what plain PyTorch gives.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import acdc
from acdc.engine.host import ARGUMENTS
from support.engine_nets import Outer


class Layers(nn.Module):
    """Two layers in a row: the engine runs them as one segment."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 12), nn.Linear(12, 8)

    def layers(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


class Options(Layers):
    """A forward with options: tensors, numbers, words, and one for keywords only."""

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        scale: float = 1.0,
        name: str = "plain",
        twice: bool = False,
        return_dict: bool | None = None,
        *,
        shift: Any = None,
    ) -> Any:
        y = self.layers(x) * scale
        if mask is not None:
            y = y * mask
        if name == "negative":
            y = -y
        if twice:
            y = y + y
        if shift is not None:
            y = y + shift
        return (y,) if return_dict is False else y


def x_of(seed: int = 0, rows: int = 6) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


MASK = (x_of(7) > 0).float()


def on_engine(part: nn.Module, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Return a network in a sparse phase whose example has these arguments, and a plain copy."""
    torch.manual_seed(0)
    for layer in part.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    model = Outer(part)
    masks = {}
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            masks[name] = torch.rand(weight.shape) < 0.3
            weight.data[~masks[name]] = 0
    plain = copy.deepcopy(model)
    engine = acdc.Engine(model, Call(*args, **kwargs).example(), choose=False)
    engine.compress(masks)
    return model, plain


@contextmanager
def subject(name: str) -> Iterator[None]:
    """Name the case in an error."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in the case {name!r}")
        raise


@dataclass
class Call:
    """Arguments of a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def example(self) -> Any:
        assert not (self.args and self.kwargs)
        return self.kwargs or self.args


def same(got: Any, want: Any) -> None:
    """Whether two results are of the same types and numbers."""
    assert type(got) is type(want)
    if isinstance(want, Tensor):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            same(got[key], want[key])
        if hasattr(want, "__dict__"):
            same(vars(got), vars(want))
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            same(a, b)
    elif hasattr(want, "__dict__"):
        same(vars(got), vars(want))
    else:
        assert got == want


EXAMPLES = {
    "positional": Call(x_of()),
    "keyword": Call(x=x_of()),
    "mask": Call(x=x_of(), mask=MASK),
    "all": Call(
        x=x_of(), mask=MASK, scale=2.5, name="negative", twice=True, return_dict=False, shift=MASK
    ),
    "numbers": Call(x_of(), None, 3.0, "plain", False, None),
}  # fmt: skip

CALLS = {
    "x": Call(x_of(1)),
    "keyword x": Call(x=x_of(1)),
    "None": Call(x_of(1), None),
    "default given": Call(x_of(1), scale=1.0, name="plain", twice=False, return_dict=None),
    "defaults by position": Call(x_of(1), None, 1.0, "plain", False, None),
    "mask": Call(x_of(1), mask=MASK),
    "mask by position": Call(x_of(1), MASK),
    "order of keywords": Call(return_dict=None, mask=MASK, x=x_of(1)),
    "another word": Call(x_of(1), name="".join(["neg", "ative"])),
    "the word of the example": Call(x_of(1), MASK, 2.5, "".join(["neg", "ative"]), True, False,
                                    shift=MASK),
    "another number": Call(x_of(1), scale=0.5),
    "a number that is equal": Call(x_of(1), None, float("3.0")),
    "an integer": Call(x_of(1), scale=1),
    "True for a number": Call(x_of(1), scale=True),
    "a tensor for a number": Call(x_of(1), scale=torch.tensor(2.0)),
    "a number for a tensor": Call(x_of(1), mask=2.0),
    "a number for None": Call(x_of(1), shift=1),
    "a tensor for None": Call(x_of(1), shift=MASK),
    "tuple": Call(x_of(1), return_dict=False),
    "twice": Call(x=x_of(1), twice=True),
    "everything": Call(x_of(1), MASK, 0.5, "negative", True, False, shift=3),
    "another batch": Call(x_of(1, 3)),
}  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES)
def test_any_call_gives_what_plain_pytorch_gives(example: str) -> None:
    model, plain = on_engine(Options(), *EXAMPLES[example].args, **EXAMPLES[example].kwargs)
    for name, call in CALLS.items():
        with subject(name):
            same(model(*call.args, **call.kwargs), plain(*call.args, **call.kwargs))


@pytest.mark.parametrize(
    ("example", "call"),
    [
        ("positional", "x"), ("positional", "keyword x"), ("positional", "None"),
        ("positional", "default given"), ("positional", "defaults by position"),
        ("positional", "another batch"), ("keyword", "x"), ("keyword", "default given"),
        ("mask", "mask"), ("mask", "mask by position"), ("mask", "order of keywords"),
        ("all", "the word of the example"), ("numbers", "a number that is equal"),
    ],
)  # fmt: skip
def test_a_call_that_means_the_same_runs_on_the_kernels(
    example: str, call: str, ran: list[int]
) -> None:
    given, wanted = EXAMPLES[example], CALLS[call]
    model, _ = on_engine(Options(), *given.args, **given.kwargs)
    model(*wanted.args, **wanted.kwargs)
    assert ran


def test_other_values_run_on_graphs_of_their_own(ran: list[int]) -> None:
    """Training gives an attention mask, say, where the example had none."""
    model, plain = on_engine(Options(), x_of())
    others: list[dict[str, Any]] = [{"mask": MASK}, {"twice": True}, {"scale": 2.0}]
    for kwargs in others * 2:
        ran.clear()
        same(model(x_of(1), **kwargs), plain(x_of(1), **kwargs))
        assert ran


def test_ever_new_values_are_computed_in_parts_and_said_once(
    ran: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "acdc.engine")
    model, _ = on_engine(Options(), x_of())
    for step in range(2, 9):
        model(x_of(), scale=float(step))
    # The example's call is a graph, and those after it. Then both layers by themselves.
    assert len(ran) == ARGUMENTS - 1 + 2 * (7 - ARGUMENTS + 1)
    (message,) = {record.getMessage() for record in caplog.records if "5.0" in record.getMessage()}
    assert "part runs in parts: its argument 'scale' is 5.0" in message
    assert "the example has 1.0" in message
    assert len(caplog.records) == 1


class TracedInTraining(Layers):
    """In evaluation mode it looks at values, as no graph can."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and bool(x.isnan().any()):
            raise ValueError("the input is not a number")
        return self.layers(x)


def test_a_whole_model_without_a_graph_in_evaluation_runs_in_parts(
    ran: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """What the parts are called with is found by a call of the model, which has no graph either."""
    caplog.set_level(logging.WARNING, "acdc.engine")
    torch.manual_seed(0)
    model = TracedInTraining()
    plain = copy.deepcopy(model)
    engine = acdc.Engine(model, x_of(), choose=False)
    full = {n: torch.ones_like(w, dtype=torch.bool) for n, w in model.named_parameters()}
    engine.compress({name: mask for name, mask in full.items() if mask.dim() > 1})
    for step in range(3):
        for net in (model, plain):
            net.train(step != 1)
        ran.clear()
        with torch.set_grad_enabled(step != 1):
            same(model(x_of(step)), plain(x_of(step)))
        assert ran
        assert engine.active
    (message,) = {record.getMessage() for record in caplog.records}
    assert "runs in parts" in message
    engine.decompress()
    assert not any("forward" in vars(module) for module in model.modules())


class Collects(Layers):
    """It hands its result over in a list that it is given."""

    def forward(self, x: Tensor, into: list[Any]) -> Tensor:
        into.append(y := self.layers(x))
        return y + 0


def test_a_list_that_the_forward_fills_is_filled() -> None:
    model, plain = on_engine(Collects(), x_of(), [])
    for net in (model, plain):
        found: list[Any] = []
        y = net(x_of(1), found)
        assert torch.equal(found[0], y)


class Anything(Layers):
    """As the layers of transformers: tensors in a tuple, and any other keywords."""

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor] | None = None, **more: Any) -> Tensor:
        y = self.layers(x)
        if pair is not None:
            y = y * pair[0] + pair[1]
        return y + more["shift"] if "shift" in more else y


def test_a_part_that_takes_any_keywords_runs_on_the_kernels(ran: list[int]) -> None:
    model, plain = on_engine(Anything(), x_of(), (MASK, x_of(3)))
    calls = (Call(x_of(1), (x_of(2), MASK)), Call(x_of(1)), Call(x_of(1), shift=MASK, other=None))
    for call in calls:
        ran.clear()
        same(model(*call.args, **call.kwargs), plain(*call.args, **call.kwargs))
        assert ran


def test_gradients_under_other_keywords_are_those_of_plain_pytorch() -> None:
    model, plain = on_engine(Options(), x_of())
    for kwargs in ({"return_dict": None}, {"twice": True}, {"mask": MASK}):
        for net in (model, plain):
            net(x_of(2), **kwargs).square().sum().backward()
        for got, want in zip(model.parameters(), plain.parameters(), strict=True):
            kept = want != 0 if want.dim() > 1 else torch.ones_like(want, dtype=torch.bool)
            torch.testing.assert_close(got.grad * kept, want.grad * kept, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "call", [Call(), Call(x_of(), nothing=1), Call(x_of(), x=x_of()), Call(*[x_of()] * 9)]
)
def test_a_call_that_does_not_fit_is_the_error_of_the_model(call: Call) -> None:
    model, plain = on_engine(Options(), x_of())
    with pytest.raises(TypeError) as want:
        plain(*call.args, **call.kwargs)
    with pytest.raises(TypeError) as got:
        model(*call.args, **call.kwargs)
    assert str(got.value) == str(want.value)
    same(model(x_of()), plain(x_of()))


def test_the_signature_is_that_of_the_model() -> None:
    """Trainers read from it which columns of a data set the model takes."""
    part = Options()
    want = inspect.signature(part.forward)
    on_engine(part, x_of())
    assert "forward" in vars(part)
    assert inspect.signature(part.forward) == want


# --- values that cannot be held fixed -------------------------------------------------------------


class Sum(Layers):
    def forward(self, x: Tensor, more: Any = ()) -> Tensor:
        y = self.layers(x)
        for tensor in more:
            y = y + tensor
        return y


def test_a_list_that_is_filled_anew_counts_with_its_new_tensors() -> None:
    more = [x_of(1)]
    model, plain = on_engine(Sum(), x_of(), more)
    for seed in (1, 2):
        more[0] = x_of(seed)
        same(model(x_of(), more), plain(x_of(), more))
    more.append(x_of(3))
    same(model(x_of(), more), plain(x_of(), more))


class Extras(Layers):
    def forward(self, x: Tensor, extra: Any = None, size: Any = (2, 3)) -> Tensor:
        y = self.layers(x) * size[1]
        return y if extra is None else y + extra["a"]


@pytest.mark.parametrize(
    ("example", "call"),
    [
        (Call(x_of(), {"a": x_of(1)}), Call(x_of(), {"a": x_of(2)})),
        (Call(x_of(), None, (4, 5)), Call(x_of(), None, (4, 6))),
        (Call(x_of()), Call(x_of(), None, (4, 6))),
        (Call(x_of()), Call(x_of(), None, [4, 6])),
        (Call(x_of(), None, torch.Size((4, 5))), Call(x_of(), None, (4, 6))),
        (Call(x_of(), None, range(3)), Call(x_of(), None, range(1, 9))),
    ],
)
def test_containers_and_objects(example: Call, call: Call) -> None:
    model, plain = on_engine(Extras(), *example.args)
    same(model(*example.args), plain(*example.args))
    same(model(*call.args), plain(*call.args))


# --- forwards of many kinds -----------------------------------------------------------------------


def takes_return_dict(forward: Callable[..., Any]) -> Callable[..., Any]:
    """As ``can_return_tuple`` of transformers: the wrapper takes a keyword away."""

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        as_tuple = kwargs.pop("return_dict", None) is False
        result = forward(self, *args, **kwargs)
        return (result,) if as_tuple else result

    return wrapper


class Wrapped(Layers):
    @takes_return_dict
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        y = self.layers(x)
        return y if mask is None else y * mask


@pytest.mark.parametrize("example", [Call(x=x_of()), Call(x=x_of(), return_dict=False)])
def test_a_wrapper_that_takes_a_keyword_away(example: Call) -> None:
    model, plain = on_engine(Wrapped(), **example.kwargs)
    for kwargs in ({}, {"return_dict": False}, {"return_dict": True}, {"mask": MASK}):
        same(model(x_of(1), **kwargs), plain(x_of(1), **kwargs))


@pytest.mark.parametrize("example", [Call(x_of()), Call(input=x_of())])
def test_a_layer_alone_called_by_keyword(example: Call, ran: list[int]) -> None:
    model, plain = on_engine(nn.Linear(8, 4), *example.args, **example.kwargs)
    same(model(x_of(1)), plain(x_of(1)))
    same(model(input=x_of(1)), plain(input=x_of(1)))
    assert len(ran) == 2


class Asks(Layers):
    """As DenseNet of torchvision: a tensor or a list of tensors."""

    def forward(self, x: Any, extra: Any = None) -> Tensor:
        xs = [x, x] if isinstance(x, Tensor) else x
        y = self.layers(xs[0] + xs[1])
        return y + extra if torch.is_tensor(extra) else y


def test_a_forward_that_asks_for_the_type_of_its_argument() -> None:
    model, plain = on_engine(Asks(), x_of(), MASK)
    for call in (Call(x_of(1), MASK), Call([x_of(1), x_of(2)]), Call(x_of(1)), Call(x_of(1), 3)):
        same(model(*call.args), plain(*call.args))


MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "a power": lambda x: torch.pow(x, 3.0),
    "a number where not": lambda x: torch.where(x > 0, x, 0.0),
    "as many as columns": lambda x: x * torch.ones(x.size(1)),
    "as long as columns": lambda x: x + torch.arange(x.size(1)),
    "a number that is filled in": lambda x: x + torch.full((1,), x.size(0)),
}


@pytest.mark.parametrize("what", MIXED)
def test_a_traced_value_is_no_tensor_to_compiled_code(what: str) -> None:
    """PyTorch's compiled code takes a tensor where it expects a number, and reads its memory."""

    class Mixes(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers(MIXED[what](x))

    model, plain = on_engine(Mixes(), x_of())
    same(model(x_of(1)), plain(x_of(1)))


# --- outputs --------------------------------------------------------------------------------------


class Named(NamedTuple):
    last: Any
    hidden: Any = None


@dataclass
class Data:
    last: Any
    hidden: Any = None


@dataclass(frozen=True)
class Frozen:
    last: Any
    hidden: Any = None


@dataclass
class Fixed:
    """Its constructor takes no ``steps``."""

    last: Any
    steps: int = field(default=3, init=False)


@dataclass
class Output(OrderedDict):  # type: ignore[type-arg]
    """As ``ModelOutput`` of transformers: a dictionary of the fields that are not None."""

    last: Any = None
    hidden: Any = None
    attentions: Any = None

    def __post_init__(self) -> None:
        for name in ("last", "hidden", "attentions"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


class Words(dict):  # type: ignore[type-arg]
    """A dictionary with a name of its own."""


class Returns(Layers):
    def __init__(self, kind: Callable[..., Any]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        y = self.layers(x)
        return self.kind(y, y * 2)


KINDS = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, {"b": (b, None)}],
    "named tuple": Named,
    "dataclass": Data,
    "frozen dataclass": Frozen,
    "dataclass with a field that is not given": lambda a, b: Fixed(a),
    "model output": Output,
    "model output of two fields": lambda a, b: Output(a, attentions=(a, b)),
    "model output in a tuple": lambda a, b: (Output(a), b),
    "dictionary": lambda a, b: {"a": a, "b": b},
    "ordered dictionary": lambda a, b: OrderedDict(b=b, a=a),
    "another dictionary": lambda a, b: Words(a=a, b=b),
    "nothing": lambda a, b: None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_of_the_type_that_the_model_returns(kind: str) -> None:
    model, plain = on_engine(Returns(KINDS[kind]), x_of())
    same(model(x_of(1)), plain(x_of(1)))


# --- transformers ---------------------------------------------------------------------------------


def test_a_resnet_of_transformers_trains_with_keywords_and_labels(ran: list[int]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
    )
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config)
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    plain = copy.deepcopy(model)
    engine = acdc.Engine(model, {"pixel_values": images}, choose=False)
    schedule = acdc.Schedule((acdc.Phase("dense", 0, 1), acdc.Phase("sparse", 1, 4)), (4,))
    for net, helper in ((model, engine), (plain, None)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        method = acdc.ACDC(acdc.Unstructured(0.8), schedule)
        acdc.Sparsifier(method, net, optimizer, engine=helper)
        for _ in range(4):
            optimizer.zero_grad()
            net(pixel_values=images, labels=labels).loss.backward()
            optimizer.step()
    assert ran
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    for kwargs in ({"output_hidden_states": True}, {"return_dict": False}, {"labels": labels}):
        same(model(images, **kwargs), plain(images, **kwargs))


def test_hidden_states_of_transformers_are_collected_at_every_call() -> None:
    """Hooks collect them, which a trace does not run."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        vocab_size=50, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    x = torch.randint(0, 50, (2, 7))
    engine = acdc.Engine(model, x, choose=False)
    weights = {
        f"{name}.weight": torch.rand_like(layer.weight) < 0.3
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    with torch.no_grad():
        for name, mask in weights.items():
            model.get_parameter(name).masked_fill_(~mask, 0.0)
    plain = copy.deepcopy(model)
    engine.compress(weights)
    with torch.no_grad():
        for options in (
            {},
            *3 * ({"output_hidden_states": True},),
            {"output_attentions": True},
            {},
        ):
            for samples in (x, x[:1]):
                got, wanted = model(samples, **options), plain(samples, **options)
                assert list(got) == list(wanted)
                for name in wanted:
                    torch.testing.assert_close(got[name], wanted[name])
                assert len(got.hidden_states or ()) == (
                    3 if "output_hidden_states" in options else 0
                )
