"""What methods share: the families, each an abstract class below :class:`Method`, and their tools.

``Phased``: dense and sparse phases. ``Rising``: the sparsity rises within a sparse phase, and in
``Ramped`` over a given duration. ``Renewed``: the support is chosen again and again. ``Evolving``:
kept weights are exchanged for others.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from acdc import score
from acdc.errors import InputError
from acdc.layers import Chosen, Layers
from acdc.methods.base import Forecast, Method, State, check_reset, check_schedule
from acdc.methods.weights import Weights
from acdc.pattern import Block, Pattern, Unstructured
from acdc.schedule import Phase, check_duration, cosine, ramp
from acdc.score import Scores
from acdc.shape import shapes_of
from acdc.support import Support, check_sparsity
from acdc.topk import largest


class Phased(Method[State]):
    """Keeps every weight in a dense phase; a subclass says which weights a sparse phase keeps."""

    patterns: ClassVar[tuple[type[Pattern], ...]] = (Pattern,)  # what it can keep

    pattern: Pattern
    layers: Layers | None
    keep_zeros: bool = False  # of those that can keep the zeros that the model has

    def __post_init__(self) -> None:
        check_schedule(type(self).__name__, self.schedule)
        self._check_pattern()
        if not isinstance(self.layers, Layers | None):
            raise InputError(
                f"{type(self).__name__}(layers=...) is {self.layers!r}. Give acdc.Layers(...), or "
                f"None for the pattern's default."
            )
        check_reset(self.reset)

    def _check_pattern(self) -> None:
        given = f"{type(self).__name__}(pattern=...) is {self.pattern!r}"
        if not isinstance(self.pattern, Pattern):
            raise InputError(f"{given}. Give a pattern, such as acdc.Unstructured(sparsity=0.9).")
        if not isinstance(self.pattern, self.patterns):
            names = " or ".join(kind.__name__ for kind in self.patterns)
            raise InputError(f"{given}, which this method cannot keep. Give {names}.")

    def update(
        self, step: int, weights: Weights, support: Support, state: State
    ) -> tuple[Support, State]:
        """Keep all in a dense phase; ask ``begin`` and ``go_on`` in a sparse one."""
        phase = self.resolved.phase_at(step)
        if phase.kind == "dense":
            chosen = support if support.is_full else Support.full(weights)
        elif step == phase.start:
            chosen = self.begin(step, weights, state)
        else:
            chosen = self.go_on(step, phase, weights, support, state)
        return chosen, state if chosen is support else self.settle(weights, chosen, state)

    @abstractmethod
    def begin(self, step: int, weights: Weights, state: State) -> Support:
        """Return the support at the start of a sparse phase."""

    def go_on(
        self, step: int, phase: Phase, weights: Weights, support: Support, state: State
    ) -> Support:
        """Return the support later in a sparse phase: the same, unless a subclass overrides it."""
        return support

    def settle(self, weights: Weights, support: Support, state: State) -> State:
        """Return the state after a change to ``support``: the same, unless overridden."""
        return state

    def forecast(self, weights: Mapping[str, Tensor]) -> Forecast:
        """Return the supports of a run, estimated on ``weights`` where their values decide."""
        shapes = shapes_of(weights)
        supports: list[tuple[int, dict[str, int] | None]] = []
        exact = not self.keep_zeros
        selected: dict[Pattern, dict[str, int]] = {}
        for phase in self.resolved.phases:
            if phase.kind == "dense":
                supports.append((phase.start, None))
                continue
            patterns = dict(self.kept_in(phase))
            counts = {step: pattern.counts(shapes) for step, pattern in patterns.items()}
            if None in counts.values():
                exact = False
                counts = _estimated(patterns, weights, selected)
            supports += counts.items()
        return Forecast(tuple(supports), exact)

    def kept_in(self, phase: Phase) -> Iterator[tuple[int, Pattern]]:
        """Yield the steps of a sparse phase at which the kept counts change, and the pattern."""
        yield phase.start, self.pattern

    def select(self, model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        """Return the weights that are pruned, and why others that were wanted stay dense."""
        return choose(model, self.pattern, self.layers)

    @property
    def sparsity(self) -> float:
        """The sparsity that was asked for."""
        return self.pattern.target


class Rising(Phased[State]):
    """Cuts little by little: the sparsity rises on a cubic from ``first`` at the start of a sparse
    phase to that of the pattern, at a step that a subclass names. Both are met exactly, and a
    weight that is cut stays zero.

    Source: Zhu and Gupta, 2017.
    """

    patterns: ClassVar[tuple[type[Pattern], ...]] = (Unstructured, Block)

    first: float
    every: str

    def _check_rise(self) -> None:
        check_duration(self.every, "every")
        check_sparsity(self.first, "first")
        if self.first > self.pattern.target:
            raise InputError(
                f"{type(self).__name__}(first=...) is {self.first}, and the pattern ends at "
                f"{self.pattern.target}. The sparsity only rises: lower first."
            )

    def begin(self, step: int, weights: Weights, state: State) -> Support:
        """Cut to the first sparsity."""
        chosen = self._at(step).select(self.rank(weights, state))
        return without_zeros(chosen, weights) if self.keep_zeros else chosen

    def go_on(
        self, step: int, phase: Phase, weights: Weights, support: Support, state: State
    ) -> Support:
        """Cut further where it is due."""
        if not self.cuts(step, phase):
            return support
        chosen = self._at(step).select(score.among(self.rank(weights, state), support))
        # A layer that has more zeros than the pattern asks for: none of them comes back.
        return both(chosen, support) if self.keep_zeros else chosen

    def rank(self, weights: Weights, state: State) -> Scores:
        """Return non-negative scores, the largest of which are kept."""
        return score.magnitude(weights)

    def cuts(self, step: int, phase: Phase) -> bool:
        """Whether a cut is due at a step of a sparse phase, after its first."""
        stop = self._stop(phase)
        return step == stop or step in self.resolved.every(self.every, phase.start, stop)

    def kept_in(self, phase: Phase) -> Iterator[tuple[int, Pattern]]:
        """Yield every cut of a sparse phase, with the pattern at its sparsity."""
        stop = self._stop(phase)
        for step in sorted(
            {phase.start, *self.resolved.every(self.every, phase.start, stop), stop}
        ):
            yield step, self._at(step)

    def _start(self, phase: Phase) -> int:
        """Return the step at which the rise begins that a sparse phase belongs to."""
        return phase.start

    @abstractmethod
    def _stop(self, phase: Phase) -> int:
        """Return the step at which that rise ends, with the last cut."""

    def _at(self, step: int) -> Pattern:
        """Return the pattern with its sparsity at a step."""
        phase = self.resolved.phase_at(step)
        reach = self._start(phase), self._stop(phase)
        return self.pattern.at(ramp(step, *reach, self.first, self.pattern.target))


class Ramped(Rising[State]):
    """Makes the last cut of a sparse phase ``length`` after its first."""

    pattern: Unstructured | Block
    length: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_duration(self.length, "length")
        self._check_rise()

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


class Renewed(Phased[None]):
    """Keeps the largest of all weights, and every so often chooses them anew."""

    every: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_duration(self.every, "every")

    def begin(self, step: int, weights: Weights, state: None) -> Support:
        """Keep the largest."""
        return self.pattern.select(score.magnitude(weights))

    def go_on(
        self, step: int, phase: Phase, weights: Weights, support: Support, state: None
    ) -> Support:
        """Choose anew where it is due."""
        if step not in self.resolved.every(self.every, phase.start, phase.stop):
            return support
        return self.begin(step, weights, state)


class Evolving(Phased[None]):
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
        check_drop(type(self).__name__, self.drop)
        check_duration(self.every, "every")
        check_duration(self.until, "until")
        check_seed(self.seed)

    def begin(self, step: int, weights: Weights, state: None) -> Support:
        """Draw the support."""
        return self.pattern.select(self.draw(step, weights))

    def draw(self, step: int, weights: Weights) -> Scores:
        """Return random scores; seed and step alone decide."""
        return score.random(weights, self.seed, step)

    def due(self, step: int, phase: Phase) -> bool:
        """Whether a step of a sparse phase is among those of the exchanges, its first included."""
        return step in self.resolved.every(self.every, phase.start, self._until(phase))

    def share(self, step: int, phase: Phase) -> float:
        """Return the share of kept weights to exchange at a step."""
        return self.drop * cosine(step, phase.start, self._until(phase))

    def _until(self, phase: Phase) -> int:
        return min(self.resolved.after(self.until), phase.stop)


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
    rest = {
        name: largest(score.among(drop.subset([name]), support), kept - leaving[name])[name]
        for name, kept in support.counts().items()
    }
    return grown(rest, grow, leaving)


def grown(support: Mapping[str, Tensor], scores: Scores, more: Mapping[str, int]) -> Support:
    """Let weights come that are not kept: in every layer those with the largest scores.

    Args:
        support: The weights that are kept until now, by the names of the layers.
        scores: Non-negative scores. Ties go to the lower index.
        more: How many weights come in each layer.
    """
    masks = {}
    for name, mask in support.items():
        others = score.among(scores.subset([name]), {name: ~mask})
        masks[name] = mask | largest(others, more[name])[name]
    return Support(masks)


# --- norms of filters ----------------------------------------------------------------------------

Norms = dict[str, Tensor]
"""Name of a weight → the norms of its filters before they were cut, ``[outputs]``."""


def norms_to_restore(weights: Mapping[str, Tensor], support: Support, state: Norms) -> Norms:
    """Return the norms to remember after a change to ``support``.

    Args:
        weights: The weights before the change.
        support: The support from here on.
        state: The norms that are remembered already: those of before the first cut stay.
    """
    if support.is_full:
        return {}
    return state or {name: _norms(weight) for name, weight in weights.items()}


def restoring(weights: Mapping[str, Tensor], support: Support, state: Norms) -> Norms:
    """Return the factors that give filters their norms back, ``[outputs]``, if all weights come
    back at a change to ``support``; otherwise nothing. A filter that is or was zero has a 1.
    """
    if not support.is_full:
        return {}
    return {name: _factors(before, _norms(weights[name])) for name, before in state.items()}


def _norms(weight: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(weight.detach().flatten(1), dim=1, dtype=torch.float32)
    return norms


def _factors(before: Tensor, now: Tensor) -> Tensor:
    return torch.where((before > 0) & (now > 0), before / now, 1.0)


# --- supports and arguments ----------------------------------------------------------------------


def without_zeros(support: Support, weights: Mapping[str, Tensor]) -> Support:
    """Return a support without the weights that are exactly zero."""
    return both(support, {name: weights[name].detach() != 0 for name in support})


def both(support: Support, masks: Mapping[str, Tensor]) -> Support:
    """Return the weights that are kept in a support and in these masks.

    Raises:
        InputError: A layer would keep no weight.
    """
    common = Support({name: mask & masks[name] for name, mask in support.items()})
    if dead := [name for name, kept in common.counts().items() if not kept]:
        raise InputError(
            f"With keep_zeros=True, {dead[0]!r} would keep no weight: all of its weights that are "
            f"not zero are cut. Exclude the layer, or lower the sparsity."
        )
    return common


def check_drop(method: str, drop: object) -> None:
    """Raise InputError unless ``drop`` is a share of the kept weights."""
    if not isinstance(drop, int | float) or not 0 < drop <= 1:
        raise InputError(
            f"{method}(drop=...) is {drop!r}. It is the share of kept weights that is exchanged: "
            f"a number above 0, up to 1, such as 0.3."
        )


def check_seed(seed: object) -> None:
    """Raise InputError unless ``seed`` is a whole number from 0 up."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed is {seed!r}. Give a whole number from 0 up.")


def choose(
    model: nn.Module, pattern: Pattern, layers: Layers | None
) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """Return the weights that ``layers`` selects and ``pattern`` admits, and why others stay dense.

    Args:
        model: The network.
        pattern: May refuse layers by their shape (N:M and blocks that do not divide).
        layers: The choice of layers; ``None``: the pattern's own default.

    Raises:
        InputError: No layer is left, or the pattern's counts cannot be met on those that are.
    """
    wanted, others = (layers or pattern.default_layers()).split(model)
    misfits = {
        name: why for name, shape in wanted.shapes.items() if (why := pattern.refuses(name, shape))
    }
    params = {name: param for name, param in wanted.items() if name not in misfits}
    if not params:
        raise InputError(
            f"Nothing to prune: {pattern} refuses every chosen layer ("
            + "; ".join(f"{name}: {why}" for name, why in misfits.items())
            + "). Choose another pattern or other layers."
        )
    chosen = Chosen(params, wanted.shapes)
    pattern.total(chosen.shapes)
    return chosen, others | misfits


# --- forecasts ------------------------------------------------------------------------------------

_ESTIMATES = 16  # selections in a phase at most; between them counts are interpolated


def _estimated(
    patterns: Mapping[int, Pattern],
    weights: Mapping[str, Tensor],
    selected: dict[Pattern, dict[str, int]],
) -> dict[int, dict[str, int] | None]:
    """Return the kept weights at every step, by the magnitudes of ``weights``.

    A rising sparsity may have thousands of cuts: the counts of a few are selected, and those of the
    others interpolated. ``selected`` caches the counts of each pattern.
    """
    steps = list(patterns)
    count = min(len(steps), _ESTIMATES)
    anchors = sorted({round(i * (len(steps) - 1) / max(1, count - 1)) for i in range(count)})
    found: dict[int, dict[str, int] | None] = {}
    low: dict[str, int] | None = None
    for before, anchor in zip([0, *anchors], anchors, strict=False):
        pattern = patterns[steps[anchor]]
        if pattern not in selected:
            selected[pattern] = pattern.select(score.magnitude(weights)).counts()
        high = selected[pattern]
        for between in range(before + 1, anchor):
            assert low is not None
            share = (between - before) / (anchor - before)
            found[steps[between]] = {n: round(low[n] + share * (high[n] - low[n])) for n in high}
        found[steps[anchor]] = low = high
    return dict(sorted(found.items()))
