"""The file format of a sparse network: ``sparse.safetensors``.

A tensor that is not in the support is stored plain, under its own name. A weight that is in the
support, of shape ``[d0, d1, ...]``, is seen as a matrix of ``d0`` rows by ``d1·d2·...`` columns
(fewer than two dimensions: one row) and stored as four tensors with the field names of the
*sparse-bitmask* format of the package ``compressed-tensors``:

=============  ================  ============================================================
P.shape        int64 [ndim]      the shape of the weight
P.compressed   dtype [nnz]       the kept values, row by row; a kept value may be 0.0 or NaN
P.bitmask      uint8 [rows,      one bit for each weight, 1 = kept. Weight ``c`` of a row is
               ceil(columns/8)]  bit ``c % 8`` (bit 0 is worth 1) of byte ``c // 8``. A row
                                 starts on a byte; the bits after its end are 0
P.row_offsets  int32 [rows]      where a row begins in ``P.compressed``; int64 if nnz >= 2^31
=============  ================  ============================================================

The prefix ``P`` is the name of the weight without ``.weight`` (``fc.weight`` gives ``fc.bitmask``),
unless the name does not end so or the four fields would hide another tensor. The header's
``__metadata__["acdc"]`` is a JSON object with all of them:
``{"layout": "sparse-bitmask", "sha256": ..., "weights": {P: name, ...}, "aliases": {name: other,
...}}``. An alias is a tied tensor: bitwise equal to the weight ``other``, and stored only there.
``sha256`` is that of the whole file with these 64 digits replaced by zeros, so that the file can be
checked without the index beside it.

To read a weight: zeros of its shape, then ``flat[bits] = compressed``. ``docs/formats.md`` has a
reader of ten lines that needs safetensors and NumPy only.

Releases 0.10 to 0.14 of ``compressed-tensors`` read a two-dimensional weight of this format; they
write the row offsets as int64. Releases from 0.15 on have no reader for the format. They also never
flattened a convolution: every row of a 3x3 kernel took a whole byte for three bits, so convolutions
cannot be exchanged with them.

At sparsity 0.95 and float32 the weights take 5 % (values) and 3.1 % (bits) of their dense bytes.
Beside them stand the tensors that are not pruned, 4 bytes a row, and some 500 bytes of names a
layer: in total 9.8 % of the dense file for 300 thousand weights in 10 layers, 8.7 % for ResNet-50.
In smaller networks and smaller layers, names and BatchNorm weigh more: 11.0 % for the CIFAR
ResNet-20, 12.5 % for 77 thousand weights in 10 layers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acdc.errors import InputError
from acdc.schema import Each, check, parse
from acdc.support import Support

FIELDS = ("shape", "compressed", "bitmask", "row_offsets")

_LAYOUT = "sparse-bitmask"
_ZEROS = "0" * 64
_NOTE = {
    "layout": str,
    "sha256?": str,  # files of older versions have none
    "weights": Each(str, str),
    "aliases": Each(str, str),
}


_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(tensor: Tensor) -> Tensor:
    """Return the tensor as integers of the same size: NaN, -0.0 and 0.0 are what they are.

    Contiguous, of the same shape; complex64 as int64.
    """
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.view(_INT_OF_SIZE[plain.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same shape, dtype and bits."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(as_integers(a), as_integers(b).to(a.device))
    )


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of the matrix as which a weight of ``shape`` is stored."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def encode(
    state: Mapping[str, Tensor], support: Support
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of sparse.safetensors."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        if name in support:
            continue
        # Found by value, not by storage: a state dict that was copied is no longer tied.
        same = next((w for w in support if same_bits(tensor, state[w])), None)
        if same is None:
            stored[name] = tensor
        else:
            aliases[name] = same

    weights: dict[str, str] = {}
    taken = {*stored, *aliases}
    for name in support:
        prefix = name.removesuffix(".weight")
        while taken & {f"{prefix}.{part}" for part in FIELDS}:
            prefix = name if len(prefix) < len(name) else prefix + "_"
        weights[prefix] = name
        fields = _compress(state[name], support[name])
        stored |= {f"{prefix}.{part}": tensor for part, tensor in fields.items()}
        taken |= stored.keys()

    note = {"layout": _LAYOUT, "sha256": _ZEROS, "weights": weights, "aliases": aliases}
    # One entry and no second: safetensors writes several in an order that is new each time.
    return stored, {"acdc": json.dumps(note)}


def _compress(weight: Tensor, mask: Tensor) -> dict[str, Tensor]:
    rows, columns = _matrix(tuple(weight.shape))
    flat = mask.cpu().reshape(rows, columns)
    per_row = flat.sum(1)
    offsets = per_row.cumsum(0) - per_row
    small = int(per_row.sum()) < 2**31
    packed = np.packbits(flat.numpy(), axis=1, bitorder="little")
    return {
        "shape": torch.tensor(weight.shape, dtype=torch.int64),
        "compressed": as_integers(weight.cpu()).reshape(rows, columns)[flat].view(weight.dtype),
        "bitmask": torch.from_numpy(packed),
        "row_offsets": offsets.to(torch.int32) if small else offsets,
    }


def decode(data: bytes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the state dict and the masks of a file, given its bytes.

    The checksum is not compared: see :func:`check_sum`.

    Raises:
        InputError: It is no such file, or its parts do not fit together.
    """
    note = _note(data)
    plain = deserialize(data)
    state: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for prefix, name in note["weights"].items():
        fields = {part: _taken(plain, f"{prefix}.{part}") for part in FIELDS}
        state[name], masks[name] = _decompress(name, **fields)
    state |= plain
    for name, other in note["aliases"].items():
        if other not in masks:
            raise InputError(f"{name!r} is to be {other!r}, which is no weight of the file")
        state[name] = state[other]
    return state, masks


def check_sum(data: bytes) -> None:
    """See that a file is as it was written, bit for bit.

    Raises:
        InputError: It was altered, or an older version wrote it, without a checksum.
    """
    digest = _note(data).get("sha256")
    if digest is None:
        raise InputError("it has no checksum")
    if len(digest) != 64 or _digest(data, digest.encode()) != digest:
        raise InputError("its checksum does not agree")


def _taken(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise InputError(f"the tensor {name!r} is missing")
    return tensors.pop(name)


def _note(data: bytes) -> dict[str, Any]:
    """Return what the metadata of a file say of its tensors."""
    metadata = read_metadata(data)
    if "acdc" not in metadata:
        raise InputError("its metadata have no entry 'acdc'")
    try:
        note: dict[str, Any] = parse(metadata["acdc"])
        check(note, _NOTE, "the entry 'acdc' of its metadata")
    except ValueError as error:
        raise InputError(f"its metadata do not describe a sparse network: {error}") from error
    if note["layout"] != _LAYOUT:
        raise InputError(f"the layout {note['layout'][:40]!r} is unknown")
    return note


def _decompress(
    name: str, shape: Tensor, compressed: Tensor, bitmask: Tensor, row_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    if shape.dtype != torch.int64 or shape.dim() != 1 or (shape < 0).any():
        raise InputError(f"the shape of {name!r} is no list of sizes")
    size = tuple(shape.tolist())
    rows, columns = _matrix(size)
    if bitmask.dtype != torch.uint8 or bitmask.shape != (rows, -(-columns // 8)):
        raise InputError(f"the bitmask of {name!r} does not fit the shape {size}")
    # Compared first: without columns a bitmask has no bytes, however many rows it has.
    if row_offsets.shape != (rows,) or row_offsets.dtype not in (torch.int32, torch.int64):
        raise InputError(f"the row offsets of {name!r} do not fit the shape {size}")
    bits = np.unpackbits(bitmask.numpy(), axis=1, bitorder="little").astype(bool)
    mask = torch.from_numpy(bits[:, :columns].copy())
    per_row = mask.sum(1)
    if bits[:, columns:].any() or compressed.shape != (int(per_row.sum()),):
        raise InputError(f"{name!r} has not as many values as its bitmask has ones")
    if not torch.equal(row_offsets.to(torch.int64), per_row.cumsum(0) - per_row):
        raise InputError(f"the row offsets of {name!r} disagree with its bitmask")
    if compressed.element_size() not in _INT_OF_SIZE:
        raise InputError(f"the values of {name!r} are {compressed.dtype}")
    flat = torch.zeros(rows, columns, dtype=_INT_OF_SIZE[compressed.element_size()])
    flat[mask] = as_integers(compressed)
    return flat.view(compressed.dtype).reshape(size), mask.reshape(size)


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file of these tensors, from any device, tied or not contiguous.

    If the metadata are those of :func:`encode`, the file has its checksum in them.
    """
    import safetensors.torch

    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    data = safetensors.torch.save(plain, metadata=dict(metadata))
    if "acdc" not in metadata:
        return data
    # The metadata come first in the file, and in them the checksum comes before every name.
    before, zeros, after = data.partition(_ZEROS.encode())
    return b"".join((before, _digest(data, zeros).encode(), after))


def _digest(data: bytes, digits: bytes) -> str:
    """Return the SHA-256 of a file with the first occurrence of these digits replaced by zeros."""
    at, view = data.find(digits), memoryview(data)
    sha = hashlib.sha256(view[: max(at, 0)])
    if at >= 0:
        sha.update(_ZEROS.encode())
    sha.update(view[at + len(digits) if at >= 0 else 0 :])
    return sha.hexdigest()


def deserialize(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, given its bytes."""
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise InputError(f"not a safetensors file: {error}") from error


def read_metadata(data: bytes) -> dict[str, str]:
    """Return the ``__metadata__`` of a safetensors file, which ``safetensors.torch.load`` drops.

    Raises:
        InputError: The file is no safetensors file, or has none.
    """
    length = int.from_bytes(data[:8], "little")
    try:
        header = parse(data[8 : 8 + length])
        check(header, {"__metadata__": Each(str, str)}, "the header")
    except ValueError as error:
        raise InputError(f"not a safetensors file of acdc: {error}") from error
    metadata: dict[str, str] = header["__metadata__"]
    return metadata
