"""Static sparse training: a random support, drawn once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from acdc import score
from acdc.layers import Layers
from acdc.methods.base import Reset
from acdc.methods.families import Phased, check_seed
from acdc.methods.weights import Weights
from acdc.pattern import Pattern
from acdc.schedule import Plan, Schedule
from acdc.support import Support


@final
@dataclass(frozen=True)
class Static(Phased[None]):
    """Draw the support at random, and train that network to the end.

    The floor of what every dynamic method has to beat. Initial weights are not scaled up for the
    inputs that are gone, as in the RigL code.

    Args:
        pattern: What is kept. ``Unstructured(s, "erk")`` or ``"uniform"``, as in the RigL paper.
        schedule: Usually one sparse phase. A phase that follows a dense one draws another support.
        seed: Of the draw; all processes draw the same.
        reset: As for :class:`~acdc.ACDC`, where a dense phase follows a sparse one.
        layers: Which layers are pruned; ``None``: the pattern's default.

    Source: Evci et al., RigL, ICML 2020, section 4 ("Static"); google-research/rigl,
    ``training_method=scratch``.
    """

    name: ClassVar[str] = "static"
    label: ClassVar[str] = "Static"
    citation: ClassVar[str] = """\
@inproceedings{evci2020rigl,
  title     = {Rigging the Lottery: Making All Tickets Winners},
  author    = {Evci, Utku and Gale, Trevor and Menick, Jacob and Castro, Pablo Samuel and
               Elsen, Erich},
  booktitle = {International Conference on Machine Learning},
  year      = {2020},
  note      = {arXiv:1911.11134}
}
"""

    pattern: Pattern
    schedule: Plan | Schedule
    seed: int = 0
    reset: Reset = "all"
    layers: Layers | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)

    def begin(self, step: int, weights: Weights, state: None) -> Support:
        """Draw the support; step and seed alone decide."""
        return self.pattern.select(score.random(weights, self.seed, step))
