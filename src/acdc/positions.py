"""How often one sample meets each weight of a model, found by one forward pass.

A *position* is one place at which a weight is applied: an output pixel of a convolution, an input
pixel of a transposed one, a token of a linear layer or of an attention projection, a time step of
an RNN. A weight at a position is one multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from acdc.errors import InputError
from acdc.kinds import Kind, layer_of
from acdc.shape import Shape


@dataclass(frozen=True)
class Use:
    """A weight of a layer, and how often it is applied.

    Args:
        kind: The kind of the layer.
        key: Its name in the layer.
        shape: Its shape.
        bias: Whether the layer adds a bias.
        positions: At how many positions a forward pass of one sample applies it.
    """

    kind: Kind
    key: str
    shape: Shape
    bias: bool
    positions: int = 0


def applied(model: nn.Module, example: Tensor) -> dict[str, Use]:
    """Return the weights of the layers of a model by name, in the order of its modules.

    ``acdc.cost.measure`` says what the pass is like.

    Raises:
        InputError: The example has no sample.
    """
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    names: dict[nn.Module, list[str]] = {}
    found: dict[str, Use] = {}
    for path, module in model.named_modules():
        for name, use in _uses(module, path, own):
            names.setdefault(module, []).append(name)
            found.setdefault(name, use)
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            # It applies the weight of this layer itself, and never calls the layer.
            ((name, use),) = _uses(module.out_proj, f"{path}.out_proj".removeprefix("."), own)
            found[name] = replace(use, kind="attention", key="out_proj")
            names[module].append(name)

    def count(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        for name in names[module]:
            more = _positions(found[name], args, named, output)
            found[name] = replace(found[name], positions=found[name].positions + more)

    watch(model, example, names, count)
    return found


def _uses(module: nn.Module, path: str, own: Mapping[int, str]) -> Iterator[tuple[str, Use]]:
    """Yield the names of the weights that a layer holds, and what they are."""
    held = {key: param for key, param in module._parameters.items() if param is not None}
    if "weight" not in held and isinstance(getattr(module, "weight", None), Tensor):
        # A parametrized weight is no parameter; it goes by the name it has without.
        held["weight"] = cast(nn.Parameter, module.weight)
    bias = getattr(module, "bias", getattr(module, "in_proj_bias", None))
    for key, param in held.items():
        if param.ndim > 1 and (layer := layer_of(module, key, param)):
            name = own.get(id(param), f"{path}.{key}".removeprefix("."))
            yield name, Use(layer[0], key, layer[1], bias is not None and bias is not False)


def _positions(use: Use, args: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> int:
    """Return at how many positions a call of a layer applies a weight."""
    given = (*args, *named.values())
    if use.kind == "attention":
        return _attention(use.key, args, named)
    if use.kind == "experts":
        return _experts(use.shape, given)
    if use.kind == "rnn":
        steps: Tensor = given[0].data if isinstance(given[0], PackedSequence) else given[0]
        return steps.shape[:-1].numel()
    if use.kind == "conv" and use.shape.outputs == 1:  # transposed
        return int(given[0].numel()) // use.shape[0]
    result = output if isinstance(output, Tensor) else output[0]
    return int(result.numel()) // use.shape[use.shape.outputs]


def _attention(key: str, args: tuple[Any, ...], named: Mapping[str, Any]) -> int:
    """Return the tokens that a projection takes; of the stacked ones, their mean, rounded up."""
    names = ("query", "key", "value")
    by_name: dict[str, Tensor] = dict(zip(names, args, strict=False)) | dict(named)
    tokens = {f"{name[0]}_proj_weight": by_name[name].shape[:-1].numel() for name in names}
    if key == "in_proj_weight":
        return -(-sum(tokens.values()) // len(tokens))
    return tokens["q_proj_weight" if key == "out_proj" else key]


def _experts(shape: Shape, given: tuple[Any, ...]) -> int:
    """Return the tokens that an expert takes on average, rounded; 0 where no routing is given.

    The experts of transformers are called with the tokens and with the indices of their experts.
    """
    if len(given) == 1 or not isinstance(given[1], Tensor) or given[1].is_floating_point():
        return 0
    return round(given[1].numel() / shape[0])


def watch(
    model: nn.Module,
    example: Tensor,
    layers: Iterable[nn.Module],
    see: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None],
) -> None:
    """Run one sample through the model; ``see`` every call of a layer and what it returned."""
    if example.ndim == 0 or len(example) == 0:
        raise InputError(
            f"The example has shape {tuple(example.shape)}. Give a batch of at least one sample, "
            f"[N, ...], as the model takes it."
        )
    modes = [(module, module.training) for module in model.modules()]
    hooks = [module.register_forward_hook(see, with_kwargs=True) for module in layers]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fast path of nn.TransformerEncoderLayer does not call the modules in it.
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        with torch.no_grad():
            model(example[:1])
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in hooks:
            handle.remove()
        for module, training in modes:
            module.training = training
