"""Trials of a run that is killed at random, and whose files are damaged while it is stopped."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from acdc import Pair, Unstructured, constant
from acdc.errors import InputError
from acdc.methods import Static
from acdc.runs import record
from acdc.runs.recipe import Recipe
from support.kill_points import Trials
from support.runs import TINY, assert_same_run, tiny, words

SPARSE = Static(Unstructured(0.75), constant("sparse", epochs=7))

# What a run leaves: a pair in four ways, a dense network, a sparse network.
KINDS: dict[str, Callable[[], Recipe]] = {
    "pair": tiny,
    "statistics": lambda: tiny(bn_batches="2"),
    "untuned": lambda: tiny(dense_finetune="false"),
    "engine": lambda: tiny(engine="reference"),
    "dense": lambda: tiny(method="dense", method__schedule__epochs="7"),
    "sparse": lambda: replace(tiny(), method=SPARSE, dense_finetune=False),
}


def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="acdc-soak-"))


@cache
def _trials(kind: str) -> tuple[Trials, int]:
    """Return a run that was stopped after two thirds, and the calls that it still makes."""
    trials = Trials(_folder(), KINDS[kind]())
    return trials, len(trials.calls())


def _tried(attempt: Callable[[], object]) -> str | None:
    """Return why an attempt failed."""
    try:
        attempt()
    except AssertionError as error:
        return str(error) or repr(error)
    return None


def kill_points(seed: int) -> str | None:
    """Kill a run before one to three calls that change the disk, each time resumed."""
    draw = random.Random(seed)
    trials, calls = _trials(draw.choice(list(KINDS)))
    fatal = [draw.randint(1, calls) for _ in range(draw.choice((1, 1, 2, 3)))]
    return _tried(lambda: trials.killed_before(*fatal))


def kill_writes(seed: int) -> str | None:
    """Kill a run in the middle of a write."""
    draw = random.Random(seed)
    trials, _ = _trials(draw.choice(list(KINDS)))
    size = int(2 ** draw.uniform(6, 20))
    return _tried(lambda: trials.limited(size, kill=True))


def full_disk(seed: int) -> str | None:
    """Let a write of a run fail in its middle, as on a full disk."""
    draw = random.Random(seed)
    trials, _ = _trials(draw.choice(list(KINDS)))
    size = int(2 ** draw.uniform(6, 20))
    return _tried(lambda: trials.limited(size, kill=False))


def flip_checkpoint(seed: int) -> str | None:
    """Flip bits of the last checkpoint, or cut it: the run goes on from the one before."""
    draw = random.Random(seed)
    trials, _ = _trials(draw.choice(list(KINDS)))
    trials.begin()
    path = record.Folder(trials.tried).checkpoint
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 2, 10))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    if draw.random() < 0.2:
        del data[draw.randrange(len(data)) :]
    path.write_bytes(bytes(data))

    def attempt() -> None:
        assert trials.resume() == 0, "a damaged checkpoint: it cannot be resumed"
        assert path.with_name("damaged.ckpt").read_bytes() == bytes(data), "it was not found"
        trials.check("a damaged checkpoint")

    return _tried(attempt)


def damage_metrics(seed: int) -> str | None:
    """Damage the metrics: the run ends with the same networks, and has its times."""
    draw = random.Random(seed)
    trials, _ = _trials(draw.choice(list(KINDS)))
    trials.begin()
    path = trials.tried / "metrics.jsonl"
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 3, 50))):
        at, much = draw.randrange(len(data)), draw.choice((1, 1, 1, 20))
        part = draw.choice((draw.randbytes(much), b"\n" * much, b"[" * 5000, b"", b"\0" * much))
        data[at : at + much] = part
    if draw.random() < 0.2:
        del data[draw.randrange(len(data)) :]
    path.write_bytes(bytes(data))

    def attempt() -> None:
        assert trials.resume() == 0, "damaged metrics: it cannot be resumed"
        for file in (trials.whole / "pair").iterdir():
            same = file.read_bytes() == (trials.tried / "pair" / file.name).read_bytes()
            assert same, f"damaged metrics: {file.name} differs"
        record.times(path)

    return _tried(attempt)


# --- the command ---------------------------------------------------------------------------------


def _command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "acdc", "run", "digits", "--device", "cpu",
            "--out", str(out), *more]  # fmt: skip


def _killed(command: list[str], out: Path, longest: float, draw: random.Random) -> str | None:
    """Start a command up to eight times, kill it at random, and resume it; at last let it end.

    Returns:
        Why it could not be ended.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for kill in range(9):
        resume = ["--resume"] if list(out.glob("*/recipe.json")) else []
        run = subprocess.Popen([*command, *resume], env=env, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)  # fmt: skip
        if kill < 8:
            time.sleep(draw.uniform(0, longest))
            run.send_signal(signal.SIGKILL)
        said, _ = run.communicate()
        if run.returncode not in (0, -signal.SIGKILL):
            return f"It ended with {run.returncode}: {said[-300:]}"
    return None


@cache
def _whole() -> tuple[Path, float]:
    """Return a run by the command that nothing killed, and the seconds that it took."""
    out = _folder()
    began = time.monotonic()
    subprocess.run(_command(out, *words(TINY)), check=True, capture_output=True)
    (folder,) = out.iterdir()
    return folder, time.monotonic() - began


def kill_run(seed: int) -> str | None:
    """Kill ``acdc run`` at random moments, and resume it: it ends bitwise the same."""
    draw = random.Random(seed)
    whole, seconds = _whole()
    with tempfile.TemporaryDirectory(prefix="acdc-soak-") as name:
        out = Path(name)
        if reason := _killed(_command(out, *words(TINY)), out, seconds, draw):
            return reason
        (folder,) = out.iterdir()
        return _tried(lambda: assert_same_run(whole, folder))


def kill_demo(seed: int) -> str | None:
    """Kill the first command of a newcomer at random moments, and resume it until it is done."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="acdc-soak-") as name:
        out = Path(name)
        if reason := _killed(_command(out), out, 20, draw):
            return reason
        folder = out / "digits"
        try:
            pair = Pair.load(folder / "pair")
        except InputError as error:
            return str(error)
        if abs(pair.support.sparsity - 0.9) > 1e-3 or not pair.facts.get("dense_finetuned"):
            return f"the pair is {pair!r} with {pair.facts}"
        for file in ("report.html", "record.json"):
            if not (folder / file).exists():
                return f"there is no {file}"
    return None


TRIALS = {
    trial.__name__: trial
    for trial in (
        kill_points,
        kill_writes,
        full_disk,
        flip_checkpoint,
        damage_metrics,
        kill_run,
        kill_demo,
    )
}
