"""In a sparse phase the steps of large weights touch only what is kept.

A step of dense size reads and writes every pruned weight, its gradient and its moments, to leave
zeros behind. Beside a layer that computes sparsely this is no trifle: for a linear layer 768-3072
at 95 % and 512 tokens it is as long as forward and backward together. ``KeptSteps`` lets a twin of
the optimizer step vectors of the kept elements instead.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from acdc.engine.gradients import LARGE
from acdc.hooks.kept_rules import stepped
from acdc.hooks.kept_weight import KeptState, KeptWeight, can_be_kept
from acdc.hooks.optimizers import clear_grads
from acdc.hooks.steps import closed

# Every element for itself, all state zero at the start: what is done to a vector of some elements
# is what is done to them among all.
ELEMENTWISE: frozenset[type[Optimizer]] = frozenset(
    (
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.RMSprop,
        torch.optim.Adadelta,
    )
)

_last = WeakIdKeyDictionary()  # optimizer -> weak reference to its KeptSteps

SPARSE = 0.25  # density; above, gathering costs as much as stepping


def pays(param: Tensor, kept: int) -> bool:
    """Return whether steps of ``kept`` elements cost less than steps of all."""
    return param.numel() >= LARGE and kept <= SPARSE * param.numel()


def kept_in_last_step(optimizer: Optimizer, param: Tensor) -> KeptWeight | None:
    """Return a weight of which the step that has just ended moved the kept elements alone."""
    steps = _last[optimizer]() if optimizer in _last else None
    return None if steps is None else steps.stepped_alone(param)


class KeptSteps:
    """Steps only the kept elements of large weights, with the numbers of a masked dense step.

    Just before the optimizer's own step, the kept elements are stepped: by ``kept_rules`` where
    that has a rule, and else as vectors by a twin of the optimizer with the same options. The
    weight is written anew: zeros, and the kept elements. The optimizer itself finds no gradient
    there and passes these weights over; the gradient is back before anybody looks. Weights have
    their present values whenever user code runs. So has the state, which is stored for the kept
    elements alone and gets its dense shape when somebody reads it (``KeptState``).

    State outside the support becomes zero at the first step, where masked dense keeps moments that
    fade. Neither moves a weight that stays zero; a weight that comes back must find its state
    cleared, so ``start`` is for a method with ``reset`` "all" or "entered", never "none".

    Steps stay dense where one of these does not hold: the optimizer's type is exactly one of
    ``ELEMENTWISE``, without ``capturable`` and ``differentiable``; no GradScaler leaves it to the
    step to unscale gradients; no hook before the step comes after this one, which would miss the
    gradients; the weight is on a CPU without gaps in its memory, and ``pays``.

    Args:
        optimizer: The user's; it gets a hook before and a hook after its step.
        worth: Weight and number of kept elements → whether to step only these.
        may: Whether the next step may be one of kept elements only. Asked before each such step.

    """

    def __init__(
        self,
        optimizer: Optimizer,
        worth: Callable[[Tensor, int], bool] = pays,
        may: Callable[[], bool] = lambda: True,
    ) -> None:
        self.optimizer, self._worth, self._may = optimizer, worth, may
        self._weights: dict[int, KeptWeight] = {}
        self._twin: Optimizer | None = None
        # The number of an optimizer's group, and the weights of it that are in the twin's group.
        self._groups: list[tuple[int, list[KeptWeight]]] = []
        self._grads: list[tuple[Tensor, Tensor]] = []  # that the optimizer shall not find
        self._before_hook = optimizer.register_step_pre_hook(self._before)
        self._after_hook = optimizer.register_step_post_hook(self._after)
        self._saved_hook = optimizer.register_state_dict_pre_hook(lambda _: self._make_plain())
        _last[optimizer] = weakref.ref(self)
        # First of all, so that no other hook misses the gradients.
        _ordered(optimizer._optimizer_step_post_hooks).move_to_end(self._after_hook.id, last=False)

    def start(self, masks: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Step only kept elements from here on.

        Args:
            masks: Weights, each with its bool mask of the same shape, True where it is kept.

        """
        self.stop()
        if type(self.optimizer) not in ELEMENTWISE:
            return
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for param, mask in masks:
            if id(param) not in held:
                continue  # another optimizer steps it
            if param.device.type != "cpu" or not can_be_kept(param):
                continue
            if self._worth(param, int(mask.sum())):
                self._weights[id(param)] = KeptWeight(param, mask)
        for number, group in enumerate(self.optimizer.param_groups):
            mine = [self._weights[id(p)] for p in group["params"] if id(p) in self._weights]
            if mine:
                self._groups.append((number, mine))
        if self._groups:
            groups = [{"params": [weight.vector for weight in mine]} for _, mine in self._groups]
            self._twin = type(self.optimizer)(groups, lr=0.0)  # type: ignore[call-arg]

    def stop(self) -> None:
        """Leave all steps to the optimizer from here on."""
        self._make_plain()
        self._weights, self._twin, self._groups = {}, None, []

    def remove(self) -> None:
        """Stop, and take the hooks off."""
        self.stop()
        self._before_hook.remove()
        self._after_hook.remove()
        self._saved_hook.remove()

    def left_zeros(self, param: Tensor) -> bool:
        """Return whether a weight was not written since a step here set it to zero outside its
        support.
        """
        return self.stepped_alone(param) is not None

    def stepped_alone(self, param: Tensor) -> KeptWeight | None:
        """Return the weight of a parameter that was not written since a step here."""
        weight = self._weights.get(id(param))
        return weight if weight is not None and weight.version == param._version else None

    # --- a step ---------------------------------------------------------------------------------

    def _before(self, _: Optimizer, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if self._twin is None or not self._is_last or self._is_special:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            args, kwargs = (self.optimizer, closed(closure)), {}
        if self._may():  # asked after the passes of the step, which are in the closure
            with torch.no_grad():
                self._step(self._twin)
        return args, kwargs

    def _step(self, twin: Optimizer) -> None:
        ready, left = [], []
        for (number, weights), group in zip(self._groups, twin.param_groups, strict=True):
            options = self.optimizer.param_groups[number].items()
            group.update({k: v for k, v in options if k not in ("params", "param_names")})
            for weight in weights:
                if not weight.is_ready:
                    continue
                ready.append(weight.param)
                state = self._state_of(weight)
                if stepped(type(self.optimizer), weight, state, group):
                    self._keep(weight, state)
                else:
                    left.append((weight, state))
        self._step_by_twin(twin, left)
        # The optimizer shall not find them: it passes over weights without a gradient.
        self._grads = clear_grads(ready)

    def _step_by_twin(self, twin: Optimizer, left: list[tuple[KeptWeight, dict[str, Any]]]) -> None:
        """Step weights as vectors of their kept elements, by an optimizer of the same kind."""
        for weight, state in left:
            weight.read()
            twin.state[weight.vector] = state
        # Not twin.step(): hooks that somebody registered for all optimizers count this step once.
        type(twin).step.__wrapped__(twin)  # type: ignore[attr-defined]
        for weight, _ in left:
            self._keep(weight, twin.state.pop(weight.vector))
            weight.write()

    def _state_of(self, weight: KeptWeight) -> dict[str, Any]:
        """Return the state of the kept elements of a weight."""
        state = self.optimizer.state.get(weight.param, {})
        return (state if isinstance(state, KeptState) else KeptState(weight, state)).of_kept()

    def _keep(self, weight: KeptWeight, state: dict[str, Any]) -> None:
        """Store the state of the kept elements of a weight."""
        if state:
            self.optimizer.state[weight.param] = KeptState(weight, state)

    def _make_plain(self) -> None:
        """Give every weight a state that is a plain dictionary of dense tensors."""
        state = self.optimizer.state
        for weight in self._weights.values():
            if isinstance(state.get(weight.param), KeptState):
                state[weight.param] = dict(state[weight.param])

    def _after(self, *_: Any) -> None:
        for param, grad in self._grads:
            param.grad = grad
        self._grads = []
        if not self._is_last:  # for the next step
            _ordered(self.optimizer._optimizer_step_pre_hooks).move_to_end(self._before_hook.id)

    @property
    def _is_last(self) -> bool:
        """Whether no hook comes between this one and the step."""
        hooks = _ordered(self.optimizer._optimizer_step_pre_hooks)
        return bool(next(reversed(hooks)) == self._before_hook.id)

    @property
    def _is_special(self) -> bool:
        """Whether the step is not plain arithmetic on tensors."""
        if any(getattr(self.optimizer, of, None) is not None for of in ("grad_scale", "found_inf")):
            return True
        options = ("capturable", "differentiable")
        return any(group.get(o) for group in self.optimizer.param_groups for o in options)


def _ordered(hooks: dict[int, Any]) -> OrderedDict[int, Any]:
    assert isinstance(hooks, OrderedDict)
    return hooks
