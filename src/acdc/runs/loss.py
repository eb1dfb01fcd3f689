"""The loss of a batch, its gradients, and what the processes of a run agree on."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from acdc.collectives import together
from acdc.runs.setup import Setup

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def backward(run: Setup, x: Tensor, y: Tensor) -> float:
    """Accumulate the gradients of the mean loss over a batch, and return the loss."""
    parts = run.recipe.accumulate
    total = torch.zeros((), device=run.fabric.device)
    pairs = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
    for number, (inputs, targets) in enumerate(pairs, start=1):
        later = number < len(pairs) and run.fabric.world_size > 1
        with run.fabric.no_backward_sync(run.model) if later else nullcontext():
            loss = nn.functional.cross_entropy(
                run.model(inputs), targets, label_smoothing=run.recipe.label_smoothing
            ) * (len(inputs) / len(x))
            with together("average the gradients"):
                run.fabric.backward(loss)
        total += loss.detach()
    return float(total)


def agreed(fabric: Fabric, loss: float, stop: int) -> tuple[float, int]:
    """Return the mean loss of all processes, and the signal that one of them has been sent.

    A process that stopped alone would leave the others waiting for it. With one process the signal
    is 0: the loop looks at it after the step.

    Args:
        fabric: The processes.
        loss: The loss of this process.
        stop: The signal that this process has been sent; 0: none.
    """
    if fabric.world_size == 1:
        return loss, 0
    with together("compare the losses"):
        every = cast(Tensor, fabric.all_gather(torch.tensor([loss, stop], device=fabric.device)))
    return float(every[:, 0].mean()), int(every[:, 1].max())
