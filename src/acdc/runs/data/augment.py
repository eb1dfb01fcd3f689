"""Random crops and flips of a whole batch at once.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from acdc.errors import InputError


def crop(images_NCHW: Tensor, top_N: Tensor, left_N: Tensor, padding: int) -> Tensor:
    """Pad every image with ``padding`` zeros on each side and cut a window of the old size.

    Args:
        images_NCHW: Images of any dtype.
        top_N: First row of each window in the padded image, int64 in ``[0, 2 * padding]``.
        left_N: First column of each window, int64 in ``[0, 2 * padding]``.
        padding: Zeros on each side, in pixels.

    Returns:
        New images of the same shape and dtype.
    """
    n, _, height, width = images_NCHW.shape
    padded = F.pad(images_NCHW, (padding,) * 4)
    # All windows of all images as a view of the padded batch; one index picks a window of each.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(n, device=top_N.device), :, top_N, left_N]


def flip(images_NCHW: Tensor, mirrored_N: Tensor) -> Tensor:
    """Mirror the images for which ``mirrored_N`` (bool) is true from left to right."""
    return torch.where(mirrored_N[:, None, None, None], images_NCHW.flip(3), images_NCHW)


@dataclass(frozen=True)
class Augment:
    """A random crop after zero padding, and a random horizontal flip.

    Drawing random numbers and using them are separate, so that each of several ranks can draw for
    the whole global batch and apply its own share.

    Args:
        padding: Zeros added on each side before the crop, in pixels; 0 means no crop.
        flip: Whether each image is mirrored with probability one half.

    Raises:
        InputError: The padding is negative.
    """

    padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise InputError(
                f"The padding of a random crop is {self.padding}. Give the number of pixels on "
                f"each side, 0 or more; 0 means no crop."
            )

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw for ``count`` images: int64 ``[count, 3]`` of top, left, mirrored (0 or 1)."""
        top_left = torch.randint(0, 2 * self.padding + 1, (count, 2), generator=generator)
        mirrored = torch.randint(0, 2, (count, 1), generator=generator)
        return torch.cat([top_left, mirrored], dim=1)

    def apply(self, images_NCHW: Tensor, drawn: Tensor) -> Tensor:
        """Return the augmented images; row i of ``drawn`` (see ``draw``) belongs to image i."""
        if self.padding:
            images_NCHW = crop(images_NCHW, drawn[:, 0], drawn[:, 1], self.padding)
        if self.flip:
            images_NCHW = flip(images_NCHW, drawn[:, 2].bool())
        return images_NCHW
