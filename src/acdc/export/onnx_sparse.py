"""Weights of an ONNX file as sparse initializers: the values that are not zero, and their indices.

ONNX wants 64-bit indices, so a kept float32 weight takes 12 bytes and a dense one 4: a weight is
written sparse where that makes the file smaller, from two zeros in three on. ONNX Runtime makes
the weights dense again as it loads the file.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from acdc.errors import InputError

_INDEX = 8  # bytes
_MESSAGE = 2**31 - 1  # bytes of a protobuf message


def make_sparse(onnx: Any, model: Any) -> int:
    """Replace initializers of an ONNX model by sparse ones where that is smaller.

    Args:
        onnx: The package.
        model: The model, with all data inside; changed in place.

    Returns:
        How many weights are sparse now.

    Raises:
        InputError: none is, or they do not fit one file.
    """
    graph = model.graph
    inputs = {value.name for value in graph.input}
    dense = []
    size = 0
    for tensor in graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        kept = np.flatnonzero(array)  # in the order that ONNX asks for
        # An initializer that is an input too is a default value, which is never sparse.
        if tensor.name in inputs or array.ndim < 2 or not _is_smaller(array, kept):
            dense.append(tensor)
            continue
        values = onnx.numpy_helper.from_array(array.reshape(-1)[kept], name=tensor.name)
        indices = onnx.numpy_helper.from_array(kept.astype(np.int64))
        graph.sparse_initializer.append(
            onnx.helper.make_sparse_tensor(values, indices, array.shape)
        )
        size += kept.size * (array.itemsize + _INDEX)
    if not graph.sparse_initializer:
        raise InputError(
            "sparse=True makes nothing smaller: no weight of this network has more than two zeros "
            "in three (float32). Leave it out."
        )
    if size > _MESSAGE:
        raise InputError(
            f"The sparse weights take {size:,} bytes, and an ONNX file holds {_MESSAGE:,}. Leave "
            f"sparse=True out: large dense weights go to a second file."
        )
    del graph.initializer[:]
    graph.initializer.extend(dense)
    return len(graph.sparse_initializer)


def dense_array(onnx: Any, sparse: Any) -> Any:
    """Return a sparse initializer as a dense array."""
    values = onnx.numpy_helper.to_array(sparse.values)
    array = np.zeros(tuple(sparse.dims), values.dtype)
    array.reshape(-1)[onnx.numpy_helper.to_array(sparse.indices)] = values
    return array


def _is_smaller(array: Any, kept: Any) -> bool:
    return bool(kept.size * (array.itemsize + _INDEX) < array.nbytes)
