"""A model as an ONNX file, with the zeros of its weights counted after the export."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acdc.errors import AcdcError, InputError, need
from acdc.export.onnx_inputs import Dynamic, Example, Inputs, inputs_of
from acdc.export.onnx_sparse import dense_array, make_sparse
from acdc.files import Staging
from acdc.index import Twin
from acdc.outfile import is_stream, keep_mode, regular, unwritable, write
from acdc.result import Result
from acdc.shards import check_whole
from acdc.states import load_into

log = logging.getLogger(__name__)

# A protobuf message ends at 2 GiB. Larger weights go to a second file, "<name>.data".
_ONE_FILE = 1_900_000_000


def to_onnx(
    model: nn.Module,
    example: Example,
    path: str | os.PathLike[str],
    result: Result | None = None,
    twin: Twin = "sparse",
    *,
    dynamic: Dynamic | None = None,
    sparse: bool = False,
) -> Path:
    """Write ``model`` in evaluation mode to the ONNX file ``path``, and return the path.

    The file holds dense tensors with zeros in them, unless ``sparse=True``. ONNX runtimes compute
    with the zeros in both cases. The exporter folds a BatchNorm into the convolution before it. A
    zero times anything finite stays a zero, and that none was lost is checked on the written file.
    Weights beyond 1.9 GB are written to ``<path>.data`` beside it. A cache of keys and values is
    switched off in a model of ``transformers``, and its fused attention where the exporter cannot
    take it.

    Args:
        model: The model. Neither its weights nor its mode change.
        example: What the model is called with, each tensor with the batch first: a tensor, a tuple
            of arguments, or a mapping of keywords. The values of tensors do not matter. Other
            values, such as None or a flag, become a part of the file.
        path: The file to write. One that is there is replaced; a pipe or a device is written into.
        result: The result of training to take the weights from. None: those of ``model``.
        twin: Which network of the result.
        dynamic: Argument -> dimension -> name, for dimensions that may vary, such as
            ``{"input_ids": {1: "sequence"}}``. Dimensions of one name have one size. The first
            dimension of every input may always vary, and is named ``batch``. None: the length of
            token sequences (integers of two dimensions) may vary too, if the model lets it.
        sparse: Write weights with more than two zeros in three as sparse initializers. The file is
            small then: 12 bytes for each kept weight.

    Raises:
        MissingDependency: onnx or onnxscript is not installed.
        InputError: The model cannot be exported, the result is of another model or does not have
            that network, or the file cannot be written.
        AcdcError: The exporter lost zeros. No file is written.
    """
    onnx = _onnx()
    path = Path(path)
    check_whole(model, "an export")
    model = copy.deepcopy(model).to("cpu")
    if result is not None:
        model = load_into(model, result.state(twin), result.index.noun)
    model.eval()
    _switch_off_caches(model)
    program = _program(model, inputs_of(model, example, dynamic), automatic=dynamic is None)
    try:
        stream, target = is_stream(path), regular(path)
    except OSError as error:
        raise unwritable(path, error) from error
    if stream:
        _save_into(path, onnx, program, model, sparse)
        return path
    with Staging(target.parent, target.name) as staging:
        # The data are renamed first: no graph is of use without them.
        data, graph = (staging.place(name) for name in (f"{target.name}.data", target.name))
        _save(onnx, program, model, graph, data, sparse)
        keep_mode(target, graph)
        staging.commit()
    return path


def _save(onnx: Any, program: Any, model: nn.Module, graph: Path, data: Path, sparse: bool) -> None:
    """Write the graph, and the data beside it if they are large; see that no zero was lost."""
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    program.save(graph, external_data=size > _ONE_FILE)
    if sparse:
        _rewrite_sparse(onnx, graph, data)
    _check_zeros(onnx, graph, model)


def _save_into(path: Path, onnx: Any, program: Any, model: nn.Module, sparse: bool) -> None:
    """Write the file into a pipe or a device."""
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "model.onnx"
        data = graph.with_name(f"{graph.name}.data")
        _save(onnx, program, model, graph, data, sparse)
        if data.exists():
            raise InputError(
                f"ONNX puts more than {_ONE_FILE:,} bytes of weights into a second file beside the "
                f"first: {path} cannot take both. Choose a regular file."
            )
        write(path, graph.read_bytes())


def _rewrite_sparse(onnx: Any, graph: Path, data: Path) -> None:
    model = onnx.load(graph)
    make_sparse(onnx, model)
    data.unlink(missing_ok=True)
    external = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > _ONE_FILE
    onnx.save(model, graph, save_as_external_data=external, location=data.name)


def _switch_off_caches(model: nn.Module) -> None:
    """Let a language model of ``transformers`` return no cache: ONNX has no type for it."""
    for module in model.modules():
        if getattr(getattr(module, "config", None), "use_cache", None) is True:
            module.config.use_cache = False  # type: ignore[union-attr]


def _switch_off_fused_attention(model: nn.Module) -> bool:
    """Let a model of ``transformers`` compute attention by plain operations; False: it does."""
    switched = False
    for module in model.modules():
        choose = getattr(module, "set_attn_implementation", None)
        now = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if callable(choose) and now not in (None, "eager"):
            with contextlib.suppress(ValueError, NotImplementedError):  # it has no other attention
                choose("eager")
                switched = True
    return switched


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


def _program(model: nn.Module, inputs: Inputs, automatic: bool) -> Any:
    """Export the model; if it holds the length of a sequence fixed, so does the file."""
    fixed = inputs.only_batch() if automatic else None
    try:
        return _export_with_any_attention(model, inputs)
    except InputError as error:
        if fixed is None:
            raise
        program = _export(model, fixed)
        log.warning("The ONNX model takes sequences of one length only: %s", error)
        return program


def _export_with_any_attention(model: nn.Module, inputs: Inputs) -> Any:
    """Export the model, with plain attention if the exporter fails on a fused one, as in T5."""
    try:
        return _export(model, inputs)
    except InputError:
        if not _switch_off_fused_attention(model):
            raise
        return _export(model, inputs)


def _export(model: nn.Module, inputs: Inputs) -> Any:
    kind = type(model).__name__
    try:
        with torch.no_grad():
            outputs = model(*inputs.args, **inputs.kwargs)
    except Exception as error:
        raise InputError(
            f"The model cannot run the example, of shapes {inputs.shapes} ({error}). Give an "
            f"input as in training."
        ) from error
    named = isinstance(outputs, Mapping) and all(isinstance(o, Tensor) for o in outputs.values())
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                model,
                inputs.args,
                kwargs=inputs.kwargs,
                dynamo=True,
                verbose=False,
                dynamic_shapes=inputs.dynamic_shapes(),
                output_names=list(outputs) if named else None,
            )
    except Exception as error:  # of many kinds, and all say that this model is beyond the exporter
        raise InputError(
            f"PyTorch cannot export this {kind} to ONNX ({_reason(error)}). Its forward must be "
            f"traceable by torch.export, for any size of {_sizes(inputs)}."
        ) from error
    for value, dims in zip(program.model.graph.inputs, inputs.dims, strict=False):
        for i, name in dims.items():
            if isinstance(value.shape[i], int):
                raise InputError(
                    f"The forward of this {kind} depends on the {name} size: the ONNX model would "
                    f"run a {name} of {value.shape[i]} only. Make it work for any {name} size."
                )
    return program


def _sizes(inputs: Inputs) -> str:
    return " and ".join(dict.fromkeys(name for dims in inputs.dims for name in dims.values()))


def _reason(error: BaseException) -> str:
    """Return the first line of what the exporter failed with, without its advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def _check_zeros(onnx: Any, path: Path, model: nn.Module) -> None:
    """Raise AcdcError unless every weight of the model has its zeros in the file."""
    graph = onnx.load(path, load_external_data=False).graph
    arrays = {
        tensor.name: onnx.numpy_helper.to_array(tensor, base_dir=str(path.parent))
        for tensor in graph.initializer
    }
    arrays |= {t.values.name: dense_array(onnx, t) for t in graph.sparse_initializer}
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
