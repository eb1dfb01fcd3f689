"""The numbers of a record beside those of the networks: costs, counts, and where a run was made."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from acdc.cost import Ledger
from acdc.runs.record import machine, peak_memory, versions
from acdc.runs.rounding import card_name
from acdc.runs.setup import Setup


def ledger(run: Setup, until: int | None = None) -> Ledger:
    """Return the FLOPs of training, from the supports that the run had.

    Args:
        run: The run.
        until: Executed steps so far; ``None``: the whole schedule.
    """
    return Ledger.of(
        run.network,
        run.schedule,
        [(change.step, change.counts) for change in run.sparsifier.changes],
        run.method.training.flops,
        run.recipe.batch_size,
        run.data.train_samples,
        until=until,
    )


def costs(run: Setup, spent: Ledger) -> dict[str, Any]:
    """Return the FLOPs of inference and of training, as shares of the dense ones."""
    counts = run.sparsifier.support.counts()
    return {
        "inference_flops_ratio": run.network.inference_ratio(counts),
        "train_flops_ratio": spent.ratio,
    }


def details(run: Setup, spent: Ledger, command: str, finetuned: bool) -> dict[str, Any]:
    """Return everything else that a record holds.

    Args:
        run: The run.
        spent: The FLOPs of its training.
        command: What was typed.
        finetuned: Whether the dense twin was trained on.
    """
    support = run.sparsifier.support
    parameters = sum(p.numel() for p in run.net.parameters())
    device, card = str(run.fabric.device), card_name(run.fabric.device)
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
        "device": device if card is None else f"{device} ({card})",
        "devices": run.fabric.world_size,
        "sparsity_asked": run.method.sparsity,
        "sparsity_all_parameters": (support.numel - support.nnz) / parameters,
        "parameters": parameters,
        "prunable": support.numel,
        "dense_flops": run.network.flops(),
        "sparse_flops": run.network.flops(support.counts()),
        "train_flops": spent.flops,
        "train_flops_dense": spent.dense_flops,
        "ledger": spent.to_dict(),
        # The dense twin took the steps of the last phase, densely.
        "finetune_flops": spent.phases[-1].dense_flops if finetuned else 0,
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
