"""Calls of the runtime's kernels, from operations and buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from acdc.engine import native
from acdc.engine.layout import allocate
from acdc.engine.native import NativeCall
from acdc.runtime.lists import Cut, IndexList
from acdc.runtime.points import Buffer
from acdc.runtime.program import (
    ACTIVATIONS,
    Attention,
    Conv,
    Embed,
    Gate,
    Join,
    Map,
    Norm,
    Planes,
    Pool,
    Value,
)


class Calls:
    """Makes the calls of one instruction set.

    Args:
        isa: The name of the instruction set.
        dtype: Of all numbers.
        threads: How many threads a call runs on.

    """

    def __init__(self, isa: str, dtype: torch.dtype, threads: int) -> None:
        self.isa, self.dtype, self.threads = isa, dtype, threads
        self.lanes = native.lanes_of(isa)

    def _call(self, kernel: str, *held: object, **fields: Any) -> NativeCall:
        name = "points_copy" if kernel in ("points_load", "points_store") else kernel
        args = native.struct(f"{name}_args", {**fields, "threads": self.threads})
        return native.point_call(self.isa, kernel, self.dtype == torch.float64, args, held)

    def conv(
        self,
        op: Conv,
        entries: IndexList,
        cut: Cut,
        x: Buffer,
        out: Buffer,
        residual: Buffer | None,
    ) -> NativeCall:
        """Return the call of a convolution."""
        fields: dict[str, Any] = {} if residual is None else {"residual": _points(residual)}
        bias = _vector(op.bias, self.dtype)
        # Channels of a tile follow each other, unless planes or groups lie between them.
        follow = x.channels == op.geometry.in_channels and op.geometry.groups == 1
        return self._call(
            "points_conv",
            entries, x, out, residual, bias,
            x=_points(x), y=_points(out), groups=entries.groups, tiles=entries.tiles,
            parts=entries.parts, channel=entries.channel, begin=entries.begin,
            entries=entries.entries, bias=bias, uniform=cut.uniform, vectors=cut.vectors,
            tile_channels=cut.channels if follow else 0,
            activation=ACTIVATIONS.index(op.activation), **fields,
        )  # fmt: skip

    def dense(
        self, op: Conv, weight: Tensor, x: Buffer, out: Buffer, residual: Buffer | None
    ) -> NativeCall:
        """Return the call of a linear layer that keeps all weights, for images of one pixel.

        Args:
            op: The layer.
            weight: ``[out, in]``, in rows of whole registers.
            x, out, residual: What is read and written.

        """
        fields: dict[str, Any] = {} if residual is None else {"residual": _points(residual)}
        bias, size = _vector(op.bias, self.dtype), weight.shape[1]
        (workspace,) = allocate([x.grid.samples * size], self.dtype)
        return self._call(
            "points_dense",
            x, out, residual, bias, weight, workspace,
            x=_points(x), y=_points(out), weight=weight, bias=bias, size=size, workspace=workspace,
            activation=ACTIVATIONS.index(op.activation), **fields,
        )  # fmt: skip

    def planes(self, op: Planes, x: Buffer, out: Buffer) -> NativeCall:
        """Return the call that makes the planes of a stride."""
        rows, columns = (
            torch.tensor(axis, dtype=torch.int32) for axis in zip(*op.phases, strict=True)
        )
        return self._call(
            "points_planes",
            x, out, rows, columns,
            x=_points(x), planes=_points(out), phase_row=rows, phase_column=columns,
            phases=len(op.phases), first_row=op.first[0], first_column=op.first[1],
            rows=op.size[0], columns=op.size[1], row_step=op.stride[0], column_step=op.stride[1],
        )  # fmt: skip

    def map(self, op: Map, x: Buffer, y: Buffer | None, out: Buffer) -> NativeCall:
        """Return the call of an operation that works number by number."""
        fields: dict[str, Any] = {} if y is None else {"b": _points(y)}
        scale, offset = _vector(op.scale, self.dtype), _vector(op.offset, self.dtype)
        return self._call(
            "points_map",
            x, y, out, scale, offset,
            a=_points(x), out=_points(out), scale=scale, offset=offset, multiply=op.multiply,
            activation=ACTIVATIONS.index(op.activation), **fields,
        )  # fmt: skip

    def gate(self, op: Gate, x: Buffer, gate: Buffer, out: Buffer) -> NativeCall:
        """Return the call of a gate."""
        return self._call(
            "points_gate", x, gate, out, x=_points(x), gate=_points(gate), out=_points(out)
        )

    def norm(self, op: Norm, x: Buffer, out: Buffer) -> NativeCall:
        """Return the call of a LayerNorm."""
        weight, bias = _vector(op.weight, self.dtype), _vector(op.bias, self.dtype)
        return self._call(
            "points_norm",
            x, out, weight, bias,
            x=_points(x), out=_points(out), weight=weight, bias=bias, eps=op.eps,
            centered=op.centered,
        )  # fmt: skip

    def pool(self, op: Pool, x: Buffer, out: Buffer) -> NativeCall:
        """Return the call of a pooling."""
        room = x.grid.width + 2 * op.padding[1]
        rows = torch.empty(self.threads * room, dtype=self.dtype)
        return self._call(
            "points_pool",
            x, out, rows,
            x=_points(x), y=_points(out), maximum=op.maximum, window_rows=op.window[0],
            window_columns=op.window[1], row_step=op.stride[0], column_step=op.stride[1],
            row_padding=op.padding[0], column_padding=op.padding[1],
            count_padding=op.count_padding, workspace=rows,
        )  # fmt: skip

    def join(self, op: Join, buffers: Sequence[Buffer], out: Buffer) -> NativeCall:
        """Return the call that copies parts of values into one."""
        rows = []
        for part in op.parts:
            x = buffers[part.x]
            origin = x.address + part.channel * x.grid.channel * x.memory.element_size()
            rows.append((
                origin, x.grid.channel, x.grid.sample, x.grid.row, x.grid.width, part.point,
                part.channels, part.points, part.to_channel, part.to_point,
            ))  # fmt: skip
        parts = torch.tensor(rows, dtype=torch.int64)
        table = _vector(op.table, self.dtype)
        sources = [buffers[number] for number in op.reads]
        fill = not op.covers(Value(out.channels, out.grid.height, out.grid.width))
        return self._call(
            "points_join",
            sources, out, parts, table,
            out=_points(out), parts=parts, table=table, count=len(rows), fill=fill,
        )  # fmt: skip

    def embed(self, op: Embed, x: Buffer, out: Buffer) -> NativeCall:
        """Return the call that reads rows of a table."""
        table = _vector(op.table, self.dtype)
        return self._call(
            "points_embed",
            x, out, table,
            ids=_points(x), out=_points(out), table=table, rows=op.table.shape[0],
        )  # fmt: skip

    def attention(self, op: Attention, buffers: Sequence[Buffer], out: Buffer) -> NativeCall:
        """Return the call of an attention."""
        queries, keys, values = (buffers[number] for number in (op.x, op.keys, op.values))
        mask = None if op.mask is None else buffers[op.mask]
        scores = torch.empty(
            self.threads * native.most_queries() * keys.grid.width, dtype=self.dtype
        )
        fields: dict[str, Any] = {} if mask is None else {"mask": _points(mask)}
        size, value_size = op.heads * op.size, op.heads * op.value_size
        return self._call(
            "points_attention",
            queries, keys, values, out, mask, scores,
            queries=_points(queries, op.first[0], size), keys=_points(keys, op.first[1], size),
            values=_points(values, op.first[2], value_size), out=_points(out), heads=op.heads,
            causal=op.causal, scale=op.scale, workspace=scores, **fields,
        )  # fmt: skip

    def copy(self, kernel: str, buffer: Buffer) -> NativeCall:
        """Return the call of ``points_load`` or ``points_store``, without the plain tensor."""
        return self._call(kernel, buffer, points=_points(buffer))


def direct(call: NativeCall, plain: Tensor) -> None:
    """Let a copy read or write this tensor of any strides.

    Args:
        call: The copy.
        plain: ``[N, C, H, W]``, ``[tokens, C]`` or ``[N, tokens, C]``.

    """
    args, strides = call.args, plain.stride()
    args.data = plain.data_ptr()
    if len(strides) == 3:
        args.sample, args.column, args.channel = strides
        args.row = 0
        return
    args.sample, args.channel = strides[0], strides[1]
    args.row, args.column = strides[2:] if len(strides) == 4 else (0, 0)


def _points(buffer: Buffer, first: int = 0, channels: int | None = None) -> Any:
    """Return a buffer, or some of its channels, for a kernel."""
    grid = buffer.grid
    return native.struct(
        "Points",
        {
            "origin": buffer.address + first * grid.channel * buffer.memory.element_size(),
            "channel": grid.channel,
            "sample": grid.sample,
            "row": grid.row,
            "channels": buffer.channels if channels is None else channels,
            "samples": grid.samples,
            "height": grid.height,
            "width": grid.width,
            "live": buffer.live,
        },
    )


def _vector(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if vector is None else vector.detach().to(dtype).contiguous()


def sequence(calls: Sequence[NativeCall]) -> Any:
    """Return the calls as one, which runs them in order."""
    return native.point_sequence(calls)
