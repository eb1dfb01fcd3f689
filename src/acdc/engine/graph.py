"""A network as a graph, traced with ``torch.fx``.

Each node is recognised as an operation of the engine, or gets the reason why it stays with PyTorch.
"""

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
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, fields, is_dataclass
from io import StringIO
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from acdc.engine.arguments import Arguments
from acdc.engine.attention import AsAWhole, InProjection, parts_of
from acdc.engine.effects import Attributes, Change, SideEffect, Watch
from acdc.engine.geometry import ConvGeometry, Size2
from acdc.engine.locks import Lock
from acdc.errors import InputError

ATTEMPTS = 8  # to trace a module, if random numbers are drawn meanwhile

Kind = Literal["images", "tokens"]
"""How the layout holds a tensor: as ``[N, C, H, W]`` or as ``[..., features]``."""


class Untraceable(Exception):
    """The forward of a module cannot be written as one graph. The message gives the reason."""


# --- tracing --------------------------------------------------------------------------------------


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

    _is_param = _is_buffer = False  # what ``isinstance(x, nn.Parameter)`` reads

    def __len__(self) -> int:
        return len(list(self.tracer.iter(self)))

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _Attribute(self, name)

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
    def call(module: nn.Module, query: Any, *args: Any, **kwargs: Any) -> Any:
        def attention(*args: Any, **kwargs: Any) -> Any:
            return function(module, *args, **kwargs)

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

    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
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
            return self._fake.from_tensor(constant(self.root) if tensor is None else tensor)
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
        tensor = _stored(self.root, node)
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
        if isinstance(m, InProjection):
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


def _modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


def _stored(root: nn.Module, node: fx.Node) -> Tensor | None:
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


def trace(root: nn.Module, arguments: Arguments) -> fx.GraphModule:
    """Return the graph of ``root.forward`` in its present mode, as a function of the tensors.

    The modules are left as they were, whether or not this raises.

    Raises:
        Untraceable: it depends on the values of tensors, or has a side effect that a graph would
            have only once: it draws random numbers, makes new tensors, counts, or keeps a value.

    """
    with _tracing, torch.enable_grad():
        tracer, graph = _traced(root, arguments)
    held = _with_added(tracer, graph) if tracer.added else tracer.root
    traced = fx.GraphModule(held, graph, type(root).__name__)
    names = (str(node.target) for node in graph.nodes if node.op == "get_attr")
    traced.meta[_BUFFERS] = [n for n in names if not isinstance(_held(root, n), nn.Parameter)]
    return traced


_BUFFERS = "buffers"  # the key in ``meta`` of the names of the buffers that a graph reads


def follow_buffers(graph: fx.GraphModule, root: nn.Module) -> bool:
    """Let a graph read the buffers that its root holds now: another may have been assigned.

    Return False if the graph does not hold for one of them.
    """
    for name in graph.meta[_BUFFERS]:
        before, now = _held(graph, name), _held(root, name)
        if before is now:
            continue
        if before is None or now is None or before.shape != now.shape or before.dtype != now.dtype:
            return False
        path, _, last = name.rpartition(".")
        setattr(graph.get_submodule(path), last, now)
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


def _traced(root: nn.Module, arguments: Arguments) -> tuple[_Tracer, fx.Graph]:
    """Trace without an effect that lasts. Another thread may draw random numbers meanwhile."""
    title = f"{type(root).__name__}.forward"
    first = _random_state()
    for _ in range(ATTEMPTS):
        attributes, numbers = Attributes(root), _random_state()
        tracer, watch = _Tracer(arguments), Watch()
        try:
            with _proxies_pass_for_tensors(), _attention_is_one_call(), watch:
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
        if numbers == _random_state():
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
    while node.op in ("call_function", "call_method") and _in_place(node):
        node = node.args[0]
    path, _, last = str(node.target).rpartition(".")
    return node.op == "get_attr" and last == name and root.get_submodule(path) is module


def _random_state() -> tuple[Any, bytes]:
    return random.getstate(), torch.random.get_rng_state().numpy().tobytes()


def _set_random_state(state: tuple[Any, bytes]) -> None:
    if state != _random_state():
        random.setstate(state[0])
        torch.random.set_rng_state(torch.frombuffer(bytearray(state[1]), dtype=torch.uint8))


def propagate(graph: fx.GraphModule, args: tuple[Any, ...]) -> None:
    """Note the shape and dtype of every tensor in the graph's nodes, without computing anything.

    Raises:
        Untraceable: the shapes depend on the values of tensors.

    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
    try:
        # ShapeProp prints its errors. The lock: stderr is redirected for all threads.
        with _tracing, mode, redirect_stderr(StringIO()):
            shapes = ShapeProp(graph, fake_mode=mode)
            for module in shapes.fake_module.modules():  # a copy whose tensors have no values
                module.training = False  # a BatchNorm in training may read values
                for hooks in hooks_of(module):
                    hooks.clear()  # type: ignore[attr-defined]
            shapes.propagate(*fake)
    except Exception as error:
        cause = error.__cause__ or error
        raise Untraceable(f"its shapes are not fixed ({first_line(cause)})") from error


# --- the kinds of nodes ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvSpec:
    """A convolution, or a linear layer over tokens. ``name`` is that of the module."""

    module: nn.Conv2d | nn.Linear
    name: str
    geometry: ConvGeometry


@dataclass(frozen=True)
class NormSpec:
    """A BatchNorm over images."""

    module: nn.BatchNorm2d


@dataclass(frozen=True)
class ReluSpec:
    """A ReLU."""


@dataclass(frozen=True)
class AddSpec:
    """A sum of two tensors of one shape."""


@dataclass(frozen=True)
class LayerNormSpec:
    """A LayerNorm, or an RMSNorm, over the last dimension of tokens.

    Args:
        module: It holds ``weight`` and, if it is a LayerNorm, ``bias``.
        centered: A LayerNorm.
        dtype: Of its input.
        eps_name: The name of what is added to the variance.

    """

    module: nn.Module
    centered: bool
    dtype: torch.dtype
    eps_name: str = "eps"

    @property
    def weight(self) -> Tensor | None:
        """The factor of each channel."""
        return cast("Tensor | None", self.module.weight)

    @property
    def bias(self) -> Tensor | None:
        """The offset of each channel."""
        return cast("Tensor | None", self.module.bias) if self.centered else None

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        eps = getattr(self.module, self.eps_name)
        return torch.finfo(self.dtype).eps if eps is None else float(eps)


@dataclass(frozen=True)
class MulSpec:
    """A product of two tensors of one shape, or of images and one number for each channel."""


@dataclass(frozen=True)
class DropoutSpec:
    """A dropout with this probability, in training."""

    p: float


@dataclass(frozen=True)
class PoolSpec:
    """Max or average pooling. If ``window`` is None, it is the whole image."""

    kind: Literal["max", "avg"]
    window: Size2 | None
    stride: Size2 = (1, 1)
    padding: Size2 = (0, 0)
    count_padding: bool = True


Activation = Literal["gelu", "gelu_tanh", "silu", "sigmoid", "relu6", "hardsigmoid", "hardswish"]


@dataclass(frozen=True)
class ActivationSpec:
    """A GELU, SiLU or the like, by the name of its kernel."""

    kernel: Activation


@dataclass(frozen=True)
class IdentitySpec:
    """An identity, or a dropout that drops nothing."""


Spec = (
    ConvSpec
    | NormSpec
    | LayerNormSpec
    | ReluSpec
    | AddSpec
    | MulSpec
    | PoolSpec
    | ActivationSpec
    | DropoutSpec
    | IdentitySpec
)


@dataclass(frozen=True)
class Recognised:
    """A node that the engine can run: its operation, and how the layout holds its result."""

    spec: Spec
    kind: Kind


def inputs_of(node: fx.Node, spec: Spec) -> tuple[fx.Node, ...]:
    """Return the tensors that a recognised node reads."""
    return node.args[: 2 if isinstance(spec, AddSpec | MulSpec) else 1]  # type: ignore[return-value]


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape of a node's result, or None if that is not one tensor."""
    meta = meta_of(node)
    return None if meta is None else tuple(meta.shape)


def meta_of(node: fx.Node) -> TensorMetadata | None:
    """Return shape and dtype of a node's result, or None if that is not one tensor."""
    meta = node.meta.get("tensor_meta")
    return meta if isinstance(meta, TensorMetadata) else None


def recognise(graph: fx.GraphModule) -> dict[fx.Node, Recognised | str]:
    """Return what each computing node is recognised as, or why it stays with PyTorch.

    Raises:
        Untraceable: the result depends on the order of operations, which a graph does not hold.

    """
    found: dict[fx.Node, Recognised | str] = {}
    for node in graph.graph.nodes:
        if node.op in ("call_module", "call_function", "call_method"):
            found[node] = _recognise(graph, node, found)
    for node in found:
        if _in_place(node):
            _check_in_place(node, found)
    _check_stored(graph)
    _check_shared_norms(found)
    return found


def _check_in_place(node: fx.Node, found: dict[fx.Node, Recognised | str]) -> None:
    """Check that no other node reads a tensor that this node changes in place.

    The kernels write to a new tensor instead. The result is the same if the kernels also made the
    tensor, and if no other node reads it or a view of it.
    """
    source = node.args[0] if node.args else node.kwargs.get("input")
    made_here = False
    while isinstance(source, fx.Node) and not made_here:
        if len(source.users) > 1:
            raise Untraceable("a tensor with other readers is changed in place")
        known = found.get(source)
        made_here = isinstance(known, Recognised) and not isinstance(known.spec, IdentitySpec)
        if not made_here:
            found[node] = "a tensor that PyTorch made is changed in place"
        source = source.args[0] if source.args else None  # `source` may be a view of it


def _check_stored(graph: fx.GraphModule) -> None:
    """Check that nothing else uses a buffer or parameter that a node changes.

    The segments may be executed in another order than their nodes were traced.
    """
    uses: Counter[int] = Counter()  # of each memory
    for node in graph.graph.nodes:
        if (tensor := _stored(graph, node)) is not None:
            uses[_memory(tensor)] += len(node.users)
        elif node.op == "call_module":
            module = graph.get_submodule(str(node.target))
            module = module.held[0] if isinstance(module, InProjection) else module
            memories = {_memory(t) for t in (*module.parameters(), *module.buffers())}
            uses.update(memories)
    for node in graph.graph.nodes:
        for source in _changed_by(node):
            while source.args and isinstance(source.args[0], fx.Node):  # it may be a view
                source = source.args[0]
            tensor = _stored(graph, source)
            if tensor is not None and uses[_memory(tensor)] > 1:
                raise Untraceable(
                    f"it changes {str(source.target)!r}, which it also uses elsewhere"
                )


def _changed_by(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that a node may change in place."""
    if node.op not in ("call_function", "call_method"):
        return []
    changed: list[Any] = []
    if _in_place(node):
        changed = [node.args[:1], node.kwargs.get("input"), node.kwargs.get("self")]
    elif getattr(node.target, "__name__", "") in ("batch_norm", "instance_norm"):
        changed = [node.args[1:], node.kwargs]  # the running statistics are among them
    return [value for value in tree_leaves(changed) if isinstance(value, fx.Node)]


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _in_place(node: fx.Node) -> bool:
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


def _check_shared_norms(found: dict[fx.Node, Recognised | str]) -> None:
    """Leave a BatchNorm that is used twice to PyTorch: its statistics are updated in order."""
    uses: dict[nn.Module, list[fx.Node]] = {}
    for node, known in found.items():
        if isinstance(known, Recognised) and isinstance(known.spec, NormSpec):
            uses.setdefault(known.spec.module, []).append(node)
    for nodes in uses.values():
        if len(nodes) > 1:
            found.update(dict.fromkeys(nodes, "a BatchNorm that is used more than once"))


def _recognise(
    graph: fx.GraphModule, node: fx.Node, found: Mapping[fx.Node, Recognised | str]
) -> Recognised | str:
    meta = meta_of(node)
    if meta is None:
        return "its result is not one tensor"
    if meta.dtype not in (torch.float32, torch.float64):
        return f"its result is {meta.dtype}; the kernels take float32 and float64"
    try:
        spec = _spec(graph, node)
    except InputError as error:
        return str(error)
    inputs = inputs_of(node, spec)
    if not inputs or any(
        not isinstance(source, fx.Node) or shape_of(source) is None for source in inputs
    ):
        return "an input is not a tensor"
    if any(source.meta["tensor_meta"].dtype != meta.dtype for source in inputs):
        return "its inputs have several dtypes"
    kind = _kind(spec, [_known_kind(source, found) for source in inputs], len(meta.shape))
    if kind is None:
        return "its inputs are images and tokens, which the layout holds differently"
    if kind == "tokens" and isinstance(spec, MulSpec) and len(set(map(shape_of, inputs))) > 1:
        return "a product of tensors of different shapes"
    if kind == "images" and any(len(shape_of(source) or ()) != 4 for source in inputs):
        return "images have four dimensions"
    return Recognised(spec, kind)


def _known_kind(node: fx.Node, found: Mapping[fx.Node, Recognised | str]) -> Kind | None:
    known = found.get(node)
    return known.kind if isinstance(known, Recognised) else None


def _kind(spec: Spec, inputs: list[Kind | None], dimensions: int) -> Kind | None:
    """Return how the layout holds the result: fixed by the operation, or as its inputs."""
    given = {kind for kind in inputs if kind is not None}
    if isinstance(spec, ConvSpec):
        kind: Kind = "tokens" if isinstance(spec.module, nn.Linear) else "images"
    elif isinstance(spec, LayerNormSpec):
        kind = "tokens"
    elif isinstance(spec, NormSpec | PoolSpec):
        kind = "images"
    elif len(given) == 1:
        return given.pop()
    else:
        kind = "images" if dimensions == 4 else "tokens"
    return kind if given <= {kind} else None


# --- from modules and functions to specs ----------------------------------------------------------


def _spec(graph: fx.GraphModule, node: fx.Node) -> Spec:
    if node.op == "call_module":
        target, dtype = str(node.target), node.meta["tensor_meta"].dtype
        return _module_spec(graph.get_submodule(target), target, dtype)
    function = _METHODS.get(str(node.target)) if node.op == "call_method" else node.target
    if function in _RELUS:
        return ReluSpec()
    if function in _SUMS:
        return _sum(node)
    if function in _PRODUCTS:
        return _product(node)
    if function in (F.dropout, torch.dropout):
        return _dropout(**_arguments(F.dropout, node))
    if function in _POOLS:
        return _pool(_POOLS[function](*node.args[1:], **node.kwargs))
    if function in _ACTIVATIONS:
        return ActivationSpec(_ACTIVATIONS[function])
    if function is F.gelu:
        return _gelu(**_arguments(F.gelu, node))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
    raise InputError(f"{name} is not one of the engine's operations")


_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
_SUMS = (operator.add, operator.iadd, torch.add)
_LAYERS = (nn.Conv2d, nn.Linear, InProjection, NonDynamicallyQuantizableLinear)
_PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply)
_ACTIVATIONS: dict[Any, Activation] = {
    F.silu: "silu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    F.relu6: "relu6",
    F.hardsigmoid: "hardsigmoid",
    F.hardswish: "hardswish",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.ReLU6: "relu6",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Hardswish: "hardswish",
}
_METHODS: dict[str, Any] = {
    "mul": torch.mul,
    "mul_": torch.mul,
    "__mul__": operator.mul,
    "__imul__": operator.imul,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "relu_": torch.relu_,
    "add": torch.add,
    "add_": torch.add,
    "__add__": operator.add,
    "__iadd__": operator.iadd,
}
_POOLS: dict[Any, Callable[..., nn.Module]] = {
    F.max_pool2d: nn.MaxPool2d,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
}


def _module_spec(module: nn.Module, name: str, dtype: torch.dtype) -> Spec:
    if is_opaque(module):
        raise InputError("it has hooks, a parametrization or a forward of its own")
    kind = type(module)
    if kind in _LAYERS:
        return ConvSpec(module, name, geometry_of(module))  # type: ignore[arg-type]
    if isinstance(module, nn.BatchNorm2d) and kind is nn.BatchNorm2d:
        if (module.weight is None) != (module.bias is None):
            raise InputError("a BatchNorm has both weight and bias, or neither")
        return NormSpec(module)
    if kind is nn.ReLU:
        return ReluSpec()
    if kind in _POOLS.values():
        return _pool(module)
    if isinstance(module, nn.GELU):
        return _gelu(module.approximate)
    if kind in _ACTIVATIONS:
        return ActivationSpec(_ACTIVATIONS[kind])
    if kind is nn.Identity:
        return IdentitySpec()
    if kind is nn.Dropout:
        return _dropout(module.p, module.training)  # type: ignore[arg-type]
    if kind is nn.Dropout2d and (module.p == 0 or not module.training):
        return IdentitySpec()
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and kind in (nn.LayerNorm, nn.RMSNorm):
        if len(module.normalized_shape) != 1:
            raise InputError("a normalisation over several dimensions")
        return LayerNormSpec(module, kind is nn.LayerNorm, dtype)
    raise InputError(f"{kind.__name__} is not one of the engine's operations")


def geometry_of(module: nn.Module) -> ConvGeometry:
    """Return the sizes of a layer.

    Raises:
        InputError: the kernels cannot compute the layer.

    """
    if isinstance(module, nn.Linear):
        return ConvGeometry.linear(module.in_features, module.out_features)
    assert isinstance(module, nn.Conv2d)
    if module.padding_mode != "zeros":
        raise InputError(f"its padding is {module.padding_mode!r}, and the kernels pad with zeros")
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if module.padding == "same":
        if any(r % 2 for r in reach):
            raise InputError("its padding differs between two sides")
        padding = (reach[0] // 2, reach[1] // 2)
    elif module.padding == "valid":
        padding = (0, 0)
    else:
        padding = _pair(module.padding)
    return ConvGeometry(
        module.in_channels,
        module.out_channels,
        _pair(module.kernel_size),
        _pair(module.stride),
        padding,
        _pair(module.dilation),
        module.groups,
    )


def _pool(module: nn.Module) -> PoolSpec:
    if isinstance(module, nn.AdaptiveAvgPool2d):
        if module.output_size not in (1, (1, 1)):
            raise InputError("adaptive pooling is to one pixel")
        return PoolSpec("avg", None)
    assert isinstance(module, nn.MaxPool2d | nn.AvgPool2d)
    if module.ceil_mode:
        raise InputError("pooling with ceil_mode")
    window, padding = _pair(module.kernel_size), _pair(module.padding)
    stride = window if module.stride is None else _pair(module.stride)
    if isinstance(module, nn.AvgPool2d):
        if module.divisor_override is not None:
            raise InputError("pooling with divisor_override")
        return PoolSpec("avg", window, stride, padding, bool(module.count_include_pad))
    if _pair(module.dilation) != (1, 1) or module.return_indices:
        raise InputError("max pooling with dilation or indices")
    return PoolSpec("max", window, stride, padding)


def _sum(node: fx.Node) -> Spec:
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        raise InputError("a sum with a factor")
    shapes = [shape_of(a) if isinstance(a, fx.Node) else None for a in node.args]
    if shapes[0] is None or shapes[0] != shapes[1]:
        raise InputError("a sum of tensors of different shapes")
    return AddSpec()


def _product(node: fx.Node) -> Spec:
    shapes = [shape_of(a) if isinstance(a, fx.Node) else None for a in node.args]
    if len(shapes) != 2 or shapes[0] is None or shapes[1] is None:
        raise InputError("a product with a number")
    if shapes[0] == shapes[1]:
        return MulSpec()
    images = len(shapes[0]) == len(shapes[1]) == 4 and shapes[0][:2] == shapes[1][:2]
    if images and (1, 1) in (shapes[0][2:], shapes[1][2:]):
        return MulSpec()
    raise InputError("a product of tensors of different shapes")


def _dropout(p: float = 0.5, training: bool = True, **_: Any) -> Spec:
    if p == 0 or not training:
        return IdentitySpec()
    if not 0 < p < 1:
        raise InputError(f"a dropout with p={p}")
    return DropoutSpec(p)


def _gelu(approximate: str = "none", **_: Any) -> ActivationSpec:
    return ActivationSpec("gelu_tanh" if approximate == "tanh" else "gelu")


def _arguments(function: Callable[..., Any], node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by name, without the first one."""
    names = list(_PARAMETERS[function])
    return dict(zip(names[1:], node.args[1:], strict=False)) | {
        name: value for name, value in node.kwargs.items() if name != names[0]
    }


_PARAMETERS = {
    F.gelu: ("input", "approximate"),
    F.dropout: ("input", "p", "training", "inplace"),
}


def _pair(value: Any) -> Size2:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's name."""
    return (str(error) or type(error).__name__).strip().split("\n")[0]
