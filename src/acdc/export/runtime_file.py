"""One network as the frozen file of a runtime."""

from __future__ import annotations

import copy
import os
from pathlib import Path

from torch import nn

from acdc.engine.example import Example
from acdc.index import Twin
from acdc.result import Result
from acdc.runtime.runtime import Runtime
from acdc.shards import check_whole
from acdc.states import load_into


def to_runtime(
    model: nn.Module,
    example: Example,
    path: str | os.PathLike[str],
    result: Result | None = None,
    twin: Twin = "sparse",
) -> Path:
    """Write ``model`` in evaluation mode as a frozen file, and return its path.

    ``acdc.Runtime.load`` reads it, without the class of the model.

    Args:
        model: The model. Neither its weights nor its mode change.
        example: What the model is called with: a tensor, a tuple of arguments, or a mapping.
        path: The file to write. One that is there is replaced; a pipe or a device is written into.
        result: The result of training to take the weights from. None: those of ``model``.
        twin: Which network of the result.

    Raises:
        InputError: PyTorch would compute a part of the model, the result is of another model, or
            the file cannot be written.
    """
    check_whole(model, "an export")
    model = copy.deepcopy(model).to("cpu")
    if result is not None:
        model = load_into(model, result.state(twin), result.index.noun)
    return Runtime(model.eval(), example).save(path)
