"""Pools, which train the cells of a grid: what the planning asks of them, and the simplest one.

``work`` decides which run is next, and a pool trains it. A pool keeps nothing: the folders of the
runs hold everything, so that a run may begin in one pool and go on in another.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from acdc.compare.cells import Cell, Prepared, explain, prepare
from acdc.compare.grid import locate
from acdc.errors import AcdcError
from acdc.files import alone
from acdc.runs import train
from acdc.runs.record import Folder

PATIENCE = 20.0  # seconds that a cell waits for a process of a killed command that trains it


class Listener(Protocol):
    """Hears from a pool how its runs go on."""

    def advanced(self, label: str, share: float) -> None:
        """Note that this share of the steps of a run is done."""

    def ended(self, label: str, reason: str | None) -> None:
        """Note that a run has ended: with a record, or with a reason why it failed."""

    def stopped(self, label: str) -> None:
        """Note that a run was asked to stop and wrote a checkpoint."""

    def lost(self, label: str, reason: str) -> None:
        """Note that the process that trained a run died, and why."""


class Pool(Protocol):
    """Trains runs of a grid."""

    def free(self) -> bool:
        """Return whether another run can begin."""

    def begin(self, run: Prepared) -> None:
        """Begin a run, or continue it from its last checkpoint."""

    def wait(self, listener: Listener) -> None:
        """Wait for a moment, and tell the listener what has happened meanwhile.

        Raises:
            Interrupted: A run in this process was asked to stop.
        """

    def stop(self) -> None:
        """Ask all runs to write a checkpoint and stop; :meth:`wait` then says how they ended."""

    def close(self) -> None:
        """End all processes of the pool."""


@dataclass(frozen=True)
class Order:
    """What processes elsewhere have to know to train cells.

    Args:
        grid: The grid's function.
        folder: The folder of the grid.
        device: As ``acdc run`` takes it.
        command: The command line, for the records.
    """

    grid: str
    folder: str
    device: str
    command: str

    def absolute(self) -> Order:
        """Return the order with absolute paths, for processes that stand in another folder."""
        source, _, name = self.grid.rpartition(":")
        if source.endswith(".py"):
            source = str(Path(source).resolve())
        return replace(self, grid=f"{source}:{name}", folder=str(Path(self.folder).resolve()))


class ThisProcess:
    """A pool of one: runs are trained in this process, one after another.

    Args:
        folder: The folder of the grid.
        device: As ``acdc run`` takes it.
        command: The command line, for the records.
    """

    def __init__(self, folder: Path, device: str, command: str) -> None:
        self.folder, self.device, self.command = folder, device, command
        self.next: Prepared | None = None

    def free(self) -> bool:
        """Return whether another run can begin."""
        return self.next is None

    def begin(self, run: Prepared) -> None:
        """Let the next :meth:`wait` train the run."""
        self.next = run

    def wait(self, listener: Listener) -> None:
        """Train the run to its end."""
        run, self.next = self.next, None
        if run is None:
            return

        def watch(share: float) -> None:
            listener.advanced(run.label, share)

        try:
            reason = train_cell(run, self.folder, self.device, self.command, watch)
        except train.Interrupted:
            listener.stopped(run.label)
            raise
        listener.ended(run.label, reason)

    def stop(self) -> None:
        """Nothing is being trained between two calls of :meth:`wait`."""

    def close(self) -> None:
        """There are no other processes."""


def train_cell(
    run: Prepared,
    folder: Path,
    device: str,
    command: str,
    watch: Callable[[float], None],
    stop: list[int] | None = None,
) -> str | None:
    """Train a run, from its last checkpoint if it has one. Return why it failed, or ``None``.

    Args:
        run: What to train.
        folder: The folder of the grid.
        device: As ``acdc run`` takes it.
        command: The command line, for the record.
        watch: Called with the share of the steps that is done.
        stop: As ``train.run`` takes it.

    Raises:
        Interrupted: The run was asked to stop, and wrote a checkpoint.
    """
    run_folder = Folder(folder / "runs" / run.label)
    total = 1

    def follow(event: dict[str, Any]) -> None:
        nonlocal total
        if event["event"] == "start":
            total = event["total_steps"]
        elif event["event"] == "step":
            watch(event["step"] / total)

    try:
        _wait_until_free(run_folder)
        run_folder.error.unlink(missing_ok=True)
        train.run(
            run.recipe,
            run_folder.path,
            changed=run.changed,
            resume=run_folder.recipe.exists(),
            device=device,
            command=command,
            watch=follow,
            stop=stop,
        )
    except train.Interrupted:
        raise
    except Exception as error:  # any error fails this cell alone
        if not isinstance(error, AcdcError) and run_folder.path.exists():
            with contextlib.suppress(OSError):
                run_folder.error.write_text(traceback.format_exc(), encoding="utf-8")
        return explain(error)
    return None


def train_ordered(
    order: Order,
    cell: Mapping[str, Any],
    epochs: int,
    watch: Callable[[float], None],
    stop: list[int],
) -> tuple[str, str | None]:
    """Train a cell elsewhere than in the command, and return how it ended: ``"done"``, ``"failed"``
    and why, or ``"stopped"``.

    Args:
        order: What all cells have in common.
        cell: The fields of the cell.
        epochs: Its length. It may follow from measured FLOPs: the command decides.
        watch, stop: As ``train_cell`` takes them.
    """
    try:
        run = prepare(locate(order.grid), Cell(**cell), epochs)
        reason = train_cell(run, Path(order.folder), order.device, order.command, watch, stop)
    except train.Interrupted:
        return "stopped", None
    except Exception as error:  # raised by the file of the grid, or the method's own code
        return "failed", explain(error)
    return ("failed", reason) if reason else ("done", None)


def _wait_until_free(folder: Folder) -> None:
    """Wait until no other process trains in the folder of a run.

    Raises:
        InputError: A process trains there all the time.
    """
    if folder.path.exists():
        refusal = f"Another process trains the run in {folder.path}. Wait for it, or stop it."
        with alone(folder.path, refusal, PATIENCE):
            pass
