"""What an ONNX model takes: the inputs of an example, and which of their dimensions may vary."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acdc.errors import InputError

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]
Dynamic = Mapping[str, Mapping[int, str]]

BATCH, SEQUENCE = "batch", "sequence"


@dataclass(frozen=True)
class Inputs:
    """The inputs that a model is exported with.

    Args:
        args: Tensors by position, for a forward that names no arguments.
        kwargs: Tensors by the name of their argument.
        dims: For each tensor, in order: the name of each dimension that may vary.
    """

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    dims: tuple[dict[int, str], ...]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of all tensors."""
        return [tuple(tensor.shape) for tensor in (*self.args, *self.kwargs.values())]

    def dynamic_shapes(self) -> Any:
        """Return the dimensions that vary, as ``torch.onnx.export`` takes them."""
        names = {name for dims in self.dims for name in dims.values()}
        shared = {name: torch.export.Dim(name) for name in names}
        shapes = tuple({i: shared[name] for i, name in dims.items()} for dims in self.dims)
        return dict(zip(self.kwargs, shapes, strict=True)) if self.kwargs else shapes

    def only_batch(self) -> Inputs | None:
        """Return the inputs with a batch that varies and nothing else; None: these are such."""
        if all(set(dims) <= {0} for dims in self.dims):
            return None
        return Inputs(self.args, self.kwargs, tuple({0: dims[0]} for dims in self.dims))


def inputs_of(model: nn.Module, example: Example, dynamic: Dynamic | None) -> Inputs:
    """Return the inputs of a model that is about to be exported.

    Values of the example that are no tensors, such as None or a flag, become a part of ``model``.

    Args:
        model: A copy of the model.
        example: As the model is called: a tensor, a tuple of arguments, or a mapping of keywords.
        dynamic: Name of an argument -> its dimensions that vary, by name. None: the second
            dimension of every input of tokens.

    Raises:
        InputError: the example does not fit the model, or ``dynamic`` does not fit the example.
    """
    args, kwargs = _by_name(model, example)
    tensors = {**{_name(model, i): t for i, t in enumerate(args)}, **kwargs}
    if not tensors:
        raise InputError(
            f"The example {example!r} holds no tensor. Give an input as in training, such as "
            f"torch.zeros(1, 3, 32, 32)."
        )
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if not all(tensor.dim() and tensor.numel() for tensor in tensors.values()):
        raise InputError(
            f"The example has the shapes {shapes}. Give one sample at least, the batch first, such "
            f"as torch.zeros(1, 3, 32, 32)."
        )
    dims = _token_dims(tensors) if dynamic is None else _asked_dims(tensors, dynamic)
    wide = [_widened(t.detach().cpu(), d) for t, d in zip(tensors.values(), dims, strict=True)]
    if args:
        return Inputs(tuple(wide), {}, dims)
    return Inputs((), dict(zip(kwargs, wide, strict=True)), dims)


def _by_name(model: nn.Module, example: Example) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    given: Mapping[str, Any]
    if isinstance(example, Mapping):
        given = {str(name): value for name, value in example.items()}
    else:
        args = example if isinstance(example, tuple) else (example,)
        if all(isinstance(value, Tensor) for value in args):
            return args, {}
        try:
            given = inspect.signature(model.forward).bind(*args).arguments
        except TypeError as error:
            raise InputError(f"The example does not fit the model: {error}.") from error
    fixed = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
    for name, value in fixed.items():
        if not isinstance(value, bool | int | float | str | None):
            raise InputError(
                f"The example has a {type(value).__name__} for {name!r}. An ONNX model takes "
                f"tensors; numbers, words, flags and None become a part of it."
            )
    if fixed:
        model.forward = functools.partial(model.forward, **fixed)
    return (), {name: value for name, value in given.items() if isinstance(value, Tensor)}


def _name(model: nn.Module, position: int) -> str:
    """Return the name of an argument of the model's forward."""
    names = [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    return names[position] if position < len(names) else f"input {position}"


def _token_dims(tensors: Mapping[str, Tensor]) -> tuple[dict[int, str], ...]:
    """Let the length of token sequences vary: that of integers ``[batch, sequence]``.

    Inputs of one length, such as tokens and their mask, have one dimension in common. Those of the
    decoder (``decoder_input_ids``) have a length of their own, whatever it is in the example.
    """
    names: dict[tuple[int, bool], str] = {}
    dims: list[dict[int, str]] = []
    for argument, tensor in tensors.items():
        dims.append({0: BATCH})
        if tensor.dim() == 2 and not tensor.is_floating_point() and not tensor.is_complex():
            length = tensor.shape[1], argument.startswith("decoder_")
            names.setdefault(length, SEQUENCE if not names else f"{SEQUENCE}_{len(names) + 1}")
            dims[-1][1] = names[length]
    return tuple(dims)


def _asked_dims(tensors: Mapping[str, Tensor], dynamic: Dynamic) -> tuple[dict[int, str], ...]:
    dims: dict[str, dict[int, str]] = {name: {0: BATCH} for name in tensors}
    sizes: dict[str, tuple[str, int]] = {}
    for argument, asked in dynamic.items():
        if argument not in tensors:
            raise InputError(
                f"dynamic names {argument!r}, which is no input of the example. Its inputs: "
                f"{', '.join(map(repr, tensors))}."
            )
        if not isinstance(asked, Mapping):
            raise InputError(
                f"dynamic has {asked!r} for {argument!r}. Give a mapping from a dimension to its "
                f"name, such as {{1: 'sequence'}}."
            )
        tensor = tensors[argument]
        for i, name in asked.items():
            if not isinstance(i, int) or not 0 <= i < tensor.dim():
                raise InputError(
                    f"dynamic names dimension {i!r} of {argument!r}, which has the dimensions 0 to "
                    f"{tensor.dim() - 1}."
                )
            if not isinstance(name, str) or not name.isidentifier():
                raise InputError(
                    f"dynamic calls dimension {i} of {argument!r} {name!r}. A name is a word of "
                    f"letters, digits and underscores, such as 'sequence'."
                )
            dims[argument][i] = name
    for argument, named in dims.items():
        for i, name in named.items():
            where, size = f"dimension {i} of {argument!r}", tensors[argument].shape[i]
            other, first = sizes.setdefault(name, (where, size))
            if size != first:
                raise InputError(
                    f"{where} and {other} have one name, {name!r}, and the sizes {size} and "
                    f"{first}. Dimensions of one name have one size: give them two names."
                )
    return tuple(dims.values())


def _widened(tensor: Tensor, dims: Mapping[int, str]) -> Tensor:
    """Double each dimension of one that may vary: the exporter would hold a one fixed."""
    for i in dims:
        if tensor.shape[i] == 1:
            tensor = torch.cat([tensor, tensor], i)
    return tensor
