"""Hooks before and after every step of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from acdc.hooks.binding import Binding


@dataclass(frozen=True)
class Before:
    """What was found before a step.

    Args:
        hide: Whether the optimizer must move nothing in this step.
        state: The method's state, if the step is executed.
    """

    hide: bool
    state: Any


class StepHooks:
    """Calls functions before and after every step of an optimizer.

    Args:
        optimizer: The user's.
        binding: Checked after every step. Claimed by ``call_after``, and released by ``remove``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, binding: Binding | None = None) -> None:
        self._optimizer, self._binding = optimizer, binding
        self._found: Before | None = None
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._handles: list[RemovableHandle] = []

    def call_before(self, needed: Callable[[], bool], before: Callable[[], Before]) -> None:
        """Call ``before`` with the gradients in place, before every step in which it is needed.

        If it says so, all gradients are hidden from the optimizer, which passes over parameters
        without a gradient. A step in which it is not needed keeps its closure.
        """

        def pre_hook(
            _: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]
        ) -> tuple[Any, Any] | None:
            if not needed():
                return None
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if closure is not None:
                args, kwargs = (self._optimizer, closed(closure)), {}
            self._found = before()
            if self._found.hide:
                params = [p for group in self._optimizer.param_groups for p in group["params"]]
                self._hidden = [(p, p.grad) for p in params if p.grad is not None]
                for param in params:
                    param.grad = None
            return args, kwargs

        self._handles.append(self._optimizer.register_step_pre_hook(pre_hook))

    def call_after(self, function: Callable[[bool, Before | None], None]) -> None:
        """Call ``function`` after every step, with whether the step was executed, and with what
        was found before it, if anything was needed.
        """

        def post_hook(*_: Any) -> None:
            for param, grad in self._hidden:
                param.grad = grad
            self._hidden = []
            self.check()
            # A GradScaler calls a fused optimizer also for a step that the optimizer then skips.
            found_inf = getattr(self._optimizer, "found_inf", None)
            found, self._found = self._found, None
            function(found_inf is None or not bool(found_inf), found)

        self._handles.append(self._optimizer.register_step_post_hook(post_hook))
        if self._binding is not None:
            self._binding.claim()

    def check(self) -> None:
        """Raise InputError if the model or the optimizer holds other weights than it did."""
        if self._binding is not None:
            self._binding.check()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._binding is not None:
            self._binding.release()


def closed(closure: Callable[[], Any]) -> Callable[[], Any]:
    """Call a closure, which makes the gradients, and return a function that returns its loss.

    An optimizer that is given the result does not make the gradients a second time.
    """
    with torch.enable_grad():
        loss = closure()
    return lambda: loss
