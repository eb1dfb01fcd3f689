"""Gradients that the kernels wrote. They are known to be zero outside of the support."""

from __future__ import annotations

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

LARGE = 2**16  # elements. With fewer, a call costs as much as its elements


class KernelGradients:
    """The weight gradients that the kernels wrote, and how many of their elements are not zero."""

    def __init__(self) -> None:
        self._noted: dict[int, tuple[StorageWeakRef, int, int]] = {}

    def note(self, key: int, grad: Tensor, nnz: int) -> None:
        """Remember a gradient that is zero except for the elements that the kernels wrote.

        Args:
            key: The id of the parameter.
            grad: Its gradient.
            nnz: How many elements were written.

        """
        # The address of a storage is not reused while a weak reference to it lives.
        ref = StorageWeakRef(grad.untyped_storage())
        self._noted[key] = (ref, grad._version, nnz)

    def all_of(self, param: Tensor, kept: int) -> bool:
        """Return whether the gradient of ``param`` is still the one that was noted last.

        It must have ``kept`` written elements, and nothing may have been added to it. The answer is
        given once, when the gradient is accumulated.
        """
        ref, version, nnz = self._noted.pop(id(param), (None, 0, 0))
        grad = param.grad
        return (
            ref is not None
            and grad is not None
            and nnz == kept
            and grad._version == version
            and StorageWeakRef(grad.untyped_storage()) == ref
        )
