"""Runs a recipe: trains, resumes, and writes what comes out.

The loop is plain; Lightning Fabric supplies devices, processes, precision and checkpoint files.
Everything random is a function of the seed and the step: a batch of (seed, epoch, index), dropout
of (seed, step, rank). So a resumed run needs no state of any generator, and ends bitwise where the
uninterrupted one ends, wherever it was stopped.

A run has one leg, or two: ``main`` trains by the method; ``finetune`` goes back to the end of the
last dense phase and trains the dense twin on over the steps in which the sparse one was trained.
The test data is measured after every epoch and decides nothing.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from acdc import cost
from acdc.errors import AcdcError, InputError, need
from acdc.files import Staging
from acdc.pair import DENSE, SPARSE, Pair, load_sparse, save_sparse, sizes
from acdc.runs.batchnorm import reestimate
from acdc.runs.data import Data
from acdc.runs.recipe import BEFORE, Recipe, encode
from acdc.runs.record import (
    Clocks,
    Event,
    Folder,
    Metrics,
    bits,
    machine,
    peak_memory,
    times,
    versions,
)
from acdc.sparsifier import Sparsifier

try:
    from lightning.fabric import Fabric
    from lightning.fabric.loggers.tensorboard import TensorBoardLogger
    from lightning.fabric.utilities.exceptions import MisconfigurationException
except ImportError as missing:
    raise need("lightning", "lab") from missing

if TYPE_CHECKING:
    from acdc.runs.engine import RunEngine

FORMAT = 1  # of checkpoints
Leg = Literal["main", "finetune"]
Watch = Callable[[Event], None]


class Interrupted(AcdcError):
    """The run was asked to stop, wrote a checkpoint, and stopped. ``signal`` is the signal."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


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

    Raises:
        InputError: Anything the user can mend. What was trained is in the last checkpoint.
        Interrupted: The run was stopped by SIGTERM or SIGINT after writing a checkpoint.
    """
    place = Folder(folder)
    fabric = _fabric(recipe, device, folder)
    if resume and place.record.exists():
        return place.read(place.record)
    if resume:
        recipe = _as_begun(recipe, place)
    _check_free(place, recipe, resume)
    fabric.launch()
    threads = torch.get_num_threads()
    try:
        # The generator is the process's own: what the run draws from it is put back.
        with torch.random.fork_rng(enabled=True), stop_signals() as stop:
            if recipe.threads is not None:
                torch.set_num_threads(recipe.threads)
            data = recipe.data.load(root, download)
            worker = _Run(recipe, place, fabric, data, stop, watch or (lambda _: None))
            if fabric.is_global_zero and not resume:
                # Not before: a run that cannot start leaves no folder in the way of the next try.
                place.write(place.recipe, _identity(recipe, changed or {}))
            return worker.go(command, resume)
    except OSError as error:
        raise InputError(
            f"The run in {folder} stopped: {error.strerror or error}. {_kept(place)} Free some "
            f"space if the disk is full, then go on with --resume."
        ) from error
    finally:
        torch.set_num_threads(threads)


class _Run:
    """One run while it is running."""

    def __init__(
        self,
        recipe: Recipe,
        place: Folder,
        fabric: Fabric,
        data: Data,
        stop: list[int],
        watch: Watch,
    ) -> None:
        self.recipe, self.place, self.fabric, self.data = recipe, place, fabric, data
        self.stop, self.watch = stop, watch
        self.per_epoch = data.steps_per_epoch(recipe.batch_size)
        self.local_batch = recipe.batch_size // fabric.world_size

        torch.manual_seed(recipe.seed)
        self.net = recipe.model.build()
        if recipe.start is not None:
            _start_from(place.path.parent / recipe.start, self.net)
        if recipe.channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.method = recipe.method.resolve(self.per_epoch)
        self.schedule = self.method.resolved
        kinds = [phase.kind for phase in self.schedule.phases]
        if self._leaves != "dense" and kinds[-1] == "dense":
            raise InputError(
                f"The run ends {' and '.join(kinds[-2:])}. A pair needs a last dense phase, whose "
                f"end is the dense twin, and a sparse one after it."
            )
        self.optimizer = recipe.optimizer.build(self.net.parameters())
        self.model, self.stepper = fabric.setup(self.net, self.optimizer)
        # Before the sparsifier's own hook, so that a phase is measured before the next one begins.
        self.optimizer.register_step_post_hook(self._after_step)
        self.engine, self.engine_start = self._engine()
        self.sparsifier = Sparsifier(self.method, self.net, self.optimizer, engine=self.engine)
        self.network = cost.measure(self.net, recipe.model.example(1).to(fabric.device))

        self.leg: Leg = "main"
        self.step = 0  # executed optimizer steps of this leg, on the clock of the main leg
        self.batches = 0  # batches drawn: more than steps where a GradScaler skipped some
        self.batches_at_twin = 0
        self.seconds = 0.0
        self.epoch_ends = set(accumulate(self.schedule.steps_per_epoch))
        self.metrics: Metrics | None = None
        self.measured: Event | None = None  # the evaluation that is due with this step
        self.tested = Clocks()  # what it took

    def _engine(self) -> tuple[RunEngine | None, Event]:
        """Return the engine, if the run has one, and what is said of it at the start."""
        recipe = self.recipe
        if recipe.engine == "off" or self.schedule.last("sparse") is None:
            return None, {"kind": "off", "reason": None}
        # Here, because it takes a while to load and a run without it need not wait.
        from acdc.runs.engine import RunEngine, why_off

        if reason := why_off(self.fabric.device, recipe.precision):
            return None, {"kind": "off", "reason": reason}
        example = recipe.model.example(self.local_batch // recipe.accumulate)
        engine = RunEngine(self.net, self._placed(example), recipe.engine)
        return engine, engine.start()

    def _after_step(self, *_: Any) -> None:
        """Count the executed step; at the end of an epoch, measure the network as it left it."""
        phase = self.schedule.phase_at(self.step).kind
        self.step += 1
        if self.step in self.epoch_ends:
            # The sparsifier has yet to see what the step left.
            with self.sparsifier.view() if self.leg == "main" else nullcontext():
                self.measured = self._eval_event("dense" if self.leg == "finetune" else phase)
            self.net.train()

    # --- the whole ------------------------------------------------------------------------------

    def go(self, command: str, resume: bool) -> dict[str, Any]:
        """Train both legs and return the record."""
        resumed = resume and self.place.checkpoint.exists()
        size = self._load() if resumed else 0
        if self.fabric.is_global_zero:
            self.metrics = Metrics(self.place.metrics, size)
        self.started = time.perf_counter() - self.seconds
        try:
            if resumed:
                self.watch(self._start_event())
            else:
                self._emit(self._start_event())
                if self._emit_changes(0, self._built):  # some schedules begin sparse
                    self._checkpoint()
            if self.leg == "main":
                self._train()
                self._end_main()
            if self.leg == "finetune":
                self._train()
            return self._finish(command)
        finally:
            if self.metrics is not None:
                self.metrics.close()
                self.fabric.logger.finalize("success")  # flushes; the run may have stopped

    def _end_main(self) -> None:
        """Save the pair as it is now; go back to the dense twin if it is to be trained on."""
        dense = self.sparsifier.dense_weights
        self.sparsifier.remove()
        if self._leaves != "pair":
            return
        if self.fabric.is_global_zero:
            self._pair(dense).save(self.place.pair)
        twin = self.sparsifier.dense_twin
        if self.recipe.dense_finetune and twin is not None:
            twin.restore(self.net, self.optimizer)
            self.leg, self.step, self.batches = "finetune", twin.step, self.batches_at_twin
            self._checkpoint()

    @property
    def _leaves(self) -> Literal["pair", "sparse", "dense"]:
        """What comes out: a sparse network and its dense twin, or one of them alone."""
        ends = self.schedule.phases[-1].kind
        if self.method.sparsity is None or (self.method.ends_dense and ends == "dense"):
            return "dense"
        twins = self.schedule.last("dense") is not None or self.method.training.is_network
        return "pair" if twins else "sparse"

    def _pair(self, dense: dict[str, Tensor]) -> Pair:
        """Return the twins. The dense one is the end of the last dense phase, or what a method that
        keeps dense weights has at the end."""
        if not dense:
            return self.sparsifier.pair(**self._facts())
        state = _on_cpu(self.net.state_dict())
        facts = self._facts() | {"method": self.method.name, "step": self.step}
        return Pair(state, state | _on_cpu(dense), self.sparsifier.support.to("cpu"), facts)

    def _facts(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.name,
            "seed": self.recipe.seed,
            "sparsity_asked": self.method.sparsity,
        }

    # --- training -------------------------------------------------------------------------------

    def _train(self) -> None:
        """Train the leg to its end."""
        self.net.train()
        while self.step < self.schedule.total:
            epoch, index = divmod(self.batches, self.per_epoch)
            batches = self.data.train_batches(
                epoch,
                self.local_batch,
                self.recipe.seed,
                start=index,
                rank=self.fabric.global_rank,
                world=self.fabric.world_size,
            )
            for x, y in batches:
                self._train_step(x, y)
                if self.step >= self.schedule.total:
                    break

    def _train_step(self, x: Tensor, y: Tensor) -> None:
        """Take one optimizer step and everything that is due after it."""
        began, before, changes = Clocks.now(), self.step, len(self.sparsifier.changes)
        built, self.tested = self._built, Clocks()
        phase = "dense" if self.leg == "finetune" else self.schedule.phase_at(before).kind
        lr = self.recipe.optimizer.lr * self.recipe.lr.factor(before, self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(
            hash((self.recipe.seed, self.batches, self.fabric.global_rank)) & (2**63 - 1)
        )
        loss, stop = self._agreed(self._backward(self._placed(x), y.to(self.fabric.device)))
        if not math.isfinite(loss):
            raise InputError(self._diverged(loss))
        if self.recipe.clip is not None:
            self.fabric.clip_gradients(self.model, self.stepper, max_norm=self.recipe.clip)
        self.stepper.step()
        self.stepper.zero_grad()
        self.batches += 1
        if self.step == before:
            return  # the GradScaler found an overflow and skipped the step
        built = self._built.minus(built)
        # Both took place in stepper.step().
        taken = Clocks.now().minus(began).minus(built).minus(self.tested)
        event = {"event": "step", "step": self.step, "epoch": math.floor(
            self.schedule.epoch_at(before)), "phase": phase, "loss": loss, "lr": lr}  # fmt: skip
        self._emit(event | taken.event() | self._twin_mark())
        if self.measured is not None:
            self._emit(self.measured)
            if not math.isfinite(self.measured["loss"]):
                raise InputError(self._diverged(self.measured["loss"]))
            self.measured = None
        chosen = self._emit_changes(changes, built)
        twin = self.sparsifier.dense_twin
        if twin is not None and twin.step == self.step and self.leg == "main":
            self.batches_at_twin = self.batches
        if self.fabric.world_size == 1 and self.stop:
            stop = self.stop[0]
        if stop or chosen or self.step % self.recipe.checkpoint_steps == 0:
            self._checkpoint()
        if stop:
            raise Interrupted(
                f"Stopped at step {self.step} of {self.schedule.total} "
                f"({signal.Signals(stop).name}). Nothing is lost: go on with --resume.",
                stop,
            )

    @property
    def _built(self) -> Clocks:
        """What the engine has spent on compressions."""
        return Clocks() if self.engine is None else self.engine.taken

    def _emit_changes(self, first: int, taken: Clocks) -> bool:
        """Say how the support changed, and the engine with it.

        Args:
            first: The changes before it have been said.
            taken: What the engine spent on them.

        Returns:
            Whether the engine made a choice. It has to be on the disk before a step is computed by
            it: chosen anew after a stop, it could be another one.
        """
        changes = self.sparsifier.changes[first:]
        for change in changes:
            self._emit({"event": "change"} | vars(change))
        if self.engine is None or not any(change.to == "sparse" for change in changes):
            return False
        news = self.engine.news()
        event = {"event": "engine", "step": self.step, **self.engine.start(), **news}
        self._emit(event | taken.event())
        return bool(news)

    def _agreed(self, loss: float) -> tuple[float, int]:
        """Return the mean loss of all processes, and the signal that one of them has been sent.

        A process that stopped alone would leave the others waiting for it.
        """
        if self.fabric.world_size == 1:
            return loss, 0
        mine = torch.tensor([loss, self.stop[0] if self.stop else 0], device=self.fabric.device)
        every = cast(Tensor, self.fabric.all_gather(mine))
        return float(every[:, 0].mean()), int(every[:, 1].max())

    def _backward(self, x: Tensor, y: Tensor) -> float:
        """Accumulate the gradients of the mean loss over a batch, and return the loss."""
        total = torch.zeros((), device=self.fabric.device)
        parts = list(zip(x.chunk(self.recipe.accumulate), y.chunk(self.recipe.accumulate),
                         strict=True))  # fmt: skip
        for number, (inputs, targets) in enumerate(parts, start=1):
            later = number < len(parts) and self.fabric.world_size > 1
            with self.fabric.no_backward_sync(self.model) if later else nullcontext():
                loss = nn.functional.cross_entropy(
                    self.model(inputs), targets, label_smoothing=self.recipe.label_smoothing
                ) * (len(inputs) / len(x))
                self.fabric.backward(loss)
            total += loss.detach()
        return float(total)

    def _placed(self, x: Tensor) -> Tensor:
        x = x.to(self.fabric.device)
        if self.recipe.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x

    def _diverged(self, loss: float) -> str:
        return (
            f"The loss is {loss} at step {self.step} of {self.schedule.total}: training diverged. "
            f"{_kept(self.place)} Lower optimizer.lr (now {self.recipe.optimizer.lr:g}), add "
            f"--set clip=1.0, or lengthen lr.warmup, and start a new run."
        )

    # --- measuring ------------------------------------------------------------------------------

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Return accuracy in percent and mean loss on the test data; for text, bits as well."""
        self.net.eval()
        right, loss, seen = 0, 0.0, 0
        for x, y in self.data.eval_batches("test", self.recipe.eval_batch_size):
            y = y.to(self.fabric.device)
            outputs = self.model(self._placed(x)).float()
            right += int((outputs.argmax(1) == y).sum())
            loss += float(nn.functional.cross_entropy(outputs, y, reduction="sum"))
            seen += y.numel()
        found = {"accuracy": 100 * right / seen, "loss": loss / seen}
        return found | ({"bits": bits(loss / seen)} if self.recipe.data.quality == "bits" else {})

    def _eval_event(self, phase: str) -> Event:
        """Measure the network as the last step of ``phase`` left it."""
        began = Clocks.now()
        found = self._evaluate()
        self.tested = Clocks.now().minus(began)
        support = self.sparsifier.support
        dense = self.leg == "finetune"
        return (
            {
                "event": "eval",
                "step": self.step,
                "epoch": math.floor(self.schedule.epoch_at(self.step)),
                "phase": phase,
                "split": "test",
                **found,
                "nnz": support.numel if dense else support.nnz,
                "sparsity": 0.0 if dense else support.sparsity,
            }
            | self.tested.event()
            | self._twin_mark()
        )

    def _twin_mark(self) -> Event:
        return {"twin": "dense"} if self.leg == "finetune" else {}

    def _start_event(self) -> Event:
        pruned = self.sparsifier.params
        return {
            "event": "start",
            "step": 0,
            "total_steps": self.schedule.total,
            **self.schedule.to_dict(),
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "numel": layer.weights,
                    "positions": layer.positions,
                    "prunable": layer.name in pruned,
                }
                for layer in self.network.layers
            ],
            "refused": self.sparsifier.refused,
            "engine": self.engine_start,
        }

    def _emit(self, event: Event) -> None:
        if self.metrics is None:
            return
        self.metrics.write(event)
        self.watch(event)
        if event["event"] in ("step", "eval"):
            group = event.get("twin", "dense" if self._leaves == "dense" else "sparse")
            numbers = {k: event[k] for k in ("loss", "lr", "accuracy", "sparsity") if k in event}
            self.fabric.log_dict(
                {f"{event['event']}/{group}/{k}": v for k, v in numbers.items()}, event["step"]
            )

    # --- checkpoints ----------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        """Replace the last checkpoint by one of this moment."""
        self.seconds = time.perf_counter() - self.started
        state = {
            "format": FORMAT,
            "recipe": encode(self.recipe),
            "data": self.data.digest(),
            "leg": self.leg,
            "step": self.step,
            "batches": self.batches,
            "batches_at_twin": self.batches_at_twin,
            "seconds": self.seconds,
            "metrics": self.metrics.sync() if self.metrics is not None else 0,
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": self.sparsifier.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
        }
        if not self.fabric.is_global_zero:
            self.fabric.save(self.place.checkpoint, state)  # writes nothing, and waits
            self.fabric.barrier()
            return
        with Staging(self.place.checkpoint.parent, "the checkpoint") as staging:
            self.fabric.save(staging.place(self.place.checkpoint.name), state)
            staging.commit()
        self.fabric.barrier()

    def _load(self) -> int:
        """Go back to the last checkpoint, and return the size of the metrics file at the time."""
        path = self.place.checkpoint
        try:
            state = self.fabric.load(path, weights_only=True)
        except Exception as error:
            raise InputError(
                f"The checkpoint {path} cannot be read ({type(error).__name__}: {error}). Restore "
                f"it from a copy, or start the run anew in another folder."
            ) from error
        if state.get("format") != FORMAT:
            raise InputError(
                f"The checkpoint {path} has format {state.get('format')!r}, and this version of "
                f"acdc reads format {FORMAT}."
            )
        if (old := BEFORE | state["recipe"]) != encode(self.recipe):
            raise InputError(
                f"The checkpoint {path} is of another recipe: "
                f"{_first_difference(old, encode(self.recipe))}. Resume with the same "
                f"--set values and the same version of acdc."
            )
        if state["data"] != self.data.digest():
            raise InputError(
                f"The run in {self.place.path} was trained on other data than is found now. Point "
                f"ACDC_DATA to the data it was started with."
            )
        self.leg = state["leg"]
        self.step, self.batches = state["step"], state["batches"]
        self.batches_at_twin, self.seconds = state["batches_at_twin"], state["seconds"]
        self.sparsifier.load_state_dict(state["sparsifier"])
        if self.leg == "finetune":
            self.sparsifier.remove()
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        return int(state["metrics"])

    # --- the end --------------------------------------------------------------------------------

    def _finish(self, command: str) -> dict[str, Any]:
        """Write the final pair and the record, from the files as they will be read."""
        if self._leaves == "pair":
            twins = self._final_pair()
        else:
            self._reestimate()
            twins = self._final_dense() if self._leaves == "dense" else self._final_sparse()
        self.seconds = time.perf_counter() - self.started
        record = twins | self._costs()
        record |= {"seconds": round(self.seconds, 3), "run": str(self.place.path)}
        record["details"] = self._details(command)
        if self.fabric.is_global_zero:
            assert self.metrics is not None
            self.metrics.sync()
            record["details"]["time"] = times(self.place.metrics)
            self.place.write(self.place.record, record)
        self.fabric.barrier()
        return record

    def _final_pair(self) -> dict[str, Any]:
        folder = self.place.pair
        self.fabric.barrier()
        pair = Pair.load(folder)
        if self.leg == "finetune":
            facts = pair.facts | {"dense_step": self.step, "dense_finetuned": True}
            pair = replace(pair, dense=_on_cpu(self.net.state_dict()), facts=facts)
        if self.recipe.bn_batches:
            states = []
            for state in (pair.sparse, pair.dense):
                self.net.load_state_dict(state)
                self._reestimate()
                states.append(_on_cpu(self.net.state_dict()))
            facts = pair.facts | {"bn_batches": self.recipe.bn_batches}
            pair = replace(pair, sparse=states[0], dense=states[1], facts=facts)
        self.fabric.barrier()
        if self.fabric.is_global_zero:
            pair.save(folder)
        self.fabric.barrier()
        pair = Pair.load(folder)
        pair.dense_model(self.net)
        dense = self._evaluate()
        pair.sparse_model(self.net)
        sparse = self._evaluate()
        size = sizes(folder)
        return {
            "sparse": {
                **sparse,
                "sparsity": pair.support.sparsity,
                "nnz": pair.support.nnz,
                "bytes": size["sparse"],
            },
            "dense": {**dense, "bytes": size["dense"]},
        }

    def _final_dense(self) -> dict[str, Any]:
        from safetensors.torch import save

        state = {key: value.contiguous() for key, value in _on_cpu(self.net.state_dict()).items()}
        if self.fabric.is_global_zero:
            with Staging(self.place.pair, "the trained network") as staging:
                staging.add(DENSE, save(state))
                staging.commit()
        self.fabric.barrier()
        size = (self.place.pair / DENSE).stat().st_size
        return {"sparse": None, "dense": {**self._evaluate(), "bytes": size}}

    def _final_sparse(self) -> dict[str, Any]:
        support = self.sparsifier.support.to("cpu")
        if self.fabric.is_global_zero:
            save_sparse(self.place.pair, _on_cpu(self.net.state_dict()), support)
        self.fabric.barrier()
        state, _ = load_sparse(self.place.pair)
        self.net.load_state_dict(state)
        return {
            "sparse": {
                **self._evaluate(),
                "sparsity": support.sparsity,
                "nnz": support.nnz,
                "bytes": (self.place.pair / SPARSE).stat().st_size,
            },
            "dense": None,
        }

    def _reestimate(self) -> None:
        if self.recipe.bn_batches:
            batches = self.data.train_batches(0, self.local_batch, self.recipe.seed)
            inputs = (self._placed(x) for x, _ in batches)
            reestimate(self.net, inputs, self.recipe.bn_batches)

    def _costs(self) -> dict[str, Any]:
        counts = self.sparsifier.support.counts()
        return {
            "inference_flops_ratio": self.network.inference_ratio(counts),
            "train_flops_ratio": self._ledger().ratio,
        }

    def _ledger(self) -> cost.Ledger:
        """Return the FLOPs of the run so far, from the supports it had."""
        return cost.Ledger.of(
            self.network,
            self.schedule,
            [(change.step, change.counts) for change in self.sparsifier.changes],
            self.method.training.flops,
            self.recipe.batch_size,
            self.data.train_samples,
        )

    def _details(self, command: str) -> dict[str, Any]:
        support, network = self.sparsifier.support, self.network
        counts = support.counts()
        kept = network.kept(counts)
        parameters = sum(p.numel() for p in self.net.parameters())
        ledger = self._ledger()
        # The dense twin took the steps of the last phase, densely.
        tail = ledger.phases[-1].dense_flops if self.leg == "finetune" else 0
        return {
            "recipe": self.recipe.name,
            "method": self.method.name,
            "data": self.data.name,
            "seed": self.recipe.seed,
            "epochs": self.schedule.epochs,
            "command": command,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
            "device": str(self.fabric.device),
            "devices": self.fabric.world_size,
            "sparsity_asked": self.method.sparsity,
            "sparsity_all_parameters": (support.numel - support.nnz) / parameters,
            "parameters": parameters,
            "prunable": support.numel,
            "dense_flops": network.flops(),
            "sparse_flops": network.flops(counts),
            "train_flops": ledger.flops,
            "train_flops_dense": ledger.dense_flops,
            "ledger": ledger.to_dict(),
            "finetune_flops": tail,
            "phases": [vars(phase) for phase in self.schedule.phases],
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "numel": layer.weights,
                    "nnz": kept[layer.name],
                    "positions": layer.positions,
                    "macs": layer.macs,
                    "density": kept[layer.name] / layer.weights,
                    "pruned": layer.name in counts,
                }
                for layer in network.layers
            ],
            "refused": self.sparsifier.refused,
            "engine": self.engine_start | (self.engine.chosen() if self.engine else {}),
            "peak_memory": peak_memory(),
            "dense_finetuned": self.leg == "finetune",
            "bn_reestimated": bool(self.recipe.bn_batches),
        }


# --- helpers ------------------------------------------------------------------------------------


def _fabric(recipe: Recipe, device: str, folder: Path) -> Fabric:
    try:
        return Fabric(
            accelerator=device,
            devices=recipe.devices,
            precision=recipe.precision,  # type: ignore[arg-type]
            loggers=TensorBoardLogger(folder, name="tensorboard", version=""),
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise InputError(
            f"The run cannot be set up on device {device!r} with devices={recipe.devices} and "
            f"precision={recipe.precision!r}: {error} Choose --device cpu, or other values."
        ) from error


def _identity(recipe: Recipe, changed: Mapping[str, str]) -> dict[str, Any]:
    """Return what ``recipe.json`` holds: all that a run is, before it has begun."""
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "values": encode(recipe),
        "changed": dict(changed),
    }


def _as_begun(recipe: Recipe, place: Folder) -> Recipe:
    """Return the recipe without the engine, if its run began when there was none."""
    if place.recipe.exists() and "engine" not in place.read(place.recipe)["values"]:
        return replace(recipe, engine="off")
    return recipe


def _check_free(place: Folder, recipe: Recipe, resume: bool) -> None:
    """See that the folder holds no run, or the very one that is to be resumed."""
    if not resume:
        if place.recipe.exists():
            raise InputError(
                f"{place.path} already holds a run. Go on with it by --resume, or choose another "
                f"folder with --out."
            )
        return
    if not place.recipe.exists():
        raise InputError(
            f"There is no run to resume in {place.path}. Leave --resume out to start it."
        )
    check_same(place, recipe)


def check_same(place: Folder, recipe: Recipe) -> None:
    """See that the folder's run, if it holds one, is of this very recipe.

    Raises:
        InputError: It is of another one.
    """
    if not place.recipe.exists():
        return
    old, new = BEFORE | place.read(place.recipe)["values"], encode(recipe)
    if old != new:
        raise InputError(
            f"The run in {place.path} has another recipe: {_first_difference(old, new)}. Resume "
            f"with the same --set values, or start a new run in another folder."
        )


def _start_from(folder: Path, net: nn.Module) -> None:
    """Load the dense network of a finished run.

    Raises:
        InputError: There is none, or it is of another model.
    """
    from safetensors.torch import load_file

    place = Folder(folder)
    place.read(place.record)
    path = place.pair / DENSE
    if not path.exists():
        raise InputError(
            f"start is {folder.name!r}, and that run left no dense network. Name a run of a method "
            f"that leaves one, such as dense."
        )
    try:
        net.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise InputError(
            f"start is {folder.name!r}, and that run trained another network ({error}). Name a run "
            f"with the same model."
        ) from error


def _kept(place: Folder) -> str:
    """Say what of the training is safe."""
    if place.checkpoint.exists():
        return f"What was trained until the last checkpoint is in {place.checkpoint}."
    return "No checkpoint was due yet."


def _first_difference(old: Any, new: Any, path: str = "") -> str:
    """Return the first value in which two encoded recipes differ, as words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    return f"{path} was {old!r} and is {new!r}"


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list that holds the signal, once one asks the process to stop."""
    caught: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt  # asked twice: stop now
        caught.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may set handlers
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
