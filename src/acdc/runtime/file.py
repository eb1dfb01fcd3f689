"""The frozen file: safetensors with positions, values and vectors; the program as JSON.

The metadata have one entry, ``acdc_runtime``. No code and no pickle is in the file. Sizes follow
from the program and are compared with those of the tensors before anything is allocated.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acdc.bitmask import as_integers, deserialize, read_metadata, serialize
from acdc.engine.contract import numel
from acdc.engine.geometry import ConvGeometry
from acdc.errors import InputError
from acdc.outfile import write
from acdc.runtime.checking import MOST_OPS, MOST_SIZE, check_program
from acdc.runtime.frozen import Frozen, Input, check_structure
from acdc.runtime.packing import FORMS, pack, unpack
from acdc.runtime.program import (
    ACTIVATIONS,
    Attention,
    Conv,
    Embed,
    Gate,
    Join,
    Kept,
    Map,
    Norm,
    Op,
    Part,
    Pool,
    Program,
    Value,
)
from acdc.schema import COUNT, Maybe, Number, check, parse

ENTRY = "acdc_runtime"
VERSION = 2  # of 1, every layer had a mask
_DTYPES = {"float32": torch.float32, "float64": torch.float64}

_INPUTS = _DTYPES | {"int64": torch.int64, "int32": torch.int32, "bool": torch.bool}

_INDEX = Number(int, 0, 2 * MOST_OPS)
_SIZE = Number(int, 0, MOST_SIZE)
_HEAD = {"version": Number(int, 1, 2**31)}
_NOTE = {
    "sha256": str,
    "dtype": tuple(_DTYPES),
    "values": [[_SIZE]],
    "ops": [
        {
            "op": ("conv", "map", "gate", "norm", "pool", "join", "embed", "attention"),
            "name": str,
            "x": _INDEX,
            "out": _INDEX,
        }
    ],
    "inputs": [_INDEX],
    "outputs": [_INDEX],
    "arguments": [{"name": str, "sizes": [_SIZE], "dtype": tuple(_INPUTS)}],
    "sources": [_INDEX],
    "removed": COUNT,
}
_OPS: dict[str, Any] = {
    "conv": {"geometry": [_SIZE], "residual": Maybe(_INDEX), "activation": ACTIVATIONS},
    "map": {"y": Maybe(_INDEX), "multiply": bool, "activation": ACTIVATIONS},
    "gate": {"gate": _INDEX},
    "norm": {"eps": Number(float, 0, 1e6), "centered": bool},
    "pool": {
        "maximum": bool, "window": [_SIZE], "stride": [_SIZE], "padding": [_SIZE],
        "count_padding": bool,
    },
    "join": {"parts": [[_SIZE]]},
    "embed": {},
    "attention": {
        "keys": _INDEX, "values": _INDEX, "first": [_SIZE], "heads": _SIZE, "size": _SIZE,
        "value_size": _SIZE, "scale": Number(float, -1e6, 1e6), "causal": bool,
        "mask": Maybe(_INDEX),
    },
}  # fmt: skip


def save(frozen: Frozen, path: str | os.PathLike[str]) -> Path:
    """Write a network to a file, and return its path."""
    program = frozen.program
    tensors: dict[str, Tensor] = {}
    ops = [_encoded(number, op, tensors) for number, op in enumerate(program.ops)]
    note = {
        "version": VERSION,
        "sha256": "",
        "dtype": str(program.dtype).removeprefix("torch."),
        "values": [_sizes_of(value) for value in program.values],
        "ops": ops,
        "inputs": program.inputs,
        "outputs": program.outputs,
        "arguments": [
            {"name": i.name, "sizes": list(i.sizes), "dtype": str(i.dtype).removeprefix("torch.")}
            for i in frozen.inputs
        ],
        "sources": list(frozen.sources),
        "removed": program.removed,
        "result": frozen.result,
    }
    note["sha256"] = _digest(note, tensors)
    return write(path, serialize(tensors, {ENTRY: json.dumps(note)}))


def load(path: str | os.PathLike[str]) -> Frozen:
    """Read a network from a file.

    Raises:
        InputError: There is no such file, or it is none that ``save`` wrote.

    """
    path = Path(path)
    data = _bytes(path)
    try:
        return _decoded(data)
    except ValueError as error:  # an InputError or a Misfit
        raise InputError(
            f"{path} is no frozen network: {error}. Write it again with Runtime.save."
        ) from error


def _bytes(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} is no regular file: give the file that Runtime.save wrote.")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


# --- operations -----------------------------------------------------------------------------------


def _sizes_of(v: Value) -> list[int]:
    return [v.channels, v.height, v.width, int(v.tokens) + 2 * int(v.integers)]


def _encoded(number: int, op: Op, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return an operation as JSON, and add its tensors."""
    note: dict[str, Any] = {"op": "", "name": op.name, "x": op.x, "out": op.out}
    vectors: dict[str, Tensor | None] = {}
    if isinstance(op, Conv):
        g = op.geometry
        sizes = [g.in_channels, g.out_channels, *g.kernel, *g.stride, *g.padding, *g.dilation]
        note |= {"op": "conv", "geometry": [*sizes, g.groups], "residual": op.residual}
        note["activation"] = op.activation
        vectors = {
            "bias": op.bias,
            **pack(op.weight.index, op.weight_numel),
            "values": op.weight.values,
        }
    elif isinstance(op, Map):
        note |= {"op": "map", "y": op.y, "multiply": op.multiply, "activation": op.activation}
        vectors = {"scale": op.scale, "offset": op.offset}
    elif isinstance(op, Gate):
        note |= {"op": "gate", "gate": op.gate}
    elif isinstance(op, Norm):
        note |= {"op": "norm", "eps": op.eps, "centered": op.centered}
        vectors = {"weight": op.weight, "bias": op.bias}
    elif isinstance(op, Pool):
        note |= {"op": "pool", "maximum": op.maximum, "count_padding": op.count_padding}
        note |= {"window": op.window, "stride": op.stride, "padding": op.padding}
    elif isinstance(op, Join):
        note |= {"op": "join", "parts": [list(astuple(part)) for part in op.parts]}
        vectors = {"table": op.table}
    elif isinstance(op, Embed):
        note |= {"op": "embed"}
        vectors = {"table": op.table}
    else:
        assert isinstance(op, Attention)
        note |= {"op": "attention", "first": op.first, "causal": op.causal, "scale": op.scale}
        for field in ("keys", "values", "heads", "size", "value_size", "mask"):
            note[field] = getattr(op, field)
    for name, vector in vectors.items():
        if vector is not None:
            tensors[f"{number}.{name}"] = vector.detach()
    return note


def _decoded(data: bytes) -> Frozen:
    metadata = read_metadata(data)
    if ENTRY not in metadata:
        raise InputError(f"its metadata have no entry {ENTRY!r}")
    note = parse(metadata[ENTRY])
    check(note, _HEAD, "the program")
    if note["version"] > VERSION:
        raise InputError(
            f"a newer version of acdc wrote it (format {note['version']}, this one reads "
            f"{VERSION}), so update acdc"
        )
    check(note, _NOTE, "the program")
    if len(note["ops"]) > MOST_OPS or len(note["values"]) > 2 * MOST_OPS:
        raise InputError(f"it has {len(note['ops'])} operations, and can have {MOST_OPS}")
    tensors = deserialize(data)
    if _digest(note, tensors) != note["sha256"]:
        raise InputError("its checksum does not agree")
    dtype = _DTYPES[note["dtype"]]
    reader = _Reader(tensors, dtype)
    program = Program(dtype, [_value(sizes) for sizes in note["values"]])
    program.ops = [reader.op(number, part) for number, part in enumerate(note["ops"])]
    program.inputs, program.outputs = note["inputs"], note["outputs"]
    program.removed = note["removed"]
    if tensors:
        raise InputError(f"it has a tensor of no operation: {min(tensors)[:40]!r}")
    check_program(program)
    arguments = [
        Input(part["name"], tuple(part["sizes"]), _INPUTS[part["dtype"]])
        for part in note["arguments"]
    ]
    sources = note["sources"]
    if len(sources) != len(program.inputs) or not all(s < len(arguments) for s in sources):
        raise InputError("its arguments are not those of its program")
    for source, number in zip(sources, program.inputs, strict=True):
        integers = program.values[number].integers
        if integers != (arguments[source].dtype not in (torch.float32, torch.float64)):
            raise InputError("an argument has another dtype than its program reads")
    if len({argument.name for argument in arguments}) < len(arguments):
        raise InputError("two arguments have one name")
    check_structure(note.get("result"), len(program.outputs))
    return Frozen(program, arguments, sources, note["result"])


def _value(sizes: list[int]) -> Value:
    if len(sizes) != 4 or sizes[3] > 3:
        raise InputError("a value has no four sizes")
    return Value(sizes[0], sizes[1], sizes[2], bool(sizes[3] & 1), bool(sizes[3] & 2))


class _Reader:
    """Makes operations of JSON and tensors; takes the tensors that it used."""

    def __init__(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.tensors, self.dtype = tensors, dtype

    def op(self, number: int, note: Mapping[str, Any]) -> Op:
        """Return the operation of this number."""
        kind = note["op"]
        check(note, _OPS[kind], f"operation {number}")
        common = (note["name"], note["x"], note["out"])
        if kind == "conv":
            geometry = _geometry(note["geometry"])
            weight = self._kept(number, geometry)
            bias = self._vector(number, "bias")
            return Conv(*common, geometry, weight, bias, note["residual"], note["activation"])
        if kind == "map":
            scale, offset = self._vector(number, "scale"), self._vector(number, "offset")
            return Map(*common, note["y"], note["multiply"], scale, offset, note["activation"])
        if kind == "gate":
            return Gate(*common, note["gate"])
        if kind == "norm":
            weight_, bias = self._vector(number, "weight"), self._vector(number, "bias")
            return Norm(*common, float(note["eps"]), note["centered"], weight_, bias)
        if kind == "join":
            parts = tuple(_part(sizes) for sizes in note["parts"])
            return Join(*common, parts, self._table(number))
        if kind == "embed":
            table = self._table(number)
            if table is None:
                raise InputError(f"operation {number} has no table")
            return Embed(*common, table)
        if kind == "attention":
            if len(note["first"]) != 3:
                raise InputError("an attention has no three first channels")
            first = note["first"]
            return Attention(
                *common, note["keys"], note["values"], (first[0], first[1], first[2]),
                note["heads"], note["size"], note["value_size"], float(note["scale"]),
                note["causal"], note["mask"],
            )  # fmt: skip
        window, stride, padding = (_pair(note[name]) for name in ("window", "stride", "padding"))
        return Pool(*common, note["maximum"], window, stride, padding, note["count_padding"])

    def _kept(self, number: int, geometry: ConvGeometry) -> Kept:
        values = self._vector(number, "values")
        if values is None:
            raise InputError(f"operation {number} has no weights")
        names = {form: f"{number}.{form}" for form in FORMS}
        forms = {form: self.tensors.pop(n) for form, n in names.items() if n in self.tensors}
        try:
            index = unpack(forms, numel(geometry), values.numel())
        except InputError as error:
            raise InputError(f"operation {number} {error}") from error
        return Kept(index, values)

    def _table(self, number: int) -> Tensor | None:
        table = self.tensors.pop(f"{number}.table", None)
        if table is not None and (table.dtype != self.dtype or table.dim() != 2):
            raise InputError(f"the table of operation {number} is no matrix of {self.dtype}")
        return table

    def _vector(self, number: int, name: str) -> Tensor | None:
        vector = self.tensors.pop(f"{number}.{name}", None)
        if vector is not None and (vector.dtype != self.dtype or vector.dim() != 1):
            raise InputError(f"the {name} of operation {number} is no vector of {self.dtype}")
        return vector


def _part(sizes: list[int]) -> Part:
    if len(sizes) != 7:
        raise InputError("a part has no seven sizes")
    return Part(*sizes)


def _geometry(sizes: list[int]) -> ConvGeometry:
    if len(sizes) != 11:
        raise InputError("a layer has no eleven sizes")
    kernel, stride, padding, dilation = (_pair(sizes[i : i + 2]) for i in (2, 4, 6, 8))
    return ConvGeometry(sizes[0], sizes[1], kernel, stride, padding, dilation, sizes[10])


def _pair(sizes: list[int]) -> tuple[int, int]:
    if len(sizes) != 2:
        raise InputError("a window has no two sizes")
    return sizes[0], sizes[1]


def _digest(note: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the program and of all tensors."""
    sha = hashlib.sha256(json.dumps({**note, "sha256": ""}, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(as_integers(tensor).numpy().tobytes())
    return sha.hexdigest()
