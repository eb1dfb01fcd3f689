"""What a method is: it decides when the support changes, and to what.

A method owns its state, and the state goes in and comes out: ``init`` makes it, ``observe`` and
``update`` return the next one. A method that needs nothing has the state ``None``. The sparsifier
carries the state, and saves it with ``Sparsifier.state_dict``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, Self, TypeGuard, TypeVar, cast

from torch import Tensor, nn

from acdc.errors import InputError
from acdc.kinds import weights
from acdc.methods.training import Masked, Training
from acdc.methods.weights import Weights
from acdc.schedule import Plan, Schedule
from acdc.support import Support

FreshValue = float | Literal["weight"]
"""How an entry of an optimizer's state starts: with a number, or as a copy of the weight."""

Rule = Literal["all", "entered", "none"]
RESETS: tuple[Rule, ...] = ("all", "entered", "none")

Reset = Rule | Mapping[str, FreshValue]
"""Optimizer state that is cleared when pruned weights come back: that of every parameter, that of
the weights that come back, or none. Or the fresh value of each entry of the state, by name, for an
optimizer whose fresh state acdc cannot find out by itself; the rule is then the method's default.
"""

State = TypeVar("State")
"""What a method carries from step to step: tensors, numbers, and lists, tuples and dicts of them,
so that a checkpoint can hold it."""


@dataclass(frozen=True)
class Forecast:
    """The supports of a run before it has begun.

    Args:
        supports: ``(step, kept weights by name)`` of every change, ``None`` for dense.
        exact: Whether the run will have just these counts. ``False``: they depend on the training,
            and these are the counts on the weights that were given.
    """

    supports: tuple[tuple[int, dict[str, int] | None], ...]
    exact: bool = True


class Method(ABC, Generic[State]):
    """A decision: the step, the weights, the support and the state in; support and state out.

    A method changes nothing by itself: not the weights, not the support and not the state that it
    is given. The sparsifier does what the method decides. Every subclass is a final frozen
    dataclass: one paper, one class, one file.
    """

    name: ClassVar[str]
    label: ClassVar[str]  # the name as people write it: on pages and in tables
    citation: ClassVar[str]  # BibTeX
    ends_dense: ClassVar[bool] = False  # the network it is for is dense; sparsity is a means
    needs_whole_weights: ClassVar[str] = ""  # why weights must not be sharded, where that is so

    schedule: Plan | Schedule
    reset: Reset = "none"  # optimizer state that is cleared when pruned weights come back

    @property
    def reset_rule(self) -> Rule:
        """The rule of ``reset``; where it holds fresh values, that of the method's default."""
        reset = type(self).reset if isinstance(self.reset, Mapping) else self.reset
        assert not isinstance(reset, Mapping)
        return reset

    @property
    def training(self) -> Training:
        """How weights are trained in a sparse phase."""
        return Masked()

    def init(self, weights: Weights) -> State:
        """Return the state before the first step: ``None``, unless a method needs one."""
        return cast(State, None)

    def observe(self, step: int, weights: Weights, support: Support, state: State) -> State:
        """Return the state after looking at the gradients of a step.

        Called before every optimizer step, of a method that overrides it. The new state counts
        only if the step is executed: a GradScaler may skip it.

        Args:
            step: Executed optimizer steps before this one.
            weights: The prunable weights as the forward pass saw them. ``weights.gradient(name)``
                is the gradient as the optimizer will apply it.
            support: The support of this step.
            state: The state until now.
        """
        return state

    @property
    def observes(self) -> bool:
        """Whether this method looks at gradients: whether it overrides ``observe``."""
        return type(self).observe is not Method.observe

    @abstractmethod
    def update(
        self, step: int, weights: Weights, support: Support, state: State
    ) -> tuple[Support, State]:
        """Return the support for the steps from ``step`` on, and the state.

        Args:
            step: Executed optimizer steps. Called with 0 before training, then after each step.
            weights: The prunable weights by name, as they are now: the dense ones, if ``training``
                is :class:`~acdc.methods.training.Behind`. Where the dense gradient of the last step
                was wanted, their ``.grad`` is the gradient of every weight.
            support: The support until now. Returned itself where nothing changes.
            state: The state until now.
        """

    def forecast(self, weights: Mapping[str, Tensor]) -> Forecast:
        """Return the supports that a run of this method will have.

        Args:
            weights: The prunable weights. Where the number of kept weights of a layer depends on
                their values, these values make an estimate.
        """
        return Forecast(())

    def on_curve(self, step: int) -> tuple[int, Schedule]:
        """Return where on a learning-rate curve the step after ``step`` executed steps is.

        Returns:
            The step and the schedule for which the curve is read: those of the run. A method that
            repeats its training returns those of one training (IMP).
        """
        return step, self.resolved

    def select(self, model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        """Return the weights this method prunes, and why all others stay dense.

        The others are the parameters of two dimensions or more.

        Raises:
            InputError: Nothing is left to prune.
        """
        return {}, {name: f"the method {self.name} prunes nothing" for name in weights(model)}

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


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_reset(reset: object) -> None:
    """Raise InputError unless ``reset`` is a rule, or the fresh values of optimizer state."""
    if isinstance(reset, Mapping):
        for key, value in reset.items():
            if not isinstance(key, str) or not (is_number(value) or value == "weight"):
                raise InputError(
                    f"reset has the entry {key!r}: {value!r}. Give the name of an entry of the "
                    f'optimizer\'s state and its fresh value: a number, or "weight" for a copy of '
                    f'the weight, as in reset={{"x0": "weight", "momentum": 0.0}}.'
                )
    elif reset not in RESETS:
        raise InputError(
            f"reset is {reset!r}. It is one of {', '.join(RESETS)}, or a dict of fresh values by "
            f"the names of the optimizer's state."
        )


def check_method(method: object, taker: str) -> None:
    """Raise InputError unless ``method`` is a method.

    Args:
        method: What was given.
        taker: What takes it as its first argument, for the message.
    """
    if not isinstance(method, Method):
        raise InputError(
            f"{taker} takes a method as its first argument, such as acdc.ACDC(...), and was given "
            f"a {type(method).__name__}."
        )


def check_schedule(method: str, schedule: object) -> None:
    """Raise InputError unless ``schedule`` is a plan or a schedule."""
    if not isinstance(schedule, Plan | Schedule):
        raise InputError(
            f"{method}(schedule=...) is {schedule!r}. Give a plan, such as "
            f"acdc.alternate(epochs=100), or a Schedule."
        )
