"""Files with random damage, for every reader: each try is a function of a seed."""

from __future__ import annotations

import gzip
import pickle
import random
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch

import acdc
from acdc.errors import AcdcError
from acdc.result import DenseNetwork, SparseNetwork, load
from acdc.runs.data.files import read_cifar, read_idx
from acdc.support import Support

ROWS = 6


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with some of them changed, left out, doubled, or the end cut off."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        at, size = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 4, 8, 64))
        kind = rng.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            out[at:at] = out[at : at + size]
        elif kind == 4:
            out[at : at + size] = rng.choice((b"\xff", b"\0", b"\x7f", b"[", b'"', b"9")) * size
        elif rng.random() < 0.2:
            del out[at:]
    return bytes(out)


@cache
def networks() -> tuple[SparseNetwork, DenseNetwork]:
    """Return a small network with a convolution, a matrix, and tensors that are not pruned."""
    generator = torch.Generator().manual_seed(0)
    state = {
        "conv.weight": torch.randn(3, 2, 3, 3, generator=generator),
        "fc.weight": torch.randn(4, 5, generator=generator),
        "fc.bias": torch.randn(4, generator=generator),
        "bn.num_batches_tracked": torch.tensor(7),
    }
    masks = {
        name: torch.rand(state[name].shape, generator=generator) < 0.3 for name in list(state)[:2]
    }
    dense = DenseNetwork(dict(state), {"steps": 3})
    for name, mask in masks.items():
        state[name] = torch.where(mask, state[name], torch.zeros(()))
    return SparseNetwork(state, Support(masks), {"steps": 3}), dense


@cache
def pair() -> acdc.Pair:
    """Return the pair of the two networks."""
    sparse, dense = networks()
    return acdc.Pair(sparse.sparse, dense.dense, sparse.support, {"steps": 3})


@cache
def pickles() -> tuple[bytes, ...]:
    """Return CIFAR files of six images, of several protocols."""
    images = np.random.default_rng(0).integers(0, 256, (ROWS, 3072), dtype=np.uint8)
    content = {"batch_label": "one", "labels": [0, 1, 2, 3, 4, 4], "data": images}
    return tuple(pickle.dumps(content, protocol=p) for p in (0, 2, 4, 5))


def cifar(seed: int) -> str | None:
    """Read a damaged CIFAR file. The images are few: damage is to fall on the instructions."""
    rng = random.Random(seed)
    raw = rng.choice(pickles())
    head, body, tail = raw[:400], raw[400:-400], raw[-400:]
    raw = damaged(head, rng) + (damaged(body, rng) if rng.random() < 0.2 else body)
    raw += damaged(tail, rng) if rng.random() < 0.5 else tail

    def read(path: Path) -> None:
        images, labels, _ = read_cifar(path, "labels", ROWS, 5)
        assert images.shape == (ROWS, 3, 32, 32)
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
        assert 0 <= labels.min() <= labels.max() < 5
        images.sum()

    return _sentence(read, raw)


def idx(seed: int) -> str | None:
    """Read a damaged IDX file, plain or packed."""
    rng = random.Random(seed)
    raw = struct.pack(">HBB3I", 0, 8, 3, 4, 5, 6) + rng.randbytes(120)
    ending = rng.choice(("", ".gz"))
    if ending:
        raw = gzip.compress(raw, mtime=0)
    raw = damaged(raw, rng)

    def read(path: Path) -> None:
        assert read_idx(path, (4, 5, 6))[0].shape == (4, 5, 6)

    return _sentence(read, raw, ending)


def sparse_file(seed: int) -> str | None:
    """Read a damaged sparse.safetensors alone: any damage has to be found."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        raw = (networks()[0].save(name) / "sparse.safetensors").read_bytes()
    wrong = damaged(raw, rng)

    def read(path: Path) -> None:
        acdc.read_sparse(path)
        assert wrong == raw, "a damaged file was read"

    return _sentence(read, wrong)


def folder(seed: int) -> str | None:
    """Load a result of which one file is damaged: any damage has to be found."""
    rng = random.Random(seed)
    result = rng.choice((*networks(), pair()))
    with tempfile.TemporaryDirectory() as name:
        path = rng.choice(sorted(result.save(name).iterdir()))
        raw = path.read_bytes()
        path.write_bytes(damaged(raw, rng))
        same = path.read_bytes() == raw
        try:
            load(name)
        except AcdcError:
            return "a healthy folder was refused" if same else None
        return None if same else f"{path.name} is damaged and was read"


READERS: dict[str, Callable[[int], str | None]] = {
    "cifar": cifar,
    "idx": idx,
    "sparse_file": sparse_file,
    "folder": folder,
}


def _sentence(read: Callable[[Path], None], raw: bytes, ending: str = "") -> str | None:
    """Return what went wrong, if reading these bytes neither works nor ends in a sentence."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / f"file{ending}"
        path.write_bytes(raw)
        try:
            read(path)
        except AcdcError as error:
            return None if str(error).endswith(".") else f"no sentence: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None
