"""AC/DC: alternating compressed and decompressed training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor, nn

from acdc import score
from acdc.errors import InputError
from acdc.layers import Layers
from acdc.methods.base import RESETS, Method, Reset, check_schedule, choose
from acdc.pattern import Pattern
from acdc.schedule import Plan, Schedule
from acdc.support import Support


@final
@dataclass(frozen=True)
class ACDC(Method):
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

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Pattern):
            raise InputError(
                f"ACDC(pattern=...) is {self.pattern!r}. Give a pattern, such as "
                f"acdc.Unstructured(sparsity=0.9)."
            )
        check_schedule("ACDC", self.schedule)
        if not isinstance(self.layers, Layers | None):
            raise InputError(
                f"ACDC(layers=...) is {self.layers!r}. Give acdc.Layers(...), or None for the "
                f"pattern's default."
            )
        if self.reset not in RESETS:
            raise InputError(f"reset is {self.reset!r}. It is one of {', '.join(RESETS)}.")

    def update(self, step: int, params: Mapping[str, Tensor], support: Support) -> Support:
        """Change the support at the first step of a phase, and at no other."""
        phase = self.resolved.phase_at(step)
        if step != phase.start:
            return support
        if phase.kind == "dense":
            return support if support.is_full else Support.full(params)
        return self.pattern.select(score.magnitude(params))

    def select(self, model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        """Return the weights that are pruned, and why others that were wanted stay dense."""
        return choose(model, self.pattern, self.layers)

    @property
    def sparsity(self) -> float:
        """The sparsity that was asked for."""
        return self.pattern.target
