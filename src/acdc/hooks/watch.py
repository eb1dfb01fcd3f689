"""Notice an optimizer whose steps are not seen, before the first step that is."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from acdc.errors import InputError


class Watch:
    """Watches the smallest weight until the first counted step.

    A weight that changes from one backward pass to the next, twice in a row, is stepped by
    somebody else: gradient accumulation changes no weight, and an optimizer that looks at two
    gradients for a step (SAM) changes it once. Values are compared, because a write through
    ``.data`` leaves no trace in the version of a tensor.

    Args:
        params: The prunable weights.
    """

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self._seen: Tensor | None = None
        self._changes = 0
        watched = [p for p in params if p.requires_grad and p.is_leaf]
        smallest = min(watched, key=lambda p: p.numel(), default=None)
        self._hook = (
            None if smallest is None else smallest.register_post_accumulate_grad_hook(self._look)
        )

    @torch.no_grad()
    def _look(self, param: Tensor) -> None:
        if self._seen is not None and not torch.equal(param.nan_to_num(), self._seen.nan_to_num()):
            self._changes += 1
        self._seen = param.detach().clone()
        if self._changes >= 2:
            self.stop()
            raise InputError(
                "The weights changed between three backward passes, and the optimizer that the "
                "sparsifier was given has taken no step. Something else steps them: give the "
                "sparsifier the optimizer whose step() changes the weights, and call that step() "
                "of the object and not a copy or a replacement of it."
            )

    def stop(self) -> None:
        """Watch no longer."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._seen = None
