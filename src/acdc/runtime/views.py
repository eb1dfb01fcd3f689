"""Tensors of PyTorch as views of the values of a program.

A value has three axes: samples, channels and points. Each dimension of a tensor is a product of
pieces of axes. Reshaping, transposing and slicing change the view, and compute nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

BATCH = 1_000_003
"""Stands for the number of samples in sizes. It is prime, and no other size is a multiple of it."""


class Unknown(Exception):
    """The runtime cannot compute this. The message is a reason: a part of a sentence."""


Axis = Literal["samples", "channels", "points"]


@dataclass(frozen=True)
class Piece:
    """Every ``stride``-th index of an axis, ``size`` times."""

    axis: Axis
    size: int
    stride: int = 1


Dim = tuple[Piece, ...]
"""The pieces of a dimension, the slowest first. A dimension of size 1 has none."""

SAMPLES: Dim = (Piece("samples", BATCH),)


def channels(count: int) -> Dim:
    """Return a dimension of all channels of a value that has so many."""
    return _dim(Piece("channels", count))


def points(count: int, stride: int = 1) -> Dim:
    """Return a dimension of points of a value."""
    return _dim(Piece("points", count, stride))


def _dim(piece: Piece) -> Dim:
    return (piece,) if piece.size > 1 else ()


@dataclass(frozen=True)
class View:
    """A tensor.

    Args:
        value: The number of the value.
        dims: Its dimensions.
        channel, point: The first channel and the first point of the value that it holds.

    """

    value: int
    dims: tuple[Dim, ...]
    channel: int = 0
    point: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes, with ``BATCH`` for the number of samples."""
        return tuple(size_of(dim) for dim in self.dims)

    def pieces(self, axis: Axis) -> list[Piece]:
        """Return the pieces of an axis, in the order of the dimensions."""
        return [piece for dim in self.dims for piece in dim if piece.axis == axis]

    def extent(self, axis: Axis) -> int:
        """Return how many neighbouring indices of an axis it holds.

        Raises:
            Unknown: They are not neighbours, or some appear twice.

        """
        count = 1
        for piece in sorted(self.pieces(axis), key=lambda piece: piece.stride):
            if piece.stride != count:
                raise Unknown(f"a part of the {axis} that is not connected")
            count *= piece.size
        return count

    # --- what changes the view --------------------------------------------------------------------

    def reshape(self, shape: Sequence[int]) -> View:
        """Return it with other sizes, whose product is the same."""
        left = [piece for dim in self.dims for piece in dim]
        dims = []
        for size in shape:
            dim: list[Piece] = []
            while size > 1:
                if not left:
                    raise Unknown(f"a reshape from {self.shape} to {tuple(shape)}")
                piece = left.pop(0)
                if piece.size > size:
                    if piece.size % size:
                        raise Unknown(f"a reshape from {self.shape} to {tuple(shape)}")
                    rest = piece.size // size
                    left.insert(0, replace(piece, size=rest))
                    piece = replace(piece, size=size, stride=piece.stride * rest)
                if size % piece.size:
                    raise Unknown(f"a reshape from {self.shape} to {tuple(shape)}")
                size //= piece.size
                dim.append(piece)
            dims.append(_merged(dim))
        if left:
            raise Unknown(f"a reshape from {self.shape} to {tuple(shape)}")
        return replace(self, dims=tuple(dims))

    def permute(self, order: Sequence[int]) -> View:
        """Return it with its dimensions in another order."""
        return replace(self, dims=tuple(self.dims[d] for d in order))

    def unsqueeze(self, dim: int) -> View:
        """Return it with one more dimension, of size 1."""
        dim %= len(self.dims) + 1
        return replace(self, dims=(*self.dims[:dim], (), *self.dims[dim:]))

    def without(self, dim: int) -> View:
        """Return it without a dimension of size 1."""
        dim %= len(self.dims)
        if self.dims[dim]:
            raise Unknown("a squeeze of a dimension that is larger than 1")
        return replace(self, dims=(*self.dims[:dim], *self.dims[dim + 1 :]))

    def narrow(self, dim: int, start: int, length: int) -> View:
        """Return some neighbouring indices of a dimension."""
        dim %= len(self.dims)
        if (start, length) == (0, size_of(self.dims[dim])):
            return self
        if length < 1:
            raise Unknown("an empty tensor")
        (piece,) = self.dims[dim] if len(self.dims[dim]) == 1 else (None,)
        if piece is None or piece.axis == "samples":
            raise Unknown("a slice of samples, or of several axes at once")
        new = _dim(replace(piece, size=length))
        dims = (*self.dims[:dim], new, *self.dims[dim + 1 :])
        if piece.axis == "channels":
            return replace(self, dims=dims, channel=self.channel + start * piece.stride)
        return replace(self, dims=dims, point=self.point + start * piece.stride)

    def select(self, dim: int, index: int) -> View:
        """Return one index of a dimension, without the dimension."""
        return self.narrow(dim, index, 1).without(dim)


def size_of(dim: Dim) -> int:
    """Return the size of a dimension."""
    return prod(piece.size for piece in dim)


def axes_of(dim: Dim) -> set[Axis]:
    """Return the axes of a dimension."""
    return {piece.axis for piece in dim}


def _merged(pieces: Sequence[Piece]) -> Dim:
    """Return the pieces of a dimension; neighbours on one axis become one."""
    merged: list[Piece] = []
    for piece in pieces:
        before = merged[-1] if merged else None
        if (
            before is not None
            and before.axis == piece.axis
            and before.stride == piece.stride * piece.size
        ):
            piece = replace(piece, size=before.size * piece.size)
            merged.pop()
        merged.append(piece)
    return tuple(merged)
