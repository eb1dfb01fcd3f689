"""Which slots of a tape share memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from acdc.engine.layout import Halos, Shape
from acdc.engine.tape import Slot


class Grid(NamedTuple):
    """What buffers in one piece of memory have in common: the halos, which stay zero."""

    dtype: torch.dtype
    halos: Halos


@dataclass(eq=False)
class Piece:
    """A piece of memory. It can be held weakly, and is compared as an object."""

    data: Tensor


class Pieces:
    """Pieces of memory that are wanted, and the slots in each. These are never alive together.

    Args:
        by_block: Kernels may go block by block.

    Attributes:
        wanted: The grid and the size of each piece.
        given: The memory of each.

    """

    def __init__(self, by_block: bool) -> None:
        self.wanted: list[tuple[Grid, int]] = []
        self.given: list[Piece] = []
        self._by_block = by_block
        self._slots: list[list[tuple[Slot, Shape]]] = []  # of each piece

    def free(self, shape: Shape, slot: Slot) -> int | None:
        """Return the number of a piece that is free while the slot is alive, or None."""
        grid = Grid(shape.dtype, shape.halos)
        found = [
            (size, number)
            for number, (has, size) in enumerate(self.wanted)
            if has == grid
            and size >= shape.numel
            and all(self._part(slot, shape, *other) for other in self._slots[number])
        ]
        return min(found)[1] if found else None

    def put(self, shape: Shape, slot: Slot, number: int | None) -> int:
        """Put a slot into the piece of this number, or into a new one; return its number."""
        if number is None:
            number = len(self.wanted)
            self.wanted.append((Grid(shape.dtype, shape.halos), shape.numel))
            self._slots.append([])
        self._slots[number].append((slot, shape))
        return number

    def _part(self, slot: Slot, shape: Shape, other: Slot, of_other: Shape) -> bool:
        """Return whether two slots may have the same memory.

        Where kernels go block by block, one thread writes a block while another one still reads the
        block before it. Equal shapes have their blocks at the same places.
        """
        if not (other.last < slot.first or slot.last < other.first):
            return False
        return shape == of_other or not self._by_block or slot.groups.isdisjoint(other.groups)
