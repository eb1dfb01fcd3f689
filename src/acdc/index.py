"""The index of a folder of safetensors files, which says what the files held when they were saved.

An index is a JSON file. It holds the name and the version of its format, what its owner adds, and
size and SHA-256 of every file beside it. Its last entry, ``sha256``, is that of the index's own
bytes with those 64 digits replaced by zeros.

Nothing is ever unpickled. The files of a save replace those of the one before together, as
:mod:`acdc.files` says: a save that fails, or is killed at any moment, leaves all files of one save.
Copies that mix the files of two saves are refused by the hashes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from acdc.bitmask import serialize
from acdc.errors import InputError
from acdc.files import Staging, latest, read
from acdc.schema import COUNT, Each, Shape, check, parse
from acdc.support import Support

Twin = Literal["sparse", "dense"]
FILES: dict[Twin, str] = {"sparse": "sparse.safetensors", "dense": "dense.safetensors"}

VERSION = 1
_ZEROS = "0" * 64


# What reading a file with the wrong content may raise. RecursionError is a RuntimeError.
WRONG_CONTENT = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


class Refused(InputError):
    """A file that is not what was saved."""


@dataclass(frozen=True)
class Index:
    """The index of one kind of folder.

    Args:
        name: The file's name.
        twins: The networks that the folder holds.
        noun: What the folder holds, for sentences: ``"pair"``.
        saver: What writes the folder, for sentences: ``"Pair.save"``.
    """

    name: str
    twins: tuple[Twin, ...]
    noun: str
    saver: str

    @property
    def format(self) -> str:
        """The name of the format, the first entry of the file."""
        return f"acdc.{self.name.removesuffix('.json')}"

    def write(
        self,
        folder: Path,
        body: Mapping[str, Any],
        files: Mapping[Twin, tuple[Mapping[str, Tensor], Mapping[str, str]]],
    ) -> Path:
        """Write the files and the index into ``folder``, which is made if needed.

        Args:
            folder: The folder.
            body: Entries of the index between its version and its list of files.
            files: Tensors and metadata of every file.

        Raises:
            InputError: The disk is full, the folder cannot be written, or the folder holds the
                index of another kind.
        """
        others = [index for index in INDICES if index != self and index.is_in(folder)]
        if others:
            raise InputError(
                f"{folder} already holds a {others[0].noun} ({others[0].name}). Choose another "
                f"folder for the {self.noun}, or remove what is there."
            )
        with Staging(folder, f"the {self.noun}") as staging:
            entries = {}
            for twin, (tensors, metadata) in files.items():
                data = serialize(tensors, metadata)
                staging.add(FILES[twin], data)
                entries[twin] = {"name": FILES[twin], "bytes": len(data), "sha256": _sha256(data)}
            index = {
                "format": self.format,
                "version": VERSION,
                **body,
                "files": entries,
                "sha256": _ZEROS,
            }
            text = json.dumps(index, indent=1, ensure_ascii=True) + "\n"
            head, tail = text.rsplit(_ZEROS, 1)
            staging.add(self.name, (head + _sha256(text.encode()) + tail).encode())
            staging.commit()
        return folder

    def is_in(self, folder: Path) -> bool:
        """Return whether a folder has this index."""
        return latest(folder / self.name).is_file()

    def read(self, folder: Path) -> dict[str, Any]:
        """Return the index that ``folder`` holds.

        Raises:
            InputError: The file is missing, truncated, altered, of another kind, or newer.
        """
        path = folder / self.name
        raw = self._bytes(path)
        altered = Refused(
            f"{path} was truncated or altered after it was saved: its own checksum does not agree. "
            f"Take a fresh copy of the folder, or save the {self.noun} again."
        )
        try:
            text = raw.decode("ascii")
            index = parse(text)
        except ValueError as error:
            raise altered from error
        if not isinstance(index, dict) or index.get("format") != self.format:
            raise Refused(
                f"{path} is not the index of a {self.noun}: its format is not {self.format!r}. "
                f"Give the folder that {self.saver} wrote."
            )
        version = index.get("version")
        if isinstance(version, int) and version > VERSION:
            raise Refused(
                f"{path} is of format version {version}, and this acdc reads up to {VERSION}. "
                f"Upgrade acdc."
            )
        digest = index.get("sha256")
        if version != VERSION or not isinstance(digest, str) or text.count(digest) != 1:
            raise altered
        if _sha256(text.replace(digest, _ZEROS).encode()) != digest:
            raise altered
        with self.fitting(folder):
            check(index, self._shape, "the index")
        checked: dict[str, Any] = index
        return checked

    @property
    def _shape(self) -> Shape:
        entry = {"name": str, "bytes": COUNT, "sha256": str}
        support = {"sha256": str, "layers": Each(str, {"shape": [COUNT], "kept": COUNT})}
        return {
            "facts": dict,
            "tensors": [str],
            "files": dict.fromkeys(self.twins, entry),
            **({"support": support} if "sparse" in self.twins else {}),
        }

    def read_file(self, folder: Path, twin: Twin, entry: Mapping[str, Any]) -> bytes:
        """Return the bytes of one file, if they are those that the index knows.

        Raises:
            InputError: The file is missing, or has another size or hash.
        """
        path = folder / FILES[twin]
        data = self._bytes(path)
        if len(data) != entry["bytes"]:
            raise Refused(
                f"{path} has {len(data)} bytes, and {entry['bytes']} were saved: it is truncated, "
                f"or of another save. Take a fresh copy of the folder, or save the {self.noun} "
                f"again."
            )
        if _sha256(data) != entry["sha256"]:
            raise Refused(
                f"{path} was altered after it was saved, or is of another save: its checksum does "
                f"not agree. Take a fresh copy of the folder, or save the {self.noun} again."
            )
        return data

    def sizes(self, folder: Path) -> dict[Twin, int]:
        """Return the bytes on disk of every network.

        Raises:
            InputError: A file is missing.
        """
        paths = {twin: latest(folder / FILES[twin]) for twin in self.twins}
        for path in paths.values():
            if not path.is_file():
                raise self._missing(path)
        return {twin: path.stat().st_size for twin, path in paths.items()}

    def _missing(self, path: Path) -> Refused:
        nested = path.parent / "pair"
        hint = f" There is one in {nested}." if self.is_in(nested) else ""
        return Refused(
            f"There is no {path.name} in {path.parent}: it is not the folder of a {self.noun}, or "
            f"the {self.noun} is not whole. Give the folder that {self.saver} wrote.{hint}"
        )

    @contextmanager
    def fitting(self, folder: Path) -> Iterator[None]:
        """Turn errors of files with right hashes and wrong content into a sentence."""
        try:
            yield
        except Refused:
            raise
        except WRONG_CONTENT as error:
            # The hashes agree, so no accident did this: another program wrote the files.
            raise InputError(
                f"The files of the {self.noun} in {folder} are whole, but they do not fit together "
                f"({error}). They were not written by acdc: save the {self.noun} again."
            ) from error

    def _bytes(self, path: Path) -> bytes:
        try:
            return read(path)
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing(path) from None
        except OSError as error:
            raise Refused(
                f"{path} cannot be read: {error.strerror}. Check the disk and its permissions."
            ) from error


PAIR = Index("pair.json", ("sparse", "dense"), "pair", "Pair.save")
SPARSE_NETWORK = Index("sparse.json", ("sparse",), "sparse network", "SparseNetwork.save")
DENSE_NETWORK = Index("dense.json", ("dense",), "dense network", "DenseNetwork.save")
INDICES = (PAIR, SPARSE_NETWORK, DENSE_NETWORK)


def support_entry(support: Support) -> dict[str, Any]:
    """Return what an index says of a support: its counts, its hash, and its layers in order."""
    counts = support.counts()
    return {
        "numel": support.numel,
        "nnz": support.nnz,
        "sha256": support.digest(),
        "layers": {
            name: {"shape": list(mask.shape), "kept": counts[name]}
            for name, mask in support.items()
        },
    }


def support_of(entry: Mapping[str, Any], masks: Mapping[str, Tensor]) -> Support:
    """Return the support of these masks, if it is the one that the index describes.

    Raises:
        InputError: It is another one.
    """
    support = Support({name: masks[name] for name in entry["layers"]})
    if len(support) != len(masks) or support.digest() != entry["sha256"]:
        raise InputError("the masks are not those that the index lists")
    return support


def in_order(names: list[str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in the order in which they were saved.

    Raises:
        InputError: The index lists other tensors than there are.
    """
    ordered = {name: state[name] for name in names}
    if len(ordered) != len(state):
        raise InputError("the tensors are not those that the index lists")
    return ordered


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
