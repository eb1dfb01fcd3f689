"""The mirror step: after a step of the optimizer, weights are multiplied by a positive factor.

Gradient descent moves a small weight as fast as a large one. With the mirror step a weight moves in
proportion to ``1 + alpha |w|``: large weights move faster, small ones fall towards zero, and no
weight changes its sign by it. A zero stays zero.

Source: Jacobs, Gadhikar, Rubio-Madrigal, Burkholz, "Hyperbolic Aware Minimization: Implicit Bias
for Sparsity", ICLR 2026 (arXiv:2506.02630). The authors report that it improves AC/DC on ResNet-50
more than RigL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from acdc.errors import InputError
from acdc.hooks.binding import is_bound
from acdc.hooks.fresh import NotKnown, trial
from acdc.hooks.kept_steps import kept_in_last_step
from acdc.hooks.kept_weight import KeptState, KeptWeight
from acdc.hooks.optimizers import OneOrSeveral, as_optimizers, params_of
from acdc.hooks.steps import is_nested

LIMIT = 5.0  # of the exponent in one step, as in the authors' code

_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


class MirrorStep:
    """Multiplies weights by ``exp(-lr (alpha sign(w) g + beta))`` after every optimizer step.

    ``w`` is the weight after the optimizer's step, ``lr`` the learning rate of its group, and ``g``
    the gradient that the optimizer was given (clipped, say). Tensors of two dimensions or more are
    multiplied, as in the paper: weights, no biases and no norms. The exponent is limited to ±5. A
    weight without a gradient, and a step that a GradScaler skips, change nothing.

    The object has no state: after loading a checkpoint, build it again. With the engine, weights of
    which only the kept elements are stepped are multiplied in these elements alone.

    >>> weight = torch.nn.Parameter(torch.tensor([[2.0, -2.0, 0.0]]))
    >>> optimizer = torch.optim.SGD([weight], lr=0.5)
    >>> mirror = MirrorStep(optimizer, alpha=1.0)
    >>> weight.grad = torch.tensor([[1.0, 1.0, 0.0]])
    >>> optimizer.step()  # to 1.5 and -2.5, then times exp(-0.5) and exp(0.5)
    >>> weight.detach()
    tensor([[ 0.9098, -4.1218,  0.0000]])

    Args:
        optimizer: Any optimizer with a learning rate, inside any wrapper, or a list of several.
            Build the mirror step before the :class:`~acdc.Sparsifier`, whose hooks come after it.
        alpha: Strength, in units of one over a weight: the useful values depend on the size of the
            weights. The paper uses 200 on ImageNet; networks with larger weights want less.
        beta: Decay: without a gradient weights shrink by ``exp(-lr beta)`` a step.
        normalized: Whether ``g`` is the direction of Adam, ``m_hat / (sqrt(v_hat) + eps)``, instead
            of the gradient. For Adam and AdamW, whose rates are too small for the gradient to have
            an effect. This form is not in the paper: it is ours.

    Raises:
        InputError: ``alpha`` or ``beta`` is no number from 0 up, both are 0, the optimizer has a
            sparsifier already, or the mirror step has no meaning for this optimizer.
    """

    def __init__(
        self,
        optimizer: OneOrSeveral,
        alpha: float,
        beta: float = 0.0,
        *,
        normalized: bool = False,
    ) -> None:
        check_strength("alpha", alpha)
        check_strength("beta", beta)
        if alpha == beta == 0:
            raise InputError(
                "The mirror step has alpha=0 and beta=0, and would change nothing. Give one of "
                "them a positive number, or leave the mirror step out."
            )
        self.alpha, self.beta, self.normalized = alpha, beta, normalized
        optimizers = tuple(as_optimizers(optimizer))
        for each in optimizers:
            _check(each, normalized)
        self._handles = [each.register_step_post_hook(self._after) for each in optimizers]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if is_nested(optimizer) or (found_inf is not None and bool(found_inf)):
            return  # the step is not over; or a fused optimizer has skipped it
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.dim() >= 2:
                    self._multiply(optimizer, group, param)

    def _multiply(self, optimizer: Optimizer, group: Mapping[str, Any], param: Tensor) -> None:
        """Multiply a weight: all of it, or its kept elements if only these were stepped."""
        kept = kept_in_last_step(optimizer, param)
        g = self._direction(optimizer, group, param, kept)
        if kept is None:
            param.mul_(self._factor(param, g, group["lr"]))
        else:
            values = kept.kept(param)
            kept.put(values.mul_(self._factor(values, g, group["lr"])))

    def _factor(self, weight: Tensor, g: Tensor, lr: float | Tensor) -> Tensor:
        exponent = weight.sign().mul_(g).mul_(self.alpha).add_(self.beta).mul_(-lr)
        return exponent.clamp_(-LIMIT, LIMIT).exp_()

    def _direction(
        self,
        optimizer: Optimizer,
        group: Mapping[str, Any],
        param: Tensor,
        kept: KeptWeight | None,
    ) -> Tensor:
        """Return ``g`` of a weight: of its shape, or ``[k]`` for its kept elements."""
        if self.normalized:
            state = optimizer.state[param]
            if kept is not None and isinstance(state, KeptState):
                state = state.of_kept()
            return _adam_direction(optimizer, state, group)
        assert param.grad is not None
        grad = param.grad.to_dense() if param.grad.is_sparse else param.grad
        if kept is not None:
            grad = kept.kept(grad)
        return -grad if group.get("maximize") else grad


def check_strength(name: str, value: float) -> None:
    """Raise InputError unless ``alpha`` or ``beta`` of a mirror step is a number from 0 up."""
    if not 0 <= value < math.inf:
        raise InputError(f"{name} is {value!r}. It is a number from 0 up.")


def _adam_direction(
    optimizer: Optimizer, state: Mapping[str, Any], group: Mapping[str, Any]
) -> Tensor:
    """Return ``m_hat / (sqrt(v_hat) + eps)``.

    With ``maximize`` Adam stores moments of the negated gradient, so the sign is right already.

    Raises:
        InputError: The state is not that of Adam.
    """
    if missing := [key for key in _ADAM_STATE if key not in state]:
        raise InputError(
            f"The mirror step with normalized=True reads the moments of Adam, and "
            f"{type(optimizer).__name__} keeps no {missing[0]!r} but {sorted(state)}. Use Adam or "
            f"AdamW, or normalized=False."
        )
    step = state["step"]
    if not isinstance(step, Tensor) or step.device.type == "cpu":
        step = float(step)  # a float is exact; on other devices a tensor needs no waiting
    beta1, beta2 = group["betas"]
    second = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    scale = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
    direction: Tensor = (state["exp_avg"] / (1 - beta1**step)).div_(scale)
    return direction


# --- checks -------------------------------------------------------------------------------------


def _check(optimizer: Optimizer, normalized: bool) -> None:
    """Raise InputError unless the mirror step has a meaning for an optimizer."""
    kind = type(optimizer).__name__
    if is_bound(optimizer):
        raise InputError(
            f"The {kind} has a sparsifier already, whose work after a step must come after the "
            f"mirror step. Build the MirrorStep first, then the Sparsifier."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError(
            "LBFGS takes several steps within one call, and its history would not know the mirror "
            "step. Use SGD, Adam, AdamW or another optimizer that takes one step a call."
        )
    for group in optimizer.param_groups:
        if group.get("lr") is None:
            raise InputError(
                f"A parameter group of {kind} has no learning rate 'lr', which the mirror step is "
                f"scaled by. Use an optimizer with a learning rate."
            )
        if normalized and not (len(group.get("betas", ())) == 2 and "eps" in group):
            raise InputError(
                f"The mirror step with normalized=True reads the moments of Adam, and {kind} has "
                f"not the options 'betas' and 'eps' of Adam. Use Adam or AdamW, or "
                f"normalized=False."
            )
        if not normalized and _changes_gradients(optimizer, group):
            raise InputError(
                f"{kind} with these options changes the gradients in place, if it steps many "
                f"tensors at once (foreach), and the mirror step reads the gradients after the "
                f"step. Build it with foreach=False or fused=True."
            )
    if any(param.is_complex() for param in params_of(optimizer)):
        raise InputError(
            "A parameter is complex, and the mirror step follows the sign of a weight. Leave "
            "complex parameters to an optimizer of their own."
        )
    if copy := _copies_weights(optimizer):
        raise InputError(
            f"{kind} keeps a copy of the weights ({copy!r}) and moves the weights from there, so "
            f"the mirror step would be undone. Use an optimizer such as SGD or AdamW."
        )


def _changes_gradients(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Return whether torch's optimizer writes into the gradients when it steps them as a list."""
    writes = isinstance(optimizer, torch.optim.Rprop) or (
        isinstance(optimizer, torch.optim.SGD)
        and group["nesterov"]
        and not group["weight_decay"]
        and not group["maximize"]
    )
    foreach = group.get("foreach")
    if foreach is None and not group.get("fused"):  # torch's default: on accelerators
        foreach = any(param.device.type != "cpu" for param in group["params"])
    return writes and bool(foreach)


def _copies_weights(optimizer: Optimizer) -> str | None:
    """Return the entry of the state in which an optimizer keeps a copy of a weight, if any."""
    if type(optimizer).__module__.startswith("torch.optim"):
        return None
    for group in optimizer.param_groups:
        try:
            values = trial(optimizer, group).values if group["params"] else {}
        except NotKnown:
            continue
        if names := [key for key, value in values.items() if value == "weight"]:
            return names[0]
    return None
