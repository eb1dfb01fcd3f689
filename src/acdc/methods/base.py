"""What a method is: it decides when the support changes, and to what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from fractions import Fraction
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Self

from torch import Tensor, nn

from acdc import score
from acdc.errors import InputError
from acdc.layers import Layers
from acdc.pattern import Block, Pattern, Unstructured, largest
from acdc.schedule import Phase, Plan, Schedule, check_duration, cosine, ramp
from acdc.score import Scores
from acdc.support import Support, check_sparsity
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


class Phased(Method):
    """Keeps every weight in a dense phase; what a sparse phase keeps is for a subclass to say."""

    patterns: ClassVar[tuple[type[Pattern], ...]] = (Pattern,)  # what it can keep

    pattern: Pattern
    layers: Layers | None

    def __post_init__(self) -> None:
        check_schedule(type(self).__name__, self.schedule)
        self._check_pattern()
        if not isinstance(self.layers, Layers | None):
            raise InputError(
                f"{type(self).__name__}(layers=...) is {self.layers!r}. Give acdc.Layers(...), or "
                f"None for the pattern's default."
            )
        if self.reset not in RESETS:
            raise InputError(f"reset is {self.reset!r}. It is one of {', '.join(RESETS)}.")

    def _check_pattern(self) -> None:
        given = f"{type(self).__name__}(pattern=...) is {self.pattern!r}"
        if not isinstance(self.pattern, Pattern):
            raise InputError(f"{given}. Give a pattern, such as acdc.Unstructured(sparsity=0.9).")
        if not isinstance(self.pattern, self.patterns):
            names = " or ".join(kind.__name__ for kind in self.patterns)
            raise InputError(f"{given}, which this method cannot keep. Give {names}.")

    def update(self, step: int, params: Weights, support: Support) -> Support:
        """Keep all in a dense phase; ask ``begin`` and ``go_on`` in a sparse one."""
        phase = self.resolved.phase_at(step)
        if phase.kind == "dense":
            return support if support.is_full else Support.full(params)
        if step == phase.start:
            return self.begin(step, params)
        return self.go_on(step, phase, params, support)

    @abstractmethod
    def begin(self, step: int, params: Weights) -> Support:
        """Return the support at the start of a sparse phase."""

    def go_on(self, step: int, phase: Phase, params: Weights, support: Support) -> Support:
        """Return the support later in a sparse phase: the same, if a subclass does not differ."""
        return support

    def wants_gradient(self, step: int) -> bool:
        """Whether dense weights are trained behind sparse ones: in every sparse phase, then."""
        return self.keeps_dense and self.resolved.phase_at(step).kind == "sparse"

    def select(self, model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        """Return the weights that are pruned, and why others that were wanted stay dense."""
        return choose(model, self.pattern, self.layers)

    @property
    def sparsity(self) -> float:
        """The sparsity that was asked for."""
        return self.pattern.target


class Ramped(Phased):
    """Cuts little by little: the sparsity rises on a cubic from ``first`` at the start of a sparse
    phase to that of the pattern, ``length`` later. Both are met exactly, and what is cut stays cut.

    Source: Zhu and Gupta, 2017.
    """

    patterns: ClassVar[tuple[type[Pattern], ...]] = (Unstructured, Block)

    pattern: Unstructured | Block
    first: float
    every: str
    length: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_duration(self.every, "every")
        check_duration(self.length, "length")
        check_sparsity(self.first, "first")
        if self.first > self.pattern.sparsity:
            raise InputError(
                f"{type(self).__name__}(first=...) is {self.first}, and the pattern ends at "
                f"{self.pattern.sparsity}. The sparsity only rises: lower first."
            )

    def begin(self, step: int, params: Weights) -> Support:
        """Cut to the first sparsity."""
        return self._at(step).select(self.rank(params))

    def go_on(self, step: int, phase: Phase, params: Weights, support: Support) -> Support:
        """Cut further where it is due."""
        if not self.cuts(step, phase):
            return support
        return self._at(step).select(score.among(self.rank(params), support))

    def rank(self, params: Weights) -> Scores:
        """Return non-negative scores, the largest of which are kept."""
        return score.magnitude(params)

    def cuts(self, step: int, phase: Phase) -> bool:
        """Whether a cut is due at a step of a sparse phase."""
        stop = self._stop(phase)
        return step == stop or step in self.resolved.every(self.every, phase.start, stop)

    def select(self, model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        """Return the weights that are pruned; refuse a phase too short for its last cut."""
        for phase in self.resolved.phases:
            if phase.kind == "sparse" and self._stop(phase) >= phase.stop:
                raise InputError(
                    f"{type(self).__name__} makes its last cut {self.length!r} after its first, at "
                    f"step {self._stop(phase)}, and the sparse phase ends at {phase.stop}. Set a "
                    f"shorter length."
                )
        return super().select(model)

    def _stop(self, phase: Phase) -> int:
        return self.resolved.after(self.length, phase.start)

    def _at(self, step: int) -> Unstructured | Block:
        """Return the pattern with its sparsity at a step."""
        phase = self.resolved.phase_at(step)
        reach = phase.start, self._stop(phase), self.first, self.pattern.sparsity
        return self.pattern.at(ramp(step, *reach))


class Renewed(Phased):
    """Keeps the largest of all weights, and every so often chooses them anew."""

    every: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_duration(self.every, "every")

    def begin(self, step: int, params: Weights) -> Support:
        """Keep the largest."""
        return self.pattern.select(score.magnitude(params))

    def go_on(self, step: int, phase: Phase, params: Weights, support: Support) -> Support:
        """Choose anew where it is due."""
        if step not in self.resolved.every(self.every, phase.start, phase.stop):
            return support
        return self.begin(step, params)


class Evolving(Phased):
    """Starts from a random support, and exchanges ever fewer weights for others until ``until``:
    of the kept ones a share that falls from ``drop`` to 0 on half a cosine.
    """

    patterns = (Unstructured,)

    pattern: Unstructured
    drop: float
    every: str
    until: str
    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.drop, int | float) or not 0 < self.drop <= 1:
            raise InputError(
                f"{type(self).__name__}(drop=...) is {self.drop!r}. It is the share of kept "
                f"weights that is exchanged: a number above 0, up to 1, such as 0.3."
            )
        check_duration(self.every, "every")
        check_duration(self.until, "until")
        check_seed(self.seed)

    def begin(self, step: int, params: Weights) -> Support:
        """Draw the support."""
        return self.pattern.select(self.draw(step, params))

    def draw(self, step: int, params: Weights) -> Scores:
        """Return random scores; seed and step alone decide."""
        return score.random(params, hash((self.seed, step)))

    def due(self, step: int, phase: Phase) -> bool:
        """Whether a step of a sparse phase is among those of the exchanges, its first included."""
        return step in self.resolved.every(self.every, phase.start, self._until(phase))

    def share(self, step: int, phase: Phase) -> float:
        """Return the share of kept weights to exchange at a step."""
        return self.drop * cosine(step, phase.start, self._until(phase))

    def _until(self, phase: Phase) -> int:
        return min(self.resolved.after(self.until), phase.stop)


# --- for methods that drop weights and grow others -----------------------------------------------


def exchange(support: Support, drop: Scores, grow: Scores, share: float) -> Support:
    """Let a share of the kept weights of every layer go, and as many others come.

    Of ``n`` kept weights the ``int(share * n)`` with the smallest ``drop`` leave; of all that are
    not kept then, those that left included, as many with the largest ``grow`` enter. Ties go to the
    lower index, where the RigL code adds noise.

    Args:
        support: The support until now.
        drop: Non-negative scores: the smallest of the kept ones leave.
        grow: Non-negative scores: the largest of the others enter.
        share: From 0 to 1. Where it is less than one weight of every layer, the support itself
            comes back.

    Source: Evci et al., RigL, ICML 2020, algorithm 1; google-research/rigl, sparse_optimizers_base.
    """
    leaving = {name: int(share * kept) for name, kept in support.counts().items()}
    if not any(leaving.values()):
        return support
    masks = {}
    for name, kept in support.counts().items():
        rest = largest(score.among(drop.subset([name]), support), kept - leaving[name])
        others = score.among(grow.subset([name]), {name: ~rest[name]})
        masks[name] = rest[name] | largest(others, leaving[name])[name]
    return Support(masks)


# --- checks ---------------------------------------------------------------------------------------


def check_schedule(method: str, schedule: object) -> None:
    """Raise InputError unless ``schedule`` is a plan or a schedule."""
    if not isinstance(schedule, Plan | Schedule):
        raise InputError(
            f"{method}(schedule=...) is {schedule!r}. Give a plan, such as "
            f"acdc.alternate(epochs=100), or a Schedule."
        )


def check_seed(seed: object) -> None:
    """Raise InputError unless ``seed`` is a whole number from 0 up."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed is {seed!r}. Give a whole number from 0 up.")


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
