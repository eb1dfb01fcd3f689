"""Shared code of the tests of runs: a recipe that trains in a second, and a comparison of runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acdc import recipes
from acdc.runs.recipe import Recipe, change

# D[0,4) S[4,8) D[8,12) S[12,16) D[16,20) S[20,28) in steps; then the dense twin over [20,28).
TINY = {
    "method.schedule.epochs": "7",
    "method.schedule.warmup": "1ep",
    "method.schedule.sparse": "1ep",
    "method.schedule.dense": "1ep",
    "method.schedule.last_sparse": "2ep",
    "data.train_examples": "128",
    "data.test_examples": "100",
    "batch_size": "32",
    "model.width": "8",  # with 4, oneDNN in torch 2.13 corrupts the heap (plain PyTorch too)
    "checkpoint_steps": "3",
    "threads": "1",
    "engine": "off",  # "auto" chooses by the clock, so that two fresh runs may differ in a bit
}
STEPS, BRANCH = 28, 20


def tiny(**more: str) -> Recipe:
    """Return the digits recipe, made tiny; ``__`` in a name stands for a dot."""
    settings = {path.replace("__", "."): value for path, value in more.items()}
    return change(recipes.get("digits"), {**TINY, **settings})


def text_of_shakespeares_size(root: Path) -> bytes:
    """Write the 65 characters repeatedly into the file of the data set, and return them."""
    body = (bytes(range(40, 105)) * (1_115_394 // 65 + 1))[:1_115_394]
    (root / "tinyshakespeare").mkdir()
    (root / "tinyshakespeare" / "tinyshakespeare.txt").write_bytes(body)
    return body


def words(settings: Mapping[str, str]) -> list[str]:
    """Return the settings as they are typed."""
    return ["--set", *(f"{path}={value}" for path, value in settings.items())]


def events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """Return the events of a run, without the seconds, which differ between runs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    chosen = [event for event in lines if not kinds or event["event"] in kinds]
    return [{k: v for k, v in event.items() if "seconds" not in k} for event in chosen]


def record(run: Path) -> dict[str, Any]:
    """Return the record of a run, without the values that differ between runs."""
    found: dict[str, Any] = json.loads((run / "record.json").read_text())
    del found["seconds"], found["run"]
    for name in ("finished", "command", "time", "peak_memory", "warnings"):
        del found["details"][name]
    return found


def files(run: Path) -> dict[str, bytes]:
    """Return the files of the pair."""
    return {path.name: path.read_bytes() for path in sorted((run / "pair").iterdir())}


def assert_same_run(one: Path, other: Path) -> None:
    """Assert that two runs trained the same, bit for bit, and wrote the same events."""
    assert files(one) == files(other)
    assert events(one) == events(other)
    assert record(one) == record(other)
