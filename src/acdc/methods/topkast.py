"""Top-KAST: top-K always sparse training."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, final

import torch
from torch import Tensor

from acdc import score
from acdc.errors import InputError
from acdc.layers import Layers
from acdc.methods.base import Reset
from acdc.methods.families import Renewed
from acdc.methods.training import Behind
from acdc.methods.weights import Weights
from acdc.pattern import Block, Unstructured
from acdc.schedule import Plan, Schedule
from acdc.support import Support, check_sparsity


@final
@dataclass(frozen=True)
class TopKAST(Renewed):
    """Compute with the largest weights, train somewhat more of them, and keep the rest in store.

    The forward pass uses set A, the largest weights at the pattern's sparsity; gradients go to set
    B, the largest at the lower sparsity ``backward``, so that weights outside of A can grow into
    it. Weights outside of B are stored and do not change. A penalty draws B without A to zero
    faster than A: ``penalty / density of A`` against ``penalty``, on half the squared weights.

    Args:
        pattern: Set A.
        schedule: Usually one sparse phase.
        backward: Sparsity of set B, lower than the pattern's.
        penalty: Factor of the exploration penalty. It replaces the weight decay of the optimizer
            on pruned layers, which acts too if it is set.
        every: Time between choices of both sets. In the paper every step; every hundredth made no
            difference there.
        reset: Optimizer state cleared when weights come into A. They are trained before, in B.
        layers: Which layers are pruned; ``None``: the pattern's default.

    Where it is odd: gradients of all weights are computed and those outside of B dropped before
    the step, so no kernel gains by B and a clipping norm sees all. Momentum does not move weights
    outside of B. The paper trains without momentum.

    Source: Jayakumar et al., NeurIPS 2020, sections 2.1 to 2.3; neuralmagic/sparseml,
    ``modifier_pruning_topkast.py``, decays by learning rate instead of through the gradient.
    """

    name: ClassVar[str] = "topkast"
    label: ClassVar[str] = "Top-KAST"
    citation: ClassVar[str] = """\
@inproceedings{jayakumar2020topkast,
  title     = {{Top-KAST}: Top-K Always Sparse Training},
  author    = {Jayakumar, Siddhant M. and Pascanu, Razvan and Rae, Jack W. and Osindero, Simon and
               Elsen, Erich},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {33},
  year      = {2020},
  note      = {arXiv:2106.03517}
}
"""
    patterns = (Unstructured, Block)

    pattern: Unstructured | Block
    schedule: Plan | Schedule
    backward: float = 0.5
    penalty: float = 1e-4
    every: str = "100st"
    reset: Reset = "none"
    layers: Layers | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.backward, "backward")
        if self.backward > self.pattern.sparsity:
            raise InputError(
                f"TopKAST(backward=...) is {self.backward}, and the pattern has the sparsity "
                f"{self.pattern.sparsity}. What is trained holds what is computed with: lower it."
            )
        if not self.penalty >= 0:
            raise InputError(f"TopKAST(penalty=...) is {self.penalty!r}. Give a number from 0 up.")

    @property
    def training(self) -> Behind:
        """Dense weights behind set A; the optimizer moves set B."""
        share = self.backward / self.pattern.sparsity if self.pattern.sparsity else 0.0
        return Behind(trained=self._set_b, trained_share=Fraction(share), pull=self._penalty)

    def _set_b(self, weights: Weights, support: Support) -> Support | None:
        """Choose set B, which holds A."""
        if support.is_full:
            return None
        return self.pattern.at(self.backward).select(score.magnitude(weights))

    def _penalty(self, weight: Tensor, kept: Tensor, trained: Tensor | None) -> Tensor | None:
        """Return the gradient of the exploration penalty."""
        if not self.penalty or trained is None:
            return None
        outside = self.penalty / (1 - self.pattern.sparsity)
        return weight * torch.where(kept, self.penalty, outside).masked_fill(~trained, 0.0)
