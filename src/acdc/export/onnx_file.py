"""A model as an ONNX file, with the zeros of its weights counted after the export."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acdc.errors import AcdcError, InputError, need
from acdc.files import Staging
from acdc.index import Twin
from acdc.outfile import is_stream, keep_mode, regular, unwritable, write
from acdc.result import Result
from acdc.states import load_into

# A protobuf message ends at 2 GiB. Larger weights go to a second file, "<name>.data".
_ONE_FILE = 1_900_000_000


def to_onnx(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    path: str | os.PathLike[str],
    result: Result | None = None,
    twin: Twin = "sparse",
) -> Path:
    """Write ``model`` in evaluation mode to the ONNX file ``path``, and return the path.

    The file holds dense tensors with zeros in them: it is not small, and ONNX runtimes compute
    with the zeros too. The exporter folds a BatchNorm into the convolution before it. A zero
    times anything finite stays a zero, and that none was lost is checked on the written file.
    The first dimension of every input is dynamic and named ``batch``. Weights beyond 1.9 GB are
    written to ``<path>.data`` beside it.

    Args:
        model: The model. Neither its weights nor its mode change.
        example: One input, or a tuple of them, each with the batch first; the values do not matter.
        path: The file to write. One that is there is replaced; a pipe or a device is written into.
        result: The result of training to take the weights from. None: those of ``model``.
        twin: Which network of the result.

    Raises:
        MissingDependency: onnx or onnxscript is not installed.
        InputError: The model cannot be exported, the result is of another model or does not have
            that network, or the file cannot be written.
        AcdcError: The exporter lost zeros. No file is written.
    """
    onnx = _onnx()
    path = Path(path)
    model = copy.deepcopy(model).to("cpu")
    if result is not None:
        model = load_into(model, result.state(twin), result.index.noun)
    model.eval()
    program = _export(model, example if isinstance(example, tuple) else (example,))
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    try:
        stream, target = is_stream(path), regular(path)
    except OSError as error:
        raise unwritable(path, error) from error
    if stream:
        _save_into(path, onnx, program, model, size)
        return path
    with Staging(target.parent, target.name) as staging:
        staging.place(f"{target.name}.data")  # renamed first: a graph is of no use without it
        graph = staging.place(target.name)
        program.save(graph, external_data=size > _ONE_FILE)
        _check_zeros(onnx, graph, model)
        keep_mode(target, graph)
        staging.commit()
    return path


def _save_into(path: Path, onnx: Any, program: Any, model: nn.Module, size: int) -> None:
    """Write the file into a pipe or a device."""
    if size > _ONE_FILE:
        raise InputError(
            f"The model has {size:,} bytes of weights, and ONNX puts more than {_ONE_FILE:,} into "
            f"a second file beside the first: {path} cannot take both. Choose a regular file."
        )
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "model.onnx"
        program.save(graph, external_data=False)
        _check_zeros(onnx, graph, model)
        write(path, graph.read_bytes())


def _onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401  # the exporter needs it
    except ModuleNotFoundError as error:
        raise need(error.name or "onnxscript", "onnx") from error
    return onnx


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter has to say about itself from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _export(model: nn.Module, example: tuple[Tensor, ...]) -> Any:
    if not all(tensor.dim() and len(tensor) for tensor in example):
        raise InputError(
            f"The example has the shapes {[tuple(tensor.shape) for tensor in example]}. Give one "
            f"sample at least, the batch first, such as torch.zeros(1, 3, 32, 32)."
        )
    # A batch of one takes the path of "one sample" in a model that has such a path.
    inputs = tuple(t.cpu() if len(t) > 1 else torch.cat([t.cpu()] * 2) for t in example)
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception as error:
        raise InputError(
            f"The model cannot run the example, of shapes {[tuple(t.shape) for t in example]} "
            f"({error}). Give an input as in training."
        ) from error
    batch = torch.export.Dim("batch")
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                verbose=False,
                dynamic_shapes=tuple({0: batch} for _ in inputs),
            )
    except Exception as error:  # of many kinds, and all say that this model is beyond the exporter
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise InputError(
            f"PyTorch cannot export this {type(model).__name__} to ONNX ({reason}). Its forward "
            f"must be traceable by torch.export, for any batch size."
        ) from error
    if any(isinstance(value.shape[0], int) for value in program.model.graph.inputs):
        raise InputError(
            f"The forward of this {type(model).__name__} depends on the batch size: the ONNX model "
            f"would run batches of {len(inputs[0])} only. Make it work for any batch size."
        )
    return program


def _check_zeros(onnx: Any, path: Path, model: nn.Module) -> None:
    """Raise AcdcError unless every weight of the model has its zeros in the file."""
    arrays = {
        tensor.name: onnx.numpy_helper.to_array(tensor, base_dir=str(path.parent))
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
    }
    zeros = {name: int((array == 0).sum()) for name, array in arrays.items()}
    weights = {name: weight for name, weight in model.named_parameters() if weight.dim() > 1}
    # A weight that the exporter transposed has lost its name; one that is not used is not there.
    renamed = [name for name in arrays if name not in dict(model.named_parameters())]
    wanted_zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    # From the most zeros down, each takes the nameless tensor of its size with the most zeros: if
    # this leaves one short, so does every other way to match them.
    for name, wanted in sorted(wanted_zeros.items(), key=lambda item: -item[1]):
        same_size = [other for other in renamed if arrays[other].size == weights[name].numel()]
        candidates = [name] if name in arrays else same_size
        if not candidates:
            continue
        best = max(candidates, key=lambda candidate: zeros[candidate])
        if zeros[best] < wanted:
            raise AcdcError(
                f"The exporter lost zeros of {name!r}: the model has {wanted}, the file "
                f"{zeros[best]}. Nothing was written. Its layer computes with something else than "
                f"its weight, and ONNX cannot say that it is sparse."
            )
        if best in renamed:
            renamed.remove(best)
