"""Contenders in turns, each in a process of its own that waits while others compute."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from acdc.bench.infer import contender
from acdc.bench.infer.cases import Asked
from acdc.bench.infer.files import Files
from acdc.bench.peers import Unable
from acdc.bench.race import OMP, Row, median_ms, quartiles
from acdc.errors import InputError
from acdc.processor import affinity

Scenario = Literal["sync", "async"]

OURS = "acdc"
PAUSE = 0.1  # seconds before a turn, in which threads of the one before go to sleep
LIMIT = 900.0  # seconds that a contender may take for one answer


@dataclass(frozen=True)
class Entrant:
    """A contender of the command line.

    Args:
        kind: Which runtime.
        file: The kind of file that it loads.
        precision: Of its arithmetic. Rows that are not float32 are marked.
    """

    kind: str
    file: str
    precision: str = "float32"


ENTRANTS: dict[str, Entrant] = {
    OURS: Entrant("acdc", "frozen"),
    "torch": Entrant("torch", "pickle"),
    "torch-compile": Entrant("torch-compile", "pickle"),
    "onnxruntime": Entrant("onnxruntime", "onnx"),
    "openvino": Entrant("openvino", "onnx"),
    "deepsparse": Entrant("deepsparse", "old onnx"),
    "onnxruntime-int8": Entrant("onnxruntime", "int8", "int8"),
    "openvino-bf16": Entrant("openvino", "onnx", "bfloat16"),
}
AGAINST = ("torch", "onnxruntime", "openvino", "deepsparse")


@dataclass(frozen=True)
class Settings:
    """How contenders are timed.

    Args:
        batches: Numbers of samples.
        against: Names of ``ENTRANTS``.
        scenario: ``sync``: one request at a time. ``async``: one in each stream.
        streams: Requests at the same time.
        seconds: Of each turn.
        rounds: Turns of each contender.
        threads: Of each contender, all streams together.
        pythons: Kind of a contender -> its interpreter.
        onnx: A file in place of the exported one.
    """

    batches: Sequence[int]
    against: Sequence[str] = AGAINST
    scenario: Scenario = "sync"
    streams: int = 1
    seconds: float = 1.0
    rounds: int = 5
    threads: int = 1
    pythons: Mapping[str, str] = field(default_factory=dict)
    onnx: Path | None = None

    def __post_init__(self) -> None:
        for name in self.against:
            if name not in ENTRANTS:
                raise InputError(f"--against holds {name!r}. It takes {', '.join(ENTRANTS)}.")
        for kind, path in self.pythons.items():
            if kind not in contender.KINDS:
                kinds = ", ".join(contender.KINDS)
                raise InputError(f"--python {kind}={path}: write KIND=PATH; kinds are {kinds}.")
            if not os.access(path, os.X_OK):
                raise InputError(f"--python {kind}={path}: {path} is no interpreter.")
        for batch in self.batches:
            if batch < 1:
                raise InputError(f"--batch holds {batch}. It takes whole numbers from 1 up.")
        if not 0 < self.seconds < float("inf"):
            raise InputError(f"--seconds is {self.seconds}. It is a number above 0.")
        if self.threads < 1:
            raise InputError(f"--threads is {self.threads}. It is a whole number from 1 up.")
        if not 1 <= self.streams <= self.threads:
            raise InputError(
                f"--streams is {self.streams}, with {self.threads} threads for all streams "
                f"together. It is a whole number from 1 up to the threads: see --threads."
            )

    @property
    def entrants(self) -> dict[str, Entrant]:
        """The contenders, ours first."""
        return {name: ENTRANTS[name] for name in dict.fromkeys((OURS, *self.against))}


# --- one process ----------------------------------------------------------------------------------


class Peer:
    """A contender's process.

    Args:
        python: Its interpreter.
        threads: Of the libraries that read the number from the environment.
    """

    def __init__(self, python: str, threads: int) -> None:
        environment = dict(os.environ) | {OMP: str(threads)}
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # until the process ends
        self._process = subprocess.Popen(
            [python, contender.__file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment,
        )  # fmt: skip

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to a request.

        Raises:
            Unable: The contender cannot do it, or its process has ended. The message says why.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(LIMIT, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = b""
        finally:
            timer.cancel()
        if not line:
            raise Unable(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise Unable(answer["failed"])
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with exit code {code}" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._process.communicate(timeout=10)
        self._process.kill()
        self._process.wait()
        self._errors.close()


# --- turns ----------------------------------------------------------------------------------------


def measure(cases: Sequence[Asked], settings: Settings) -> Iterator[Row]:
    """Yield a row for each contender of each case and batch, as soon as the batch was timed."""
    for asked in cases:
        case = asked.case()
        with tempfile.TemporaryDirectory() as folder:
            files = Files(case, Path(folder), settings.onnx)
            for batch in settings.batches:
                for row in _rows(files, batch, settings):
                    yield {"case": case.name, "sparsity": case.sparsity, "batch": batch} | row


def _rows(files: Files, batch: int, settings: Settings) -> list[Row]:
    peers: dict[str, Peer] = {}
    loaded: dict[str, Row] = {}
    failed: dict[str, str] = {}
    arrays = files.batch(batch)
    try:
        for name, entrant in settings.entrants.items():
            try:
                request = _request(files, batch, arrays, entrant, settings)
                peer = peers[name] = Peer(_python(entrant, settings), settings.threads)
                loaded[name] = _loaded(peer, request)
            except Unable as error:
                failed[name] = str(error)
        turns = _turns({name: peers[name] for name in loaded}, settings, failed)
    finally:
        for peer in peers.values():
            peer.close()
    rows = []
    for name, entrant in settings.entrants.items():
        row: Row = {
            "contender": name,
            "precision": entrant.precision,
            "scenario": settings.scenario,
        }
        row |= {"streams": settings.streams, "threads": settings.threads, "why": failed.get(name)}
        row |= dict.fromkeys((*_LOADED, *_TIMED)) | loaded.get(name, {})
        if name not in failed:
            row |= _summary(turns[name], turns.get(OURS), batch, settings)
        rows.append(row)
    return rows


def _python(entrant: Entrant, settings: Settings) -> str:
    return settings.pythons.get(entrant.kind, sys.executable)


def _request(
    files: Files,
    batch: int,
    arrays: tuple[Path, Path | None],
    entrant: Entrant,
    settings: Settings,
) -> dict[str, Any]:
    """Return the request by which a contender loads the network."""
    frozen = entrant.kind == OURS
    note = None
    try:
        path = files.path(entrant.file)
    except Unable as error:
        if not frozen:
            raise
        path, frozen, note = files.path("pickle"), False, str(error)
    given, expected = arrays
    known = affinity()  # None: this system cannot bind a process to CPUs
    return {
        "do": "load", "kind": entrant.kind, "file": str(path), "frozen": frozen, "note": note,
        "precision": entrant.precision, "samples": batch, "inputs": str(given),
        "expected": str(expected) if expected else None,
        "cpus": known and known[: settings.threads],
        "threads": settings.threads, "streams": settings.streams,
    }  # fmt: skip


_LOADED = (
    "setting", "version", "cold_ms", "import_ms", "memory_mb", "network_mb", "file_mb", "error",
    "note",
)  # fmt: skip


def _loaded(peer: Peer, request: dict[str, Any]) -> Row:
    answer = peer.ask(**request)
    after, before = answer["memory_mb"], answer["imported_mb"]
    is_model = request["kind"] == OURS and not request["frozen"]
    return {
        "setting": answer["setting"],
        "version": answer["version"],
        "cold_ms": 1e3 * answer["cold_seconds"],
        "import_ms": 1e3 * answer["import_seconds"],
        "memory_mb": after,
        "network_mb": None if after is None else after - before,
        "file_mb": None if is_model else _bytes(Path(request["file"])) / 1e6,
        "error": answer["error"],
        "note": request["note"],
    }


def _bytes(path: Path) -> int:
    """Return the bytes of a file, and of the data that ONNX may put beside it."""
    beside = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)


@dataclass
class Turns:
    """What was timed of one contender.

    Attributes:
        each: Seconds of each request, for each turn.
        all: Seconds of each turn.
    """

    each: list[list[float]] = field(default_factory=list)
    all: list[float] = field(default_factory=list)

    def rates(self, batch: int) -> list[float]:
        """Return the samples a second in each turn."""
        return [len(e) * batch / s for e, s in zip(self.each, self.all, strict=True)]

    def middles(self) -> list[float]:
        """Return the median seconds of a request in each turn."""
        return [statistics.median(each) for each in self.each]


def _turns(
    peers: Mapping[str, Peer], settings: Settings, failed: dict[str, str]
) -> dict[str, Turns]:
    found = {name: Turns() for name in peers}
    sequence = list(peers)
    for _ in range(settings.rounds):
        for name in [name for name in sequence if name not in failed]:
            time.sleep(PAUSE)
            try:
                answer = peers[name].ask(do="time", seconds=settings.seconds)
            except Unable as error:
                failed[name] = str(error)
                continue
            found[name].each.append(answer["each"])
            found[name].all.append(answer["all"])
        sequence = sequence[1:] + sequence[:1]
    return found


_TIMED = (
    "p50_ms", "p90_ms", "p99_ms", "mean_ms", "items_per_second", "requests", "ratio", "quartiles",
)  # fmt: skip


def _summary(turns: Turns, ours: Turns | None, batch: int, settings: Settings) -> Row:
    seconds = sorted(s for each in turns.each for s in each)
    row: Row = {
        "p50_ms": median_ms(seconds),
        "p90_ms": 1e3 * _percentile(seconds, 0.90),
        "p99_ms": 1e3 * _percentile(seconds, 0.99),
        "mean_ms": 1e3 * statistics.fmean(seconds),
        "items_per_second": statistics.median(turns.rates(batch)),
        "requests": len(seconds),
    }
    if ours is None or ours is turns or len(ours.each) != len(turns.each):
        return row
    pairs = zip(turns.middles(), ours.middles(), strict=True)
    if settings.scenario == "async":
        pairs = zip(ours.rates(batch), turns.rates(batch), strict=True)
    ratios = [theirs / our for theirs, our in pairs]
    return row | {"ratio": statistics.median(ratios), "quartiles": quartiles(ratios)}


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that is no less than a share of the values."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
