"""Trains the cells of a grid, wherever it was stopped before.

Every cell is a run of ``acdc run``: a folder under ``runs/``, with checkpoints. What was finished
is read, what was begun goes on, what is missing is trained, and what cannot be is a hole with its
reason; the others go on. With one job the cells are trained in this process. With several each is
trained in one of its own, with its share of the threads; they stop when this process does.

=====================  ==================================================================
``results.jsonl``      a row for each finished cell, written anew with every one of them
``origins.json``       what was trained for them, and on what: rows stand for lost ``runs/``
``holes.jsonl``        the cells without results, and why
``report.html``        the page
``runs/``              a folder for each run
=====================  ==================================================================
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from acdc.compare import results
from acdc.compare.cells import (
    Cell,
    Prepared,
    base_recipe,
    cells,
    epochs_at_equal_flops,
    pilot,
    prepare,
    said,
)
from acdc.compare.grid import Grid, locate
from acdc.compare.results import Outcome
from acdc.errors import AcdcError, InputError
from acdc.runs import train
from acdc.runs.record import Folder
from acdc.runs.signals import stop_signals

log = logging.getLogger(__name__)

Json = dict[str, Any]
DRAWN_EVERY = 300.0  # seconds: the page of a long grid can be looked at meanwhile
PATIENCE = 20.0  # seconds that processes of a killed command may take to end


@dataclass(frozen=True)
class Progress:
    """How far a grid is.

    Args:
        done: Cells that are finished, holes included.
        cells: All cells.
        holes: Those that have no results.
        running: The cells that train now, and the share of their steps that is done.
        seconds_left: An estimate from what was trained so far, or ``None``.
        news: A cell that has just been settled.
    """

    done: int
    cells: int
    holes: int
    running: tuple[tuple[Cell, float], ...]
    seconds_left: float | None
    news: Outcome | None = None


Watch = Callable[[Progress], None]


def compare(
    where: str,
    out: Path,
    *,
    jobs: int = 1,
    resume: bool = False,
    device: str = "auto",
    command: str = "",
    watch: Watch | None = None,
) -> list[Outcome]:
    """Train what is missing of a grid, write the results, and return what became of every cell.

    Args:
        where: The grid's function: ``"package.module:function"`` or ``"file.py:function"``.
        out: The folder in which the grid gets its own.
        jobs: Cells trained at a time, each with an equal share of the threads.
        resume: Go on with what is there; cells without results are tried again.
        device: As ``acdc run`` takes it.
        command: What was typed, for the records.
        watch: Called with the progress, as it is made.

    Raises:
        InputError: There is no such grid, its folder is taken, or its results cannot be written.
        Interrupted: Stopped by SIGTERM or SIGINT. Every cell that was being trained has a
            checkpoint.
    """
    if jobs < 1:
        raise InputError(f"--jobs is {jobs}. It is a whole number from 1 up.")
    grid = locate(where)
    folder = out / grid.name
    if not resume and any((folder / name).exists() for name in ("runs", "results.jsonl")):
        raise InputError(
            f"{folder} already holds runs or results of this grid. Go on with them by --resume, "
            f"or choose another folder with --out."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder) as lock:
        board = _Board(grid, folder, watch or (lambda _: None))
        trainer = _Trainer(where, folder, device, command, jobs, lock)
        try:
            _work(board, trainer, jobs)
        finally:
            board.write()
    return board.outcomes()


def _work(board: _Board, trainer: _Trainer, jobs: int) -> None:
    """Settle all cells.

    Raises:
        Interrupted: Asked to stop. The processes have ended.
    """
    with stop_signals() as stop:
        try:
            board.settle()
            while True:
                while not stop and len(board.running) < jobs and (run := board.next()):
                    trainer.begin(run)
                if stop or not board.running:
                    break
                trainer.take(board)
        except train.Interrupted as error:  # raised by a run in this process
            stop.append(error.signal)
        if stop:
            trainer.stop()
            trainer.drain(board)
            progress = board.progress()
            raise train.Interrupted(
                f"Stopped ({signal.Signals(stop[0]).name}) with {progress.done} of "
                f"{progress.cells} cells settled. Nothing is lost: go on with --resume.",
                stop[0],
            )


class _Board:
    """Which cell is where."""

    def __init__(self, grid: Grid, folder: Path, watch: Watch) -> None:
        self.grid, self.folder, self.watch = grid, folder, watch
        self.order = list(cells(grid))
        self.settled: dict[Cell, Outcome] = {}
        self.planned: dict[Cell, Prepared] = {}
        self.runs: dict[str, Prepared] = {}  # all that are known, by label
        self.ready: dict[str, int] = {}  # and the place of their first cell in the order
        self.running: dict[str, float] = {}
        self.base = base_recipe(grid)
        self.rows = results.read(folder, self.base)  # they stand for runs that are gone
        self.records: dict[str, Json] = {}
        self.failed: dict[str, str] = {}
        self.began, self.told, self.trained = time.monotonic(), 0.0, 0.0
        self.drawn = self.began

    # --- what is due ----------------------------------------------------------------------------

    def settle(self) -> None:
        """Settle every cell that can be, and make ready what can be trained."""
        for place, cell in enumerate(self.order):
            if cell not in self.settled:
                self._look_at(cell, place)

    def _look_at(self, cell: Cell, place: int) -> None:
        try:
            epochs = self._epochs(cell)
            if epochs is None:
                return
            run = self.planned[cell] = prepare(self.grid, cell, epochs)
        except _Hole as hole:
            return self._settle(Outcome(cell, reason=str(hole)))
        except Exception as error:  # the method's own code refused, or broke
            return self._settle(Outcome(cell, reason=said(error)))
        if run.label in self.rows and self._record(run) is None and run.label not in self.failed:
            row, origin = self.rows[run.label]
            return self._settle(Outcome(cell, row | _as_asked(cell), run=run, origin=origin))
        for part in filter(None, (run.before, run)):
            if part.label in self.failed:
                why = self.failed[part.label]
                reason = why if part is run else f"It starts from {part.cell}, which failed: {why}"
                return self._settle(Outcome(cell, reason=reason, run=run))
            if self._record(part) is None:
                if part.label in self.failed:
                    return self._look_at(cell, place)
                if part.label not in self.running:
                    self.ready.setdefault(part.label, place)
                return
        self._settle(self._outcome(cell, run))

    def _outcome(self, cell: Cell, run: Prepared) -> Outcome:
        """Return what came out of a run that is finished."""
        before = self.records[run.before.label] if run.before else None
        record = self.records[run.label]
        origin = results.origin(self.base, record)
        row = results.row(self.grid.task, origin, run, record, before)
        return Outcome(cell, row, run=run, origin=origin)

    def _epochs(self, cell: Cell) -> int | None:
        """Return the length of a cell, or ``None`` while it is not known."""
        if cell.budget != "flops":
            return self.grid.task.epochs
        first = self.settled.get(pilot(self.grid, cell))
        if first is None:
            return None
        if first.row is None:
            raise _Hole(f"Its length follows from {first.cell}, which has no results.")
        return epochs_at_equal_flops(self.grid, first.row["train_flops_ratio"])

    def _record(self, run: Prepared) -> Json | None:
        """Return the record of a run, if it is finished."""
        self.runs.setdefault(run.label, run)
        if run.label not in self.records:
            place = Folder(self.folder / "runs" / run.label)
            try:
                train.check_same(place, run.recipe)
                if not place.record.exists():
                    return None
                self.records[run.label] = place.read(place.record)
            except InputError as error:
                self.failed[run.label] = self._without_paths(str(error))
                return None
        return self.records[run.label]

    def _settle(self, outcome: Outcome) -> None:
        self.settled[outcome.cell] = outcome
        self.watch(self.progress(outcome))

    def next(self) -> Prepared | None:
        """Return the first run to train in the order of the grid, and count it as running."""
        if not self.ready:
            return None
        label = min(self.ready, key=self.ready.__getitem__)
        del self.ready[label]
        self.running[label] = 0.0
        return self.runs[label]

    # --- what has happened ----------------------------------------------------------------------

    def advanced(self, label: str, share: float) -> None:
        """Take in that a running cell is so far."""
        self.trained += max(0.0, share - self.running[label]) * self.runs[label].recipe.epochs
        self.running[label] = share
        if time.monotonic() - self.told > 0.25:
            self.watch(self.progress())

    def ended(self, label: str, reason: str | None) -> None:
        """Take in that a run has ended: with its record, or for this reason without."""
        del self.running[label]
        if reason is not None:
            self.failed[label] = self._without_paths(reason)
        self.settle()
        try:
            if time.monotonic() - self.drawn > DRAWN_EVERY:
                self.write()
            else:
                self._write_rows()
        except AcdcError as error:  # a full disk is no reason to stop training
            log.warning("%s", error)

    def _without_paths(self, reason: str) -> str:
        """Where the grid lies on this machine is nobody's business but its owner's."""
        return reason.replace(f"{self.folder}{os.sep}", "")

    # --- what is said ---------------------------------------------------------------------------

    def outcomes(self) -> list[Outcome]:
        """Return what became of every cell: what they start from, then the order of the grid."""
        settled = [
            self.settled.get(cell)
            or Outcome(cell, reason=results.NOT_YET, run=self.planned.get(cell))
            for cell in self.order
        ]
        first: dict[str, Outcome] = {}
        for outcome in settled:
            before = outcome.run.before if outcome.run else None
            if before is not None and before.label in self.records:
                first[before.label] = self._outcome(before.cell, before)
            elif before is not None and before.label in self.failed:
                reason = self.failed[before.label]
                first[before.label] = Outcome(before.cell, reason=reason, run=before)
        return [*first.values(), *settled]

    def progress(self, news: Outcome | None = None) -> Progress:
        """Return how far the grid is."""
        self.told = time.monotonic()
        epochs = self.grid.task.epochs
        open_cells = [cell for cell in self.order if cell not in self.settled]
        left = len(open_cells) * epochs - sum(
            share * self.runs[label].recipe.epochs for label, share in self.running.items()
        )
        pace = self.trained / (self.told - self.began)
        return Progress(
            len(self.settled),
            len(self.order),
            sum(outcome.row is None for outcome in self.settled.values()),
            tuple((self.runs[label].cell, share) for label, share in self.running.items()),
            max(0.0, left) / pace if pace else None,
            news,
        )

    def _write_rows(self) -> None:
        """Write the results.

        Raises:
            InputError: They cannot be written.
        """
        results.write(self.folder, self.outcomes())

    def write(self) -> None:
        """Write the results and the page.

        Raises:
            AcdcError: They cannot be written.
        """
        from acdc.pages.comparison import render

        self._write_rows()
        self.drawn = time.monotonic()
        try:
            render(self.folder, self.grid, self.outcomes())
        except OSError as error:
            raise InputError(
                f"The results are in {self.folder}, but the page that shows them could not be "
                f"written: {error.strerror or error}. Once that is mended, the same command with "
                f"--resume writes it."
            ) from error


def _as_asked(cell: Cell) -> Json:
    """Return what a row has from its cell: cells that come to the same run share the rest."""
    names = ("method", "sparsity", "seed", "budget")
    return {name: getattr(cell, name) for name in names}


class _Hole(Exception):
    """Why a cell has no results."""


# --- training -----------------------------------------------------------------------------------


class _Trainer:
    """Trains runs: here, or each in a process of its own."""

    def __init__(
        self, where: str, folder: Path, device: str, command: str, jobs: int, lock: int | None
    ) -> None:
        self.folder, self.jobs, self.lock = folder, jobs, lock
        self.order = {"grid": where, "folder": str(folder), "device": device, "command": command}
        self.here: Prepared | None = None
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.messages: queue.Queue[tuple[str, Json]] = queue.Queue()
        self.stopping = False

    def begin(self, run: Prepared) -> None:
        """Begin to train a run."""
        if self.jobs == 1:
            self.here = run
            return
        # What a length that was measured comes to is decided here, and told.
        order = self.order | {"cell": asdict(run.cell), "epochs": run.epochs}
        threads = str(max(1, torch.get_num_threads() // self.jobs))
        words = [sys.executable, "-m", "acdc.compare.worker", json.dumps(order)]
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,  # it ends when we do, and so does the process
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | {"OMP_NUM_THREADS": threads},
                pass_fds=() if self.lock is None else (self.lock,),
                start_new_session=True,  # Ctrl-C is ours to pass on
            )
            self.processes[run.label] = process
            copy = os.dup(errors.fileno())
        threading.Thread(target=self._listen, args=(run.label, process, copy), daemon=True).start()

    def _listen(self, label: str, process: subprocess.Popen[bytes], errors: int) -> None:
        """Pass on what a process says, and how it ended."""
        assert process.stdout is not None
        end: Json | None = None
        for line in process.stdout:
            message = json.loads(line)
            if "end" in message:
                end = message
            else:
                self.messages.put((label, message))
        code = process.wait()
        with os.fdopen(errors, "rb") as file:
            file.seek(0)
            last_words = file.read().decode(errors="replace").strip()
        self.messages.put(
            (label, end or {"end": "failed", "reason": _died(code, last_words), "code": code})
        )

    def take(self, board: _Board, patience: float = 0.5) -> None:
        """Wait for something to happen, for a while, and tell the board.

        Raises:
            Interrupted: A run in this process was asked to stop.
        """
        if self.here is not None:
            run, self.here = self.here, None
            board.ended(run.label, self._train_here(run, board))
            return
        try:
            label, message = self.messages.get(timeout=patience)
        except queue.Empty:
            return
        if "end" not in message:
            board.advanced(label, message["share"])
            return
        process = self.processes.pop(label)
        assert process.stdin is not None
        process.stdin.close()
        if message["end"] == "stopped" or (self.stopping and "code" in message):
            board.running.pop(label)
        else:
            board.ended(label, message.get("reason"))

    def _train_here(self, run: Prepared, board: _Board) -> str | None:
        def watch(share: float) -> None:
            board.advanced(run.label, share)

        order = self.order
        return train_cell(run, self.folder, order["device"], order["command"], watch)

    def stop(self) -> None:
        """Ask all processes to write a checkpoint and stop."""
        self.stopping = True
        for process in self.processes.values():
            process.terminate()

    def drain(self, board: _Board) -> None:
        """Wait until all processes have ended."""
        while self.processes:
            self.take(board, patience=60)


def train_cell(
    run: Prepared, folder: Path, device: str, command: str, watch: Callable[[float], None]
) -> str | None:
    """Train a run, from its last checkpoint if it has one, and return why it failed, if it did.

    Args:
        run: What to train.
        folder: The folder of the grid.
        device: As ``acdc run`` takes it.
        command: What was typed, for the record.
        watch: Called with the share of the steps that is done.

    Raises:
        Interrupted: It was asked to stop, and wrote a checkpoint.
    """
    place = Folder(folder / "runs" / run.label)
    total = 1

    def heard(event: Json) -> None:
        nonlocal total
        if event["event"] == "start":
            total = event["total_steps"]
        elif event["event"] == "step":
            watch(event["step"] / total)

    try:
        train.run(
            run.recipe,
            place.path,
            changed=run.changed,
            resume=place.recipe.exists(),
            device=device,
            command=command,
            watch=heard,
        )
    except train.Interrupted:
        raise
    except Exception as error:  # whatever it is, the other cells go on
        return said(error)
    return None


def _died(code: int, last_words: str) -> str:
    """Return why a process ended that did not say so itself."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = " The system may have run out of memory." if -code == signal.SIGKILL else ""
        return f"Its process was killed by {name}.{hint}"
    last = last_words.splitlines()[-1] if last_words else "it said nothing"
    return f"Its process ended with code {code}: {last}"


@contextmanager
def _alone(folder: Path) -> Iterator[int | None]:
    """Hold the grid's folder: two commands must not train the same cell.

    The processes hold it, too, so that those of a killed command are waited for.

    Raises:
        InputError: Another command holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield None
        return
    path = folder / ".lock"
    with path.open("w") as file:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"Another acdc compare is at work in {folder}. Wait for it, stop it, or "
                        f"choose another folder with --out."
                    ) from None
                time.sleep(0.2)
        yield file.fileno()
