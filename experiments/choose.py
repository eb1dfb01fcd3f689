"""Choose the best trial of each family of methods, by the results of the ``select_`` grids.

    python experiments/choose.py            # prints the trials, the best of each family first
    python experiments/choose.py --write    # writes chosen.json, which the variants_ grids read

The quality is that of the sparse network (of the dense one for dense training) on the validation
split. Of two trials with the same quality the one that stands first in the grid is taken.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from variants import CHOSEN, FAMILIES, SELECTIONS

HERE = Path(__file__).parent
Row = dict[str, Any]


def family(trial: str) -> str:
    """Return the family of a trial, by its name."""
    return trial.partition("_")[0]


def quality(row: Row) -> float:
    """Return the quality of the sparse network, or of the dense one where there is no other."""
    value = row["dense_quality"] if row["sparse_quality"] is None else row["sparse_quality"]
    return float(value)


def ranked(folder: Path, trials: list[str]) -> tuple[dict[str, list[tuple[float, str]]], list[str]]:
    """Return the trials of each family, the best first, and those that are not trained yet.

    A trial that diverged has no quality. It counts as a trial, and is not chosen.

    Args:
        folder: The folder of a ``select_`` grid.
        trials: The names of its trials, in the order of the grid.
    """
    rows, failed = (_lines(folder / name) for name in ("results.jsonl", "failed.jsonl"))
    found = {row["method"]: quality(row) for row in rows}
    lost = {row["method"] for row in failed if row["reason"] != "Not trained yet."}
    best: dict[str, list[tuple[float, str]]] = {}
    for name in trials:
        if name in found:
            best.setdefault(family(name), []).append((found[name], name))
    for each in best.values():
        each.sort(key=lambda pair: -pair[0])  # stable: the first of equals stays first
    return best, [name for name in trials if name not in found and name not in lost]


def _lines(path: Path) -> list[Row]:
    return list(map(json.loads, path.read_text("utf-8").splitlines())) if path.exists() else []


def main() -> int:
    """Print the trials, and write what is chosen if that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write chosen.json")
    parser.add_argument("--folder", type=Path, default=HERE, help="of the select_ grids")
    arguments = parser.parse_args()
    chosen: dict[str, dict[str, str]] = {}
    missing = []
    for name, grid in SELECTIONS.items():
        trials = [method.name for method in grid().methods]
        best, waiting = ranked(arguments.folder / f"select_{name}", trials)
        missing += [f"{name}: {trial}" for trial in waiting]
        chosen[name] = {each: best[each][0][1] for each in FAMILIES if each in best}
        for each in FAMILIES:
            count = sum(family(trial) == each for trial in trials)
            print(f"{name}, {each}, {count} trials:")
            for value, trial in best.get(each, ()):
                print(f"  {value:8.3f}  {trial}")
    print(f"{len(missing)} trials are not trained yet." if missing else "All trials are trained.")
    if arguments.write:
        if missing:
            print(f"Nothing is written: {missing[0]} is not trained yet.", file=sys.stderr)
            return 1
        CHOSEN.write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")
        print(f"Written to {CHOSEN.name}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
