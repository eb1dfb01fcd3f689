"""Counts the zeros of a sparse twin before and after its weights become int8.

    python benchmarks/quantize.py                 # prints the table of docs/howto/quantize.md

A small network is trained for some steps; the counts follow from the scheme, not from the weights.
With symmetric codes the zero point is 0, and a pruned weight has the code 0. With another zero
point a pruned weight has that code, which may stand for 0.0 or for a value near it. ``torchao`` is
optional: without it, its rows are left out.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.ao.quantization as tq
from onnxruntime import InferenceSession
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from torch import nn

import acdc
from acdc.export import to_onnx
from common import save


@dataclass(frozen=True)
class Row:
    """What a scheme does to the zeros.

    Args:
        scheme: The tool and its setting.
        weights: How many weights are int8 now.
        pruned: How many of them were zero before.
        codes: How many of those have the code 0.
        values: How many of those still stand for exactly 0.0.
        error: The largest difference of an output from the float twin, relative to the largest.
    """

    scheme: str
    weights: int
    pruned: int
    codes: int
    values: int
    error: float


class Net(nn.Module):
    """Layers of both kinds, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2)
        self.up, self.down = nn.Linear(64, 512), nn.Linear(512, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        x = self.conv2(self.conv(x).relu()).relu().mean((2, 3))
        return self.head(self.down(self.up(x).relu()))


def twin(steps: int = 40, sparsity: float = 0.9) -> nn.Module:
    """Train a little, and return the sparse twin."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    plan = acdc.phases(1, [("dense", f"{steps // 2}st"), ("sparse", f"{steps - steps // 2}st")])
    method = acdc.ACDC(acdc.Unstructured(sparsity), plan.resolve(steps))
    sparsifier = acdc.Sparsifier(method, model, optimizer)
    for _ in range(steps):
        x = torch.randn(16, 3, 16, 16)
        y = x.mean((1, 2, 3)).mul(40).clamp(-4, 5).long().add(4)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return sparsifier.pair().sparse_model(Net()).eval()


# A quantized weight: its codes, and the values that they stand for.
Quantized = tuple[np.ndarray, np.ndarray]


def count(
    scheme: str,
    floats: dict[str, np.ndarray],
    found: dict[str, Quantized],
    got: np.ndarray,
    want: np.ndarray,
) -> Row:
    """Return the row of a scheme from the weights before and after it."""
    pruned = codes = values = 0
    for name, (code, value) in found.items():
        zero = floats[name] == 0
        pruned += int(zero.sum())
        codes += int((code[zero] == 0).sum())
        values += int((value[zero] == 0).sum())
    weights = sum(floats[name].size for name in found)
    error = float(np.abs(got - want).max() / np.abs(want).max())
    return Row(scheme, weights, pruned, codes, values, error)


# --- ONNX Runtime ---------------------------------------------------------------------------------


class Batches(CalibrationDataReader):
    """A few batches for the ranges of activations."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        self._left = [torch.randn(16, 3, 16, 16, generator=draw).numpy() for _ in range(4)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch, or None."""
        return {"x": self._left.pop()} if self._left else None


def by_onnxruntime(model: nn.Module, x: torch.Tensor, want: np.ndarray) -> Iterator[Row]:
    """Quantize the exported twin."""
    asymmetric = {"WeightSymmetric": False}
    with tempfile.TemporaryDirectory() as folder:
        source, target = to_onnx(model, x, Path(folder, "float.onnx")), Path(folder, "int8.onnx")
        floats = arrays_of(source)
        for code in (QuantType.QInt8, QuantType.QUInt8):
            for channels in (False, True):
                name = f"{code.name[1:].lower()}, per {'channel' if channels else 'tensor'}"
                quantize_dynamic(source, target, per_channel=channels, weight_type=code)
                yield onnx_row(f"ONNX Runtime, dynamic, {name}", floats, target, x, want)
                quantize_static(
                    source, target, Batches(), per_channel=channels, weight_type=code,
                    activation_type=QuantType.QUInt8,
                )  # fmt: skip
                yield onnx_row(f"ONNX Runtime, static, {name}", floats, target, x, want)
        quantize_static(source, target, Batches(), extra_options=asymmetric)
        yield onnx_row("ONNX Runtime, static, int8, WeightSymmetric=False", floats, target, x, want)


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """Return the initializers of a file."""
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def onnx_row(
    scheme: str, floats: dict[str, np.ndarray], path: Path, x: torch.Tensor, want: np.ndarray
) -> Row:
    """Return the row of a quantized file."""
    arrays = arrays_of(path)
    found: dict[str, Quantized] = {}
    for name, weight in floats.items():
        for base, transposed in ((name, False), (f"{name}_Transposed", True)):
            code = arrays.get(f"{base}_quantized")
            if weight.ndim < 2 or code is None:
                continue
            scale, zero = arrays[f"{base}_scale"], arrays[f"{base}_zero_point"]
            if scale.size > 1:  # per channel: the axis with as many entries
                axis = -1 if transposed else 0
                sizes = [1] * code.ndim
                sizes[axis] = scale.size
                scale, zero = scale.reshape(sizes), zero.reshape(sizes)
            value = (code.astype(np.int32) - zero.astype(np.int32)) * scale
            found[name] = (code.T, value.T) if transposed else (code, value)
    got = InferenceSession(path).run(None, {"x": x.numpy()})[0]
    return count(scheme, floats, found, got, want)


# --- torch ----------------------------------------------------------------------------------------


def by_torch(model: nn.Module, x: torch.Tensor, want: np.ndarray) -> Iterator[Row]:
    """Quantize linear layers by ``torch.ao.quantization.quantize_dynamic``."""
    floats = {name: p.detach().numpy() for name, p in model.named_parameters()}
    affine = tq.MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_affine)
    activation = tq.default_dynamic_quant_observer
    schemes = {
        "per tensor": tq.default_dynamic_qconfig,
        "per channel": tq.per_channel_dynamic_qconfig,
        "affine": tq.QConfig(activation=activation, weight=affine),
    }
    for name, scheme in schemes.items():
        quantized = tq.quantize_dynamic(copy.deepcopy(model), {nn.Linear: scheme})
        found = {}
        for layer, module in quantized.named_modules():
            if hasattr(module, "weight") and callable(module.weight):
                weight = module.weight()
                found[f"{layer}.weight"] = (weight.int_repr().numpy(), weight.dequantize().numpy())
        with torch.no_grad():
            got = quantized(x).numpy()
        yield count(f"torch quantize_dynamic, int8, {name}", floats, found, got, want)


def by_torchao(model: nn.Module, x: torch.Tensor, want: np.ndarray) -> Iterator[Row]:
    """Quantize linear layers by ``torchao``."""
    import torchao.quantization as ao

    floats = {name: p.detach().numpy() for name, p in model.named_parameters()}
    schemes: dict[str, Any] = {
        "Int8WeightOnlyConfig": ao.Int8WeightOnlyConfig(),
        "Int8DynamicActivationInt8WeightConfig": ao.Int8DynamicActivationInt8WeightConfig(),
        "IntxWeightOnlyConfig, symmetric": ao.IntxWeightOnlyConfig(weight_dtype=torch.int8),
        "IntxWeightOnlyConfig, asymmetric": ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int8, mapping_type=ao.MappingType.ASYMMETRIC
        ),
    }
    for name, scheme in schemes.items():
        quantized = copy.deepcopy(model)
        ao.quantize_(quantized, scheme)
        found = {}
        for layer, module in quantized.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Linear) and hasattr(weight, "qdata"):
                value = weight.dequantize().detach().numpy()
                found[f"{layer}.weight"] = (weight.qdata.numpy(), value)
        with torch.no_grad():
            got = quantized(x).numpy()
        yield count(f"torchao {name}", floats, found, got, want)


def rows() -> Iterator[Row]:
    """Return the row of every scheme."""
    model = twin()
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = model(x).numpy()
    yield from by_onnxruntime(model, x, want)
    yield from by_torch(model, x, want)
    if _has("torchao"):
        yield from by_torchao(model, x, want)


def table(found: list[Row]) -> str:
    """Return the rows as a table of Markdown."""
    lines = [
        "| scheme | weights in int8 | pruned | with the code 0 | that still mean 0.0 | error |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        lines.append(
            f"| {row.scheme} | {row.weights:,} | {row.pruned:,} | {row.codes:,} | {row.values:,} "
            f"| {100 * row.error:.1f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, and write the results."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = list(rows())
    print(table(found))
    packages = ("onnx", "onnxruntime", "torchao")
    tools = {name: metadata.version(name) for name in packages if _has(name)}
    print(save("quantize", [asdict(row) for row in found], tools=tools, sparsity=0.9))


def _has(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


if __name__ == "__main__":
    main()
