"""The display of ``acdc run`` and ``acdc compare``: a moving line, and a table at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from acdc.engine.verdict import Verdict
from acdc.errors import need
from acdc.index import Twin
from acdc.runs.record import networks

try:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ImportError as missing:
    raise need("rich", "lab") from missing

if TYPE_CHECKING:
    from acdc.compare.results import Outcome
    from acdc.compare.work import Progress as Progressed

# As in the report: blue is dense, orange is sparse.
COLOURS = {"dense": "bright_blue", "sparse": "orange3"}


class _Bar:
    """A context manager: a bar on a terminal, which disappears at exit."""

    _progress: Progress

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


class Watcher(_Bar):
    """Shows a run while it trains: a bar on a terminal, else a line after each epoch.

    A context manager; the bar disappears at exit.

    Args:
        what: Recipe and folder, for the first line.
        finetune: Whether the dense twin is fine-tuned after the run itself.
        console: Where to write.
    """

    def __init__(self, what: str, finetune: bool, console: Console) -> None:
        self.what = what
        self.finetune = finetune
        self.console = console
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not self._live,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("starting", total=None, numbers="")
        self._epochs, self._total, self._branch = 0, 0, 0
        self._loss, self._accuracy = "", ""
        self._pace = Pace()
        self._mean = Mean()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event of the run."""
        kind = event["event"]
        if kind == "start":
            self._start(event)
        elif kind == "step":
            self._step(event)
        elif kind == "eval":
            self._evaluated(event)
        elif kind == "engine" and "choices" in event:
            self._say(engine(event))
        elif kind == "verdict":
            for verdict in event["verdicts"]:
                self._say(f"engine: {Verdict.from_dict(verdict)}")
        elif kind == "warning":
            self._say(f"Warning: {event['text']}")

    def _start(self, event: Mapping[str, Any]) -> None:
        self._total, self._epochs = event["total_steps"], len(event["steps_per_epoch"])
        ends = [phase["stop"] for phase in event["phases"] if phase["kind"] == "dense"]
        self._branch = ends[-1] if ends and self.finetune else self._total
        self._say(f"{self.what}: {self._epochs} epochs, {self._total:,} steps")
        if event.get("engine", {}).get("reason"):
            self._say(engine(event["engine"]))
        both = self._total + (self._total - self._branch)
        self._progress.update(self._task, total=both)

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the disk of a log is full: the training goes on
            self.console.print(line, highlight=False, soft_wrap=True)

    def _step(self, event: Mapping[str, Any]) -> None:
        self._pace.tick(event["seconds"])
        self._mean.add(event["loss"])
        if not self._live:
            return
        twin = "twin" in event
        done = event["step"] + (self._total - self._branch if twin else 0)
        phase = "dense" if twin else event["phase"]
        name = "dense twin" if twin else f"{phase:<6}"
        self._loss = f"{event['loss']:.3f}"
        self._progress.update(
            self._task,
            completed=done,
            description=(f"[{COLOURS[phase]}]{name}[/]  epoch {event['epoch'] + 1}/{self._epochs}"),
            numbers=self._numbers(),
        )

    def _numbers(self) -> str:
        parts = [f"loss {self._loss}", self._accuracy, f"{self._pace} steps/s"]
        return "  ".join(part for part in parts if part)

    def _evaluated(self, event: Mapping[str, Any]) -> None:
        text = f"  {_bits(event['bits'])} bits" if "bits" in event else ""
        self._accuracy = f"test {event['accuracy']:.2f} %{text}"
        if not self._live:
            phase = "dense twin" if "twin" in event else event["phase"]
            width = len(str(self._epochs))
            self._say(
                f"epoch {event['epoch']:>{width}}/{self._epochs}  {phase:<10}  "
                f"loss {self._mean.take():.4f}  test accuracy {event['accuracy']:6.2f} %{text}  "
                f"{self._pace} steps/s"
            )


class GridWatcher(_Bar):
    """Shows a comparison while it runs: a bar on a terminal, and a line for each settled cell.

    A context manager; the bar disappears at exit.

    Args:
        console: Where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.completed:.0f} of {task.total:.0f} cells"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[running]}"),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=1, running="", left="")

    def __call__(self, progress: Progressed) -> None:
        """Show the progress of the comparison."""
        left = progress.seconds_left
        running = (f"{cell} {100 * share:.0f} %" for cell, share in progress.running)
        self._progress.update(
            self._task,
            completed=progress.done,
            total=progress.cells,
            running="; ".join(running),
            left="" if left is None else f"{duration(left)} left",
        )
        if progress.latest is not None:
            self._say(progress, progress.latest, left)

    def _say(self, progress: Progressed, latest: Outcome, left: float | None) -> None:
        if latest.row is None:
            what = f"no result: {latest.reason}"
        else:
            row = latest.row
            twins = (("sparse", row["sparse_quality"]), ("dense", row["dense_quality"]))
            what = ", ".join(f"{twin} {value:.3f}" for twin, value in twins if value is not None)
        rest = "" if left is None or progress.done == progress.cells else f"  {duration(left)} left"
        width = len(str(progress.cells))
        with contextlib.suppress(OSError):  # as above
            self.console.print(
                f"{progress.done:>{width}}/{progress.cells}  {latest.cell}: {what}{rest}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def duration(seconds: float) -> str:
    """Write a duration.

    >>> duration(42), duration(130), duration(9000)
    ('42 s', '2 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Pace:
    """Steps per second, a running mean."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def tick(self, seconds: float) -> None:
        """Add the seconds of one step."""
        self._seconds = 0.95 * self._seconds + 0.05 * seconds if self._seconds else seconds

    def __str__(self) -> str:
        if not self._seconds:
            return "–"
        pace = 1 / self._seconds
        return f"{pace:.0f}" if pace >= 10 else f"{pace:.2f}"


class Mean:
    """The mean of the values since the last :meth:`take`."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """Add one value."""
        self._sum, self._count = self._sum + value, self._count + 1

    def take(self) -> float:
        """Return the mean, and start again."""
        mean = self._sum / self._count if self._count else float("nan")
        self._sum, self._count = 0.0, 0
        return mean


def engine(state: Mapping[str, Any]) -> str:
    """Return a line: how many layers the engine runs, or why it is off."""
    if "choices" not in state:
        return f"engine: {state['kind']} ({state['reason']})"
    sparse = sum(choice["sparse"] for choice in state["choices"])
    layers = len(state["choices"]) + len(state["refused"])
    return f"engine: {sparse} of {layers} layers run sparse ({state['kind']})"


def outcome(record: Mapping[str, Any]) -> Table:
    """Return the table at the end of a run, with a column for each of its networks."""
    found = networks(record)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("")
    for twin in found:
        name = f"{twin} {'twin' if len(found) == 2 else 'network'}"
        table.add_column(name, justify="right", style=COLOURS[twin])
    for label, values in _rows(record, found):
        table.add_row(label, *(values[twin] for twin in found))
    return table


def _rows(
    record: Mapping[str, Any], found: Mapping[Twin, Mapping[str, Any]]
) -> Iterator[tuple[str, Mapping[Twin, str]]]:
    """Yield the rows of the table: a label, and a text for each network."""
    details = record["details"]

    def each(write: Callable[[Any], str], key: str) -> dict[Twin, str]:
        return {twin: write(network[key]) for twin, network in found.items()}

    yield "test accuracy", each(percent, "accuracy")
    if all("bits" in network for network in found.values()):
        yield "bits of a character", each(_bits, "bits")
    if "sparse" not in found:
        yield "parameters", {"dense": f"{details['parameters']:,}"}
    else:
        yield from _sparse_rows(record, found["sparse"])
    yield "bytes on disk", each("{:,}".format, "bytes")


def _sparse_rows(
    record: Mapping[str, Any], sparse: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[Twin, str]]]:
    """Yield the rows of a run with a sparse network, with a dense twin or without."""
    details = record["details"]
    tuned = details["finetune_flops"] / details["train_flops_dense"]
    asked, spent = details["sparsity_asked"], details.get("time") or {}
    for label, left, right in (
        ("sparsity asked", "–" if asked is None else percent(100 * asked), ""),
        ("sparsity reached", percent(100 * sparse["sparsity"]), percent(0)),
        ("weights kept", f"{sparse['nnz']:,}", f"{details['prunable']:,}"),
        (
            "inference FLOPs, share of dense",
            percent(100 * record["inference_flops_ratio"]),
            percent(100),
        ),
        (
            "training FLOPs, share of dense",
            percent(100 * record["train_flops_ratio"]),
            f"+{percent(100 * tuned)} fine-tuning" if tuned else "the same run",
        ),
        (
            "time of a training step",
            milliseconds(spent.get("sparse_step_ms")),
            milliseconds(spent.get("dense_step_ms")),
        ),
    ):
        yield label, {"sparse": left, "dense": right}


def percent(value: float) -> str:
    """Write a percentage."""
    return f"{value:.2f} %"


def _bits(value: float) -> str:
    """Write the bits of a character of the test text."""
    return f"{value:.3f}"


def milliseconds(value: float | None) -> str:
    """Write a time; a dash if it was not measured."""
    return "–" if value is None else f"{value:.1f} ms"
