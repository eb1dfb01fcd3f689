"""When a call belongs to PyTorch: transforms and modes that must see every operation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def why_plain(values: Iterable[object]) -> str | None:
    """Return why the operations on these values must be PyTorch's own, or None.

    A transform gets its results by replacing each operation, and a mode by seeing each. Both miss
    what the kernels compute.
    """
    if torch._C._are_functorch_transforms_active():
        return "a function transform is active"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode is active"
    if forward_ad._current_level >= 0:
        return "derivatives are computed in forward mode"
    for value in values:
        if not isinstance(value, Tensor):
            continue
        if type(value) not in (Tensor, nn.Parameter):
            return f"an argument is a {type(value).__name__}"
        if torch._C._functorch.is_legacy_batchedtensor(value):  # autograd.grad(is_grads_batched=)
            return "several gradients are computed at once"
    return None


def why_not_traced(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Return why a module's own forward must compute a call with these arguments, or None."""
    if nn.modules.module._has_any_global_hook():  # a graph does not call the modules
        return "a hook of all modules must see every call"
    return why_not_kernels(args, kwargs)


def why_not_kernels(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Return why PyTorch must compute a call with these arguments, or None."""
    reason = why_plain((*args, *kwargs.values()))
    if reason is None and torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    return reason
