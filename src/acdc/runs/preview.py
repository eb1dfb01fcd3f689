"""Layers, supports and cost of a recipe, without training and without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from acdc.cost import Ledger, Network, measure
from acdc.methods.base import Forecast, Method
from acdc.pattern import Pattern
from acdc.runs.recipe import Recipe
from acdc.schedule import Schedule
from acdc.shape import shapes_of


@dataclass(frozen=True)
class Preview:
    """A recipe before it is run.

    Args:
        recipe: The recipe.
    """

    recipe: Recipe

    @cached_property
    def method(self) -> Method[Any]:
        """The method, with its schedule resolved in steps."""
        data = self.recipe.data
        return self.recipe.method.resolve(data.steps_per_epoch(self.recipe.batch_size))

    @property
    def schedule(self) -> Schedule:
        """The phases in steps."""
        return self.method.resolved

    @cached_property
    def _model(self) -> nn.Module:
        """The model on the meta device: its weights take no memory."""
        with torch.device("meta"):
            return self.recipe.model.build()

    @cached_property
    def network(self) -> Network:
        """The convolutions and linear layers, and their cost."""
        return measure(self._model, self.recipe.model.example(1).to("meta"), self.pruned)

    @cached_property
    def _chosen(self) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        return self.method.select(self._model)

    @property
    def pruned(self) -> Mapping[str, Tensor]:
        """The weights that are pruned, by name, without values."""
        return self._chosen[0]

    @property
    def refused(self) -> Mapping[str, str]:
        """Name of a parameter of two dimensions or more that is not pruned → the reason."""
        return self._chosen[1]

    def parameter(self, name: str) -> nn.Parameter:
        """Return a parameter of the model, without values."""
        return self._model.get_parameter(name)

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return sum(param.numel() for param in self._model.parameters())

    @property
    def prunable(self) -> int:
        """Weights that may be pruned."""
        return sum(weight.numel() for weight in self.pruned.values())

    @cached_property
    def forecast(self) -> Forecast:
        """The supports that the run will have, estimated on untrained weights where needed."""
        pattern: Pattern | None = getattr(self.method, "pattern", None)
        if pattern is None or pattern.counts(shapes_of(self.pruned)) is not None:
            return self.method.forecast(self.pruned)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            weights, _ = self.method.select(self.recipe.model.build())
        return self.method.forecast(weights)

    @property
    def counts(self) -> dict[str, int]:
        """Kept weights of the last sparse support by name; empty for a dense run."""
        sparse = [counts for _, counts in self.forecast.supports if counts is not None]
        return sparse[-1] if sparse else {}

    @property
    def kept(self) -> int:
        """Kept weights of the last sparse support."""
        return sum(self.counts.values())

    @cached_property
    def ledger(self) -> Ledger:
        """The cost of training."""
        return Ledger.of(
            self.network,
            self.schedule,
            self.forecast.supports,
            self.method.training.flops,
            self.recipe.batch_size,
            self.recipe.data.train_samples,
            exact=self.forecast.exact,
        )

    def why_dense(self, name: str) -> str:
        """Return why a layer is not pruned."""
        return self.refused.get(name, f"the method {self.method.name} prunes nothing")
