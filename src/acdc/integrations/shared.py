"""What the integrations share: the length of a run, what a run logs, and what it leaves."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any

from acdc.errors import InputError
from acdc.hooks.twin import on_cpu
from acdc.methods.base import Method, check_method
from acdc.pair import Pair
from acdc.result import RESULTS, DenseNetwork, Result, SparseNetwork, leaves
from acdc.schedule import Schedule
from acdc.sparsifier import Sparsifier

_SHARDED = {
    "deepspeed": "DeepSpeed steps copies of the weights that it keeps for itself",
    "fsdp": "FSDP divides every weight among the processes",
    "modelparallel": "model parallelism divides every weight among the processes",
    "megatron": "Megatron-LM divides every weight among the processes",
    "xla": "XLA takes a step later than the optimizer is called",
}


def refuse_sharded(strategy: str) -> None:
    """Refuse a strategy under which the optimizer does not step the weights of the model.

    Args:
        strategy: The trainer's name of it, such as ``"DeepSpeedStrategy"``.

    Raises:
        InputError: Pruned weights would not stay zero.
    """
    plain = strategy.lower().replace("_", "")
    for name, reason in _SHARDED.items():
        if name in plain:
            raise InputError(
                f"The trainer uses {strategy}: {reason}, and acdc cannot keep their zeros there. "
                f"Train on one device, or with DDP."
            )


def resolved(
    method: Method[Any], steps_per_epoch: float | None, total: float | None, settings: str
) -> Method[Any]:
    """Return a method with its schedule in optimizer steps, of the length of the trainer's run.

    Args:
        method: With a plan in epochs or a schedule in steps.
        steps_per_epoch: The trainer's optimizer steps in an epoch; ``None``: it does not know.
        total: The trainer's optimizer steps in all; ``None``: it does not know.
        settings: The trainer's settings that decide its number of steps, for the message.

    Raises:
        InputError: The plan cannot be resolved, or is not as long as the run.
    """
    check_method(method, "The callback")
    plan = method.schedule
    if not isinstance(plan, Schedule):
        if steps_per_epoch is None:
            raise InputError(
                "The method holds a plan in epochs, and the trainer does not know how many "
                "optimizer steps an epoch has. Give the method a schedule in steps: "
                "method.resolve(steps_per_epoch)."
            )
        method = method.resolve(int(steps_per_epoch))
    schedule = method.resolved
    if total is not None and schedule.total != total:
        raise InputError(
            f"The method's schedule has {schedule.total} optimizer steps ({schedule.epochs} "
            f"epochs), and the trainer takes {total:.0f} ({settings}). Make both the same."
        )
    return method


def steps_of(loader: Any, accumulate: int) -> int | None:
    """Return the optimizer steps of an epoch; ``None`` for data without a length.

    Args:
        loader: The batches of an epoch. The last of them ends an accumulation in any case.
        accumulate: Batches for each optimizer step.
    """
    try:
        return math.ceil(len(loader) / accumulate)
    except TypeError:  # a loader has __len__ even where its data have none
        return None


def check_folder(folder: str | os.PathLike[str], method: Method[Any]) -> None:
    """Refuse, before training, a folder that cannot take what the method will leave.

    Raises:
        InputError: The folder holds a result of another kind, or is a file.
    """
    there = Path(folder)
    if there.exists() and not there.is_dir():
        raise InputError(f"{there} is to be the folder of the result, and is a file.")
    kind = leaves(method)
    for other in RESULTS:
        if other is not kind and other.index.is_in(there):
            raise InputError(
                f"{there} already holds a {other.index.noun} ({other.index.name}), and the method "
                f"leaves a {kind.index.noun}. Choose another folder, or remove what is there."
            )


def progress(sparsifier: Sparsifier) -> dict[str, float]:
    """Return what a trainer logs of a sparsifier: numbers by name.

    ``acdc/progress`` is the share of the schedule that has passed, ``acdc/sparse_phase`` is 1 in a
    sparse phase and 0 in a dense one, ``acdc/sparsity`` is the share of zeros among the weights
    that may be pruned.
    """
    return {
        "acdc/progress": sparsifier.step / sparsifier.schedule.total,
        "acdc/sparse_phase": float(sparsifier.phase.kind == "sparse"),
        "acdc/sparsity": sparsifier.support.sparsity,
    }


def result(sparsifier: Sparsifier) -> Result | None:
    """Return what a method leaves: copies on the CPU.

    ``None``, with a warning, if training stopped before the last phase. Training may be resumed
    then from the trainer's checkpoint.
    """
    method, step, schedule = sparsifier.method, sparsifier.step, sparsifier.schedule
    last = schedule.phases[-1]
    if step < last.start:
        warnings.warn(
            f"Training stopped after {step} of {schedule.total} optimizer steps, before the last "
            f"phase begins at step {last.start}. No result was saved. Resume from a checkpoint to "
            f"finish the schedule.",
            stacklevel=2,
        )
        return None
    asked: dict[str, Any] = {"sparsity_asked": method.sparsity, "steps_planned": schedule.total}
    if (kind := leaves(method)) is Pair:
        return sparsifier.pair(**asked)
    facts = asked | {"method": method.name, "step": step, "schedule": schedule.to_dict()}
    state = on_cpu(sparsifier.model.state_dict())
    if kind is DenseNetwork:
        return DenseNetwork(state, facts)
    return SparseNetwork(state, sparsifier.support.to("cpu"), facts)
