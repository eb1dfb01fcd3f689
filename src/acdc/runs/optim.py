"""Optimizers and learning-rate curves of a recipe, as values.

A curve is a function of the executed step. AC/DC has one continuous curve over all phases: that is
the default. ``Rewarm`` and ``Tail`` change a curve in certain phases. Source of the presets: the
published configurations of AC/DC.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from acdc.errors import InputError
from acdc.hooks.mirror import MirrorStep, check_strength
from acdc.schedule import Schedule

ADDED = {"added": True}  # left out of a saved recipe while it has its default


@dataclass(frozen=True)
class Optimizer(ABC):
    """An optimizer.

    Args:
        lr: The peak of the learning rate, which a curve scales.
        scale_rows: Whether the gradients of the rows of sparse layers are scaled (SparseOpt): see
            :class:`acdc.Sparsifier`.
    """

    lr: float
    scale_rows: bool = field(default=False, kw_only=True, metadata=ADDED)

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise InputError(f"optimizer.lr is {self.lr!r}. It is a positive number.")

    @abstractmethod
    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer over one parameter group."""


@dataclass(frozen=True)
class Mirrored(Optimizer):
    """An optimizer that may take a mirror step after each of its own: :class:`acdc.MirrorStep`.

    Args:
        mirror_alpha: Strength of the mirror step; 0: none.
        mirror_beta: Decay of the mirror step.
    """

    mirror_alpha: float = field(default=0.0, kw_only=True, metadata=ADDED)
    mirror_beta: float = field(default=0.0, kw_only=True, metadata=ADDED)

    normalized: ClassVar[bool]  # the form of the mirror step

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("optimizer.mirror_alpha", self.mirror_alpha)
        check_strength("optimizer.mirror_beta", self.mirror_beta)

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer over one parameter group, with its mirror step."""
        optimizer = self._plain(params)
        if self.mirror_alpha or self.mirror_beta:
            alpha, beta = self.mirror_alpha, self.mirror_beta
            MirrorStep(optimizer, alpha, beta, normalized=self.normalized)
        return optimizer

    @abstractmethod
    def _plain(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer without its mirror step."""


@dataclass(frozen=True)
class SGD(Mirrored):
    """Stochastic gradient descent; ``weight_decay`` is L2 on every parameter, as in the paper."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False

    normalized: ClassVar[bool] = False

    def _plain(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            params,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            **self._in_one_go,
        )

    @property
    def _in_one_go(self) -> dict[str, bool]:
        # PyTorch's foreach form would overwrite the gradients that the mirror step reads.
        return {"foreach": False} if self.nesterov and self.mirror_alpha else {}


@dataclass(frozen=True)
class AdamW(Mirrored):
    """Adam with decoupled weight decay.

    Its mirror step has the normalised form, in which Adam's direction ``m_hat / (sqrt(v_hat) +
    eps)`` takes the place of the gradient. The paper of the mirror step has no such form: it is
    ours.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01

    normalized: ClassVar[bool] = True

    def _plain(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            params, lr=self.lr, betas=(self.beta1, self.beta2), weight_decay=self.weight_decay
        )


@dataclass(frozen=True)
class Curve(ABC):
    """The learning rate over a run, as a factor of its peak."""

    @abstractmethod
    def factor(self, step: int, schedule: Schedule) -> float:
        """Return the factor for the step after ``step`` executed steps."""


@dataclass(frozen=True)
class Cosine(Curve):
    """Linear warm-up, then half a cosine to zero.

    Args:
        warmup: Epochs of warm-up.
        every: ``"epoch"``: the rate changes only at the start of an epoch ``t``, to
            ``(t+1)/warmup`` in the warm-up and to ``(1 + cos(π (t - warmup)/(epochs - warmup)))/2``
            after it, as in the published runs. ``"step"``: the rate changes at every step.
    """

    warmup: int = 0
    every: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise InputError(f"lr.warmup is {self.warmup!r} epochs. It is a number from 0 up.")

    def factor(self, step: int, schedule: Schedule) -> float:
        """Return the factor for the step after ``step`` executed steps."""
        exact = float(schedule.epoch_at(step))
        epoch = exact if self.every == "step" else math.floor(exact)
        if epoch < self.warmup:
            ahead = 1 if self.every == "epoch" else schedule.epochs / schedule.total
            return min(1.0, (epoch + ahead) / self.warmup)
        rest = max(1, schedule.epochs - self.warmup)
        return (1 + math.cos(math.pi * min(1.0, (epoch - self.warmup) / rest))) / 2


@dataclass(frozen=True)
class StepDecay(Curve):
    """Constant, multiplied by ``gamma`` at the end of each of the epochs ``at`` (counted from 0).

    The published CIFAR runs name the epochs 75, 115 and 155 and change after them: epoch 76 is the
    first with the lower rate.
    """

    at: tuple[int, ...] = ()
    gamma: float = 0.1

    def factor(self, step: int, schedule: Schedule) -> float:
        """Return the factor for the step after ``step`` executed steps."""
        epoch = math.floor(schedule.epoch_at(step))
        return self.gamma ** sum(epoch > end for end in self.at)


@dataclass(frozen=True)
class Rewarm(Curve):
    """A curve that begins every dense phase after a sparse one at a lower rate.

    After a decompression the norms of weights are smaller than in dense training, and a network
    with normalisation layers then takes larger steps than it should. With ``low=0.05`` and an
    optimizer whose state is reset it is a restart of AdamW with a warm-up. The fine-tuning of a
    dense twin has the rates of the last sparse phase, ``sparse`` included.

    Args:
        curve: The curve that is changed.
        low: Factor at the start of a dense phase, in (0, 1]; it rises to 1 in a straight line.
        share: Share of the dense phase in which it rises, in (0, 1].
        sparse: Factor in all sparse phases.
    """

    curve: Curve = field(default_factory=Cosine)
    low: float = 0.35
    share: float = 1.0
    sparse: float = 1.0

    def __post_init__(self) -> None:
        for name in ("low", "share"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"lr.{name} is {getattr(self, name)!r}. It is in (0, 1].")
        if not 0 < self.sparse < math.inf:
            raise InputError(f"lr.sparse is {self.sparse!r}. It is a positive number.")

    def factor(self, step: int, schedule: Schedule) -> float:
        """Return the factor for the step after ``step`` executed steps."""
        base, phase = self.curve.factor(step, schedule), schedule.phase_at(step)
        if phase.kind == "sparse":
            return base * self.sparse
        if phase.start == 0:
            return base
        risen = min(1.0, (step - phase.start) / (self.share * len(phase)))
        return base * (self.low + (1 - self.low) * risen)


@dataclass(frozen=True)
class Tail(Curve):
    """A curve whose last sparse phase has a warm-up of its own, then a straight line to zero.

    Runs that do not end sparse, or are sparse from the first step, keep their curve. The
    fine-tuning of a dense twin has the same rates.

    Source: Zimmer, Spiegel, Pokutta, "How I Learned to Stop Worrying and Love Retraining", ICLR
    2023 (arXiv:2111.00843). There the peak follows from the norm that a network loses when it is
    pruned; here it is given.

    Args:
        curve: The curve of all other phases.
        peak: The highest factor of the last sparse phase.
        warmup: Share of the last sparse phase in which the factor rises to ``peak``, in [0, 1).
    """

    curve: Curve = field(default_factory=Cosine)
    peak: float = 0.5
    warmup: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.peak < math.inf:
            raise InputError(f"lr.peak is {self.peak!r}. It is a positive number.")
        if not 0 <= self.warmup < 1:
            raise InputError(f"lr.warmup is {self.warmup!r}. It is in [0, 1).")

    def factor(self, step: int, schedule: Schedule) -> float:
        """Return the factor for the step after ``step`` executed steps."""
        last = schedule.phases[-1]
        if last.kind == "dense" or last.start == 0 or step < last.start:
            return self.curve.factor(step, schedule)
        done = (step - last.start) / len(last)
        if done < self.warmup:
            # The first step moves something: a rate of zero would waste it.
            return self.peak * (done + 1 / len(last)) / (self.warmup + 1 / len(last))
        return self.peak * (1 - done) / (1 - self.warmup)
