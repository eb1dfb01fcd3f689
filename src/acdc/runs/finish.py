"""The end of a run: the result that it leaves, and what the result measures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from acdc.hooks.twin import on_cpu
from acdc.index import Twin
from acdc.pair import Pair
from acdc.result import DenseNetwork, Result, SparseNetwork, load, sizes
from acdc.runs.batchnorm import reestimate
from acdc.runs.checkpoint import Progress
from acdc.runs.evaluate import evaluate
from acdc.runs.setup import Setup
from acdc.states import load_into


def trained_pair(run: Setup) -> Pair:
    """Return the twins at the end of the main leg."""
    return run.sparsifier.pair(**_facts(run))


def finish(run: Setup, progress: Progress) -> dict[Twin, dict[str, Any]]:
    """Save the result of a run, and evaluate its networks from the files as they will be read.

    Returns:
        For each network: accuracy, loss, size on disk, and for a sparse one its kept weights.
    """
    run.fabric.barrier()
    result = _with_statistics(run, _trained(run, progress))
    run.fabric.barrier()
    if run.fabric.is_global_zero:
        result.save(run.folder.result)
    run.fabric.barrier()
    result = load(run.folder.result)
    found: dict[Twin, dict[str, Any]] = {}
    for twin, state in result.networks().items():
        load_into(run.net, state, result.index.noun)
        found[twin] = dict(evaluate(run))
        if twin == "sparse" and not isinstance(result, DenseNetwork):
            support = result.support
            found[twin] |= {"sparsity": support.sparsity, "nnz": support.nnz}
        found[twin]["bytes"] = sizes(run.folder.result)[twin]
    return found


def _trained(run: Setup, progress: Progress) -> Result:
    """Return what was trained, before BatchNorm statistics are estimated anew."""
    if (pair := progress.pair) is not None:
        facts = pair.facts | {"dense_step": progress.step, "dense_finetuned": True}
        return replace(pair, dense=on_cpu(run.net.state_dict()), facts=facts)
    if run.leaves is Pair:
        return trained_pair(run)
    state = on_cpu(run.net.state_dict())
    facts = _facts(run) | {"method": run.method.name, "step": progress.step}
    if run.leaves is DenseNetwork:
        return DenseNetwork(state, facts)
    return SparseNetwork(state, run.sparsifier.support.to("cpu"), facts)


def _with_statistics(run: Setup, result: Result) -> Result:
    """Return the result with the BatchNorm statistics of its networks estimated anew."""
    if not run.recipe.bn_batches:
        return result
    states: dict[str, Any] = {}
    for twin, state in result.networks().items():
        load_into(run.net, state, result.index.noun)
        batches = run.data.train_batches(0, run.local_batch, run.recipe.seed)
        inputs = (run.on_device(x) for x, _ in batches)
        reestimate(run.net, inputs, run.recipe.bn_batches)
        states[twin] = on_cpu(run.net.state_dict())
    facts = result.facts | {"bn_batches": run.recipe.bn_batches}
    return replace(result, **states, facts=facts)


def _facts(run: Setup) -> dict[str, Any]:
    return {
        "recipe": run.recipe.name,
        "seed": run.recipe.seed,
        "sparsity_asked": run.method.sparsity,
    }
