"""Trains the cells of a grid, and continues where the last command stopped.

Every cell is a run, as ``acdc run`` makes it: a folder under ``runs/``, with checkpoints. Finished
runs are read, started ones are continued, missing ones are trained. A cell that cannot be trained
fails with a reason, and the other cells are not affected. This module plans: which cells are
finished, which run is next, what is written. A pool trains (``pool.py``): this process, or workers.

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

import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
from acdc.compare.pool import Order, Pool, ThisProcess
from acdc.compare.results import Outcome
from acdc.errors import AcdcError, InputError, need
from acdc.files import alone
from acdc.runs import train
from acdc.runs.record import Folder
from acdc.runs.setup import make_fabric
from acdc.runs.signals import stop_signals

log = logging.getLogger(__name__)

Json = dict[str, Any]
DRAWN_EVERY = 300.0  # seconds between two drawings of the page while the grid is trained
WATCHED_EVERY = 0.25  # seconds between two reports of the progress of a job
LOSSES = 2  # processes that may die before their cell fails


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
    jobs: int | None = None,
    on: str | None = None,
    slurm: Sequence[str] | None = None,
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
        jobs: Cells trained at the same time, each in a worker: a process with an equal share of the
            threads. A cell that ends its process, by a crash in native code, then costs itself
            alone. A script that gives ``jobs`` needs ``if __name__ == "__main__":``, as every
            program that starts processes does. 0: one after another in this process, where a
            debugger sees them, and where a crash ends the comparison. ``None``: with ``on`` as many
            as the cluster has workers, with ``slurm`` as many as there are, otherwise as 0, so that
            a script needs no such line. The command's own default is 1.
        on: Address of the scheduler of a Dask cluster, ``"tcp://HOST:8786"``, whose workers train
            the cells. They need this environment, and ``out`` under the same path.
        slurm: Train each cell in a job of Slurm. Options of ``sbatch`` as ``"KEY=VALUE"`` or
            ``"KEY"``; none at all is an empty sequence.
        resume: Keep what is finished, and try failed cells again.
        device: As ``acdc run`` takes it.
        command: The command line, for the records.
        watch: Called with the progress.
        draw: Draws the page: every few minutes, and at the end. ``None``: there is no page.

    Raises:
        InputError: There is no such grid, its folder is taken, its results cannot be written, this
            machine has no such device, or the cluster cannot train the grid.
        MissingDependency: ``distributed`` is not installed, and the cells need workers, or
            ``submitit``, and ``slurm`` is given.
        Interrupted: Stopped by SIGTERM or SIGINT. Every cell that was being trained has a
            checkpoint.
    """
    if jobs is not None and jobs < 0:
        raise InputError(
            f"--jobs is {jobs}. It is the number of workers, a whole number from 1 up, or 0: cells "
            f"are then trained in the process of the command."
        )
    if on is not None and slurm is not None:
        raise InputError("--on and --slurm are both given. Give one: they train cells elsewhere.")
    if jobs == 0 and (on is not None or slurm is not None):
        raise InputError(
            f"--jobs 0 trains cells in the process of the command, and "
            f"{'--slurm' if on is None else '--on'} trains them elsewhere. Give one of the two, or "
            f"--jobs from 1 up: how many cells are trained at the same time."
        )
    grid = locate(address)
    folder = out / grid.name
    if not resume and any((folder / name).exists() for name in ("runs", "results.jsonl")):
        raise InputError(
            f"{folder} already holds runs or results of this grid. Go on with them by --resume, "
            f"or choose another folder with --out."
        )
    refusal = (
        f"Another acdc compare is at work in {folder}. Wait for it, stop it, or choose another "
        f"folder with --out."
    )
    if on is None and slurm is None and device != "auto":
        make_fabric(base_recipe(grid), device, folder)  # otherwise every cell fails by itself
    if jobs and on is None and slurm is None:
        jobs = min(jobs, max(1, sum(1 for _ in cells(grid))))  # further workers would idle
    with alone(folder, refusal):
        board = _Board(grid, folder, watch or (lambda _: None), draw)
        order = Order(address, str(folder), device, command)
        with closing(_pool(order, jobs, on, slurm)) as pool:
            try:
                _work(board, pool)
            except BaseException:
                # A wrong address or option leaves no trace: the corrected command is a first one.
                if board.begun:
                    board.write()
                raise
            board.write()
    return board.outcomes()


def _pool(order: Order, jobs: int | None, on: str | None, slurm: Sequence[str] | None) -> Pool:
    """Return the pool that trains the cells."""
    if slurm is not None:
        try:
            from acdc.compare.slurm import SlurmJobs
        except ImportError as error:
            raise need("submitit", "slurm") from error
        return SlurmJobs(order, slurm, jobs)
    if on is None and not jobs:  # None or 0
        return ThisProcess(Path(order.folder), order.device, order.command)
    try:
        from acdc.compare import cluster
    except ImportError as error:
        raise need("distributed", "lab") from error
    if on is not None:
        return cluster.Running(order, on, jobs)
    assert jobs
    return cluster.Embedded(order, jobs)


def _work(board: _Board, pool: Pool) -> None:
    """Train until every cell is finished or failed.

    Raises:
        Interrupted: Asked to stop. Nothing is being trained any more.
        InputError: The pool cannot train, or cannot go on.
    """
    with stop_signals() as stop:
        try:
            board.update()
            while not stop and board.unfinished():
                while not stop and pool.free() and (job := board.start_next()):
                    _begin(board, pool, job)
                pool.wait(board)
        except train.Interrupted as error:  # raised by a run in this process
            stop.append(error.signal)
        except AcdcError:
            if not stop:  # Ctrl-C in a terminal may reach a worker that is being started
                raise
        if stop:
            pool.stop()
            while board.running():
                pool.wait(board)
            progress = board.progress()
            raise train.Interrupted(
                f"Stopped ({signal.Signals(stop[0]).name}) with {progress.done} of "
                f"{progress.cells} cells settled. Nothing is lost: go on with --resume.",
                stop[0],
            )


def _begin(board: _Board, pool: Pool, job: Job) -> None:
    """Give a job to the pool."""
    try:
        pool.begin(job.run)
    except BaseException:
        board.stopped(job.run.label)  # nobody trains it: the end of the command waits for no word
        raise
    board.begun = True


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
        losses: How many processes died that trained it.
    """

    run: Prepared
    position: int
    state: State = "known"
    share: float = 0.0
    record: Json | None = None
    reason: str = ""
    losses: int = 0


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
        self.begun = False  # whether the pool has taken a run
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
        return self._in_state("running")

    def unfinished(self) -> bool:
        """Return whether something is being trained, or is to be trained."""
        return bool(self._in_state("running") or self._in_state("ready"))

    def _in_state(self, state: State) -> list[Job]:
        return [job for job in self.jobs.values() if job.state == state]

    def start_next(self) -> Job | None:
        """Return the first job to train in the order of the grid, and mark it as running."""
        ready = self._in_state("ready")
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
        """Note that a job was stopped, and wrote a checkpoint: it can go on from there."""
        self.jobs[label].state = "ready"

    def lost(self, label: str, reason: str) -> None:
        """Note that the process of a job died. It goes on from its last checkpoint, but once."""
        job = self.jobs[label]
        job.losses += 1
        if job.losses < LOSSES:
            job.state = "ready"
        else:
            self.ended(label, reason)

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
