"""The forward of a module as a graph of PyTorch's own operations, for any number of samples.

``torch.export`` follows the forward with sizes instead of numbers. Sizes that a forward asks for
are constants but for the number of samples, which stays a symbol. If the forward depends on it in
any other way, the export fails.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._pytree import tree_leaves, tree_map

from acdc.engine.effects import Attributes
from acdc.engine.known import activation_of, rms_norm_eps
from acdc.engine.tracing import first_line, is_opaque
from acdc.runtime.views import BATCH, Unknown


@dataclass(frozen=True)
class Exported:
    """A module as a graph.

    Args:
        program: As ``torch.export`` returns it.
        stored: Placeholder -> parameter, buffer or constant.
        given: Placeholder -> number of the tensor among the arguments.

    """

    program: ExportedProgram
    stored: dict[str, Tensor]
    given: dict[str, int]

    @property
    def nodes(self) -> Sequence[fx.Node]:
        """The nodes in order."""
        return list(self.program.graph.nodes)


def export(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    example: Sequence[Tensor],
) -> Exported:
    """Return the forward of a module as a graph.

    Args:
        module: The module in evaluation mode.
        args, kwargs: What it is called with.
        example: The different tensors among them. The first size of the first one is the number of
            samples.

    Raises:
        Unknown: The forward is no such graph.

    """
    opaque = [name or "the module" for name, m in module.named_modules() if is_opaque(m)]
    if opaque:
        raise Unknown(f"{opaque[0]} has hooks, a parametrization or a forward of its own")
    tensors = [_several(x, example[0]) for x in example]
    args, kwargs = exchanged((args, kwargs), example, tensors)
    shapes, samples = ShapesCollection(), Dim("samples", min=2)
    for x in tensors:
        if x.dim() and x.shape[0] == tensors[0].shape[0]:
            shapes[x] = {0: samples}
    attributes = Attributes(module)
    try:
        with _quiet(), _one_call_each(module), torch.no_grad():
            program = torch.export.export(
                module, args, dict(kwargs), dynamic_shapes=cast(Any, shapes), strict=False
            )
        changes = list(attributes.changes())
    except Exception as error:  # whatever the user's code raises on a symbol
        raise Unknown(f"its forward is no fixed graph ({first_line(error)})") from error
    finally:
        attributes.restore()
    signature = program.graph_signature
    if changes or signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise Unknown("its forward changes the module or its arguments")
    leaves = tree_leaves((args, kwargs))
    of_tensor = {id(x): number for number, x in enumerate(tensors)}
    given = {
        name: of_tensor[id(leaf)]
        for name, leaf in zip(signature.user_inputs, leaves, strict=True)
        if isinstance(name, str) and isinstance(leaf, Tensor)
    }
    return Exported(program, _stored(program), given)


def exchanged(tree: Any, before: Sequence[Tensor], after: Sequence[Tensor]) -> Any:
    """Return nested containers with other tensors in place of those that they hold."""
    of = {id(x): y for x, y in zip(before, after, strict=True)}
    return tree_map(lambda leaf: of.get(id(leaf), leaf), tree)


def _several(x: Tensor, first: Tensor) -> Tensor:
    """Return a tensor with at least two samples: one sample might be taken for a constant."""
    if first.dim() and first.shape[0] == 1 and x.dim() and x.shape[0] == 1:
        return torch.cat((x, x))
    return x.clone()


def _stored(program: ExportedProgram) -> dict[str, Tensor]:
    signature = program.graph_signature
    stored: dict[str, Tensor] = {}
    for name, target in (
        *signature.inputs_to_parameters.items(),
        *signature.inputs_to_buffers.items(),
    ):
        tensor = program.state_dict.get(target)
        stored[name] = program.constants[target] if tensor is None else tensor
    for name, target in signature.inputs_to_lifted_tensor_constants.items():
        stored[name] = program.constants[target]
    return {name: tensor.detach() for name, tensor in stored.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what ``torch.export`` logs, and keep PyTorch from calling encoders as a whole."""
    fast = torch.backends.mha.get_fastpath_enabled()
    loggers = [logging.getLogger(name) for name in ("torch._export", "torch.export", "torch.fx")]
    levels = [logger.level for logger in loggers]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _one_call_each(module: nn.Module) -> Iterator[None]:
    """Let activations and RMSNorms of other libraries be one operation each."""
    plain: list[tuple[nn.Module, Any]] = []
    for part in module.modules():
        function = _function_of(part)
        if function is not None:
            plain.append((part, type(part)))
    try:
        for part, kind in plain:
            part.__class__ = _as_one_call(kind, _function_of(part))
        yield
    finally:
        for part, kind in plain:
            part.__class__ = kind


def _as_one_call(kind: type[nn.Module], function: Any) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"forward": lambda self, x: function(x)})


def _function_of(module: nn.Module) -> Any:
    """Return a function of PyTorch that computes what a module computes, or None."""
    activation = activation_of(module)
    if activation == "silu":
        return nn.functional.silu
    if activation is not None:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        return lambda x: nn.functional.gelu(x, approximate=approximate)
    name = rms_norm_eps(module)
    if name is None:
        return None
    weight, eps = module.get_parameter("weight"), float(getattr(module, name))
    return lambda x: nn.functional.rms_norm(x, weight.shape, weight, eps)


# --- sizes ----------------------------------------------------------------------------------------


def number_of(size: Any, samples: int = BATCH) -> int:
    """Return a size for so many samples.

    Args:
        size: An int, or a symbol of the export.
        samples: The number of samples.

    Raises:
        Unknown: It is no whole number.

    """
    if isinstance(size, int):
        return size
    expression = size.node.expr
    number = expression.subs(dict.fromkeys(expression.free_symbols, samples))
    if not number.is_integer:
        raise Unknown(f"a size of {expression}")
    return int(number)


def shape_of(node: fx.Node, samples: int = BATCH) -> tuple[int, ...]:
    """Return the shape of a node's tensor for so many samples."""
    return tuple(number_of(size, samples) for size in node.meta["val"].shape)


def module_of(node: fx.Node) -> str:
    """Return the name of the innermost module that a node comes from, or of the node."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [path for path, _ in stack.values() if path]
    return names[-1] if names else node.name
