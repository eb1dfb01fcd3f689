"""Seconds of a whole `acdc compare` of eight small cells: in its own process, with workers.

    python benchmarks/grid.py [--repeats 1] [--against PYTHON]

The cells train 8 x 8 digits for a few epochs, so that what a worker costs to start is seen. Each
command starts as a user starts it, on one thread a job, and draws its page. ``--against`` is the
Python of an environment with another version of acdc: the commands of both take turns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from acdc.compare import Grid, Task
from acdc.methods.dense import Dense
from acdc.recipes import grids
from acdc.schedule import constant

JOBS = (0, 1, 2)  # 0: in the process of the command
EPOCHS = 4


def eight() -> Grid:
    """Dense and AC/DC training with four seeds."""
    digits = grids.compare_digits().task
    recipe = replace(digits.recipe, method=Dense(constant("dense", epochs=EPOCHS)), engine="off")
    return Grid(
        name="eight",
        about="eight small cells",
        task=Task(digits.name, recipe),
        methods=grids.methods("dense", "acdc"),
        seeds=(0, 1, 2, 3),
    )


def seconds(python: str, jobs: int) -> float:
    """Return the seconds of one command."""
    with tempfile.TemporaryDirectory() as out:
        words = [python, "-m", "acdc", "compare", f"{Path(__file__).resolve()}:eight"]
        began = time.perf_counter()
        subprocess.run(
            [*words, "--jobs", str(jobs), "--out", out],
            check=True,
            capture_output=True,
            cwd=out,
            env=os.environ | {"OMP_NUM_THREADS": str(max(1, jobs))},  # shared by the jobs
        )
        taken = time.perf_counter() - began
        rows = (Path(out) / "eight" / "results.jsonl").read_text().splitlines()
        assert len(rows) == 8
    return taken


def main() -> None:
    """Time the commands, print and save the seconds."""
    from common import save

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--against", metavar="PYTHON", help="of an environment with another acdc")
    args = parser.parse_args()
    pythons = {"this": sys.executable} | ({"other": args.against} if args.against else {})
    taken: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.repeats):
        for jobs in JOBS:
            for which, python in pythons.items():
                taken.setdefault((which, jobs), []).append(seconds(python, jobs))
    rows = [
        {"acdc": which, "jobs": jobs, "seconds": [round(s, 2) for s in found]}
        for (which, jobs), found in taken.items()
    ]
    for row in rows:
        print(f"{row['acdc']:<6} {row['jobs']} jobs  {min(taken[row['acdc'], row['jobs']]):.1f} s")
    # The path of another environment is private.
    sys.argv = [word if word != args.against else "PYTHON" for word in sys.argv]
    save("grid", rows, epochs=EPOCHS, threads_of_a_job=1)


if __name__ == "__main__":
    main()
