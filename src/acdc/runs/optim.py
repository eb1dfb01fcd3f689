"""Optimizers and learning-rate curves of a recipe, as values.

A curve is a function of the executed step and never of a phase: AC/DC has one continuous curve over
all phases. Source of the presets: the published configurations of AC/DC.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from acdc.errors import InputError
from acdc.schedule import Schedule


@dataclass(frozen=True)
class Optimizer(ABC):
    """An optimizer. ``lr`` is the peak of the learning rate, which a curve scales."""

    lr: float

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise InputError(f"optimizer.lr is {self.lr!r}. It is a positive number.")

    @abstractmethod
    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer over one parameter group."""


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent; ``weight_decay`` is L2 on every parameter, as in the paper."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer over one parameter group."""
        return torch.optim.SGD(
            params,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer over one parameter group."""
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
