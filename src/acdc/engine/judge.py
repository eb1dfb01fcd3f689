"""Times whole steps, and says what is switched off in the present one.

A step is timed from the start of its first forward pass to the end of the optimizer's step and of
what the sparsifier does after it. So an evaluation, a checkpoint or the loading of a batch before
the step does not count, and several forward and backward passes for one step count together. A step
belongs to the kind of its first forward pass: its mode and its size. Each kind has a trial
(``verdict.py``). A forward pass in evaluation mode, without gradients, has one by itself.

The dense steps that a trial compares with are steps of the same sparse phase, computed by masked
dense PyTorch. They have what switching off would leave: the batches of the same size, a compiled
model where there is one, and the masks. And a kind that appears in the middle of a sparse phase, or
a run that begins sparse, has no other dense steps.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acdc.engine.locks import Lock
from acdc.engine.verdict import Off, Trial, Verdict
from acdc.processes import ALONE

NEAR = 1.25  # the sizes of the batches of one kind are within this factor
MOST = 64  # kinds that are judged; PyTorch computes any further ones
OPTIMIZER = "optimizer steps of kept weights"
ENGINE = "the engine"  # the only part of a kind that has no others
TRAINING = "training"

Layers = tuple[str, ...]


def clock() -> float:
    """Return the time in seconds."""
    return time.perf_counter()


def part_of(layers: Layers) -> str:
    """Return the name of the part that a segment is.

    >>> part_of(("conv1",)), part_of(("conv1", "conv2", "fc"))
    ('conv1', 'conv1 to fc')
    """
    return layers[0] if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"


def kind_of(mode: str, values: Iterable[Tensor]) -> str:
    """Return the kind of a forward pass: its mode, its number of values, and the size of images.

    The number is rounded to a power of ``NEAR``: batches of texts differ a little in length.

    >>> images, tokens = torch.empty(128, 3, 32, 32), torch.empty(18, 60)
    >>> kind_of("training", [images])
    'training, about 420,000 values, images of 32x32'
    >>> kind_of("training", [tokens]) == kind_of("training", [tokens[:16]])
    True
    """
    values = list(values)
    size = NEAR ** round(math.log(max(1, sum(x.numel() for x in values)), NEAR))
    images = [f"images of {x.shape[2]}x{x.shape[3]}" for x in values if x.dim() == 4]
    return ", ".join([mode, f"about {float(f'{size:.2g}'):,.0f} values", *images])


@dataclass(frozen=True)
class Pass:
    """How a forward pass is computed.

    Args:
        plain: By PyTorch as a whole.
        evaluation: Its kind, if the pass is timed by itself.
        began: The time of its start.
        values: The number of values in its input.

    """

    plain: bool = False
    evaluation: str | None = None
    began: float = 0.0
    values: int = 0


@dataclass
class _Step:
    """A step that has begun.

    Args:
        kind: Of its first forward pass.
        host: The name of the module of that pass; None if no pass was noted.
        training: The mode of that module.
        began: The time of its start.
        values: The number of values that this module got in this step so far.
        keeps: Whether the optimizer asked if it may step kept weights alone.

    """

    kind: str
    host: str | None
    training: bool
    began: float
    values: int = 0
    keeps: bool = False


class _Thread(threading.local):
    """What one thread computes now.

    Attributes:
        off: The parts that are switched off.
        ran: The segments of the present step so far, by name; None in an evaluation.

    """

    off: Off = frozenset()
    ran: dict[str, Layers] | None = None


class Judge:
    """Has a trial for each kind of steps.

    Args:
        judges: Whether anything is timed. Otherwise nothing is ever switched off.

    Attributes:
        trials: Kind -> its trial.
        peers: The processes that train the model together.

    """

    def __init__(self, judges: bool) -> None:
        self.judges = judges
        self.trials: dict[str, Trial] = {}
        self.peers = ALONE
        self._step: _Step | None = None
        self._ended = clock()  # the last step
        self._thread = _Thread()
        self._lock = Lock(rank=2)

    # --- forward passes ---------------------------------------------------------------------------

    def begin(self, host: str, training: bool, values: Iterable[Tensor]) -> Pass:
        """Note the start of a forward pass, and return how it is computed.

        Args:
            host: The name of the module.
            training: Whether the module is in training mode.
            values: The tensors among its arguments.

        """
        if not self.judges:
            return Pass()
        values = list(values)
        count = sum(x.numel() for x in values)
        with self._lock:
            if not training and not torch.is_grad_enabled():
                kind = kind_of(f"evaluation of {host}" if host else "evaluation", values)
                if not self._is_one_too_many(kind):
                    self.trials.setdefault(kind, Trial((ENGINE,)))
                self._thread.off, self._thread.ran = frozenset(), None
                return Pass(self._is_dense(kind), kind, clock(), count)
            if torch.is_grad_enabled() and self._begins_step(training):
                self._open(self._kind_of_step(training, values), host, training)
            if self._step is None:
                kind = self._kind_of_step(training, values)
            else:
                kind = self._step.kind
                self._step.values += count * (self._step.host == host)
            self._thread.off = self._off(kind)
            return Pass(self._is_dense(kind))

    def _begins_step(self, training: bool) -> bool:
        """Return whether a forward pass with gradients is the first one of a step.

        What began in evaluation mode was perhaps no step, and what began with the optimizer perhaps
        made its state only.
        """
        step = self._step
        return step is None or step.host is None or (training and not step.training)

    def _open(self, kind: str, host: str | None, training: bool) -> _Step:
        self._step = _Step(kind, host, training, clock())
        self._thread.ran = {}
        return self._step

    def end(self, this: Pass) -> None:
        """Note the end of a forward pass."""
        with self._lock:
            if this.evaluation in self.trials:
                self.trials[this.evaluation].add((clock() - this.began) / max(1, this.values))

    def skips(self, layers: Layers) -> bool:
        """Return whether PyTorch computes a segment of these layers in this pass."""
        if self._thread.ran is not None:
            self._thread.ran[part_of(layers)] = layers
        return part_of(layers) in self._thread.off

    def _is_dense(self, kind: str) -> bool:
        if kind in self.trials:
            return self.trials[kind].is_dense
        return self._is_one_too_many(kind)

    def _is_one_too_many(self, kind: str) -> bool:
        # The one kind of several processes has a trial in each, however often one evaluates.
        return kind not in self.trials and len(self.trials) >= MOST and kind != TRAINING

    def _off(self, kind: str) -> Off:
        return self.trials[kind].off if kind in self.trials else frozenset()

    # --- steps of the optimizer -------------------------------------------------------------------

    def keeps_steps(self) -> bool:
        """Return whether the optimizer may step the kept elements of large weights alone."""
        if not self.judges:
            return True
        with self._lock:
            step = self._step or self._open(self._kind_of_step(True, ()), None, True)
            step.keeps = True
            kind = step.kind
            return OPTIMIZER not in self._off(kind) and not self._is_dense(kind)

    def end_step(
        self, doubt: Callable[[Layers], float], agree: Callable[[Any], Any], must: bool
    ) -> Trial | None:
        """Note the end of an executed step, and return its trial if that decides on the next one.

        Args:
            doubt: Returns how doubtful the gain of a segment of these layers is.
            agree: Gives every process the value of the first one.
            must: This step counts although no forward pass was noted: other processes count it.

        """
        now = clock()
        with self._lock:
            step, self._step = self._step, None
            if step is None and must:
                step = _Step(self._kind_of_step(True, ()), None, True, self._ended)
            self._ended = now
            if step is None or not self.judges:
                return None
            if self._is_one_too_many(step.kind):
                return None
            if step.kind not in self.trials:
                self.trials[step.kind] = Trial(self._parts(step, doubt))
            trial = self.trials[step.kind]
            # Per value: the batches of one kind differ a little.
            if not trial.add((now - step.began) / max(1, step.values)):
                return None
        trial = Trial.of(agree(trial.state()))
        self.trials[step.kind] = trial
        return trial

    def _parts(self, step: _Step, doubt: Callable[[Layers], float]) -> Sequence[str]:
        """Return the parts of a step, the most doubtful first. The optimizer was never timed."""
        ran = self._thread.ran or {}
        segments = sorted(ran, key=lambda name: -doubt(ran[name]))
        return [OPTIMIZER] * step.keeps + segments or [ENGINE]

    def _kind_of_step(self, training: bool, values: Iterable[Tensor]) -> str:
        """Return the kind of a step.

        With several processes all steps are one kind. The batches of two processes may differ in
        size, and the processes must switch at the same step.
        """
        if self.peers:
            return TRAINING
        if not (values := list(values)):
            return "optimizer steps alone"
        return kind_of(TRAINING if training else "gradients in evaluation mode", values)

    def drop(self) -> None:
        """Forget the start of the present step: it changes in the middle, and is not timed."""
        self._step = None

    # --- the verdicts -----------------------------------------------------------------------------

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The verdicts so far."""
        settled = ((kind, trial) for kind, trial in self.trials.items() if trial.settled)
        return tuple(Verdict.of(kind, trial) for kind, trial in settled)

    def forget(self) -> None:
        """Judge everything anew."""
        self.trials = {}

    def state(self) -> dict[str, Any]:
        """Return the trials, the unfinished ones included."""
        with self._lock:
            return {kind: trial.state() for kind, trial in self.trials.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with the trials of a state."""
        with self._lock:
            self.trials = {kind: Trial.of(trial) for kind, trial in state.items()}
