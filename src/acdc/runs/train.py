"""Runs a recipe: trains, resumes, and writes what comes out.

The loop is plain; Lightning Fabric supplies devices, processes and precision.
Everything random is a function of the seed and the step: a batch of (seed, epoch, index), dropout
of (seed, step, rank). So a resumed run needs no state of any generator, and ends bitwise where the
uninterrupted one ends, wherever it was stopped.

A run has one leg, or two: ``main`` trains by the method; ``finetune`` goes back to the end of the
last dense phase and trains the dense twin on over the steps in which the sparse one was trained.
The test data is measured after every epoch and decides nothing.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from acdc.collectives import PeerError, has_peers, is_of_peers
from acdc.errors import InputError
from acdc.files import alone
from acdc.hooks.steps import StepHooks
from acdc.pair import Pair
from acdc.random import seed_of
from acdc.runs import checkpoint, events
from acdc.runs.checkpoint import Progress, check_same
from acdc.runs.data import Data
from acdc.runs.details import costs, details, ledger
from acdc.runs.evaluate import evaluate
from acdc.runs.events import Journal, Watch
from acdc.runs.finish import finish, trained_pair
from acdc.runs.loss import agreed, backward
from acdc.runs.recipe import Recipe
from acdc.runs.record import Clocks, Event, Folder, times
from acdc.runs.rounding import computed, moved
from acdc.runs.setup import make_fabric, set_up
from acdc.runs.signals import Interrupted, stop_signals

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger(__name__)

__all__ = ["Interrupted", "Watch", "check_same", "run"]


def run(
    recipe: Recipe,
    folder: Path,
    *,
    changed: Mapping[str, str] | None = None,
    resume: bool = False,
    device: str = "auto",
    root: Path | None = None,
    download: bool = False,
    command: str = "",
    watch: Watch | None = None,
    stop: list[int] | None = None,
) -> dict[str, Any]:
    """Train ``recipe`` in ``folder`` and return its record.

    Args:
        recipe: What to run.
        folder: Where everything is written; must be new, or hold the run to resume.
        changed: What differs from the default recipe, path → text, for the record.
        resume: Go on from the last checkpoint; a finished run returns its record.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        root: Where the data lies; ``None``: see the data source.
        download: Fetch the data if it is not there.
        command: What was typed, for the record.
        watch: Called with every event, as it happens; a resumed run gives its start event again.
        stop: An empty list, for a run in another thread than the main one: the run stops as by a
            signal once the list holds the number of one.

    Raises:
        InputError: Anything the user can mend. What was trained is in the last checkpoint.
        Interrupted: The run was stopped by SIGTERM or SIGINT after writing a checkpoint.
    """
    files = Folder(folder)
    fabric = make_fabric(recipe, device, folder)
    if resume and files.record.exists():
        return files.read(files.record)
    if resume:
        recipe = checkpoint.as_begun(recipe, files)
    checkpoint.check_free(files, recipe, resume)
    threads = torch.get_num_threads()
    try:
        with (
            _alone(files, fabric),
            # The generator is the process's own: what the run draws from it is put back.
            torch.random.fork_rng(enabled=True),
            stop_signals(stop) as asked,
        ):
            # Again: another process may have begun a run meanwhile.
            checkpoint.check_free(files, recipe, resume)
            fabric.launch()
            if recipe.threads is not None:
                torch.set_num_threads(recipe.threads)
            data = recipe.data.load(root, download)
            loop = _Loop(recipe, files, fabric, data, asked, watch or (lambda _: None))
            if fabric.is_global_zero and not resume:
                # Written only now, so that a run that failed to start leaves no folder behind.
                files.write(files.recipe, checkpoint.identity(recipe, changed or {}))
            return loop.go(command, resume)
    except RuntimeError as error:
        if not (has_peers() and is_of_peers(error)):
            raise
        first = str(error).strip().split("\n")[0]
        raise PeerError(
            f"The run in {folder} stopped: another of its processes has ended, and says why "
            f"({first}). {checkpoint.safe(files)} Go on with --resume."
        ) from error
    except OSError as error:
        raise InputError(
            f"The run in {folder} stopped: {error.strerror or error}. {checkpoint.safe(files)} "
            f"Free some space if the disk is full, then go on with --resume."
        ) from error
    finally:
        torch.set_num_threads(threads)


def _alone(folder: Folder, fabric: Fabric) -> AbstractContextManager[object]:
    """Keep other processes from training in the folder; the first process of a run does so."""
    if not fabric.is_global_zero:
        return nullcontext()
    return alone(
        folder.path,
        f"Another process trains the run in {folder.path}. Wait until it ends, or stop it and go "
        f"on with --resume; for a second run choose another folder with --out.",
    )


class _Loop:
    """The training loop of one run, and how far it is."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Folder,
        fabric: Fabric,
        data: Data,
        stop: list[int],
        watch: Watch,
    ) -> None:
        self.stop, self.watch = stop, watch
        self.progress = Progress()
        self.run = set_up(recipe, folder, fabric, data)
        self.epoch_ends = set(accumulate(self.run.schedule.steps_per_epoch))
        self.executed = 0  # steps that a GradScaler did not skip
        StepHooks(self.run.optimizer).call_after(self._count)

    def go(self, command: str, resume: bool) -> dict[str, Any]:
        """Train both legs and return the record."""
        run, size = self.run, 0
        resumed = resume and checkpoint.exists(run.folder)
        if resumed:
            found = checkpoint.load(run)
            self.progress, size = found.progress, found.metrics
            self._warn(found.warning)
            self._warn(moved(self.progress.computed, computed(run)))
        self.progress.computed = computed(run)
        self.journal = Journal(run, self.watch, size)
        self.started = time.perf_counter() - self.progress.seconds
        try:
            if resumed:
                self.watch(events.start(run))
                self._warn(self.journal.check())
            else:
                self.journal.write(events.start(run))
                if self.journal.write_changes(0, 0, self._built):  # some schedules begin sparse
                    self._checkpoint()
            if self.progress.leg == "main":
                self._train()
                self._end_main()
            if self.progress.leg == "finetune":
                self._train()
            return self._finish(command)
        finally:
            self.journal.close()

    def _warn(self, text: str | None) -> None:
        """Show a warning to the watcher, log it for programs that watch nothing, and record it."""
        if text is None or not self.run.fabric.is_global_zero:
            return
        log.warning("%s", text)
        self.watch({"event": "warning", "step": self.progress.step, "text": text})
        # Without the path of the folder: a page shows the warning, and the path is private.
        text = text.replace(f"{self.run.folder.path}{os.sep}", "")
        self.progress.warnings.append({"step": self.progress.step, "text": text})

    def _end_main(self) -> None:
        """Go back to the dense twin if it is to be trained on; save the pair as it is now."""
        run = self.run
        run.sparsifier.remove()
        twin = run.sparsifier.dense_twin
        if run.leaves is not Pair or not run.recipe.dense_finetune or twin is None:
            return
        pair = trained_pair(run)
        if run.fabric.is_global_zero:
            pair.save(run.folder.result)  # to be used while the dense twin is trained on
        twin.restore(run.net, run.optimizer)
        at = self.progress.batches_at_twin
        self.progress = replace(
            self.progress, leg="finetune", step=twin.step, batches=at, batches_at_twin=at, pair=pair
        )
        self._checkpoint()

    def _finish(self, command: str) -> dict[str, Any]:
        """Save the result, evaluate it, and write the record."""
        run = self.run
        networks = finish(run, self.progress)
        self.progress.seconds = time.perf_counter() - self.started
        spent = ledger(run)
        record: dict[str, Any] = {"sparse": None, "dense": None} | networks | costs(run, spent)
        record |= {"seconds": round(self.progress.seconds, 3), "run": str(run.folder.path)}
        record["details"] = details(run, spent, command, self.progress.leg == "finetune")
        record["details"]["warnings"] = self.progress.warnings
        if run.fabric.is_global_zero:
            self.journal.sync()
            record["details"]["time"] = times(run.folder.metrics)
            run.folder.write(run.folder.record, record)
        run.fabric.barrier()
        return record

    # --- steps ----------------------------------------------------------------------------------

    def _train(self) -> None:
        """Train the leg to its end."""
        run, progress = self.run, self.progress
        run.net.train()
        while progress.step < run.schedule.total:
            epoch, index = divmod(progress.batches, run.steps_per_epoch)
            batches = run.data.train_batches(
                epoch,
                run.local_batch,
                run.recipe.seed,
                start=index,
                rank=run.fabric.global_rank,
                world=run.fabric.world_size,
            )
            for x, y in batches:
                self._train_step(x, y)
                if progress.step >= run.schedule.total:
                    break

    def _train_step(self, x: Tensor, y: Tensor) -> None:
        """Take one optimizer step and everything that is due after it."""
        run, progress = self.run, self.progress
        before, changes, built = progress.step, len(run.sparsifier.changes), self._built
        began, executed = Clocks.now(), self.executed
        lr = run.recipe.optimizer.lr * run.recipe.lr.factor(*run.method.on_curve(before))
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        rank = run.fabric.global_rank
        torch.manual_seed(seed_of("dropout", run.recipe.seed, progress.batches, rank))
        loss = backward(run, run.on_device(x), y.to(run.fabric.device))
        loss, stop = agreed(run.fabric, loss, self.stop[0] if self.stop else 0)
        self._check_finite(loss)
        if run.recipe.clip is not None:
            run.fabric.clip_gradients(run.model, run.stepper, max_norm=run.recipe.clip)
        run.stepper.step()
        taken = Clocks.now().minus(began)
        evaluation = None
        if self.executed > executed:
            evaluation, advancing = self._after_executed_step()
            taken = taken.plus(advancing)
        run.stepper.zero_grad()
        progress.batches += 1
        if progress.step == before:
            return  # the GradScaler found an overflow and skipped the step
        compressing = self._built.minus(built)
        step = events.step(run, progress.leg, before, loss, lr)
        mark = events.mark(progress.leg)
        self.journal.write(step | taken.minus(compressing).event() | mark)
        if evaluation is not None:
            self.journal.write(evaluation | mark)
            self._check_finite(evaluation["loss"])
        chosen = self.journal.write_changes(progress.step, changes, compressing)
        judged = self.journal.write_verdicts(progress.step)
        if evaluation is not None and progress.leg == "main":
            self.journal.write(events.spent(progress.step, ledger(run, progress.step)))
        twin = run.sparsifier.dense_twin
        if twin is not None and twin.step == progress.step and progress.leg == "main":
            progress.batches_at_twin = progress.batches
        if run.fabric.world_size == 1 and self.stop:
            stop = self.stop[0]
        if stop or chosen or judged or progress.step % run.recipe.checkpoint_steps == 0:
            self._checkpoint()
        if stop:
            raise Interrupted(
                f"Stopped at step {progress.step} of {run.schedule.total} "
                f"({signal.Signals(stop).name}). Nothing is lost: go on with --resume.",
                stop,
            )

    def _count(self, executed: bool, _: Any) -> None:
        self.executed += executed

    def _after_executed_step(self) -> tuple[Event | None, Clocks]:
        """Evaluate the network at the end of an epoch; then let the sparsifier change its support.

        Returns:
            The event of the evaluation, if one was due, and the time that the sparsifier took.
        """
        run, progress = self.run, self.progress
        progress.step += 1
        evaluation = self._evaluation() if progress.step in self.epoch_ends else None
        began = Clocks.now()
        if progress.leg == "main":
            run.sparsifier.advance()
        return evaluation, Clocks.now().minus(began)

    def _evaluation(self) -> Event:
        """Evaluate the network as the step left it."""
        run, progress = self.run, self.progress
        began = Clocks.now()
        with run.sparsifier.view() if progress.leg == "main" else nullcontext():
            found = evaluate(run)
        run.net.train()
        taken = Clocks.now().minus(began)
        return events.evaluation(run, progress.leg, progress.step, found) | taken.event()

    def _check_finite(self, loss: float) -> None:
        """Raise InputError where training diverged."""
        run = self.run
        if not math.isfinite(loss):
            raise InputError(
                f"The loss is {loss} at step {self.progress.step} of {run.schedule.total}: "
                f"training diverged. {checkpoint.safe(run.folder)} Lower optimizer.lr (now "
                f"{run.recipe.optimizer.lr:g}), add --set clip=1.0, or lengthen lr.warmup, and "
                f"start a new run."
            )

    # --- checkpoints ----------------------------------------------------------------------------

    @property
    def _built(self) -> Clocks:
        """Time that the engine has spent on compressions."""
        return Clocks() if self.run.engine is None else self.run.engine.taken

    def _checkpoint(self) -> None:
        """Replace the last checkpoint by one of this moment."""
        self.progress.seconds = time.perf_counter() - self.started
        checkpoint.save(self.run, self.progress, self.journal.sync())
