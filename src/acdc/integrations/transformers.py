"""A callback for the ``Trainer`` of transformers.

>>> from acdc.integrations.transformers import SparsifierCallback           # doctest: +SKIP
>>> callback = SparsifierCallback(method, "out")                            # doctest: +SKIP
>>> Trainer(model, args, train_dataset=data, callbacks=[callback]).train()  # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from acdc.errors import InputError, need
from acdc.files import Staging
from acdc.integrations.shared import (
    check_folder,
    progress,
    refuse_sharded,
    resolved,
    result,
    steps_of,
)
from acdc.methods.base import Method
from acdc.result import Result
from acdc.sparsifier import Sparsifier

try:
    from transformers.trainer_callback import ExportableState, TrainerCallback
    from transformers.training_args import ParallelMode
except ImportError as missing:
    raise need("transformers", "transformers") from missing

_STATES = "sparsifier"  # the folder of the states, in output_dir
_FILE = re.compile(r"step-(\d+)-[0-9a-f]{16}\.pt")


class SparsifierCallback(TrainerCallback, ExportableState):
    """Trains the model of a ``Trainer`` by a method, and saves the result.

    Every checkpoint has a state of the sparsifier: the file ``sparsifier/step-N-HASH.pt`` beside
    it, which the checkpoint's ``trainer_state.json`` names. ``train(resume_from_checkpoint=...)``
    restores it.

    Args:
        method: What to do. A plan in epochs is resolved with the trainer's own number of optimizer
            steps in an epoch.
        folder: Where the result is saved at the end of training: a pair, or a sparse network alone
            if the method has no dense phase.

    Attributes:
        sparsifier: The sparsifier, from the start of training on.
        result: What training left, at its end.

    Raises:
        InputError: At the start of training: the schedule is not as long as the run, the weights
            are divided among processes, or a checkpoint has no state of the sparsifier.
    """

    def __init__(self, method: Method[Any], folder: str | os.PathLike[str]) -> None:
        self.method, self.folder = method, folder
        self.sparsifier: Sparsifier | None = None
        self.result: Result | None = None
        self._run: tuple[Any, Any] | None = None  # the arguments and the state of the trainer

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse a setting with which the trainer makes its callbacks anew."""
        if args.restore_callback_states_from_checkpoint:
            raise InputError(
                "restore_callback_states_from_checkpoint=True makes every callback anew, without "
                "the method. Set it to False: the sparsifier's state is restored without it."
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the sparsifier. The trainer has loaded the weights of a checkpoint before."""
        self.on_init_end(args, state, control)
        self._remove()
        self.result = None
        refuse_sharded(args.distributed_state.distributed_type.value)
        loader, accumulate = kwargs["train_dataloader"], args.gradient_accumulation_steps
        steps = steps_of(loader, accumulate)
        settings = f"num_train_epochs={args.num_train_epochs}, max_steps={args.max_steps}"
        method = resolved(self.method, steps, state.max_steps, settings)
        check_folder(self.folder, method)
        saved = self._load(args, state)
        # The trainer gives its callbacks the model without DistributedDataParallel around it.
        several = args.parallel_mode == ParallelMode.DISTRIBUTED
        self.sparsifier = Sparsifier(
            method,
            kwargs["model"],
            kwargs["optimizer"].optimizer,
            state=saved,
            process_group=torch.distributed.group.WORLD if several else None,
        )
        self._run = args, state
        self._take(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the last step, take the result: the trainer may load its best model later."""
        self._take(state, control)

    on_epoch_end = on_step_end  # training was stopped after an evaluation

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add progress, phase and sparsity to what the trainer logs."""
        if self._run is not None and self.sparsifier is not None:
            for entry in (logs, state.log_history[-1]):
                entry.update(progress(self.sparsifier))

    def state(self) -> dict[str, Any]:
        """Write the sparsifier's state, and return the name of the file.

        The trainer calls it whenever it saves a checkpoint, and writes ``trainer_state.json`` with
        what it returns at the very end. So a checkpoint that is whole has its file.
        """
        if self._run is None or self.sparsifier is None:
            return {"args": {}, "attributes": {}}
        args, state = self._run
        buffer = io.BytesIO()
        torch.save(self.sparsifier.state_dict(), buffer)
        data = buffer.getvalue()
        name = f"step-{state.global_step}-{hashlib.sha256(data).hexdigest()[:16]}.pt"
        with Staging(Path(args.output_dir) / _STATES, "the sparsifier's state") as staging:
            staging.add(name, data)
            staging.commit()
        return {"args": {}, "attributes": {"file": name}}

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove the states of checkpoints that the trainer has removed (save_total_limit)."""
        self._take(state, control)
        if not args.should_save or state.is_hyper_param_search:
            return
        there = {path.name for path in Path(args.output_dir).glob("checkpoint-*")}
        for path in (Path(args.output_dir) / _STATES).glob("step-*.pt"):
            match = _FILE.fullmatch(path.name)
            if match and f"checkpoint-{match[1]}" not in there:
                path.unlink(missing_ok=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the result. The trainer has written its last checkpoint before."""
        assert self.sparsifier is not None
        if self.result is None and args.load_best_model_at_end:
            warnings.warn(
                f"Training stopped after {self.sparsifier.step} optimizer steps, and the trainer "
                f"has loaded its best model since. No result was saved: the best model is of "
                f"another step than the sparsifier.",
                stacklevel=1,
            )
        elif self.result is None:
            self.result = result(self.sparsifier)
        if self.result is not None and state.is_world_process_zero:
            self.result.save(self.folder)
        self.on_save(args, state, control)
        self._remove()

    def _take(self, state: Any, control: Any) -> None:
        ended = state.global_step >= state.max_steps or control.should_training_stop
        if ended and self._run is not None and self.sparsifier is not None and not self.result:
            self.result = result(self.sparsifier)

    def _remove(self) -> None:
        self._run = None
        if self.sparsifier is not None:
            self.sparsifier.remove()

    def _load(self, args: Any, state: Any) -> dict[str, Any] | None:
        """Return the sparsifier's state of the checkpoint, if the trainer resumes from one."""
        if not state.global_step:
            return None
        entry = state.stateful_callbacks.get(type(self).__name__, {})
        if (name := entry.get("attributes", {}).get("file")) is None:
            raise InputError(
                f"The checkpoint of step {state.global_step} was saved without a "
                f"SparsifierCallback, and its sparsifier cannot be restored. To start from trained "
                f"weights, load them into the model and call train() without a checkpoint."
            )
        path = Path(args.output_dir) / _STATES / name
        if not path.exists():
            raise InputError(
                f"The checkpoint of step {state.global_step} needs the sparsifier's state {path}, "
                f"which is not there. Copy the folder {_STATES!r} together with the checkpoints."
            )
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest()[:16] not in name:
            raise InputError(f"{path} is truncated or altered. Resume from another checkpoint.")
        loaded: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return loaded
