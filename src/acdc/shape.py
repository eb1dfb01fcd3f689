"""Shapes of weights, with the axes along which they are multiplied.

A linear layer of PyTorch holds ``[outputs, inputs]``, a convolution ``[outputs, inputs, kernel]``.
Other layers hold the two the other way round, or several matrices in one tensor. A pattern that
groups weights (N:M, blocks) and the ERK rule must know which axis is which.

>>> Shape((6, 8)).fans, Shape((6, 8), stack=3).fans, Shape((5, 6, 8), outputs=1, inputs=2).fans
(14, 30, 70)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor


class Shape(tuple[int, ...]):
    """The shape of a weight. It compares equal to the plain tuple.

    Args:
        sizes: The size of every axis.
        outputs: The axis of the output channels.
        inputs: The axis of the input channels, over which a layer sums. ``None``: not known.
        groups: Equal parts of the axis of inputs that are summed apart (transposed convolutions).
        output_groups: Equal parts of the axis of outputs that are summed over different inputs
            (convolutions).
        stack: Equal parts of axis 0 that are matrices of their own: the gates of an LSTM, or the
            projections of queries, keys and values. An axis 0 that holds neither outputs nor inputs
            holds as many matrices as it is long: the experts of a mixture.
    """

    outputs: int
    inputs: int | None
    groups: int
    output_groups: int
    stack: int

    def __new__(
        cls,
        sizes: Iterable[int],
        *,
        outputs: int = 0,
        inputs: int | None = 1,
        groups: int = 1,
        output_groups: int = 1,
        stack: int = 1,
    ) -> Shape:
        """Make the tuple, and set the fields."""
        shape = super().__new__(cls, sizes)
        shape.outputs, shape.inputs = outputs, inputs
        shape.groups, shape.output_groups, shape.stack = groups, output_groups, stack
        return shape

    @classmethod
    def of(cls, sizes: Iterable[int]) -> Shape:
        """Return a plain shape as that of a linear layer or a convolution; others as they are."""
        return sizes if isinstance(sizes, Shape) else cls(sizes)

    @property
    def output_channels(self) -> int:
        """Output channels of one matrix."""
        return self[self.outputs] // self.stack

    @property
    def group_outputs(self) -> int:
        """Output channels of one matrix that are summed over the same inputs."""
        return self.output_channels // self.output_groups

    @property
    def input_channels(self) -> int:
        """Input channels that are summed together."""
        assert self.inputs is not None
        return self[self.inputs] // self.groups

    @property
    def fans(self) -> int:
        """The sum of the dimensions of a matrix or kernel, over all that are stacked here."""
        if 0 not in (self.outputs, self.inputs):
            return self[0] * sum(self[1:])
        return self.stack * (self[0] // self.stack + sum(self[1:]))

    def in_blocks(self, rows: int, columns: int) -> Shape:
        """Return the shape counted in blocks of so many outputs and inputs."""
        assert self.inputs is not None
        sizes = list(self)
        sizes[self.outputs] //= rows
        sizes[self.inputs] //= columns
        return Shape(
            sizes,
            outputs=self.outputs,
            inputs=self.inputs,
            groups=self.groups,
            output_groups=self.output_groups,
            stack=self.stack,
        )


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Return the shapes of tensors by name, with the axes that the mapping knows."""
    known: Mapping[str, tuple[int, ...]] = getattr(tensors, "shapes", {})
    return {
        name: Shape.of(known[name] if name in known else tensors[name].shape) for name in tensors
    }
