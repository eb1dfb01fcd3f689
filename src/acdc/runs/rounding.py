"""What decides the last bits of a run: the machine and the versions that compute it.

A checkpoint holds this. A run that goes on elsewhere ends as it would have but for rounding, and
says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from acdc.processor import processor_name
from acdc.runs.setup import Setup

_NAMES = {
    "processor": "the processor",
    "instructions": "the instruction set of torch",
    "kernels": "the instruction set of the engine",
    "threads": "the number of threads",
    "device": "the device",
    "card": "the card",
    "torch": "the version of torch",
}


def computed(run: Setup) -> dict[str, Any]:
    """Return what computes a run now, one plain value for each of its parts."""
    card = card_name(run.fabric.device)
    return {
        "processor": processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "kernels": run.engine_start["kind"],
        "threads": torch.get_num_threads(),
        "device": run.fabric.device.type,
        "torch": str(torch.__version__),
        **({} if card is None else {"card": card}),
    }


def card_name(device: torch.device) -> str | None:
    """Return the name of a GPU, such as ``"NVIDIA H100"``; ``None`` for other devices."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def moved(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str | None:
    """Return a sentence if a run goes on elsewhere than it was; else ``None``.

    Args:
        before: What computed the run until its checkpoint. ``None``: the checkpoint does not say.
        now: What computes it from now on.
    """
    changes = [
        f"{_NAMES[part]} was {before[part]!r} and is {value!r}"
        for part, value in now.items()
        if before is not None and part in before and before[part] != value
    ]
    if not changes:
        return None
    return (
        f"The run goes on elsewhere: {', '.join(changes)}. It ends as it would have ended there "
        f"but for rounding, and not bitwise the same."
    )
