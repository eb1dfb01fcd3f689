"""One network as one ordinary safetensors file, for any program that reads the format."""

from __future__ import annotations

import os
from pathlib import Path

from acdc.bitmask import serialize
from acdc.index import INDICES, Twin
from acdc.outfile import write
from acdc.pair import Pair
from acdc.result import DenseNetwork, Result, SparseNetwork, load


def to_safetensors(
    result: Result | str | os.PathLike[str], path: str | os.PathLike[str], twin: Twin = "sparse"
) -> Path:
    """Write the state dict of one network to ``path``, every tensor dense, and return the path.

    A sparse network has its zeros written out: the file is as large as that of a dense one. The
    small file is the ``sparse.safetensors`` that :meth:`acdc.Pair.save` writes.

    Args:
        result: A result of training, its folder, or the folder of a run that has one in ``pair/``.
        path: The file to write. One that is there is replaced; a pipe or a device is written into.
        twin: ``"sparse"`` or ``"dense"``.

    Raises:
        InputError: There is no such result, it does not have that network, or the file cannot be
            written.
    """
    return write(path, serialize(_load(result).state(twin), {"format": "pt"}))


def _load(result: Result | str | os.PathLike[str]) -> Result:
    if isinstance(result, Pair | SparseNetwork | DenseNetwork):
        return result
    folder = Path(result)
    nested = folder / "pair"
    if not _holds_one(folder) and _holds_one(nested):
        folder = nested
    return load(folder)


def _holds_one(folder: Path) -> bool:
    return any(index.is_in(folder) for index in INDICES)
