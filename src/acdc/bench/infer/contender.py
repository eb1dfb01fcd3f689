"""One runtime in a process of its own: ``python contender.py``, told by lines of JSON what to do.

A runtime may need another interpreter than acdc has. So this file works with Python 3.10, imports
acdc and torch only for the runtimes that are made of them, and needs numpy beside.

A request is one line on standard input, and its answer one line on standard output:

``load``    Import the runtime, load the network, and compute its first answer. The answer holds
            the seconds of both, the memory before and after, and the largest error.
``time``    Compute for some seconds: one request at a time, or one in each stream. The answer holds
            the seconds of each request, and of all together.

An answer with ``failed`` says why there is none. The process ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

# Python puts the folder of this file first, and other files in it have names of libraries.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path = [path for path in sys.path if os.path.abspath(path or ".") != _HERE]

Call = Callable[[], list[Any]]
Request = dict[str, Any]

WARM_UP = 3  # calls of each stream
TRIED = 4  # calls of PyTorch in each memory format


class Contender:
    """A runtime with a network.

    Args:
        request: ``file``, ``threads``, ``streams``, ``samples``, and what one kind needs besides.
        inputs: The arrays of a batch, by name.

    Attributes:
        setting: How it computes, for the table.
        package: Where it comes from.
    """

    setting, package = "", ""

    def __init__(self, request: Request, inputs: dict[str, Any]) -> None:
        self.file: str = request["file"]
        self.samples: int = request["samples"]
        self.threads: int = request["threads"]
        self.streams: int = request["streams"]
        self.request, self.inputs = request, inputs

    @property
    def each(self) -> int:
        """Threads of each stream."""
        return max(1, self.threads // self.streams)

    @staticmethod
    def bring() -> None:
        """Import the runtime."""
        raise NotImplementedError

    def load(self) -> None:
        """Load the network."""
        raise NotImplementedError

    def settle(self) -> None:
        """Choose the best setting, if there is a choice. This is not timed."""

    def call(self) -> Call:
        """Return what computes the batch. Each stream has one of its own."""
        raise NotImplementedError


class Acdc(Contender):
    """``acdc.Runtime``, from a frozen file; from the model where no file can be written."""

    @staticmethod
    def bring() -> None:
        """Import the runtime."""
        import acdc.runtime.runtime  # noqa: F401

    def load(self) -> None:
        """Load the network."""
        import torch

        from acdc.runtime.runtime import Runtime

        torch.set_num_threads(self.each)
        if self.request["frozen"]:
            self.runtime = Runtime.load(self.file, threads=self.each)
        else:
            tensors = tuple(torch.from_numpy(array) for array in self.inputs.values())
            self.runtime = Runtime(_model(self.file), tensors, threads=self.each)
        self.setting = "frozen file" if self.request["frozen"] else "from the model"

    def call(self) -> Call:
        """Return what computes the batch."""
        import torch

        tensors = [torch.from_numpy(array) for array in self.inputs.values()]
        handle = self.runtime if self.streams == 1 else self.runtime.fork()
        return lambda: _arrays(handle(*tensors))


class Torch(Contender):
    """PyTorch in evaluation mode."""

    package = "torch"

    @staticmethod
    def bring() -> None:
        """Import PyTorch."""
        import torch  # noqa: F401

    def load(self) -> None:
        """Load the network."""
        import torch

        torch.set_num_threads(self.each)
        self.model = _model(self.file)
        self.tensors = [torch.from_numpy(array) for array in self.inputs.values()]
        self.setting = "contiguous"

    def settle(self) -> None:
        """Take the faster memory format of images."""
        import torch

        if all(tensor.dim() != 4 for tensor in self.tensors):
            return
        contiguous, plain = self.tensors, _fastest(self.call())
        self.model = self.model.to(memory_format=torch.channels_last)
        self.tensors = [t.contiguous(memory_format=torch.channels_last) for t in contiguous]
        self.setting = "channels last"
        if _fastest(self.call()) > plain:
            self.model = self.model.to(memory_format=torch.contiguous_format)
            self.tensors, self.setting = contiguous, "contiguous"

    def call(self) -> Call:
        """Return what computes the batch."""
        import torch

        model, tensors = self.model, self.tensors

        def compute() -> list[Any]:
            with torch.inference_mode():
                return _arrays(model(*tensors))

        return compute


class TorchCompile(Torch):
    """PyTorch with ``torch.compile``, which chooses memory formats by itself."""

    def load(self) -> None:
        """Load the network."""
        import torch

        super().load()
        self.model = torch.compile(self.model)
        self.setting = "torch.compile"

    def settle(self) -> None:
        """Leave the memory format."""


class OnnxRuntime(Contender):
    """ONNX Runtime with its CPU provider."""

    package = "onnxruntime"

    @staticmethod
    def bring() -> None:
        """Import ONNX Runtime."""
        import onnxruntime  # noqa: F401

    def load(self) -> None:
        """Load the network."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.each, 1
        # With a known batch it can plan its memory.
        options.add_free_dimension_override_by_name("batch", self.samples)
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(self.file, options, providers=providers)
        names = [argument.name for argument in self.session.get_inputs()]
        self.feeds = dict(zip(names, self.inputs.values(), strict=True))
        self.setting = self.request["precision"]

    def call(self) -> Call:
        """Return what computes the batch."""
        session, feeds = self.session, self.feeds
        return lambda: list(session.run(None, feeds))


class OpenVino(Contender):
    """OpenVINO on the CPU. It would take bfloat16 by itself where the CPU has it."""

    package = "openvino"

    @staticmethod
    def bring() -> None:
        """Import OpenVINO."""
        import openvino  # noqa: F401

    def load(self) -> None:
        """Load the network."""
        import openvino

        core = openvino.Core()
        model = core.read_model(self.file)
        shapes = [openvino.PartialShape(list(array.shape)) for array in self.inputs.values()]
        model.reshape(dict(zip(model.inputs, shapes, strict=True)))
        self.setting = self.request["precision"]
        options = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[self.setting],
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": self.streams,
            "PERFORMANCE_HINT": "LATENCY" if self.streams == 1 else "THROUGHPUT",
        }
        self.compiled = core.compile_model(model, "CPU", options)

    def call(self) -> Call:
        """Return what computes the batch."""
        request, feeds = self.compiled.create_infer_request(), dict(enumerate(self.inputs.values()))
        return lambda: list(request.infer(feeds).values())


class DeepSparse(Contender):
    """DeepSparse, of which 1.8 is the last version."""

    package = "deepsparse"

    @staticmethod
    def bring() -> None:
        """Import DeepSparse."""
        import deepsparse  # noqa: F401

    def load(self) -> None:
        """Load the network."""
        import deepsparse

        self.engine = deepsparse.Engine(
            model=self.file,
            batch_size=self.samples,
            num_cores=self.threads,
            num_streams=self.streams,
            scheduler="single_stream" if self.streams == 1 else "multi_stream",
        )
        # It runs unknown operations in ONNX Runtime, and does not say so.
        self.setting = f"{self.engine.fraction_of_supported_ops:.0%} of operations"

    def call(self) -> Call:
        """Return what computes the batch."""
        engine, arrays = self.engine, list(self.inputs.values())
        return lambda: list(engine.run(arrays))


KINDS: dict[str, type[Contender]] = {
    "acdc": Acdc,
    "torch": Torch,
    "torch-compile": TorchCompile,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "deepsparse": DeepSparse,
}


def _model(file: str) -> Any:
    """Return the model that ``acdc bench infer`` has just written to a temporary file."""
    import torch

    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for the class of a model of the user's
    return torch.load(file, weights_only=False)


def _arrays(result: Any) -> list[Any]:
    from torch.utils._pytree import tree_leaves

    return [leaf.numpy() for leaf in tree_leaves(result) if hasattr(leaf, "numpy")]


def _fastest(call: Call) -> float:
    """Return the seconds of the fastest of a few calls."""
    seconds: list[float] = []
    for _ in range(TRIED):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


# --- requests -------------------------------------------------------------------------------------


class Process:
    """Answers requests; keeps the calls of each stream between them."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def load(self, request: Request) -> Request:
        """Load the network, and compute the first answer."""
        import numpy as np

        if request["cpus"]:
            os.sched_setaffinity(0, request["cpus"])
        inputs = dict(np.load(request["inputs"]))
        kind = KINDS[request["kind"]]
        began = time.perf_counter()
        kind.bring()
        imported, before = time.perf_counter(), memory_mb()
        contender = kind(request, inputs)
        contender.load()
        outputs = contender.call()()
        cold = time.perf_counter() - imported
        contender.settle()
        self.calls = [contender.call() for _ in range(request["streams"])]
        for call in self.calls * WARM_UP:
            call()
        return {
            "import_seconds": imported - began,
            "cold_seconds": cold,
            "imported_mb": before,
            "memory_mb": memory_mb(),
            "error": error_of(outputs, request["expected"]),
            "setting": contender.setting,
            "version": version(contender.package) if contender.package else None,
        }

    def time(self, request: Request) -> Request:
        """Compute in each stream until the seconds are over."""
        found: list[list[float]] = [[] for _ in self.calls]
        self.calls[0]()  # the first call after a pause wakes threads up
        began = time.perf_counter()
        until = began + request["seconds"]
        if len(self.calls) == 1:
            _stream(self.calls[0], until, found[0])
        else:
            streams = [
                threading.Thread(target=_stream, args=(call, until, seconds))
                for call, seconds in zip(self.calls, found, strict=True)
            ]
            for stream in streams:
                stream.start()
            for stream in streams:
                stream.join()
        return {
            "each": [seconds for stream in found for seconds in stream],
            "all": time.perf_counter() - began,
        }


def _stream(call: Call, until: float, seconds: list[float]) -> None:
    """Compute until a time, and once at least."""
    while not seconds or time.perf_counter() < until:
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)


def error_of(outputs: list[Any], expected: str | None) -> float | None:
    """Return the largest difference to the expected arrays, relative to the largest of them."""
    import numpy as np

    if expected is None:
        return None
    right = list(dict(np.load(expected)).values())
    shapes, wanted = [np.shape(o) for o in outputs], [array.shape for array in right]
    if shapes != wanted:
        raise RuntimeError(f"its outputs have the shapes {shapes}, and those of PyTorch {wanted}")
    errors = [
        np.abs(np.asarray(output, dtype=np.float64) - array).max() / (np.abs(array).max() or 1.0)
        for output, array in zip(outputs, right, strict=True)
    ]
    return float(np.max(errors))  # NaN if there is one


def memory_mb() -> float | None:
    """Return the resident memory of this process in megabytes (10^6 bytes), on Linux."""
    try:
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("VmRSS:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024 / 1e6


def main() -> None:
    """Answer the requests until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what libraries print out of the answers
    process = Process()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(process, request["do"])(request)
        except Exception as error:  # a runtime may raise any exception
            answer = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
