"""What the parameters of a model are: of which kind of layer, of which shape, and whether zeros in
them are zeros in the computation.

Every parameter of two dimensions or more is listed. Biases and the parameters of a normalisation
have one dimension, and are never pruned.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from acdc.errors import InputError
from acdc.shape import Shape

Kind = Literal["conv", "linear", "rnn", "attention", "experts"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Weight:
    """A parameter of two dimensions or more.

    Args:
        name: Its first name in ``model.named_parameters()``.
        param: The parameter.
        kind: The kind of layer that it belongs to; ``None``: no layer whose kind is known.
        shape: Its shape, with the axes along which it is multiplied.
        names: All names of the parameter, and all names of the modules that hold it.
        modules: The modules that hold it.
        layers: Those of them that are layers of a known kind.
        fixed: Why it cannot be trained sparse, if that is so.
        reason: Why it is not pruned unless it is named: an embedding, an adapter, and so on.
    """

    name: str
    param: nn.Parameter
    kind: Kind | None
    shape: Shape
    names: frozenset[str]
    modules: tuple[nn.Module, ...]
    layers: tuple[nn.Module, ...]
    fixed: str | None
    reason: str | None


def weights(model: nn.Module) -> dict[str, Weight]:
    """Return every parameter of two dimensions or more by its name, in the order of the modules.

    Raises:
        InputError: A parameter has no shape yet, because it belongs to a lazy module.
    """
    aliases: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(param), []).append(name)
    holders: dict[int, list[_Holder]] = {}
    for path, module in model.named_modules():
        for key, param in module._parameters.items():
            if param is not None:
                holders.setdefault(id(param), []).append(_Holder(path, module, key))
    adapted = _Adapted(model)
    tried: dict[type[nn.Module], bool] = {}
    found = {}
    for name, param in model.named_parameters():
        if is_lazy(param):
            raise InputError(
                f"The parameter {name!r} has no shape yet: it belongs to a lazy module. Call the "
                f"model once, and build the optimizer, before a sparsifier is attached."
            )
        if param.ndim > 1:
            held = holders[id(param)]
            names = {other for alias in aliases[id(param)] for other in _names(alias)}
            layers = [
                (h.module, known) for h in held if (known := layer_of(h.module, h.key, param))
            ]
            plain = Shape(param.shape, inputs=1 if param.ndim == 2 else None)
            kind, shape = layers[0][1] if layers else (None, plain)
            found[name] = Weight(
                name,
                param,
                kind,
                shape,
                frozenset(names),
                tuple(h.module for h in held),
                tuple(module for module, _ in layers),
                _fixed(param),
                _reason(name, aliases[id(param)], held, adapted, tried),
            )
    return found


@dataclass(frozen=True)
class _Holder:
    """A module that holds a parameter.

    Args:
        path: The name of the module in the model.
        module: The module.
        key: The name of the parameter in the module.
    """

    path: str
    module: nn.Module
    key: str


def _names(alias: str) -> Iterator[str]:
    """Yield the names by which people know a parameter: its own, and that of its layer."""
    yield alias
    layer = alias.rpartition(".")[0]
    yield layer
    if ".parametrizations." in f".{layer}":
        yield f".{layer}".partition(".parametrizations.")[0].removeprefix(".")


# --- kinds and shapes ---------------------------------------------------------------------------


def layer_of(module: nn.Module, key: str, param: Tensor) -> tuple[Kind, Shape] | None:
    """Return the kind of layer that a module is, and the shape of its weight ``key``; ``None`` if
    that is no weight of a known kind of layer.
    """
    sizes = param.shape
    if key == "weight":
        if isinstance(module, _TRANSPOSED):
            return "conv", Shape(sizes, outputs=1, inputs=0, groups=module.groups)
        if isinstance(module, _CONVS) or _like_convolution(module, sizes):
            return "conv", Shape(sizes, output_groups=max(1, getattr(module, "groups", 1)))
        if isinstance(module, nn.Linear) or _like_linear(module, sizes):
            return "linear", Shape(sizes)
        if is_conv1d(module):
            return "linear", Shape(sizes, outputs=1, inputs=0)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and key.startswith("weight_"):
        return "rnn", Shape(sizes, stack=max(1, sizes[0] // module.hidden_size))
    if isinstance(module, nn.MultiheadAttention) and key in _ATTENTION:
        return "attention", Shape(sizes, stack=3 if key == "in_proj_weight" else 1)
    if param.ndim == 3 and "expert" in type(module).__name__.lower():
        # Mixtures of transformers say which way round they hold their matrices.
        outputs, inputs = (2, 1) if getattr(module, "is_transposed", None) else (1, 2)
        known = hasattr(module, "is_transposed")
        return "experts", Shape(sizes, outputs=outputs, inputs=inputs if known else None)
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the ``Conv1D`` of transformers: a linear layer with weight
    ``[inputs, outputs]``.
    """
    weight = module._parameters.get("weight")
    return (
        any(base.__name__ == "Conv1D" for base in type(module).__mro__)
        and isinstance(getattr(module, "nf", None), int)
        and weight is not None
        and weight.ndim == 2
        and weight.shape[1] == module.nf
    )


def _like_linear(module: nn.Module, sizes: tuple[int, ...]) -> bool:
    """Whether a module that is no ``nn.Linear`` has the fields of one."""
    return sizes == (getattr(module, "out_features", None), getattr(module, "in_features", None))


def _like_convolution(module: nn.Module, sizes: tuple[int, ...]) -> bool:
    """Whether a module that is no convolution of PyTorch has the fields of one."""
    kernel, groups = getattr(module, "kernel_size", None), getattr(module, "groups", 1)
    inputs, outputs = getattr(module, "in_channels", None), getattr(module, "out_channels", None)
    return (
        isinstance(kernel, tuple)
        and isinstance(inputs, int)
        and isinstance(groups, int)
        and sizes == (outputs, inputs // max(1, groups), *kernel)
    )


# --- why a weight is not pruned -----------------------------------------------------------------


def _fixed(param: nn.Parameter) -> str | None:
    if param.layout != torch.strided:
        return f"its values are stored as {param.layout}"
    if not param.is_floating_point() and not param.is_complex():
        return f"quantized: its values are {param.dtype}"
    if not param.requires_grad:
        return "frozen: it requires no gradient"
    return None


def _reason(
    name: str,
    aliases: list[str],
    held: list[_Holder],
    adapted: _Adapted,
    tried: dict[type[nn.Module], bool],
) -> str | None:
    if (table := next((h for h in held if _is_embedding(h)), None)) is not None:
        own = f"{table.path}.{table.key}".removeprefix(".")
        others = [alias for alias in aliases if alias not in (name, own)]
        if name != own:
            return f"tied to the embedding {table.path}"
        return f"an embedding, tied to {', '.join(others)}" if others else "an embedding"
    if why := adapted.reason(aliases):
        return why
    for holder in held:
        if why := _computed(holder, tried):
            return why
    return None


def _is_embedding(holder: _Holder) -> bool:
    kind = type(holder.module)
    embedding = issubclass(kind, nn.Embedding | nn.EmbeddingBag) or (
        "Embedding" in kind.__name__ and not issubclass(kind, (*_CONVS, *_TRANSPOSED, nn.Linear))
    )
    return embedding and holder.key == "weight"


class _Adapted:
    """The layers of a model that have adapters beside them, such as those of peft (LoRA)."""

    def __init__(self, model: nn.Module) -> None:
        self._wrappers: list[str] = []  # the names of layers that peft has wrapped
        self._own: list[str] = []  # the names of layers that hold their adapters themselves
        for path, module in model.named_modules():
            children = {*module._modules, *module._parameters}
            if "base_layer" in children and hasattr(type(module), "adapter_layer_names"):
                self._wrappers.append(path)
            elif any(key.lower() == "lora_a" for key in children):
                self._own.append(path)

    def reason(self, aliases: list[str]) -> str | None:
        """Return why a weight with these names is not pruned."""
        for alias in aliases:
            for path in self._wrappers:
                inside = _inside(alias, path)
                if inside is not None and inside.startswith("base_layer."):
                    return f"an adapter is added to the layer {path}: merge them first"
                if inside is not None:
                    return f"an adapter of the layer {path}"
            for path in self._own:
                inside = _inside(alias, path)
                if inside == "weight":
                    return f"an adapter is added to the layer {path}: merge them first"
                if inside is not None and inside.lower().startswith("lora_"):
                    return f"an adapter of the layer {path}"
        return None


def _inside(name: str, path: str) -> str | None:
    """Return the name of a parameter within the module ``path``, or ``None`` if it is elsewhere."""
    if not path:
        return name
    return name[len(path) + 1 :] if name.startswith(f"{path}.") else None


def _computed(holder: _Holder, tried: dict[type[nn.Module], bool]) -> str | None:
    """Return why zeros in a parameter are no zeros in the computation, if that is so."""
    module, key = holder.module, holder.key
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        layer, _, tensor = f".{holder.path}".partition(".parametrizations.")
        by = ", ".join(type(rule).__name__.lstrip("_") for rule in module)
        return (
            f"the {tensor} of {layer.removeprefix('.') or 'the model'} is computed from it ({by})"
        )
    for hook in module._forward_pre_hooks.values():
        # The older weight_norm and spectral_norm, and torch.nn.utils.prune.
        name = getattr(hook, "name", getattr(hook, "_tensor_name", None))
        if isinstance(name, str) and key in (f"{name}_g", f"{name}_v", f"{name}_orig"):
            of, by = holder.path or "the model", type(hook).__name__
            return f"the {name} of {of} is computed from it ({by})"
    kind, weight = type(module), module._parameters[key]
    assert weight is not None
    known = layer_of(module, key, weight)
    if known and known[0] in ("conv", "linear") and _own_code(module):
        if kind not in tried:
            tried[kind] = keeps_zeros(module)
        if not tried[kind]:
            return f"{kind.__name__} computes with other weights, in which zeros are no zeros"
    return None


def _own_code(module: nn.Module) -> bool:
    """Whether a layer computes its output by other code than PyTorch's."""
    plain = {
        base
        for base in (*_CONVS, *_TRANSPOSED, nn.Linear)
        if type(module).forward is base.forward
        and getattr(type(module), "_conv_forward", None) is getattr(base, "_conv_forward", None)
    }
    return not plain and not is_conv1d(module)


def keeps_zeros(module: nn.Module) -> bool:
    """Whether a zero in the weight of a layer is a zero in what the layer computes with.

    A copy of the layer is called with small random inputs. Its output must be proportional to the
    weight, which a standardised weight is not. Where the weights of an input channel are zero, the
    output must not depend on that channel; where those of an output channel are zero, that channel
    must be constant. A layer that cannot be called with one tensor counts as an ordinary one.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            return _keeps_zeros(module)
        except Exception:  # the code of any user runs here, with inputs that it may not expect
            return True


def _keeps_zeros(module: nn.Module) -> bool:
    meta = any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    layer = copy.deepcopy(module)
    layer = (layer.to_empty(device="cpu") if meta else layer.to("cpu")).float().eval()
    for tensor in (*layer.parameters(), *layer.buffers()) if meta else ():
        tensor.fill_(1)  # what a new tensor holds by chance may be NaN
    for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
        hooks.clear()
    weight = layer._parameters["weight"]
    assert weight is not None
    found = layer_of(layer, "weight", weight)
    assert found is not None
    shape = found[1]
    assert shape.inputs is not None
    if found[0] == "conv":
        groups: Any = getattr(layer, "groups", 1) if shape.inputs else 1
        dilation: Any = getattr(layer, "dilation", 1)
        reach = max(dilation) if isinstance(dilation, tuple) else int(dilation)
        sizes = [reach * (size - 1) + 3 for size in shape[2:]]
        x = torch.randn(2, shape[shape.inputs] * groups, *sizes)
        first = torch.arange(0, x.shape[1], shape[shape.inputs] if shape.inputs else x.shape[1])
        channel = 1
    else:
        x, first, channel = torch.randn(2, shape[shape.inputs]), torch.tensor([0]), -1

    def run(values: Tensor, x: Tensor = x) -> Tensor:
        weight.copy_(values)
        y = layer(x)
        return y if isinstance(y, Tensor) else y[0]

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(some.abs().max()))

    values = torch.randn(shape)
    none, some, twice = run(torch.zeros(shape)), run(values), run(2 * values)
    if not same(twice - none, 2 * (some - none)):
        return False
    other = x.index_fill(1 if x.ndim > 2 else -1, first, 3.0)
    column = torch.tensor([0])
    cut = values.index_fill(shape.inputs, column, 0)
    if not same(run(cut), run(cut, other)):
        return False
    cut = values.index_fill(shape.outputs, column, 0)
    return same(run(cut).select(channel, 0), none.select(channel, 0))
