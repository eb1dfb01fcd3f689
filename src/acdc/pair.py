"""The two trained twins, and the three files that hold them.

A folder written by :meth:`Pair.save` holds:

``dense.safetensors``
    The state dict of the dense twin, plain: every tensor under its own name.

``sparse.safetensors``
    The state dict of the sparse twin. :mod:`acdc.bitmask` describes the format.

``pair.json``
    Name and version of this format, the facts of the run, the kept count of every layer, the
    order of the tensors, size and SHA-256 of the two other files and the SHA-256 of the support.
    Its last entry, ``sha256``, is that of the file's own bytes with those 64 digits replaced by
    zeros.

Nothing is ever unpickled. All three files are written aside and flushed to the disk before the
first of them is renamed into the folder, ``pair.json`` last. A save that fails leaves what was
there before. A save that is killed between two renames leaves a mixture that the hashes refuse.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from acdc.bitmask import (
    as_integers,
    decode,
    deserialize,
    encode,
    read_metadata,
    same_bits,
    serialize,
)
from acdc.errors import InputError
from acdc.files import Staging
from acdc.support import Support

Model = TypeVar("Model", bound=nn.Module)
Twin = Literal["sparse", "dense"]

FORMAT = "acdc.pair"
VERSION = 1
DENSE, SPARSE, INDEX = "dense.safetensors", "sparse.safetensors", "pair.json"

_ZEROS = "0" * 64
_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
}


@dataclass(frozen=True, eq=False, repr=False)
class Pair:
    """A sparse model, its dense twin, the support that ties them, and the facts of the run.

    Args:
        sparse: State dict of the sparse twin. Every weight that the support prunes is +0.0, bit
            for bit.
        dense: State dict of the dense twin: the same names, shapes and dtypes.
        support: Which weights of ``sparse`` are kept, by the name of the weight.
        facts: What the run has to say: anything that JSON can hold, without NaN and infinity.

    The tensors are held, not copied. Two pairs are equal when all their bits are.

    Raises:
        InputError: The two state dicts do not belong together, or not to the support.
    """

    sparse: dict[str, Tensor]
    dense: dict[str, Tensor]
    support: Support
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for twin in ("sparse", "dense"):
            object.__setattr__(self, twin, _plain_tensors(getattr(self, twin), twin))
        object.__setattr__(self, "facts", _json_object(self.facts))
        differences = _differences(self.sparse, "the sparse twin", self.dense, "the dense twin")
        if differences:
            raise InputError(
                f"The two twins are not of one model: {_first(differences)}. Take both state "
                f"dicts from the same model."
            )
        for name, mask in self.support.items():
            _check_pruned(name, mask, self.sparse)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pair):
            return NotImplemented
        return (
            self.facts == other.facts
            and self.support == other.support
            and _same_tensors(self.sparse, other.sparse)
            and _same_tensors(self.dense, other.dense)
        )

    __hash__ = None  # type: ignore[assignment]  # tensors inside: equal by value, not hashable

    def __repr__(self) -> str:
        support = self.support
        facts = f", facts: {', '.join(self.facts)}" if self.facts else ""
        return (
            f"Pair({len(self.dense)} tensors; sparse twin: {support.nnz:,} of {support.numel:,} "
            f"prunable weights kept in {len(support)} layers, sparsity {support.sparsity:.4f}"
            f"{facts})"
        )

    def state(self, twin: Twin) -> dict[str, Tensor]:
        """Return the state dict of one twin, ``"sparse"`` or ``"dense"``."""
        if twin not in ("sparse", "dense"):
            raise InputError(f'The twin is {twin!r}. It is "sparse" or "dense".')
        return self.sparse if twin == "sparse" else self.dense

    def sparse_model(self, model: Model) -> Model:
        """Load the sparse twin into ``model`` in place, bit for bit, and return the model.

        Raises:
            InputError: The model has other names, shapes or dtypes. It is left as it was.
        """
        return _load_into(model, self.sparse)

    def dense_model(self, model: Model) -> Model:
        """Load the dense twin into ``model`` in place, bit for bit, and return the model.

        Raises:
            InputError: The model has other names, shapes or dtypes. It is left as it was.
        """
        return _load_into(model, self.dense)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the pair into ``folder``, which is made if needed, and return the folder.

        A pair that is there is replaced. A save that fails for want of space or permission leaves
        it as it was.

        Raises:
            InputError: The disk is full, or the folder cannot be written.
        """
        with Staging(Path(folder), "the pair") as staging:
            files = {}
            for twin, name, tensors, metadata in (
                ("dense", DENSE, self.dense, {"format": "pt"}),
                ("sparse", SPARSE, *encode(self.sparse, self.support)),
            ):
                data = serialize(tensors, metadata)
                staging.add(name, data)
                files[twin] = {"name": name, "bytes": len(data), "sha256": _sha256(data)}
            counts = self.support.counts()
            index = {
                "format": FORMAT,
                "version": VERSION,
                "facts": self.facts,
                "support": {
                    "numel": self.support.numel,
                    "nnz": self.support.nnz,
                    "sha256": self.support.digest(),
                    "layers": {
                        name: {"shape": list(mask.shape), "kept": counts[name]}
                        for name, mask in self.support.items()
                    },
                },
                "tensors": list(self.sparse),
                "files": files,
                "sha256": _ZEROS,
            }
            text = json.dumps(index, indent=1, ensure_ascii=True) + "\n"
            head, tail = text.rsplit(_ZEROS, 1)
            staging.add(INDEX, (head + _sha256(text.encode()) + tail).encode())
            staging.commit()
        return Path(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Pair:
        """Read the pair that :meth:`save` wrote into ``folder``, bit for bit, onto the CPU.

        Raises:
            InputError: There is no pair, a file is missing, truncated or altered, or a newer acdc
                wrote it.
        """
        folder = Path(folder)
        index = _read_index(folder)
        try:
            dense_file = _read_checked(folder / DENSE, index["files"]["dense"])
            sparse_file = _read_checked(folder / SPARSE, index["files"]["sparse"])
            dense = deserialize(dense_file)
            sparse, masks = decode(deserialize(sparse_file), read_metadata(sparse_file))
            support = Support({name: masks[name] for name in index["support"]["layers"]})
            pair = cls(
                {name: sparse[name] for name in index["tensors"]},
                {name: dense[name] for name in index["tensors"]},
                support,
                index["facts"],
            )
            whole = len(pair.sparse) == len(sparse) == len(dense) and len(support) == len(masks)
            if not whole or support.digest() != index["support"]["sha256"]:
                raise InputError("the tensors are not those that the index lists")
        except _Refused:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # The hashes agree, so no accident did this: another program wrote the files.
            raise InputError(
                f"The files of the pair in {folder} are whole, but they do not fit together "
                f"({error}). They were not written by acdc: save the pair again."
            ) from error
        return pair


def save_sparse(
    folder: str | os.PathLike[str], state: Mapping[str, Tensor], support: Support
) -> Path:
    """Write a sparse network that has no dense twin: ``sparse.safetensors`` alone, no index.

    Args:
        folder: Where, made if needed.
        state: Its state dict. Every weight that the support prunes is +0.0, bit for bit.
        support: Which weights are kept.

    Raises:
        InputError: The state does not belong to the support, the disk is full, or the folder
            cannot be written.
    """
    for name, mask in support.items():
        _check_pruned(name, mask, state)
    with Staging(Path(folder), "the sparse network") as staging:
        staging.add(SPARSE, serialize(*encode(state, support)))
        staging.commit()
    return Path(folder)


def load_sparse(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Support]:
    """Read the state dict and the support that :func:`save_sparse` wrote, onto the CPU.

    Raises:
        InputError: The file is missing or damaged.
    """
    path = Path(folder) / SPARSE
    if not path.is_file():
        raise _missing(path)
    data = path.read_bytes()
    try:
        state, masks = decode(deserialize(data), read_metadata(data))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}). Train the network again.") from error
    return state, Support(masks)


def sizes(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Return the bytes on disk of the two twins: ``{"sparse": ..., "dense": ...}``."""
    paths = {"sparse": Path(folder) / SPARSE, "dense": Path(folder) / DENSE}
    for path in paths.values():
        if not path.is_file():
            raise _missing(path)
    return {twin: path.stat().st_size for twin, path in paths.items()}


# The state dicts: checks and comparisons.


def _plain_tensors(state: Mapping[str, Any], twin: str) -> dict[str, Tensor]:
    plain = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise InputError(
                f"The entry {name!r} of the {twin} twin is a {type(tensor).__name__}. A pair holds "
                f"tensors only: keep extra state of modules elsewhere."
            )
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES:
            raise InputError(
                f"The tensor {name!r} of the {twin} twin is {tensor.dtype} on {tensor.device}, "
                f"{tensor.layout}. A pair holds ordinary tensors of the dtypes that safetensors "
                f"knows: convert it first."
            )
        plain[name] = tensor.detach()
    return plain


def _json_object(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts as they will be read back: tuples as lists, keys as strings."""
    for name, fact in dict(facts).items():
        try:
            json.dumps({name: fact}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"The fact {name!r} cannot be written as JSON ({error}). Give strings, finite "
                f"numbers, booleans, None, and lists and dicts of them."
            ) from error
    result: dict[str, Any] = json.loads(json.dumps(dict(facts)))
    return result


def _differences(
    one: Mapping[str, Any], one_name: str, other: Mapping[str, Any], other_name: str
) -> list[str]:
    """Return a phrase for every name, shape or dtype in which two state dicts differ."""
    found = [f"{other_name} has no {name!r}" for name in one if name not in other]
    found += [f"{one_name} has no {name!r}" for name in other if name not in one]
    for name in one:
        a, b = one[name], other.get(name)
        if isinstance(b, Tensor) and (a.shape != b.shape or a.dtype != b.dtype):
            found.append(f"{name!r} is {_kind(a)} in {one_name} and {_kind(b)} in {other_name}")
    return found


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _first(differences: list[str], most: int = 3) -> str:
    more = f" and {len(differences) - most} more" if len(differences) > most else ""
    return "; ".join(differences[:most]) + more


def _same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[k], other[k]) for k in one)


def _check_pruned(name: str, mask: Tensor, sparse: Mapping[str, Tensor]) -> None:
    if name not in sparse:
        raise InputError(
            f"The support names {name!r}, which the sparse twin does not have. Give the support of "
            f"the same model; the names are those of model.state_dict()."
        )
    weight = sparse[name]
    if weight.shape != mask.shape:
        raise InputError(
            f"The support has shape {tuple(mask.shape)} for {name!r}, and the weight is of shape "
            f"{tuple(weight.shape)}. Give the support of the same model."
        )
    if not weight.dtype.is_floating_point:
        raise InputError(
            f"The support names {name!r}, which is {weight.dtype}. Only floating point weights "
            f"are pruned."
        )
    wrong = int(torch.count_nonzero(as_integers(weight).masked_fill(mask.to(weight.device), 0)))
    if wrong:
        raise InputError(
            f"{wrong} weights of {name!r} are pruned by the support and are not +0.0 in the sparse "
            f"twin. Take the state dict at the end of a sparse phase, or call "
            f"Sparsifier.project(model) first."
        )


def _load_into(model: Model, state: Mapping[str, Tensor]) -> Model:
    differences = _differences(state, "the pair", model.state_dict(), "the model")
    if differences:
        raise InputError(
            f"The pair is of another model: {_first(differences)}. Build the model as in the run "
            f"(not wrapped, not compiled, same dtype). Nothing was loaded."
        )
    model.load_state_dict(state, strict=True)
    return model


# sparse.safetensors: see the layout at the top.


# Bytes and files.


class _Refused(InputError):
    """A file of a pair that is not what was saved."""


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _missing(path: Path) -> _Refused:
    nested = path.parent / "pair"
    hint = f" There is one in {nested}." if (nested / INDEX).is_file() else ""
    return _Refused(
        f"There is no {path.name} in {path.parent}: it is not the folder of a pair, or the pair is "
        f"not whole. Give the folder that Pair.save wrote.{hint}"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path) from None
    except OSError as error:
        raise _Refused(
            f"{path} cannot be read: {error.strerror}. Check the disk and its permissions."
        ) from error


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    raw = _read(path)
    altered = _Refused(
        f"{path} was truncated or altered after it was saved: its own checksum does not agree. "
        f"Take a fresh copy of the folder, or save the pair again."
    )
    try:
        text = raw.decode("ascii")
        index = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise altered from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise _Refused(
            f"{path} is not the index of a pair: its format is not {FORMAT!r}. Give the folder "
            f"that Pair.save wrote."
        )
    version = index.get("version")
    if isinstance(version, int) and version > VERSION:
        raise _Refused(
            f"{path} is of format version {version}, and this acdc reads up to {VERSION}. "
            f"Upgrade acdc."
        )
    digest = index.get("sha256")
    if version != VERSION or not isinstance(digest, str) or text.count(digest) != 1:
        raise altered
    if _sha256(text.replace(digest, _ZEROS).encode()) != digest:
        raise altered
    return index


def _read_checked(path: Path, entry: Mapping[str, Any]) -> bytes:
    """Return the bytes of one file if they are those that the index knows."""
    data = _read(path)
    if len(data) != entry["bytes"]:
        raise _Refused(
            f"{path} has {len(data)} bytes, and {entry['bytes']} were saved: it is truncated, or "
            f"of another save. Take a fresh copy of the folder, or save the pair again."
        )
    if _sha256(data) != entry["sha256"]:
        raise _Refused(
            f"{path} was altered after it was saved, or is of another save: its checksum does not "
            f"agree. Take a fresh copy of the folder, or save the pair again."
        )
    return data
