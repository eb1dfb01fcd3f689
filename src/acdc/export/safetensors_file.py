"""One twin as one ordinary safetensors file, which any program that knows the format can read."""

from __future__ import annotations

import os
from pathlib import Path

from acdc.bitmask import serialize
from acdc.files import Staging
from acdc.pair import INDEX, Pair, Twin


def to_safetensors(
    pair: Pair | str | os.PathLike[str], path: str | os.PathLike[str], twin: Twin = "sparse"
) -> Path:
    """Write the state dict of one twin to ``path``, every tensor dense, and return the path.

    The sparse twin has its zeros written out: it is as large as the dense one. The small file is
    the ``sparse.safetensors`` of :meth:`acdc.Pair.save`.

    Args:
        pair: A pair, the folder of one, or the folder of a run that has one in ``pair/``.
        path: The file to write. One that is there is replaced.
        twin: ``"sparse"`` or ``"dense"``.

    Raises:
        InputError: There is no such pair, or the file cannot be written.
    """
    path = Path(path)
    state = _load(pair).state(twin)
    with Staging(path.parent, path.name) as staging:
        staging.add(path.name, serialize(state, {"format": "pt"}))
        staging.commit()
    return path


def _load(pair: Pair | str | os.PathLike[str]) -> Pair:
    if isinstance(pair, Pair):
        return pair
    folder = Path(pair)
    if not (folder / INDEX).exists() and (folder / "pair" / INDEX).exists():
        folder = folder / "pair"
    return Pair.load(folder)
