"""A network on the engine beside the same network in plain PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import acdc
from support.engine_nets import backward, close, cut


class Beside:
    """A network on the engine, and the same network masked and dense.

    Args:
        model: The network. Weights of two dimensions and more get masks.
        x: Its input.

    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        model = model.to(x.dtype)
        generator = torch.Generator().manual_seed(1)
        masks = {
            name: torch.rand(p.shape, generator=generator) < 0.4
            for name, p in model.named_parameters()
            if p.dim() > 1
        }
        cut(model, masks)
        self.model, self.plain, self.masks = model, copy.deepcopy(model), masks
        self.engine = acdc.Engine(model, x, choose=False)
        self.engine.compress(masks)

    def check(self, x: Tensor, limit: float = 1e-11, least: float = 0.1) -> None:
        """Compare outputs, gradients and buffers."""
        want, got = (self._pass(net, x) for net in (self.plain, self.model))
        assert want.keys() == got.keys()
        for name in want:
            close(got[name], want[name], limit, name, least)

    def _pass(self, net: nn.Module, x: Tensor) -> dict[str, Any]:
        torch.manual_seed(0)
        net.zero_grad()
        given = x.clone().requires_grad_()
        out = net(given)
        outs = out if isinstance(out, tuple) else (out,)
        backward([*outs])
        grads = {n: p.grad * self.masks.get(n, 1) for n, p in net.named_parameters()}
        found = {f"out {i}": o.detach() for i, o in enumerate(outs)}
        return found | {"x": given.grad} | grads | dict(net.named_buffers())

    @property
    def sparse(self) -> set[str]:
        """The layers that run sparse."""
        return {name for name, choice in self.engine.choices.items() if choice.sparse}
