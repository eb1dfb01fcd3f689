"""An example of a model's arguments, and what its modules are then called with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from acdc.engine.arguments import without_values
from acdc.engine.effects import Attributes
from acdc.errors import InputError

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""A tensor, a tuple of arguments, or a mapping of keywords."""

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""The arguments of a call, by position and by name."""


def arguments_of(model: nn.Module, example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call of the model.

    Raises:
        InputError: the example does not fit the forward of the model.

    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, Mapping):
        kwargs = dict(example)
    else:
        args = example if isinstance(example, tuple) else (example,)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"The example does not fit {type(model).__name__}.forward: {error}. Give a tensor, a "
            f"tuple of arguments, or a mapping of keywords, as the model is called with."
        ) from error
    return args, kwargs


def calls_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, values: bool = False
) -> dict[nn.Module, Call]:
    """Return the arguments of each module's first call, recorded in evaluation mode.

    What the call changes in buffers and attributes is undone. A change of a parameter stays.

    Args:
        model: The model.
        args, kwargs: What it is called with.
        values: Keep the values of tensors. They are the activations of a whole forward pass;
            without them a tensor takes no memory.
    """
    calls: dict[nn.Module, Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if module not in calls:
            calls[module] = (args, kwargs) if values else without_values((args, dict(kwargs)))

    attributes = Attributes(model, values=True)
    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in model.modules()]
    modes = {m: m.training for m in model.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
        attributes.restore()
    return calls
