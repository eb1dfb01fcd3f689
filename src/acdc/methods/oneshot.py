"""One-shot magnitude pruning of a trained dense model, and fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

from acdc import score
from acdc.layers import Layers
from acdc.methods.base import Reset
from acdc.methods.families import Phased, without_zeros
from acdc.methods.weights import Weights
from acdc.pattern import Pattern
from acdc.schedule import Plan, Schedule
from acdc.support import Support


@final
@dataclass(frozen=True)
class OneShot(Phased[None]):
    """Cut a trained dense model once, to its largest weights, and fine-tune them.

    The model must be trained: load its checkpoint before the sparsifier is built, and count its
    training with that of this run. Without fine-tuning, estimate BatchNorm statistics anew before
    the cut model is judged.

    Args:
        pattern: What is kept.
        schedule: One sparse phase, the fine-tuning; or a dense one that trains the model, then a
            sparse one. No lengths and no learning rates are canonical: say which were taken.
        reset: As for :class:`~acdc.ACDC`, where a dense phase follows a sparse one.
        layers: Which layers are pruned; ``None``: the pattern's default.
        keep_zeros: Keep the zeros that the model has at the first cut, to prune a sparse network
            further. A layer that has more zeros than the pattern asks for keeps them all.

    Source: Han et al., NeurIPS 2015, section 3, with one cut.
    """

    name: ClassVar[str] = "oneshot"
    label: ClassVar[str] = "One-shot"
    citation: ClassVar[str] = """\
@inproceedings{han2015learning,
  title     = {Learning both Weights and Connections for Efficient Neural Networks},
  author    = {Han, Song and Pool, Jeff and Tran, John and Dally, William J.},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {28},
  year      = {2015},
  note      = {arXiv:1506.02626}
}
"""

    pattern: Pattern
    schedule: Plan | Schedule
    reset: Reset = "all"
    layers: Layers | None = None
    keep_zeros: bool = field(default=False, metadata={"added": True})

    def begin(self, step: int, weights: Weights, state: None) -> Support:
        """Keep the largest weights."""
        chosen = self.pattern.select(score.magnitude(weights))
        return without_zeros(chosen, weights) if self.keep_zeros else chosen
