"""The numbers of a record beside those of the networks: costs, counts, and where a run was made."""

from __future__ import annotations

from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

from acdc.runs.record import machine, peak_memory, versions
from acdc.runs.setup import Setup


def costs(run: Setup) -> dict[str, Any]:
    """Return the FLOPs of inference and of training, as shares of the dense ones."""
    counts = run.sparsifier.support.counts()
    spent, whole = _spent(run, 1), 3 * run.network.flops() * run.schedule.total
    return {
        "inference_flops_ratio": run.network.inference_ratio(counts),
        "train_flops_ratio": float(Fraction(spent, whole)),
    }


def details(run: Setup, command: str, finetuned: bool) -> dict[str, Any]:
    """Return everything else that a record holds.

    Args:
        run: The run.
        command: What was typed.
        finetuned: Whether the dense twin was trained on.
    """
    support = run.sparsifier.support
    parameters = sum(p.numel() for p in run.net.parameters())
    return {
        "recipe": run.recipe.name,
        "method": run.method.name,
        "data": run.data.name,
        "seed": run.recipe.seed,
        "epochs": run.schedule.epochs,
        "command": command,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "device": str(run.fabric.device),
        "devices": run.fabric.world_size,
        "sparsity_asked": run.method.sparsity,
        "sparsity_all_parameters": (support.numel - support.nnz) / parameters,
        "parameters": parameters,
        "prunable": support.numel,
        "dense_flops": run.network.flops(),
        "sparse_flops": run.network.flops(support.counts()),
        **_training_flops(run, finetuned),
        "phases": [vars(phase) for phase in run.schedule.phases],
        "layers": _layers(run),
        "refused": run.sparsifier.refused,
        "engine": run.engine_start | (run.engine.chosen() if run.engine else {}),
        "peak_memory": peak_memory(),
        "dense_finetuned": finetuned,
        "bn_reestimated": bool(run.recipe.bn_batches),
    }


def _layers(run: Setup) -> list[dict[str, Any]]:
    counts = run.sparsifier.support.counts()
    kept = run.network.kept(counts)
    return [
        {
            "name": layer.name,
            "shape": list(layer.shape),
            "numel": layer.weights,
            "nnz": kept[layer.name],
            "positions": layer.positions,
            "macs": layer.macs,
            "density": kept[layer.name] / layer.weights,
            "pruned": layer.name in counts,
        }
        for layer in run.network.layers
    ]


def _training_flops(run: Setup, finetuned: bool) -> dict[str, int]:
    """Return the FLOPs of training: of the run, of dense training, and of fine-tuning."""
    network, schedule = run.network, run.schedule
    samples, epoch = run.recipe.batch_size, run.data.train_samples
    dense_phases: list[dict[str, int] | None] = [None] * len(schedule.phases)
    dense = network.training_flops(schedule, dense_phases, samples, epoch)
    tail = 0
    if finetuned:  # it took the steps of the last phase, densely
        nothing = dict.fromkeys(network.shapes, 0)
        rest = [*dense_phases[:-1], nothing]
        tail = dense - network.training_flops(schedule, rest, samples, epoch)
    return {
        "train_flops": _spent(run, samples, epoch),
        "train_flops_dense": dense,
        "finetune_flops": tail,
    }


def _spent(run: Setup, per_step: int, per_epoch: int | None = None) -> int:
    """Return the FLOPs of the run, from the supports it had."""
    supports = [(change.step, change.counts) for change in run.sparsifier.changes]
    rule = run.method.step_flops
    return run.network.flops_over(run.schedule, supports, per_step, per_epoch, rule)
