"""WoodFisher: pruning by the inverse of the empirical Fisher matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from acdc.errors import InputError
from acdc.layers import Layers
from acdc.methods.base import Reset
from acdc.methods.families import Ramped
from acdc.methods.training import Masked
from acdc.methods.weights import Weights
from acdc.pattern import Block, Unstructured
from acdc.schedule import Plan, Schedule
from acdc.score import Scores
from acdc.support import Support

Remembered = tuple[Tensor, list[Tensor]]
"""A bool mask of the weights that were kept, and their gradients, ``[kept]``, one for each step."""

Memory = dict[str, Remembered]
"""What is remembered since the support last changed, by the name of the weight."""


@final
@dataclass(frozen=True)
class WoodFisher(Ramped[Memory]):
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
        keep_zeros: Keep the zeros that the model has at the first cut, to prune a sparse network
            further. A layer that has more zeros than the pattern asks for keeps them all.

    Where we differ: the gradients are those of the training steps themselves, of whole batches, in
    training mode, and as clipped as the optimizer gets them; the authors stop before a cut and take
    400 gradients of batches of 400, in evaluation mode. Their blocks are 2,000 places of a layer,
    cut or not. They apply Woodbury's identity once for each gradient; here it is applied once for
    all of them, so that a matrix of the size of a block is never there.

    Source: Singh and Alistarh, NeurIPS 2020, sections 3 and 4; IST-DASLab/WoodFisher,
    ``woodfisherblock.py``.
    """

    name: ClassVar[str] = "woodfisher"
    needs_whole_weights: ClassVar[str] = "it inverts matrices over blocks of whole weights"
    label: ClassVar[str] = "WoodFisher"
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
    keep_zeros: bool = field(default=False, metadata={"added": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gradients", "block"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise InputError(
                    f"WoodFisher({name}=...) is {number!r}. Give a whole number from 1 up."
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

    @property
    def training(self) -> Masked:
        """Kept weights alone; a cut moves them."""
        return Masked(move=self._moves)

    def init(self, weights: Weights) -> Memory:
        """Return an empty memory."""
        return {}

    def observe(self, step: int, weights: Weights, support: Support, state: Memory) -> Memory:
        """Remember the gradients of the kept weights, if a cut is due soon."""
        if not self._remembers(step):
            return state
        memory = {}
        for name, weight in weights.items():
            kept, rows = state.get(name, (support[name], []))
            gradient = weights.gradient(name)
            row = (torch.zeros_like(weight) if gradient is None else gradient)[kept]
            memory[name] = (kept, [*rows, row])
        return memory

    def _remembers(self, step: int) -> bool:
        """Return whether a cut is due within as many steps as F has gradients."""
        ahead = range(step + 1, step + self.gradients + 1)
        return any(self.cuts(at, self.resolved.phase_at(at)) for at in ahead)

    def settle(self, weights: Weights, support: Support, state: Memory) -> Memory:
        """Forget: the gradients were those of another support."""
        return {}

    def rank(self, weights: Weights, state: Memory) -> Scores:
        """Return ``w² / [F⁻¹]_qq``, of all layers at once: they are read several times."""
        return Scores.of({n: self._score(weights[n].detach(), state.get(n)) for n in weights})

    def _score(self, weight: Tensor, memory: Remembered | None) -> Tensor:
        score = self.damping * weight.double().square()
        if memory is not None:
            kept, rows = memory
            score[kept] /= torch.cat([_diagonal(root) for root in self._roots(rows)])
        return score.to(torch.promote_types(weight.dtype, torch.float32))

    def _moves(
        self, weights: Weights, support: Support, state: Memory
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield ``-F⁻¹ v`` of every layer with a memory."""
        if not self.compensation:
            return
        for name, (kept, rows) in state.items():
            weight = weights[name]
            leaving = weight.double().masked_fill(support[name], 0.0)[kept].split(self.block)
            moves = []
            for w, root in zip(leaving, self._roots(rows), strict=True):
                v = w / _diagonal(root)
                moves.append(root.T @ (root @ v) - v)
            move = torch.zeros_like(weight)
            move[kept] = self.compensation * torch.cat(moves).to(weight.dtype)
            yield name, move

    def _roots(self, gradients: list[Tensor]) -> Iterator[Tensor]:
        """Yield ``R``, [steps, block] in double precision, of every block:
        ``λ F⁻¹ = I - RᵀR``, from ``F = λ I + GᵀG / N``, ``L Lᵀ = N λ I + G Gᵀ`` and ``L R = G``.
        """
        for rows in zip(*(row.split(self.block) for row in gradients), strict=True):
            g = torch.stack(rows).double()
            gram = g @ g.T
            gram.diagonal().add_(len(rows) * self.damping)
            # Without a check: of a gradient that is NaN the score is, too, and the pattern says so.
            lower = torch.linalg.cholesky_ex(gram).L
            yield torch.linalg.solve_triangular(lower, g, upper=False)


def _diagonal(root: Tensor) -> Tensor:
    """Return the diagonal of ``λ F⁻¹``, which rounding may not bring down to zero."""
    return (1 - root.square().sum(0)).clamp_min(torch.finfo(root.dtype).eps)
