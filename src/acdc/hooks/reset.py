"""Optimizer state is made fresh where pruned weights come back, before the weights move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from acdc.errors import InputError
from acdc.hooks.fresh import Fresh, NotKnown, fill, looks_like, seen, trial
from acdc.hooks.optimizers import Optimizers, Part
from acdc.methods.base import FreshValue, Method
from acdc.methods.training import Behind
from acdc.support import Support

# These build the state of a parameter at its first step. Clearing the state makes them fresh.
_STATE_ON_FIRST_STEP: frozenset[type[Optimizer]] = frozenset(
    getattr(torch.optim, name)
    for name in (
        "SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adadelta", "ASGD", "Rprop",
        "Adafactor", "Muon",
    )
    if hasattr(torch.optim, name)
)  # fmt: skip

# Entries that wrappers around an optimizer make at a later step: timm, pytorch_optimizer, SAM.
_OF_WRAPPERS: dict[str, FreshValue] = {
    "lookahead_slow_buff": "weight", "slow_params": "weight", "slow_buffer": "weight",
    "slow_momentum": 0.0, "old_p": "weight", "e_w": 0.0,
}  # fmt: skip


class StateReset:
    """Makes the state of optimizers fresh by a rule.

    Args:
        optimizers: Any optimizers with state per parameter.
        method: Its ``reset`` is the rule. ``"all"``: the state of every parameter. ``"entered"``:
            only of the weights that come back. ``"none"``.
        params: The prunable weights by name.

    Raises:
        InputError: An optimizer has no state per parameter, none holds a weight, or what a fresh
            state is cannot be found out.
    """

    def __init__(
        self, optimizers: Optimizers, method: Method[Any], params: Mapping[str, Tensor]
    ) -> None:
        if any(isinstance(each, torch.optim.LBFGS) for each in optimizers):
            raise InputError(
                "LBFGS keeps one flat history for all parameters, so the state of single weights "
                "cannot be reset. Use SGD, Adam, AdamW or another optimizer with state per weight."
            )
        self.optimizers, self.rule, self._params = optimizers, method.reset_rule, params
        reset = method.reset
        self._declared = dict(reset) if isinstance(reset, Mapping) else {}
        self._groups = {id(part): self._found_out(part) for part in optimizers.parts}
        self._of_weight = {name: optimizers.part_of(p) for name, p in params.items()}
        self._may_copy = not all(map(_is_plain, optimizers.parts))
        self._is_checked = self._is_cleared = False
        self._hooks: list[RemovableHandle] = []
        self._entries: dict[tuple[int, int], set[str]] = {}
        if isinstance(method.training, Behind):
            self._check_no_copies()
        self.check_before_change()

    # --- at a change of the support -------------------------------------------------------------

    def clear(self, entered: Support) -> None:
        """Clear the state that would move the weights that come back.

        Args:
            entered: The weights that come back.
        """
        if self.rule == "none" or not entered.nnz:
            return
        masks = {id(self._params[name]): mask for name, mask in entered.items()}
        for part in self.optimizers.parts:
            for index, group in enumerate(part.optimizer.param_groups):
                if self.rule == "all":
                    self._restart(part, index, group)
                    continue
                for param in group["params"]:
                    if id(param) in masks:
                        for state in part.states(param):
                            values = self._values(part, index, group, state)
                            fill(state, param, values, masks[id(param)])
            if part.outer and self.rule == "all":
                self._drop_before_next_step(part)  # a wrapper may write into the state after us
        self._is_cleared = self.rule == "all"

    def _restart(self, part: Part, index: int, group: dict[str, Any]) -> None:
        """Make all state of a group of parameters fresh."""
        fresh, state = self._fresh(part, index), part.optimizer.state
        for param in group["params"]:
            for outer in part.states(param):
                if outer is not state.get(param):
                    fill(outer, param, self._values(part, index, group, outer))
        if fresh.is_absent and all(each.is_absent for each in self._groups[id(part)]):
            state.clear()
        fresh.restart(part.optimizer, group, group["params"])

    def copies(self, name: str) -> Iterator[Tensor]:
        """Yield the state that must be zero where a weight is pruned: copies of the weight.

        Averages and slow weights are such copies. An entry that an optimizer makes later, and that
        is not known, is taken for one: zero does no harm there.
        """
        if not self._may_copy:
            return
        param, (part, index) = self._params[name], self._of_weight[name]
        if _is_plain(part):
            return
        known = {**_OF_WRAPPERS, **self._fresh(part, index).values, **self._declared}
        late = "weight" if self.rule != "none" else None
        for state in part.states(param):
            for key, value in state.items():
                if known.get(key, late) == "weight" and looks_like(value, param):
                    yield value

    # --- checks ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Take note of a step, and refuse state that cannot be reset, as soon as there is state.

        Raises:
            InputError: It is not known how to reset an entry of the optimizer's state.
        """
        self._is_cleared = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if not self._is_checked:
            self.check_before_change()
            self._is_checked = any(
                True for n, p in self._params.items() for _ in self._of_weight[n][0].states(p)
            )

    def check_before_change(self) -> None:
        """Refuse state that cannot be reset, before anything is cut.

        Raises:
            InputError: It is not known how to reset an entry of the optimizer's state, or a wrapper
                that the sparsifier was not given keeps weights there.
        """
        for name, param in self._params.items():
            self._check_not_wrapped(name, param)
        if self.rule == "none":
            return
        for name, param in self._params.items():
            part, index = self._of_weight[name]
            if self.rule == "all" and self._fresh(part, index).is_absent and not part.outer:
                continue
            group = part.optimizer.param_groups[index]
            for state in part.states(param):
                own = state is part.optimizer.state.get(param)
                if own and self.rule == "all" and self._fresh(part, index).is_absent:
                    continue
                values = self._values(part, index, group, state)
                for key, value in state.items():
                    if form := _unknown(value, param, values.get(key)):
                        raise InputError(
                            f"{type(part.optimizer).__name__} keeps the state {key!r} {form} for "
                            f"the weight {name!r} of shape {tuple(param.shape)}, and how to reset "
                            f"it is not known. Say how it starts, for example "
                            f'reset={{{key!r}: "weight"}} for a copy of the weight or '
                            f"reset={{{key!r}: 0.0}}. Or use an optimizer with state per weight, "
                            f'or reset="none".'
                        )

    def _check_not_wrapped(self, name: str, param: Tensor) -> None:
        """Raise InputError if state of this weight cannot be of the optimizer that holds it.

        A wrapper that moves the weights after the optimizer inside has stepped brings pruned
        weights back, and no hook is called then.
        """
        part, index = self._of_weight[name]
        state = part.optimizer.state.get(param, {}) if _is_plain(part) else {}
        weights = {key for key, value in state.items() if looks_like(value, param)}
        foreign = weights - self._own_entries(part, index, weights) - self._declared.keys()
        if foreign:
            kind = type(part.optimizer).__name__
            raise InputError(
                f"The state of {kind} for the weight {name!r} holds {min(foreign)!r}, which {kind} "
                f"does not make: a wrapper around it does, such as Lookahead or "
                f"ScheduleFreeWrapper, and may move pruned weights after {kind} has stepped. Give "
                f"the sparsifier the wrapper itself, if the wrapper is a torch.optim.Optimizer. "
                f"Otherwise train without it, for example with schedulefree.AdamWScheduleFree. If "
                f"what keeps this entry moves no weights, say how the entry starts: "
                f"reset={{{min(foreign)!r}: 0.0}}."
            )

    def _own_entries(self, part: Part, index: int, wanted: set[str]) -> set[str]:
        """Return the entries that an optimizer of torch makes; all wanted ones if not known."""
        known = self._entries.setdefault((id(part), index), set())
        if not wanted <= known:
            try:
                known |= trial(part.optimizer, part.optimizer.param_groups[index]).values.keys()
            except NotKnown:
                return wanted
        return known

    def _check_no_copies(self) -> None:
        for part in self.optimizers.parts:
            for fresh in self._groups[id(part)]:
                names = [k for k, v in {**fresh.values, **self._declared}.items() if v == "weight"]
                if names and not _is_plain(part):
                    raise InputError(
                        f"{type(part.optimizer).__name__} keeps a copy of the weights "
                        f"({names[0]!r}), and this method trains dense weights behind sparse ones: "
                        f"the copy would bring dense weights into the sparse network. Use another "
                        f"optimizer, such as SGD or AdamW, or a method that masks weights, such as "
                        f"ACDC, GMP or RigL."
                    )

    # --- steps that only make state -------------------------------------------------------------

    def made_state(self) -> None:
        """Make state fresh again that a step with a learning rate of zero has made after a reset.

        Before it saves, ``torch.distributed.checkpoint`` takes such a step to make state. The
        checkpoint then holds fresh values, and the next real step begins without state.
        """
        if not self._is_cleared:
            return
        for part in self.optimizers.parts:
            optimizer = part.optimizer
            for index, group in enumerate(optimizer.param_groups):
                for param in group["params"]:
                    state = optimizer.state.get(param, {})
                    fill(
                        state, param, {**_numbers(group), **self._values(part, index, group, state)}
                    )
                self._fresh(part, index).restart_counters(optimizer, group)
            self._drop_before_next_step(part)

    def _drop_before_next_step(self, part: Part) -> None:
        made = part.optimizer.state

        def drop(optimizer: Optimizer, *_: Any) -> None:
            if self._is_cleared and optimizer.state is made:  # otherwise somebody loaded another
                for index, group in enumerate(optimizer.param_groups):
                    self._restart(part, index, group)

        self._hooks.append(part.optimizer.register_step_pre_hook(drop))

    # --- what is fresh --------------------------------------------------------------------------

    def _found_out(self, part: Part) -> list[Fresh]:
        return [self._of_group(part, group) for group in part.optimizer.param_groups]

    def _of_group(self, part: Part, group: Mapping[str, Any]) -> Fresh:
        """Return how the state of a group starts.

        Raises:
            InputError: That is not known.
        """
        if _is_plain(part) or not group["params"]:
            return Fresh(is_absent=True)
        optimizer, reasons = part.optimizer, []
        for find in (trial, seen):
            try:
                found = find(optimizer, group)
                return replace(found, values={**found.values, **self._declared})
            except NotKnown as reason:
                reasons.append(str(reason))
        if self._declared or self.rule == "none":
            return Fresh(is_absent=False, values={"step": 0.0, **self._declared})
        raise InputError(
            f"How {type(optimizer).__name__} starts its state is not known. A trial on a small "
            f"parameter failed ({reasons[0]}). Say how each entry of its state starts, for example "
            f'reset={{"momentum": 0.0, "x0": "weight"}}, where "weight" is a copy of the weight; '
            f'or keep the state when weights come back: reset="none".'
        )

    def _fresh(self, part: Part, index: int) -> Fresh:
        groups = self._groups[id(part)]
        while index >= len(groups):  # a group that was added later
            groups.append(self._of_group(part, part.optimizer.param_groups[len(groups)]))
        return groups[index]

    def _values(
        self, part: Part, index: int, group: Mapping[str, Any], state: Mapping[str, Any]
    ) -> dict[str, FreshValue | None]:
        """Return the fresh values of a parameter's state."""
        if _is_plain(part):
            return {key: _fresh(key, group) for key in state}
        return {**_OF_WRAPPERS, **self._fresh(part, index).values, **self._declared}


def _is_plain(part: Part) -> bool:
    """Whether the optimizer is one of torch's whose state is zeros, without anything around it."""
    return type(part.optimizer) in _STATE_ON_FIRST_STEP and not part.outer


def _unknown(value: Any, param: Tensor, fresh: FreshValue | None) -> str:
    """Return what an entry of the state is, if it is not known how to reset the entry."""
    if isinstance(value, Tensor):
        if not looks_like(value, param):
            known = value.numel() == 1 and type(value) is Tensor
            kind = "" if type(value) is Tensor else f"({type(value).__name__}) "
            return "" if known else f"{kind}of shape {tuple(value.shape)}"
        return "" if fresh is not None else "of its shape"
    if value is None or isinstance(value, int | float | str):
        return ""
    return f"({type(value).__name__})"


def _fresh(key: str, group: Mapping[str, Any]) -> float:
    """Return where an optimizer of torch starts a state: at zero, except for these."""
    if key == "step_size" and "step_sizes" in group:  # Rprop
        return float(group["lr"])
    return float(_numbers(group).get(key, 0.0))


def _numbers(group: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers that optimizers of torch keep beside a step count: NAdam, ASGD."""
    return {"step": 0.0, "mu_product": 1.0, "mu": 1.0, "eta": float(group.get("lr", 0.0))}
