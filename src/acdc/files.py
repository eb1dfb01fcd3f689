"""Files that appear as a whole: written aside, flushed to the disk, then renamed into place."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from acdc.errors import InputError

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Staging:
    """Write files aside, then rename them all into a folder: a context manager.

    Leaving the context without :meth:`commit`, for whatever reason, removes what was written and
    leaves the folder as it was. An OSError leaves it as an InputError with the remedy.

    Args:
        folder: Where the files go. Made if needed.
        what: What they are, for the error message.
    """

    def __init__(self, folder: Path, what: str) -> None:
        self.folder = folder
        self.what = what
        # One fixed name, on the same disk: a save that was killed leaves no more than one of it.
        self._aside = folder / ".acdc-saving"
        self._names: list[str] = []
        self._renamed = False

    def __enter__(self) -> Self:
        return self

    def place(self, name: str) -> Path:
        """Return where to write the file ``name`` for now. It need not be written at all."""
        self._aside.mkdir(parents=True, exist_ok=True)
        self._names.append(name)
        (self._aside / name).unlink(missing_ok=True)  # of a save that was killed
        return self._aside / name

    def add(self, name: str, data: bytes) -> None:
        """Write ``data`` as the file ``name``."""
        self.place(name).write_bytes(data)

    def commit(self) -> None:
        """Flush the files to the disk; then rename them, in the order in which they were added."""
        written = [name for name in self._names if (self._aside / name).exists()]
        for name in written:
            _flush(self._aside / name)
        for name in written:
            os.replace(self._aside / name, self.folder / name)
            self._renamed = True
        _flush(self.folder)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            for name in self._names:
                (self._aside / name).unlink(missing_ok=True)
            self._aside.rmdir()
        if isinstance(error, OSError):
            raise self._sentence(error) from error

    def _sentence(self, error: OSError) -> InputError:
        cause = error.strerror or str(error)
        remedy = "Choose a folder that you may write to."
        if error.errno in _FULL_DISK:
            free = ""
            with contextlib.suppress(OSError):
                free = f" ({shutil.disk_usage(self.folder).free:,} bytes are free)"
            remedy = f"Free some space{free}, or choose another folder, and save again."
        after = "What was there before is as it was."
        if self._renamed:
            after = "The files there may be of two saves now: save again."
        return InputError(f"Cannot write {self.what} to {self.folder}: {cause}. {remedy} {after}")


def _flush(path: Path) -> None:
    """Return when the file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
