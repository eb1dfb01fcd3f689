"""ImageNet: JPEG files in a folder for each class, read and transformed by worker processes."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from acdc.errors import InputError, MissingDependency, need
from acdc.files import cache_folder
from acdc.random import stream
from acdc.runs.data.base import (
    Batch,
    Data,
    Source,
    Split,
    first_of,
    known_split,
    split_off,
    steps_per_epoch,
)
from acdc.runs.data.files import VARIABLE, candidates

Transform: TypeAlias = Callable[[Any], Tensor]
"""From a PIL image (RGB) to float32 ``[3, size, size]``, normalised."""

_ENDINGS = (b".jpeg", b".jpg")


class ImageFolder(Data):
    """Images in ``train/CLASS/*.JPEG`` and ``val/CLASS/*.JPEG``; classes in alphabetical order.

    The random numbers of a training image are a function of (seed, epoch, image), and independent
    of workers, batch size and rank. Transforms draw them from torch's global generator, whose state
    is restored afterwards. A transform must not use another generator.

    Args:
        name: See ``Data``.
        folder: The folder that holds ``train`` and ``val``.
        size: Height and width of the transformed images.
        transforms: For training and for evaluation.
        workers: Processes that read images; 0 reads in the calling process.
        train_examples: Number of training images to use: the first of a fixed permutation.
        test_examples: The same for the test images, those of ``val``.
        validation: Share of the training images that takes the place of those of ``val``.

    Raises:
        InputError: A folder is missing or empty, or the two hold different classes.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        size: int,
        transforms: tuple[Transform, Transform],
        workers: int,
        train_examples: int | None = None,
        test_examples: int | None = None,
        validation: float = 0.0,
    ) -> None:
        classes = _classes(folder / "train")
        others = _classes(folder / "val")
        if classes != others:
            odd = sorted(set(classes) ^ set(others))[:3]
            raise InputError(
                f"{folder / 'train'} has {len(classes)} class folders and {folder / 'val'} has "
                f"{len(others)}, and they differ in {', '.join(odd)} (at most three shown). Both "
                f"need the same class folders: sort the val images into them."
            )
        super().__init__(name)
        self.classes = len(classes)
        self.workers = workers
        self._transforms = transforms
        train, test = _Files(folder / "train", classes), _Files(folder / "val", classes)
        if validation:
            rows, held = split_off(len(train), validation)
            train, test = train.only(rows), train.only(held)
        self._files = {
            "train": train.first(train_examples, "train"),
            "test": test.first(test_examples, "test"),
        }

    @property
    def train_samples(self) -> int:
        """Training images."""
        return len(self._files["train"])

    @property
    def test_samples(self) -> int:
        """Test images, those of ``val``."""
        return len(self._files["test"])

    def digest(self) -> str:
        """Return the sha256 (hex) of the files' names, not of their contents."""
        sha = hashlib.sha256()
        for files in self._files.values():
            for number in range(len(files)):
                sha.update(files.names[number] + b"\0")
            sha.update(b"\n")
        return sha.hexdigest()

    def train_batch(
        self, epoch: int, index: int, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> Batch:
        """Return batch ``index`` of epoch ``epoch``; see ``Data.train_batch``."""
        picked, _ = self._indices(epoch, index, batch_size, seed, rank, world)
        files = self._files["train"]
        images = []
        for number in picked.tolist():
            with _seeded("augment", seed, epoch, number):
                images.append(files.image(number, self._transforms[0]))
        return torch.stack(images), files.labels[picked]

    def train_batches(
        self,
        epoch: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Batch]:
        """Yield ``train_batch`` for ``index`` from ``start`` to the end, made by the workers."""

        steps = self.steps_per_epoch(batch_size, world)
        # The permutation is computed once before the fork, so that the workers inherit it.
        self._permutation(seed, epoch)
        task = _TrainTask(self, epoch, batch_size, seed, rank, world)
        return self._through_workers(task, range(start, steps))

    def eval_batches(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """Yield every image of a split once, in file order, without augmentation."""
        steps = steps_per_epoch(len(self._files[known_split(split)]), batch_size)
        return self._through_workers(_EvalTask(self, split, batch_size), range(steps))

    def eval_batch(self, split: Split, index: int, batch_size: int) -> Batch:
        """Return one batch of ``eval_batches``."""
        files = self._files[known_split(split)]
        rows = range(index * batch_size, min((index + 1) * batch_size, len(files)))
        images = [files.image(number, self._transforms[1]) for number in rows]
        return torch.stack(images), files.labels[rows.start : rows.stop]

    def _through_workers(self, task: Callable[[int], Batch], indices: range) -> Iterator[Batch]:
        loader: DataLoader[Batch | InputError] = DataLoader(
            _Batches(task),
            batch_size=None,  # a worker makes a whole batch
            sampler=indices,
            num_workers=self.workers,
            collate_fn=_unchanged,
            # Without this argument the loader seeds its workers from the global generator.
            generator=stream("workers"),
        )
        try:
            for made in loader:
                if isinstance(made, InputError):
                    raise made
                yield made
        except (OSError, RuntimeError) as error:
            if not self.workers or not _of_processes(error):
                raise
            raise _no_workers(self.workers, error) from error


@dataclass(frozen=True)
class ImageNet(Source):
    """ImageNet (ILSVRC 2012): ``train/WNID/*.JPEG`` and ``val/WNID/*.JPEG``, read by torchvision.

    Training images: a random crop resized to 224 and a random flip. Test images: the shorter side
    resized to 256, the central 224. Normalised by the mean and standard deviation commonly used.

    Args:
        train_examples: See ``Source``.
        test_examples: See ``Source``.
        classes: Required number of class folders; fewer for a subset such as ImageNet-100.
        workers: Processes that read images; 0 reads in the calling process.
    """

    classes: int = 1_000
    workers: int = 4

    name: ClassVar[str] = "ImageNet"
    holds_out: ClassVar[bool] = True
    size: ClassVar[int] = 224
    published: ClassVar[tuple[int, int]] = (1_281_167, 50_000)
    mean: ClassVar[tuple[float, ...]] = (0.485, 0.456, 0.406)
    std: ClassVar[tuple[float, ...]] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers < 0 or self.classes < 2:
            raise InputError(
                f"ImageNet was given workers={self.workers} and classes={self.classes}. Workers "
                f"are 0 or more, classes 2 or more."
            )

    def load(
        self,
        root: Path | None = None,
        download: bool = False,
        transforms: tuple[Transform, Transform] | None = None,
    ) -> ImageFolder:
        """Find the folders ``train`` and ``val`` and return the data.

        Args:
            root: The only folder to look in. None: the folder that ``ACDC_DATA`` names. The folder
                holds ``train`` and ``val``, or a folder ``imagenet`` that does.
            download: Changes only the error for missing folders: ImageNet is available only from
                https://image-net.org, after signing up.
            transforms: Transforms for training and for evaluation, instead of torchvision's.

        Raises:
            MissingDependency: torchvision is not installed and no transforms are given.
            InputError: The folders were not found, or do not hold what they must.
        """
        made = self._transforms() if transforms is None else transforms
        # The cache is for downloads, and ImageNet has none.
        cache = cache_folder()
        folders = [
            folder
            for folder in candidates(root, ("imagenet", "ImageNet", "ILSVRC2012"))
            if root is not None or cache is None or cache not in folder.parents
        ]
        for folder in folders:
            if (folder / "train").is_dir() and (folder / "val").is_dir():
                break
        else:
            looked = "; ".join(map(str, folders)) or f"nowhere, as {VARIABLE} is not set"
            no_download = "It cannot be downloaded here: " if download else ""
            raise InputError(
                f"ImageNet was not found. Looked in: {looked}. What to do: set {VARIABLE} to a "
                f"folder with train/WNID/*.JPEG and val/WNID/*.JPEG. {no_download}The images come "
                f"from https://image-net.org, after signing up."
            )
        data = ImageFolder(
            self.title,
            folder,
            self.size,
            made,
            self.workers,
            self.train_examples,
            self.test_examples,
            self.validation,
        )
        if data.classes != self.classes:
            raise InputError(
                f"{folder / 'train'} has {data.classes} class folders, and {self.classes} are "
                f"expected. For a subset of ImageNet say classes={data.classes}."
            )
        return data

    def _transforms(self) -> tuple[Transform, Transform]:
        try:
            from torchvision import transforms as t
        except ImportError as error:
            raise need("torchvision", "imagenet") from error
        except RuntimeError as error:  # its compiled part was built for another torch
            raise MissingDependency(
                f"torchvision does not fit this torch {torch.__version__} ({error}). Install a "
                f'matching pair: pip install "acdc-train[imagenet]"'
            ) from error
        last = [t.ToTensor(), t.Normalize(self.mean, self.std)]
        train = t.Compose([t.RandomResizedCrop(self.size), t.RandomHorizontalFlip(), *last])
        test = t.Compose([t.Resize(256), t.CenterCrop(self.size), *last])
        return train, test


class _Files:
    """The image files of one split, and their labels."""

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.folder = folder
        names: list[bytes] = []
        counts = []
        for name in classes:
            with os.scandir(os.fsencode(folder / name)) as entries:
                inside = sorted(e.name for e in entries if e.name.lower().endswith(_ENDINGS))
            if not inside:
                raise InputError(
                    f"The class folder {folder / name} holds no .JPEG files. Unpack its images, or "
                    f"remove the folder."
                )
            names += [os.path.join(os.fsencode(name), file) for file in inside]
            counts.append(len(inside))
        # One array instead of a million strings has no reference counts, so forked workers share
        # its memory.
        self.names: NDArray[np.bytes_] = np.array(names)
        self.labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor(counts))

    def only(self, rows: Tensor) -> _Files:
        """Return the files with these indices."""
        part = copy.copy(self)
        part.names, part.labels = self.names[rows.numpy()], self.labels[rows]
        return part

    def first(self, wanted: int | None, split: Split) -> _Files:
        """Return so many files, the first of a fixed permutation; ``None``: all of them."""
        rows = first_of(len(self), wanted, split)
        return self if rows is None else self.only(rows)

    def __len__(self) -> int:
        return len(self.names)

    def image(self, number: int, transform: Transform) -> Tensor:
        """Read and transform one image."""
        try:
            from PIL import Image
        except ImportError as error:
            raise need("pillow", "imagenet") from error
        path = self.folder / os.fsdecode(self.names[number])
        try:
            with Image.open(path) as image:
                pixels = image.convert("RGB")
        except Exception as error:  # a damaged image can raise nearly anything
            raise InputError(
                f"The image {path} cannot be read ({error}). Replace it, or delete it to go on "
                f"without it."
            ) from error
        return transform(pixels)


@dataclass(frozen=True)
class _TrainTask:
    """Makes batch ``index``. A class and not a closure, so that it can be pickled for workers."""

    data: ImageFolder
    epoch: int
    batch_size: int
    seed: int
    rank: int
    world: int

    def __call__(self, index: int) -> Batch:
        return self.data.train_batch(
            self.epoch, index, self.batch_size, self.seed, self.rank, self.world
        )


@dataclass(frozen=True)
class _EvalTask:
    data: ImageFolder
    split: Split
    batch_size: int

    def __call__(self, index: int) -> Batch:
        return self.data.eval_batch(self.split, index, self.batch_size)


class _Batches(Dataset[Batch | InputError]):
    def __init__(self, task: Callable[[int], Batch]) -> None:
        self.task = task

    def __getitem__(self, index: int) -> Batch | InputError:
        # The error is returned, not raised: torch would add the worker's traceback to its text.
        try:
            batch = self.task(index)
        except InputError as error:
            return InputError(*error.args)
        worker = get_worker_info()
        if worker is None:
            return batch
        # torch would do so in another thread, whose errors reach nobody: the training would wait
        # for ever.
        try:
            return batch[0].share_memory_(), batch[1].share_memory_()
        except (OSError, RuntimeError) as error:
            return _no_workers(worker.num_workers, error)


def _of_processes(error: OSError | RuntimeError) -> bool:
    """Return whether an error is one of the processes, and not of what they compute."""
    if isinstance(error, OSError):
        return error.errno is not None  # an error of a worker comes as text alone
    return str(error).startswith("DataLoader worker")


def _no_workers(workers: int, error: OSError | RuntimeError) -> InputError:
    """Return the sentence for processes that cannot start, or cannot hand over what they read."""
    cause = getattr(error, "strerror", None) or str(error).rstrip(".")
    return InputError(
        f"The {workers} processes that read images failed: {cause}. They hand over the images in "
        f"shared memory, which has to be writable and large enough (/dev/shm; for Docker, see its "
        f"option --shm-size). Enlarge it, or read the images in the process that trains, by --set "
        f"data.workers=0. A process that was killed may have run out of memory."
    )


def _unchanged(batch: Any) -> Any:
    return batch


def _classes(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise InputError(
            f"{folder} holds no class folders. Its images must lie in one folder for each class: "
            f"{folder / 'n01440764'} and so on."
        )
    return names


@contextmanager
def _seeded(*words: str | int) -> Iterator[None]:
    """Seed torch's global CPU generator, the only one that torchvision uses, and restore it."""
    before = torch.get_rng_state()
    torch.set_rng_state(stream(*words).get_state())
    try:
        yield
    finally:
        torch.set_rng_state(before)
