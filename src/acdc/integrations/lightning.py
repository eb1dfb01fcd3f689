"""A callback for Lightning's ``Trainer``.

>>> from acdc.integrations.lightning import SparsifierCallback      # doctest: +SKIP
>>> callback = SparsifierCallback(method, "out")                    # doctest: +SKIP
>>> Trainer(max_epochs=100, callbacks=[callback]).fit(module)       # doctest: +SKIP
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from acdc.errors import InputError, need
from acdc.integrations.shared import check_folder, progress, refuse_sharded, resolved, result
from acdc.methods.base import Method
from acdc.result import Result
from acdc.sparsifier import Sparsifier

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:  # the same library under its older name
            from pytorch_lightning import Callback
        except ImportError as missing:
            raise need("lightning", "lightning") from missing


class SparsifierCallback(Callback):
    """Trains the module of a Lightning ``Trainer`` by a method, and saves the result.

    The sparsifier's state is in every checkpoint of the trainer. ``trainer.fit(ckpt_path=...)``
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
        InputError: At the start of training: the schedule is not as long as the run, the strategy
            divides the weights among processes, the method takes one optimizer and the module has
            several, or the checkpoint was saved without this callback.
    """

    def __init__(self, method: Method[Any], folder: str | os.PathLike[str]) -> None:
        self.method, self.folder = method, folder
        self.sparsifier: Sparsifier | None = None
        self.result: Result | None = None
        self._loaded: dict[str, Any] | None = None
        self._taken = False  # whether the end of training has passed

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on from a checkpoint that has no state of the sparsifier."""
        fits = trainer.state.fn == "fit"
        if fits and checkpoint["global_step"] and self.state_key not in checkpoint["callbacks"]:
            raise InputError(
                f"The checkpoint of step {checkpoint['global_step']} was saved without a "
                f"SparsifierCallback, and its sparsifier cannot be restored. To start from trained "
                f"weights, load them into the module and call fit() without ckpt_path."
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the sparsifier. Lightning has loaded the weights of a checkpoint before."""
        self._remove()
        loaded, self._loaded, self.result, self._taken = self._loaded, None, None, False
        refuse_sharded(type(trainer.strategy).__name__)
        method = resolved(self.method, *_length(trainer, pl_module))
        check_folder(self.folder, method)
        if loaded is None and trainer.global_step:
            raise InputError(
                f"The trainer goes on at step {trainer.global_step} without a checkpoint, and the "
                f"new optimizer and the schedule would not fit together. Call fit(ckpt_path=...), "
                f"or fit() of a new trainer."
            )
        # What the strategy has made of the module: it shows a DistributedDataParallel.
        model = trainer.strategy.model
        self.sparsifier = Sparsifier(method, model, trainer.optimizers, state=loaded)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log progress, phase and sparsity."""
        assert self.sparsifier is not None
        pl_module.log_dict(progress(self.sparsifier))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the result, before anything else is loaded into the module."""
        assert self.sparsifier is not None
        self.result, self._taken = result(self.sparsifier), True

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the result. The trainer has written its last checkpoint before."""
        assert self.sparsifier is not None
        if not self._taken:  # resumed after the last step
            self.on_train_end(trainer, pl_module)
        if self.result is not None and trainer.is_global_zero:
            self.result.save(self.folder)
        self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let the module have another sparsifier, in a notebook for example."""
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """Return what the trainer's checkpoint holds."""
        return {} if self.sparsifier is None else self.sparsifier.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until there is an optimizer to attach to."""
        self._loaded = state_dict

    def _remove(self) -> None:
        if self.sparsifier is not None:
            self.sparsifier.remove()


def _length(trainer: Any, pl_module: Any) -> tuple[float | None, float | None, str]:
    """Return the optimizer steps in an epoch and in all, and the settings that decide them."""
    if not pl_module.automatic_optimization:
        return None, None, ""  # the module takes as many steps as it likes
    total = trainer.estimated_stepping_batches  # sets up the data, and knows accumulation
    accumulate = trainer.accumulate_grad_batches
    settings = (
        f"max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}, "
        f"accumulate_grad_batches={accumulate}, {trainer.num_training_batches} batches an epoch"
    )
    if not 0 < total < math.inf:
        raise InputError(
            f"The trainer has no end ({settings}), and a schedule has one. Set max_epochs or "
            f"max_steps."
        )
    batches = trainer.num_training_batches
    steps = math.ceil(batches / accumulate) if batches < math.inf else None
    return steps, total, settings
