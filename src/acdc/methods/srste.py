"""SR-STE: N:M sparsity from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from acdc.errors import InputError
from acdc.layers import Layers
from acdc.methods.base import Reset
from acdc.methods.families import Renewed
from acdc.methods.training import Behind
from acdc.pattern import NM
from acdc.schedule import Plan, Schedule


@final
@dataclass(frozen=True)
class SRSTE(Renewed):
    """Compute with the N largest of every M weights, apply the gradient to all, and draw those
    that are cut to zero.

    The straight-through gradient alone lets the support flicker; a decay of the cut weights
    (sparse-refined) settles it. It goes through the gradient, and so into momentum.

    Args:
        pattern: ``NM(n, m)``.
        schedule: Usually one sparse phase.
        decay: Factor of the decay; 0 is the plain straight-through estimator.
        every: Time between choices of the support. The authors choose in every forward pass
            (``"1st"``); every change is recorded, so long runs had better not.
        reset: Optimizer state cleared when weights come back.
        layers: Which layers are pruned; ``None``: the pattern's default.

    Source: Zhou et al., ICLR 2021, equation 9; aojunzz/NM-sparsity, ``sparse_ops.py``.
    """

    name: ClassVar[str] = "srste"
    label: ClassVar[str] = "SR-STE"
    citation: ClassVar[str] = """\
@inproceedings{zhou2021srste,
  title     = {Learning {N:M} Fine-grained Structured Sparse Neural Networks From Scratch},
  author    = {Zhou, Aojun and Ma, Yukun and Zhu, Junnan and Liu, Jianbo and Zhang, Zhijie and
               Yuan, Kun and Sun, Wenxiu and Li, Hongsheng},
  booktitle = {International Conference on Learning Representations},
  year      = {2021},
  note      = {arXiv:2102.04010}
}
"""
    patterns = (NM,)

    pattern: NM
    schedule: Plan | Schedule
    decay: float = 2e-4
    every: str = "16st"
    reset: Reset = "none"
    layers: Layers | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.decay >= 0:
            raise InputError(f"SRSTE(decay=...) is {self.decay!r}. Give a number from 0 up.")

    @property
    def training(self) -> Behind:
        """Dense weights behind the kept ones; those that are cut decay."""
        return Behind(pull=self._decay)

    def _decay(self, weight: Tensor, kept: Tensor, trained: Tensor | None) -> Tensor | None:
        return (self.decay * weight).masked_fill(kept, 0.0) if self.decay else None
