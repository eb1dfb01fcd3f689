"""Random calls of a part that the engine traced: each must give what plain PyTorch gives."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch

from test_engine_arguments import Options, on_engine, x_of

VALUES: dict[str, list[Any]] = {
    "mask": [None, x_of(7), 2.0, x_of(8).double()],
    "scale": [1.0, 1, True, 2.5, torch.tensor(2.0), 1e-3],
    "name": ["plain", "negative", ""],
    "twice": [False, True, 0, 1],
    "return_dict": [None, True, False],
    "shift": [None, 3, x_of(9), 0.5],
}
POSITIONAL = [name for name in VALUES if name != "shift"]


def _draw(rng: random.Random) -> tuple[list[Any], dict[str, Any]]:
    args = [x_of(rng.randrange(99))]
    count = rng.randrange(len(POSITIONAL) + 1) if rng.random() < 0.5 else 0
    args += [rng.choice(VALUES[name]) for name in POSITIONAL[:count]]
    rest = [*POSITIONAL[count:], "shift"]
    names = rng.sample(rest, rng.randrange(len(rest) + 1))
    return args, {name: rng.choice(VALUES[name]) for name in names}


def engine_calls(seed: int) -> str | None:
    """Trace with one random call; then compare thirty others, with their gradients."""
    rng = random.Random(seed)
    args, kwargs = _draw(rng)
    names = dict(zip(["x", *POSITIONAL], args, strict=False)) | kwargs
    model, plain = on_engine(Options(), **names)
    for call in range(30):
        if call:
            args, kwargs = _draw(rng)
        else:  # the simplest call first: the input alone
            args, kwargs = [names["x"]], {}
        got, want = (_outcome(net, args, kwargs) for net in (model, plain))
        if not _same(got, want):
            return f"example {names}, call {args} {kwargs}: {got}, and plain PyTorch gives {want}"
    return None


def _outcome(net: torch.nn.Module, args: list[Any], kwargs: dict[str, Any]) -> Any:
    args, kwargs = copy.deepcopy((args, kwargs))
    args[0].requires_grad_()
    try:
        result = net(*args, **kwargs)
        (result[0] if isinstance(result, tuple) else result).sum().backward()
    except Exception as error:
        return type(error), str(error)
    return result, args[0].grad


def _same(got: Any, want: Any) -> bool:
    if isinstance(want, torch.Tensor):
        return isinstance(got, torch.Tensor) and torch.allclose(
            got, want, rtol=1e-4, atol=1e-5, equal_nan=True
        )
    if isinstance(want, tuple):
        return isinstance(got, tuple) and len(got) == len(want) and all(map(_same, got, want))
    return bool(got == want)


TRIALS: dict[str, Callable[[int], str | None]] = {"engine_calls": engine_calls}
