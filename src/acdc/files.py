"""Files that appear as a whole: written aside, flushed to the disk, then renamed into place.

A single file is replaced by one rename. Several files are replaced together in three steps:

1. They are written into the folder ``.acdc-saving`` beside them, and flushed.
2. That folder is renamed to ``.acdc-saved``. From here on the save counts.
3. Each file is moved from ``.acdc-saved`` to its place.

A save that is killed before step 2 leaves what was there before. A save that is killed later leaves
the rest of its files in ``.acdc-saved``. :func:`latest` and :func:`read` find them there, and the
next save in the folder moves them first. Reading changes nothing, so it works in a folder that is
read-only, too.

A save replaces regular files alone, and refuses a symbolic link: what a link points to may be on
another disk, where nothing can be renamed to. The folder itself may be a link.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from acdc.errors import InputError

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SAVING, _SAVED, _LOCK = ".acdc-saving", ".acdc-saved", ".lock"
_PATIENCE = 60.0  # seconds that a save waits for another save in the same folder


class Staging:
    """Write files aside, then move them all into a folder: a context manager.

    Leaving the context without :meth:`commit`, for whatever reason, removes what was written and
    leaves the folder as it was. An OSError leaves it as an InputError with the remedy. A second
    save in the same folder waits for the first.

    Args:
        folder: Where the files go. Made if needed.
        what: What they are, for the error message.
    """

    def __init__(self, folder: Path, what: str) -> None:
        self.folder = folder
        self.what = what
        # One fixed name, on the same disk: a save that was killed leaves no more than one of it.
        self._aside = folder / _SAVING
        self._names: list[str] = []
        self._lock: int | None = None
        self._saved = False

    def __enter__(self) -> Self:
        return self

    def place(self, name: str) -> Path:
        """Return where to write the file ``name`` for now. It need not be written at all.

        Raises:
            InputError: Something that a rename must not replace has this name, such as a link.
        """
        self._check_replaceable(name)
        if self._lock is None:
            self._begin()
        self._names.append(name)
        return self._aside / name

    def add(self, name: str, data: bytes | memoryview) -> None:
        """Write ``data`` as the file ``name``."""
        self.place(name).write_bytes(data)

    def commit(self) -> None:
        """Flush the files to the disk, then put them in place: all of them, or none."""
        written = [name for name in self._names if (self._aside / name).exists()]
        for name in written:
            _flush(self._aside / name)
        if len(written) == 1:
            os.replace(self._aside / written[0], self.folder / written[0])
        elif written:
            _flush(self._aside)
            os.replace(self._aside, self.folder / _SAVED)
            self._saved = True
            _flush(self.folder)
            _put_in_place(self.folder)
        _flush(self.folder)

    def _check_replaceable(self, name: str) -> None:
        """See that ``name`` is free, or names a regular file."""
        path = self.folder / name
        try:
            mode = path.lstat().st_mode
        except OSError:
            return  # it is not there; if it cannot be reached, writing says so
        if stat.S_ISREG(mode):
            return
        found = "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
        raise InputError(
            f"Cannot write {self.what} to {self.folder}: {name} there is {found}, and a save "
            f"replaces regular files alone. Remove it, or choose another folder. To write to "
            f"another disk, make the whole folder a link. What was there before is as it was."
        )

    def _begin(self) -> None:
        """Wait for other saves, end what a killed save began, and make the folder aside."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        if not _locked(self._lock, _PATIENCE):
            raise InputError(
                f"Cannot write {self.what} to {self.folder}: another process has been writing "
                f"there for more than {_PATIENCE:.0f} seconds. Wait for it, or stop it, and save "
                f"again."
            )
        _put_in_place(self.folder)
        if self._aside.is_dir():
            shutil.rmtree(self._aside)  # of a save that was killed
        self._aside.mkdir()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with contextlib.suppress(OSError):
                if self._names and self._aside.is_dir():
                    shutil.rmtree(self._aside)
        finally:
            if self._lock is not None:
                os.close(self._lock)
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
        if self._saved:
            after = f"The new files are whole: those that are not in place are in {_SAVED} there."
        return InputError(f"Cannot write {self.what} to {self.folder}: {cause}. {remedy} {after}")


def expanded(path: Path) -> Path:
    """Return a path with ``~`` replaced by the home folder; as it is if there is none."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def cache_folder() -> Path | None:
    """Return the folder for what can be made or fetched again: ``$XDG_CACHE_HOME/acdc``.

    ``None`` for a user without a home folder, as in some containers.
    """
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    home = expanded(Path("~/.cache"))
    if not base and home.parts[0] == "~":
        return None
    return (Path(base) if base else home) / "acdc"


def latest(path: Path) -> Path:
    """Return where a file of the last save is: in its place, unless the save was killed."""
    waiting = path.parent / _SAVED / path.name
    return waiting if waiting.is_file() else path


def read(path: Path) -> bytes:
    """Return what the last save wrote as this file."""
    try:
        return (path.parent / _SAVED / path.name).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return path.read_bytes()


def _put_in_place(folder: Path) -> None:
    """Move the files of a save that counts into the folder."""
    saved = folder / _SAVED
    if not saved.is_dir():
        return
    for path in sorted(saved.iterdir()):
        os.replace(path, folder / path.name)
    _flush(folder)
    saved.rmdir()


def _flush(path: Path) -> None:
    """Return when the file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- locks --------------------------------------------------------------------------------------


@contextlib.contextmanager
def alone(folder: Path, refusal: str, patience: float = 0.0) -> Iterator[int]:
    """Hold the lock of a folder, the file ``.lock``: a context manager.

    The system frees the lock of a process when the process ends, however it ends. Where there are
    no such locks (Windows, some network file systems), nothing keeps two processes apart.

    Args:
        folder: The folder. It is made, and removed again if nothing but the lock is in it at the
            end.
        refusal: What to say if another process holds the lock.
        patience: Seconds to wait for it.

    Yields:
        The descriptor of the lock. A child process that inherits it holds the lock, too.

    Raises:
        InputError: Another process holds the lock.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with _lock_of(folder, refusal, patience) as descriptor:
        try:
            yield descriptor
        finally:
            with contextlib.suppress(OSError):
                if made and os.listdir(folder) == [_LOCK]:
                    (folder / _LOCK).unlink()
                    for path in made:
                        path.rmdir()


@contextlib.contextmanager
def _lock_of(folder: Path, refusal: str, patience: float) -> Iterator[int]:
    """Open the lock of a folder and hold it."""
    lock = folder / _LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            if not _locked(file.fileno(), patience):
                raise InputError(refusal)
            if not (lock.exists() and os.path.samestat(lock.stat(), os.fstat(file.fileno()))):
                continue  # the process that held the lock removed the file
            yield file.fileno()
            return


def _locked(descriptor: int, patience: float) -> bool:
    """Lock an open file, and return whether it is locked now. Where there are no locks, it is."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(min(0.1, patience))
        except OSError:
            return True  # the file system has no locks
        else:
            return True
