"""The files that contenders load: the model, frozen and as ONNX, and a batch with its answer."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from acdc.bench.infer.cases import Case
from acdc.bench.peers import Unable, reason
from acdc.errors import InputError, need
from acdc.export import to_onnx
from acdc.runtime.runtime import Runtime

CALIBRATED = 8  # samples for the ranges of int8

# DeepSparse 1.8 knows the files of PyTorch's older exporter. This is the first version of
# operators in which that exporter has attention; a LayerNorm is written as plain operations.
_OLD_OPSET = 14


class Files:
    """The files of one case, each written when it is first asked for.

    Args:
        case: The network.
        folder: Where the files go.
        onnx: A file in place of the exported one.
    """

    def __init__(self, case: Case, folder: Path, onnx: Path | None = None) -> None:
        self.case, self.folder, self._given = case, folder, onnx
        self._written: dict[str, Path | str] = {}

    @cached_property
    def model(self) -> nn.Module | None:
        """The model in evaluation mode, if the case has one."""
        return None if self.case.build is None else self.case.build()

    def path(self, kind: str) -> Path:
        """Return the file of a kind: ``pickle``, ``frozen``, ``onnx``, ``old onnx``, ``int8``.

        Raises:
            Unable: It cannot be written. The message says why.
        """
        if kind not in self._written:
            try:
                self._written[kind] = _WRITERS[kind](self)
            except Exception as error:  # an exporter may raise any exception
                self._written[kind] = reason(error)
        found = self._written[kind]
        if isinstance(found, str):
            raise Unable(found)
        return found

    def batch(self, samples: int) -> tuple[Path, Path | None]:
        """Return the file of a batch, and that of its answer by PyTorch in double precision."""
        inputs = self.case.inputs(samples)
        given = self._arrays(f"inputs-{samples}.npz", inputs)
        if self.model is None:
            return given, None
        wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
        try:
            with torch.inference_mode():
                result = copy.deepcopy(self.model).double()(*wide.values())
        except Exception as error:  # a model of the user's may raise any exception
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in wide.values())
            raise InputError(
                f"{self.case.name} does not compute inputs of the shape {shapes}: {reason(error)}"
            ) from error
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        answer = {f"output {i}": leaf for i, leaf in enumerate(leaves)}
        return given, self._arrays(f"answer-{samples}.npz", answer)

    def _arrays(self, name: str, tensors: Mapping[str, Tensor]) -> Path:
        path = self.folder / name
        arrays: dict[str, Any] = {key: tensor.numpy() for key, tensor in tensors.items()}
        np.savez(path, **arrays)
        return path

    # --- writers ----------------------------------------------------------------------------------

    def _need_model(self) -> nn.Module:
        if self.model is None:
            raise Unable("a frozen file holds no model for it")
        return self.model

    def _pickle(self) -> Path:
        path = self.folder / "model.pt"
        torch.save(self._need_model(), path)
        return path

    def _frozen(self) -> Path:
        if self.case.frozen is not None:
            return self.case.frozen
        example = tuple(self.case.inputs(1).values())
        return Runtime(self._need_model(), example).save(self.folder / "net.acdcrt")

    def _onnx(self) -> Path:
        if self._given is not None:
            return self._given
        if self.model is None:
            raise Unable("a frozen file holds no model for it: give the same network by --onnx")
        # Two samples: an exporter may take a size of one for a constant.
        return to_onnx(self.model, tuple(self.case.inputs(2).values()), self.folder / "net.onnx")

    def _old_onnx(self) -> Path:
        if self._given is not None:
            return self._given
        inputs = self.case.inputs(1)
        path = self.folder / "net-old.onnx"
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # that the exporter is old; a failure prints the graph
            torch.onnx.export(
                copy.deepcopy(self._need_model()), tuple(inputs.values()), str(path),
                dynamo=False, opset_version=_OLD_OPSET, input_names=list(inputs),
                dynamic_axes={name: {0: "batch"} for name in inputs},
            )  # fmt: skip
        return path

    def _int8(self) -> Path:
        """Quantize as ONNX Runtime's guide for CPUs has it: static, both ends of each operation."""
        try:
            from onnxruntime import quantization
            from onnxruntime.quantization.shape_inference import quant_pre_process
        except ImportError as error:
            raise need("onnxruntime", "onnx") from error
        source, ready = self.path("onnx"), self.folder / "ready.onnx"
        path = self.folder / "int8.onnx"
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(ready), str(path), _reader(quantization, self.case, ready), per_channel=True
        )
        return path


def _reader(quantization: Any, case: Case, file: Path) -> Any:
    """Return the calibration data as ONNX Runtime reads them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    whole = [tensor.numpy() for tensor in case.inputs(CALIBRATED).values()]
    samples = [[array[i : i + 1] for array in whole] for i in range(CALIBRATED)]

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            """Return the next sample; None: there are no more."""
            if not samples:
                return None
            return dict(zip(names, samples.pop(), strict=True))

    return Reader()


_WRITERS: dict[str, Callable[[Files], Path]] = {
    "pickle": Files._pickle,
    "frozen": Files._frozen,
    "onnx": Files._onnx,
    "old onnx": Files._old_onnx,
    "int8": Files._int8,
}


def check_onnx(path: Path | None) -> None:
    """Refuse a file that is not there."""
    if path is not None and not path.is_file():
        raise InputError(f"--onnx {path}: there is no such file.")
