"""DSD: dense-sparse-dense training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

from acdc import score
from acdc.layers import Layers
from acdc.methods.base import Reset
from acdc.methods.families import Norms, Phased, norms_to_restore, restoring
from acdc.methods.training import Masked
from acdc.methods.weights import Weights
from acdc.pattern import Pattern
from acdc.schedule import Plan, Schedule
from acdc.support import Support


@final
@dataclass(frozen=True)
class DSD(Phased[Norms | None]):
    """Train dense, cut the smallest weights, train the rest, bring all back at zero and train on.

    What comes out is the dense network; sparsity is a means, and a moderate one (25 to 50 % in the
    paper). The closest relative of AC/DC, which has many short cycles, a high sparsity and a sparse
    end. Without a sparse phase at the end there is no pair: the result is the model as it stands.

    Args:
        pattern: What is kept in the sparse phase; the paper cuts every layer to one sparsity:
            ``Unstructured(0.3, "uniform")``.
        schedule: ``phases(epochs, [("dense", ...), ("sparse", ...), ("dense", ...)])``, and again
            if wanted. The split has no canonical default. The paper lowers the learning rate
            tenfold in the last phase.
        reset: As for :class:`~acdc.ACDC`: the state that is cleared before weights come back.
        layers: Which layers are pruned; ``None``: the pattern's default.
        restore_norms: Whether filters under BatchNorm get their norms of before the cut back, as
            for :class:`~acdc.ACDC`.

    Source: Han et al., ICLR 2017, algorithm 1. ``restore_norms`` is ours.
    """

    name: ClassVar[str] = "dsd"
    label: ClassVar[str] = "DSD"
    citation: ClassVar[str] = """\
@inproceedings{han2017dsd,
  title     = {{DSD}: Dense-Sparse-Dense Training for Deep Neural Networks},
  author    = {Han, Song and Pool, Jeff and Narang, Sharan and Mao, Huizi and Gong, Enhao and
               Tang, Shijian and Elsen, Erich and Vajda, Peter and Paluri, Manohar and
               Tran, John and Catanzaro, Bryan and Dally, William J.},
  booktitle = {International Conference on Learning Representations},
  year      = {2017},
  note      = {arXiv:1607.04381}
}
"""
    ends_dense: ClassVar[bool] = True

    pattern: Pattern
    schedule: Plan | Schedule
    reset: Reset = "all"
    layers: Layers | None = None
    restore_norms: bool = field(default=False, metadata={"added": True})

    @property
    def training(self) -> Masked:
        """Kept weights alone; filters may get their norms back with the others."""
        return Masked(rescale=restoring if self.restore_norms else None)

    def init(self, weights: Weights) -> Norms | None:
        """Return no norms, if they are to be restored later."""
        return {} if self.restore_norms else None

    def settle(self, weights: Weights, support: Support, state: Norms | None) -> Norms | None:
        """Remember the norms at the cut, and forget them when all weights come back."""
        return state if state is None else norms_to_restore(weights, support, state)

    def begin(self, step: int, weights: Weights, state: Norms | None) -> Support:
        """Keep the largest weights."""
        return self.pattern.select(score.magnitude(weights))
