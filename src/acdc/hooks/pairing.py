"""The pair of a network that is being trained, and the pair of its averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from acdc.errors import InputError
from acdc.hooks.twin import DenseTwin, averaged, on_cpu
from acdc.methods.base import Method
from acdc.pair import Pair
from acdc.shards import mesh_of
from acdc.support import Support

ALONE = "call acdc.SparseNetwork(sparsifier.model.state_dict(), sparsifier.support).save(folder)"
"""What saves the sparse network of one process, for a sentence."""


def twins(
    method: Method[Any],
    step: int,
    model: nn.Module,
    twin: DenseTwin | None,
    behind: Mapping[str, Tensor],
    copied: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    instead: str = ALONE,
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Return the sparse network as it is now, its dense twin, and the step of the latter.

    Args:
        method: The method that trained it.
        step: Executed steps.
        model: The network.
        twin: The network at the end of the last dense phase, if that has passed.
        behind: The dense weights behind a sparse view, if there are some.
        copied: Function from a state dict to copies of its tensors.
        instead: What saves a sparse network that has no dense twin, for the sentence.

    Raises:
        InputError: The network is dense now, or there is no dense network.
    """
    schedule = method.resolved
    if schedule.phase_at(step).kind == "dense" or (twin is None and not behind):
        last = schedule.last("dense")
        raise InputError(
            f"There is no pair yet: after {step} of {schedule.total} steps the network is "
            f"{schedule.phase_at(step).kind}. The dense twin is the end of the last dense phase"
            + (f", at step {last.stop}" if last else ", and this schedule has none")
            + f"; the sparse one is the end of the run. To save a sparse network alone, {instead}."
        )
    sparse = copied(model.state_dict())
    if twin is None or (behind and method.training.is_network):
        return sparse, sparse | copied(behind), step
    dense = twin.model if mesh_of(twin.model.values()) is None else copied(twin.model)
    return sparse, dict(dense), twin.step


def facts_of(method: Method[Any], step: int, dense_step: int | None = None) -> dict[str, Any]:
    """Return what every pair says about itself, and every network (without ``dense_step``)."""
    known = {"method": method.name, "step": step}
    if dense_step is not None:
        known["dense_step"] = dense_step
    return {**known, "schedule": method.resolved.to_dict()}


def paired(
    method: Method[Any],
    step: int,
    support: Support,
    model: nn.Module,
    twin: DenseTwin | None,
    behind: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> Pair:
    """Return the pair of a network as it is now: see :func:`twins`.

    Args:
        method: The method that trained it.
        step: Executed steps.
        support: The support now.
        model: The network.
        twin: The network at the end of the last dense phase, if that has passed.
        behind: The dense weights behind a sparse view, if there are some.
        facts: What is kept with the pair.

    Raises:
        InputError: The network is dense now, or there is no dense network.
    """
    sparse, dense, dense_step = twins(method, step, model, twin, behind, on_cpu)
    known = facts_of(method, step, dense_step)
    return Pair(sparse, dense, support.to("cpu"), {**known, **facts})


def paired_averages(pair: Pair, average: nn.Module, twin: DenseTwin | None) -> Pair:
    """Return a pair of averages: that of the sparse network, and that of its dense twin.

    Args:
        pair: The pair of the weights themselves.
        average: The average of the weights, now.
        twin: The dense twin, with its average.

    Raises:
        InputError: The average of the dense twin was not captured, or is of another model.
    """
    if twin is None or twin.average is None:
        raise InputError(
            "The average of the dense twin was not captured. Call "
            "sparsifier.register_average(average) before the end of the last dense phase; a "
            "method without a dense phase has no such average."
        )
    sparse = on_cpu(averaged(average).state_dict())
    for name, mask in pair.support.items():
        if name not in sparse or sparse[name].shape != mask.shape:
            raise InputError(
                f"The average has no weight {name!r} of shape {tuple(mask.shape)}. Give an average "
                f"of the model that the sparsifier is bound to."
            )
        sparse[name].masked_fill_(~mask, 0.0)  # an average still holds weights of before the cut
    return Pair(sparse, twin.average, pair.support, {**pair.facts, "average": True})
