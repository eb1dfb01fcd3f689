"""A network that is one program: what a frozen file holds, and what ``Runtime.load`` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_unflatten

from acdc.errors import InputError
from acdc.runtime.plan import plain_shape
from acdc.runtime.program import Program
from acdc.runtime.segment import Segment, compute, lead_of, why_not
from acdc.runtime.whole import Whole

Structure = Any
"""How results lie in tuples, lists and dictionaries, as JSON: ``["tensor", 0]``,
``["tuple", [...]]``, ``["list", [...]]`` or ``["dict", [[key, ...], ...]]``."""


@dataclass(frozen=True)
class Input:
    """An argument of the network: its name, its sizes without the first one, and its dtype."""

    name: str
    sizes: tuple[int, ...]
    dtype: torch.dtype


class Frozen:
    """A network that is one program.

    Args:
        program: The program.
        inputs: The arguments of the network.
        sources: The argument of each input of the program.
        result: How the outputs of the program lie in the result.

    """

    in_torch: tuple[Any, ...] = ()

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Input],
        sources: Sequence[int],
        result: Structure,
    ) -> None:
        self.program, self.inputs = program, tuple(inputs)
        self.sources, self.result = tuple(sources), result

    @property
    def programs(self) -> list[Program]:
        """What the kernels compute."""
        return [self.program]

    @property
    def args(self) -> tuple[Tensor, ...]:
        """Arguments of one sample."""
        return tuple(torch.zeros(1, *i.sizes, dtype=i.dtype) for i in self.inputs)

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """No keywords."""
        return {}

    @property
    def outputs(self) -> Any:
        """The result for one sample, of tensors without values."""
        source, first = self.inputs[self.sources[0]], self.program.values[self.program.inputs[0]]
        lead = lead_of((1, *source.sizes), first)
        results = []
        for number in self.program.outputs:
            v = self.program.values[number]
            one_token = v.tokens and not v.is_sequence
            sizes = (*lead, v.channels) if one_token else plain_shape(1, v)
            results.append(torch.empty(sizes, dtype=self.program.dtype, device="meta"))
        return _built(self.result, results)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the network.

        Raises:
            InputError: The arguments are not those that it was frozen with.

        """
        given = self._bound(args, kwargs)
        read = [given[number] for number in self.sources]
        if (why := why_not(read, self.program)) is not None:
            raise InputError(
                f"{why[0].upper()}{why[1:]}. A frozen network takes the sizes and the dtype that "
                "it was frozen with, for any batch. Freeze it with another example."
            )
        return _built(self.result, compute(self.program, read))

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        names = [i.name for i in self.inputs]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        if len(args) + len(kwargs) != len(names) or sorted(given) != sorted(names):
            raise InputError(
                f"This network takes {names}, got {len(args)} arguments and the keywords "
                f"{sorted(kwargs)}."
            )
        for name, x in given.items():
            if not isinstance(x, Tensor) or x.dim() < 2:
                raise InputError(
                    f"{name} is a tensor with the batch first, got a {type(x).__name__}"
                    f"{f' of the sizes {tuple(x.shape)}' if isinstance(x, Tensor) else ''}."
                )
        return [given[name] for name in names]


def freeze(graph: fx.GraphModule, names: Sequence[str]) -> Frozen:
    """Return a traced network as one program.

    Args:
        graph: Its graph, with segments.
        names: Of its arguments, one for each placeholder.

    Raises:
        InputError: It is not one segment, and nothing else.

    """
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    segments = [graph.get_submodule(str(node.target)) for node in calls]
    if len(segments) != 1 or not isinstance(segments[0], Segment):
        raise InputError(
            f"A frozen file holds a network that is one connected program; this one has "
            f"{len(segments)}. Save its parts, each as a Runtime of its own."
        )
    segment, call = segments[0], calls[0]
    sources = [placeholders.index(call.args[number]) for number, _ in segment.sources]
    inputs = [
        Input(name, tuple(node.meta["tensor_meta"].shape[1:]), node.meta["tensor_meta"].dtype)
        for name, node in zip(names, placeholders, strict=True)
    ]
    return Frozen(
        segment.program, inputs, sources, _structure(graph.graph.output_node().args[0], call)
    )


def freeze_whole(whole: Whole, names: Sequence[str]) -> Frozen:
    """Return an exported network as one program.

    Args:
        whole: The network.
        names: Of its arguments, one for each tensor.

    Raises:
        InputError: Its results lie in something else than tuples, lists and dictionaries.

    """
    inputs = [
        Input(name, tuple(x.shape[1:]), x.dtype)
        for name, x in zip(names, whole.example.tensors, strict=True)
    ]
    leaves = [["tensor", number] for number in whole.returned]
    result = tree_unflatten([_Leaf(leaf) for leaf in leaves], whole.form)
    return Frozen(whole.program, inputs, whole.sources, _structure_of(result))


@dataclass(frozen=True)
class _Leaf:
    structure: Structure


def _structure_of(result: Any) -> Structure:
    if isinstance(result, _Leaf):
        return result.structure
    if isinstance(result, tuple | list) and type(result) in (tuple, list):
        return [type(result).__name__, [_structure_of(part) for part in result]]
    if isinstance(result, Mapping) and all(isinstance(key, str) for key in result):
        parts = [[key, _structure_of(part)] for key, part in result.items() if part is not None]
        return ["dict", parts]
    raise InputError(
        "A frozen file holds results that are tensors, in tuples, lists and dictionaries; this "
        f"network returns a {type(result).__name__}."
    )


def _structure(result: Any, call: fx.Node) -> Structure:
    """Return how the results of a segment lie in the result of a graph."""
    if result is call:
        return ["tensor", 0]
    if isinstance(result, fx.Node) and result.args and result.args[0] is call:
        return ["tensor", result.args[1]]
    if isinstance(result, tuple | list):
        kind = "tuple" if isinstance(result, tuple) else "list"
        return [kind, [_structure(part, call) for part in result]]
    if isinstance(result, dict) and all(isinstance(key, str) for key in result):
        return ["dict", [[key, _structure(part, call)] for key, part in result.items()]]
    raise InputError(
        f"A frozen file holds results that are tensors, in tuples, lists and dictionaries; this "
        f"network returns {result}."
    )


def check_structure(structure: Structure, outputs: int) -> None:
    """Raise unless a value of a file is a structure of so many outputs."""
    if not isinstance(structure, list) or len(structure) != 2:
        raise InputError("its result has no known form")
    kind, parts = structure
    if kind == "tensor":
        if type(parts) is not int or not 0 <= parts < outputs:
            raise InputError("its result names an output that it does not have")
        return
    if kind not in ("tuple", "list", "dict") or not isinstance(parts, list):
        raise InputError("its result has no known form")
    for part in parts:
        if kind == "dict":
            if not isinstance(part, list) or len(part) != 2 or not isinstance(part[0], str):
                raise InputError("its result has no known form")
            part = part[1]
        check_structure(part, outputs)


def _built(structure: Structure, results: Sequence[Tensor]) -> Any:
    kind, parts = structure
    if kind == "tensor":
        return results[parts]
    if kind == "dict":
        return {key: _built(part, results) for key, part in parts}
    built = [_built(part, results) for part in parts]
    return tuple(built) if kind == "tuple" else built
