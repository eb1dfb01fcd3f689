"""Hooks before and after every step of one or several optimizers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from acdc.errors import InputError
from acdc.hooks.binding import Binding
from acdc.hooks.optimizers import OneOrSeveral, Optimizers, as_optimizers, clear_grads, params_of
from acdc.shards import anywhere, local, mesh_of


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
    """Calls functions before and after every step.

    A step of several optimizers is one call of each. It also ends where one of them is called for
    the second time, or out of turn and with new gradients: a GradScaler skips the call of an
    optimizer whose gradients overflow, and only of that one.

    A step that a CUDA graph captures is refused (:func:`refuse_capture`).

    Not counted: a step inside another step of the same optimizer (a class whose ``step`` calls that
    of its base class), and a step that only makes state (:func:`only_makes_state`).

    Args:
        optimizers: The user's.
        binding: Checked after every step. Claimed by ``call_after``, and released by ``remove``.
    """

    def __init__(
        self, optimizers: OneOrSeveral | Optimizers, binding: Binding | None = None
    ) -> None:
        self._optimizers, self._binding = tuple(as_optimizers(optimizers)), binding
        self._needed: Callable[[], bool] = lambda: False
        self._before: Callable[[], Before] | None = None
        self._found: Before | None = None
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._handles: list[RemovableHandle] = []
        self._round = _Round(len(self._optimizers))
        if len(self._optimizers) > 1:
            self._register_before()

    def call_before(self, needed: Callable[[], bool], before: Callable[[], Before]) -> None:
        """Call ``before`` with the gradients in place, before every step in which it is needed.

        If it says so, all gradients are hidden from the optimizer, which passes over parameters
        without a gradient. A step in which it is not needed keeps its closure.
        """
        self._needed, self._before = needed, before
        if not self._handles:
            self._register_before()

    def call_after(
        self,
        function: Callable[[bool, Before | None], None],
        between: Callable[[int], None] = lambda index: None,
        made_state: Callable[[], None] = lambda: None,
    ) -> None:
        """Call a function after every step.

        Args:
            function: Called with whether the step was executed, and with what was found before it,
                if anything was needed.
            between: Called with the index of an optimizer after its call, where others follow.
            made_state: Called after a step that only made state.
        """

        def finish() -> None:
            executed, found = self._round.end(), self._found
            self._found = None
            self.check()
            function(executed, found)

        def after(index: int, optimizer: Optimizer) -> None:
            refuse_capture("The optimizer steps", "steps would not be counted")
            if is_nested(optimizer):
                return
            for param, grad in self._hidden:
                param.grad = grad
            self._hidden = []
            if self._found is None and only_makes_state(optimizer):
                made_state()
                return
            # A GradScaler calls a fused optimizer also for a step that the optimizer then skips.
            found_inf = getattr(optimizer, "found_inf", None)
            self._round.add(index, optimizer, found_inf is None or not bool(found_inf))
            if self._round.is_complete:
                finish()
            else:
                between(index)

        self._finish = finish
        # A compiled step calls the hook as it is: what it counts would be compiled anew each time.
        plain = torch.compiler.disable(after)
        for index, optimizer in enumerate(self._optimizers):
            self._handles.append(
                optimizer.register_step_post_hook(lambda opt, *_, i=index: plain(i, opt))
            )
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

    def _register_before(self) -> None:
        for index, optimizer in enumerate(self._optimizers):
            begin = torch.compiler.disable(partial(self._begin, index))
            self._handles.append(optimizer.register_step_pre_hook(begin))

    def _begin(
        self, index: int, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if is_nested(optimizer) or (closure is None and only_makes_state(optimizer)):
            return None
        if self._round.is_over(index):
            self._finish()
        begins = not self._round.called
        needed = self._before is not None and begins and self._needed()
        hide = not begins and self._found is not None and self._found.hide
        if not needed and not hide:
            return None
        if closure is not None:
            args, kwargs = (optimizer, closed(closure)), {}
        if needed:
            assert self._before is not None
            self._found = self._before()
            hide = self._found.hide
        if hide:
            self._hidden = clear_grads(params_of(optimizer))
        return args, kwargs


class _Round:
    """The calls of several optimizers that make one step.

    Args:
        size: The number of optimizers.
    """

    def __init__(self, size: int) -> None:
        self._size, self._executed = size, False
        self.called: list[int] = []
        self._usual: list[int] = []  # the order of the last round that was complete
        self._last: list[tuple[Tensor, Tensor | None, int]] = []

    @property
    def is_complete(self) -> bool:
        """Whether every optimizer was called."""
        return len(self.called) == self._size

    def add(self, index: int, optimizer: Optimizer, executed: bool) -> None:
        """Note the call of an optimizer."""
        self.called.append(index)
        self._executed |= executed
        if self.is_complete:
            self._usual = list(self.called)
        elif params := params_of(optimizer):
            smallest = min(params, key=lambda p: p.numel())
            self._last = [(smallest, smallest.grad, _version(smallest.grad))]

    def is_over(self, index: int) -> bool:
        """Whether the optimizer that is called now begins another step."""
        if index in self.called:
            return True
        if not self.called or not self._usual:
            return False
        late = max(map(self._usual.index, self.called)) > self._usual.index(index)
        return late and any(
            param.grad is not grad or _version(grad) != version
            for param, grad, version in self._last
        )

    def end(self) -> bool:
        """Begin anew, and return whether a call of the step was executed."""
        executed, self._executed = self._executed, False
        self.called, self._last = [], []
        return executed


def refuse_capture(what: str, why: str) -> None:
    """Raise InputError while a CUDA graph is captured on the stream that is used now.

    A replay of the graph calls no hooks, so the masks of this moment would stay in it.

    Args:
        what: What happens inside the capture, as the beginning of a sentence.
        why: What would be wrong with a replay beside the masks, as a clause.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise InputError(
            f"{what} while a CUDA graph is captured. A replay of the graph calls no hooks: {why}, "
            f"and the masks would stay those of this moment when the phase changes. Capture the "
            f"model alone, by torch.cuda.make_graphed_callables or "
            f'torch.compile(mode="reduce-overhead"), and call backward() and optimizer.step() '
            f"outside of the capture."
        )


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor._version


def closed(closure: Callable[[], Any]) -> Callable[[], Any]:
    """Call a closure, which makes the gradients, and return a function that returns its loss.

    An optimizer that is given the result does not make the gradients a second time.
    """
    with torch.enable_grad():
        loss = closure()
    return lambda: loss


def only_makes_state(optimizer: Optimizer) -> bool:
    """Return whether a step can only make state, because all rates and all gradients are zero.

    ``torch.distributed.checkpoint.state_dict`` takes such a step on an optimizer without state,
    before it saves or loads.
    """
    for group in optimizer.param_groups:
        lr = group.get("lr")
        if lr is None:
            return False
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            return False  # not worth a synchronisation: the step in question has its rates on a CPU
        if float(lr) != 0.0:
            return False
    grads = [p.grad for p in params_of(optimizer) if p.grad is not None]
    if not grads:
        return False
    moves = any(bool(local(grad).any()) for grad in grads)
    return not anywhere(moves, mesh_of(grads))  # all ranks count a step, or none does


_STEP = Optimizer.profile_hook_step(lambda self: None).__code__


def is_nested(optimizer: Optimizer) -> bool:
    """Return whether this step runs inside another step of the same optimizer.

    Torch wraps ``step`` in every class of which there is an object, so that a subclass that calls
    ``super().step()`` calls the hooks twice.
    """
    steps = [vars(cls)["step"] for cls in type(optimizer).__mro__ if "step" in vars(cls)]
    if sum(getattr(step, "hooked", False) for step in steps) < 2:
        return False
    running, frame = 0, sys._getframe(1)
    while frame is not None:
        running += frame.f_code is _STEP and frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return running > 1
