"""The engine of a run: whether a run has one, its choices, and the time they took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from acdc.engine.choice import Choice
from acdc.engine.engine import Engine
from acdc.engine.native import available
from acdc.engine.reference import Reference
from acdc.engine.verdict import Verdict
from acdc.runs.recipe import Computed
from acdc.runs.record import Clocks

Json = dict[str, Any]


class RunEngine(Engine):
    """An engine that measures how long it builds, and reports its choices.

    Args:
        model: The network, on a CPU.
        example: A batch as the network is called with.
        mode: ``"auto"`` or ``"reference"``, as in the recipe.

    Attributes:
        taken: Time that its compressions took so far: timing of layers, tracing, index lists.
    """

    def __init__(self, model: nn.Module, example: Tensor, mode: Computed) -> None:
        reference = Reference() if mode == "reference" else None
        super().__init__(model, example, backend=reference, choose=reference is None)
        self.taken = Clocks()
        self.reason: str | None = None
        if reference is None and not available():
            self.reason = (
                "the compiled kernels are missing: reinstall acdc-train with a C++ compiler"
            )
        self._written: dict[str, Choice] = {}
        self._written_verdicts: tuple[Verdict, ...] = ()

    def compress(self, support: Mapping[str, Tensor]) -> None:
        """Run sparse from here on."""
        began = Clocks.now()
        super().compress(support)
        self.taken = self.taken.plus(Clocks.now().minus(began))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the choices and verdicts of a checkpoint. Their events have been written."""
        super().load_state_dict(state)
        self._written, self._written_verdicts = dict(self.choices), self.verdicts

    # --- for events and records -------------------------------------------------------------------

    def start(self) -> Json:
        """Return what is known before the first compression."""
        return {"kind": self.backend.isa, "reason": self.reason}

    def chosen(self) -> Json:
        """Return what was measured of layers and of whole steps, and what stays with PyTorch."""
        choices = [
            {"name": name} | {key: _rounded(value) for key, value in asdict(choice).items()}
            for name, choice in self.choices.items()
        ]
        verdicts = [_json(verdict) for verdict in self.verdicts]
        return {"choices": choices, "refused": dict(self.refused), "verdicts": verdicts}

    def new_choices(self) -> Json:
        """Return the choices if they differ from those returned last; otherwise nothing."""
        if self.choices == self._written:
            return {}
        self._written = dict(self.choices)
        return {key: value for key, value in self.chosen().items() if key != "verdicts"}

    def new_verdicts(self) -> list[Json]:
        """Return the verdicts that were not returned before."""
        new = [verdict for verdict in self.verdicts if verdict not in self._written_verdicts]
        self._written_verdicts = self.verdicts
        return [_json(verdict) for verdict in new]


def why_off(device: torch.device, precision: str) -> str | None:
    """Return why a run cannot have the engine that its recipe asks for; ``None``: it can."""
    if device.type != "cpu":
        return f"the run is on {device}, and the kernels are for CPUs"
    if precision != "32-true":
        return f"the run computes in {precision}, and the kernels in 32-true"
    return None


def _json(verdict: Verdict) -> Json:
    rounded = {key: _rounded(value) for key, value in asdict(verdict).items()}
    return rounded | {"off": list(verdict.off)}


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value
