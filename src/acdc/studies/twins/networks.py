"""The networks of finished runs, and the couples of them that are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from acdc import score
from acdc.errors import InputError
from acdc.methods import METHODS
from acdc.pattern import Scope, Unstructured
from acdc.result import Result, load
from acdc.runs.batchnorm import reestimate
from acdc.runs.data import Data
from acdc.runs.recipe import data_of, model_of
from acdc.runs.record import Folder
from acdc.states import load_into
from acdc.studies.twins.measures import gram
from acdc.support import Support

State = Mapping[str, Tensor]


class Couple(NamedTuple):
    """Two networks that are compared.

    Args:
        kind: ``"twins"``, ``"pruned"`` (after training, and trained on), ``"cut"`` (not trained
            on) or ``"seeds"``.
        name: What they are.
        first: The state of one, the sparse one if there is one.
        second: The state of the other.
    """

    kind: str
    name: str
    first: State
    second: State


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Args:
        path: Its folder.
        values: The values of its recipe.
        result: What it left.
    """

    path: Path
    values: Mapping[str, Any]
    result: Result

    @classmethod
    def read(cls, path: Path) -> Trained:
        """Read a run.

        Args:
            path: The folder of a run, or its folder ``pair`` with ``recipe.json`` beside it.

        Raises:
            InputError: The folder holds no finished run.
        """
        if not path.is_dir():
            raise InputError(f"There is no folder {str(path)!r}. Give the folder of a run.")
        above = path.absolute().parent
        if not Folder(path).recipe.exists() and Folder(above).recipe.exists():
            path = above
        folder = Folder(path)
        values = folder.read(folder.recipe)["values"]
        return cls(path, values, load(folder.result))

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.absolute().name

    @property
    def method(self) -> str:
        """The method, as people write it."""
        kind = (self.values.get("method") or {}).get("type")
        labels = {cls.__name__: cls.label for cls in METHODS.values()}
        return labels.get(str(kind), str(kind))

    @property
    def dense(self) -> State | None:
        """The dense network: of this run, or the one that the run started from."""
        if (own := self.result.networks().get("dense")) is not None:
            return own
        if (start := self.values.get("start")) is None:
            return None
        return Trained.read(self.path.parent / start).result.networks().get("dense")

    @property
    def sparse(self) -> State | None:
        """The sparse network, if there is one."""
        return self.result.networks().get("sparse")

    @cached_property
    def support(self) -> Support | None:
        """The support of the sparse network."""
        return getattr(self.result, "support", None)

    @property
    def scope(self) -> Scope:
        """How kept weights are spread over the layers; global where the pattern has no scope."""
        pattern = (self.values.get("method") or {}).get("pattern") or {}
        scopes: tuple[Scope, ...] = ("global", "uniform", "erk")
        return next((scope for scope in scopes if scope == pattern.get("scope")), "global")


class Bench:
    """A network of one specification, and the data that states of it are judged on.

    Args:
        run: The run whose model and data are taken.
        seed: Seed of the training batches for BatchNorm.
        batches: Training batches over which BatchNorm statistics are estimated.

    Raises:
        InputError: The data are not found.
    """

    def __init__(self, run: Trained, seed: int, batches: int) -> None:
        folder = Folder(run.path)
        self.net: nn.Module = model_of(folder).build()
        self.data: Data = data_of(folder).load()
        self.seed, self.batches = seed, batches
        self.batch_size = int(run.values.get("batch_size", 128))

    @torch.no_grad()
    def outputs(self, state: State) -> tuple[Tensor, Tensor]:
        """Return logits ``[samples, classes]`` and labels on the test data.

        Each position of a sequence is a sample.
        """
        load_into(self.net, dict(state), "network")
        self.net.eval()
        pairs = [(self.net(x).float(), y) for x, y in self.data.eval_batches("test", 500)]
        logits = [x.movedim(1, -1).flatten(0, -2) for x, _ in pairs]
        return torch.cat(logits), torch.cat([y.flatten() for _, y in pairs])

    def refreshed(self, state: State) -> State:
        """Return a state with the statistics of BatchNorm estimated anew; others as they are."""
        if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.net.modules()):
            return state
        load_into(self.net, dict(state), "network")
        inputs = (x for x, _ in self.data.train_batches(0, self.batch_size, self.seed))
        reestimate(self.net, inputs, self.batches)
        return {name: value.clone() for name, value in self.net.state_dict().items()}

    @torch.no_grad()
    def grams(self, state: State, samples: int) -> dict[str, Tensor]:
        """Return the Gram matrices of the outputs of all convolutions and linear layers.

        Args:
            state: The network.
            samples: The first so many test samples are used.
        """
        load_into(self.net, dict(state), "network")
        self.net.eval()
        found: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_hook(
                lambda _, __, out, name=name: found.__setitem__(name, gram(out))
            )
            for name, module in self.net.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        ]
        try:
            for x, _ in islice(self.data.eval_batches("test", samples), 1):
                self.net(x)
        finally:
            for hook in hooks:
                hook.remove()
        return found


def cut(dense: State, support: Support, sparsity: float, scope: Scope) -> State:
    """Return a dense network cut once, by magnitude.

    Args:
        dense: The network.
        support: Names the weights that are pruned.
        sparsity: How many of them become zero.
        scope: How kept weights are spread over the layers.
    """
    weights = {name: dense[name] for name in support}
    kept = Unstructured(sparsity, scope).select(score.magnitude(weights))
    return {
        name: value.masked_fill(~kept[name], 0.0) if name in kept else value
        for name, value in dense.items()
    }


def couples(run: Trained, others: Sequence[Trained], bench: Bench) -> list[Couple]:
    """Return the twins of a run, and the couples that they are compared with.

    Raises:
        InputError: The run left no twins, or another run has another model or other data.
    """
    if run.sparse is None or run.dense is None or run.support is None:
        raise InputError(
            f"{run.path} left a {run.result.index.noun} alone, and this study compares twins. Name "
            f"a run of a method that leaves both, such as AC/DC."
        )
    found = [Couple("twins", f"{run.method}: {run.name}", run.sparse, run.dense)]
    dense_runs = []
    for other in others:
        _check_alike(run, other)
        if other.sparse is not None and other.dense is not None:
            kind = "twins" if other.method == run.method else "pruned"
            found.append(Couple(kind, f"{other.method}: {other.name}", other.sparse, other.dense))
        elif other.dense is not None:
            dense_runs.append((other.name, other.dense))
        else:
            raise InputError(
                f"{other.path} left a sparse network alone, and names no dense network that it "
                f"started from. Name a dense run, or a run that prunes a dense network."
            )
    for name, dense in dense_runs:
        pruned = bench.refreshed(cut(dense, run.support, run.support.sparsity, run.scope))
        found.append(Couple("cut", f"dense run {name}, cut once", pruned, dense))
    for (one, first), (two, second) in combinations(dense_runs, 2):
        found.append(Couple("seeds", f"dense runs {one} and {two}", first, second))
    return found


def _check_alike(run: Trained, other: Trained) -> None:
    for part in ("model", "data"):
        if run.values.get(part) != other.values.get(part):
            raise InputError(
                f"{other.path} was trained with another {part} than {run.path}. Compare runs of "
                f"the same model on the same data."
            )
