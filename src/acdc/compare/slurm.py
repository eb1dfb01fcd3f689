"""A pool of jobs of Slurm: a job for each cell.

submitit submits a job, runs what it was given on the node, and puts the job into the queue again
when its time runs out. What has become of the jobs says ``squeue``: it needs no accounting. A job
reports in the folder ``slurm`` beside the runs, which the nodes share with the command:

=============================  =============================================================
``LABEL.jobs``                 numbers of the jobs of a run; the last one trains it. When a
                               command was killed, the next one finds the job in the queue
``LABEL.share``                share of its steps that is done
``NUMBER_*``                   what submitit keeps of a job: options, result, output, errors
=============================  =============================================================

A job outlives its command: it trains its cell to the end, and the next command with --resume takes
the result. Ctrl-C cancels all jobs of the command; a cell that is being trained writes a checkpoint
at SIGTERM, for which Slurm leaves it ``KillWait``, 30 seconds unless the cluster says otherwise.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import submitit
import torch

from acdc.compare.cells import Prepared
from acdc.compare.pool import Listener, Order, train_ordered
from acdc.errors import InputError

log = logging.getLogger(__name__)

LOOKED_EVERY = 10.0  # seconds between two calls of squeue, which the whole cluster shares
HEARD_EVERY = 1.0  # seconds between two looks at the folder
TOLD_EVERY = 1.0  # seconds between two reports of the progress of a cell
PATIENCE = 20.0  # seconds until the result of a job has come through a shared file system
MINUTES = 60  # of a job, unless --slurm says otherwise
RENEWED = 10_000  # times that a job may run out of its time: every time it has gone on meanwhile
COMMANDS = ("sbatch", "squeue", "scancel", "srun")
OURS = (  # options of sbatch that acdc and submitit need for themselves
    "array",
    "dependency",
    "error",
    "hold",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "output",
    "signal",
    "wait",
    "wrap",
)
ENDED = {  # states after which a job neither runs nor waits
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
NOT_ITS_FAULT = {"BOOT_FAIL", "NODE_FAIL", "PREEMPTED"}


@dataclass
class _Given:
    """A run that was given to a job."""

    job: submitit.Job[tuple[str, str | None]]
    since: float
    ended: float | None = None  # when Slurm first said so


class SlurmJobs:
    """A pool of jobs of Slurm.

    Args:
        order: What the jobs have to know.
        options: Options of ``sbatch``: ``"KEY=VALUE"`` or ``"KEY"``.
        jobs: At most so many jobs in the queue at the same time; ``None``: a job for every run.

    Raises:
        InputError: An option is not allowed, or Slurm's commands are not here.
    """

    def __init__(self, order: Order, options: Sequence[str], jobs: int | None) -> None:
        self.order, self.jobs = order.absolute(), jobs
        self.folder = Path(self.order.folder) / "slurm"
        minutes, further = _read(options)
        if missing := [name for name in COMMANDS if shutil.which(name) is None]:
            raise InputError(
                f"--slurm needs {', '.join(missing)}, which this machine does not have. Give the "
                f"command on a machine from which jobs of Slurm are submitted."
            )
        self.executor = submitit.SlurmExecutor(self.folder, max_num_timeout=RENEWED)
        self.executor.update_parameters(
            job_name=f"acdc-{Path(order.folder).name}", time=minutes, additional_parameters=further
        )
        self.given: dict[str, _Given] = {}  # by the label of the run
        self.waiting: Prepared | None = None  # Slurm takes no more jobs for now
        self.refused: str | None = None  # why the last job was; "" if it was taken, None before
        self.states: dict[str, str] = {}  # by the number of the job
        self.asked = self.looked = float("-inf")  # when squeue was called, and when it answered
        self.stopping = False

    # --- a pool ---------------------------------------------------------------------------------

    def free(self) -> bool:
        """Return whether another job can be submitted."""
        return self.waiting is None and (self.jobs is None or len(self.given) < self.jobs)

    def begin(self, run: Prepared) -> None:
        """Submit a job for a run, unless one of a command that was killed is in the queue.

        Raises:
            InputError: Slurm refuses the job.
        """
        number = self._in_queue(run.label)
        if number is not None:
            job: submitit.Job[Any] = submitit.SlurmJob(self.folder, number)
            self.given[run.label] = _Given(job, time.monotonic())
            return
        cell = _TrainCell(self.order, asdict(run.cell), run.epochs, run.label)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._share(run.label).unlink(missing_ok=True)
            job = self.executor.submit(cell)
            with self._numbers(run.label).open("a") as file:
                file.write(f"{job.job_id}\n")
        except OSError as error:
            raise InputError(
                f"The job of {run.label} could not be written to {self.folder}: "
                f"{error.strerror or error}."
            ) from error
        except (submitit.core.utils.FailedJobError, subprocess.SubprocessError) as error:
            self._remove_refused()
            said = _said(error)
            if self.refused is None:  # the first job of all: its options may be wrong
                raise InputError(f"Slurm refused the job of {run.label}: {said}") from error
            # A limit of the cluster, or its controller is away: try again later.
            if said != self.refused:
                log.warning("Slurm takes no more jobs for now (%s). The next try is soon.", said)
            self.waiting, self.refused = run, said
            return
        self.refused = ""
        self.given[run.label] = _Given(job, time.monotonic())

    def _in_queue(self, label: str) -> str | None:
        """Return the number of the job in the queue that trains a run."""
        try:
            number = self._numbers(label).read_text().split()[-1]
        except (OSError, IndexError):
            return None
        if self.asked == float("-inf"):
            self._look()
        state = self.states.get(number)
        return None if state is None or state in ENDED else number

    def wait(self, listener: Listener) -> None:
        """Wait for a moment, and tell the listener what the folder and Slurm say."""
        time.sleep(HEARD_EVERY)
        looks = time.monotonic() - self.asked > (HEARD_EVERY if self.stopping else LOOKED_EVERY)
        if looks:
            self._look()
        for label, given in list(self.given.items()):
            if given.job.paths.result_pickle.exists():
                self._ended(label, listener)
            elif given.since < self.looked:
                self._judge(label, given, listener)
            with contextlib.suppress(OSError, ValueError):  # not there yet, or being written
                if label in self.given:
                    listener.advanced(label, float(self._share(label).read_text()))
        if self.waiting is not None and looks:
            run, self.waiting = self.waiting, None
            if self.stopping:
                listener.stopped(run.label)
            else:
                self.begin(run)

    def _look(self) -> None:
        """Ask Slurm for the states of all jobs of this user. Without an answer they stay."""
        before = time.monotonic()  # a job that is submitted meanwhile may be missing
        words = ["squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%i %T"]
        try:
            answer = subprocess.run(
                words, capture_output=True, text=True, timeout=60, check=True
            ).stdout
        except subprocess.SubprocessError:  # the controller is away: jobs run on without it
            return
        finally:
            self.asked = time.monotonic()
        self.states = dict(line.split()[:2] for line in answer.splitlines() if line.strip())
        self.looked = before

    def _ended(self, label: str, listener: Listener) -> None:
        """Take the result of a job."""
        job = self.given.pop(label).job
        error = job.exception()
        if error is None:
            how, reason = job.result()
            if how == "done":
                self._forget(label)
            listener.ended(label, reason)
        else:  # the job's own process failed before or after the training
            listener.lost(label, self._why(job, "FAILED"))

    def _judge(self, label: str, given: _Given, listener: Listener) -> None:
        """Give up a job that is not in the queue any more and leaves no result."""
        state = self.states.get(given.job.job_id, "unknown")
        if state not in ENDED and state != "unknown":
            given.ended = None
            return
        now = time.monotonic()
        given.ended = given.ended or now
        if self.stopping:
            del self.given[label]
            listener.stopped(label)
        elif now - given.ended > PATIENCE:
            del self.given[label]
            if state == "CANCELLED":
                listener.ended(label, self._why(given.job, state))
            elif state in NOT_ITS_FAULT:
                listener.stopped(label)
            else:
                listener.lost(label, self._why(given.job, state))

    def _why(self, job: submitit.Job[Any], state: str) -> str:
        """Return why a job has no result, as a sentence."""
        number = job.job_id
        sentence = {
            "CANCELLED": f"Its job {number} of Slurm was cancelled.",
            "unknown": f"Its job {number} is not known to Slurm any more.",
            "OUT_OF_MEMORY": f"Its job {number} of Slurm took more memory than it was given: "
            f"give --slurm mem=....",
            "TIMEOUT": f"Its job {number} of Slurm ran out of its time before it could write a "
            f"checkpoint: give --slurm time=....",
        }.get(state, f"Its job {number} of Slurm ended as {state}.")
        lines = [line for line in (_text(job.paths.stderr) or "").splitlines() if line.strip()]
        last = [line for line in lines if "submitit" not in line][-1:]
        return " ".join([sentence, *(f"Its last words: {line.strip()}" for line in last)])

    def stop(self) -> None:
        """Cancel all jobs: those that run get SIGTERM, and write a checkpoint."""
        if self.given and not self.stopping:
            numbers = [given.job.job_id for given in self.given.values()]
            subprocess.run(["scancel", *numbers], capture_output=True, check=False)
        self.stopping = True

    def close(self) -> None:
        """Leave the jobs that are in the queue there. Remove what is of no use any more."""
        with contextlib.suppress(OSError):
            for path in self.folder.glob(".submission_file_*"):
                path.unlink()  # links to what was removed with its job
            self.folder.rmdir()

    # --- the folder -----------------------------------------------------------------------------

    def _numbers(self, label: str) -> Path:
        return self.folder / f"{label}.jobs"

    def _share(self, label: str) -> Path:
        return self.folder / f"{label}.share"

    def _remove_refused(self) -> None:
        """Remove what submitit wrote for a job that Slurm refused: files without its number."""
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                left = re.fullmatch(r"[0-9a-f]{32}\.pkl|\.submission_file_.*", path.name)
                if left and not path.is_symlink():  # a link belongs to a job that was taken
                    path.unlink()

    def _forget(self, label: str) -> None:
        """Remove the files of all jobs of a run that has a record."""
        with contextlib.suppress(OSError):  # they are of no use, and do no harm
            for number in self._numbers(label).read_text().split():
                for path in self.folder.glob(f"{number}_*"):
                    path.unlink(missing_ok=True)
            self._numbers(label).unlink()
            self._share(label).unlink(missing_ok=True)


# --- in a job -----------------------------------------------------------------------------------


@dataclass
class _TrainCell:
    """What a job does: it trains a cell in a thread, and hears from Slurm in the main one."""

    order: Order
    cell: Mapping[str, Any]
    epochs: int
    label: str
    stop: list[int] = field(default_factory=list)
    outcome: tuple[str, str | None] = ("failed", "The thread that trains it ended early.")

    def __call__(self) -> tuple[str, str | None]:
        """Return how the cell ended: ``"done"`` or ``"failed"``, and why."""
        torch.set_num_threads(int(os.environ.get("SLURM_CPUS_PER_TASK", "1")))
        signal.signal(signal.SIGTERM, lambda number, _: self.stop.append(number))
        self.thread = threading.Thread(target=self._train, name="acdc cell")
        self.thread.start()
        while self.thread.is_alive():
            self.thread.join(0.1)  # signals are heard between two joins
        if self.outcome[0] == "stopped":  # without a result: what becomes of the job, Slurm decides
            raise SystemExit(128 + self.stop[0])
        return self.outcome

    def checkpoint(self) -> submitit.core.utils.DelayedSubmission:
        """Stop after a checkpoint, and go on later: submitit calls this when the time runs out."""
        self.stop.append(signal.SIGUSR2)
        self.thread.join()
        again = _TrainCell(self.order, self.cell, self.epochs, self.label)
        return submitit.core.utils.DelayedSubmission(again)

    def _train(self) -> None:
        told = 0.0
        folder = Path(self.order.folder)

        def watch(share: float) -> None:
            nonlocal told
            if time.monotonic() - told > TOLD_EVERY:
                told = time.monotonic()
                with contextlib.suppress(OSError):  # a full disk: the run itself says so
                    (folder / "slurm" / f"{self.label}.share").write_text(f"{share:.5f}")

        self.outcome = train_ordered(self.order, self.cell, self.epochs, watch, self.stop)


# --- options ------------------------------------------------------------------------------------


def _read(options: Sequence[str]) -> tuple[int, dict[str, str | bool]]:
    """Return the minutes of a job, and the options for sbatch.

    Raises:
        InputError: An option is not allowed.
    """
    minutes, further = MINUTES, dict[str, str | bool]()
    for option in options:
        key, equals, value = option.partition("=")
        key = key.strip().lstrip("-").replace("_", "-")
        if not re.fullmatch("[a-z][a-z-]*", key) or (equals and not value.strip()):
            raise InputError(
                f"--slurm {option!r} is no option of sbatch. An option is a long name and a value, "
                f"such as partition=gpu, or a name alone, such as exclusive."
            )
        if key in OURS:
            raise InputError(
                f"--slurm {option}: acdc sets {key} itself. Every cell is a job of one task, "
                f"and acdc reads what the job writes. Leave the option out."
            )
        if "\n" in value:
            raise InputError(f"--slurm {option!r} has more than one line. Give it in one.")
        if key == "time":
            minutes = _minutes(value)
        else:
            further[key] = value.strip() if equals else True
    return minutes, further


def _minutes(text: str) -> int:
    """Return the minutes of a time as sbatch takes it, rounded up."""
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text.strip()):
        raise InputError(
            f"--slurm time={text}: this is no time of sbatch. Write minutes, "
            f"hours:minutes:seconds, or days-hours."
        )
    numbers = [int(part) for part in parts]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:  # minutes[:seconds]
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    total = (int(days or 0) * 24 + hours) * 60 + minutes + (seconds > 0)
    if total < 1:
        raise InputError(f"--slurm time={text}: a job needs a minute or more.")
    return total


def _said(error: Exception) -> str:
    """Return what sbatch said."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("sbatch:")] or lines[-1:]
    return " ".join(line.removeprefix("sbatch:").removeprefix(" error:").strip() for line in said)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None
