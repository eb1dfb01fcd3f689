"""A file of PyTorch that holds the hash of its own bytes.

``torch.save`` writes a ZIP archive, and a ZIP archive may end with a comment. Here the comment is
the SHA-256 of everything before it, so ``torch.load`` and any unzipper read the file as it is.
"""

from __future__ import annotations

import hashlib
import io
from typing import Any

import torch

_MARK = b"acdc sha256 "
_LENGTH = len(_MARK) + 64
_NO_COMMENT = b"\0\0"  # the last two bytes of an archive without comment: its length
_END = 22  # bytes of an archive's last entry, without comment


class Damaged(Exception):
    """A file that cannot be read, or is not what was written. The message says why."""


def dump(state: Any) -> memoryview:
    """Return the bytes of a file that holds ``state``."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(-len(_NO_COMMENT), io.SEEK_END)
    assert file.read() == _NO_COMMENT
    file.seek(-len(_NO_COMMENT), io.SEEK_END)
    file.write(_LENGTH.to_bytes(2, "little"))
    file.write(_MARK + hashlib.sha256(file.getbuffer()).hexdigest().encode())
    return file.getbuffer()


def load(data: bytes) -> tuple[Any, bool]:
    """Return what a file holds, on the CPU, and whether it has its hash.

    A plain file of PyTorch has none. Only plain data and tensors are let through.

    Raises:
        Damaged: The hash is of other bytes, or the file cannot be read.
    """
    sealed = data[-_LENGTH:].startswith(_MARK)
    if sealed:
        digest = hashlib.sha256(data[:-_LENGTH]).hexdigest()
        if data[-_LENGTH:] != _MARK + digest.encode():
            raise Damaged("its checksum does not agree")
    elif not (data[-_END:].startswith(b"PK\5\6") and data.endswith(_NO_COMMENT)):
        raise Damaged("its end is damaged or missing")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch makes of damaged bytes
        raise Damaged(f"{type(error).__name__}: {error}") from error
    return state, sealed
