"""The interface of data sets: steps of an epoch, batch i of an epoch, evaluation batches."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from acdc.errors import InputError
from acdc.random import stream
from acdc.runs.data.augment import Augment

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Normalised images, float32 ``[N, C, H, W]``, and their labels, int64 ``[N]``. Or windows of a
text, int64 ``[N, T]``, and the next character at each of their positions, int64 ``[N, T]``."""


class Data(ABC):
    """Training and test images of one data set, ready for batches.

    Attributes:
        name: Name of the data set in reports, e.g. ``"CIFAR-10"``. The name says so if the files
            are not the published ones.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._cached: tuple[tuple[int, int], Tensor] | None = None

    @property
    @abstractmethod
    def train_samples(self) -> int:
        """Training images."""

    @property
    @abstractmethod
    def test_samples(self) -> int:
        """Test images."""

    @abstractmethod
    def digest(self) -> str:
        """Return a sha256 (hex) that changes when the data change."""

    def keep_on(self, device: torch.device) -> None:  # noqa: B027  (not all data lie in memory)
        """Keep the samples on a device if they lie in memory: batches are then made there.

        Batches are bitwise the same as before. Data that are read from a disk stay where they are.
        """

    @abstractmethod
    def train_batch(
        self, epoch: int, index: int, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> Batch:
        """Return batch ``index`` of epoch ``epoch``, a pure function of the arguments.

        With several ranks ``batch_size`` is the size on each rank. Together the batches of all
        ranks equal batch ``index`` of a single rank with ``batch_size * world`` images,
        augmentation included. The last batch may be short. All ranks get the same number of images:
        if the last images do not divide evenly, at most ``world - 1`` images from the start of the
        epoch's permutation are used again.

        Raises:
            InputError: The epoch has no such batch, or there is no such rank.
        """

    def train_batches(
        self,
        epoch: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Batch]:
        """Yield ``train_batch`` for ``index`` from ``start`` to the end of the epoch."""
        for index in range(start, self.steps_per_epoch(batch_size, world)):
            yield self.train_batch(epoch, index, batch_size, seed, rank, world)

    @abstractmethod
    def eval_batches(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """Yield every image of a split once, in file order, without augmentation."""

    def relabelled_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the training images with random labels, their labels, and their true labels.

        There are no such images unless the source was asked for them.
        """
        yield from ()

    def steps_per_epoch(self, batch_size: int, world: int = 1) -> int:
        """Return the number of batches of an epoch on each rank, a short last batch included."""
        return steps_per_epoch(self.train_samples, batch_size, world)

    def _indices(
        self, epoch: int, index: int, batch_size: int, seed: int, rank: int, world: int
    ) -> tuple[Tensor, slice]:
        """Return the images of one rank's batch, and their rows in the global batch."""
        steps = self.steps_per_epoch(batch_size, world)
        if epoch < 0 or not 0 <= index < steps:
            raise InputError(
                f"Batch {index} of epoch {epoch} was asked for. Epochs count from 0, and this one "
                f"has batches 0 to {steps - 1} ({self.train_samples} images, {batch_size} a batch, "
                f"{world} rank(s))."
            )
        if not 0 <= rank < world:
            raise InputError(f"The rank is {rank}. With world={world} it is 0 to {world - 1}.")
        n = self.train_samples
        first = index * batch_size * world
        last = min(first + batch_size * world, -(-n // world) * world)
        share = (last - first) // world
        rows = slice(rank * share, (rank + 1) * share)
        positions = torch.arange(first + rows.start, first + rows.stop) % n
        return self._permutation(seed, epoch)[positions], rows

    def _permutation(self, seed: int, epoch: int) -> Tensor:
        """Return the permutation of the training images in an epoch; the last one is cached."""
        key = (seed, epoch)
        if self._cached is None or self._cached[0] != key:
            generator = stream("order", seed, epoch)
            self._cached = (key, torch.randperm(self.train_samples, generator=generator))
        return self._cached[1]


class Images(Data):
    """A data set in memory, as bytes.

    Args:
        name: See ``Data``.
        train: Images, uint8 ``[N, C, H, W]``, and labels, int64 ``[N]``.
        test: The same for the test images.
        classes: Labels are ``0 .. classes - 1``.
        mean: Mean of each channel over the training pixels, on a scale where 255 is 1.
        std: Their standard deviation, on the same scale.
        augment: The augmentation of the training images.
        relabelled: Numbers of training images, int64 ``[M]``, and the labels that they are trained
            with in the place of their own; ``None``: every image has its own.

    Raises:
        InputError: Shapes, types or labels do not fit together.
    """

    def __init__(
        self,
        name: str,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augment,
        relabelled: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        for split, (x, y) in zip(SPLITS, (train, test), strict=True):
            self._check(name, split, x, y, classes, train[0].shape[1:])
        super().__init__(name)
        self.augment = augment
        self._splits: dict[Split, tuple[Tensor, Tensor]] = {"train": train, "test": test}
        self._relabelled: tuple[Tensor, Tensor] | None = None  # the images, and their own labels
        if relabelled is not None:
            rows, drawn = relabelled
            labels = train[1].clone()
            self._relabelled = rows, labels[rows]
            labels[rows] = drawn
            self._splits["train"] = train[0], labels
        self._mean = torch.tensor(mean).view(1, -1, 1, 1) * 255
        self._std = torch.tensor(std).view(1, -1, 1, 1) * 255

    @staticmethod
    def _check(
        name: str, split: Split, x: Tensor, y: Tensor, classes: int, shape: Sequence[int]
    ) -> None:
        if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[1:] != shape or len(x) == 0:
            raise InputError(
                f"The {split} images of {name} are {x.dtype} of shape {tuple(x.shape)}. They must "
                f"be uint8 [N, channels, height, width], at least one, the same in both splits."
            )
        if y.dtype != torch.int64 or y.shape != x.shape[:1]:
            raise InputError(
                f"The {split} labels of {name} are {y.dtype} of shape {tuple(y.shape)}. They must "
                f"be int64, one for each of the {len(x)} images."
            )
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= classes:
            raise InputError(
                f"The {split} labels of {name} go from {low} to {high}. They must lie between 0 "
                f"and {classes - 1}."
            )

    @property
    def train_samples(self) -> int:
        """Training images."""
        return len(self._splits["train"][1])

    @property
    def test_samples(self) -> int:
        """Test images."""
        return len(self._splits["test"][1])

    def digest(self) -> str:
        """Return the sha256 (hex) of all images and labels, in order."""
        sha = hashlib.sha256()
        for x, y in self._splits.values():
            sha.update(repr(tuple(x.shape)).encode())
            sha.update(x.cpu().numpy().tobytes())
            sha.update(y.cpu().numpy().astype("<i8").tobytes())
        return sha.hexdigest()

    def keep_on(self, device: torch.device) -> None:
        """Keep images and labels on a device; see ``Data.keep_on``.

        The CPU draws the random numbers of augmentation, and the device applies them.
        """
        for split, (images, labels) in self._splits.items():
            self._splits[split] = images.to(device), labels.to(device)
        if self._relabelled is not None:
            rows, own = self._relabelled
            self._relabelled = rows.to(device), own.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)

    def train_batch(
        self, epoch: int, index: int, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> Batch:
        """Return batch ``index`` of epoch ``epoch``; see ``Data.train_batch``."""
        picked, rows = self._indices(epoch, index, batch_size, seed, rank, world)
        images, labels = self._splits["train"]
        generator = stream("augment", seed, epoch, index)
        drawn = self.augment.draw(batch_size * world, generator)[rows].to(images.device)
        picked = picked.to(images.device)
        return self._normalised(self.augment.apply(images[picked], drawn)), labels[picked]

    def eval_batches(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """Yield every image of a split once, in file order, without augmentation."""
        images, labels = self._splits[known_split(split)]
        steps_per_epoch(len(labels), batch_size)  # refuses a batch size below 1
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            yield self._normalised(x), y

    def relabelled_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the training images with random labels, their labels, and their true labels."""
        if self._relabelled is None:
            return
        images, labels = self._splits["train"]
        for rows, own in zip(*(part.split(batch_size) for part in self._relabelled), strict=True):
            yield self._normalised(images[rows]), labels[rows], own

    def _normalised(self, images_NCHW: Tensor) -> Tensor:
        return images_NCHW.float().sub_(self._mean).div_(self._std)


@dataclass(frozen=True)
class Source(ABC):
    """Description of a data set; a recipe holds one.

    Args:
        train_examples: Number of training images to use: the first of a fixed permutation. For
            quick runs and tests. None means all.
        test_examples: The same for the test images.
        validation: Share of the training data that takes the place of the test data, in [0, 1):
            what is chosen by it was not chosen on test data. It is a fixed random choice, the same
            for every run, and is not trained on. 0: networks are evaluated on the test data.

    Raises:
        InputError: More examples than the published data set has, or fewer than one; or
            ``validation`` is no such share.
    """

    train_examples: int | None = None
    test_examples: int | None = None
    validation: float = field(default=0.0, kw_only=True, metadata={"added": True})

    name: ClassVar[str]
    published: ClassVar[tuple[int, int]]
    quality: ClassVar[Literal["accuracy", "bits"]] = "accuracy"  # measure of a network
    holds_out: ClassVar[bool] = False  # whether ``load`` knows ``validation``

    def __post_init__(self) -> None:
        if self.validation and not self.holds_out:
            raise InputError(
                f"validation is {self.validation!r}, and {type(self).__name__} has no validation "
                f"split. Leave validation out; or let its load() hold out a part of the training "
                f"data (acdc.runs.data.base.split_off), and set holds_out = True."
            )
        if not 0 <= self.validation < 1 or (self.validation and min(self.available) < 1):
            raise InputError(
                f"validation is {self.validation!r}. It is the share of the training data that is "
                f"held out, such as 0.1, or 0; of {self.published[0]:,} samples at least one has "
                f"to be held out, and one to be left."
            )
        for split, asked, available in zip(
            SPLITS, (self.train_examples, self.test_examples), self.available, strict=True
        ):
            if asked is not None and not 1 <= asked <= available:
                raise InputError(
                    f"{split}_examples is {asked}, and {self.name} has {available} {split} images. "
                    f"Give a number from 1 to {available}, or leave it out for all of them."
                )

    @property
    @abstractmethod
    def classes(self) -> int:
        """Number of classes."""

    @property
    def available(self) -> tuple[int, int]:
        """Samples to train on and to evaluate on, by the published numbers."""
        total, test = self.published
        held = held_out(total, self.validation)
        return (total - held, held) if self.validation else (total, test)

    @property
    def title(self) -> str:
        """The name in reports, which says whether networks are evaluated on training data."""
        return f"{self.name}, validation split" if self.validation else self.name

    @property
    def train_samples(self) -> int:
        """Training images that will be used, by the published numbers; no file is read."""
        return self.available[0] if self.train_examples is None else self.train_examples

    @property
    def test_samples(self) -> int:
        """Test images that will be used, by the published numbers; no file is read."""
        return self.available[1] if self.test_examples is None else self.test_examples

    def steps_per_epoch(self, batch_size: int, world: int = 1) -> int:
        """Return the steps of an epoch before anything is loaded; see ``Data.steps_per_epoch``."""
        return steps_per_epoch(self.train_samples, batch_size, world)

    @abstractmethod
    def load(self, root: Path | None = None, download: bool = False) -> Data:
        """Find the files, check them and return the data.

        Args:
            root: The only folder to look in. None: the folder that the environment variable
                ``ACDC_DATA`` names, then the usual folders.
            download: Fetch missing files from the official address, if there is one.

        Raises:
            InputError: The files were not found, or are damaged. The message names a remedy.
        """


def steps_per_epoch(samples: int, batch_size: int, world: int = 1) -> int:
    """Return how many batches of ``batch_size`` on each of ``world`` ranks cover ``samples``."""
    if batch_size < 1 or world < 1:
        raise InputError(
            f"The batch size is {batch_size} and the number of ranks {world}. Both must be 1 or "
            f"more."
        )
    return -(-samples // (batch_size * world))


def first_of(samples: int, wanted: int | None, split: Split) -> Tensor | None:
    """Return the indices of ``wanted`` out of ``samples`` images; None: all, in file order."""
    if wanted is None:
        return None
    if wanted > samples:
        raise InputError(
            f"{split}_examples is {wanted}, and there are only {samples} {split} images in the "
            f"folder. Ask for at most {samples}."
        )
    return torch.randperm(samples, generator=stream("examples", split))[:wanted]


def held_out(samples: int, share: float) -> int:
    """Return how many of the training samples are evaluated on instead of the test data."""
    return round(share * samples)


def split_off(samples: int, share: float) -> tuple[Tensor, Tensor]:
    """Return the indices to train on and those to evaluate on, each in file order."""
    order = torch.randperm(samples, generator=stream("validation"))
    held = held_out(samples, share)
    return order[held:].sort().values, order[:held].sort().values


def known_split(split: str) -> Split:
    """Return ``split``, or raise ``InputError`` if it is not the name of a split."""
    if split not in SPLITS:
        raise InputError(f"The split is {split!r}. It must be 'train' or 'test'.")
    return split
