"""How the operations of an exported graph become operations of a program."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from acdc.engine.geometry import ConvGeometry, Size2
from acdc.runtime.exported import module_of, shape_of
from acdc.runtime.program import (
    Attention,
    Conv,
    Embed,
    Gate,
    Join,
    Kept,
    Map,
    Norm,
    Part,
    Pool,
    Value,
)
from acdc.runtime.reading import TRIED, Handler, Known, Mask, Reader, constant
from acdc.runtime.views import BATCH, SAMPLES, Unknown, View, axes_of, channels, points

HANDLERS: dict[str, Handler] = {}
"""Name of an operation -> the function that reads a node of it."""


def handles(*targets: str) -> Callable[[Handler], Handler]:
    """Enter a function that reads nodes of these operations."""

    def enter(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(targets, handler))
        return handler

    return enter


# --- views ----------------------------------------------------------------------------------------


@handles(
    "aten.contiguous.default", "aten.clone.default", "aten.alias.default", "aten.detach.default",
    "aten.detach_.default", "aten.lift_fresh_copy.default", "aten.dropout.default",
    "aten.dropout_.default", "aten.feature_dropout.default",
)  # fmt: skip
def _same(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if "dropout" in str(node.target) and constant(args[1]) and constant(args[2]):
        raise Unknown("a dropout that drops")
    return args[0]


@handles("aten.to.dtype", "aten.to.device", "aten.to.dtype_layout", "aten._to_copy.default")
def _cast(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    x, dtype = args[0], node.meta["val"].dtype
    if isinstance(x, View) and reader.value(x).integers:
        return Mask(x) if dtype == torch.bool else x
    wanted = torch.bool if isinstance(x, Mask) else reader.program.dtype
    if dtype != wanted:
        raise Unknown(f"a change to {dtype}")
    return x


@handles(
    "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default",
    "aten.flatten.using_ints", "aten.unflatten.int",
)  # fmt: skip
def _reshape(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return _view(args[0]).reshape(shape_of(node))


@handles("aten.transpose.int")
def _transpose(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    view, a, b = _view(args[0]), constant(args[1]), constant(args[2])
    order = list(range(len(view.dims)))
    order[a], order[b] = order[b], order[a]
    return view.permute(order)


@handles("aten.permute.default")
def _permute(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return _view(args[0]).permute(constant(args[1]))


@handles("aten.unsqueeze.default")
def _unsqueeze(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if isinstance(args[0], Mask):
        return replace(args[0], keys=_only_keys(args[0]).unsqueeze(constant(args[1])))
    return _view(args[0]).unsqueeze(constant(args[1]))


@handles("aten.squeeze.dim", "aten.squeeze.dims")
def _squeeze(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    view, dims = _view(args[0]), constant(args[1])
    dims = sorted(d % len(view.dims) for d in ([dims] if isinstance(dims, int) else dims))
    for dim in reversed(dims):
        if not view.dims[dim]:
            view = view.without(dim)
    return view


@handles("aten.expand.default")
def _expand(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if isinstance(args[0], Mask):  # its dimensions are compared with those of the attention
        return args[0]
    view = _view(args[0])
    if shape_of(node) != view.shape:
        raise Unknown("an expansion")
    return view


@handles("aten.select.int")
def _select(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    view, dim, index = _view(args[0]), constant(args[1]), constant(args[2])
    return view.select(dim, index % view.shape[dim])


@handles("aten.slice.Tensor")
def _slice(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if isinstance(args[0], Mask):
        if shape_of(node) != shape_of(node.args[0]):  # type: ignore[arg-type]
            raise Unknown("a slice of a mask")
        return args[0]
    dim, start, end, step = _settings(args[1:], [0, None, None, 1])
    view = _view(args[0])
    size = view.shape[dim]
    if step != 1:
        raise Unknown("a slice with a step")
    if size == BATCH:
        if start not in (0, None) or shape_of(node) != view.shape:
            raise Unknown("a slice of samples")
        return view
    first, last, _ = slice(start, end).indices(size)
    return view.narrow(dim, first, last - first)


@handles("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")
def _split(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    view = _view(args[0])
    dim = constant(args[2] if len(args) > 2 else kwargs.get("dim", 0))
    parts, start = [], 0
    for meta in node.meta["val"]:
        length = meta.shape[dim]
        if not isinstance(length, int):
            raise Unknown("a split of samples")
        parts.append(view.narrow(dim, start, length))
        start += length
    return tuple(parts)


@handles("aten.unbind.int")
def _unbind(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    view, dim = _view(args[0]), constant(args[1]) if len(args) > 1 else 0
    return tuple(view.select(dim, index) for index in range(len(node.meta["val"])))


def _view(thing: Any) -> View:
    if not isinstance(thing, View):
        raise Unknown("an input that is no tensor of numbers")
    return thing


# --- layers ---------------------------------------------------------------------------------------


@handles("aten.linear.default")
def _linear(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    weight, bias = _tensor(args[1]), _tensor(args[2]) if len(args) > 2 else None
    return _linear_of(reader, node, _view(args[0]), weight, bias)


@handles("aten.addmm.default")
def _addmm(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if kwargs:
        raise Unknown("a sum with a factor")
    return _linear_of(reader, node, _view(args[1]), _tensor(args[2]).t(), _tensor(args[0]))


@handles("aten.matmul.default", "aten.mm.default")
def _matmul(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    weight = _tensor(args[1])
    if weight.dim() != 2:
        raise Unknown("a product of two tensors")
    return _linear_of(reader, node, _view(args[0]), weight.t(), None)


def _linear_of(
    reader: Reader, node: fx.Node, view: View, weight: Tensor, bias: Tensor | None
) -> View:
    name = module_of(node)
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise Unknown("a linear layer of other sizes")
    if "points" in axes_of(view.dims[-1]):
        view, weight = _flattened(reader, reader.whole(view, name), weight, name)
    view = reader.over_channels(view, name)
    out = reader.new(view.value, weight.shape[0])
    geometry = ConvGeometry.linear(weight.shape[1], weight.shape[0])
    kept = Kept.of(weight.contiguous())
    reader.emit(Conv(name, view.value, out, geometry, kept, _copy(bias)))
    return reader.with_last(view, out)


def _flattened(reader: Reader, view: View, weight: Tensor, name: str) -> tuple[View, Tensor]:
    """Make one token of all pixels of an image, pixel by pixel, and sort the weight like it."""
    value = reader.value(view)
    if view.dims[0] != SAMPLES or len(view.dims) != 2:
        raise Unknown("a layer over another dimension than the channels")
    # The number of each feature of the weight, at its channel and its pixel in the value.
    numbers = torch.arange(weight.shape[1])
    pieces = list(view.dims[1])
    order = sorted(
        range(len(pieces)), key=lambda i: (pieces[i].axis != "points", -pieces[i].stride)
    )
    numbers = numbers.reshape([piece.size for piece in pieces]).permute(order).reshape(-1)
    parts = tuple(
        Part(view.value, 0, point, value.channels, 1, point * value.channels, 0)
        for point in range(value.points)
    )
    out = reader.program.new(Value(value.channels * value.points))
    reader.emit(Join(name, view.value, out, parts))
    return View(out, (SAMPLES, channels(weight.shape[1]))), weight[:, numbers]


@handles("aten.conv2d.default", "aten.conv2d.padding")
def _conv(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    name, weight = module_of(node), _tensor(args[1])
    bias = _tensor(args[2]) if len(args) > 2 and args[2] is not None else None
    view = reader.images(_view(args[0]), name)
    stride, padding, dilation, groups = _settings(args[3:7], [1, 0, 1, 1])
    kernel = _pair(list(weight.shape[2:]))
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(_pair(dilation), kernel, strict=True)]
        if padding == "same" and any(r % 2 for r in reach):
            raise Unknown("a padding that differs between two sides")
        padding = [r // 2 if padding == "same" else 0 for r in reach]
    geometry = ConvGeometry(
        reader.value(view).channels, weight.shape[0], kernel, _pair(stride), _pair(padding),
        _pair(dilation), groups,
    )  # fmt: skip
    out = _new_images(reader, node)
    kept = Kept.of(weight.contiguous())
    reader.emit(Conv(name, view.value, out.value, geometry, kept, _copy(bias)))
    return out


def _new_images(reader: Reader, node: fx.Node) -> View:
    """Return a view of a new value with the shape of a node, ``[N, C, H, W]``."""
    shape = shape_of(node)
    dims = (SAMPLES, channels(shape[1]), points(shape[2], shape[3]), points(shape[3]))
    return View(reader.program.new(Value(shape[1], shape[2], shape[3])), dims)


@handles("aten.batch_norm.default")
def _batch_norm(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    weight, bias, mean, variance = (None if a is None else _tensor(a) for a in args[1:5])
    training, eps = constant(args[5]), constant(args[7])
    if training or mean is None or variance is None:
        raise Unknown("a BatchNorm that uses the statistics of its batch")
    view = reader.whole(_view(args[0]), node.name)
    if view.dims[1] != channels(reader.value(view).channels):
        raise Unknown("a BatchNorm over another dimension than the channels")
    scale = (variance.double() + eps).rsqrt()
    scale = scale if weight is None else scale * weight.double()
    offset = -mean.double() * scale
    offset = offset if bias is None else offset + bias.double()
    dtype = reader.program.dtype
    return reader.mapped(view, node, scale=scale.to(dtype), offset=offset.to(dtype))


@handles("aten.layer_norm.default", "aten.rms_norm.default")
def _norm(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    centered = "layer_norm" in str(node.target)
    view = reader.over_channels(_view(args[0]), node.name)
    if len(constant(args[1])) != 1:
        raise Unknown("a normalisation over several dimensions")
    args += [None] * (5 - len(args))
    weight = None if args[2] is None else _copy(_tensor(args[2]))
    bias = _copy(_tensor(args[3])) if centered and args[3] is not None else None
    eps = constant(args[4] if centered else args[3])
    if eps is None:
        eps = 1e-5 if centered else torch.finfo(reader.program.dtype).eps
    out = reader.new(view.value)
    reader.emit(Norm(module_of(node), view.value, out, float(eps), centered, weight, bias))
    return replace(view, value=out)


@handles("aten.embedding.default")
def _embedding(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    table, ids = _tensor(args[0]), _view(args[1])
    value = reader.value(ids)
    if not value.integers or ids.dims != (SAMPLES, points(value.width)):
        raise Unknown("rows of a table whose numbers the network computes")
    out = reader.program.new(Value(table.shape[1], 1, value.width))
    reader.emit(Embed(module_of(node), ids.value, out, table.clone()))
    return View(out, (*ids.dims, channels(table.shape[1])))


def _tensor(thing: Any) -> Tensor:
    tensor = constant(thing)
    if not isinstance(tensor, Tensor):
        raise Unknown("a weight that the network computes")
    return tensor


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


# --- attention ------------------------------------------------------------------------------------


@handles("aten.scaled_dot_product_attention.default")
def _attention(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    settings = dict(zip(_ATTENTION, args, strict=False)) | kwargs
    if constant(settings.get("dropout_p", 0)) or constant(settings.get("enable_gqa", False)):
        raise Unknown("an attention with dropout or with groups of heads")
    query, key, value = (
        _heads(reader, _view(settings[name]), node.name) for name in _ATTENTION[:3]
    )
    heads, size = query.shape[1], query.shape[3]
    if key.shape[1] != heads or value.shape[1] != heads or key.shape[3] != size:
        raise Unknown("an attention with groups of heads")
    mask = settings.get("attn_mask")
    keys, causal = _mask_of(reader, mask, query.shape[2], key.shape[2])
    causal |= bool(constant(settings.get("is_causal", False)))
    scale = constant(settings.get("scale"))
    out = reader.program.new(Value(heads * value.shape[3], 1, query.shape[2]))
    first = (query.channel, key.channel, value.channel)
    reader.emit(
        Attention(
            module_of(node), query.value, out, key.value, value.value, first, heads, size,
            value.shape[3], float(1 / math.sqrt(size) if scale is None else scale), causal, keys,
        )
    )  # fmt: skip
    whole = View(out, (SAMPLES, points(query.shape[2]), channels(heads * value.shape[3])))
    split = whole.reshape((BATCH, query.shape[2], heads, value.shape[3]))
    return split.permute((0, 2, 1, 3))


_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def _heads(reader: Reader, view: View, name: str) -> View:
    """Return a view ``[N, heads, tokens, size]`` of a value with one row."""
    if len(view.dims) != 4 or view.extent("points") != reader.value(view).points:
        raise Unknown("an attention over a part of the tokens")
    _, heads, tokens, size = view.shape
    wanted = View(0, (SAMPLES, points(tokens), channels(heads * size)))
    wanted = wanted.reshape((BATCH, tokens, heads, size)).permute((0, 2, 1, 3))
    if view.dims != wanted.dims:
        raise Unknown("heads whose channels do not follow one another")
    return reader.row(view, name)


def _mask_of(reader: Reader, mask: Any, queries: int, keys: int) -> tuple[int | None, bool]:
    """Return the integers of a mask, and whether it is causal."""
    if mask is None:
        return None, False
    known = mask.known if isinstance(mask, Mask) else (mask,)
    allowed = torch.ones(queries, keys, dtype=torch.bool)
    for part in known:
        if not isinstance(part, Known):
            raise Unknown("a mask that the network computes")
        allowed &= _allowed(part, queries, keys)
    causal = bool(torch.equal(allowed, allowed.new_ones(queries, keys).tril()))
    if not causal and not bool(allowed.all()):
        raise Unknown("a mask that is neither causal nor of the keys")
    if not isinstance(mask, Mask):
        return None, causal
    view = mask.keys
    if view.dims != (SAMPLES, (), (), points(keys)) or view.extent("points") != keys:
        raise Unknown("a mask that differs between queries")
    return view.value, causal


def _allowed(known: Known, queries: int, keys: int) -> Tensor:
    """Return a known mask as ``[queries, keys]``."""
    tensor = known.values[0]
    tensor = known.of_sample if tensor.dim() == 4 and tensor.shape[0] != 1 else known.only
    if tensor.is_floating_point():
        if not bool(((tensor == 0) | (tensor == -math.inf)).all()):
            raise Unknown("a mask that adds numbers")
        tensor = tensor == 0
    tensor = tensor.expand(*tensor.shape[:-2], queries, keys).reshape(-1, queries, keys)
    if not torch.equal(tensor, tensor[:1].expand_as(tensor)):
        raise Unknown("a mask that differs between heads")
    first: Tensor = tensor[0]
    return first


def _only_keys(mask: Mask) -> View:
    if mask.known:
        raise Unknown("a mask of another form")
    return mask.keys


@handles("aten.__and__.Tensor", "aten.bitwise_and.Tensor", "aten.logical_and.default")
def _and(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    masks = [arg for arg in args if isinstance(arg, Mask)]
    known = tuple(arg for arg in args if isinstance(arg, Known))
    if len(masks) != 1 or len(known) != 1:
        raise Unknown("a mask of several tensors")
    return replace(masks[0], known=(*masks[0].known, *known))


@handles("aten.index.Tensor")
def _index(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Read ``mask[samples, keys]``, which lets ``[N, keys]`` be ``[N, 1, 1, keys]``."""
    mask, indices = args
    view = _only_keys(mask) if isinstance(mask, Mask) else None
    if view is None or len(view.dims) != 2 or len(indices) != 2:
        raise Unknown("an index")
    samples, keys = indices
    for count, of_samples, of_keys in zip(TRIED, samples.values, keys.values, strict=True):
        all_samples = torch.arange(count).view(-1, 1, 1, 1)
        all_keys = torch.arange(view.shape[1]).view(1, 1, 1, -1)
        if not torch.equal(of_samples, all_samples) or not torch.equal(of_keys, all_keys):
            raise Unknown("an index")
    return replace(mask, keys=view.unsqueeze(1).unsqueeze(1))


@handles("aten.ne.Scalar", "aten.gt.Scalar")
def _not_zero(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if not isinstance(args[0], View) or not reader.value(args[0]).integers or constant(args[1]):
        raise Unknown("a comparison")
    return Mask(args[0])


# --- number by number -----------------------------------------------------------------------------

_ACTIVATIONS = {
    "relu": "relu", "relu_": "relu", "silu": "silu", "silu_": "silu", "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid", "hardswish": "hardswish", "hardswish_": "hardswish", "relu6": "relu6",
    "relu6_": "relu6", "hardsigmoid": "hardsigmoid", "hardsigmoid_": "hardsigmoid",
    "tanh": "tanh", "tanh_": "tanh",
}  # fmt: skip


@handles(*(f"aten.{name}.default" for name in _ACTIVATIONS))
def _activation(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    name = str(node.target).split(".")[1]
    return reader.mapped(_view(args[0]), node, activation=_ACTIVATIONS[name])


@handles("aten.gelu.default", "aten.gelu_.default")
def _gelu(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    name = "gelu_tanh" if kwargs.get("approximate") == "tanh" else "gelu"
    return reader.mapped(_view(args[0]), node, activation=name)


@handles("aten.hardtanh.default", "aten.hardtanh_.default", "aten.clamp.default")
def _hardtanh(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if [constant(a) for a in args[1:3]] != [0, 6]:
        raise Unknown("a clamp to other numbers than 0 and 6")
    return reader.mapped(_view(args[0]), node, activation="relu6")


@handles("aten.add.Tensor", "aten.add_.Tensor", "aten.sub.Tensor")
def _add(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if kwargs:
        raise Unknown("a sum with a factor")
    x, y = args
    minus = "sub" in str(node.target)
    if isinstance(x, View) and isinstance(y, View):
        if minus:
            y = _times(reader, node, y, -1.0)
        return _together(reader, node, x, y, multiply=False)
    if minus and isinstance(y, View):
        return _plus(reader, node, _times(reader, node, y, -1.0), x, 1)
    view, known = (x, y) if isinstance(x, View) else (y, x)
    return _plus(reader, node, _view(view), known, -1 if minus else 1)


@handles("aten.rsub.Scalar")
def _rsub(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) > 2:
        raise Unknown("a difference with a factor")
    return _plus(reader, node, _times(reader, node, _view(args[0]), -1.0), args[1], 1)


def _plus(reader: Reader, node: fx.Node, view: View, known: Any, sign: int) -> View:
    view = _same_shape(reader.whole(view, node.name), node)
    table = sign * reader.table(known, view)
    if bool((table == table[:, :1]).all()):
        offset = table[:, 0].contiguous()
        return reader.mapped(view, node, scale=torch.ones_like(offset), offset=offset)
    value = reader.value(view)
    part = Part(view.value, 0, 0, value.channels, value.points, 0, 0)
    out = reader.new(view.value)
    reader.emit(Join(module_of(node), view.value, out, (part,), table.contiguous()))
    return replace(view, value=out)


@handles("aten.mul.Tensor", "aten.mul_.Tensor", "aten.div.Tensor")
def _mul(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if kwargs:
        raise Unknown("a quotient that is rounded")
    x, y = args
    if isinstance(x, View) and isinstance(y, View):
        if "div" in str(node.target):
            raise Unknown("a quotient of two tensors")
        return _together(reader, node, x, y, multiply=True)
    view, known = (x, y) if isinstance(x, View) else (y, x)
    if "div" in str(node.target):
        if not isinstance(x, View):
            raise Unknown("a quotient of a constant")
        known = 1 / constant(known)
    return _times(reader, node, _view(view), known)


def _times(reader: Reader, node: fx.Node, view: View, known: Any) -> View:
    view = _same_shape(reader.whole(view, node.name), node)
    table = reader.table(known, view)
    if not bool((table == table[:, :1]).all()):
        raise Unknown("a product with a constant that differs between pixels")
    scale = table[:, 0].contiguous()
    return reader.mapped(view, node, scale=scale, offset=torch.zeros_like(scale))


def _same_shape(view: View, node: fx.Node) -> View:
    if view.shape != shape_of(node):
        raise Unknown("a constant that makes a tensor larger")
    return view


def _together(reader: Reader, node: fx.Node, x: View, y: View, multiply: bool) -> View:
    x, y = reader.whole(x, node.name), reader.whole(y, node.name)
    if x.dims == y.dims:
        if reader.value(x).height != reader.value(y).height:
            x, y = reader.row(x, node.name), reader.row(y, node.name)
        out = reader.new(x.value)
        reader.emit(Map(module_of(node), x.value, out, y=y.value, multiply=multiply))
        return replace(x, value=out)
    for image, gate in ((x, y), (y, x)):
        bare = tuple(() if axes_of(dim) == {"points"} else dim for dim in image.dims)
        if multiply and gate.dims == bare and reader.value(gate).points == 1:
            out = reader.new(image.value)
            reader.emit(Gate(module_of(node), image.value, out, gate.value))
            return replace(image, value=out)
    raise Unknown("two tensors of different shapes")


# --- pooling and concatenation --------------------------------------------------------------------


@handles("aten.max_pool2d.default")
def _max_pool(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    window, stride, padding, dilation, ceil = _settings(args[1:], [None, [], 0, 1, False])
    if _pair(dilation) != (1, 1):
        raise Unknown("max pooling with dilation")
    if ceil:
        _check_ceil(node, window, stride, padding)
    return _pool(reader, node, _view(args[0]), True, window, stride, padding)


def _check_ceil(node: fx.Node, window: Any, stride: Any, padding: Any) -> None:
    """Check that windows beyond the image, which ceil_mode adds, do not exist here."""
    geometry = ConvGeometry(1, 1, _pair(window), _pair(stride or window), _pair(padding))
    source: Any = node.args[0]
    if geometry.out_size(*shape_of(source)[2:]) != shape_of(node)[2:]:
        raise Unknown("pooling with windows beyond the image (ceil_mode)")


@handles("aten.avg_pool2d.default")
def _avg_pool(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    defaults: list[Any] = [None, [], 0, False, True, None]
    window, stride, padding, ceil, count, divisor = _settings(args[1:], defaults)
    if divisor is not None:
        raise Unknown("average pooling with a divisor")
    if ceil:
        _check_ceil(node, window, stride, padding)
    return _pool(reader, node, _view(args[0]), False, window, stride, padding, bool(count))


@handles("aten.adaptive_avg_pool2d.default")
def _adaptive(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    view = reader.images(_view(args[0]), node.name)
    sizes = [*zip(view.shape[2:], shape_of(node)[2:], strict=True)]
    if any(size % result for size, result in sizes):
        raise Unknown("adaptive pooling with windows of several sizes")
    window = [size // result for size, result in sizes]
    return view if window == [1, 1] else _pool(reader, node, view, False, window, window, 0)


@handles("aten.mean.dim")
def _mean(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    view = reader.whole(_view(args[0]), node.name)
    value = reader.value(view)
    dims = {d % len(view.dims) for d in constant(args[1])}
    left = [dim for number, dim in enumerate(view.dims) if number not in dims]
    if any("points" in axes_of(dim) for dim in left) or any(
        axes_of(view.dims[d]) - {"points"} for d in dims
    ):
        raise Unknown("a mean over other dimensions than all pixels or tokens")
    size = (value.height, value.width)
    out = reader.program.new(Value(value.channels))
    reader.emit(Pool(module_of(node), view.value, out, False, size, (1, 1), (0, 0), True))
    keep = len(args) > 2 and constant(args[2])
    kept = tuple(() if number in dims else dim for number, dim in enumerate(view.dims))
    return View(out, kept if keep else tuple(left))


def _pool(
    reader: Reader, node: fx.Node, view: View, maximum: bool, window: Any, stride: Any,
    padding: Any, count: bool = True,
) -> View:  # fmt: skip
    view = reader.images(view, node.name)
    out = _new_images(reader, node)
    sizes = _pair(window), _pair(stride or window), _pair(padding)
    reader.emit(Pool(module_of(node), view.value, out.value, maximum, *sizes, count))
    return out


def _settings(args: list[Any], defaults: list[Any]) -> list[Any]:
    given = [constant(arg) for arg in args]
    return [*given, *defaults[len(given) :]]


@handles("aten.cat.default")
def _cat(reader: Reader, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    dim = constant(args[1]) if len(args) > 1 else 0
    views = [thing for thing in args[0] if isinstance(thing, View)]
    like = views[0]
    dim %= len(like.dims)
    axes = set().union(*(axes_of(view.dims[dim]) for view in views))
    if any(
        view.dims[:dim] + view.dims[dim + 1 :] != like.dims[:dim] + like.dims[dim + 1 :]
        for view in views
    ):
        raise Unknown("a concatenation of tensors that lie in different ways")
    if axes == {"channels"} and len(views) == len(args[0]):
        return _cat_channels(reader, node, views, dim)
    if axes <= {"points"} and dim == 1 and len(like.dims) == 3:
        return _cat_tokens(reader, node, args[0])
    raise Unknown("a concatenation of something else than channels or tokens")


def _cat_channels(reader: Reader, node: fx.Node, views: list[View], dim: int) -> View:
    count = sum(view.shape[dim] for view in views)
    first = reader.value(views[0])
    parts, start = [], 0
    for view in views:
        value = reader.value(view)
        width = view.extent("channels")
        if view.extent("points") != value.points or width != view.shape[dim]:
            raise Unknown("a concatenation of parts of images")
        parts.append(Part(view.value, view.channel, 0, width, value.points, start, 0))
        start += width
    out = reader.program.new(Value(count, first.height, first.width))
    reader.emit(Join(module_of(node), parts[0].x, out, tuple(parts)))
    dims = views[0].dims
    return View(out, (*dims[:dim], channels(count), *dims[dim + 1 :]))


def _cat_tokens(reader: Reader, node: fx.Node, things: list[Any]) -> View:
    """Join tokens of a network and known ones, such as that of a class."""
    _, count, width = shape_of(node)
    table = torch.zeros(width, count, dtype=reader.program.dtype)
    parts, start = [], 0
    for thing in things:
        if isinstance(thing, Known):
            tokens = thing.of_sample[0]
            table[:, start : start + len(tokens)] = tokens.t()
            start += len(tokens)
            continue
        length = thing.extent("points")
        if thing.dims != (SAMPLES, points(length), channels(width)):
            raise Unknown("a concatenation of tokens that lie in another way")
        parts.append(Part(thing.value, thing.channel, thing.point, width, length, 0, start))
        start += length
    out = reader.program.new(Value(width, 1, count))
    known = table if bool(table.any()) else None
    reader.emit(Join(module_of(node), parts[0].x, out, tuple(parts), known))
    return View(out, (SAMPLES, points(count), channels(width)))


def _pair(value: Any) -> Size2:
    if isinstance(value, int):
        return value, value
    return (int(value[0]), int(value[-1]))
