"""The arguments that a module is traced with: tensors, and values that a graph holds fixed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


class NoFixedArguments(Exception):
    """A graph cannot hold these arguments. The message gives the reason."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call.

    Tuples, lists and dictionaries may hold tensors and values, to any depth.

    Args:
        signature: Of the forward.
        given: Name -> argument, defaults included.
        tensors: All tensors, in order.
        key: Everything else. A graph holds for the calls with this key.

    """

    signature: inspect.Signature
    given: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    key: Hashable

    @staticmethod
    def of(
        signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Arguments:
        """Return the arguments of a call.

        Raises:
            NoFixedArguments: they do not fit the signature, or one of them is an object that may
                change from call to call.

        """
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:  # a wrapper takes an argument away, before the forward is called
            raise NoFixedArguments(f"its arguments do not fit its signature ({error})") from error
        bound.apply_defaults()
        given = bound.arguments
        for name, parameter in signature.parameters.items():
            if isinstance(parameter.default, Tensor) and given[name] is parameter.default:
                raise NoFixedArguments(f"the default of its argument {name!r} is a tensor")
        tensors: list[Tensor] = []
        key = tuple((name, _key(name, value, tensors)) for name, value in given.items())
        return Arguments(signature, given, tuple(tensors), key)

    def rebuilt(self, make: Callable[[str, Tensor], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments, with what ``make`` returns for each tensor."""
        made: dict[int, Any] = {}

        def made_once(name: str, tensor: Tensor) -> Any:
            if id(tensor) not in made:
                made[id(tensor)] = make(name, tensor)
            return made[id(tensor)]

        given = {name: _rebuilt(name, value, made_once) for name, value in self.given.items()}
        bound = inspect.BoundArguments(self.signature, given)
        return bound.args, bound.kwargs

    def difference(self, other: Arguments) -> str:
        """Return how the first argument that differs from another call's differs."""
        for name, value in self.given.items():
            was = other.given.get(name)
            if _key(name, value, []) != _key(name, was, []):
                return (
                    f"its argument {name!r} is {_shown(value)}, and the example has {_shown(was)}"
                )
        return "its arguments have changed"


def without_values(value: Any) -> Any:
    """Return an argument whose tensors have shapes, strides and dtypes, and no memory.

    Tuples, lists and dictionaries are copied. Other objects, parameters and other subclasses of
    ``Tensor`` stay. A tensor that occurs twice becomes one tensor.
    """
    made: dict[int, Tensor] = {}

    def empty(_: str, tensor: Tensor) -> Tensor:
        if type(tensor) is not Tensor or tensor.layout != torch.strided:
            return tensor
        if id(tensor) not in made:
            size, stride = tensor.size(), tensor.stride()
            made[id(tensor)] = torch.empty_strided(size, stride, dtype=tensor.dtype, device="meta")
        return made[id(tensor)]

    return _rebuilt("", value, empty)


def fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """Return a tensor of a mode, on the CPU where the tensor has lost its values."""
    if tensor.device.type != "meta":
        made: Tensor = mode.from_tensor(tensor)
        return made
    with mode:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")


def _key(name: str, value: Any, tensors: list[Tensor]) -> Hashable:
    """Return what is fixed of an argument, and append its tensors."""
    if isinstance(value, Tensor):
        for number, known in enumerate(tensors):
            if known is value:  # a graph may depend on it: queries, keys and values of attention
                return "the same as", number
        tensors.append(value)
        return Tensor, value.dim()  # a graph may take the shape apart
    if type(value) in (tuple, list):
        return type(value), tuple(_key(name, item, tensors) for item in value)
    if type(value) is dict:
        for key in value:
            if type(key) not in PLAIN:
                raise NoFixedArguments(f"its argument {name!r} has a {type(key).__name__} as a key")
        return dict, tuple((key, _key(name, item, tensors)) for key, item in value.items())
    # What is inside of an object may be another at the next call.
    if type(value) not in PLAIN or value != value:
        raise NoFixedArguments(f"its argument {name!r} is a {type(value).__name__}")
    return type(value), value


def _rebuilt(name: str, value: Any, make: Callable[[str, Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return make(name, value)
    if type(value) in (tuple, list):
        return type(value)(_rebuilt(f"{name}_{i}", item, make) for i, item in enumerate(value))
    if type(value) is dict:
        return {key: _rebuilt(f"{name}_{key}", item, make) for key, item in value.items()}
    return value


def _shown(value: Any) -> str:
    return repr(value) if type(value) in PLAIN else f"a {type(value).__name__}"
