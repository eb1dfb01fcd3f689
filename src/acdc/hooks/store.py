"""The dense weights behind a sparse view, for a method that trains them (Top-KAST, DPF, SR-STE,
STR).

Nothing is wrapped: between steps a parameter holds the view, zeros included, and its dense weights
wait in the store. ``put_in`` copies them into the parameters for the optimizer's step, and
``take_over`` copies the result back. The model is sparse whenever the user looks at it, evaluates
it or saves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from acdc.engine.kept import clear
from acdc.methods.training import Behind, Training
from acdc.methods.weights import Weights
from acdc.shards import local, placed
from acdc.support import Support


class DenseStore:
    """Holds the dense weights of a sparse phase. Of a ``Masked`` method it stays empty.

    Args:
        params: The prunable weights by name.
        training: How they are trained.

    Attributes:
        dense: The dense weights by name; empty in a dense phase.
        trained: The weights that the optimizer may move; ``None``: all of them.
        dense_now: Whether the parameters hold the dense weights now, and not their view. Every
            method of this class asserts the value that it needs.
    """

    def __init__(self, params: Mapping[str, Tensor], training: Training) -> None:
        self._params = params
        self._training = training if isinstance(training, Behind) else None
        self.dense: dict[str, Tensor] = {}
        self.trained: Support | None = None
        self.dense_now = False

    def put_in(self, support: Support, scale: Tensor | None) -> None:
        """Put the dense weights into the parameters, and prepare their gradients, before a step.

        Args:
            support: The support now.
            scale: Factor of all gradients, which a fused optimizer undoes by itself.
        """
        assert not self.dense_now
        for name, whole in self.dense.items():
            dense, grad = local(whole), self._params[name].grad
            local(self._params[name]).copy_(dense)
            trained = None if self.trained is None else local(self.trained[name])
            if grad is None:
                continue
            if trained is not None:
                clear(local(grad), ~trained)
            pull = self._pull(dense, local(support[name]), trained)
            if pull is not None:
                local(grad).add_(pull if scale is None else pull * scale)
        self.dense_now = bool(self.dense)

    def clear_gradients_of_zeros(self) -> None:
        """Clear the gradient where the view is zero, unless it passes straight through."""
        assert not self.dense_now
        if self._training is None or self._training.straight_through:
            return
        for name in self.dense:
            param = self._params[name]
            if param.grad is not None:
                clear(local(param.grad), local(param) == 0)

    def take_over(self) -> None:
        """Take over what the step made of the weights that are trained; the others stay."""
        assert self.dense_now == bool(self.dense)
        for name, whole in self.dense.items():
            param, dense = local(self._params[name]), local(whole)
            if self.trained is not None:
                param.copy_(torch.where(local(self.trained[name]), param, dense))
            dense.copy_(param)

    def fill(self, weights: Weights, support: Support) -> None:
        """Store the weights as they are, dense, because the support changes to ``support``."""
        assert self.dense_now == bool(self.dense)
        if self._training is None:
            return
        choose = self._training.trained
        self.trained = None if choose is None else choose(weights, support)
        self.dense = {} if support.is_full else self.clones()
        self.dense_now = bool(self.dense)

    def show(self, state: Any) -> None:
        """Turn the parameters, whose weights outside the support are zero, into the view."""
        if self._training is not None and self._training.view is not None:
            for name in self.dense:
                param = local(self._params[name])
                param.copy_(self._training.view(name, param, state))
        self.dense_now = False

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Put the dense weights back on leaving the context, if the parameters hold them now."""
        dense = self.clones() if self.dense_now else {}
        try:
            yield
        finally:
            assert not self.dense_now
            with torch.no_grad():
                for name, value in dense.items():
                    local(self._params[name]).copy_(local(value))
            self.dense_now = bool(dense)

    def clones(self) -> dict[str, Tensor]:
        """Return copies of the parameters as they are now."""
        return {name: param.detach().clone() for name, param in self._params.items()}

    def load(self, dense: Mapping[str, Tensor], trained: Support | None) -> None:
        """Hold dense weights from a checkpoint. The parameters hold their view."""
        params = self._params
        self.dense = {
            n: placed(dense[n], params[n]).to(params[n].device, params[n].dtype, copy=True)
            for n in dense
        }
        self.trained, self.dense_now = trained, False

    def _pull(self, dense: Tensor, kept: Tensor, trained: Tensor | None) -> Tensor | None:
        assert self._training is not None
        return self._training.pull and self._training.pull(dense, kept, trained)
