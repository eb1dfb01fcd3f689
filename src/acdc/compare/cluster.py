"""Pools of Dask workers: on this machine for one command, or of a cluster that is running.

Dask starts the processes, starts them again when they die, carries messages, and says when a worker
is gone. Which cell is next, what is finished and where a cell goes on is decided elsewhere, by the
folders (``work.py``). Every cell is given to one worker by name, and a worker gets one cell at a
time: when it dies, one cell is lost, and Dask does not give that cell to a busy worker.

A worker trains a cell in a thread. Its main thread hears from the scheduler meanwhile, so that it
can stop the cell, after a checkpoint: when it is asked to, when the command or the scheduler is
gone, and at SIGTERM.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dask
import distributed
import torch
from distributed import Client, Future, LocalCluster, Nanny, Worker, WorkerPlugin

import acdc
from acdc.address import check_address
from acdc.compare.cells import Prepared, explain
from acdc.compare.pool import Listener, Order, train_ordered
from acdc.compare.scheduler import check_answer
from acdc.errors import InputError

LOOKED_EVERY = 0.5  # seconds between two looks at the workers
TOLD_EVERY = 0.25  # seconds between two reports of the progress of a cell
PATIENCE = 60.0  # seconds that a grid waits for a worker when none is left


@dataclass
class _Given:
    """A cell that a worker was given."""

    label: str
    worker: str
    future: Future[Any]


class _Workers(ABC):
    """A pool of the workers of a scheduler."""

    def __init__(self, order: Order, jobs: int | None) -> None:
        self.order, self.jobs = order, jobs
        self.client: Client | None = None
        self.given: dict[str, _Given] = {}  # by the key of the task
        self.workers: set[str] = set()  # addresses
        self.messages: queue.Queue[tuple[str, float | None]] = queue.Queue()
        self.topic = f"acdc-{uuid.uuid4().hex}"
        self.looked = self.seen = time.monotonic()
        self.stopping = False

    # --- what a kind of cluster decides ---------------------------------------------------------

    @abstractmethod
    def _connect(self) -> Client:
        """Return a client of the scheduler."""

    @abstractmethod
    def _why_lost(self, worker: str) -> str:
        """Return why a worker is gone, as a sentence."""

    @abstractmethod
    def close(self) -> None:
        """Leave the cluster."""

    # --- a pool ---------------------------------------------------------------------------------

    def free(self) -> bool:
        """Return whether another cell can begin. The first call connects."""
        if self.client is None:
            self.client = self._connect()
            self.client.subscribe_topic(self.topic, self._told)
            self._look()
        return bool(self._idle()) and (self.jobs is None or len(self.given) < self.jobs)

    def _idle(self) -> list[str]:
        return sorted(self.workers - {given.worker for given in self.given.values()})

    def begin(self, run: Prepared) -> None:
        """Give a run to a worker."""
        assert self.client is not None
        key = f"{run.label}-{uuid.uuid4().hex}"
        worker = self._idle()[0]
        cell, epochs = asdict(run.cell), run.epochs
        future = self.client.submit(
            train_on_worker, self.order, cell, epochs, self.topic, key, key=key, workers=[worker]
        )
        self.given[key] = _Given(run.label, worker, future)
        future.add_done_callback(lambda _: self.messages.put((key, None)))

    def _told(self, event: tuple[float, tuple[str, float]]) -> None:
        key, share = event[1]
        self.messages.put((key, share))

    def wait(self, listener: Listener) -> None:
        """Wait for a message of a worker, and tell the listener what it says.

        Raises:
            InputError: The scheduler is gone, or there is no worker left.
        """
        if time.monotonic() - self.looked > LOOKED_EVERY:
            self._look()
            self._give_up_lost(listener)
            if self.stopping:
                self.stop()  # again: a cell may have begun since
        try:
            key, share = self.messages.get(timeout=LOOKED_EVERY)
        except queue.Empty:
            return
        if key not in self.given:
            return  # given up meanwhile
        if share is not None:
            listener.advanced(self.given[key].label, share)
            return
        given = self.given.pop(key)
        if given.future.status == "cancelled":
            raise self._gone()
        if given.future.status == "finished":
            how, reason = given.future.result()
            if how == "stopped":
                listener.stopped(given.label)
            else:
                listener.ended(given.label, reason)
            return
        error = given.future.exception()
        if isinstance(error, distributed.KilledWorker):
            self.workers.discard(given.worker)
            listener.lost(given.label, self._why_lost(given.worker))
        else:
            listener.ended(given.label, explain(error))

    def _look(self) -> None:
        """See which workers there are."""
        assert self.client is not None
        self.looked = time.monotonic()
        if self.client.status != "running":
            raise self._gone()
        try:
            found = _workers_of(self.client)
        except OSError as error:
            raise self._gone() from error
        self.workers = {address for address, worker in found.items() if worker["nthreads"] == 1}
        if self.workers:
            self.seen = self.looked
        if self.looked - self.seen > PATIENCE:
            raise InputError(
                f"No worker has been left for {PATIENCE:.0f} seconds. Start workers again, and go "
                f"on with --resume: every cell goes on from its last checkpoint."
            )

    def _give_up_lost(self, listener: Listener) -> None:
        """Give up the cells of workers that have left: no other worker may take them."""
        for key, given in list(self.given.items()):
            if given.worker not in self.workers and not given.future.done():
                del self.given[key]
                given.future.cancel()
                listener.lost(given.label, self._why_lost(given.worker))

    def _gone(self) -> InputError:
        return InputError(
            "The scheduler that trains this grid is gone. Its workers wrote checkpoints if they "
            "could. Start the scheduler and the workers again, and go on with --resume."
        )

    def stop(self) -> None:
        """Ask all workers to stop their cells."""
        self.stopping = True
        if self.client is not None and self.given:
            self.client.run(stop_cells, list(self.given), on_error="ignore")


class Embedded(_Workers):
    """A cluster of this command alone: a worker for each job, with its share of the threads."""

    def __init__(self, order: Order, jobs: int) -> None:
        super().__init__(order, jobs)
        self.stack = ExitStack()
        self.threads = max(1, torch.get_num_threads() // jobs)

    def _connect(self) -> Client:
        _check_shared_memory()
        # For as long as the cluster is there: a worker that died is started again under them.
        self.stack.enter_context(_environment(OMP_NUM_THREADS=str(self.threads)))
        self.stack.enter_context(dask.config.set(_settings()))
        _preload()
        try:
            cluster = LocalCluster(
                n_workers=self.jobs,
                threads_per_worker=1,
                worker_class=_Nanny,
                memory_limit=0,
                scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
                silence_logs=logging.CRITICAL,
                env=dict(os.environ),
                plugins=[StopCells(Own(os.getcwd(), self.threads))],
            )
        except RuntimeError as error:
            raise InputError(
                "A worker died while it was started. If a script of yours gives jobs, the call "
                'must stand below if __name__ == "__main__":, as in every program that starts '
                "processes. If memory is short, give fewer --jobs. Then go on with --resume."
            ) from error
        self.stack.enter_context(cluster)
        client = Client(cluster, set_as_default=False)
        self.stack.enter_context(client)
        return client

    def _why_lost(self, worker: str) -> str:
        deadline = time.monotonic() + 2  # the connection ends a moment before the process
        while worker not in _Nanny.exits and time.monotonic() < deadline:
            time.sleep(0.01)
        code = _Nanny.exits.get(worker)
        if code is None:
            return "The process that trained it does not answer any more."
        if code < 0:
            name = signal.Signals(-code).name
            hint = " The system may have run out of memory." if -code == signal.SIGKILL else ""
            return f"Its process was killed by {name}.{hint}"
        return f"Its process ended with code {code}."

    def close(self) -> None:
        """End the workers."""
        self.stack.close()


class Running(_Workers):
    """The workers of a scheduler that is running, on machines that share the folder of the grid.

    Raises:
        InputError: The address is none.
    """

    def __init__(self, order: Order, scheduler: str, jobs: int | None) -> None:
        check_address(scheduler)
        super().__init__(order.absolute(), jobs)
        self.scheduler = scheduler

    def _connect(self) -> Client:
        check_answer(self.scheduler)
        try:
            client = Client(self.scheduler, set_as_default=False)
        except OSError as error:
            raise self._gone() from error  # it answered a moment ago
        try:
            self._check(client)
            client.register_plugin(StopCells())
        except BaseException:
            client.close()
            raise
        return client

    def _check(self, client: Client) -> None:
        """See that the workers can train this grid.

        Raises:
            InputError: They cannot.
        """
        workers = _workers_of(client)
        if not workers:
            raise InputError(
                f"--on {self.scheduler}: the scheduler has no workers. Start them with "
                f"'dask worker {self.scheduler} --nthreads 1'."
            )
        for address, worker in workers.items():
            if worker["nthreads"] != 1:
                raise InputError(
                    f"--on {self.scheduler}: the worker {address} has {worker['nthreads']} threads "
                    f"and would train as many cells in one process, which share a generator of "
                    f"random numbers. Start each worker with --nthreads 1; OMP_NUM_THREADS is the "
                    f"number of threads that a cell computes with."
                )
        here = surroundings(self.order.folder)
        for address, there in client.run(
            surroundings, self.order.folder, on_error="return"
        ).items():
            if isinstance(there, Exception):
                raise InputError(
                    f"--on {self.scheduler}: the worker {address} cannot run acdc: "
                    f"{explain(there)}. Install the environment of this command there."
                )
            for what, value in here.items():
                if there[what] != value:
                    raise InputError(
                        f"--on {self.scheduler}: {what} is {there[what]} on the worker {address}, "
                        f"and {value} here. The workers need the environment of this command, and "
                        f"the same folder under the same path."
                    )

    def _why_lost(self, worker: str) -> str:
        return f"The worker {worker} was lost while it trained the cell; its log may say why."

    def close(self) -> None:
        """Leave the cluster. Cells that are still being trained are stopped by their workers."""
        if self.client is not None:
            self.client.close()


def _workers_of(client: Client) -> dict[str, Any]:
    """Return what the scheduler knows about each worker, by its address.

    ``Client.scheduler_info`` returns the last answer to anyone. The client itself asks for none of
    the workers every two seconds, and its answer may be the last one.
    """
    assert client.scheduler is not None
    found: dict[str, Any] = client.sync(client.scheduler.identity, n_workers=-1)["workers"]
    return found


# --- an embedded cluster ------------------------------------------------------------------------


class _Nanny(Nanny):
    """Remembers how the processes of its worker ended: the exit code, by the worker's address."""

    exits: dict[str, int] = {}  # noqa: RUF012

    def _on_worker_exit_sync(self, exitcode: int) -> None:
        self.exits[str(self.worker_address)] = exitcode
        super()._on_worker_exit_sync(exitcode)  # type: ignore[no-untyped-call]


def _settings() -> dict[str, Any]:
    """Return the settings of Dask for an embedded cluster."""
    return {
        # A process that has imported torch once, and forks: a worker is there in a moment.
        "distributed.worker.multiprocessing-method": "forkserver" if _forks() else "spawn",
        # By default Dask sets variables here that make malloc give memory back at every chance.
        "distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": 1},
        "distributed.worker.profile.enabled": False,  # it stops the training to look at its stack
        "distributed.scheduler.allowed-failures": 0,  # whether a cell is tried again is ours
        "distributed.scheduler.worker-ttl": None,  # a machine that slept for an hour is not lost
        "distributed.scheduler.work-stealing": False,
        "distributed.scheduler.http.routes": [],  # no page of Dask's own
    }


def _forks() -> bool:
    return sys.platform == "linux"  # system libraries of macOS do not survive a fork


def _check_shared_memory() -> None:
    """See that processes can share semaphores, which Dask's watch over its workers needs.

    Raises:
        InputError: They cannot.
    """
    try:
        multiprocessing.get_context("spawn").Semaphore()
    except OSError as error:
        raise InputError(
            f"Workers need semaphores of the system, and it makes none ({error.strerror}): "
            f"/dev/shm may be missing or read-only. Make it writable, or give --jobs 0: cells are "
            f"then trained in the process of the command. Or start workers elsewhere and give --on."
        ) from error


def _preload() -> None:
    """Let the server of forks import what a worker needs."""
    if _forks():
        from distributed.utils import get_mp_context

        get_mp_context().set_forkserver_preload([__name__])


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set variables of the environment for a while; undo, too, what Dask sets meanwhile."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# --- in a worker --------------------------------------------------------------------------------

_stops: dict[str, list[int]] = {}  # by the key of a task that trains here


def surroundings(folder: str) -> dict[str, Any]:
    """Return what has to be equal for a command and the workers that train its grid."""
    return {
        "the version of acdc": acdc.__version__,
        "the version of torch": torch.__version__,
        "the version of Python": sys.version.split()[0],
        f"whether {folder} exists": Path(folder).is_dir(),
    }


def stop_cells(keys: list[str]) -> None:
    """Stop those of the cells that are being trained in this process, after a checkpoint."""
    for key in keys:
        if key in _stops:
            _stops[key].append(signal.SIGTERM)


def train_on_worker(
    order: Order, cell: Mapping[str, Any], epochs: int, topic: str, key: str
) -> tuple[str, str | None]:
    """Train a cell in a worker, and return how it ended: ``"done"``, ``"failed"``, ``"stopped"``.

    Args:
        order: What all cells have in common.
        cell: The fields of the cell.
        epochs: Its length.
        topic: Where to tell the progress.
        key: Of the task.
    """
    worker = distributed.get_worker()
    stop = _stops.setdefault(key, [])
    told = 0.0

    def watch(share: float) -> None:
        nonlocal told
        if time.monotonic() - told > TOLD_EVERY:
            told = time.monotonic()
            worker.log_event(topic, (key, share))

    try:
        return train_ordered(order, cell, epochs, watch, stop)
    finally:
        del _stops[key]


@dataclass(frozen=True)
class Own:
    """What a worker of an embedded cluster takes over from its command.

    Args:
        folder: The folder in which the command was given.
        threads: Threads of a cell.
    """

    folder: str
    threads: int


class StopCells(WorkerPlugin):
    """Stops the cells of a worker, after a checkpoint, when nobody waits for them any more.

    Args:
        own: For the workers of an embedded cluster.
    """

    name = "acdc-stop-cells"
    idempotent = True  # several commands may use one cluster

    def __init__(self, own: Own | None = None) -> None:
        self.own = own

    def setup(self, worker: Worker) -> None:
        """Take over the signals, if this is the main thread."""
        if self.own is not None:
            os.chdir(self.own.folder)
            torch.set_num_threads(self.own.threads)
            silent = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(silent, stream)
            os.close(silent)
        if threading.current_thread() is not threading.main_thread():
            return
        if self.own is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the command stops the cells
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            close = partial(worker.close, nanny=False, reason="SIGTERM")
            signal.signal(signal.SIGTERM, lambda *_: worker.loop.add_callback(close))

    def transition(self, key: Any, start: str, finish: str, **_: Any) -> None:
        """Stop a cell whose command has gone: the scheduler has released it."""
        if finish in ("cancelled", "released", "forgotten"):
            stop_cells([key])

    def teardown(self, worker: Worker) -> None:
        """Stop all cells: the worker is being closed, or has lost its scheduler."""
        stop_cells(list(_stops))
