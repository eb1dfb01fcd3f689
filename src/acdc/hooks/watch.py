"""Notice optimizers whose steps the sparsifier does not see."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from acdc.errors import InputError
from acdc.shards import local

PLAIN, WRAPPED = 1, 16  # changes before a step: of an optimizer, and of one that holds another one


class Claim(Protocol):
    """What is asked before a step of any optimizer of the process."""

    def check_before(self, optimizer: Optimizer) -> None:
        """Raise InputError unless the optimizer may step."""


# Held weakly: a sparsifier ends with its optimizer. The hook is there as long as something is held.
_claims: WeakSet[Claim] = WeakSet()
_hooks: list[RemovableHandle] = []


def begin(claim: Claim) -> None:
    """Ask a claim before every step of any optimizer, until ``end``."""
    _claims.add(claim)
    if not _hooks:
        plain = torch.compiler.disable(_ask)  # a compiled step calls it as it is
        _hooks.append(register_optimizer_step_pre_hook(plain))


def end(claim: Claim) -> None:
    """Ask a claim no longer."""
    _claims.discard(claim)
    while _hooks and not _claims:
        _hooks.pop().remove()


def _ask(optimizer: Optimizer, *_: Any) -> None:
    for claim in tuple(_claims):
        claim.check_before(optimizer)


class Watch:
    """Watches the smallest weight until the first counted step.

    A weight that changes from one backward pass to the next, twice in a row, is stepped by
    somebody else: gradient accumulation changes no weight, and an optimizer that looks at two
    gradients for a step (SAM) changes it once. One that ascends several times changes it more often
    before its step; such an optimizer holds another one. Values are compared, because a write
    through ``.data`` leaves no trace in the version of a tensor.

    Args:
        params: The prunable weights.
        allowed: Changes that an optimizer may make before its step.
    """

    def __init__(self, params: Iterable[nn.Parameter], allowed: int = PLAIN) -> None:
        self._seen: Tensor | None = None
        self._allowed = allowed
        self._changes = 0
        watched = [p for p in params if p.requires_grad and p.is_leaf]
        smallest = min(watched, key=lambda p: p.numel(), default=None)
        self._hook = (
            None if smallest is None else smallest.register_post_accumulate_grad_hook(self._look)
        )

    @torch.no_grad()
    def _look(self, param: Tensor) -> None:
        now = local(param)
        if self._seen is not None and not torch.equal(now.nan_to_num(), self._seen.nan_to_num()):
            self._changes += 1
        self._seen = now.detach().clone()
        if self._changes > self._allowed:
            self.stop()
            raise InputError(
                f"The weights changed between {self._allowed + 2} backward passes, and the "
                f"optimizer that the sparsifier was given has taken no step. Something else steps "
                f"them: give the sparsifier the optimizer whose step() changes the weights, and "
                f"call that step() of the object and not a copy or a replacement of it. If your "
                f"loop moves the weights itself several times before a step (SAM with several "
                f"ascents), let an optimizer do that which holds the other one as its attribute "
                f"base_optimizer, and give that optimizer: it may ascend {WRAPPED} times."
            )

    def stop(self) -> None:
        """Watch no longer."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._seen = None
