"""Sizes that a forward reads of tokens, without the tokens.

A size is read from a stand-in without memory, so that a segment does not have to return a tensor
that only its shape is read of. Numbers of dimensions need no stand-in: the trace knows them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from acdc.engine.graph import (
    ConcatSpec,
    ConvSpec,
    LayerNormSpec,
    Recognised,
    inputs_of,
    shape_of,
)

_ATTRIBUTES = ("shape", "dtype", "device")
_METHODS = ("size", "dim", "ndimension", "numel")


def read_from_stand_ins(graph: fx.GraphModule, recognised: Mapping[fx.Node, Recognised]) -> None:
    """Let what reads the shape of tokens read it from a stand-in.

    Layers, normalisations and pointwise operations over tokens leave all dimensions but the last
    one as they are. So the sizes are those of the tensor that the first of them reads.

    Args:
        graph: Its nodes know their shapes; changed in place.
        recognised: What its nodes are.

    """
    for node, what in recognised.items():
        readers = [user for user in node.users if _reads_shape(user)]
        if what.kind != "tokens" or not readers:
            continue
        source, channels = _source_of(node, recognised)
        if source is node:
            continue
        with graph.graph.inserting_before(node):
            stand_in = graph.graph.call_function(like_tokens, (source, channels))
        for reader in readers:
            reader.replace_input_with(node, stand_in)


def like_tokens(source: Tensor, channels: int | None) -> Tensor:
    """Return a tensor without memory of its own, with the sizes of tokens.

    Args:
        source: ``[..., any]``, of the same dtype and on the same device.
        channels: The last size; ``None``: that of ``source``.

    """
    return source.new_empty(()).expand(*source.shape[:-1], channels or source.shape[-1])


def _reads_shape(node: fx.Node) -> bool:
    """Return whether a node reads no values of its first argument, and has no other tensors."""
    if len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _ATTRIBUTES
    return node.op == "call_method" and node.target in _METHODS


def _source_of(
    node: fx.Node, recognised: Mapping[fx.Node, Recognised]
) -> tuple[fx.Node, int | None]:
    """Return the tensor from which the sizes of tokens can be read, and their last size if another.

    The last size is known where a layer fixes it.
    """
    channels: int | None = None
    while (what := recognised.get(node)) is not None and what.reads == what.kind == "tokens":
        if channels is None and isinstance(what.spec, ConvSpec | LayerNormSpec | ConcatSpec):
            shape = shape_of(node)
            assert shape is not None
            channels = shape[-1]
        node = inputs_of(node, what.spec)[0]
    return node, channels
