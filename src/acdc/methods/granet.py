"""GraNet: gradual pruning with regeneration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from acdc import score
from acdc.layers import Layers
from acdc.methods.base import Reset
from acdc.methods.families import Ramped, check_drop, check_seed, exchange
from acdc.methods.training import Masked
from acdc.methods.weights import Weights
from acdc.pattern import Pattern, Unstructured
from acdc.schedule import Phase, Plan, Schedule, cosine
from acdc.support import Support


@final
@dataclass(frozen=True)
class GraNet(Ramped[None]):
    """Cut the smallest weights little by little, and after every cut exchange some of the rest.

    The sparsity rises on a cubic, as that of :class:`~acdc.GMP`. After a cut, every layer lets the
    smallest of its kept weights go, and as many others come: those with the largest gradients, from
    zero. The share that is exchanged falls on half a cosine, from ``drop`` to 0 at the end of the
    phase; exchanges go on after the last cut. The step before an exchange computes the gradients of
    all weights.

    Args:
        pattern: What is kept in the end; ``Unstructured``. The authors' scope is ``"global"``.
        schedule: Usually one sparse phase.
        first: Sparsity at the start; 0: dense. A phase that begins at step 0 with more starts from
            a random support, for which the authors take ERK. A later phase keeps the largest.
        drop: Share of the kept weights of a layer that is exchanged, at first.
        every: Time between cuts, and between exchanges.
        length: Time from the start of the phase to the last cut.
        seed: Of a random start.
        reset: ``"entered"`` clears the optimizer state of what comes.
        layers: Which layers are pruned; ``None``: the pattern's default.

    Source: Liu et al., NeurIPS 2021, algorithm 1; VITA-Group/GraNet, ``sparselearning/core.py``:
    the share is 0.5, the last cut is at half of a run on CIFAR and at 30 % of one on ImageNet.
    """

    name: ClassVar[str] = "granet"
    label: ClassVar[str] = "GraNet"
    patterns: ClassVar[tuple[type[Pattern], ...]] = (Unstructured,)
    citation: ClassVar[str] = """\
@inproceedings{liu2021granet,
  title     = {Sparse Training via Boosting Pruning Plasticity with Neuroregeneration},
  author    = {Liu, Shiwei and Chen, Tianlong and Chen, Xiaohan and Atashgahi, Zahra and Yin, Lu and
               Kou, Huanyu and Shen, Li and Pechenizkiy, Mykola and Wang, Zhangyang and
               Mocanu, Decebal Constantin},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {34},
  year      = {2021},
  note      = {arXiv:2106.10404}
}
"""

    pattern: Unstructured
    schedule: Plan | Schedule
    first: float = 0.0
    drop: float = 0.5
    every: str = "100st"
    length: str = "50%"
    seed: int = 0
    reset: Reset = "entered"
    layers: Layers | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_drop("GraNet", self.drop)
        check_seed(self.seed)

    @property
    def training(self) -> Masked:
        """Kept weights alone; the step before an exchange has the gradients of all weights."""
        return Masked(dense_gradient=self._is_before_exchange)

    def _is_before_exchange(self, step: int) -> bool:
        phase = self.resolved.phase_at(step + 1)
        return phase.kind == "sparse" and self._exchanges(step + 1, phase)

    def _exchanges(self, step: int, phase: Phase) -> bool:
        """Whether a step is due, by the interval or as the last cut, and not the phase's first."""
        due = step in self.resolved.every(self.every, phase.start, phase.stop)
        return phase.start < step < phase.stop and (due or step == self._stop(phase))

    def begin(self, step: int, weights: Weights, state: None) -> Support:
        """Draw the support at step 0, where nothing is trained yet; later keep the largest."""
        if step:
            return super().begin(step, weights, state)
        return self._at(step).select(score.random(weights, self.seed, step))

    def go_on(
        self, step: int, phase: Phase, weights: Weights, support: Support, state: None
    ) -> Support:
        """Cut where it is due, then exchange."""
        if not self._exchanges(step, phase):
            return support
        rest = super().go_on(step, phase, weights, support, state)
        share = self.drop * cosine(step, phase.start, phase.stop)
        return exchange(rest, score.magnitude(weights), score.gradient(weights), share)
