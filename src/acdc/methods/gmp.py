"""GMP: gradual magnitude pruning."""

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
class GMP(Ramped[None]):
    """In one run, cut the smallest weights little by little; what is cut does not come back.

    The sparsity rises on a cubic, from ``first`` at the first step of the sparse phase to that of
    the pattern, ``length`` later; both are met exactly. (Several published schedules end a step
    early, and stop at 79.9 % of 80 %.)

    Args:
        pattern: What is kept in the end.
        schedule: A dense phase, if any, then a sparse one. The dense twin is the end of the former.
        first: Sparsity of the first cut.
        every: Time between cuts.
        length: Time from the first cut to the last. The default ends at three quarters of a run
            that is sparse from its start.
        reset: As for :class:`~acdc.ACDC`, where a dense phase follows a sparse one.
        layers: Which layers are pruned; ``None``: the pattern's default.
        keep_zeros: Keep the zeros that the model has at the first cut, to prune a sparse network
            further. A layer that has more zeros than the pattern asks for keeps them all.

    Source: Zhu and Gupta, 2017, section 3.
    """

    name: ClassVar[str] = "gmp"
    label: ClassVar[str] = "GMP"
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
    first: float = 0.0
    every: str = "100st"
    length: str = "75%"
    reset: Reset = "entered"
    layers: Layers | None = None
    keep_zeros: bool = field(default=False, metadata={"added": True})
