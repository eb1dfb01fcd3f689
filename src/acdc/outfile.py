"""One file at a path that the user names: ``--json PATH``, ``--out PATH``, a page.

A regular file appears as a whole: it is written beside the old one and renamed, and keeps the
permissions of the old one. A symbolic link is followed, so that its target is replaced and the link
stays. Whatever else can be written, such as a pipe, a terminal or ``/dev/null``, is opened and
written into, and is never replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from pathlib import Path

from acdc.errors import InputError
from acdc.files import Staging

_MOST_LINKS = 40  # as Linux allows


def write(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file, and return its path as it was given.

    Args:
        path: The file, a symbolic link to it, a pipe or a device. The folders above a regular file
            are made if needed.
        data: What it holds afterwards.

    Raises:
        InputError: The path is a folder, or cannot be written. A regular file is as it was.
    """
    path = Path(path)
    try:
        if is_stream(path):
            _write_into(path, data)
            return path
        target = regular(path)
    except OSError as error:
        raise unwritable(path, error) from error
    with Staging(target.parent, target.name) as staging:
        written = staging.place(target.name)
        written.write_bytes(data)
        keep_mode(target, written)
        staging.commit()
    return path


def check(path: str | os.PathLike[str]) -> None:
    """See that a file can be written at ``path``, before hours are spent on what it will hold.

    Raises:
        InputError: The path is a folder, is too long, or may not be written.
    """
    path = Path(path)
    try:
        if is_stream(path):
            return
        target = regular(path)
        above = next(folder for folder in target.parents if folder.exists())
        if not above.is_dir():
            raise _error(errno.ENOTDIR)
        if not os.access(above, os.W_OK):
            raise _error(errno.EACCES)
    except OSError as error:
        raise unwritable(path, error) from error


def is_stream(path: Path) -> bool:
    """Return whether a path names something that is written into: a pipe, a device, a descriptor.

    Raises:
        OSError: The path leads nowhere, as a loop of links does.
        InputError: It is a folder.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise InputError(
            f"{path} is a folder, and a file is to be written there. Name a file in it, such as "
            f"{path / 'out'}."
        )
    return not stat.S_ISREG(mode) or _descriptor(path) is not None


def regular(path: Path) -> Path:
    """Return the regular file that a path names, links followed. It need not exist.

    Raises:
        OSError: There is a file that must not be written, or the path leads nowhere.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not os.access(target, os.W_OK):
        raise _error(errno.EACCES)
    return target


def keep_mode(target: Path, written: Path) -> None:
    """Give a file the permissions of the one that it is about to replace, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        os.chmod(written, stat.S_IMODE(os.stat(target).st_mode))


def unwritable(path: Path, error: OSError) -> InputError:
    """Return the sentence for a file that cannot be written."""
    return InputError(
        f"Cannot write {path.name} to {path.parent}: {error.strerror or error}. Choose a file that "
        f"you may write."
    )


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _write_into(path: Path, data: bytes) -> None:
    """Write into a pipe, a device, or a file that this process has open."""
    descriptor = _descriptor(path)
    if descriptor is None:
        # Not created and not cut off: it exists, and may be a device.
        with open(os.open(path, os.O_WRONLY | os.O_NOCTTY), "wb") as file:
            file.write(data)
        return
    # Opened again, a file would be written from its start: over what was printed before.
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)


def _descriptor(path: Path) -> int | None:
    """Return the open file that a path such as ``/dev/stdout`` or ``/dev/fd/3`` stands for."""
    own = {f"/proc/{os.getpid()}/fd", f"/proc/{os.getpid()}/task/{os.getpid()}/fd"}
    name = os.fspath(path)
    for _ in range(_MOST_LINKS):
        folder, last = os.path.split(name)
        folder = os.path.realpath(folder)
        if folder in own:
            return int(last) if last.isdigit() else None
        name = os.path.join(folder, last)
        if not os.path.islink(name):
            return None
        name = os.path.join(folder, os.readlink(name))
    return None
