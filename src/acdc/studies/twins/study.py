"""The study of a run's twins: every measure, for the twins and for what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from acdc.errors import InputError
from acdc.studies.twins import measures
from acdc.studies.twins.networks import Bench, Couple, State, Trained, couples, cut
from acdc.studies.twins.teacher import taught

Json = dict[str, Any]
Watch = Callable[[str], None]

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
POINTS = 11  # of the path between the twins, both ends included


def study(
    path: Path,
    against: Sequence[Path] = (),
    seed: int = 0,
    samples: int = 512,
    batches: int = 20,
    teach: int = 0,
    watch: Watch = lambda _: None,
) -> Json:
    """Return everything that the page shows.

    Args:
        path: The run whose twins are studied.
        against: Other runs: dense runs, and runs that prune a trained dense network.
        seed: Seed of the training batches for BatchNorm.
        samples: Test samples for the distance along layers.
        batches: Training batches over which BatchNorm statistics are estimated.
        teach: Epochs for which cuts of the dense twin are trained, with and without the twin as
            their teacher; 0: nothing is trained.
        watch: Called with the name of each part before it is computed.

    Raises:
        InputError: A folder is not that of a finished run, or a run does not fit.
    """
    if samples < 2 or batches < 1 or teach < 0:
        raise InputError(
            f"--samples is {samples}, --bn-batches {batches} and --teach {teach}. Give 2 samples, "
            f"1 batch and 0 epochs at least."
        )
    run = Trained.read(path)
    others = [Trained.read(other) for other in against]
    bench = Bench(run, seed, batches)
    found: Json = {
        "run": run.name,
        "method": run.method,
        "data": bench.data.name,
        "seed": seed,
        "samples": samples,
        "bn_batches": batches,
        "couples": [],
    }
    pairs = couples(run, others, bench)
    for number, couple in enumerate(pairs, start=1):
        watch(f"couple {number} of {len(pairs)}: {couple.name}")
        found["couples"].append(compared(bench, couple, samples))
    watch("the path between the twins")
    found["path"] = between(bench, pairs[0].first, pairs[0].second)
    assert run.support is not None
    starts = {"dense twin": pairs[0].second}
    starts |= {f"dense run {o.name}": o.dense for o in others if o.sparse is None and o.dense}
    found["cuts"] = []
    for name, dense in starts.items():
        watch(f"other sparsities from the {name}")
        for sparsity in SPARSITIES:
            state = bench.refreshed(cut(dense, run.support, sparsity, run.scope))
            found["cuts"].append({"from": name, "sparsity": sparsity} | _judged(bench, state))
    found["taught"] = taught(bench, run, teach, watch)
    found["claim"] = claim(found["couples"])
    found["kinds"] = kinds(found["couples"])
    return found


def compared(bench: Bench, couple: Couple, samples: int) -> Json:
    """Return all measures of a couple."""
    one, labels = bench.outputs(couple.first)
    two, _ = bench.outputs(couple.second)
    first, second = bench.grams(couple.first, samples), bench.grams(couple.second, samples)
    return {
        "kind": couple.kind,
        "name": couple.name,
        "accuracy": [measures.accuracy(one, labels), measures.accuracy(two, labels)],
        "agreement": measures.agreement(one, two),
        "contingency": measures.contingency(one, two, labels),
        "cross_entropy": [measures.cross_entropy(one, two), measures.cross_entropy(two, one)],
        "calibration": [measures.calibration(one, labels), measures.calibration(two, labels)],
        "classes": [measures.per_class(one, labels), measures.per_class(two, labels)],
        "layers": {name: measures.alignment(first[name], second[name]) for name in first},
    }


def claim(couples: Sequence[Json]) -> Json:
    """Return whether the twins agree more than dense networks and their pruned versions.

    Args:
        couples: What :func:`compared` returned; the first one is the run's twins.
    """
    twins = couples[0]["agreement"]
    pruned = [couple for couple in couples if couple["kind"] in ("pruned", "cut")]
    more = [couple["name"] for couple in pruned if twins > couple["agreement"]]
    samples = sum(n for who, n in couples[0]["contingency"].items() if who != "same_mistake")
    return {"agreement": twins, "samples": samples, "compared": len(pruned), "more_than": more}


def kinds(couples: Sequence[Json]) -> list[Json]:
    """Return the means of agreement, cross-entropy and linear CKA over the couples of a kind."""
    found = []
    for kind in dict.fromkeys(couple["kind"] for couple in couples):
        mine = [couple for couple in couples if couple["kind"] == kind]
        found.append(
            {
                "kind": kind,
                "couples": len(mine),
                "agreement": fmean(couple["agreement"] for couple in mine),
                "cross_entropy": fmean(fmean(couple["cross_entropy"]) for couple in mine),
                "alignment": fmean(fmean(couple["layers"].values()) for couple in mine),
            }
        )
    return found


def between(bench: Bench, sparse: State, dense: State) -> list[Json]:
    """Return loss and accuracy along the straight line from the sparse twin to the dense one.

    BatchNorm statistics are estimated anew at every point; weights alone are mixed.
    """
    rows = []
    for step in range(POINTS):
        share = step / (POINTS - 1)
        state = bench.refreshed({name: _mix(sparse[name], dense[name], share) for name in sparse})
        rows.append({"dense": share} | _judged(bench, state))
    return rows


def _mix(one: Tensor, two: Tensor, share: float) -> Tensor:
    return one + share * (two - one) if one.is_floating_point() else two


def _judged(bench: Bench, state: State) -> Json:
    outputs, labels = bench.outputs(state)
    loss = float(nn.functional.cross_entropy(outputs.double(), labels))
    return {"loss": loss, "accuracy": measures.accuracy(outputs, labels)}
