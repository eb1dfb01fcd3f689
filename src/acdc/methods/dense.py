"""Dense training: the reference that every sparse method is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from acdc.methods.base import Method, check_schedule
from acdc.methods.weights import Weights
from acdc.schedule import Plan, Schedule
from acdc.support import Support


@final
@dataclass(frozen=True)
class Dense(Method[None]):
    """Train every weight in every step.

    Args:
        schedule: One dense phase; it gives the length of the run.
    """

    name: ClassVar[str] = "dense"
    label: ClassVar[str] = "Dense"
    citation: ClassVar[str] = ""

    schedule: Plan | Schedule

    def __post_init__(self) -> None:
        check_schedule("Dense", self.schedule)

    def update(
        self, step: int, weights: Weights, support: Support, state: None
    ) -> tuple[Support, None]:
        """Change nothing."""
        return support, state
