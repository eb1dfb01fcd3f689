"""``Runtime``: a finished sparse network on an ordinary CPU."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from acdc.engine import native
from acdc.engine.arguments import Arguments, NoFixedArguments
from acdc.engine.example import Example, arguments_of
from acdc.errors import InputError
from acdc.processor import usable_cpus
from acdc.runtime.explanation import Explanation, Row
from acdc.runtime.file import load, save
from acdc.runtime.frozen import Frozen
from acdc.runtime.handle import Handle, computing
from acdc.runtime.network import Network
from acdc.runtime.plan import Layer, Plan, Settings
from acdc.runtime.program import Conv
from acdc.shards import check_whole

PROFILED = 5  # runs of a profile


@dataclass(frozen=True)
class Argument:
    """An input or an output, as ``onnxruntime.InferenceSession`` describes it.

    Args:
        name: Its name.
        shape: Its sizes; the first one is ``"batch"``, and may vary.
        type: Such as ``"tensor(float)"``.

    """

    name: str
    shape: tuple[int | str, ...]
    type: str


_TYPES = {
    torch.float32: "tensor(float)",
    torch.float64: "tensor(double)",
    torch.float16: "tensor(float16)",
    torch.int64: "tensor(int64)",
    torch.int32: "tensor(int32)",
    torch.bool: "tensor(bool)",
}


class Runtime:
    """Computes a model with zeros in its weights, without the zeros, on a CPU.

    The model is copied: later changes of it change nothing here. It may be any module whose weights
    hold zeros. Layers that the kernels do not know run in PyTorch, and ``explain`` names them.

    >>> runtime = Runtime(model.eval(), torch.randn(1, 3, 224, 224))      # doctest: +SKIP
    >>> y = runtime(x)                                                    # doctest: +SKIP

    Args:
        model: The model in evaluation mode, on the CPU.
        example: What the model is called with: a tensor, a tuple of arguments, or a mapping of
            keywords. Only the first size of each tensor may differ in later calls; PyTorch computes
            a call with other sizes or dtypes.
        threads: How many threads compute. None: the CPUs that this process may use.
        strict: Refuse a model of which an operation would run in PyTorch.
        isa: The instruction set, for tests. None: the widest one that this machine has.

    Raises:
        InputError: The model is in training mode or not on the CPU, the example does not fit, or
            ``strict`` is set and an operation would run in PyTorch.

    """

    def __init__(
        self,
        model: nn.Module,
        example: Example,
        *,
        threads: int | None = None,
        strict: bool = False,
        isa: str | None = None,
    ) -> None:
        _check(model)
        args, kwargs = arguments_of(model, example)
        settings = Settings(_instruction_set(isa), _threads(threads))
        copied = copy.deepcopy(model).requires_grad_(False)
        with torch.no_grad():
            self._network: Network | Frozen = Network(copied, args, kwargs)
        self._handle = Handle(settings)
        self._bound = _bound(model, args, kwargs)
        self._inputs = _inputs(self._bound)
        self._outputs = _outputs(self(*args, **kwargs))
        if strict:
            self._refuse_torch()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        isa: str | None = None,
    ) -> Runtime:
        """Return the network of a frozen file. The class of the model and its code are not needed.

        Args:
            path: A file that ``save`` wrote.
            threads, isa: As for a new ``Runtime``.

        Raises:
            InputError: There is no such file, it is damaged, or a newer version of acdc wrote it.
            AcdcError: acdc was installed without compiled kernels.

        """
        native.library()
        runtime = cls.__new__(cls)
        frozen = load(path)
        runtime._network = frozen
        runtime._handle = Handle(Settings(_instruction_set(isa), _threads(threads)))
        runtime._bound = NoFixedArguments("it was loaded from a file")
        runtime._inputs = tuple(
            Argument(i.name, ("batch", *i.sizes), _TYPES[i.dtype]) for i in frozen.inputs
        )
        runtime._outputs = _outputs(frozen.outputs)
        return runtime

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the network to a frozen file, and return its path.

        Raises:
            InputError: PyTorch computes a part of the network, which a file without code cannot
                hold; or the file cannot be written.

        """
        network = self._network
        if isinstance(network, Network):
            network = network.frozen([argument.name for argument in self._inputs])
        return save(network, path)

    def _refuse_torch(self) -> None:
        names = [
            f"{part.name} ({part.why})" for part in self._network.in_torch if not part.few_zeros
        ]
        if names:
            raise InputError(
                f"With strict=True every operation must run in the runtime. PyTorch would compute: "
                f"{'; '.join(names)}. Leave strict out to allow it."
            )

    # --- calls ------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the model. Takes and returns what the model takes and returns, for any batch.

        The tensors that are returned belong to the caller.
        """
        with torch.no_grad(), computing(self._handle):
            return self._network(*args, **kwargs)

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Any]) -> list[Any]:
        """Compute the model on numpy arrays, as ``onnxruntime.InferenceSession.run`` does.

        Args:
            names: The outputs to return; None for all.
            feeds: Name of an input -> array.

        Returns:
            Numpy arrays, in the order of ``names``.

        Raises:
            InputError: A name is unknown, or an input is missing.

        """
        wanted = [argument.name for argument in self._inputs]
        if sorted(feeds) != sorted(wanted):
            raise InputError(f"The inputs are {wanted}, got {sorted(feeds)}: give each of them.")
        known = [argument.name for argument in self._outputs]
        for name in names or ():
            if name not in known:
                raise InputError(f"The outputs are {known}, got {name!r}: ask for these.")
        tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
        result = self._called_with(tensors)
        leaves = dict(zip(known, (leaf for _, leaf in _leaves(result)), strict=True))
        return [leaves[name].numpy() for name in names or known]

    def _called_with(self, tensors: Mapping[str, Tensor]) -> Any:
        if isinstance(self._network, Frozen):
            return self(**tensors)
        if not isinstance(self._bound, Arguments):
            raise InputError(f"The inputs of this model have no fixed names: {self._bound}.")
        given, keywords = self._bound.rebuilt(lambda name, _: tensors[name])
        return self(*given, **keywords)

    def get_inputs(self) -> list[Argument]:
        """Return the inputs by name."""
        return list(self._inputs)

    def get_outputs(self) -> list[Argument]:
        """Return the outputs by name."""
        return list(self._outputs)

    # --- what runs how ----------------------------------------------------------------------------

    @property
    def threads(self) -> int:
        """How many threads compute."""
        return self._handle.settings.threads

    def explain(self) -> Explanation:
        """Return what computes each layer, and why, for the example."""
        plans = self._handle.plans
        if not plans:  # a new handle
            self(*self._network.args, **self._network.kwargs)
            plans = self._handle.plans
        rows = [row for plan in plans for row in _rows(plan)]
        for part in self._network.in_torch:
            weights, kept = part.weights or (None, None)
            rows.append(Row(part.name, "torch", kept, weights, part.why))
        sparse = sum(row.how == "sparse" for row in rows)
        torch_layers = sum(row.how == "torch" and row.kept is not None for row in rows)
        remark = f"{sparse} layers run sparse; {torch_layers} layers run in PyTorch."
        removed = sum(program.removed for program in self._network.programs)
        if removed:
            remark += f" {removed} channels that no kept weight writes or reads were removed."
        return Explanation(tuple(rows), (remark,))

    def profile(self, *args: Any, **kwargs: Any) -> Explanation:
        """Return the time of each operation in the runtime, the median of several runs.

        Args:
            args, kwargs: What the model is called with.

        """
        self(*args, **kwargs)
        rows = []
        with self._handle.lock:
            for plan in self._handle.latest:
                rows += _timed_rows(plan, self._handle.threads)
        in_torch = [Row(part.name, "torch", why=part.why) for part in self._network.in_torch]
        remark = "What PyTorch computes is not timed." if in_torch else ""
        return Explanation((*rows, *in_torch), (remark,) if remark else ())

    def __reduce__(self) -> Any:
        """Refuse to be pickled or copied: a runtime owns memory and compiled calls."""
        raise InputError(
            "A Runtime cannot be pickled or copied. For another thread use runtime.fork(); for "
            "another process save it to a file, and load that there."
        )

    # --- threads ----------------------------------------------------------------------------------

    def fork(self, *, threads: int | None = None) -> Runtime:
        """Return a second handle of the same network, for another Python thread.

        The handles share weights, and index lists if they have as many threads. Each has memory of
        its own for values, so that they compute at the same time. Two threads that use one handle
        take turns.

        Args:
            threads: How many threads the new handle computes on. None: as many as this one.

        """
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        settings = self._handle.settings
        if threads is not None:
            settings = replace(settings, threads=_threads(threads))
        other._handle = Handle(settings, self._handle.lists)
        return other


def _rows(plan: Plan) -> list[Row]:
    return [_row(layer) for layer in plan.layers]


def _row(layer: Layer) -> Row:
    kept, weights = layer.op.weight.values.numel(), layer.op.weight_numel
    cut = "dense" if layer.cut is None else f"{layer.cut.vectors}x{layer.cut.channels}"
    kernel = f"points {layer.isa} {cut}"
    how: Literal["sparse", "dense"] = "sparse" if kept < weights else "dense"
    return Row(layer.op.name, how, kept, weights, "", kernel, layer.bytes)


def _timed_rows(plan: Plan, threads: int) -> list[Row]:
    """Return a row for each step of a plan, with its median time."""
    runs = [plan.seconds(threads) for _ in range(PROFILED)]
    layers = {layer.op: layer for layer in plan.layers}
    rows = []
    for number, (op, _) in enumerate(plan.steps):
        seconds = median(run[number] for run in runs)
        milliseconds = seconds * 1e3
        if not isinstance(op, Conv):
            kernel = f"points {type(op).__name__.lower()}"
            rows.append(Row(op.name, "dense", kernel=kernel, milliseconds=milliseconds))
            continue
        value = plan.program.values[op.out]
        pixels = plan.samples * value.height * value.width
        gflops = 2 * op.weight.values.numel() * pixels / max(seconds, 1e-9) / 1e9
        row = _row(layers[op])
        rows.append(replace(row, milliseconds=milliseconds, gflops=gflops))
    return rows


# --- checks of what is given ----------------------------------------------------------------------


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(
            f"A Runtime takes a torch.nn.Module, got a {type(model).__name__}. Load a frozen file "
            "by Runtime.load."
        )
    check_whole(model, "a Runtime")
    training = [name or type(m).__name__ for name, m in model.named_modules() if m.training]
    if training:
        raise InputError(
            f"The model is in training mode ({training[0]}), in which BatchNorm and dropout do not "
            "compute what a served model computes. Call model.eval() first."
        )
    devices = {str(p.device) for p in model.parameters() if p.device.type != "cpu"}
    if devices:
        raise InputError(
            f"The model is on {', '.join(sorted(devices))}, and the runtime is for CPUs: give "
            'model.to("cpu").'
        )


def _instruction_set(isa: str | None) -> str:
    if isa is None:
        found = native.instruction_sets()
        return found[-1] if found else ""
    native.lanes_of(isa)  # raises if this machine does not have it
    return isa


def _threads(threads: int | None) -> int:
    if threads is None:
        return usable_cpus()
    if not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= 1024:
        raise InputError(f"threads is a whole number from 1 to 1024, or None, got {threads!r}.")
    return threads


def _bound(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Arguments | NoFixedArguments:
    """Return the arguments by name, or why they have no fixed names."""
    try:
        return Arguments.of(inspect.signature(model.forward), args, kwargs)
    except NoFixedArguments as error:
        return error


def _inputs(bound: Arguments | NoFixedArguments) -> tuple[Argument, ...]:
    found: list[Argument] = []
    if isinstance(bound, Arguments):
        bound.rebuilt(lambda name, tensor: found.append(_argument(name, tensor)))
    return tuple(found)


def _outputs(result: Any) -> tuple[Argument, ...]:
    return tuple(_argument(name, leaf) for name, leaf in _leaves(result))


def _leaves(result: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors of a result, with names that say where they are."""
    if isinstance(result, Tensor):
        return [("output", result)]
    leaves, _ = tree_flatten_with_path(result)
    found = []
    for path, leaf in leaves:
        if isinstance(leaf, Tensor):
            keys = [getattr(key, "key", getattr(key, "idx", key)) for key in path]
            name = "_".join(map(str, keys))
            found.append((f"output_{name}" if name.isdigit() else name, leaf))
    return found


def _argument(name: str, tensor: Tensor) -> Argument:
    shape = ("batch", *tensor.shape[1:]) if tensor.dim() else ()
    return Argument(name, shape, _TYPES.get(tensor.dtype, str(tensor.dtype)))
