"""What a method is: it decides when the support changes, and to what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from typing import ClassVar, Literal, Self

from torch import Tensor, nn

from acdc.errors import InputError
from acdc.layers import Layers
from acdc.pattern import Pattern
from acdc.schedule import Plan, Schedule
from acdc.support import Support

Reset = Literal["all", "entered", "none"]
RESETS: tuple[Reset, ...] = ("all", "entered", "none")


class Method(ABC):
    """A pure decision: the step, the weights and the support in, the next support out.

    A method holds no state and touches no weight; the sparsifier does what it decides. Every
    subclass is a final frozen dataclass: one paper, one class, one file.
    """

    name: ClassVar[str]
    citation: ClassVar[str]  # BibTeX

    schedule: Plan | Schedule
    reset: Reset = "none"  # optimizer state that is cleared when pruned weights come back

    @abstractmethod
    def update(self, step: int, params: Mapping[str, Tensor], support: Support) -> Support:
        """Return the support for the steps from ``step`` on.

        Args:
            step: Executed optimizer steps so far. Called with 0 before training, then after each.
            params: The prunable weights by name, as they are now.
            support: The support until now. Returned itself where nothing changes.
        """

    def select(self, model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        """Return the weights this method prunes, and why others that were wanted stay dense.

        Raises:
            InputError: Nothing is left to prune.
        """
        return {}, {}

    @property
    def sparsity(self) -> float | None:
        """The sparsity that was asked for, for a method that has one."""
        return None

    @property
    def resolved(self) -> Schedule:
        """The schedule in steps.

        Raises:
            InputError: The method still holds a plan.
        """
        if isinstance(self.schedule, Schedule):
            return self.schedule
        raise InputError(
            f"{type(self).__name__} holds a plan in epochs, and the number of steps in an epoch is "
            f"not known yet. Call plan.resolve(steps_per_epoch=len(loader)) or "
            f"method.resolve(...) first."
        )

    def resolve(self, steps_per_epoch: int | Sequence[int]) -> Self:
        """Return this method with its plan resolved into a schedule of steps."""
        if isinstance(self.schedule, Schedule):
            return self
        resolved = copy(self)
        object.__setattr__(resolved, "schedule", self.schedule.resolve(steps_per_epoch))
        return resolved


def check_schedule(method: str, schedule: object) -> None:
    """Raise InputError unless ``schedule`` is a plan or a schedule."""
    if not isinstance(schedule, Plan | Schedule):
        raise InputError(
            f"{method}(schedule=...) is {schedule!r}. Give a plan, such as "
            f"acdc.alternate(epochs=100), or a Schedule."
        )


def choose(
    model: nn.Module, pattern: Pattern, layers: Layers | None
) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """Return the weights that ``layers`` selects and ``pattern`` admits, and why it refuses others.

    Args:
        model: The network.
        pattern: May refuse layers by their shape (N:M and blocks that do not divide).
        layers: The choice of layers; ``None``: the pattern's own default.

    Raises:
        InputError: No layer is left, or the pattern's counts cannot be met on those that are.
    """
    wanted = (layers or pattern.default_layers()).select(model)
    refused = {
        name: why
        for name, param in wanted.items()
        if (why := pattern.refuses(name, tuple(param.shape)))
    }
    params = {name: param for name, param in wanted.items() if name not in refused}
    if not params:
        raise InputError(
            f"Nothing to prune: {pattern} refuses every chosen layer ("
            + "; ".join(f"{name}: {why}" for name, why in refused.items())
            + "). Choose another pattern or other layers."
        )
    pattern.total({name: tuple(param.shape) for name, param in params.items()})
    return params, refused
