"""The events of a run: what they say, and where they go."""

from __future__ import annotations

import math
from collections.abc import Callable

from acdc.cost import Ledger
from acdc.result import DenseNetwork
from acdc.runs.checkpoint import Leg
from acdc.runs.record import Clocks, Event, Metrics, events
from acdc.runs.setup import Setup
from acdc.runs.supports import keep

Watch = Callable[[Event], None]


class Journal:
    """Writes events to ``metrics.jsonl``, to TensorBoard if it is there, and to the watcher.

    Only the first process of a run writes.

    Args:
        run: The run.
        watch: Called with every event.
        size: Bytes of the metrics file that count; the rest is cut off.
    """

    def __init__(self, run: Setup, watch: Watch, size: int) -> None:
        self._run, self._watch = run, watch
        zero = run.fabric.is_global_zero
        self._metrics = Metrics(run.folder.metrics, size) if zero else None
        self._group = "dense" if run.leaves is DenseNetwork else "sparse"

    def check(self) -> str | None:
        """Read what a resumed run found in the file, and see that the file has a start event.

        Returns:
            A sentence, if a part of the file cannot be read.
        """
        if self._metrics is None:
            return None
        path = self._run.folder.metrics
        found, damaged = events(path)
        if not any(event["event"] == "start" for event in found):
            self._metrics.write(start(self._run))
        lost = [f"its last {self._metrics.lost} bytes are gone"] if self._metrics.lost else []
        if damaged:
            more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
            lost.append(f"no event can be read from line {', '.join(map(str, damaged[:5]))}{more}")
        if not lost:
            return None
        return (
            f"{path} is damaged: {', and '.join(lost)}. The training is not affected. The page and "
            f"the times of the run lack these events; to have them, restore the file from a copy."
        )

    def write(self, event: Event) -> None:
        """Write an event everywhere."""
        if self._metrics is None:
            return
        self._metrics.write(event)
        self._watch(event)
        if event["event"] in ("step", "eval"):
            group = event.get("twin", self._group)
            numbers = {k: event[k] for k in ("loss", "lr", "accuracy", "sparsity") if k in event}
            self._run.fabric.log_dict(
                {f"{event['event']}/{group}/{k}": v for k, v in numbers.items()}, event["step"]
            )

    def write_changes(self, step: int, first: int, taken: Clocks) -> bool:
        """Write events for the changes of the support, and for the engine that follows them.

        Args:
            step: Executed steps.
            first: Number of the first change that has no event yet.
            taken: Time that the engine spent on the changes.

        Returns:
            Whether the engine made a choice. The choice has to be on the disk before a step is
            computed by it: chosen anew after a stop, it could be another one.
        """
        engine, changes = self._run.engine, self._run.sparsifier.changes[first:]
        for change in changes:
            self.write({"event": "change"} | vars(change))
        if self._run.recipe.supports and changes and changes[-1].to == "sparse":
            self._keep_support(step)
        if engine is None or not any(change.to == "sparse" for change in changes):
            return False
        choices = engine.new_choices()
        event = {"event": "engine", "step": step, **engine.start(), **choices}
        self.write(event | taken.event())
        return bool(choices)

    def _keep_support(self, step: int) -> None:
        if self._metrics is not None:
            sparsifier = self._run.sparsifier
            self.write(keep(self._run.folder, step, sparsifier.support, sparsifier.params))

    def write_verdicts(self, step: int) -> bool:
        """Write an event for new verdicts on whole steps.

        Returns:
            Whether there are any. They have to be on the disk before a step is computed by it.
        """
        engine = self._run.engine
        verdicts = [] if engine is None else engine.new_verdicts()
        if verdicts:
            self.write({"event": "verdict", "step": step, "verdicts": verdicts})
        return bool(verdicts)

    def sync(self) -> int:
        """Return the size of the metrics file, once every event in it is on the disk."""
        return 0 if self._metrics is None else self._metrics.sync()

    def close(self) -> None:
        """Flush and close. The run may have stopped."""
        if self._metrics is not None:
            self._metrics.close()
            for logger in self._run.fabric.loggers:
                logger.finalize("success")


def start(run: Setup) -> Event:
    """Return the event at the start of a run: its schedule and its layers."""
    pruned = run.sparsifier.params
    return {
        "event": "start",
        "step": 0,
        "total_steps": run.schedule.total,
        **run.schedule.to_dict(),
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "numel": layer.weights,
                "positions": layer.positions,
                "prunable": layer.name in pruned,
            }
            for layer in run.network.layers
        ],
        "refused": run.sparsifier.refused,
        "engine": run.engine_start,
    }


def step(run: Setup, leg: Leg, before: int, loss: float, lr: float) -> Event:
    """Return the event of the step after ``before`` executed steps; its times are added later."""
    return {
        "event": "step",
        "step": before + 1,
        "epoch": math.floor(run.schedule.epoch_at(before)),
        "phase": phase_of(run, leg, before),
        "loss": loss,
        "lr": lr,
    }


def evaluation(run: Setup, leg: Leg, after: int, found: dict[str, float]) -> Event:
    """Return the event of an evaluation after ``after`` executed steps."""
    support, dense = run.sparsifier.support, leg == "finetune"
    return {
        "event": "eval",
        "step": after,
        "epoch": math.floor(run.schedule.epoch_at(after)),
        "phase": phase_of(run, leg, after - 1),
        "split": "test",
        **found,
        "nnz": support.numel if dense else support.nnz,
        "sparsity": 0.0 if dense else support.sparsity,
    }


def spent(step: int, ledger: Ledger) -> Event:
    """Return the event of the training FLOPs until ``step``: a run that stops has no record."""
    return {"event": "ledger", "step": step, **ledger.to_dict()}


def mark(leg: Leg) -> Event:
    """Return what tells the events of fine-tuning from those of the run itself."""
    return {"twin": "dense"} if leg == "finetune" else {}


def phase_of(run: Setup, leg: Leg, step: int) -> str:
    """Return the kind of phase that the step after ``step`` executed steps belongs to."""
    return "dense" if leg == "finetune" else run.schedule.phase_at(step).kind
