"""The shapes of the files in a run's folder: of the recipe, the record and the events.

Files of older versions lack some entries: the shapes name those with ``?``. Entries that nothing
reads are not named.
"""

from __future__ import annotations

from typing import Any

from acdc.cost import Ledger
from acdc.schedule import Schedule
from acdc.schema import (
    AMOUNT,
    COUNT,
    FLOPS,
    PERCENT,
    POSITIVE,
    SECONDS,
    SHARE,
    Each,
    Maybe,
    Misfit,
    Number,
    Shape,
    check,
)

# --- events -------------------------------------------------------------------------------------

_KIND = ("dense", "sparse")
_TWIN = {"twin?": ("dense",)}
_TIMES = {"seconds?": SECONDS, "cpu_seconds?": SECONDS}
_PHASE = {"kind": _KIND, "start": COUNT, "stop": COUNT}
CHOICE = {  # of the engine, for a layer
    "sparse": bool,
    "density": SHARE,
    "dense_ms": Maybe(AMOUNT),
    "sparse_ms": Maybe(AMOUNT),
    "convert_ms": Maybe(AMOUNT),
    "tiling?": Maybe(
        {"panel_bytes": POSITIVE, "rows": Maybe(POSITIVE), "grad_rows": Maybe(POSITIVE)}
    ),
}
WARNING = {"step": COUNT, "text": str}
_NAMED_CHOICE = {"name": str, **CHOICE}
_VERDICT = {  # of the engine, on steps of a kind
    "kind": str,
    "off": [str],
    "dense": bool,
    "sparse_share": Maybe(AMOUNT),
    "share": Maybe(AMOUNT),
}
_ENGINE = {"kind?": str, "reason?": Maybe(str)}
_LAYER = {
    "name": str,
    "shape": [COUNT],
    "numel": POSITIVE,
    "positions?": Maybe(COUNT),
    "prunable?": bool,
}
_COST = {**_PHASE, "samples": COUNT, "flops": FLOPS, "dense_flops": FLOPS}
_LEDGER = {"phases": [_COST], "exact": bool}

# What the times and the pages read of each event. Runs of older versions lack some of it.
EVENTS: dict[str, Shape] = {
    "start": {
        "total_steps": COUNT,
        "phases": [_PHASE],
        "steps_per_epoch": [COUNT],
        "layers?": [_LAYER],
        "refused?": Each(str, str),
        "engine?": _ENGINE,
    },
    "step": {"phase": _KIND, "loss?": Maybe(float), "lr?": Maybe(float), **_TIMES, **_TWIN},
    "eval": {
        "phase": _KIND,
        "accuracy": PERCENT,
        **dict.fromkeys(("random_accuracy?", "true_accuracy?"), PERCENT),
        **_TIMES,
        **_TWIN,
    },
    "change": {
        "to": _KIND,
        "nnz": COUNT,
        "churn": Maybe(SHARE),
        "regrown?": Maybe(COUNT),
        "counts?": Maybe(Each(str, COUNT)),
    },
    "revived": {
        "layers": Each(str, {"entered": COUNT, "norm": Maybe(AMOUNT), "stayed": Maybe(AMOUNT)})
    },
    "engine": {"choices?": [_NAMED_CHOICE], "refused?": Each(str, str), **_ENGINE, **_TIMES},
    "verdict": {"verdicts": [_VERDICT]},
    "ledger": _LEDGER,
}


def check_event(value: Any) -> None:
    """See that a value is an event of a run. Events of kinds that are not known are let through.

    Raises:
        Misfit: It is none.
    """
    check(value, {"event": str, "step": COUNT}, "the line")
    check(value, EVENTS.get(value["event"], {}), "the event")
    if value["event"] == "start":
        try:
            Schedule.from_dict(value)
        except (TypeError, ValueError) as error:
            raise Misfit(str(error)) from error
    elif value["event"] == "ledger":
        _check_ledger(value, "phases")


def _check_ledger(value: Any, path: str) -> None:
    if not Ledger.from_dict(value).phases:
        raise Misfit(f"{path} is empty")


# --- recipe.json and record.json ----------------------------------------------------------------

_RECIPE = {
    "name": str,
    "seed?": int,
    "values": {"type?": str, "model?": {"type": str}},
    "changed?": Maybe(dict),
}

# The bits are not finite where the loss overflowed in the last evaluation and not in training.
_NETWORK = {"accuracy": PERCENT, "bits?": float, "bytes": POSITIVE}
_DONE = {
    **_LAYER, "pruned?": bool, "nnz?": Maybe(COUNT),
}  # fmt: skip
_TIME = {
    **dict.fromkeys(("dense?", "sparse?", "engine?", "cpu?"), SECONDS),
    **dict.fromkeys(("dense_step_ms?", "sparse_step_ms?"), Maybe(SECONDS)),
}
_DETAILS = {
    "parameters": POSITIVE,
    "prunable": COUNT,
    "sparsity_asked": Maybe(SHARE),
    "train_flops": FLOPS,
    "train_flops_dense": Number(int, 1, 10**30),
    "finetune_flops": FLOPS,
    "sparsity_all_parameters?": Maybe(SHARE),
    "dense_flops?": Maybe(FLOPS),
    "sparse_flops?": Maybe(FLOPS),
    "ledger?": Maybe(_LEDGER),
    "layers?": [_DONE],
    "refused?": Maybe(Each(str, str)),
    "engine?": {
        **_ENGINE,
        "choices?": [_NAMED_CHOICE],
        "refused?": Each(str, str),
        "verdicts?": [_VERDICT],
    },
    "time?": Maybe(_TIME),
    "devices?": Maybe(POSITIVE),
    "warnings?": [WARNING],
    **dict.fromkeys(("finished?", "command?", "device?"), Maybe(str)),
    **dict.fromkeys(("machine?", "versions?"), Maybe(dict)),
    **dict.fromkeys(("dense_finetuned?", "bn_reestimated?"), bool),
}
_RECORD = {
    "sparse": Maybe({**_NETWORK, "sparsity": SHARE, "nnz": COUNT}),
    "dense": Maybe(_NETWORK),
    "inference_flops_ratio": AMOUNT,
    "train_flops_ratio": AMOUNT,
    "seconds": SECONDS,
    "run": str,
    "details": _DETAILS,
}

# What a comparison reads beyond that. Records of older versions lack some of it.
_COMPARED = {
    **dict.fromkeys(("sparse", "dense"), Maybe({"loss": float})),
    "details": {
        **dict.fromkeys(("data", "device", "command", "finished"), str),
        **dict.fromkeys(("machine", "versions"), dict),
        "epochs": POSITIVE,
        "time": dict.fromkeys(("dense", "sparse", "engine", "cpu"), SECONDS),
    },
}


def check_recipe(value: Any) -> None:
    """See that a value is what ``recipe.json`` holds.

    Raises:
        Misfit: It is not.
    """
    check(value, _RECIPE, "the file")


def check_record(value: Any) -> None:
    """See that a value is what ``record.json`` holds.

    Raises:
        Misfit: It is not.
    """
    check(value, _RECORD, "the file")
    if value["sparse"] is None and value["dense"] is None:
        raise Misfit("sparse and dense are both null, and a run leaves one network at least")
    if (ledger := value["details"].get("ledger")) is not None:
        _check_ledger(ledger, "details.ledger.phases")


def check_compared(record: Any) -> None:
    """See that a record has what a comparison reads.

    Raises:
        Misfit: It has not.
    """
    check(record, _COMPARED, "the file")
