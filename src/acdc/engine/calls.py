"""Layers and normalisations that a forward calls as functions, as modules of the graph.

``F.batch_norm(x, self.running_mean, ..., self.weight)`` is what ``timm`` writes for a BatchNorm
with an activation behind it, and ``F.linear(x, self.weight, self.bias)`` for its linear layer. With
the tensors of one module in their usual places, the call is a module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_any

TENSORS = ("running_mean", "running_var", "weight", "bias")
"""The arguments that a module holds under the same name."""

_NORMS = {F.batch_norm: "batch_norm", F.layer_norm: "layer_norm", F.rms_norm: "rms_norm"}
_LAYERS: dict[Any, str] = {F.linear: "linear", F.conv2d: "conv2d"}
_ARGUMENTS = {
    F.linear: ("input", "weight", "bias"),
    F.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
}
"""Of functions without a signature."""


class FunctionCall(nn.Module):
    """A call of a function with tensors of one module, which are those that it holds at present.

    Args:
        owner: The module that holds the tensors.
        path: The name of the owner.
        function: The function.
        used: The tensors that the call is given, of ``TENSORS``. The others are None.
        settings: All other arguments, by name.

    """

    def __init__(
        self,
        owner: nn.Module,
        path: str,
        function: Callable[..., Tensor],
        used: frozenset[str],
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.held = (owner,)  # in a tuple, so that it is not a submodule
        self.path, self.function, self.used, self.settings = path, function, used, dict(settings)

    def __getattr__(self, name: str) -> Any:
        if name in TENSORS:
            return getattr(self.held[0], name) if name in self.used else None
        return super().__getattr__(name)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the call is given."""
        return [getattr(self, name) for name in TENSORS if name in self.used]

    def forward(self, x: Tensor) -> Tensor:
        """Call the function."""
        return self.function(
            x, **{name: getattr(self, name) for name in self.used}, **self.settings
        )


class NormCall(FunctionCall):
    """A call of ``F.batch_norm``, ``F.layer_norm`` or ``F.rms_norm``."""

    num_batches_tracked = None  # whoever calls the function counts the batches

    @property
    def eps(self) -> float | None:
        """What is added to the variance."""
        default = inspect.signature(self.function).parameters["eps"].default
        eps: float | None = self.settings.get("eps", default)
        return eps

    @property
    def momentum(self) -> float:
        """The weight of a batch in the running statistics of a BatchNorm."""
        return float(self.settings.get("momentum", 0.1))

    @property
    def of_batch(self) -> bool:
        """Whether a BatchNorm uses the statistics of the batch."""
        return bool(self.settings.get("training", False)) or "running_mean" not in self.used


class LayerCall(FunctionCall):
    """A call of ``F.linear`` or ``F.conv2d``."""

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer."""
        return self.function is F.linear


def as_modules(graph: fx.Graph, root: nn.Module) -> dict[str, nn.Module]:
    """Replace the calls in a graph by modules; return these by the name that the graph uses."""
    made: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        function = (_NORMS | _LAYERS).get(node.target) if node.op == "call_function" else None
        if function is None or (call := _call_of(node, root)) is None:
            continue
        name = f"{call.path}.{function}_{len(made)}".removeprefix(".")
        made[name] = call
        read = [n for n in node.all_input_nodes if n.op == "get_attr"]
        with graph.inserting_before(node):
            new = graph.call_module(name, (_arguments(node)["input"],))
        node.replace_all_uses_with(new)
        for unused in (node, *(n for n in read if set(n.users) == {node})):
            graph.erase_node(unused)
    return made


def _call_of(node: fx.Node, root: nn.Module) -> FunctionCall | None:
    """Return the module of a call, or None if it is not so simple."""
    given = _arguments(node)
    x = given.pop("input", None)
    tensors = {name: given.pop(name, None) for name in TENSORS}
    owners = set()
    for name, value in tensors.items():
        if value is None:
            continue
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        owner, _, last = str(value.target).rpartition(".")
        if last != name:
            return None
        owners.add(owner)
    if not isinstance(x, fx.Node) or len(owners) != 1:
        return None
    if tree_any(lambda value: isinstance(value, fx.Node), given):
        return None  # a size that is read from a tensor
    (path,) = owners
    used = frozenset(name for name, value in tensors.items() if value is not None)
    holder, function = root.get_submodule(path), cast("Callable[..., Tensor]", node.target)
    if function in _NORMS:
        return NormCall(holder, path, function, used, given)
    if "weight" not in used or not isinstance(holder.weight, nn.Parameter):
        return None
    return LayerCall(holder, path, function, used, given)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    function: Any = node.target
    names = _ARGUMENTS.get(function) or tuple(inspect.signature(function).parameters)
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
