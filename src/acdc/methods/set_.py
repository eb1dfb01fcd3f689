"""SET: sparse evolutionary training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from acdc import score
from acdc.layers import Layers
from acdc.methods.base import Reset
from acdc.methods.families import Evolving, exchange
from acdc.methods.weights import Weights
from acdc.pattern import Unstructured
from acdc.schedule import Phase, Plan, Schedule
from acdc.support import Support


@final
@dataclass(frozen=True)
class SET(Evolving):
    """Start from a random support; again and again, drop the smallest weights and grow others at
    random.

    In every layer, the number of kept weights stays what it was. Grown weights start from zero with
    zero optimizer state. A weight may be dropped and drawn again in the same update; it then goes
    on as if nothing had happened.

    Args:
        pattern: How many weights each layer keeps: ``Unstructured(s, "erk")`` or ``"uniform"``.
        schedule: Usually one sparse phase.
        drop: Share of the kept weights of a layer that is replaced, at first.
        every: Time between updates.
        until: Updates end here, counted from the start of the run; the share falls to 0 by then, on
            half a cosine.
        seed: Of the first support and of all growth; all processes draw the same.
        reset: ``"entered"`` clears the optimizer state of what grows.
        layers: Which layers are pruned; ``None``: the pattern's default.

    Source: Mocanu et al., Nature Communications 2018. The paper drops a constant share each epoch,
    the smallest positive and the largest negative weights; by magnitude, with a share on a cosine,
    is what all later comparisons run (google-research/rigl, jaxpruner), and so do we.
    """

    name: ClassVar[str] = "set"
    label: ClassVar[str] = "SET"
    citation: ClassVar[str] = """\
@article{mocanu2018set,
  title   = {Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity
             Inspired by Network Science},
  author  = {Mocanu, Decebal Constantin and Mocanu, Elena and Stone, Peter and Nguyen, Phuong H. and
             Gibescu, Madeleine and Liotta, Antonio},
  journal = {Nature Communications},
  volume  = {9},
  pages   = {2383},
  year    = {2018},
  note    = {arXiv:1707.04780}
}
"""

    pattern: Unstructured
    schedule: Plan | Schedule
    drop: float = 0.3
    every: str = "100st"
    until: str = "75%"
    seed: int = 0
    reset: Reset = "entered"
    layers: Layers | None = None

    def go_on(
        self, step: int, phase: Phase, weights: Weights, support: Support, state: None
    ) -> Support:
        """Replace the smallest weights where an exchange is due."""
        if not self.due(step, phase):
            return support
        drop, grow = score.magnitude(weights), self.draw(step, weights)
        return exchange(support, drop, grow, self.share(step, phase))
