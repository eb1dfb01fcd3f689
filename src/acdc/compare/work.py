"""Trains the cells of a grid, and continues where the last command stopped.

Every cell is a run, as ``acdc run`` makes it: a folder under ``runs/``, with checkpoints. Finished
runs are read, started ones are continued, missing ones are trained. A cell that cannot be trained
fails with a reason, and the other cells are not affected. With one job the cells are trained in
this process. With several jobs each cell is trained by a worker, a process with its share of the
threads. Workers stop when this process does.

=====================  ==================================================================
``results.jsonl``      a row for each finished cell, written again with every one of them
``origins.json``       for each row: what was trained, and on what machine and data. A row
                       with an origin replaces its folder in ``runs/``, if that is gone
``failed.jsonl``       the cells without results, and why
``remarks.md``         what the author of the grid writes about the results; only read
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from acdc.compare import results
from acdc.compare.cells import (
    Cell,
    Prepared,
    base_recipe,
    cells,
    dense_cell,
    epochs_at_equal_cost,
    explain,
    measured_cell,
    prepare,
)
from acdc.compare.grid import Grid, locate
from acdc.compare.results import Outcome
from acdc.errors import AcdcError, InputError
from acdc.files import alone
from acdc.runs import train
from acdc.runs.record import Folder
from acdc.runs.signals import stop_signals

log = logging.getLogger(__name__)

Json = dict[str, Any]
DRAWN_EVERY = 300.0  # seconds between two drawings of the page while the grid is trained
WATCHED_EVERY = 0.25  # seconds between two reports of the progress of a job
PATIENCE = 20.0  # seconds that workers of a killed command may take to end


@dataclass(frozen=True)
class Progress:
    """How far a grid is.

    Args:
        done: Cells that are finished or failed.
        cells: All cells.
        failed: Cells that have no results.
        running: The cells that train now, and the share of their steps that is done.
        seconds_left: An estimate from the speed so far, or ``None``.
        latest: A cell that has just finished or failed.
    """

    done: int
    cells: int
    failed: int
    running: tuple[tuple[Cell, float], ...]
    seconds_left: float | None
    latest: Outcome | None = None


Watch = Callable[[Progress], None]
Draw = Callable[[Path, Grid, Sequence[Outcome]], object]
"""Writes the page into the folder of the grid."""


def compare(
    address: str,
    out: Path,
    *,
    jobs: int = 1,
    resume: bool = False,
    device: str = "auto",
    command: str = "",
    watch: Watch | None = None,
    draw: Draw | None = None,
) -> list[Outcome]:
    """Train the missing cells of a grid, write the results, and return the outcome of every cell.

    Args:
        address: The grid's function: ``"package.module:function"`` or ``"file.py:function"``.
        out: The folder in which the grid gets its own.
        jobs: Cells trained at the same time, each with an equal share of the threads.
        resume: Keep what is finished, and try failed cells again.
        device: As ``acdc run`` takes it.
        command: The command line, for the records.
        watch: Called with the progress.
        draw: Draws the page: every few minutes, and at the end. ``None``: there is no page.

    Raises:
        InputError: There is no such grid, its folder is taken, or its results cannot be written.
        Interrupted: Stopped by SIGTERM or SIGINT. Every cell that was being trained has a
            checkpoint.
    """
    if jobs < 1:
        raise InputError(f"--jobs is {jobs}. It is a whole number from 1 up.")
    grid = locate(address)
    folder = out / grid.name
    if not resume and any((folder / name).exists() for name in ("runs", "results.jsonl")):
        raise InputError(
            f"{folder} already holds runs or results of this grid. Go on with them by --resume, "
            f"or choose another folder with --out."
        )
    # The workers hold the lock, too: a new command waits until those of a killed one have ended.
    refusal = (
        f"Another acdc compare is at work in {folder}. Wait for it, stop it, or choose another "
        f"folder with --out."
    )
    with alone(folder, refusal, PATIENCE) as lock:
        board = _Board(grid, folder, watch or (lambda _: None), draw)
        trainer = _Trainer(address, folder, device, command, jobs, lock)
        try:
            _work(board, trainer, jobs)
        finally:
            board.write()
    return board.outcomes()


def _work(board: _Board, trainer: _Trainer, jobs: int) -> None:
    """Train until every cell is finished or failed.

    Raises:
        Interrupted: Asked to stop. The workers have ended.
    """
    with stop_signals() as stop:
        try:
            board.update()
            while True:
                while not stop and len(board.running()) < jobs and (job := board.start_next()):
                    trainer.begin(job)
                if stop or not board.running():
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


State = Literal["known", "ready", "running", "done", "failed"]


@dataclass
class Job:
    """A run of the grid. Several cells may come to the same run.

    Args:
        run: What to train.
        position: Position of its first cell in the grid: jobs are trained in this order.
        state: ``"known"``: not trained, because no cell needs it yet or a row replaces it.
            ``"ready"``: to be trained. ``"done"``: it has a record. ``"failed"``: it has a reason.
        share: Share of its steps that is done.
        record: Its record, when it is done.
        reason: Why it failed.
    """

    run: Prepared
    position: int
    state: State = "known"
    share: float = 0.0
    record: Json | None = None
    reason: str = ""


class _Board:
    """The outcomes of the cells, and the jobs that produce them."""

    def __init__(self, grid: Grid, folder: Path, watch: Watch, draw: Draw | None) -> None:
        self.grid, self.folder, self.watch, self.draw = grid, folder, watch, draw
        self.cells = list(cells(grid))
        self.settled: dict[Cell, Outcome] = {}  # finished or failed
        self.prepared: dict[Cell, Prepared] = {}
        self.jobs: dict[str, Job] = {}  # by the label of the run
        self.base = base_recipe(grid)
        self.rows = results.read(folder, self.base)  # by label; each replaces a run that is gone
        self.trained_epochs = 0.0
        self.began = self.drawn = time.monotonic()
        self.watched = 0.0

    # --- what to train --------------------------------------------------------------------------

    def update(self) -> None:
        """Settle every cell whose outcome is known, and mark the runs that can be trained."""
        for position, cell in enumerate(self.cells):
            if cell not in self.settled and (outcome := self._look_at(cell, position)):
                self._settle(outcome)

    def _look_at(self, cell: Cell, position: int) -> Outcome | None:
        """Return the outcome of a cell, or mark the run that it waits for as ready."""
        try:
            epochs = self._epochs(cell)
            if epochs is None:
                return None
            run = self.prepared[cell] = prepare(self.grid, cell, epochs)
        except _FailedError as error:
            return Outcome(cell, reason=str(error))
        except Exception as error:  # raised by the method's own code
            return Outcome(cell, reason=explain(error))
        if run.label in self.rows and self._job(run, position).state == "known":
            row, origin = self.rows[run.label]
            return Outcome(cell, row | _asked(cell), run=run, origin=origin)
        for part in filter(None, (run.before, run)):
            job = self._job(part, position)
            if job.state == "failed":
                reason = job.reason
                if part is not run:
                    reason = f"It starts from {part.cell}, which failed: {reason}"
                return Outcome(cell, reason=reason, run=run)
            if job.state != "done":
                if job.state == "known":
                    job.state = "ready"
                return None
        return self._outcome(cell, run)

    def _job(self, run: Prepared, position: int) -> Job:
        """Return the job of a run. If the run has a record on the disk, the job is done."""
        job = self.jobs.setdefault(run.label, Job(run, position))
        if job.state == "known":
            folder = Folder(self.folder / "runs" / run.label)
            try:
                train.check_same(folder, run.recipe)
                if folder.record.exists():
                    job.record, job.state = results.record_in(folder), "done"
            except InputError as error:
                job.reason, job.state = self._without_paths(str(error)), "failed"
        return job

    def _outcome(self, cell: Cell, run: Prepared) -> Outcome:
        """Return the outcome of a run that is done."""
        record = self.jobs[run.label].record
        assert record is not None
        before = self.jobs[run.before.label].record if run.before else None
        origin = results.origin(self.base, record)
        try:
            row = results.row(self.grid.task, origin, run, record, before)
        except InputError as error:
            return Outcome(cell, reason=str(error), run=run)
        return Outcome(cell, row, run=run, origin=origin)

    def _epochs(self, cell: Cell) -> int | None:
        """Return the length of a cell, or ``None`` while it is not known."""
        if cell.budget not in ("flops", "seconds"):
            return self.grid.task.epochs
        measured = self._measured(measured_cell(self.grid, cell))
        if cell.budget == "flops" or measured is None:
            ratio = None if measured is None else measured[0]["train_flops_ratio"]
        else:
            dense = self._measured(dense_cell(self.grid))
            ratio = None if dense is None else results.seconds(*measured) / results.seconds(*dense)
        return None if ratio is None else epochs_at_equal_cost(self.grid, ratio)

    def _measured(self, cell: Cell) -> tuple[Json, Json | None] | None:
        """Return row and origin of a cell, or ``None`` while it has none.

        Raises:
            _FailedError: It has no results.
        """
        outcome = self.settled.get(cell)
        if outcome is None:
            return None
        if outcome.row is None:
            raise _FailedError(f"Its length follows from {outcome.cell}, which has no results.")
        return outcome.row, outcome.origin

    def _settle(self, outcome: Outcome) -> None:
        self.settled[outcome.cell] = outcome
        self.watch(self.progress(outcome))

    def running(self) -> list[Job]:
        """Return the jobs that are being trained."""
        return [job for job in self.jobs.values() if job.state == "running"]

    def start_next(self) -> Job | None:
        """Return the first job to train in the order of the grid, and mark it as running."""
        ready = [job for job in self.jobs.values() if job.state == "ready"]
        if not ready:
            return None
        job = min(ready, key=lambda job: job.position)
        job.state, job.share = "running", 0.0
        return job

    # --- events of running jobs -----------------------------------------------------------------

    def advanced(self, label: str, share: float) -> None:
        """Note that this share of the steps of a job is done."""
        job = self.jobs[label]
        self.trained_epochs += max(0.0, share - job.share) * job.run.recipe.epochs
        job.share = share
        if time.monotonic() - self.watched > WATCHED_EVERY:
            self.watch(self.progress())

    def stopped(self, label: str) -> None:
        """Note that a job was stopped by a signal; ``--resume`` continues it."""
        self.jobs[label].state = "known"

    def ended(self, label: str, reason: str | None) -> None:
        """Note that a job has ended: with a record, or with a reason why it failed."""
        job = self.jobs[label]
        job.state = "known"  # the record is read from the disk
        if reason is not None:
            job.reason, job.state = self._without_paths(reason), "failed"
        self.update()
        try:
            if time.monotonic() - self.drawn > DRAWN_EVERY:
                self.write()
            else:
                self._write_rows()
        except AcdcError as error:  # training goes on when the disk is full
            log.warning("%s", error)

    def _without_paths(self, reason: str) -> str:
        """Remove the folder of the grid: published results do not show paths of this machine."""
        return reason.replace(f"{self.folder}{os.sep}", "")

    # --- outcomes -------------------------------------------------------------------------------

    def outcomes(self) -> list[Outcome]:
        """Return the outcomes: of dense training beforehand, then of the cells in their order."""
        settled = [
            self.settled.get(cell)
            or Outcome(cell, reason=results.NOT_YET, run=self.prepared.get(cell))
            for cell in self.cells
        ]
        first: dict[str, Outcome] = {}
        for outcome in settled:
            before = outcome.run.before if outcome.run else None
            job = self.jobs.get(before.label) if before else None
            if before is None or job is None:
                continue
            if job.state == "done":
                first[before.label] = self._outcome(before.cell, before)
            elif job.state == "failed":
                first[before.label] = Outcome(before.cell, reason=job.reason, run=before)
        return [*first.values(), *settled]

    def progress(self, latest: Outcome | None = None) -> Progress:
        """Return how far the grid is."""
        self.watched = time.monotonic()
        running = self.running()
        left = (len(self.cells) - len(self.settled)) * self.grid.task.epochs - sum(
            job.share * job.run.recipe.epochs for job in running
        )
        epochs_per_second = self.trained_epochs / (self.watched - self.began)
        return Progress(
            len(self.settled),
            len(self.cells),
            sum(outcome.row is None for outcome in self.settled.values()),
            tuple((job.run.cell, job.share) for job in running),
            max(0.0, left) / epochs_per_second if epochs_per_second else None,
            latest,
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
        self._write_rows()
        self.drawn = time.monotonic()
        if self.draw is None:
            return
        try:
            self.draw(self.folder, self.grid, self.outcomes())
        except (OSError, InputError) as error:
            cause = getattr(error, "strerror", None) or str(error).rstrip(".")
            raise InputError(
                f"The results are in {self.folder}, but the page that shows them could not be "
                f"written: {cause}. Once the cause is removed, the same command with --resume "
                f"writes it."
            ) from error


def _asked(cell: Cell) -> Json:
    """Return the fields of a row that its cell decides; cells with the same run share the rest."""
    names = ("method", "sparsity", "seed", "budget")
    return {name: getattr(cell, name) for name in names}


class _FailedError(Exception):
    """Why a cell has no results."""


# --- training -----------------------------------------------------------------------------------


class _Trainer:
    """Trains jobs: in this process, or each in a worker."""

    def __init__(
        self, address: str, folder: Path, device: str, command: str, jobs: int, lock: int
    ) -> None:
        self.folder, self.device, self.command = folder, device, command
        self.jobs, self.lock = jobs, lock
        self.request = {"grid": address, "folder": str(folder)}
        self.request |= {"device": device, "command": command}
        self.local: Job | None = None  # to be trained in this process
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.messages: queue.Queue[tuple[str, Json]] = queue.Queue()
        self.stopping = False

    def begin(self, job: Job) -> None:
        """Start a worker; with one job, let the next :meth:`take` train it."""
        if self.jobs == 1:
            self.local = job
            return
        # The number of epochs may follow from measured FLOPs. It is decided here, and passed to
        # the worker.
        run = job.run
        request = self.request | {"cell": asdict(run.cell), "epochs": run.epochs}
        threads = str(max(1, torch.get_num_threads() // self.jobs))
        words = [sys.executable, "-m", "acdc.compare.worker", json.dumps(request)]
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,  # closed when this process ends, which stops the worker
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | {"OMP_NUM_THREADS": threads},
                pass_fds=(self.lock,),
                start_new_session=True,  # Ctrl-C reaches this process, which stops the workers
            )
            self.processes[run.label] = process
            copy = os.dup(errors.fileno())
        threading.Thread(target=self._listen, args=(run.label, process, copy), daemon=True).start()

    def _listen(self, label: str, process: subprocess.Popen[bytes], errors: int) -> None:
        """Put the messages of a worker into the queue, the last one with how it ended."""
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
            errors_text = file.read().decode(errors="replace").strip()
        if end is None:
            end = {"end": "failed", "reason": _why_it_died(code, errors_text), "code": code}
        self.messages.put((label, end))

    def take(self, board: _Board, patience: float = 0.5) -> None:
        """Wait up to ``patience`` seconds for a message, and pass it to the board.

        With one job: train it.

        Raises:
            Interrupted: A run in this process was asked to stop.
        """
        if self.local is not None:
            job, self.local = self.local, None
            board.ended(job.run.label, self._train(job.run, board))
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
            board.stopped(label)
        else:
            board.ended(label, message.get("reason"))

    def _train(self, run: Prepared, board: _Board) -> str | None:
        def watch(share: float) -> None:
            board.advanced(run.label, share)

        return train_cell(run, self.folder, self.device, self.command, watch)

    def stop(self) -> None:
        """Ask all workers to write a checkpoint and stop."""
        self.stopping = True
        for process in self.processes.values():
            process.terminate()

    def drain(self, board: _Board) -> None:
        """Wait until all workers have ended."""
        while self.processes:
            self.take(board, patience=60)


def train_cell(
    run: Prepared, folder: Path, device: str, command: str, watch: Callable[[float], None]
) -> str | None:
    """Train a run, from its last checkpoint if it has one. Return why it failed, or ``None``.

    Args:
        run: What to train.
        folder: The folder of the grid.
        device: As ``acdc run`` takes it.
        command: The command line, for the record.
        watch: Called with the share of the steps that is done.

    Raises:
        Interrupted: The run was asked to stop, and wrote a checkpoint.
    """
    run_folder = Folder(folder / "runs" / run.label)
    total = 1

    def follow(event: Json) -> None:
        nonlocal total
        if event["event"] == "start":
            total = event["total_steps"]
        elif event["event"] == "step":
            watch(event["step"] / total)

    try:
        train.run(
            run.recipe,
            run_folder.path,
            changed=run.changed,
            resume=run_folder.recipe.exists(),
            device=device,
            command=command,
            watch=follow,
        )
    except train.Interrupted:
        raise
    except Exception as error:  # any error fails this cell alone
        return explain(error)
    return None


def _why_it_died(code: int, errors: str) -> str:
    """Return why a worker ended that sent no last message."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = " The system may have run out of memory." if -code == signal.SIGKILL else ""
        return f"Its process was killed by {name}.{hint}"
    last = errors.splitlines()[-1] if errors else "it printed no error"
    return f"Its process ended with code {code}: {last}"
