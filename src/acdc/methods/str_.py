"""STR: soft threshold weight reparameterization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from acdc.errors import InputError
from acdc.layers import Layers
from acdc.methods.base import Reset, Weights
from acdc.methods.families import Ramped
from acdc.pattern import Unstructured
from acdc.schedule import Phase, Plan, Schedule
from acdc.score import Scores
from acdc.support import Support
from acdc.threshold import SoftThreshold


@final
@dataclass(frozen=True)
class STR(Ramped):
    """Compute with ``sign(w) · max(|w| - σ(s), 0)``, and learn ``s``, one for each layer, by its
    gradient: the network finds out by itself how sparse every layer shall be.

    Where we differ: the sparsity is asked for, as of all methods. In the paper it is an outcome. A
    weight decay raises all ``s`` alike, gradients part them, and one searches for the decay that
    ends near the sparsity wanted. Here a shift, the same for all layers, takes the part of that
    decay: with it the total rises on a cubic, exact at every choice of the support. Between two
    choices ``s`` learns on; a kept weight that its threshold overtakes is zero, and one that is not
    kept waits for the next choice.

    From the last choice on the support stays, and its count is exact; a kept weight below its
    threshold at the end is one zero more.

    Args:
        pattern: ``Unstructured(s)``, of global scope: any other leaves nothing to learn.
        schedule: Usually one sparse phase.
        first: Sparsity of the first choice.
        every: Time between choices of the support.
        length: Time from the first choice to the last.
        rate: Learning rate of the thresholds, as a multiple of that of the weights. They are
            trained by SGD, whatever trains the weights; with Adam and its small rates give more.
        momentum: Of that SGD.
        decay: Weight decay of ``s``. As all are shifted alike, it draws the layers together.
        reset: Optimizer state cleared when weights come back. They only decay meanwhile.
        layers: Which layers are pruned; ``None``: the pattern's default.

    Source: Kusupati et al., ICML 2020, sections 3 and 4; RAIVNLab/STR, ``utils/conv_type.py`` and
    ``resnet50-str.yaml``, for momentum and decay.
    """

    name: ClassVar[str] = "str"
    citation: ClassVar[str] = """\
@inproceedings{kusupati2020str,
  title     = {Soft Threshold Weight Reparameterization for Learnable Sparsity},
  author    = {Kusupati, Aditya and Ramanujan, Vivek and Somani, Raghav and Wortsman, Mitchell and
               Jain, Prateek and Kakade, Sham and Farhadi, Ali},
  booktitle = {International Conference on Machine Learning},
  year      = {2020},
  note      = {arXiv:2002.03231}
}
"""
    patterns = (Unstructured,)

    pattern: Unstructured
    schedule: Plan | Schedule
    first: float = 0.0
    every: str = "16st"
    length: str = "75%"
    rate: float = 1.0
    momentum: float = 0.875
    decay: float = 2.25e-5
    reset: Reset = "none"
    layers: Layers | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        SoftThreshold(self.rate, self.momentum, self.decay)  # checks them

    def _check_pattern(self) -> None:
        super()._check_pattern()
        if self.pattern.scope != "global":
            raise InputError(
                f"STR(pattern=...) is {self.pattern!r}, which this method cannot keep. Give the "
                f'scope "global": how sparse each layer is, is what STR learns.'
            )

    @property
    def threshold(self) -> SoftThreshold:
        """How the thresholds are learned."""
        return SoftThreshold(self.rate, self.momentum, self.decay)

    def rank(self, params: Weights) -> Scores:
        """Rank by how much the thresholds could rise before a weight is zero."""
        return self.threshold.rank(params, params.thresholds)

    def go_on(self, step: int, phase: Phase, params: Weights, support: Support) -> Support:
        """Choose among all dense weights where it is due."""
        return self._at(step).select(self.rank(params)) if self.cuts(step, phase) else support
