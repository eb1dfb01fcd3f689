"""Trials of the trainers: killed at random steps, resumed by the trainer, bitwise the same end."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from acdc.result import load

_TESTS = Path(__file__).resolve().parent.parent / "tests"


def killed(seed: int) -> str | None:
    """Kill a random trainer with a random method up to four times, after random steps."""
    draw = random.Random(seed)
    trainer = draw.choice(("lightning", "transformers", "accelerate"))
    method = draw.choice(("acdc", "topkast", "set", "woodfisher"))
    stops = sorted(draw.sample(range(1, 25), draw.randint(1, 4)))
    what = f"{trainer}, {method}, killed after steps {stops}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        done = subprocess.run(
            [sys.executable, "-m", "support.trainers", trainer, folder, method, "1",
             *map(str, stops)],
            cwd=_TESTS, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode or json.loads(done.stdout.splitlines()[-1])[-1]:
            return f"{what}: {done.stderr[-2000:]}"
        whole, resumed = (torch.load(folder / k / "final.pt") for k in ("whole", "killed"))
        if differ := [n for n in whole if not torch.equal(whole[n], resumed[n])]:
            return f"{what}: {differ[0]} differs"
        if load(folder / "whole" / "out") != load(folder / "killed" / "out"):
            return f"{what}: the results differ"
    return None


TRIALS: dict[str, Callable[[int], str | None]] = {"trainers": killed}
