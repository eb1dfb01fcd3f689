"""A sparsifier in a loop of ``accelerate``.

>>> from acdc.integrations.accelerate import attach, save                   # doctest: +SKIP
>>> sparsifier = attach(accelerator, method, model, optimizer, loader)      # doctest: +SKIP
>>> save(accelerator, sparsifier, "out")                                    # doctest: +SKIP
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from acdc.errors import InputError, need
from acdc.integrations.shared import progress, refuse_sharded, resolved, result, steps_of
from acdc.methods.base import Method
from acdc.result import Result
from acdc.sparsifier import Sparsifier

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
except ImportError as missing:
    raise need("accelerate", "accelerate") from missing

__all__ = ["attach", "progress", "save"]


def attach(
    accelerator: Accelerator,
    method: Method[Any],
    model: nn.Module,
    optimizer: Any,
    loader: Any = None,
) -> Sparsifier:
    """Return a sparsifier of what ``accelerator.prepare`` returned.

    ``accelerator.save_state`` saves the sparsifier's state, and ``load_state`` restores it.

    Args:
        accelerator: It has prepared model, optimizer and loader.
        method: What to do, with a schedule in steps, or with a plan in epochs and a ``loader``.
        model: The prepared model.
        optimizer: The prepared optimizer, or a list of several: then one step is one call of each.
        loader: The prepared loader of training batches. An epoch has as many optimizer steps as
            the loader has batches, divided by ``gradient_accumulation_steps``.

    Raises:
        InputError: The optimizer is not prepared, the weights are divided among processes, or the
            plan cannot be resolved.
    """
    refuse_sharded(accelerator.distributed_type.value)
    optimizers = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    for each in optimizers:
        if not isinstance(each, AcceleratedOptimizer):
            raise InputError(
                f"attach takes the model and the optimizer that accelerator.prepare returned, and "
                f"the optimizer is a plain {type(each).__name__}. Call prepare first: it may move "
                f"the weights."
            )
    steps = None
    if loader is not None:
        state = accelerator.gradient_state
        steps = steps_of(loader, state.num_steps)
        if steps and len(loader) % state.num_steps and not state.sync_with_dataloader:
            # Accumulation goes on across the end of an epoch.
            raise InputError(
                f"With sync_with_dataloader=False an epoch of {len(loader)} batches has no whole "
                f"number of optimizer steps at gradient_accumulation_steps={state.num_steps}. "
                f"Choose numbers that divide, or call attach without a loader, and give the "
                f"method a schedule in steps."
            )
    resolved_method = resolved(method, steps, None, "")
    sparsifier = Sparsifier(resolved_method, model, [each.optimizer for each in optimizers])
    accelerator.register_for_checkpointing(sparsifier)
    return sparsifier


def save(
    accelerator: Accelerator, sparsifier: Sparsifier, folder: str | os.PathLike[str]
) -> Result | None:
    """Save what was trained: a pair, or a sparse network alone if there was no dense phase.

    Call it on every process, after the last step. The main process writes.

    Returns:
        What was saved; ``None``, with a warning, if training stopped before the last phase.
    """
    found = result(sparsifier)
    if found is not None and accelerator.is_main_process:
        found.save(folder)
    accelerator.wait_for_everyone()
    return found
