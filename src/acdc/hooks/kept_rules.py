"""Steps of SGD, Adam and AdamW on the kept elements of a weight, each in one pass over memory.

The weight and its gradient are read once, and the weight is written once. The arithmetic is that of
PyTorch's own steps, up to the rounding of single operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from acdc.engine import native
from acdc.hooks.kept_weight import KeptWeight

Options = Mapping[str, Any]
State = MutableMapping[str, Any]


def stepped(kind: type[Optimizer], weight: KeptWeight, state: State, options: Options) -> bool:
    """Take one step of the kept elements, and return whether it could be taken here.

    Not here: the first step, which makes the state; numbers that are tensors; other dtypes than
    float32; ``amsgrad``; where there are no compiled kernels; other optimizers.

    Args:
        kind: The optimizer's type.
        weight: The weight, which is ready (``KeptWeight.is_ready``).
        state: The state of its kept elements. It is changed in place.
        options: Of the weight's group.
    """
    rule = _RULES.get(kind)
    if rule is None or not native.available() or weight.param.dtype != torch.float32:
        return False
    if any(isinstance(options[name], Tensor) for name in ("lr", "weight_decay")):
        return False
    called = rule(state, options)
    if called is None:
        return False
    weight.step_by(*called)
    return True


def _sgd(state: State, options: Options) -> tuple[str, dict[str, Any]] | None:
    momentum = options["momentum"]
    buffer = state.get("momentum_buffer") if momentum else None
    if momentum and not _are_vectors(buffer):
        return None
    fields = {
        "lr": options["lr"],
        "momentum": momentum,
        "share": 1 - options["dampening"],
        "weight_decay": options["weight_decay"],
        "sign": -1 if options["maximize"] else 1,
        "nesterov": int(options["nesterov"]),
    }
    return "sgd", fields if buffer is None else {**fields, "momentum_buffer": buffer}


def _adam(state: State, options: Options) -> tuple[str, dict[str, Any]] | None:
    count = state.get("step")
    beta1, beta2 = options["betas"]
    if not isinstance(count, Tensor) or isinstance(beta1, Tensor) or isinstance(beta2, Tensor):
        return None
    if options["amsgrad"] or not _are_vectors(state.get("exp_avg"), state.get("exp_avg_sq")):
        return None
    count.add_(1)
    steps, lr, decay = int(count), options["lr"], options["weight_decay"]
    decoupled = options["decoupled_weight_decay"]
    return "adam", {
        "exp_avg": state["exp_avg"],
        "exp_avg_sq": state["exp_avg_sq"],
        "step_size": lr / (1 - beta1**steps),
        "share1": 1 - beta1,
        "beta2": beta2,
        "share2": 1 - beta2,
        "eps": options["eps"],
        "root": math.sqrt(1 - beta2**steps),
        "weight_decay": 0.0 if decoupled else decay,
        "shrink": 1 - lr * decay if decoupled else 1.0,
        "sign": -1 if options["maximize"] else 1,
    }


def _are_vectors(*values: Any) -> bool:
    """Return whether these are vectors of kept elements that the kernels can read."""
    return all(
        isinstance(v, Tensor) and v.dtype == torch.float32 and v.is_contiguous() for v in values
    )


_RULES: dict[type[Optimizer], Callable[[State, Options], tuple[str, dict[str, Any]] | None]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
}
