"""Long trials of everything that reads a file: damage is a sentence, never a crash or a traceback.

``damage`` changes a file of a finished run or grid and gives a command that reads it; the others
read a file with random damage in this process, whose end the soak sees.
"""

from __future__ import annotations

import contextlib
import io
import random
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from acdc.cli import main
from support.damage import COMMANDS, Files
from support.fuzz import READERS, damaged

FILES = (
    *COMMANDS,
    "runs/digits/pair/sparse.safetensors",
    "runs/digits/pair/dense.safetensors",
    "grid/small/failed.jsonl",
)


@cache
def _files() -> Files:
    return Files(Path(tempfile.mkdtemp(prefix="acdc-soak-")) / "files")


@cache
def _mutants(file: str) -> list[tuple[str, str]]:
    return list(_files().mutants(file)) if file in COMMANDS else []


def damage(seed: int) -> str | None:
    """Damage a file of a finished run or grid, and give a command that reads it."""
    rng, files = random.Random(seed), _files()
    file = rng.choice(FILES)
    path, mutants = files.root / file, _mutants(file)
    command = rng.choice(COMMANDS.get(file, ("compare",) if "grid" in file else ("export",)))
    if command == "onnx":
        command = "export"  # the exporter takes ten seconds
    if mutants and rng.random() < 0.7:
        what, text = rng.choice(mutants)
        raw = text.encode("utf-8", "surrogateescape")
    else:
        what, raw = "random damage", damaged(path.read_bytes(), rng)
    path.write_bytes(raw)
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(files.words(command))
        said = err.getvalue()
        if code not in (0, 2) or (code == 2 and "error: " not in said):
            return f"{command} with {file}, {what}: exit code {code}: {said[-300:]}"
    except BaseException:
        return f"{command} with {file}, {what}: {traceback.format_exc(limit=-3)}"
    finally:
        files.restore()
    return None


TRIALS: dict[str, Callable[[int], str | None]] = {
    "damage_files": damage,
    **{f"fuzz_{name}": reader for name, reader in READERS.items()},
}
