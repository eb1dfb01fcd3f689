"""The data sets that fit into memory: digits, Fashion-MNIST, CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.errors import InputError, need
from acdc.random import stream
from acdc.runs.data.augment import Augment
from acdc.runs.data.base import Images, Source, Split, first_of, split_off
from acdc.runs.data.files import (
    VARIABLE,
    candidates,
    fetch,
    find,
    not_found,
    read_cifar,
    read_idx,
    target_folder,
    unpack,
)


@dataclass(frozen=True)
class _Pictures(Source):
    """The common parts of the data sets of this module.

    Args:
        random_labels: Number of training images whose label is drawn anew, uniformly over all
            classes, so that the true class may be drawn. The images are the first of a permutation.
            A run evaluates the network on these images against both labels after each epoch.
        label_seed: Seed of the permutation and of the labels.
    """

    random_labels: int = field(default=0, kw_only=True, metadata={"added": True})
    label_seed: int = field(default=0, kw_only=True, metadata={"added": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.random_labels <= self.train_samples:
            raise InputError(
                f"random_labels is {self.random_labels}, and there are {self.train_samples} "
                f"training images. Give a number from 0 to {self.train_samples}."
            )


@dataclass(frozen=True)
class Digits(_Pictures):
    """scikit-learn's bundled handwritten digits: 1,797 images of 8x8, 10 classes; no download.

    The test images are 360 of them, a fixed random choice with equal shares of the classes. The
    other 1,437 are the training images. (The bundled file is the test part of the UCI set "Optical
    Recognition of Handwritten Digits", so it has no official split.)
    """

    augment: Augment = field(default_factory=Augment)

    name: ClassVar[str] = "digits"
    holds_out: ClassVar[bool] = True
    published: ClassVar[tuple[int, int]] = (1_437, 360)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return 10

    def load(self, root: Path | None = None, download: bool = False) -> Images:
        """Return the data. scikit-learn holds the images, so both arguments have no effect.

        Raises:
            MissingDependency: scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise need("scikit-learn", "lab") from error
        bundle = load_digits()
        # Grey values 0 to 16 become 0 to 255, as in the other data sets; 17 values stay 17 values.
        images = np.rint(bundle.images * (255 / 16)).astype(np.uint8)[:, None]
        labels = bundle.target.astype(np.int64)
        parts = train_test_split(
            np.arange(len(labels)), test_size=self.published[1], stratify=labels, random_state=0
        )
        train, test = ((images[rows], labels[rows]) for rows in parts)
        pixels = train[0] / 255
        return _images(self, train, test, [pixels.mean()], [pixels.std()], True)


@dataclass(frozen=True)
class FashionMNIST(_Pictures):
    """Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv:1708.07747): 70,000 grey images of 28x28."""

    augment: Augment = field(default_factory=partial(Augment, padding=2, flip=True))

    name: ClassVar[str] = "Fashion-MNIST"
    holds_out: ClassVar[bool] = True
    published: ClassVar[tuple[int, int]] = (60_000, 10_000)
    mirror: ClassVar[str] = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    # Over the 60,000 training images; a test computes both again if the files are found.
    mean: ClassVar[tuple[float, ...]] = (0.2860,)
    std: ClassVar[tuple[float, ...]] = (0.3530,)
    installed: ClassVar[Path] = Path("/usr/share/datasets/fashion-mnist")

    @property
    def classes(self) -> int:
        """Number of classes."""
        return 10

    def load(
        self, root: Path | None = None, download: bool = False, mirror: str | None = None
    ) -> Images:
        """Find the four IDX files (plain or .gz), check them and return the data.

        Args:
            root: The only folder to look in. None: the folder that ``ACDC_DATA`` names, the folder
                of Debian's package, then the cache of earlier downloads.
            download: Fetch the files if they are not found: into the named folder, or the cache.
            mirror: Another address than the official one, ending in ``/``.

        Raises:
            InputError: The files were not found, or are damaged. The message names a remedy.
        """
        names, endings = list(_FASHION), ("", ".gz")
        folders = candidates(root, ("fashion-mnist", "FashionMNIST/raw"), (self.installed,))
        files = find(names, folders, endings)
        if files is None and download:
            folder = target_folder(root, "fashion-mnist")
            for file in _FASHION.values():
                fetch(
                    f"{mirror or self.mirror}{file.name}.gz", folder / f"{file.name}.gz", file.md5
                )
            files = find(names, [folder], endings)
        if files is None:
            ways = (
                f"set {VARIABLE} to a folder with the files {', '.join(names)} (plain or .gz)",
                "on Debian or Ubuntu: apt-get install dataset-fashion-mnist",
                "--download (in Python: download=True) to fetch them from the official mirror",
            )
            raise not_found(self.name, names, folders, ways, endings)
        arrays, official = [], True
        for path, file in zip(files, _FASHION.values(), strict=True):
            array, checksum = read_idx(path, file.shape)
            arrays.append(array)
            official = official and checksum == file.unpacked
        train_x, train_y, test_x, test_y = arrays
        train = (train_x[:, None], train_y.astype(np.int64))
        test = (test_x[:, None], test_y.astype(np.int64))
        return _images(self, train, test, self.mean, self.std, official)


@dataclass(frozen=True)
class _Idx:
    """One file of Fashion-MNIST: the md5 as published (of the .gz), and of its content.

    Debian compresses the same content anew, so the checksums of its .gz files are different.
    """

    name: str
    shape: tuple[int, ...]
    md5: str
    unpacked: str


_FASHION = {
    file.name: file
    for file in (
        _Idx(
            "train-images-idx3-ubyte",
            (60_000, 28, 28),
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        ),
        _Idx(
            "train-labels-idx1-ubyte",
            (60_000,),
            "25c81989df183df01b3e8a0aad5dffbe",
            "9018921c3c673c538a1fc5bad174d6f9",
        ),
        _Idx(
            "t10k-images-idx3-ubyte",
            (10_000, 28, 28),
            "bef4ecab320f06d8554ea6380940ec79",
            "8181f5470baa50b63fa0f6fddb340f0a",
        ),
        _Idx(
            "t10k-labels-idx1-ubyte",
            (10_000,),
            "bb300cfdad3c16e7a12a480ee83cd310",
            "15d484375f8d13e6eb1aabb0c3f46965",
        ),
    )
}


@dataclass(frozen=True)
class _Layout:
    """The official archive of one of the CIFAR sets.

    Args:
        folder: The folder inside the archive, which holds the pickles.
        archive: File name of the archive.
        md5: Checksum of the archive, as on the official page.
        key: The labels' key in the pickles.
        train: Training files and their checksums.
        test: Test files and their checksums.
        rows: Images in a training file and in a test file.
    """

    folder: str
    archive: str
    md5: str
    key: str
    train: dict[str, str]
    test: dict[str, str]
    rows: tuple[int, int]


@dataclass(frozen=True)
class _Cifar(_Pictures):
    """The common parts of CIFAR-10 and CIFAR-100."""

    augment: Augment = field(default_factory=partial(Augment, padding=4, flip=True))

    published: ClassVar[tuple[int, int]] = (50_000, 10_000)
    holds_out: ClassVar[bool] = True
    mirror: ClassVar[str] = "https://www.cs.toronto.edu/~kriz/"
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]

    @property
    @abstractmethod
    def layout(self) -> _Layout:
        """The files of the data set."""

    def load(
        self, root: Path | None = None, download: bool = False, mirror: str | None = None
    ) -> Images:
        """Find the pickles of the official Python version, check them and return the data.

        Args:
            root: The only folder to look in. None: the folder that ``ACDC_DATA`` names, then the
                cache of earlier downloads.
            download: Fetch the archive if the files are not found, and unpack it into the named
                folder or the cache.
            mirror: Another address than the official one, ending in ``/``.

        Raises:
            InputError: The files were not found, or are damaged. The message names a remedy.
        """
        layout = self.layout
        names = [*layout.train, *layout.test]
        folders = candidates(root, (layout.folder,))
        files = find(names, folders)
        if files is None and download:
            folder = target_folder(root, layout.folder)
            # Another name than the archive's own, because the user may have fetched the archive.
            archive = folder.parent / f".{layout.archive}.fetched"
            fetch((mirror or self.mirror) + layout.archive, archive, layout.md5)
            try:
                unpack(archive, [f"{layout.folder}/{name}" for name in names], folder)
            finally:
                archive.unlink(missing_ok=True)
            files = find(names, [folder])
        if files is None:
            ways = (
                f"set {VARIABLE} to the folder {layout.folder} of the official Python version, or "
                f"to the folder that holds it",
                "--download (in Python: download=True) to fetch it from the official page",
            )
            raise not_found(self.name, names, folders, ways)
        count = len(layout.train)
        train, train_sums = self._read(files[:count], layout.rows[0])
        test, test_sums = self._read(files[count:], layout.rows[1])
        expected = [*layout.train.values(), *layout.test.values()]
        official = [*train_sums, *test_sums] == expected
        return _images(self, train, test, self.mean, self.std, official)

    def _read(
        self, files: Sequence[Path], rows: int
    ) -> tuple[tuple[NDArray[np.uint8], NDArray[Any]], list[str]]:
        parts = [read_cifar(path, self.layout.key, rows, self.classes) for path in files]
        images, labels, checksums = zip(*parts, strict=True)
        return (np.concatenate(images), np.concatenate(labels)), list(checksums)


@dataclass(frozen=True)
class Cifar10(_Cifar):
    """CIFAR-10 (Krizhevsky, 2009): 60,000 colour images of 32x32 in 10 classes."""

    name: ClassVar[str] = "CIFAR-10"
    # Over all pixels of the 50,000 training images, as commonly used.
    mean: ClassVar[tuple[float, ...]] = (0.4914, 0.4822, 0.4465)
    std: ClassVar[tuple[float, ...]] = (0.2470, 0.2435, 0.2616)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return 10

    @property
    def layout(self) -> _Layout:
        """The files of the data set."""
        return _CIFAR10


@dataclass(frozen=True)
class Cifar100(_Cifar):
    """CIFAR-100 (Krizhevsky, 2009): 60,000 colour images of 32x32 in 100 (fine) classes."""

    name: ClassVar[str] = "CIFAR-100"
    # Over all pixels of the 50,000 training images, as commonly used.
    mean: ClassVar[tuple[float, ...]] = (0.5071, 0.4865, 0.4409)
    std: ClassVar[tuple[float, ...]] = (0.2673, 0.2564, 0.2762)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return 100

    @property
    def layout(self) -> _Layout:
        """The files of the data set."""
        return _CIFAR100


_CIFAR10 = _Layout(
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    key="labels",
    train={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test={"test_batch": "40351d587109b95175f43aff81a1287e"},
    rows=(10_000, 10_000),
)
_CIFAR100 = _Layout(
    folder="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    md5="eb9058c3a382ffc7106e4002c42a8d85",
    key="fine_labels",
    train={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    rows=(50_000, 10_000),
)


def _images(
    source: Digits | FashionMNIST | _Cifar,
    train: tuple[NDArray[np.uint8], NDArray[Any]],
    test: tuple[NDArray[np.uint8], NDArray[Any]],
    mean: Sequence[float],
    std: Sequence[float],
    official: bool,
) -> Images:
    """Build the data set from its arrays, with the number of examples that the source asks for."""
    if source.validation:
        rows, held = split_off(len(train[1]), source.validation)
        train, test = (train[0][rows], train[1][rows]), (train[0][held], train[1][held])
    return Images(
        source.title if official else f"{source.title} (not the published files)",
        _kept(train, source.train_examples, "train"),
        _kept(test, source.test_examples, "test"),
        source.classes,
        mean,
        std,
        source.augment,
        _drawn_labels(source),
    )


def _drawn_labels(source: _Pictures) -> tuple[Tensor, Tensor] | None:
    """Return the training images that get random labels, and these labels, if there are some."""
    if not source.random_labels:
        return None
    draw = stream("random labels", source.label_seed)
    rows = torch.randperm(source.train_samples, generator=draw)[: source.random_labels]
    return rows, torch.randint(source.classes, rows.shape, generator=draw)


def _kept(
    arrays: tuple[NDArray[np.uint8], NDArray[Any]], wanted: int | None, split: Split
) -> tuple[Tensor, Tensor]:
    x, y = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
    rows: Tensor | None = first_of(len(y), wanted, split)
    return (x, y) if rows is None else (x[rows], y[rows])
