"""The operations of a traced graph.

Each node is recognised as an operation of the engine, or gets the reason why it stays with PyTorch.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._pytree import tree_leaves

from acdc.engine.attention import InProjection
from acdc.engine.calls import FunctionCall, LayerCall, NormCall
from acdc.engine.geometry import ConvGeometry, Size2
from acdc.engine.guards import Guards
from acdc.engine.known import activation_of, is_transposed, rms_norm_eps
from acdc.engine.tracing import (
    NEW,
    Untraceable,
    changes_in_place,
    is_opaque,
    memory_of,
    stored_tensor,
)
from acdc.errors import InputError

Kind = Literal["images", "pixels", "tokens"]
"""What the layout holds: images ``[N, C, H, W]``, the same as ``[N, H, W, C]`` in PyTorch, or
tokens ``[..., features]``.
"""


# --- the kinds of nodes ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvSpec:
    """A convolution, or a linear layer over tokens. ``name`` is that of the module."""

    module: nn.Module
    name: str
    geometry: ConvGeometry

    @property
    def weight(self) -> Tensor:
        """The weight, as the module holds it."""
        return cast("Tensor", self.module.weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias, one number for each output channel."""
        return cast("Tensor | None", self.module.bias)

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer."""
        if isinstance(self.module, LayerCall):
            return self.module.is_linear
        return not isinstance(self.module, nn.Conv2d)

    def by_output(self, weight: Tensor) -> Tensor:
        """Return a weight, its mask or its gradient as ``[out, in, ...]``, in the same memory."""
        return weight.t() if is_transposed(self.module) else weight


@dataclass(frozen=True)
class NormSpec:
    """A BatchNorm over images."""

    module: nn.BatchNorm2d | NormCall

    @property
    def owner(self) -> nn.Module:
        """The module that holds the running statistics."""
        return self.module.held[0] if isinstance(self.module, NormCall) else self.module


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
class ConcatSpec:
    """Several tensors one after the other, along a dimension that holds channels."""

    dim: int


@dataclass(frozen=True)
class DropoutSpec:
    """A dropout in training.

    Args:
        of: The module that holds its probability, or the probability.

    """

    of: nn.Dropout | float

    @property
    def p(self) -> float:
        """The probability of a zero, which is between 0 and 1."""
        return self.of.p if isinstance(self.of, nn.Dropout) else self.of


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
class PermuteSpec:
    """Images with the channels last, or pixels with the channels first again.

    The layout holds both in the same way.
    """

    last: bool


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
    | ConcatSpec
    | PoolSpec
    | ActivationSpec
    | DropoutSpec
    | PermuteSpec
    | IdentitySpec
)


@dataclass(frozen=True)
class Recognised:
    """A node that the engine can run.

    Args:
        spec: Its operation.
        kind: How the layout holds its result.
        read_as: How the layout holds its inputs; None: as the result.

    """

    spec: Spec
    kind: Kind
    read_as: Kind | None = None

    @property
    def reads(self) -> Kind:
        """How the layout holds its inputs."""
        return self.read_as or self.kind


def inputs_of(node: fx.Node, spec: Spec) -> tuple[fx.Node, ...]:
    """Return the tensors that a recognised node reads."""
    if isinstance(spec, ConcatSpec):
        return _parts(node)
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
        if changes_in_place(node):
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
        is_same = isinstance(known, Recognised) and isinstance(known.spec, IdentitySpec)
        made_here = isinstance(known, Recognised) and not is_same
        if not made_here and not is_same:
            found[node] = "a tensor that PyTorch made is changed in place"
        made_here |= bool(source.meta.get(NEW))
        source = source.args[0] if source.args else None  # `source` may be a view of it


def _check_stored(graph: fx.GraphModule) -> None:
    """Check that nothing else uses a buffer or parameter that a node changes.

    The segments may be executed in another order than their nodes were traced.
    """
    uses: Counter[int] = Counter()  # of each memory
    for node in graph.graph.nodes:
        if (tensor := stored_tensor(graph, node)) is not None:
            uses[memory_of(tensor)] += len(node.users)
        elif node.op == "call_module":
            module = graph.get_submodule(str(node.target))
            uses.update({memory_of(tensor) for tensor in _tensors_of(module)})
    for node in graph.graph.nodes:
        for source in _changed_by(node):
            while source.args and isinstance(source.args[0], fx.Node):  # it may be a view
                source = source.args[0]
            tensor = stored_tensor(graph, source)
            if tensor is not None and uses[memory_of(tensor)] > 1:
                raise Untraceable(
                    f"it changes {str(source.target)!r}, which it also uses elsewhere"
                )


def _tensors_of(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers that a module of a graph reads or writes."""
    if isinstance(module, FunctionCall):
        return module.tensors()
    module = module.held[0] if isinstance(module, InProjection) else module
    return [*module.parameters(), *module.buffers()]


def _changed_by(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that a node may change in place."""
    if node.op not in ("call_function", "call_method"):
        return []
    changed: list[Any] = []
    if changes_in_place(node):
        changed = [node.args[:1], node.kwargs.get("input"), node.kwargs.get("self")]
    elif getattr(node.target, "__name__", "") in ("batch_norm", "instance_norm"):
        changed = [node.args[1:], node.kwargs]  # the running statistics are among them
    return [value for value in tree_leaves(changed) if isinstance(value, fx.Node)]


def _check_shared_norms(found: dict[fx.Node, Recognised | str]) -> None:
    """Leave a BatchNorm that is used twice to PyTorch: its statistics are updated in order."""
    uses: dict[nn.Module, list[fx.Node]] = {}
    for node, known in found.items():
        if isinstance(known, Recognised) and isinstance(known.spec, NormSpec):
            uses.setdefault(known.spec.owner, []).append(node)
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
        return "the layout holds its inputs in different ways"
    if kind != "images" and isinstance(spec, MulSpec) and len(set(map(shape_of, inputs))) > 1:
        return "a product of tensors of different shapes"
    if isinstance(spec, ConcatSpec) and spec.dim != _channels_of(kind, len(meta.shape)):
        return "it does not join channels"
    if kind == "pixels" and isinstance(spec, DropoutSpec):
        return "a dropout of images with the channels last"
    if kind == "images" and any(len(shape_of(source) or ()) != 4 for source in inputs):
        return "images have four dimensions"
    before = _before(spec) if isinstance(spec, PermuteSpec) else None
    return Recognised(spec, kind, before)


def _channels_of(kind: Kind, dimensions: int) -> int:
    """Return the dimension of the channels."""
    return 1 if kind == "images" else dimensions - 1


def _before(spec: PermuteSpec) -> Kind:
    """Return how the layout holds what is permuted."""
    return "images" if spec.last else "pixels"


def _known_kind(node: fx.Node, found: Mapping[fx.Node, Recognised | str]) -> Kind | None:
    known = found.get(node)
    return known.kind if isinstance(known, Recognised) else None


def _kind(spec: Spec, inputs: list[Kind | None], dimensions: int) -> Kind | None:
    """Return how the layout holds the result: fixed by the operation, or as its inputs."""
    given = {kind for kind in inputs if kind is not None}
    if isinstance(spec, PermuteSpec):
        return ("pixels" if spec.last else "images") if given == {_before(spec)} else None
    over_channels = isinstance(spec, LayerNormSpec) or (
        isinstance(spec, ConvSpec) and spec.is_linear
    )
    if over_channels:
        kind: Kind = "pixels" if given == {"pixels"} else "tokens"
    elif isinstance(spec, ConvSpec | NormSpec | PoolSpec):
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
    if function is torch.permute:
        return _permute(node)
    if function in _CONCATENATIONS:
        return _concat(node)
    if function in (F.dropout, torch.dropout):
        return _dropout(**_arguments(F.dropout, node))
    if function is torch.mean:
        return _mean(node)
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
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
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
    "permute": torch.permute,
    "mean": torch.mean,
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
    if kind in _LAYERS or is_transposed(module):
        return ConvSpec(module, name, geometry_of(module))
    if isinstance(module, LayerCall):
        return ConvSpec(module, module.path, _geometry_of_call(module))
    if isinstance(module, NormCall):
        return _norm_call(module, dtype)
    if isinstance(module, nn.BatchNorm2d) and kind is nn.BatchNorm2d:
        if (module.weight is None) != (module.bias is None):
            raise InputError("a BatchNorm has both weight and bias, or neither")
        if not module.track_running_stats and module.running_mean is not None:
            raise InputError("a BatchNorm that has statistics and leaves them as they are")
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
        return _dropout(module.p, module.training, of=module)  # type: ignore[arg-type]
    if kind is nn.Dropout2d and (module.p == 0 or not module.training):
        return IdentitySpec()
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and kind in (nn.LayerNorm, nn.RMSNorm):
        if len(module.normalized_shape) != 1:
            raise InputError("a normalisation over several dimensions")
        return LayerNormSpec(module, kind is nn.LayerNorm, dtype)
    if (activation := activation_of(module)) is not None:
        return ActivationSpec(activation)
    if dtype == torch.float32 and (eps := rms_norm_eps(module)) is not None:
        return LayerNormSpec(module, False, dtype, eps)
    raise InputError(f"{kind.__name__} is not one of the engine's operations")


def _norm_call(module: NormCall, dtype: torch.dtype) -> Spec:
    if module.function is not F.batch_norm:
        if len(module.settings["normalized_shape"]) != 1:
            raise InputError("a normalisation over several dimensions")
        return LayerNormSpec(module, module.function is F.layer_norm, dtype)
    if (module.weight is None) != (module.bias is None):
        raise InputError("a BatchNorm has both weight and bias, or neither")
    if (module.running_mean is None) != (module.running_var is None):
        raise InputError("a BatchNorm has both running statistics, or neither")
    return NormSpec(module)


def note_settings(guards: Guards, module: nn.Module, spec: Spec) -> None:
    """Note what an operation was made of, except what the kernels read in every step."""
    is_linear = isinstance(spec, ConvSpec) and spec.is_linear
    if isinstance(spec, NormSpec):
        guards.note(module, ("track_running_stats",))
    elif is_linear or isinstance(spec, LayerNormSpec):
        guards.note(module, ())  # its sizes are those of its parameters
    elif type(module) is nn.Dropout:
        guards.note(module, ())
        guards.note_condition(lambda: (module.p == 0, 0 < module.p < 1), "p")
    else:
        guards.note_all(module)


def is_layer(module: nn.Module) -> bool:
    """Return whether a module is a layer of a kind that the kernels compute."""
    return isinstance(module, nn.Conv2d | nn.Linear) or is_transposed(module)


def geometry_of(module: nn.Module) -> ConvGeometry:
    """Return the sizes of a layer.

    Raises:
        InputError: the kernels cannot compute the layer.

    """
    if isinstance(module, nn.Linear):
        return ConvGeometry.linear(module.in_features, module.out_features)
    if is_transposed(module):
        return ConvGeometry.linear(*cast("Tensor", module.weight).shape)
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


def _geometry_of_call(call: LayerCall) -> ConvGeometry:
    weight: Tensor = call.weight
    if call.is_linear:
        return ConvGeometry.linear(weight.shape[1], weight.shape[0])
    groups = call.settings.get("groups", 1)
    sizes = [call.settings.get(name, 1) for name in ("stride", "dilation")]
    like = nn.Conv2d(
        weight.shape[1] * groups, weight.shape[0], (weight.shape[2], weight.shape[3]),
        sizes[0], call.settings.get("padding", 0), sizes[1], groups, device="meta",
    )  # fmt: skip
    return geometry_of(like)


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


def _mean(node: fx.Node) -> Spec:
    """Return the pooling that ``x.mean((2, 3), keepdim=True)`` is."""
    settings = _arguments(torch.mean, node)
    dims, keepdim = settings.pop("dim", None), settings.pop("keepdim", False)
    shape = shape_of(node) or ()
    if len(shape) != 4 or keepdim is not True or settings:
        raise InputError("a mean over other dimensions than those of images, or without them")
    over = dims if isinstance(dims, tuple | list) else (dims,)
    if {d % 4 if isinstance(d, int) else None for d in over} != {2, 3}:
        raise InputError("a mean over other dimensions than height and width")
    return PoolSpec("avg", None)


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


def _dropout(p: float = 0.5, training: bool = True, of: Any = None, **_: Any) -> Spec:
    if p == 0 or not training:
        return IdentitySpec()
    if not 0 < p < 1:
        raise InputError(f"a dropout with p={p}")
    return DropoutSpec(p if of is None else of)


def _permute(node: fx.Node) -> Spec:
    dims: Any = node.args[1:] if len(node.args) > 1 else (node.kwargs.get("dims", ()),)
    if len(dims) == 1 and isinstance(dims[0], tuple | list):
        (dims,) = dims
    order = tuple(d % 4 if isinstance(d, int) else d for d in dims)
    if order not in (TO_LAST, TO_FIRST):
        raise InputError("it moves other dimensions than the channels of images")
    return PermuteSpec(order == TO_LAST)


def _concat(node: fx.Node) -> Spec:
    parts, shape = _parts(node), shape_of(node) or ()
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    if not parts or not all(isinstance(part, fx.Node) and shape_of(part) for part in parts):
        raise InputError("it does not join tensors of a fixed number")
    if not isinstance(dim, int):
        raise InputError("it does not join channels")
    return ConcatSpec(dim % len(shape))


def _parts(node: fx.Node) -> tuple[Any, ...]:
    """Return the tensors that a call of ``torch.cat`` joins."""
    given = node.args[0] if node.args else node.kwargs.get("tensors")
    return tuple(given) if isinstance(given, tuple | list) else ()


def _gelu(approximate: str = "none", **_: Any) -> ActivationSpec:
    return ActivationSpec("gelu_tanh" if approximate == "tanh" else "gelu")


def _arguments(function: Callable[..., Any], node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by name, without the first one."""
    names = list(_PARAMETERS[function])
    return dict(zip(names[1:], node.args[1:], strict=False)) | {
        name: value for name, value in node.kwargs.items() if name != names[0]
    }


_PARAMETERS: dict[Any, tuple[str, ...]] = {
    torch.mean: ("input", "dim", "keepdim"),
    F.gelu: ("input", "approximate"),
    F.dropout: ("input", "p", "training", "inplace"),
}


def _pair(value: Any) -> Size2:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
