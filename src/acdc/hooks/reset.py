"""Optimizer state is cleared where pruned weights come back, before the weights move."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from acdc.errors import InputError
from acdc.methods.base import Reset
from acdc.support import Support

# These build the state of a parameter at its first step. Clearing the state makes them fresh.
_STATE_ON_FIRST_STEP: frozenset[type[torch.optim.Optimizer]] = frozenset(
    getattr(torch.optim, name)
    for name in (
        "SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adadelta", "ASGD", "Rprop",
        "Adafactor", "Muon",
    )
    if hasattr(torch.optim, name)
)  # fmt: skip


class StateReset:
    """Clears the state of an optimizer by a rule.

    Args:
        optimizer: Any optimizer with state per parameter.
        rule: ``"all"``: the state of every parameter. ``"entered"``: only of the weights that come
            back. ``"none"``.
        params: The prunable weights by name.

    Raises:
        InputError: The optimizer has no state per parameter, or lacks a weight.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, rule: Reset, params: Mapping[str, Tensor]
    ) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise InputError(
                "LBFGS keeps one flat history for all parameters, so the state of single weights "
                "cannot be reset. Use SGD, Adam, AdamW or another optimizer with state per weight."
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if strangers := [name for name, p in params.items() if id(p) not in held]:
            raise InputError(
                f"The optimizer does not hold {len(strangers)} of the {len(params)} weights to "
                f"prune, {strangers[0]!r} first. Build it from the parameters of this very model, "
                f"after moving the model to its device, and before the sparsifier."
            )
        self.optimizer, self._rule, self._params = optimizer, rule, params
        self._is_checked = False

    def clear(self, entered: Support) -> None:
        """Clear the state that would move the weights that come back.

        Args:
            entered: The weights that come back.
        """
        state = self.optimizer.state
        if self._rule == "none" or not entered.nnz:
            return
        if self._drops_everything:
            state.clear()
            return
        masks = {id(self._params[name]): mask for name, mask in entered.items()}
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if self._rule == "all":
                    _fill(state.get(param, {}), group, param, None)
                elif id(param) in masks:
                    _fill(state.get(param, {}), group, param, masks[id(param)])

    def check(self) -> None:
        """Refuse state that cannot be cleared, as soon as there is state.

        Raises:
            InputError: It is not known how to reset an entry of the optimizer's state.
        """
        if self._is_checked or self._rule == "none" or self._drops_everything:
            return
        states = {name: self.optimizer.state.get(p, {}) for name, p in self._params.items()}
        self._is_checked = any(states.values())
        for name, state in states.items():
            for key, value in state.items():
                if form := _unknown(value, self._params[name]):
                    raise InputError(
                        f"{type(self.optimizer).__name__} keeps the state {key!r} {form} for the "
                        f"weight {name!r} of shape {tuple(self._params[name].shape)}, and how to "
                        f"reset it is not known. Use an optimizer with state per weight, or "
                        f'reset="none".'
                    )

    @property
    def _drops_everything(self) -> bool:
        """Whether the whole state is dropped: exactly a fresh optimizer, step counts included."""
        return self._rule == "all" and type(self.optimizer) in _STATE_ON_FIRST_STEP


def _unknown(value: Any, param: Tensor) -> str:
    """Return what an entry of the state is, if it is not known how to reset the entry."""
    if isinstance(value, Tensor):
        known = value.numel() == 1 or value.shape == param.shape
        return "" if known else f"of shape {tuple(value.shape)}"
    if value is None or isinstance(value, int | float | str):
        return ""
    return f"({type(value).__name__})"


def _fill(
    state: MutableMapping[str, Any], group: Mapping[str, Any], param: Tensor, mask: Tensor | None
) -> None:
    """Set one parameter's state to that of a fresh optimizer: all of it, or only under a mask."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == param.shape and key != "step":
            fresh = _fresh(key, group)
            if mask is None:
                value.fill_(fresh)
            else:
                value.masked_fill_(mask, fresh)
        elif mask is None and key == "step":
            if isinstance(value, Tensor):
                value.zero_()
            else:
                state[key] = 0


def _fresh(key: str, group: Mapping[str, Any]) -> float:
    """Return where an optimizer starts a state: at zero, except for these two."""
    if key == "sum":  # Adagrad
        return float(group.get("initial_accumulator_value", 0.0))
    if key == "step_size" and "step_sizes" in group:  # Rprop
        return float(group["lr"])
    return 0.0
