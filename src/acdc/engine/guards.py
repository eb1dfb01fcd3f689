"""Whether a graph still holds: what its forward read while it was traced must not have changed.

A traced graph has the values of attributes in it: a factor, the path that an ``if`` took, the
stride of a convolution. Others may assign these between two calls. The guards of a graph remember
what was read, and compare it before each call.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from acdc.engine.effects import CONTAINERS, NOT_OPENED

LARGE = 1000  # entries of a container; comparing more takes too long
DEPTH = 20  # of containers and objects inside of each other
VARIANTS = 4  # graphs of one kind of calls, each with other values of attributes
CALLS = 20  # with so many calls between two changes, a module is traced again and again

_MISSING = object()
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class Guards:
    """What one graph was traced from, besides its arguments, modes and hooks.

    These are the attributes of modules that the forward read, the parts, the classes and the names
    of the tensors of these modules, the entries of lists, tuples, sets and dictionaries among the
    attributes, and the attributes of other objects among them, up to a depth of 20. Not compared
    are global variables, closures, classes as attributes, and what has more than 1,000 entries.
    Parameters and buffers may be others: a graph reads the present ones.

    Args:
        root: The module whose forward is traced. The engine replaces it on the instance.

    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._parts: list[tuple[dict[str, Any], tuple[Any, ...]]] = []
        self._classes: dict[nn.Module, type] = {}
        self._forwards: dict[type, Any] = {}
        self._usual: list[dict[str, Any]] = []  # of modules with the forward of their class
        self._tensors: list[tuple[dict[str, Any], list[str]]] = []
        self._missing: list[tuple[dict[str, Any], frozenset[str]]] = []
        # What is compared by its value: a function that returns it, the value, and for each
        # attribute in it the name.
        self._values: list[tuple[Callable[[], Any], Any, tuple[str, ...]]] = []
        self._seen: set[int] = set()

    def note(self, module: nn.Module, names: Iterable[str]) -> None:
        """Note these attributes of a module, those that it does not have included.

        An instance of a part may also get another forward than its class has.
        """
        entries, wanted = vars(module), set(names)
        if module not in self._classes:
            self._classes[module] = type(module)
            self._forwards[type(module)] = type(module).forward
            if module is not self._root:
                if "forward" in entries:
                    wanted.add("forward")
                else:
                    self._usual.append(entries)
        if missing := wanted - entries.keys():
            self._missing.append((entries, frozenset(missing)))
        # Tensors are followed by `tracing.follow_tensors`.
        found = [name for name in wanted & entries.keys() if not isinstance(entries[name], Tensor)]
        if found:
            several = (*found, found[0])  # of one attribute, too, the values are a tuple
            get = partial(operator.itemgetter(*several), entries)
            self._values.append((get, get(), several))
        for name in found:
            self._open(entries[name], name)

    def note_parts(self, module: nn.Module) -> None:
        """Note the parts of a module, and which tensors it has."""
        self._parts.append((module._modules, tuple(module._modules.values())))
        for tensors in (module._parameters, module._buffers):
            self._tensors.append((tensors, _there(tensors)))

    def note_all(self, module: nn.Module) -> None:
        """Note all attributes of a module except those that every module has."""
        self.note(module, vars(module).keys() - _OF_EVERY_MODULE)

    def note_condition(self, condition: Callable[[], Any], name: str) -> None:
        """Note what a function returns. It depends on the attribute of this name."""
        self._values.append((condition, condition(), (name,)))

    def _open(self, value: Any, name: str, depth: int = 0) -> None:
        """Note what an attribute holds."""
        if isinstance(value, NOT_OPENED) or id(value) in self._seen or depth > DEPTH:
            return
        self._seen.add(id(value))
        if not isinstance(value, (*CONTAINERS, tuple)):
            value = self._attributes_of(value, name)
        if value is None or len(value) > LARGE:
            return
        if not isinstance(value, tuple):
            self._values.append((partial(_itself, value), value.copy(), (name,)))
        for entry in list(value.values() if isinstance(value, dict) else value):
            self._open(entry, name, depth + 1)

    def _attributes_of(self, value: Any, name: str) -> Any:
        """Return the attributes of an object: a dictionary, the values of slots, or None."""
        try:
            attributes = getattr(value, "__dict__", None)
        except ReferenceError:  # a weak reference to something that is gone
            return None
        if type(attributes) is dict:
            return attributes
        held = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
        slots = [n for names in held for n in ((names,) if isinstance(names, str) else names)]
        if not slots or type(value).__module__.startswith(("torch", "builtins")):
            return None
        get = partial(_slots_of, value, tuple(slots))
        self._values.append((get, get(), (name,)))
        return get()

    def hold(self) -> bool:
        """Return whether nothing has changed. Every forward pass asks this."""
        return next(self._changes(), None) is None

    def difference(self) -> str:
        """Return what has changed, for a sentence."""
        return next(self._changes(), "nothing")

    def _changes(self) -> Iterator[str]:
        for parts, noted in self._parts:
            now = tuple(parts.values())
            if len(now) != len(noted) or not all(map(operator.is_, now, noted)):
                yield "a part of it"
        for module, kind in self._classes.items():
            if type(module) is not kind:
                yield "the class of a part"
        for kind, forward in self._forwards.items():
            if kind.forward is not forward:  # type: ignore[attr-defined]
                yield "the forward of a class"
        for tensors, names in self._tensors:
            if _there(tensors) != names:
                yield "a tensor that is there, or is not,"
        for entries in self._usual:
            if "forward" in entries:
                yield "the attribute 'forward'"
        for entries, missing in self._missing:
            if not entries.keys().isdisjoint(missing):
                yield f"the attribute {min(missing & entries.keys())!r}"
        for get, noted, attributes in self._values:
            try:
                value = get()
                if value == noted and _same_types(value, noted):
                    continue
            except Exception:  # an attribute is gone, or arrays were compared
                value = noted
            yield f"the attribute {_name_of_change(value, noted, attributes)!r}"


def _itself(value: Any) -> Any:
    return value


def _there(tensors: dict[str, Any]) -> list[str]:
    """Return the names of the parameters or buffers that are not None."""
    return [name for name, tensor in tensors.items() if tensor is not None]


def _slots_of(value: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(getattr(value, name, _MISSING) for name in names)


def _same_types(now: Any, noted: Any) -> bool:
    """Return whether equal values have equal types: 1 is no True, and no 1.0."""
    if isinstance(now, dict):
        now, noted = now.values(), noted.values()
    elif not isinstance(now, list | tuple):
        return type(now) is type(noted)
    return all(a is b or type(a) is type(b) for a, b in zip(now, noted, strict=True))


def _name_of_change(now: Any, noted: Any, names: tuple[str, ...]) -> str:
    """Return the name of the first attribute that may differ."""
    if type(noted) is tuple and len(noted) == len(names):
        changed = (n for n, a, b in zip(names, now, noted, strict=True) if a is not b)
        return next(changed, names[0])
    return names[0]


class Reads:
    """Notes which attributes of modules this thread reads inside this context.

    ``torch.fx`` replaces methods of ``nn.Module`` while it traces, and so does this class. Other
    threads read as ever.
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[nn.Module, set[str]]] = {}
        self._before: Any = None

    def __enter__(self) -> None:
        found, thread = self._found, threading.get_ident()
        self._before = vars(nn.Module).get("__getattribute__")  # somebody else may watch, too
        get = self._before or object.__getattribute__

        def read(module: nn.Module, name: str) -> Any:
            if threading.get_ident() == thread:
                found.setdefault(id(module), (module, set()))[1].add(name)
            return get(module, name)

        nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]

    def __exit__(self, *_: object) -> None:
        del nn.Module.__getattribute__
        if self._before is not None:
            nn.Module.__getattribute__ = self._before  # type: ignore[method-assign]

    def note_in(self, guards: Guards) -> None:
        """Note the present values of these attributes."""
        for module, names in self._found.values():
            guards.note_parts(module)
            guards.note(module, (name for name in names if _is_attribute(module, name)))


def _is_attribute(module: nn.Module, name: str) -> bool:
    """Return whether a value may be assigned to this name without an effect on others."""
    if name in _OF_EVERY_MODULE or (name.startswith("__") and name.endswith("__")):
        return False
    if any(name in members for members in (module._modules, module._parameters, module._buffers)):
        return False
    # The class may have a method or a property of this name. Its code reads attributes in turn, and
    # `Reads` sees these reads, too.
    return name in vars(module) or not hasattr(getattr(type(module), name, None), "__get__")


class Variants:
    """The graphs of one kind of calls, each for other values of the attributes.

    Attributes:
        refused: Why there is no further graph, or None.

    """

    def __init__(self) -> None:
        self.refused: str | None = None
        self._known: list[tuple[fx.GraphModule, Guards]] = []
        self._calls = 0  # since the last graph was made

    @property
    def graphs(self) -> list[fx.GraphModule]:
        """All graphs, the oldest first."""
        return [graph for graph, _ in self._known]

    def find(self) -> fx.GraphModule | str | None:
        """Return the graph that holds now, or why there will be none. None: it may be made."""
        self._calls += 1
        for graph, guards in self._known:
            if guards.hold():
                return graph
        return self.refused

    def make_room(self) -> fx.GraphModule | None:
        """Drop the oldest graph if there are too many, and return it.

        A value that changes with every few calls leaves no room. Then ``refused`` says so.
        """
        if len(self._known) < VARIANTS:
            return None
        if self._calls < CALLS:
            self.refused = f"{self._known[-1][1].difference()} changes with every few calls"
            return None
        return self._known.pop(0)[0]

    def add(self, graph: fx.GraphModule, guards: Guards) -> None:
        """Keep a graph."""
        self._known.append((graph, guards))
        self._calls = 0
