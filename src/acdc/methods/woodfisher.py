"""WoodFisher: pruning by the inverse of the empirical Fisher matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from acdc.errors import InputError
from acdc.layers import Layers
from acdc.methods.base import Past, Reset, Weights
from acdc.methods.families import Ramped
from acdc.pattern import Block, Unstructured
from acdc.schedule import Plan, Schedule
from acdc.score import Scores


@final
@dataclass(frozen=True)
class WoodFisher(Ramped):
    """Cut a trained dense model as :class:`~acdc.Gradual` does, but by what a cut costs the loss to
    second order, and move the other weights to make up for it.

    ``F = λ I + mean of g gᵀ``, in blocks, over gradients ``g`` of the last steps. A weight has the
    score ``w_q² / [F⁻¹]_qq``; a cut of the set Q adds ``-F⁻¹ v`` to the others, where
    ``v_q = w_q / [F⁻¹]_qq`` in Q and 0 elsewhere.

    Args:
        pattern: What is kept in the end.
        schedule: As for Gradual. A phase that is sparse from step 0 has no gradients at its first
            cut, which then is one by magnitude (``F = λ I``).
        first: Sparsity of the first cut.
        every: Time between cuts.
        length: Time from the first cut to the last; the rest of the phase is fine-tuning.
        gradients: Steps before a cut whose gradients make up F, or as many as there are since the
            last one. Until the cut they take 4 bytes per kept weight and step (300,000 weights, 64
            steps: 77 MB), in checkpoints, too.
        block: Weights in a block of F: so many kept ones of a layer that follow each other.
        damping: λ. Where it is above the squared gradients, which are small at a trained model,
            cuts go by magnitude and nothing is made up for: lower it.
        compensation: Factor of what is added to the other weights; 0: nothing is.
        reset: As for :class:`~acdc.ACDC`, where a dense phase follows a sparse one.
        layers: Which layers are pruned; ``None``: the pattern's default.

    Where we differ: the gradients are those of the training steps themselves, of whole batches, in
    training mode, and as clipped as the optimizer gets them; the authors stop before a cut and take
    400 gradients of batches of 400, in evaluation mode. Their blocks are 2,000 places of a layer,
    cut or not. They apply Woodbury's identity once for each gradient; here it is applied once for
    all of them, so that a matrix of the size of a block is never there.

    Source: Singh and Alistarh, NeurIPS 2020, sections 3 and 4; IST-DASLab/WoodFisher,
    ``woodfisherblock.py``.
    """

    name: ClassVar[str] = "woodfisher"
    citation: ClassVar[str] = """\
@inproceedings{singh2020woodfisher,
  title     = {{WoodFisher}: Efficient Second-Order Approximation for Neural Network Compression},
  author    = {Singh, Sidak Pal and Alistarh, Dan},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {33},
  year      = {2020},
  note      = {arXiv:2004.14340}
}
"""
    pretrained: ClassVar[bool] = True
    has_memory: ClassVar[bool] = True

    pattern: Unstructured | Block
    schedule: Plan | Schedule
    first: float = 0.05
    every: str = "5%"
    length: str = "40%"
    gradients: int = 64
    block: int = 2000
    damping: float = 1e-5
    compensation: float = 1.0
    reset: Reset = "entered"
    layers: Layers | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("gradients", "block"):
            number = getattr(self, field)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise InputError(
                    f"WoodFisher({field}=...) is {number!r}. Give a whole number from 1 up."
                )
        if not 0 < self.damping < math.inf:
            raise InputError(
                f"WoodFisher(damping=...) is {self.damping!r}. Without it F has no inverse: give a "
                f"number above 0, such as 1e-5."
            )
        if not 0 <= self.compensation < math.inf:
            raise InputError(
                f"WoodFisher(compensation=...) is {self.compensation!r}. Give a number from 0 up."
            )

    def remembers(self, step: int) -> bool:
        """Whether a cut is due within as many steps as F has gradients."""
        ahead = range(step + 1, step + self.gradients + 1)
        return any(self.cuts(at, self.resolved.phase_at(at)) for at in ahead)

    def rank(self, params: Weights) -> Scores:
        """Return ``w² / [F⁻¹]_qq``, of all layers at once: they are read several times."""
        return Scores.of({name: self._score(params, name) for name in params})

    def _score(self, params: Weights, name: str) -> Tensor:
        weight = params[name].detach()
        score, past = self.damping * weight.double().square(), params.past(name)
        if past is not None:
            score[past.kept] /= torch.cat([_diagonal(root) for root in self._roots(past)])
        return score.to(torch.promote_types(weight.dtype, torch.float32))

    def adjust(self, params: Weights, name: str, kept: Tensor) -> Tensor | None:
        """Return ``-F⁻¹ v``."""
        past = params.past(name)
        if past is None or not self.compensation:
            return None
        weight = params[name]
        leaving = weight.double().masked_fill(kept, 0.0)[past.kept].split(self.block)
        moves = []
        for w, root in zip(leaving, self._roots(past), strict=True):
            v = w / _diagonal(root)
            moves.append(root.T @ (root @ v) - v)
        move = torch.zeros_like(weight)
        move[past.kept] = self.compensation * torch.cat(moves).to(weight.dtype)
        return move

    def _roots(self, past: Past) -> Iterator[Tensor]:
        """Yield ``R``, [steps, block] in double precision, of every block:
        ``λ F⁻¹ = I - RᵀR``, from ``F = λ I + GᵀG / N``, ``L Lᵀ = N λ I + G Gᵀ`` and ``L R = G``.
        """
        for rows in zip(*(row.split(self.block) for row in past.gradients), strict=True):
            g = torch.stack(rows).double()
            gram = g @ g.T
            gram.diagonal().add_(len(rows) * self.damping)
            # Without a check: of a gradient that is NaN the score is, too, and the pattern says so.
            lower = torch.linalg.cholesky_ex(gram).L
            yield torch.linalg.solve_triangular(lower, g, upper=False)


def _diagonal(root: Tensor) -> Tensor:
    """Return the diagonal of ``λ F⁻¹``, which rounding may not bring down to zero."""
    return (1 - root.square().sum(0)).clamp_min(torch.finfo(root.dtype).eps)
