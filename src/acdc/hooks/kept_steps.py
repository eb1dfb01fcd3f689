"""In a sparse phase the steps of large weights touch only what is kept.

A step of dense size reads and writes every pruned weight, its gradient and its moments, to leave
zeros behind. Beside a layer that computes sparsely this is no trifle: for a linear layer 768-3072
at 95 % and 512 tokens it is as long as forward and backward together. ``KeptSteps`` lets a twin of
the optimizer step vectors of the kept elements instead. ``Written`` tells which gradients are zero
outside the support already.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from acdc.engine.gradients import LARGE
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

SPARSE = 0.25  # density; above, gathering costs as much as stepping


def pays(param: Tensor, kept: int) -> bool:
    """Return whether steps of ``kept`` elements cost less than steps of all."""
    return param.numel() >= LARGE and kept <= SPARSE * param.numel()


class KeptSteps:
    """Steps only the kept elements of large weights, with the numbers of a masked dense step.

    Just before the optimizer's own step, a twin of it with the same options steps vectors of the
    kept elements, and the weight is written anew: zeros, and the vector. The optimizer itself finds
    no gradient there and passes these weights over; the gradient is back before anybody looks.
    Weights and state have their dense shape and present values whenever user code runs.

    State outside the support becomes zero at the first step, where masked dense keeps moments that
    fade. Neither moves a weight that stays zero; a weight that comes back must find its state
    cleared, so ``start`` is for a method with ``reset`` "all" or "entered", never "none".

    Steps stay dense where one of these does not hold: the optimizer's type is exactly one of
    ``ELEMENTWISE``, without ``fused``, ``capturable`` and ``differentiable``; no hook before the
    step comes after this one, which would miss the gradients; the weight is on a CPU, and ``pays``.

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
        self._weights: dict[int, _Weight] = {}
        self._twin: Optimizer | None = None
        self._groups: list[int] = []  # of the twin's groups among the optimizer's
        self._grads: list[tuple[Tensor, Tensor]] = []  # that the optimizer shall not find
        self._before_hook = optimizer.register_step_pre_hook(self._before)
        self._after_hook = optimizer.register_step_post_hook(self._after)
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
            if param.device.type == "cpu" and self._worth(param, int(mask.sum())):
                weight = _Weight(param, mask)
                if weight.flat(param) is not None:
                    self._weights[id(param)] = weight
        groups = []
        for number, group in enumerate(self.optimizer.param_groups):
            mine = [self._weights[id(p)] for p in group["params"] if id(p) in self._weights]
            if mine:
                self._groups.append(number)
                groups.append({"params": [weight.vector for weight in mine]})
        if groups:
            self._twin = type(self.optimizer)(groups, lr=0.0)  # type: ignore[call-arg]

    def stop(self) -> None:
        """Leave all steps to the optimizer from here on."""
        self._weights, self._twin, self._groups = {}, None, []

    def remove(self) -> None:
        """Stop, and take the hooks off."""
        self.stop()
        self._before_hook.remove()
        self._after_hook.remove()

    def left_zeros(self, param: Tensor) -> bool:
        """Return whether a weight was not written since a step here set it to zero outside its
        support.
        """
        weight = self._weights.get(id(param))
        return weight is not None and weight.version == param._version

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
        state = self.optimizer.state
        for number, group in zip(self._groups, twin.param_groups, strict=True):
            options = self.optimizer.param_groups[number].items()
            group.update({k: v for k, v in options if k not in ("params", "param_names")})
        stepped = [weight for weight in self._weights.values() if weight.is_ready]
        for weight in self._weights.values():
            weight.empty()
        for weight in stepped:
            twin.state[weight.vector] = weight.gather(state.get(weight.param, {}))
        # Not twin.step(): hooks that somebody registered for all optimizers count this step once.
        type(twin).step.__wrapped__(twin)  # type: ignore[attr-defined]
        self._grads = []
        for weight in stepped:
            if made := twin.state[weight.vector]:
                state[weight.param].update(weight.dense_state(made))
            weight.scatter()
            weight.empty()
            assert weight.param.grad is not None
            self._grads.append((weight.param, weight.param.grad))
            weight.param.grad = None

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
        options = ("fused", "capturable", "differentiable")
        return any(group.get(o) for group in self.optimizer.param_groups for o in options)


class _Weight:
    """A weight, and the vector of its kept elements in the order of memory."""

    def __init__(self, param: nn.Parameter, mask: Tensor) -> None:
        self.param, self._stride = param, param.stride()
        self._order = sorted(range(param.dim()), key=lambda d: -self._stride[d])
        positions = mask.permute(self._order).reshape(-1).nonzero()[:, 0]
        # Half the memory, where that will do.
        self._index = positions.int() if param.numel() < 2**31 else positions
        self.vector = nn.Parameter(param.detach().new_empty(0))  # filled for a step
        self.version: int | None = None  # of the weight, when it was last written
        self._copies: dict[str, _Copy] = {}

    @property
    def is_ready(self) -> bool:
        """Whether the weight has a gradient, and is what it was."""
        param, grad = self.param, self.param.grad
        return (
            grad is not None
            and grad.layout == torch.strided
            and (param.stride(), param.dtype) == (self._stride, self.vector.dtype)
        )

    def flat(self, tensor: Tensor) -> Tensor | None:
        """Return all elements of a tensor in the order of the weight's, without a copy if there
        can be one.
        """
        flat = tensor.detach().permute(self._order)
        return flat.view(-1) if flat.is_contiguous() else None

    def gather(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Fill the vector and its gradient, and return the state of the kept elements."""
        assert self.param.grad is not None
        self.vector.data = self._kept(self.param)
        self.vector.grad = self._kept(self.param.grad)
        return {key: self._kept_state(key, value) for key, value in state.items()}

    def scatter(self) -> None:
        """Write the vector into the weight, and zeros beside it."""
        # Not a fill of the rest: this is one sweep without a mask, and as exact.
        self.param.zero_()
        self._write(self.param, self.vector)
        self.version = self.param._version

    def empty(self) -> None:
        """Free the vector and its gradient."""
        self.vector.data, self.vector.grad = self.vector.new_empty(0), None

    def dense_state(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state in its dense shape; what is not of the weight's shape is shared."""
        return {key: self._dense(key, value) for key, value in made.items()}

    def _kept(self, tensor: Tensor) -> Tensor:
        return tensor.detach().permute(self._order).reshape(-1).index_select(0, self._index)

    def _write(self, tensor: Tensor, vector: Tensor) -> None:
        flat = self.flat(tensor)
        assert flat is not None
        flat.index_copy_(0, self._index.long(), vector.detach())

    def _kept_state(self, key: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != self.param.shape:
            return value
        copy = self._copies.get(key)
        if copy is None or not copy.is_of(value):  # somebody loaded or cleared it
            self._copies.pop(key, None)
            return self._kept(value)
        return copy.vector

    def _dense(self, key: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != self._index.shape:
            return value
        if key not in self._copies:
            self._copies[key] = _Copy(torch.zeros_like(self.param, dtype=value.dtype))
        copy = self._copies[key]
        self._write(copy.dense, value)
        copy.vector, copy.version = value, copy.dense._version
        return copy.dense


class _Copy:
    """A state tensor, with the vector of its kept elements."""

    def __init__(self, dense: Tensor) -> None:
        self.dense, self.vector, self.version = dense, dense, -1

    def is_of(self, value: Tensor) -> bool:
        """Return whether ``value`` is this tensor, and unchanged."""
        return value is self.dense and value._version == self.version


def _ordered(hooks: dict[int, Any]) -> OrderedDict[int, Any]:
    assert isinstance(hooks, OrderedDict)
    return hooks
