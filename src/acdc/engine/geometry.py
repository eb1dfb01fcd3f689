"""The sizes of a sparse layer, and the halo that its buffers need."""

from __future__ import annotations

from dataclasses import dataclass

from acdc.errors import InputError

Size2 = tuple[int, int]  # rows, columns


@dataclass(frozen=True)
class ConvGeometry:
    """The sizes of a convolution with zero padding, as in ``torch.nn.Conv2d``.

    A linear layer is a convolution with a 1x1 kernel over tokens.
    """

    in_channels: int
    out_channels: int
    kernel: Size2
    stride: Size2 = (1, 1)
    padding: Size2 = (0, 0)
    dilation: Size2 = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        if min(self.in_channels, self.out_channels, *self.kernel, *self.stride, *self.dilation) < 1:
            raise InputError(f"Sizes of a convolution are at least 1, got {self}.")
        if min(self.padding) < 0:
            raise InputError(f"Padding cannot be negative, got {self.padding}.")
        if self.groups < 1 or self.in_channels % self.groups or self.out_channels % self.groups:
            raise InputError(
                f"groups={self.groups} must divide {self.in_channels} input and "
                f"{self.out_channels} output channels."
            )

    @staticmethod
    def linear(in_features: int, out_features: int) -> ConvGeometry:
        """Return the geometry of a linear layer."""
        return ConvGeometry(in_features, out_features, (1, 1))

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """The shape of the dense weight."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    def out_size(self, height: int, width: int) -> Size2:
        """Return the output's height and width.

        Raises:
            InputError: the kernel is larger than the padded input.

        """
        rows, columns = (self._out_size(axis, size) for axis, size in enumerate((height, width)))
        if rows < 1 or columns < 1:
            raise InputError(
                f"A kernel of {self.kernel} with dilation {self.dilation} does not fit into an "
                "input of "
                f"{height}x{width} with padding {self.padding}."
            )
        return rows, columns

    def _out_size(self, axis: int, size: int) -> int:
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (size + 2 * self.padding[axis] - reach) // self.stride[axis] + 1

    @property
    def halo(self) -> int:
        """The halo that the input's buffer needs."""
        return max(self.padding)

    def grad_halo(self, height: int, width: int) -> int:
        """Return the halo that the output gradient's buffer needs, for an input of this size."""
        return max(self._grad_halo(0, height), self._grad_halo(1, width))

    def _grad_halo(self, axis: int, size: int) -> int:
        # Input pixel i gets its gradient from the output pixels
        # (i + padding - tap * dilation) / stride.
        stride, padding = self.stride[axis], self.padding[axis]
        reach = self.dilation[axis] * (self.kernel[axis] - 1)
        before = -((padding - reach) // stride)
        after = (size - 1 + padding) // stride - (self._out_size(axis, size) - 1)
        return max(before, after, 0)
