"""What a forward does besides computing its result, which a traced graph would do only once.

A graph holds the operations on traced values. Everything else happens while the forward is traced,
and never again. ``Attributes`` finds changes of the modules and undoes them. ``Watch`` stops
operations that write into tensors, or read their values, outside of the graph. ``Draws`` sees calls
of generators of random numbers, and ``GradientMode`` the question whether gradients are computed.
"""

from __future__ import annotations

import random
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PLAIN = (bool, int, float, complex, str, bytes)
_PYTHONS = random.random.__self__  # type: ignore[attr-defined]
_READING = {"getstate", "get_state", "initial_seed"}  # of a generator
NOT_OPENED = (Tensor, nn.Module, type, FunctionType, MethodType, ModuleType)
CONTAINERS = (list, dict, set, deque)


class SideEffect(Exception):
    """A forward does something that a graph would not repeat. The message says what."""


# --- attributes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A container whose entries differ from the noted ones.

    Args:
        attribute: The attribute of the module that holds it, or that differs.
        entries: The names of the entries that differ, if the container is a dictionary.
        buffers_of: The module whose buffers differ, if it is the dictionary of its buffers.

    """

    attribute: str
    entries: tuple[Any, ...] = ()
    buffers_of: nn.Module | None = None


@dataclass(frozen=True)
class _Noted:
    container: Any
    entries: Any
    attribute: str | None
    buffers_of: nn.Module | None


class Attributes:
    """The attributes of all modules of a network, as they are when this object is made.

    Lists, dictionaries, sets and deques are noted with their entries. An object that a module holds
    is noted with its attributes, but without those of the objects that it holds in turn.

    Args:
        root: The network.
        values: Also note the values of all tensors but parameters, for ``restore``.

    """

    def __init__(self, root: nn.Module, values: bool = False) -> None:
        self._saves = values
        self._saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._noted: dict[int, _Noted] = {}
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}
        for module in root.modules():
            self._note_container(vars(module), None)
            for name, value in list(vars(module).items()):
                self._note(value, name, objects=True, of=module)

    def _note(self, value: Any, name: str, objects: bool, of: nn.Module | None = None) -> None:
        if isinstance(value, Tensor):
            if (memory := _memory_of(value)) is not None:
                self._memory[id(value)] = value, value.detach()
                if self._saves and not isinstance(value, nn.Parameter):
                    self._saved[memory._cdata] = memory, memory.clone()
        elif isinstance(value, tuple):
            for entry in value:
                self._note(entry, name, objects)
        elif isinstance(value, CONTAINERS):
            if id(value) in self._noted:
                return
            self._note_container(value, name, of if name == "_buffers" else None)
            for entry in list(value.values() if isinstance(value, dict) else value):
                self._note(entry, name, objects)
        elif objects and not isinstance(value, NOT_OPENED):
            attributes = getattr(value, "__dict__", None)
            if type(attributes) is dict:
                self._note(attributes, name, objects=False)

    def _note_container(
        self, container: Any, name: str | None, buffers_of: nn.Module | None = None
    ) -> None:
        self._noted[id(container)] = _Noted(container, _entries(container), name, buffers_of)

    def changes(self) -> Iterator[Change]:
        """Return what differs now."""
        for noted in self._noted.values():
            now = _entries(noted.container)
            if _same(noted.entries, now):
                continue
            names: tuple[Any, ...] = ()
            if isinstance(now, dict):
                names = tuple(
                    name
                    for name in {**noted.entries, **now}
                    if name not in now
                    or name not in noted.entries
                    or not _same(noted.entries[name], now[name])
                )
            attribute = str(names[0]) if noted.attribute is None else noted.attribute
            yield Change(attribute, names, noted.buffers_of)
        if any(_differs(tensor, before) for tensor, before in self._memory.values()):
            yield Change("data")

    def restore(self) -> None:
        """Undo all changes."""
        for noted in self._noted.values():
            if not _same(noted.entries, _entries(noted.container)):
                _fill(noted.container, noted.entries)
        for tensor, before in self._memory.values():
            if _differs(tensor, before):
                tensor.data = before
        for memory, values in self._saved.values():
            memory.copy_(values)


def _entries(container: Any) -> Any:
    """Return the entries of a container, in a new one."""
    return dict(container) if isinstance(container, dict) else list(container)


def _same(a: Any, b: Any) -> bool:
    """Return whether two values are one object, or containers or constants that are equal."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, _PLAIN):
        return bool(a == b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is dict and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)


def _differs(tensor: Tensor, before: Tensor) -> bool:
    """Return whether a tensor was given other memory by an assignment of its ``data``."""
    return tensor.shape != before.shape or tensor.data_ptr() != before.data_ptr()


def _fill(container: Any, entries: Any) -> None:
    """Give a container these entries, and no others."""
    if isinstance(container, list):
        container[:] = entries
    elif isinstance(container, dict):
        for name in container.keys() - entries.keys():
            del container[name]
        for name, value in entries.items():
            if name not in container or container[name] is not value:
                container[name] = value
    else:
        container.clear()
        container.update(entries) if isinstance(container, set) else container.extend(entries)


# --- tensors --------------------------------------------------------------------------------------

_READS = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")


class Draws:
    """Sees whether this thread calls a generator of the process: Python's, or PyTorch's.

    Operations that draw from PyTorch's generator are not calls of it: ``Watch`` sees them.

    Attributes:
        seen: Whether a call was seen that changes a generator.

    """

    def __init__(self) -> None:
        self.seen = False
        self._before: Any = None

    def __enter__(self) -> Draws:
        self._before = sys.getprofile()  # a profiler may be at work
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)

    def _see(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "c_call" and arg.__name__ not in _READING:
            owner = getattr(arg, "__self__", None)
            self.seen = self.seen or owner is _PYTHONS or owner is torch.default_generator
        if self._before is not None:
            self._before(frame, event, arg)


class GradientMode:
    """Sees whether this thread asks ``torch.is_grad_enabled()``, as a forward may that is traced.

    A function that was imported by its own name is not seen.

    Attributes:
        was_read: Whether it was asked.

    """

    def __init__(self) -> None:
        self.was_read = False
        self._plain: Any = None

    def __enter__(self) -> GradientMode:
        self._plain, thread = torch.is_grad_enabled, threading.get_ident()

        def is_grad_enabled() -> bool:
            if threading.get_ident() == thread:
                self.was_read = True
            return torch._C.is_grad_enabled()

        torch.is_grad_enabled = is_grad_enabled
        return self

    def __exit__(self, *_: object) -> None:
        torch.is_grad_enabled = self._plain


class Watch(TorchDispatchMode):
    """Stops operations on tensors that a graph would not hold, before they are executed.

    The tensors that a forward makes itself, of constants alone, are free.

    Attributes:
        reason: What the first of these operations would have done, or None.
        draws: Whether an operation has drawn from the generator of the process.

    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reason: str | None = None
        self.draws = False
        self._own: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Execute an operation, or raise ``SideEffect``."""
        kwargs = kwargs or {}
        foreign = [t for t in _tensors((args, kwargs)) if not self._owns(t)]
        if foreign:
            self._check(func, args, kwargs)
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            self.draws = True
        if not foreign:
            for tensor in _tensors(result):
                if (memory := _memory_of(tensor)) is not None:
                    self._own[memory._cdata] = memory
        return result

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if func._schema.name in _READS:
            self._stop("reads the value of a tensor in Python")
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and not all(map(self._owns, _tensors(value))):
                self._stop("changes a tensor that is no traced value")

    def _stop(self, reason: str) -> None:
        self.reason = self.reason or reason
        raise SideEffect(reason)

    def _owns(self, tensor: Tensor) -> bool:
        memory = _memory_of(tensor)
        return memory is not None and memory._cdata in self._own


def _memory_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """Return the memory of a tensor, or None if it has none of its own, such as a sparse one."""
    try:
        tensor.data_ptr()
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def _tensors(values: Any) -> Iterable[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
