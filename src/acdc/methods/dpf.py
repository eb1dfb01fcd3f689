"""DPF: dynamic model pruning with feedback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from acdc.layers import Layers
from acdc.methods.base import Reset
from acdc.methods.families import Ramped
from acdc.methods.training import Behind
from acdc.methods.weights import Weights
from acdc.pattern import Block, Unstructured
from acdc.schedule import Phase, Plan, Schedule
from acdc.support import Support


@final
@dataclass(frozen=True)
class DPF(Ramped[None]):
    """Compute with the largest weights, and apply the gradient to all of them.

    The gradient is taken at the pruned network and moves the dense weights behind it, so a weight
    that was cut in error comes back by itself. The support is chosen anew again and again while the
    sparsity rises on a cubic, and holds from its end on. The dense weights are a by-product, in
    ``sparsifier.dense_weights``; beside DSD this is the closest relative of AC/DC, so report them.

    Args:
        pattern: What is kept in the end.
        schedule: Usually one sparse phase.
        first: Sparsity of the first choice.
        every: Time between choices of the support.
        length: Time from the first choice to the last.
        reset: Optimizer state cleared when weights come back: their momentum is what feeds back.
        layers: Which layers are pruned; ``None``: the pattern's default.

    Source: Lin et al., ICLR 2020, algorithm 1. The rise ends where the learning rate of the paper
    drops for the second time, at three quarters of 300 epochs; choices are 16 steps apart.
    """

    name: ClassVar[str] = "dpf"
    label: ClassVar[str] = "DPF"
    citation: ClassVar[str] = """\
@inproceedings{lin2020dpf,
  title     = {Dynamic Model Pruning with Feedback},
  author    = {Lin, Tao and Stich, Sebastian U. and Barba, Luis and Dmitriev, Daniil and
               Jaggi, Martin},
  booktitle = {International Conference on Learning Representations},
  year      = {2020},
  note      = {arXiv:2006.07253}
}
"""

    pattern: Unstructured | Block
    schedule: Plan | Schedule
    first: float = 0.0
    every: str = "16st"
    length: str = "75%"
    reset: Reset = "none"
    layers: Layers | None = None

    @property
    def training(self) -> Behind:
        """Dense weights, all of them trained, behind their largest."""
        return Behind()

    def go_on(
        self, step: int, phase: Phase, weights: Weights, support: Support, state: None
    ) -> Support:
        """Choose among all dense weights where it is due."""
        return (
            self._at(step).select(self.rank(weights, state)) if self.cuts(step, phase) else support
        )
