"""Pickles of arrays, read without unpickling: nothing that a pickle names is imported or called.

A pickle is a program for a small machine. The machine here knows the instructions for plain values,
lists, tuples and dicts, and builds numpy arrays of whole numbers from their bytes. It refuses every
other instruction and every other name. An array of another kind becomes ``None``.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


class _Mark:
    """Where the items of a list, a tuple or a dict begin on the stack."""


class _Dtype:
    """A dtype, as far as it is one of whole numbers."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        whole = isinstance(code, str) and code in _WHOLE
        self.value = np.dtype(code) if whole else None

    def build(self, state: Any) -> None:
        """Take the order of the bytes from a state ``(version, order, ...)``."""
        if self.value is None:
            return
        if not (isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "=")):
            raise ValueError("the state of a dtype is not as numpy writes it")
        self.value = self.value.newbyteorder(state[1])


_WHOLE = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)}


class _Array:
    """An array, empty until its state is known."""

    def __init__(self, *_: Any) -> None:
        self.value: NDArray[Any] | None = None

    def build(self, state: Any) -> None:
        """Fill the array from ``(version, shape, dtype, whether Fortran's order, bytes)``."""
        if not (isinstance(state, tuple) and len(state) == 5):
            raise ValueError("the state of an array is not as numpy writes it")
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran is True else "C")


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any] | None:
    """Return the array, or ``None`` if it is not one of whole numbers."""
    if isinstance(data, str):
        data = data.encode("latin1")  # as Python 2 wrote bytes
    if not isinstance(dtype, _Dtype) or dtype.value is None or not isinstance(data, bytes):
        return None
    if not (isinstance(shape, tuple) and len(shape) < 8 and all(type(n) is int for n in shape)):
        raise ValueError("the shape of an array is no tuple of whole numbers")
    if order not in ("C", "F"):
        raise ValueError("the order of an array is none of numpy's")
    # Fails unless there are as many bytes as the shape needs.
    return np.frombuffer(data, dtype.value).reshape(_checked(shape), order=order)


def _checked(shape: tuple[int, ...]) -> tuple[int, ...]:
    if any(n < 0 for n in shape):  # numpy would take -1 for the length that fits
        raise ValueError("an array has a negative shape")
    return shape


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.value = _array(data, dtype, shape, order)
    return array


def _encode(text: Any, encoding: Any) -> bytes:
    """Stand in for ``codecs.encode``, with which Python 3 writes bytes into old pickles."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("it asks for another encoding than latin1")
    return text.encode("latin1")


_NAMES: dict[str, Callable[..., Any]] = {
    "numpy ndarray": _Array,
    "numpy dtype": _Dtype,
    "numpy.core.multiarray _reconstruct": _Array,
    "numpy._core.multiarray _reconstruct": _Array,
    "numpy.core.numeric _frombuffer": _from_buffer,
    "numpy._core.numeric _frombuffer": _from_buffer,
    "_codecs encode": _encode,
}

_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_EMPTY: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "MARK": _Mark,
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple,
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read(raw: bytes, most: int) -> Any:
    """Return the value of a pickle.

    Args:
        raw: The pickle.
        most: The largest number of instructions that it may have.

    Raises:
        Exception: It is damaged, or asks for anything but plain values and arrays. Of many kinds.
    """
    machine = _Machine()
    for count, (code, argument, _) in enumerate(pickletools.genops(raw)):
        if count >= most:
            raise ValueError(f"it has more than {most} instructions")
        if code.name == "STOP":
            return _plain(machine.stack.pop())
        machine.step(code.name, argument)
    raise EOFError("it has no end")


class _Machine:
    """The stack and the memory of a pickle that is being read."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        stack = self.stack
        if name in _VALUES:
            stack.append(bytes(argument) if name == "BYTEARRAY8" else argument)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            items = [_plain(stack.pop()) for _ in range(_TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "GLOBAL":
            stack.append(_named(argument))
        elif name == "STACK_GLOBAL":
            last, module = stack.pop(), stack.pop()
            stack.append(_named(f"{module} {last}"))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            if function not in _NAMES.values():
                raise ValueError("it calls what is no name")
            stack.append(function(*arguments))
        elif name == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], _Array | _Dtype):
                raise ValueError("it gives a state to a plain value")
            stack[-1].build(state)
        elif name not in ("PROTO", "FRAME"):
            self._collect(name)

    def _collect(self, name: str) -> None:
        """Carry out an instruction that adds items to a list or a dict, or makes one of them."""
        stack, single = self.stack, {"APPEND": 1, "SETITEM": 2}.get(name)
        if single:
            items = [_plain(stack.pop()) for _ in range(single)][::-1]
        elif name in ("APPENDS", "SETITEMS", "LIST", "TUPLE", "DICT"):
            items = []
            while not isinstance(top := stack.pop(), _Mark):
                items.append(_plain(top))
            items.reverse()
        else:
            raise ValueError(f"it has the instruction {name}")
        if name == "TUPLE":
            stack.append(tuple(items))
        elif name == "LIST":
            stack.append(items)
        elif name.startswith("APPEND"):
            if not isinstance(stack[-1], list):
                raise ValueError("it appends to what is no list")
            stack[-1].extend(items)
        else:
            if name == "DICT":
                stack.append({})
            keys, values = items[::2], items[1::2]
            if not isinstance(stack[-1], dict) or not all(isinstance(key, str) for key in keys):
                raise ValueError("it has a dict with other keys than texts")
            stack[-1].update(zip(keys, values, strict=True))


def _named(name: str) -> Callable[..., Any]:
    if name not in _NAMES:
        raise ValueError(f"it asks for {name.replace(' ', '.')}")
    return _NAMES[name]


def _plain(value: Any) -> Any:
    """Return an array as numpy has it, and every other value as it is."""
    return value.value if isinstance(value, _Array) else value
