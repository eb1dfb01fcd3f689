"""A user's own data, as tensors in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from acdc.errors import InputError
from acdc.runs.data.base import SPLITS, Batch, Data, Split, known_split, steps_per_epoch


class Tensors(Data):
    """Inputs of any shape and their labels. They are not changed: normalise them before.

    Args:
        name: Name of the data set in reports.
        train: Inputs ``[N, ...]`` and labels, int64 ``[N]``; or, for sequences, int64 ``[N, T]``
            for a network that returns ``[N, classes, T]``.
        test: The same for the test data.
        classes: Labels are ``0 .. classes - 1``.

    Raises:
        InputError: Shapes, types or labels do not fit together.
    """

    def __init__(
        self,
        name: str,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        classes: int,
    ) -> None:
        for split, (x, y) in zip(SPLITS, (train, test), strict=True):
            if len(x) == 0 or len(x) != len(y) or x.shape[1:] != train[0].shape[1:]:
                raise InputError(
                    f"The {split} data of {name} are {tuple(x.shape)} with labels "
                    f"{tuple(y.shape)}. Give one label for each sample, at least one of them, and "
                    f"samples of the same shape in both splits."
                )
            if y.dtype != torch.int64 or int(y.min()) < 0 or int(y.max()) >= classes:
                raise InputError(
                    f"The {split} labels of {name} are {y.dtype} from {y.min()} to {y.max()}. They "
                    f"must be int64 from 0 to {classes - 1}."
                )
        super().__init__(name)
        self._splits: dict[Split, tuple[Tensor, Tensor]] = {"train": train, "test": test}

    @property
    def train_samples(self) -> int:
        """Training samples."""
        return len(self._splits["train"][1])

    @property
    def test_samples(self) -> int:
        """Test samples."""
        return len(self._splits["test"][1])

    def digest(self) -> str:
        """Return the sha256 (hex) of all samples and labels, in order."""
        sha = hashlib.sha256()
        for part in (tensor for split in self._splits.values() for tensor in split):
            sha.update(f"{part.dtype} {tuple(part.shape)}".encode())
            sha.update(part.cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()

    def keep_on(self, device: torch.device) -> None:
        """Keep inputs and labels on a device; see ``Data.keep_on``."""
        self._splits = {name: (x.to(device), y.to(device)) for name, (x, y) in self._splits.items()}

    def train_batch(
        self, epoch: int, index: int, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> Batch:
        """Return batch ``index`` of epoch ``epoch``; see ``Data.train_batch``."""
        picked, _ = self._indices(epoch, index, batch_size, seed, rank, world)
        x, y = self._splits["train"]
        picked = picked.to(x.device)
        return x[picked], y[picked]

    def eval_batches(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """Yield every sample of a split once, in order."""
        x, y = self._splits[known_split(split)]
        steps_per_epoch(len(y), batch_size)  # refuses a batch size below 1
        yield from zip(x.split(batch_size), y.split(batch_size), strict=True)
