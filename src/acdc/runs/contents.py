"""What a checkpoint holds, and whether it fits the run that is to go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from acdc.runs.setup import Setup
from acdc.runs.shapes import CHOICE, WARNING
from acdc.schema import COUNT, SECONDS, SHARE, Each, Maybe, Misfit, Number, check
from acdc.states import differences, is_extra

_TENSORS = Each(str, Tensor)
_STATE = Each(str, object)  # of a module: tensors, and what its parts have as extra state
_OPTIMIZER = {"state": Each(int, dict)}
_CHANGE = {
    "step": COUNT,
    "to": ("dense", "sparse"),
    "nnz": COUNT,
    "churn": Maybe(SHARE),
    "regrown": Maybe(COUNT),
    "counts": Maybe(Each(str, COUNT)),
}
_TRIAL = {"parts": [str], "blocks": [[SECONDS]], "times": [SECONDS]}
_SPARSIFIER = {
    "step": COUNT,
    "support": _TENSORS,
    "dense_weights": _TENSORS,
    "trained": Maybe(_TENSORS),
    "last_sparse": Maybe(_TENSORS),
    "changes": [_CHANGE],
    "dense_twin": Maybe({"step": COUNT, "model": _STATE, "optimizer": _OPTIMIZER}),
    "engine": Maybe({"choices": Each(str, CHOICE), "trials?": Each(str, _TRIAL)}),
    "followers?": Each(str, str),
    "mean?": {"noted": int, "network": _TENSORS},
}
_CHECKPOINT = {
    "recipe": dict,
    "data": str,
    "leg": ("main", "finetune"),
    "step": COUNT,
    "batches": COUNT,
    "batches_at_twin": COUNT,
    "seconds": SECONDS,
    "metrics": COUNT,
    "model": _STATE,
    "optimizer": _OPTIMIZER,
    "sparsifier": _SPARSIFIER,
    "precision": dict,
    "pair": Maybe({"sparse": _TENSORS, "facts": dict}),
    "computed": Maybe(dict),
    "warnings": [WARNING],
}


def check_types(state: Any) -> dict[str, Any]:
    """Return a checkpoint, if it has every entry, and each is of its type.

    Raises:
        Misfit: It is not.
    """
    check(state, _CHECKPOINT, "the checkpoint")
    checked: dict[str, Any] = state
    return checked


def check_fits(state: Mapping[str, Any], run: Setup) -> None:
    """See that the tensors and numbers of a checkpoint are possible ones of this run.

    Raises:
        Misfit: They are not.
    """
    total, own = run.schedule.total, _without_extra(run.net.state_dict())
    sparsifier, twin = state["sparsifier"], state["sparsifier"]["dense_twin"]
    finetune = state["leg"] == "finetune"
    _within("step", state["step"], 0, total)
    _within("batches", state["batches"], state["step"], 2**53)
    _within("batches_at_twin", state["batches_at_twin"], 0, state["batches"])
    main = total if finetune else state["step"]
    _within("the step of the sparsifier", sparsifier["step"], main, main)
    if finetune and twin is None:
        raise Misfit("it trains the dense twin, and holds none")
    if finetune and state["pair"] is None and state["format"] > 1:
        raise Misfit("it trains the dense twin, and does not hold the sparse one")
    networks = {"model": state["model"]}
    if twin is not None:
        _within("the step of the dense twin", twin["step"], 0, sparsifier["step"])
        networks["dense twin"] = twin["model"]
        _check_optimizer(twin["optimizer"], run, "the dense twin's optimizer")
    if state["pair"] is not None:
        networks["sparse network"] = state["pair"]["sparse"]
    for what, network in networks.items():
        tensors = _without_extra(network)
        check(tensors, _TENSORS, f"its {what}")
        if found := differences(tensors, f"its {what}", own, "the model"):
            raise Misfit(found)
    weights = {name: own[name] for name in sparsifier["dense_weights"] if name in own}
    if found := differences(sparsifier["dense_weights"], "its dense weights", weights, "the model"):
        raise Misfit(found)
    _check_optimizer(state["optimizer"], run, "the optimizer")


def _without_extra(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not is_extra(name, value)}


def _within(what: str, number: int, least: int, most: int) -> None:
    check(number, Number(int, least, most), what)


def _check_optimizer(state: Mapping[str, Any], run: Setup, what: str) -> None:
    """See that each parameter has what an optimizer of the recipe keeps, or nothing yet."""
    kept = _kept(run)
    params = list(run.net.parameters())
    for number, entries in state["state"].items():
        _within(f"the number of a parameter of {what}", number, 0, len(params) - 1)
        if not entries:
            continue
        if entries.keys() != kept.keys():
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
