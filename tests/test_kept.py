"""Steps that touch only kept elements, against masked dense: the same numbers, the same objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acdc.engine.engine import Engine
from acdc.engine.kept import ELEMENTWISE
from acdc.methods.acdc import ACDC
from acdc.methods.base import Reset
from acdc.pattern import Unstructured
from acdc.sparsifier import Sparsifier
from helpers import SCHEDULE, TOTAL, Net, backward, build, copied, dropped, is_plus_zero, same

O = torch.optim  # noqa: E741
WD = {"weight_decay": 1e-2}
Factory = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (O.SGD, {"lr": 0.1}),
    "momentum": (O.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
    "nesterov": (O.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, **WD}),
    "sgd-foreach": (O.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True, **WD}),
    "adam": (O.Adam, {"lr": 0.01, **WD}),
    "adam-foreach": (O.Adam, {"lr": 0.01, "foreach": True, **WD}),
    "adamw": (O.AdamW, {"lr": 0.01, "amsgrad": True, "maximize": True, **WD}),
    "nadam": (O.NAdam, {"lr": 0.01, **WD}),
    "radam": (O.RAdam, {"lr": 0.01, **WD}),
    "adamax": (O.Adamax, {"lr": 0.01, **WD}),
    "rmsprop": (O.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True, **WD}),
    "adadelta": (O.Adadelta, {"lr": 1.0, **WD}),
}
every_optimizer = pytest.mark.parametrize("which", OPTIMIZERS)
# Vectors of other lengths end in other places, and there PyTorch rounds without fused
# multiply-adds.
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


def factory(which: str) -> Factory:
    """Build the optimizer over two groups, so that places and options are of groups."""
    kind, options = OPTIMIZERS[which]

    def make(model: nn.Module) -> torch.optim.Optimizer:
        params = list(model.parameters())
        lr = options["lr"]
        groups = [{"params": params[3:]}, {"params": params[:3], "lr": lr / 2}]
        return kind(groups, **options)  # type: ignore[call-arg]

    return make


class Run:
    """A network, its optimizer and its sparsifier, with steps of kept elements or without."""

    def __init__(
        self,
        make: Factory,
        kept: bool,
        reset: Reset = "all",
        change: Callable[[nn.Module], nn.Module] = lambda model: model,
    ) -> None:
        self.model = change(build(Net))
        self.optimizer = make(self.model)
        engine = Engine(self.model, torch.zeros(8, 3, 4, 4), choose=False)
        method = ACDC(Unstructured(0.8), SCHEDULE, reset=reset)
        self.sparsifier = Sparsifier(method, self.model, self.optimizer, engine=engine)
        steps = self.sparsifier._kept_steps
        assert steps is not None
        self.steps = steps
        steps._worth = lambda *_: kept

    def states(self) -> tuple[Any, Any, Any]:
        parts = self.model, self.optimizer, self.sparsifier
        return tuple(copied(part.state_dict()) for part in parts)  # type: ignore[return-value]

    def load(self, states: tuple[Any, Any, Any]) -> None:
        for part, state in zip((self.model, self.optimizer, self.sparsifier), states, strict=True):
            part.load_state_dict(state)

    def step(self, index: int, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)
        backward(self.model, index)
        self.optimizer.step()

    @property
    def is_kept(self) -> bool:
        """Whether the last step was of kept elements."""
        params = self.sparsifier.params.values()
        return bool(self.steps._weights) and all(self.steps.left_zeros(p) for p in params)


def compare(kept: Run, plain: Run) -> None:
    """Same weights everywhere, same state where the support is."""
    for (name, a), b in zip(
        kept.model.state_dict().items(), plain.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    names = {id(p): name for name, p in kept.sparsifier.params.items()}
    for a, b in zip(kept.model.parameters(), plain.model.parameters(), strict=True):
        mine, other = kept.optimizer.state.get(a, {}), plain.optimizer.state.get(b, {})
        assert mine.keys() == other.keys()
        mask = kept.sparsifier.support[names[id(a)]] if id(a) in names else torch.ones_like(a) > 0
        for key, value in mine.items():
            if isinstance(value, Tensor) and value.shape == a.shape:
                assert value.stride() == other[key].stride()
                torch.testing.assert_close(value[mask], other[key][mask], **CLOSE)
                assert kept.sparsifier.phase.kind == "dense" or is_plus_zero(value[~mask])
            else:
                assert same(value, other[key])


def both(which: str, **options: Any) -> tuple[Run, Run]:
    return Run(factory(which), True, **options), Run(factory(which), False, **options)


@every_optimizer
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_run_has_the_numbers_of_masked_dense(which: str, set_to_none: bool) -> None:
    kept, plain = both(which)
    for index in range(TOTAL):
        sparse = not kept.sparsifier.support.is_full
        for run in (kept, plain):
            run.step(index, set_to_none)
        for _, weight, mask in dropped(kept.sparsifier):
            assert is_plus_zero(weight[mask])
            assert weight.grad is not None
            assert weight.grad.shape == weight.shape
        if sparse and index + 1 not in (4,):  # the decompression stopped it
            assert kept.is_kept
        if sparse:
            compare(kept, plain)
        else:
            torch.testing.assert_close(kept.model.state_dict(), plain.model.state_dict(), **CLOSE)
        assert not plain.is_kept


def test_every_kind_is_in_the_table() -> None:
    assert {kind for kind, _ in OPTIMIZERS.values()} == ELEMENTWISE
