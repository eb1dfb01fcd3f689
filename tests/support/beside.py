"""A network on the engine beside the same network in plain PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import acdc
from support.engine_nets import backward, close, cut, tensors


class Beside:
    """A network on the engine, and the same network masked and dense.

    Args:
        model: The network. Weights of two and of four dimensions get masks.
        args, kwargs: What it is called with: one of both.

    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        assert not (args and kwargs)
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if first.is_floating_point():  # and not the numbers of words
            model = model.to(first.dtype)
        generator = torch.Generator().manual_seed(1)
        masks = {
            name: torch.rand(p.shape, generator=generator) < 0.4
            for name, p in model.named_parameters()
            if p.dim() in (2, 4)
        }
        cut(model, masks)
        self.model, self.plain, self.masks = model, copy.deepcopy(model), masks
        self.names = dict(model.named_parameters()).keys()
        self.engine = acdc.Engine(model, kwargs or args, choose=False)
        self.engine.compress(masks)

    def check(self, *args: Any, limit: float = 1e-11, least: float = 1e-2, **kwargs: Any) -> None:
        """Compare outputs, gradients of parameters and of the first argument, and buffers.

        Args:
            args, kwargs: What both networks are called with.
            limit: As in ``close``.
            least: The same for gradients of parameters. Some of them are rounding errors: that of a
                bias before a BatchNorm, or of the keys of an attention.

        """
        want, got = (self._pass(net, args, kwargs) for net in (self.plain, self.model))
        assert want.keys() == got.keys()
        for name in want:
            close(got[name], want[name], limit, name, least if name in self.names else 0.0)

    def _pass(
        self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net.zero_grad()
        given = [args[0].clone().requires_grad_()] if len(args) == 1 else list(args)
        outs = net(*given, **kwargs)
        outs = tensors([o for o in outs if o is not None] if isinstance(outs, tuple) else outs)
        outs = [out for out in outs if out.requires_grad]
        backward(outs)
        grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        found = {name: grad * self.masks.get(name, 1) for name, grad in grads.items()}
        found |= {f"output {i}": out.detach() for i, out in enumerate(outs)}
        if len(args) == 1:
            found["input"] = given[0].grad
        return found | dict(net.named_buffers())

    @property
    def sparse(self) -> set[str]:
        """The layers that run sparse."""
        return {name for name, choice in self.engine.choices.items() if choice.sparse}
