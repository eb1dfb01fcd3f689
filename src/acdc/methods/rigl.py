"""RigL: drop by magnitude, grow by gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from acdc import score
from acdc.layers import Layers
from acdc.methods.base import Reset
from acdc.methods.families import Evolving, exchange
from acdc.methods.training import Masked
from acdc.methods.weights import Weights
from acdc.pattern import Unstructured
from acdc.schedule import Phase, Plan, Schedule
from acdc.support import Support


@final
@dataclass(frozen=True)
class RigL(Evolving):
    """Start from a random support; again and again, drop the smallest weights and grow those with
    the largest gradients.

    In every layer, the number of kept weights stays what it was. Grown weights start from zero with
    zero optimizer state; a weight that is dropped and grown in the same update keeps both.

    **An update takes the place of an optimizer step**, as in the authors' code: gradients of all
    weights are computed, the support changes, and no weight moves. The step still counts, for the
    clock and for a learning-rate schedule. The user's own call of ``optimizer.step()`` does run,
    without a gradient to act on, so a hook on it sees a step that changes nothing.

    Args:
        pattern: How many weights each layer keeps: ``Unstructured(s, "erk")`` or ``"uniform"``.
        schedule: Usually one sparse phase.
        drop: Share of the kept weights of a layer that is replaced, at first.
        every: Time between updates; the first one is the first step.
        until: Updates end here, counted from the start of the run; the share falls to 0 by then, on
            half a cosine. (The flag default of the authors' code is a constant share.)
        seed: Of the first support; all processes draw the same.
        reset: ``"entered"`` clears the optimizer state of what grows.
        layers: Which layers are pruned; ``None``: the pattern's default.

    Source: Evci et al., ICML 2020, algorithm 1; google-research/rigl, ``sparse_optimizers_base.py``
    and ``sparse_utils.py``. Ties go to the lower index, where that code adds noise.
    """

    name: ClassVar[str] = "rigl"
    label: ClassVar[str] = "RigL"
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

    pattern: Unstructured
    schedule: Plan | Schedule
    drop: float = 0.3
    every: str = "100st"
    until: str = "75%"
    seed: int = 0
    reset: Reset = "entered"
    layers: Layers | None = None

    @property
    def training(self) -> Masked:
        """Kept weights alone; an update, on the dense gradient, replaces the optimizer's step."""
        return Masked(dense_gradient=self._updates, instead=True)

    def _updates(self, step: int) -> bool:
        phase = self.resolved.phase_at(step)
        return phase.kind == "sparse" and self.due(step, phase)

    def go_on(
        self, step: int, phase: Phase, weights: Weights, support: Support, state: None
    ) -> Support:
        """Exchange weights where the step before was an update."""
        if not self.due(step - 1, phase):
            return support
        drop, grow = score.magnitude(weights), score.gradient(weights)
        return exchange(support, drop, grow, self.share(step - 1, phase))
