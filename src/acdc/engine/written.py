"""Gradients that the kernels wrote, and are known to be zero outside the support."""

from __future__ import annotations

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

LARGE = 2**16  # elements; below, the calls cost as much as the elements


class Written:
    """Gradients that the kernels wrote, and what of them."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[StorageWeakRef, int, int]] = {}

    def note(self, key: int, grad: Tensor, nnz: int) -> None:
        """Remember that ``grad`` was made for the parameter of this id: zeros, and ``nnz`` elements
        written.
        """
        ref = StorageWeakRef(grad.untyped_storage())  # its address is not used again while it lives
        self._of[key] = (ref, grad._version, nnz)

    def all_of(self, param: Tensor, kept: int) -> bool:
        """Return whether the gradient of ``param`` is what was noted last, nothing added, with
        ``kept`` elements written. Ask once, when it is accumulated.
        """
        ref, version, nnz = self._of.pop(id(param), (None, 0, 0))
        grad = param.grad
        return (
            ref is not None
            and grad is not None
            and nnz == kept
            and grad._version == version
            and StorageWeakRef(grad.untyped_storage()) == ref
        )
