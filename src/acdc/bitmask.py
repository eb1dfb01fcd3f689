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
``{"layout": "sparse-bitmask", "weights": {P: name, ...}, "aliases": {name: other, ...}}``.
An alias is a tied tensor: bitwise equal to the weight ``other``, and stored only there.

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

import json
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from acdc.errors import InputError
from acdc.support import Support

FIELDS = ("shape", "compressed", "bitmask", "row_offsets")


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

    note = {"layout": "sparse-bitmask", "weights": weights, "aliases": aliases}
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


def decode(
    stored: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the state dict and the masks that :func:`encode` was given."""
    note = json.loads(metadata["acdc"])
    if note["layout"] != "sparse-bitmask":
        raise InputError(f"the layout {note['layout']!r} is unknown")
    plain = dict(stored)
    state: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for prefix, name in note["weights"].items():
        fields = {part: plain.pop(f"{prefix}.{part}") for part in FIELDS}
        state[name], masks[name] = _decompress(name, **fields)
    state |= plain
    state |= {name: state[other] for name, other in note["aliases"].items()}
    return state, masks


def _decompress(
    name: str, shape: Tensor, compressed: Tensor, bitmask: Tensor, row_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    size = tuple(shape.tolist())
    rows, columns = _matrix(size)
    if bitmask.dtype != torch.uint8 or bitmask.shape != (rows, -(-columns // 8)):
        raise InputError(f"the bitmask of {name!r} does not fit the shape {size}")
    bits = np.unpackbits(bitmask.numpy(), axis=1, bitorder="little").astype(bool)
    mask = torch.from_numpy(bits[:, :columns].copy())
    per_row = mask.sum(1)
    if bits[:, columns:].any() or compressed.shape != (int(per_row.sum()),):
        raise InputError(f"{name!r} has not as many values as its bitmask has ones")
    if not torch.equal(row_offsets.to(torch.int64), per_row.cumsum(0) - per_row):
        raise InputError(f"the row offsets of {name!r} disagree with its bitmask")
    flat = torch.zeros(rows, columns, dtype=_INT_OF_SIZE[compressed.element_size()])
    flat[mask] = as_integers(compressed)
    return flat.view(compressed.dtype).reshape(size), mask.reshape(size)


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file of these tensors, from any device, tied or not contiguous."""
    import safetensors.torch

    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return safetensors.torch.save(plain, metadata=dict(metadata))


def deserialize(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, given its bytes."""
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise InputError(f"not a safetensors file: {error}") from error


def read_metadata(data: bytes) -> dict[str, str]:
    """Return the ``__metadata__`` of a safetensors file, which ``safetensors.torch.load`` drops."""
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return metadata
