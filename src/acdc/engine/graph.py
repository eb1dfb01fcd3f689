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
from acdc.engine.geometry import ConvGeometry, Size2
from acdc.engine.tracing import Untraceable, changes_in_place, is_opaque, stored_tensor
from acdc.errors import InputError

Kind = Literal["images", "tokens"]
"""How the layout holds a tensor: as ``[N, C, H, W]`` or as ``[..., features]``."""


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
    """A node that the engine can run.

    Args:
        spec: Its operation.
        kind: How the layout holds its result.
        reads: How the layout holds its inputs; None: as the result.

    """

    spec: Spec
    kind: Kind
    reads: Kind | None = None


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
        source = source.args[0] if source.args else None  # `source` may be a view of it


def _check_stored(graph: fx.GraphModule) -> None:
    """Check that nothing else uses a buffer or parameter that a node changes.

    The segments may be executed in another order than their nodes were traced.
    """
    uses: Counter[int] = Counter()  # of each memory
    for node in graph.graph.nodes:
        if (tensor := stored_tensor(graph, node)) is not None:
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
            tensor = stored_tensor(graph, source)
            if tensor is not None and uses[_memory(tensor)] > 1:
                raise Untraceable(
                    f"it changes {str(source.target)!r}, which it also uses elsewhere"
                )


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


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


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
