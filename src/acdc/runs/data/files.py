"""Finding, fetching and reading data files; every file is checked before it is used."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import struct
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from acdc.errors import InputError
from acdc.files import cache_folder, expanded
from acdc.runs.data import pickles

VARIABLE = "ACDC_DATA"


def named_folder() -> Path | None:
    """Return the folder that the environment variable ``ACDC_DATA`` names; ``None`` if unset."""
    value = os.environ.get(VARIABLE, "").strip()
    return expanded(Path(value)) if value else None


def candidates(
    root: Path | None, standard: Sequence[str], installed: Sequence[Path] = ()
) -> list[Path]:
    """Return the folders to look in, best first.

    Args:
        root: The folder that the caller named. If it is given, only ``root`` and its subfolders
            are returned.
        standard: Usual names of the data set's own folder inside a folder of data sets.
        installed: Folders of a package of the operating system.
    """
    named = named_folder()
    if root is not None:
        bases, installed = [expanded(root)], ()
    else:
        bases = [] if named is None else [named]
    folders = [sub for base in bases for sub in (base, *(base / name for name in standard))]
    folders += installed
    cache = cache_folder()
    if root is None and cache is not None:
        folders += [cache / name for name in standard[:1]]
    return folders


def target_folder(root: Path | None, standard: str) -> Path:
    """Return the folder for a download of the data set: its standard folder in the named folder.

    Raises:
        InputError: No folder is named, and the user has no home folder.
    """
    base = (expanded(root) if root is not None else named_folder()) or cache_folder()
    if base is None:
        raise InputError(
            f"There is no folder for downloads: this user has no home folder. Set {VARIABLE} to a "
            f"folder, or XDG_CACHE_HOME."
        )
    return base if base.name == standard else base / standard


def find(
    names: Sequence[str], folders: Sequence[Path], endings: Sequence[str] = ("",)
) -> list[Path] | None:
    """Return the files ``names``, each with one of ``endings``, from the first folder with all."""
    for folder in folders:
        found = _those_in(names, folder, endings)
        if len(found) == len(names):
            return found
    return None


def _those_in(names: Sequence[str], folder: Path, endings: Sequence[str]) -> list[Path]:
    paths = ([folder / (name + ending) for ending in endings] for name in names)
    return [found for path in paths if (found := next(filter(Path.is_file, path), None))]


def not_found(
    what: str,
    names: Sequence[str],
    folders: Sequence[Path],
    ways: Sequence[str],
    endings: Sequence[str] = ("",),
) -> InputError:
    """Return the error for missing data: the folders that were searched, and ways to get them."""
    looked = "; ".join(map(str, folders)) or f"nowhere, as {VARIABLE} is not set"
    text = f"{what} was not found. Looked in: {looked}."
    for folder in folders:
        some = _those_in(names, folder, endings)
        if some:
            have = {path.name.removesuffix(".gz") for path in some}
            lacking = ", ".join(name for name in names if name not in have)
            text += f" The folder {folder} is incomplete: {lacking} is missing."
    listed = "; ".join(f"({number}) {way}" for number, way in enumerate(ways, 1))
    return InputError(f"{text} What to do: {listed}.")


@contextmanager
def _readable(path: Path, remedy: str) -> Iterator[None]:
    """Turn errors of reading a file into ``InputError``."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is cut off or damaged ({error}). {remedy}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}). {remedy}") from error


# --- Fetching -------------------------------------------------------------------------------------


def fetch(url: str, target: Path, md5: str) -> None:
    """Download ``url`` to ``target``, which appears only if the md5 checksum agrees.

    Raises:
        InputError: The server cannot be reached, the file is not the published one, or it cannot be
            written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _appearing(target) as out:
            checksum, count = hashlib.md5(usedforsecurity=False), 0
            with urllib.request.urlopen(url, timeout=60) as answer:
                while chunk := answer.read(1 << 20):
                    checksum.update(chunk)
                    out.write(chunk)
                    count += len(chunk)
            if checksum.hexdigest() != md5:
                raise InputError(
                    f"What came from {url} is not the published file: {count} bytes with md5 "
                    f"{checksum.hexdigest()}, where {md5} was expected. Nothing was kept. Try "
                    f"again; if it stays so, get the files another way and set {VARIABLE}."
                )
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"Downloading {url} to {target} failed ({error}). Nothing was kept. Check the "
            f"connection and the disk and try again, or put the files into a folder yourself and "
            f"set {VARIABLE} to it."
        ) from error


@contextmanager
def _appearing(target: Path) -> Iterator[IO[bytes]]:
    """Write beside ``target`` and rename at the end, so that ``target`` is never half-written."""
    descriptor, name = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.name}.", suffix=".part"
    )
    try:
        with os.fdopen(descriptor, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def unpack(archive: Path, members: Sequence[str], folder: Path) -> None:
    """Write only the named members of a .tar.gz into ``folder``, without their inner folders.

    Raises:
        InputError: The archive lacks a member or is damaged, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive, "r:gz") as tar:
            for member in members:
                content = tar.extractfile(member)
                if content is None:
                    raise KeyError(f"{member} is not a file")
                with content, _appearing(folder / Path(member).name) as out:
                    while chunk := content.read(1 << 20):
                        out.write(chunk)
    except (OSError, EOFError, zlib.error, tarfile.TarError, KeyError) as error:
        raise InputError(
            f"{archive} could not be unpacked into {folder} ({error}). Check the disk and download "
            f"again."
        ) from error


# --- IDX, the format of MNIST and of data sets like it --------------------------------------------


def read_idx(path: Path, shape: tuple[int, ...]) -> tuple[NDArray[np.uint8], str]:
    """Read an IDX file of bytes, plain or ``.gz``.

    The format: two zero bytes, 8 for unsigned bytes, the number of dimensions, each dimension as a
    big-endian 32-bit number, then the bytes, last dimension fastest
    (http://yann.lecun.com/exdb/mnist/).

    Args:
        path: The file.
        shape: The shape that the array must have.

    Returns:
        The array, and the md5 (hex) of the unpacked content.

    Raises:
        InputError: The file is damaged, cut off, too long, or holds something else.
    """
    remedy = "Get the file anew."
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    length = len(header) + int(np.prod(shape))
    with _readable(path, remedy), path.open("rb") as plain:
        file: IO[bytes] | gzip.GzipFile = (
            gzip.GzipFile(fileobj=plain) if path.suffix == ".gz" else plain
        )
        content = file.read(length + 1)
    if content[:4] != header[:4]:
        raise InputError(
            f"{path} starts with the bytes {content[:4].hex(' ') or '(none)'}. An IDX file of "
            f"bytes in {len(shape)} dimension(s) starts with {header[:4].hex(' ')}. {remedy}"
        )
    if len(content) >= len(header) and content[: len(header)] != header:
        got = struct.unpack(f">{len(shape)}I", content[4 : len(header)])
        raise InputError(f"{path} holds an array of shape {got}; {shape} is needed. {remedy}")
    if len(content) != length:
        how = "is longer than" if len(content) > length else "ends before"
        raise InputError(f"{path} {how} the {length} bytes that shape {shape} asks for. {remedy}")
    array = np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(shape).copy()
    return array, hashlib.md5(content, usedforsecurity=False).hexdigest()


# --- Pickles of CIFAR -----------------------------------------------------------------------------


def read_cifar(path: Path, key: str, rows: int, classes: int) -> tuple[NDArray[np.uint8], Any, str]:
    """Read one pickle of CIFAR-10 or CIFAR-100 without running other code that it may hold.

    Args:
        path: The file.
        key: Key of the labels: ``"labels"`` or ``"fine_labels"``.
        rows: The number of images that the file must have.
        classes: Labels must be ``0 .. classes - 1``.

    Returns:
        Images, uint8 ``[rows, 3, 32, 32]``; labels, int64 ``[rows]``; the md5 (hex) of the file.

    Raises:
        InputError: The file is damaged, or holds other content than arrays of this shape.
    """
    remedy = "Get the data set anew."
    # The official files have 3.1 KiB an image and 6 instructions; old protocols take more.
    most = 32_768 * rows + 2**20
    with _readable(path, remedy), path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise InputError(f"{path} is longer than any file of {rows} images. {remedy}")
    try:
        content = pickles.read(raw, 64 * rows + 100_000)
    except Exception as error:  # a damaged pickle can raise nearly anything, of any class
        cause = str(error)[:200] or type(error).__name__
        raise InputError(
            f"{path} was not read as a pickle of arrays ({cause}). It is damaged, or not a file of "
            f"this data set. {remedy}"
        ) from error
    images = content.get("data") if isinstance(content, dict) else None
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.shape != (rows, 3 * 32 * 32)
    ):
        raise InputError(
            f"{path} must hold an array 'data' of {rows} x 3072 bytes, and does not. {remedy}"
        )
    labels = content.get(key)
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()
    if not (
        isinstance(labels, list)
        and len(labels) == rows
        and all(type(n) is int and n.bit_length() < 64 for n in labels)
    ):
        raise InputError(f"{path} must hold {rows} whole numbers in {key!r}. {remedy}")
    if min(labels) < 0 or max(labels) >= classes:
        raise InputError(
            f"The labels in {path} go from {min(labels)} to {max(labels)}, and must lie between 0 "
            f"and {classes - 1}. {remedy}"
        )
    checksum = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    return images.reshape(rows, 3, 32, 32), np.array(labels, np.int64), checksum
