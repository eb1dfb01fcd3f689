"""What a method is: it decides when the support changes, and to what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from fractions import Fraction
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Self

from torch import Tensor, nn

from acdc.errors import InputError
from acdc.schedule import Plan, Schedule
from acdc.support import Support
from acdc.threshold import SoftThreshold

Reset = Literal["all", "entered", "none"]
RESETS: tuple[Reset, ...] = ("all", "entered", "none")


class Past(NamedTuple):
    """What a method had remembered of a layer.

    Args:
        kept: Bool mask of the weights that the support kept meanwhile.
        gradients: Their gradients, ``[kept]``, one for each step.
    """

    kept: Tensor
    gradients: list[Tensor]


class Weights(Mapping[str, Tensor]):
    """The prunable weights by name, and what is known of their training.

    Args:
        params: The weights.
        state: What returns the optimizer's state of a weight, if there is any. (Not the state
            itself: loading a checkpoint into an optimizer puts another mapping in its place.)
        past: What was remembered of them by name.

    Attributes:
        thresholds: State of the threshold of each, while there are any: :mod:`acdc.threshold`.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        state: Callable[[Tensor], Mapping[str, Any] | None],
        past: Mapping[str, Past] = MappingProxyType({}),
    ) -> None:
        self._params, self._state, self._past = params, state, past
        self.thresholds: Mapping[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._params[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)

    def momentum(self, name: str) -> Tensor:
        """Return where the optimizer would move a weight by itself: the momentum of SGD, the
        normalised first moment of Adam and its like, or the gradient where there is neither.
        """
        param = self._params[name]
        state = self._state(param) or {}
        if "exp_avg" in state:
            first: Tensor = state["exp_avg"]
            second = state.get("exp_avg_sq")
            return first if second is None else first / (second.sqrt() + 1e-8)
        buffer: Tensor | None = state.get("momentum_buffer")
        if buffer is None:
            buffer = param.grad
        if buffer is None:
            raise InputError(
                f"The weight {name!r} has neither momentum nor gradient to rank by. Check that "
                f"the loss depends on it."
            )
        return buffer

    def past(self, name: str) -> Past | None:
        """Return the gradients that were remembered since the support last changed, if any were."""
        return self._past.get(name)


class Method(ABC):
    """A pure decision: the step, the weights and the support in, the next support out.

    A method holds no state and touches no weight; the sparsifier does what it decides. Every
    subclass is a final frozen dataclass: one paper, one class, one file.
    """

    name: ClassVar[str]
    citation: ClassVar[str]  # BibTeX
    pretrained: ClassVar[bool] = False  # whether it starts from a trained dense model
    skips_steps: ClassVar[bool] = False  # no optimizer step where the dense gradient is wanted
    keeps_dense: ClassVar[bool] = False  # trains a dense network behind a model that is its view
    has_memory: ClassVar[bool] = False  # it remembers gradients until the support changes
    ends_dense: ClassVar[bool] = False  # the network it is for is dense; sparsity is a means

    schedule: Plan | Schedule
    reset: Reset = "none"  # optimizer state that is cleared when pruned weights come back

    @abstractmethod
    def update(self, step: int, params: Weights, support: Support) -> Support:
        """Return the support for the steps from ``step`` on.

        Args:
            step: Executed optimizer steps so far. Called with 0 before training, then after each.
            params: The prunable weights by name, as they are now. Where ``wants_gradient`` of the
                step just taken was true, their ``.grad`` is that of every weight.
            support: The support until now. Returned itself where nothing changes.
        """

    def wants_gradient(self, step: int) -> bool:
        """Whether the step that follows ``step`` executed ones shall have a dense gradient.

        It is then left as it is: accumulated over batches, reduced over processes, unscaled and
        clipped as the optimizer would get it.
        """
        return False

    def reach(self, params: Weights, support: Support) -> Support | None:
        """Return the weights that are trained, where that is more than the support and not all.

        Only for a method that ``keeps_dense``, and asked once for every support.
        """
        return None

    def pull(self, weight: Tensor, kept: Tensor, trained: Tensor | None) -> Tensor | None:
        """Return what is added to the gradient of the dense weights before the optimizer steps.

        Only for a method that ``keeps_dense``.

        Args:
            weight: The dense weights of a layer.
            kept: Their part of the support.
            trained: Their part of ``reach``; ``None`` where all are trained.
        """
        return None

    def remembers(self, step: int) -> bool:
        """Whether the gradient of the step that follows ``step`` executed ones is remembered.

        Only for a method that ``has_memory``. The gradient is that of the kept weights, as the
        optimizer gets it; ``Weights.past`` returns it until the support has changed.
        """
        return False

    def adjust(self, params: Weights, name: str, kept: Tensor) -> Tensor | None:
        """Return what is added to the weights of a layer when the support changes, if anything is.

        Args:
            params: The weights before the change. What is not kept is zero after it in any case.
            name: Of the weight.
            kept: Its part of the new support.
        """
        return None

    @property
    def threshold(self) -> SoftThreshold | None:
        """How the thresholds are learned that shrink what the model sees of the dense weights."""
        return None

    def step_flops(self, sparse: int, dense: int) -> Fraction:
        """Return the mean FLOPs of a step in the sparse phases, per sample.

        Forward, gradients of inputs and gradients of weights are a pass each; the last is dense
        where the dense gradient is wanted. Convention: :mod:`acdc.cost`.

        Args:
            sparse: FLOPs of a forward pass on the kept weights.
            dense: FLOPs of one on all weights.

        Source: Evci et al., RigL, ICML 2020, appendix H, whose update is a step beside the others
        and not one of them: (3 f_S ΔT + 2 f_S + f_D) / (ΔT + 1).
        """
        phases = (phase for phase in self.resolved.phases if phase.kind == "sparse")
        steps = [step for phase in phases for step in range(phase.start, phase.stop)]
        wanted = Fraction(sum(map(self.wants_gradient, steps)), max(1, len(steps)))
        return 3 * sparse + wanted * (dense - sparse)

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


# --- for methods that drop weights and grow others -----------------------------------------------


# --- checks ---------------------------------------------------------------------------------------


def check_schedule(method: str, schedule: object) -> None:
    """Raise InputError unless ``schedule`` is a plan or a schedule."""
    if not isinstance(schedule, Plan | Schedule):
        raise InputError(
            f"{method}(schedule=...) is {schedule!r}. Give a plan, such as "
            f"acdc.alternate(epochs=100), or a Schedule."
        )
