"""Which nodes of a traced graph form a segment."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import fx, nn
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner, Partition
from torch.fx.passes.operator_support import OperatorSupportBase

from acdc.engine.graph import (
    TO_FIRST,
    TO_LAST,
    ConvSpec,
    Kind,
    PermuteSpec,
    Recognised,
    inputs_of,
    shape_of,
)

PREFIX = "segment_"


def segments_of(
    graph: fx.GraphModule, recognised: Mapping[fx.Node, Recognised], chosen: Collection[fx.Node]
) -> list[Partition]:
    """Return the segments that the chosen nodes form, each with at least one layer."""
    proposed = _partitioner(graph, chosen).propose_partitions()
    parts = [part for whole in proposed for part in _connected(whole, recognised)]
    return [part for part in parts if layers_of(part, recognised)]


def layers_of(segment: Partition, recognised: Mapping[fx.Node, Recognised]) -> list[fx.Node]:
    """Return the convolutions and linear layers of a segment."""
    return [node for node in segment.nodes if isinstance(recognised[node].spec, ConvSpec)]


def ends_of(segment: Partition, recognised: Mapping[fx.Node, Recognised]) -> Mapping[fx.Node, Kind]:
    """Return the tensors that a segment converts, and how the layout holds each.

    A tensor that is read several times is converted once.
    """
    ends: dict[fx.Node, Kind] = {}
    for node in segment.nodes:
        what = recognised[node]
        outside = [n for n in inputs_of(node, what.spec) if n not in segment.nodes]
        ends |= dict.fromkeys(outside, what.reads)
        if any(user not in segment.nodes for user in node.users):
            ends[node] = what.kind
    return ends


def samples_of(node: fx.Node, kind: Kind) -> int:
    """Return the number of samples, or of tokens, of a node's tensor."""
    shape = shape_of(node)
    assert shape is not None
    return int(torch.Size(shape[:-1]).numel()) if kind == "tokens" else shape[0]


def fuse(
    graph: fx.GraphModule,
    recognised: Mapping[fx.Node, Recognised],
    segments: list[Partition],
) -> dict[str, fx.GraphModule]:
    """Move the nodes of each segment into a module of its own; return these by name."""
    recognised = dict(recognised)
    for segment in segments:
        _images_at_ends(graph, recognised, segment)
    for node, what in recognised.items():
        node.meta["engine"] = what
    _partitioner(graph, recognised).fuse_partitions(segments, prefix=PREFIX)
    fused = {}
    for name, plain in graph.named_children():
        if name.startswith(PREFIX):
            assert isinstance(plain, fx.GraphModule)
            fused[name] = plain
    return fused


def _images_at_ends(
    graph: fx.GraphModule, recognised: dict[fx.Node, Recognised], segment: Partition
) -> None:
    """Make images of the pixels that a segment reads or returns.

    PyTorch moves the dimensions outside of the segment, and inside that is nothing.
    """
    inside = set(segment.nodes)
    read: dict[fx.Node, fx.Node] = {}  # pixels -> the same inside
    for node in list(segment.nodes):
        what = recognised[node]
        if what.reads != "pixels":
            continue
        for source in inputs_of(node, what.spec):
            if source in inside:
                continue
            if source not in read:
                images = _permuted(graph, source, False, node)
                read[source] = _permuted(graph, images, True, node)
                recognised[read[source]] = Recognised(PermuteSpec(True), "pixels", "images")
                segment.add_node(read[source])
            node.replace_input_with(source, read[source])
    for node in list(segment.nodes):
        readers = [user for user in node.users if user not in inside and user not in read.values()]
        if recognised[node].kind != "pixels" or not readers:
            continue
        images = _permuted(graph, node, False, node.next)
        pixels = _permuted(graph, images, True, images.next)
        recognised[images] = Recognised(PermuteSpec(False), "images", "pixels")
        segment.add_node(images)
        for reader in readers:
            reader.replace_input_with(node, pixels)


def _permuted(graph: fx.GraphModule, node: fx.Node, last: bool, before: fx.Node) -> fx.Node:
    """Return a new node that moves the channels of ``node`` last, or first again."""
    order = TO_LAST if last else TO_FIRST
    with graph.graph.inserting_before(before):
        new = graph.graph.call_function(torch.permute, (node, order))
    meta = node.meta["tensor_meta"]
    shape = torch.Size(meta.shape[d] for d in order)
    new.meta["tensor_meta"] = meta._replace(shape=shape)
    return new


class _Supported(OperatorSupportBase):
    """The nodes that may be part of a segment."""

    def __init__(self, nodes: Collection[fx.Node]) -> None:
        self.nodes = nodes

    def is_node_supported(self, submodules: Mapping[str, nn.Module], node: fx.Node) -> bool:
        return node in self.nodes


def _partitioner(graph: fx.GraphModule, nodes: Collection[fx.Node]) -> CapabilityBasedPartitioner:
    return CapabilityBasedPartitioner(graph, _Supported(nodes), allows_single_node_partition=True)


def _connected(proposed: Partition, recognised: Mapping[fx.Node, Recognised]) -> list[Partition]:
    """Split a partition into parts that have no tensor in common.

    The parts may differ in batch size and dtype. If one cannot run on the kernels, the others can.
    """
    parts: list[tuple[set[tuple[fx.Node, bool]], list[fx.Node]]] = []
    for node in proposed.nodes:
        if node not in recognised:  # an index, which torch.fx moves to the node that it reads
            continue
        what = recognised[node]
        # A tensor that one node reads as images and another as tokens is converted twice anyway.
        tensors = {(tensor, what.reads == "tokens") for tensor in inputs_of(node, what.spec)}
        tensors.add((node, what.kind == "tokens"))
        nodes = [node]
        for part in [part for part in parts if part[0] & tensors]:
            parts.remove(part)
            tensors |= part[0]
            nodes = [*part[1], *nodes]
        parts.append((tensors, nodes))
    return [Partition(id=i, nodes=nodes) for i, (_, nodes) in enumerate(parts)]
