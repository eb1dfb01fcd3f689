"""What a checkpoint holds, and whether it fits the run that is to go on from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args, get_origin

import torch
from torch import Tensor, nn

from acdc.runs.setup import Setup
from acdc.states import differences

Tensors = dict[str, Tensor]

_CHANGE = {
    "step": int,
    "to": str,
    "nnz": int,
    "churn": float | None,
    "regrown": int | None,
    "counts": dict[str, int] | None,
}
_CHOICE = {
    "sparse": bool,
    "density": float,
    "dense_ms": float | None,
    "sparse_ms": float | None,
    "convert_ms": float | None,
}
_SPARSIFIER = {
    "step": int,
    "support": Tensors,
    "dense_weights": Tensors,
    "trained": Tensors | None,
    "last_sparse": Tensors | None,
    "changes": list[Any],
    "dense_twin": dict[str, Any] | None,
    "engine": dict[str, Any] | None,
}
_CHECKPOINT = {
    "recipe": dict[str, Any],
    "data": str,
    "leg": str,
    "step": int,
    "batches": int,
    "batches_at_twin": int,
    "seconds": float,
    "metrics": int,
    "model": Tensors,
    "optimizer": {"state": dict[int, Any]},
    "sparsifier": _SPARSIFIER,
    "precision": dict[str, Any],
    "pair": dict[str, Any] | None,
}


class Misfit(Exception):
    """A value that does not fit. The message says which, and what it should be."""


def check_types(state: Any) -> dict[str, Any]:
    """Return a checkpoint, if it has every entry, and each is of its type.

    Raises:
        Misfit: It is not.
    """
    _check(state, _CHECKPOINT, "the checkpoint")
    sparsifier = state["sparsifier"]
    for change in sparsifier["changes"]:
        _check(change, _CHANGE, "a change of the support")
    if sparsifier["engine"] is not None:
        _check(sparsifier["engine"], {"choices": dict[str, Any]}, "the engine")
        for choice in sparsifier["engine"]["choices"].values():
            _check(choice, _CHOICE, "a choice of the engine")
    if sparsifier["dense_twin"] is not None:
        twin = {"step": int, "model": Tensors, "optimizer": {"state": dict[int, Any]}}
        _check(sparsifier["dense_twin"], twin, "the dense twin")
    if state["pair"] is not None:
        _check(state["pair"], {"sparse": Tensors, "facts": dict[str, Any]}, "the pair")
    checked: dict[str, Any] = state
    return checked


def check_fits(state: Mapping[str, Any], run: Setup) -> None:
    """See that the tensors and numbers of a checkpoint are possible ones of this run.

    Raises:
        Misfit: They are not.
    """
    total, own = run.schedule.total, run.net.state_dict()
    sparsifier, twin = state["sparsifier"], state["sparsifier"]["dense_twin"]
    if state["leg"] not in ("main", "finetune"):
        raise Misfit(f"its leg is {state['leg']!r}, which is neither 'main' nor 'finetune'")
    finetune = state["leg"] == "finetune"
    _within("step", state["step"], 0, total)
    _within("batches", state["batches"], state["step"])
    _within("batches_at_twin", state["batches_at_twin"], 0, state["batches"])
    _within("seconds", state["seconds"], 0)
    _within("metrics", state["metrics"], 0)
    main = total if finetune else state["step"]
    _within("the step of the sparsifier", sparsifier["step"], main, main)
    if finetune and twin is None:
        raise Misfit("it trains the dense twin, and holds none")
    networks = {"model": state["model"]}
    if twin is not None:
        _within("the step of the dense twin", twin["step"], 0, sparsifier["step"])
        networks["dense twin"] = twin["model"]
        _check_optimizer(twin["optimizer"], run, "the dense twin's optimizer")
    if state["pair"] is not None:
        networks["sparse network"] = state["pair"]["sparse"]
    for what, network in networks.items():
        if found := differences(network, f"its {what}", own, "the model"):
            raise Misfit(found)
    weights = {name: own[name] for name in sparsifier["dense_weights"] if name in own}
    if found := differences(sparsifier["dense_weights"], "its dense weights", weights, "the model"):
        raise Misfit(found)
    _check_optimizer(state["optimizer"], run, "the optimizer")


def _within(what: str, number: float, least: float, most: float = math.inf) -> None:
    if not (math.isfinite(number) and least <= number <= most):
        raise Misfit(f"{what} is {number}, and it can be {least:g} to {most:g}")


def _check_optimizer(state: Mapping[str, Any], run: Setup, what: str) -> None:
    """See that each parameter has what an optimizer of the recipe keeps, or nothing yet."""
    kept = _kept(run)
    params = list(run.net.parameters())
    for number, entries in state["state"].items():
        _within(f"the number of a parameter of {what}", number, 0, len(params) - 1)
        if not entries:
            continue
        if not isinstance(entries, dict) or entries.keys() != kept.keys():
            raise Misfit(f"{what} does not hold {', '.join(kept) or 'nothing'} for each parameter")
        for name, value in entries.items():
            like = kept[name]
            if type(value) is not type(like):
                raise Misfit(f"{name} of {what} is of type {type(value).__name__}")
            if isinstance(value, Tensor):
                shape = params[number].shape if like.dim() else like.shape
                if value.shape != shape or value.is_floating_point() != like.is_floating_point():
                    raise Misfit(
                        f"{name} of {what} is {value.dtype} of shape {tuple(value.shape)}, and it "
                        f"should have the shape {tuple(shape)}"
                    )


def _kept(run: Setup) -> dict[str, Any]:
    """Return what an optimizer of the recipe keeps for one parameter after a step."""
    param = nn.Parameter(torch.zeros(1))
    optimizer = run.recipe.optimizer.build([param])
    param.grad = torch.zeros(1)
    optimizer.step()
    return dict(optimizer.state[param])


def _check(value: Any, schema: Any, what: str) -> None:
    """Compare a value with a schema: a type, or a dictionary of the entries that must be there."""
    if isinstance(schema, dict):
        _check(value, dict[str, Any], what)
        for key, part in schema.items():
            if key not in value:
                raise Misfit(f"{what} has no {key!r}")
            _check(value[key], part, key)
    elif get_origin(schema) is dict:
        keys, values = get_args(schema)
        _check_type(value, dict, what)
        for key, part in value.items():
            _check(key, keys, f"a key of {what}")
            _check(part, values, f"{key!r} in {what}")
    elif get_origin(schema) is list:
        _check_type(value, list, what)
    elif NoneType in get_args(schema):
        if value is not None:
            _check(value, get_args(schema)[0], what)
    elif schema is not Any:
        _check_type(value, schema, what)


def _check_type(value: Any, kind: type, what: str) -> None:
    kinds: Any = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise Misfit(f"{what} is of type {type(value).__name__}, not {kind.__name__}")
