"""How weights are trained in a sparse phase: a value that a method returns, not a set of flags.

``Masked`` is what most methods want: weights outside the support are zero and take no gradient.
``Behind`` keeps dense weights behind the sparse ones: the forward pass sees the sparse weights, and
the optimizer moves the dense ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal, final

from torch import Tensor

from acdc.cost import Seen
from acdc.methods.weights import Weights
from acdc.support import Support

When = Literal["before", "after"]


@final
@dataclass(frozen=True)
class Mean:
    """A mean of the whole network, parameters and buffers, that takes the network's place when the
    support changes. A mean over one step is the network of that step.

    The optimizer's state is then reset by the method's rule, as if every weight came back.

    Args:
        nth: Number of executed steps → the place of the network after them in the mean, from 1 up,
            where 1 begins a new mean; 0: it is no part of the mean.
        use: Number of executed steps → ``"before"``: the mean takes the network's place, and the
            support is chosen on the mean, which is used up then; ``"after"``: the support is chosen
            on the network, and training goes on from the mean; ``None``: it stays unused.
    """

    nth: Callable[[int], int]
    use: Callable[[int], When | None]


@final
@dataclass(frozen=True)
class Masked:
    """Weights outside the support are zero, and their gradient is cleared.

    Args:
        dense_gradient: Number of executed steps → whether the next step has the gradient of every
            weight, and not only of the kept ones. ``None``: never. The gradient is that of the
            whole step: accumulated over batches, reduced over processes, unscaled and clipped.
        instead: Whether such a step replaces the optimizer's step: gradients are computed, and no
            weight moves.
        move: ``(weights, support, state)`` → pairs of a name and the tensor that is added to the
            weight when the support changes. ``support`` is the new one, ``state`` the method's
            state before the change. Weights outside the new support become zero in any case.
        mean: A mean of the network that takes its place when the support changes.
        rescale: ``(weights, support, state)``, as for ``move`` → name of a weight to positive
            factors, ``[outputs]``, by which the layer's outputs are multiplied when the support
            changes, where a BatchNorm reads them: the network computes the same.
    """

    dense_gradient: Callable[[int], bool] | None = None
    instead: bool = False
    move: Callable[[Weights, Support, Any], Iterable[tuple[str, Tensor]]] | None = None
    mean: Mean | None = None
    rescale: Callable[[Weights, Support, Any], Mapping[str, Tensor]] | None = None

    is_network: ClassVar[bool] = False  # there are no dense weights behind

    def wants_dense_gradient(self, step: int) -> bool:
        """Return whether the step that follows ``step`` executed ones has the dense gradient."""
        return self.dense_gradient is not None and self.dense_gradient(step)

    def flops(self, steps: range, seen: Seen, sparse: int, dense: int) -> Fraction:
        """Return the FLOPs of training steps in a sparse phase.

        A training step is three passes: forward, gradients of the inputs, gradients of the weights.
        The last one is dense where the dense gradient is wanted.

        Args:
            steps: The steps, by the number of executed steps before each.
            seen: Function from executed steps to the samples that they have seen.
            sparse: FLOPs of a forward pass with the kept weights on one sample.
            dense: FLOPs of a forward pass with all weights on one sample.
        """
        spent = 3 * sparse * (seen(steps.stop) - seen(steps.start))
        if self.dense_gradient is not None:
            wanted = (step for step in steps if self.dense_gradient(step))
            spent += (dense - sparse) * sum(seen(step + 1) - seen(step) for step in wanted)
        return Fraction(spent)


@final
@dataclass(frozen=True)
class Behind:
    """Dense weights are trained behind a sparse view of them.

    Between steps a parameter holds the view. For the time of an optimizer step it holds the dense
    weights, whose gradient is that of the loss at the view.

    Args:
        straight_through: Whether the gradient reaches every dense weight (the straight-through
            estimator). ``False``: only weights whose view is not zero have a gradient.
        trained: ``(weights, support)`` → the weights that the optimizer may move, if that is not
            all of them. Asked once for every support.
        trained_share: Sparsity of ``trained`` as a share of the sparsity of the support; 0: all
            weights are trained. For the cost of a step alone.
        pull: ``(weight, kept, trained)`` → what is added to the gradient of a layer's dense
            weights before the optimizer's step, or ``None``. ``kept`` and ``trained`` are the
            layer's parts of the support and of ``trained``; the latter is ``None`` where every
            weight is trained.
        view: ``(name, weight, state)`` → the view of a layer's kept weights, from the weight with
            zeros outside the support. ``None``: the kept weights themselves.
        is_network: Whether the dense weights are a network that can be used by itself.
    """

    straight_through: bool = True
    trained: Callable[[Weights, Support], Support | None] | None = None
    trained_share: Fraction = Fraction(0)
    pull: Callable[[Tensor, Tensor, Tensor | None], Tensor | None] | None = None
    view: Callable[[str, Tensor, Any], Tensor] | None = None
    is_network: bool = True

    instead: ClassVar[bool] = False
    move: ClassVar[None] = None
    mean: ClassVar[None] = None
    rescale: ClassVar[None] = None

    def wants_dense_gradient(self, step: int) -> bool:
        """Return whether the next step has the dense gradient, if its phase is sparse."""
        return self.straight_through

    def flops(self, steps: range, seen: Seen, sparse: int, dense: int) -> Fraction:
        """Return the FLOPs of training steps in a sparse phase.

        Two passes run on the view. The gradients of the weights are those of every trained weight;
        their cost is interpolated between ``sparse`` and ``dense``, in proportion to the sparsity.

        Args:
            steps: The steps, by the number of executed steps before each.
            seen: Function from executed steps to the samples that they have seen.
            sparse: FLOPs of a forward pass with the kept weights on one sample.
            dense: FLOPs of a forward pass with all weights on one sample.
        """
        last = dense + self.trained_share * (sparse - dense)
        step = 2 * sparse + (last if self.straight_through else sparse)
        return Fraction(step) * (seen(steps.stop) - seen(steps.start))


Training = Masked | Behind
