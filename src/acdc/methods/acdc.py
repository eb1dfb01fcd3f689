"""AC/DC: alternating compressed and decompressed training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from acdc import score
from acdc.layers import Layers
from acdc.methods.base import Reset
from acdc.methods.families import Phased
from acdc.methods.weights import Weights
from acdc.pattern import Pattern
from acdc.schedule import Plan, Schedule
from acdc.support import Support


@final
@dataclass(frozen=True)
class ACDC(Phased[None]):
    """Train dense, cut to the largest weights, train only those, bring all back, and again.

    At the first step of a sparse phase the pattern selects the largest magnitudes of the dense
    weights, to the full sparsity at once; the support then stays until the phase ends. At the first
    step of a dense phase every weight is free again: pruned ones start from zero, and momentum is
    cleared before the first dense update.

    Args:
        pattern: What is kept in a sparse phase.
        schedule: The phases; a plan is resolved with :meth:`resolve`.
        reset: Optimizer state cleared when pruned weights come back: ``"all"`` of every parameter
            (the paper), ``"entered"``: only of the weights that come back, ``"none"``.
        layers: Which layers are pruned; ``None``: the pattern's default, which is the paper's.

    Source: Peste, Iofinova, Vladu, Alistarh, NeurIPS 2021, algorithm 1 and section 3.2.
    """

    name: ClassVar[str] = "acdc"
    label: ClassVar[str] = "AC/DC"
    citation: ClassVar[str] = """\
@inproceedings{peste2021acdc,
  title     = {{AC/DC}: Alternating Compressed/DeCompressed Training of Deep Neural Networks},
  author    = {Peste, Alexandra and Iofinova, Eugenia and Vladu, Adrian and Alistarh, Dan},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {34},
  year      = {2021},
  note      = {arXiv:2106.12379}
}
"""

    pattern: Pattern
    schedule: Plan | Schedule
    reset: Reset = "all"
    layers: Layers | None = None

    def begin(self, step: int, weights: Weights, state: None) -> Support:
        """Keep the largest weights, to the full sparsity at once."""
        return self.pattern.select(score.magnitude(weights))
