"""Zeros outside the support of many weights on a GPU, by one launch for all of them.

A launch for each weight costs a few microseconds of the CPU's time, and more than the memory
traffic of a small weight. Where the kernel cannot run, each weight has its own launch.
"""

from __future__ import annotations

import importlib.util
import logging
from collections import defaultdict
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)

DEVICES = ("cuda",)
BLOCK = 4096  # elements of one program of the kernel
_TABLES = 8  # several optimizers have a table each

_Pair = tuple[Tensor, Tensor]


class Flat:
    """Clears tensors by their masks, all of one device and element size by one launch.

    A launch reads a table of pointers on the device. The table is made anew when tensors or masks
    lie elsewhere than before; otherwise nothing is copied, and nothing waits for the device.
    """

    def __init__(self) -> None:
        self._tables: dict[tuple[tuple[int, int, int], ...], _Table] = {}

    def takes(self, tensor: Tensor, kept: Tensor) -> bool:
        """Return whether ``clear`` can clear this tensor.

        Args:
            tensor: Any tensor.
            kept: bool, of its shape.
        """
        return (
            tensor.device.type in DEVICES
            and type(tensor) in (Tensor, torch.nn.Parameter)
            and tensor.layout == torch.strided
            and tensor.element_size() in (1, 2, 4, 8)
            and not tensor.is_neg()  # zero bits are read as -0.0 there
            and not (torch.is_grad_enabled() and tensor.requires_grad)
            and kept.device == tensor.device
            and kept.stride() == tensor.stride()
            and _has_no_gaps(tensor)
            and runs_on(tensor.device)
        )

    def clear(self, pairs: Iterable[_Pair]) -> None:
        """Set tensors to +0.0 where their masks are False, in place.

        Args:
            pairs: Tensors that :meth:`takes` takes, each with its mask.
        """
        groups: dict[tuple[torch.device, int], list[_Pair]] = defaultdict(list)
        for tensor, kept in pairs:
            if tensor.numel():
                groups[tensor.device, tensor.element_size()].append((tensor, kept))
        for group in groups.values():
            self._table(group).clear()
            for tensor, _ in group:
                torch.autograd.graph.increment_version(tensor)

    def _table(self, pairs: list[_Pair]) -> _Table:
        key = tuple((t.data_ptr(), kept.data_ptr(), t.numel()) for t, kept in pairs)
        if key not in self._tables:
            if len(self._tables) == _TABLES:
                self._tables.clear()
            self._tables[key] = _Table(pairs)
        return self._tables[key]


class _Table:
    """Pointers to tensors of one device and element size and to their masks, on the device.

    Args:
        pairs: The tensors, none of them empty, each with its mask.
    """

    def __init__(self, pairs: list[_Pair]) -> None:
        first = pairs[0][0]
        self._device, self._bits = first.device, 8 * first.element_size()
        blocks = [(i, at) for i, (t, _) in enumerate(pairs) for at in range(0, t.numel(), BLOCK)]
        self._columns = [
            self._on_device(column)
            for column in (
                [tensor.data_ptr() for tensor, _ in pairs],
                [kept.data_ptr() for _, kept in pairs],
                [tensor.numel() for tensor, _ in pairs],
                [i for i, _ in blocks],
                [at for _, at in blocks],
            )
        ]
        self._blocks = len(blocks)

    def clear(self) -> None:
        """Write the zeros."""
        from acdc.hooks.flat_kernel import clear_pruned

        with torch.cuda.device_of(self._columns[0]):
            clear_pruned[(self._blocks,)](*self._columns, BITS=self._bits, BLOCK=BLOCK)

    def _on_device(self, numbers: list[int]) -> Tensor:
        # Pinned memory is copied without waiting for the device, and reused only after the copy.
        column = torch.tensor(numbers, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        return column.to(self._device, non_blocking=True)


@cache
def runs_on(device: torch.device) -> bool:
    """Return whether the kernel runs on a device: it is tried once.

    It needs Triton, which PyTorch's builds for CUDA bring, and Triton needs a C compiler.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    tensor, kept = torch.ones(2, device=device), torch.tensor([True, False], device=device)
    try:
        _Table([(tensor, kept)]).clear()
    except Exception as error:  # whatever it is, training goes on without
        log.warning("Triton does not run, so each weight is cleared by a launch: %s", error)
        return False
    return tensor.tolist() == [1.0, 0.0]


def _has_no_gaps(tensor: Tensor) -> bool:
    """Return whether the elements of a tensor fill the memory between its first and its last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps) == tensor.numel()
