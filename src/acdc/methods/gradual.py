"""Gradual magnitude pruning of a trained dense model, and fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

from acdc.layers import Layers
from acdc.methods.base import Reset
from acdc.methods.families import Ramped
from acdc.pattern import Block, Unstructured
from acdc.schedule import Plan, Schedule


@final
@dataclass(frozen=True)
class Gradual(Ramped[None]):
    """Cut a trained dense model in a few large steps, with epochs between them to recover, and
    fine-tune what is left.

    The model must be trained: load its checkpoint before the sparsifier is built, and count its
    training with that of this run. As :class:`~acdc.GMP`, whose cubic this is, but the first cut is
    no formality and the next one waits for epochs.

    Args:
        pattern: What is kept in the end.
        schedule: One sparse phase; or a dense one that trains the model, then a sparse one.
        first: Sparsity of the first cut.
        every: Time between cuts.
        length: Time from the first cut to the last; the rest of the phase is fine-tuning.
        reset: As for :class:`~acdc.ACDC`, where a dense phase follows a sparse one.
        layers: Which layers are pruned; ``None``: the pattern's default.
        keep_zeros: Keep the zeros that the model has at the first cut, to prune a sparse network
            further. A layer that has more zeros than the pattern asks for keeps them all.

    Source: Zhu and Gupta, 2017, for the cubic; Singh and Alistarh, NeurIPS 2020, for the setting:
    from .05, every 5 of 100 epochs until the 40th, the learning rate falling from then on.
    """

    name: ClassVar[str] = "gradual"
    label: ClassVar[str] = "Gradual"
    citation: ClassVar[str] = """\
@article{zhu2017gmp,
  title   = {To prune, or not to prune: exploring the efficacy of pruning for model compression},
  author  = {Zhu, Michael and Gupta, Suyog},
  journal = {arXiv preprint arXiv:1710.01878},
  year    = {2017}
}
"""

    pattern: Unstructured | Block
    schedule: Plan | Schedule
    first: float = 0.05
    every: str = "5%"
    length: str = "40%"
    reset: Reset = "entered"
    layers: Layers | None = None
    keep_zeros: bool = field(default=False, metadata={"added": True})
