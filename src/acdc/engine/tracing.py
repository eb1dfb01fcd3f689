"""A network as a graph, traced with ``torch.fx``."""

from __future__ import annotations

import builtins
import copy
import gc
import inspect
import operator
import random
import re
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import fields, is_dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from acdc.engine.arguments import Arguments, fake
from acdc.engine.attention import AsAWhole, InProjection, parts_of
from acdc.engine.calls import as_modules
from acdc.engine.dropout import replaced
from acdc.engine.effects import Attributes, Change, Draws, GradientMode, SideEffect, Watch
from acdc.engine.guards import Guards, Reads
from acdc.engine.known import is_known
from acdc.engine.locks import Lock


class Untraceable(Exception):
    """The forward of a module cannot be written as one graph. The message gives the reason."""


def hooks_of(module: nn.Module) -> tuple[Mapping[Any, Any], ...]:
    """Return the dictionaries of hooks that calling the module would run."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def is_opaque(module: nn.Module) -> bool:
    """Return whether the module must be called as it is.

    This is so if it has hooks, parametrizations or a forward of its own.
    """
    return any(hooks_of(module)) or is_parametrized(module) or has_other_forward(module)


def has_other_forward(module: nn.Module) -> bool:
    """Return whether the forward of this instance differs from that of its class."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


class _Proxy(fx.Proxy):
    """Tells ``x += y`` from ``x = x + y``: only the first changes ``x`` for its other readers."""

    tracer: _Tracer
    _is_param = _is_buffer = False  # what ``isinstance(x, nn.Parameter)`` reads

    def __len__(self) -> int:
        return len(list(self.tracer.iter(self)))

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _Attribute(self, name)

    @property
    def ndim(self) -> Any:
        """The number of dimensions: a graph holds for arguments with the same numbers."""
        number = self.tracer.dimensions_of(self.node)
        return _Attribute(self, "ndim") if number is None else number

    def dim(self) -> Any:
        """Return the number of dimensions."""
        number = self.tracer.dimensions_of(self.node)
        if number is None:
            return self.tracer.create_proxy("call_method", "dim", (self,), {})
        return number

    ndimension = dim

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer", "tensor"):
            raise SideEffect(f"assigns {name!r} of a tensor")
        super().__setattr__(name, value)


class _Buffer(_Proxy):
    """A buffer, whose values may differ in each step. Its shape, dtype and device are fixed."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self.tensor = tensor

    shape = property(lambda self: self.tensor.shape)
    ndim = property(lambda self: self.tensor.ndim)
    dtype = property(lambda self: self.tensor.dtype)
    device = property(lambda self: self.tensor.device)

    def __len__(self) -> int:
        return len(self.tensor)

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one of its sizes."""
        return self.tensor.shape if dim is None else self.tensor.shape[dim]

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.tensor.ndim

    def numel(self) -> int:
        """Return the number of elements."""
        return self.tensor.numel()


class _Attribute(fx.proxy.Attribute):
    """``x.data`` or ``x.shape``, which is not read before it is used."""

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("root", "attr", "tracer", "_node"):
            raise SideEffect(f"assigns {name!r} of a tensor")
        super().__setattr__(name, value)


@contextmanager
def _attention_is_one_call() -> Iterator[None]:
    """Trace the attention functions of transformers as one call: they ask for sizes."""
    interface = getattr(sys.modules.get("transformers.modeling_utils"), "AttentionInterface", None)
    plain = getattr(interface, "get_interface", None)
    if interface is None or plain is None:
        yield
        return
    interface.get_interface = lambda *args, **kwargs: _as_one_call(plain(*args, **kwargs))
    try:
        yield
    finally:
        interface.get_interface = plain


def _as_one_call(function: Callable[..., Any]) -> Callable[..., Any]:
    drops = replaced(function)

    def call(module: nn.Module, query: Any, *args: Any, **kwargs: Any) -> Any:
        def attention(*args: Any, **kwargs: Any) -> Any:
            called = drops if kwargs.get("dropout", True) else function
            return called(module, *args, **kwargs)

        if not isinstance(query, fx.Proxy):
            return attention(query, *args, **kwargs)
        return query.tracer.create_proxy("call_function", attention, (query, *args), kwargs)

    return call


def _write_in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


_IN_PLACE = {
    f"__{name}__": getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior")
}
for _name, _function in _IN_PLACE.items():
    setattr(_Proxy, _name, _write_in_place(_function))
    setattr(_Attribute, _name, _write_in_place(_function))


_tracing = Lock(rank=1)


@contextmanager
def _proxies_pass_for_tensors() -> Iterator[None]:
    """Make ``isinstance(x, Tensor)`` true in Python code for a traced value, as for a tensor.

    A proxy whose ``__class__`` is ``Tensor`` would pass in C++ code, too. ``torch.pow(x, 3.0)`` or
    ``torch.where(x > 0, x, 0.0)`` would then read its memory as that of a tensor.
    """
    plain, proxies = builtins.isinstance, (_Proxy, _Buffer)

    def is_instance(value: Any, kinds: Any, /) -> bool:
        return plain(value, kinds) or (type(value) in proxies and issubclass(Tensor, kinds))

    builtins.isinstance = is_instance
    try:
        yield
    finally:
        builtins.isinstance = plain


class _Tracer(fx.Tracer):
    """Traces into every module that is neither opaque nor one of PyTorch's own.

    While it is at work, ``torch.fx`` replaces ``nn.Module.__call__`` for all threads. So only one
    thread traces at a time, and the calls of all others are passed through.
    """

    proxy_buffer_attributes = True  # a forward may write them, and others may between two steps

    def __init__(self, root: nn.Module, arguments: Arguments) -> None:
        super().__init__()
        self._known = {m for m in root.modules() if is_known(m)}  # now: nothing watches it yet
        self._thread = threading.get_ident()
        self._modes = _modes()
        self._arguments = arguments
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._tensors: dict[fx.Node, Tensor] = {}  # arguments, parameters and buffers, before
        self._values: dict[fx.Node, Any] = {}
        self._proxies: list[weakref.ref[fx.Proxy]] = []
        self.added: dict[str, nn.Module] = {}  # layers that the network has no module for

    @property
    def keeps(self) -> bool:
        """Whether a traced value still exists: something outside of the graph holds it."""
        return any(proxy() is not None for proxy in self._proxies)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Return a function of the root, with a proxy for each tensor of the arguments."""

        def forward(root: nn.Module) -> Any:
            before = _identities((args, kwargs))
            result = (parts_of(root) or root_fn)(root, *args, **kwargs)
            if _identities((args, kwargs)) != before:
                raise TypeError("it changes a list or a dictionary that it is given")
            return result

        args, kwargs = self._arguments.rebuilt(self._placeholder)
        return forward, [self.root]

    def _placeholder(self, name: str, tensor: Tensor) -> fx.Proxy:
        made = self.create_proxy("placeholder", re.sub(r"\W", "_", name), (), {})
        self._tensors[made.node] = tensor
        return made

    def iter(self, obj: Any) -> Iterator[Any]:
        """Return the parts of a tuple: ``(*x.shape[:-1], heads, -1)`` needs to know how many."""
        value = self._value_of(obj.node)
        if isinstance(value, tuple | list):
            return iter([obj[i] for i in range(len(value))])
        return super().iter(obj)

    def dimensions_of(self, node: fx.Node) -> int | None:
        """Return the number of dimensions of a node's tensor, or None if it cannot be computed."""
        try:
            return int(self._value_of(node).dim())
        except Exception:  # a module with hooks, no tensor, or an operation without a fake form
            return None

    def _value_of(self, node: fx.Node) -> Any:
        """Return what a node computes for the example: a tensor without values, or a number."""
        todo = [node]
        while todo:
            missing = [n for n in todo[-1].all_input_nodes if n not in self._values]
            todo += missing
            if not missing:
                ready = todo.pop()
                self._values[ready] = self._computed(ready)
        return self._values[node]

    def _computed(self, node: fx.Node) -> Any:
        thread, self._thread = self._thread, 0  # calls are passed through, as those of others
        try:
            # Nothing here is an operation of the forward, so nothing watches it.
            with _disable_current_modes(), self._fake, torch.no_grad():
                return self._result(node)
        finally:
            self._thread = thread

    def _result(self, node: fx.Node) -> Any:
        if node.op in ("placeholder", "get_attr"):
            # The forward may have assigned a traced value to this buffer since.
            tensor = self._tensors.get(node)
            constant = operator.attrgetter(str(node.target))  # a tensor that the forward made
            return fake(self._fake, constant(self.root) if tensor is None else tensor)
        args: Any
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._values.__getitem__)
        target: Any = node.target
        if node.op == "call_method":
            target, args = getattr(args[0], str(node.target)), args[1:]
        elif node.op == "call_module":
            target = self.added.get(str(node.target)) or self.root.get_submodule(str(node.target))
            if any(hooks_of(target)):
                raise TypeError("the shape that it reads follows from a module with hooks")
            with FakeCopyMode(self._fake):  # otherwise a BatchNorm would count this call
                target = copy.deepcopy(target)
        return target(*args, **kwargs)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if any(hooks_of(m)) and _captures_outputs():
            raise SideEffect("collects what hooks of its modules see")
        parts = None if is_opaque(m) else parts_of(m)
        if parts is not None:
            try:
                return parts(m, *args, **kwargs)
            except AsAWhole:
                pass
        return super().call_module(m, forward, args, kwargs)

    def path_of_module(self, mod: nn.Module) -> str:
        """Return the name of a module, which may be no module of the network's own."""
        if not isinstance(mod, InProjection):
            return super().path_of_module(mod)
        attention = mod.held[0]
        path = f"{super().path_of_module(attention)}.in_proj".removeprefix(".")
        self.added[path] = mod
        return path

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        if issubclass(type(attr_val), fx.Proxy):  # the forward has assigned it
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        tensor = stored_tensor(self.root, node)
        if tensor is not None:
            self._tensors[node] = tensor
        if tensor is None or isinstance(tensor, nn.Parameter):
            value = _Proxy(node, self)
        else:
            value = _Buffer(node, self, tensor)
        self._proxies.append(weakref.ref(value))
        return value

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise SideEffect("switches gradients or autocast")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, InProjection) or m in self._known:
            return True
        return is_opaque(m) or bool(super().is_leaf_module(m, module_qualified_name))

    def create_arg(self, a: Any) -> Any:
        """Return ``a`` for a node. By itself, fx makes a plain dictionary of every kind of one."""
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, dict | list) and type(a) not in _CONTAINERS:
            return self.create_proxy("call_function", *_constructor(a)).node
        return super().create_arg(a)


_CONTAINERS = (dict, list, immutable_dict, immutable_list)


def _identities(value: Any) -> Any:
    """Return what nested containers hold, for a comparison."""
    if type(value) in (tuple, list):
        return tuple(map(_identities, value))
    if type(value) is dict:
        return tuple((key, _identities(item)) for key, item in value.items())
    return id(value)


def _constructor(value: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return the call that makes this dictionary: a ``ModelOutput``, or an ``OrderedDict``."""
    if is_dataclass(value) and isinstance(value, dict):
        parts = {f.name: getattr(value, f.name) for f in fields(value)}
        given = {name: part for name, part in parts.items() if part is not None}
        if list(given) == list(value) and vars(value).keys() <= parts.keys():
            return type(value), (), given
    if type(value) is OrderedDict:
        return OrderedDict, (list(value.items()),), {}
    raise TypeError(f"it makes a {type(value).__name__}")


def _captures_outputs() -> bool:
    """Return whether a model of ``transformers`` collects outputs of its modules, by their hooks.

    It does for ``output_hidden_states=True``. A traced call runs no hooks, so that nothing would be
    collected.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    return collector is not None and bool(collector.get())


def _modes() -> tuple[bool, bool]:
    # `GradientMode` watches the other name of this function, for what a forward asks.
    return torch._C.is_grad_enabled(), torch.is_autocast_enabled("cpu")


def stored_tensor(root: nn.Module, node: fx.Node) -> Tensor | None:
    """Return the tensor of a module that a node stands for, or None."""
    return _held(root, str(node.target)) if node.op == "get_attr" else None


def _held(root: nn.Module, target: str) -> Tensor | None:
    """Return the parameter, buffer or other tensor of this name, or None if there is none."""
    path, _, name = target.rpartition(".")
    owner = vars(root.get_submodule(path))
    for values in (owner.get("_parameters", {}), owner.get("_buffers", {}), owner):
        if isinstance(values.get(name), Tensor):
            return values[name]  # type: ignore[no-any-return]
    return None


def trace(root: nn.Module, arguments: Arguments, guards: Guards | None = None) -> fx.GraphModule:
    """Return the graph of ``root.forward`` in its present mode, as a function of the tensors.

    The modules are left as they were, whether or not this raises.

    Args:
        root: The module.
        arguments: What it is called with.
        guards: What the forward reads of modules is noted here.

    Raises:
        Untraceable: it depends on the values of tensors, or has a side effect that a graph would
            have only once: it draws random numbers, makes new tensors, counts, or keeps a value.

    """
    reads, mode = None if guards is None else Reads(), GradientMode()
    with _tracing:
        with torch.enable_grad():  # a graph holds with and without gradients
            tracer, graph = _traced(root, arguments, reads, mode)
        if mode.was_read and not torch.is_grad_enabled():
            reads = None if guards is None else Reads()
            tracer, graph = _traced(root, arguments, reads, mode)
        tracer.added |= as_modules(graph, root)
    if reads is not None and guards is not None:
        reads.note_in(guards)
        if mode.was_read:
            guards.note_condition(torch.is_grad_enabled, "torch.is_grad_enabled()")
    held = _with_added(tracer, graph) if tracer.added else tracer.root
    traced = fx.GraphModule(held, graph, type(root).__name__)
    names = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    traced.meta[_TENSORS] = sorted(names)
    return traced


_TENSORS = "tensors"  # the key in ``meta`` of the names of the tensors that a graph reads by itself


def follow_tensors(graph: fx.GraphModule, root: nn.Module) -> bool:
    """Let a graph read the parameters and buffers that its root holds now.

    Others may have been assigned, or take the place of parameters for the time of a call, as
    ``torch.func.functional_call`` has it. Return False if the graph does not hold for one of them.
    """
    for name in graph.meta[_TENSORS]:
        before, now = _held(graph, name), _held(root, name)
        if before is now:
            continue
        if before is None or now is None or before.shape != now.shape or before.dtype != now.dtype:
            return False
        path, _, last = name.rpartition(".")
        owner = graph.get_submodule(path)
        for values in (owner._parameters, owner._buffers, vars(owner)):
            values.pop(last, None)
        if isinstance(now, nn.Parameter):
            owner._parameters[last] = now
        else:  # what takes the place of a parameter need not be one
            vars(owner)[last] = now
    return True


def _with_added(tracer: _Tracer, graph: fx.Graph) -> nn.Module:
    """Return a module that holds every module, parameter and buffer that a graph names."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    named: dict[str, Any] = dict(tracer.added)
    for target in called - named.keys():
        named[target] = tracer.root.get_submodule(target)
    for node in graph.nodes:
        target = str(node.target)
        # A module that is called holds its tensors, in the way that the network chose.
        if node.op == "get_attr" and not any(target.startswith(f"{path}.") for path in called):
            named[target] = operator.attrgetter(target)(tracer.root)
    holder = nn.Module()
    holder.training = tracer.root.training
    for target in sorted(named, key=lambda target: target.count(".")):
        *path, name = target.split(".")
        owner = holder
        for part in path:
            if not hasattr(owner, part):
                setattr(owner, part, nn.Module())
            owner = getattr(owner, part)
        setattr(owner, name, named[target])
    return holder


def _traced(
    root: nn.Module, arguments: Arguments, reads: Reads | None, mode: GradientMode
) -> tuple[_Tracer, fx.Graph]:
    """Trace without an effect that lasts. Other threads may draw random numbers meanwhile.

    The generators are the process's own. If they change, a second trace sees whether it was this
    thread that drew from them: that costs time, because all calls of this thread are seen.
    """
    title = f"{type(root).__name__}.forward"
    first = _random_state()
    for draws in (None, Draws()):
        attributes, numbers = Attributes(root), _random_state()
        tracer, watch = _Tracer(root, arguments), Watch()
        try:
            with (
                _proxies_pass_for_tensors(),
                _attention_is_one_call(),
                watch,
                draws or nullcontext(),
                reads or nullcontext(),
                mode,
            ):
                graph = tracer.trace(root)
            why = watch.reason or _why_wrong(root, graph, list(attributes.changes()))
        except SideEffect as error:
            why = str(error)
        except Exception as error:  # fx raises whatever the user's code raises on a proxy
            _set_random_state(numbers)
            raise Untraceable(f"{title} is no fixed graph ({first_line(error)})") from error
        finally:
            attributes.restore()
        if why is None and tracer.keeps:
            gc.collect()  # fx leaves circles
            why = "keeps a traced value outside of its modules" if tracer.keeps else None
        if why is not None:
            _set_random_state(numbers)
            raise Untraceable(f"{title} {why}")
        if draws is None and numbers == _random_state():
            return tracer, graph
        if draws is not None and not (draws.seen or watch.draws):
            return tracer, graph
    _set_random_state(first)
    raise Untraceable(f"{title} draws random numbers or counts in Python as it runs")


def _why_wrong(root: nn.Module, graph: fx.Graph, changes: list[Change]) -> str | None:
    """Return why a graph does less than its forward, or None."""
    if any(
        node.op == "get_attr" and "_tensor_constant" in str(node.target) for node in graph.nodes
    ):
        return "makes tensors of its own"
    for change in changes:
        module = change.buffers_of
        if module is None or not all(_writes(root, module, name) for name in change.entries):
            return f"changes {change.attribute!r}"
    return None


def _writes(root: nn.Module, module: nn.Module, name: str) -> bool:
    """Return whether ``self.name += 1`` assigned a buffer, which the graph then does as well."""
    value = vars(module)["_buffers"].get(name)
    if not issubclass(type(value), fx.Proxy):
        return False
    node = value.node
    while node.op in ("call_function", "call_method") and changes_in_place(node):
        node = node.args[0]
    path, _, last = str(node.target).rpartition(".")
    return node.op == "get_attr" and last == name and root.get_submodule(path) is module


def _random_state() -> tuple[Any, bytes]:
    return random.getstate(), torch.random.get_rng_state().numpy().tobytes()


def _set_random_state(state: tuple[Any, bytes]) -> None:
    if state != _random_state():
        random.setstate(state[0])
        torch.random.set_rng_state(torch.frombuffer(bytearray(state[1]), dtype=torch.uint8))


NEW = "new"
"""The key in the ``meta`` of a node: its result shares no memory with its arguments."""


class _Shapes(ShapeProp):
    """Notes shapes, and which results are new memory."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        given = _memories(self.fetch_args_kwargs_from_env(n))
        made = _memories(result)
        n.meta[NEW] = n.op.startswith("call_") and not made & given
        return result


def _memories(values: Any) -> set[int]:
    return {memory_of(value) for value in tree_leaves(values) if isinstance(value, Tensor)}


def memory_of(tensor: Tensor) -> int:
    """Return a number that tensors have in common if and only if they share memory."""
    return int(tensor.untyped_storage()._cdata)


def propagate(graph: fx.GraphModule, args: tuple[Any, ...]) -> None:
    """Note the shape and dtype of every tensor in the graph's nodes, without computing anything.

    Note, too, which results are new memory (``NEW``).

    Raises:
        Untraceable: the shapes depend on the values of tensors.

    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [fake(mode, a) if isinstance(a, Tensor) else a for a in args]
    try:
        # ShapeProp prints its errors. The lock: stderr is redirected for all threads.
        with _tracing, mode, redirect_stderr(StringIO()):
            shapes = _Shapes(graph, fake_mode=mode)
            for module in shapes.fake_module.modules():  # a copy whose tensors have no values
                module.training = False  # a BatchNorm in training may read values
                for hooks in hooks_of(module):
                    hooks.clear()  # type: ignore[attr-defined]
            shapes.propagate(*inputs)
    except Exception as error:
        cause = error.__cause__ or error
        raise Untraceable(f"its shapes are not fixed ({first_line(cause)})") from error


def changes_in_place(node: fx.Node) -> bool:
    """Return whether a node writes into a tensor that it is given.

    Raises:
        Untraceable: it writes into a tensor that it is given for its result.

    """
    if node.op == "call_module":
        root = node.graph.owning_module
        assert root is not None
        module = root.get_submodule(str(node.target))
        return bool(getattr(module, "inplace", False))
    if "out" in node.kwargs:
        raise Untraceable("an operation writes into a given tensor")
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    assert callable(node.target)
    name = getattr(node.target, "__name__", "")
    if node.target in _IN_PLACE.values() or (name.endswith("_") and not name.endswith("__")):
        return True
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):  # built in, without a signature
        given = dict(node.kwargs)
    return bool(given.get("inplace", False))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's name."""
    return (str(error) or type(error).__name__).strip().split("\n")[0]
