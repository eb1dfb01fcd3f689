"""A finished run and a finished grid, whose files are damaged, and the commands that read them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from acdc.cli import main
from support.mutants import mutants
from support.runs import TINY, words

GRID = Path(__file__).with_name("compare_grids.py")

# File of the folder -> the commands that read it.
COMMANDS: dict[str, tuple[str, ...]] = {
    "runs/digits/recipe.json": ("report", "export", "onnx", "resume"),
    "runs/digits/record.json": ("report", "resume"),
    "runs/digits/metrics.jsonl": ("report",),
    "runs/digits/pair/pair.json": ("export",),
    "grid/small/results.jsonl": ("compare",),
    "grid/small/origins.json": ("compare",),
    "grid/small/runs/small/record.json": ("compare",),
    "grid/small/runs/small/recipe.json": ("compare",),
}


class Files:
    """A finished run and a finished grid in a folder.

    Args:
        root: The folder, empty.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = root / "runs" / "digits"
        settings = {**TINY, "engine": "reference"}
        self.settings = words(settings)
        typed = ["run", "digits", "--out", str(root / "runs"), "--device", "cpu", *self.settings]
        assert main(typed) == 0
        (folder,) = (root / "runs").iterdir()
        self.run.symlink_to(folder.name)  # the name of the folder has a hash
        _add_what_few_runs_have(self.run)
        assert main(["compare", f"{GRID}:small", "--jobs", "0", "--out", str(root / "grid")]) == 0
        self.copy = root.with_name(f"{root.name}-copy")
        shutil.copytree(root, self.copy, symlinks=True)

    def restore(self) -> None:
        """Put back every file as it was."""
        for path in self.copy.rglob("*"):
            here = self.root / path.relative_to(self.copy)
            if path.is_file() and (
                not here.is_file() or here.stat().st_mtime_ns != path.stat().st_mtime_ns
            ):
                here.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, here)

    def words(self, command: str) -> list[str]:
        """Return what is typed."""
        run, runs = str(self.run), str(self.root / "runs")
        return {
            "report": ["report", run],
            "export": ["export", run, "--to", "safetensors", "--out", "/dev/null"],
            "onnx": ["export", run, "--to", "onnx", "--out", "/dev/null"],
            "resume": ["run", "digits", "--out", runs, "--resume", *self.settings],
            "compare": [
                *["compare", f"{GRID}:small", "--jobs", "0"],
                *["--out", str(self.root / "grid"), "--resume"],
            ],
        }[command]

    def mutants(self, file: str) -> Iterator[tuple[str, str]]:
        """Yield the wrong texts of a file, each with a name."""
        text = (self.root / file).read_text()
        if not file.endswith("jsonl"):
            value = json.loads(text)
            for name, wrong in mutants(value):
                yield name, sealed_index(wrong) if file.endswith("pair.json") else wrong
            return
        lines = text.splitlines()
        seen: set[Any] = set()
        for number, line in enumerate(lines):
            value = json.loads(line)
            kind = value.get("event"), tuple(value)
            if kind in seen:
                continue
            seen.add(kind)
            for name, wrong in mutants(value):
                yield (
                    f"{kind[0]}.{name}",
                    "\n".join([*lines[:number], wrong, *lines[number + 1 :]]) + "\n",
                )


def _add_what_few_runs_have(run: Path) -> None:
    """Put a warning, refused layers, times of layers and a verdict into a record and its events."""
    record, metrics = run / "record.json", run / "metrics.jsonl"
    found = json.loads(record.read_text())
    details = found["details"]
    details["warnings"] = [{"step": 3, "text": "The checkpoint was damaged."}]
    details["refused"] = {"fc.weight": "the method does not prune it"}
    share = {"sparse_share": 0.8, "share": 0.75}
    verdict = {"kind": "training", "off": ["fc"], "dense": False, **share}
    engine = details["engine"]
    engine |= {"refused": {"fc": "it is too small"}, "verdicts": [verdict]}
    engine["choices"][0] |= {"dense_ms": 2.0, "sparse_ms": 1.0, "convert_ms": 0.1}
    record.write_text(json.dumps(found))
    events = [json.loads(line) for line in metrics.read_text().splitlines()]
    next(e for e in events if e["event"] == "start")["refused"] = details["refused"]
    built = next(e for e in events if e["event"] == "engine")
    built |= {key: engine[key] for key in ("choices", "refused")}
    events.append({"event": "verdict", "step": events[-1]["step"], "verdicts": [verdict]})
    metrics.write_text("".join(json.dumps(event) + "\n" for event in events))


def sealed_index(text: str) -> str:
    """Return the text of an index with the checksum that belongs to it, as a program writes it."""
    try:
        old = json.loads(text)["sha256"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return text
    if not isinstance(old, str) or text.count(old) != 1:
        return text
    return text.replace(old, hashlib.sha256(text.replace(old, "0" * 64).encode()).hexdigest())
