"""Data sets of images and text in their standard layouts; batches are pure functions.

A *source* is a frozen description (``Digits()``, ``FashionMNIST()``, ``Cifar10()``, ``Cifar100()``,
``ImageNet()``, ``TinyShakespeare()``) that a recipe can hold and print without touching a disk.
``source.load(...)`` finds the files, checks them and returns a ``Data``. Batch ``index`` of epoch
``epoch`` depends only on the seed, ``index`` and ``epoch``, so a resumed run needs no state of a
data loader.
"""

from __future__ import annotations

from acdc.runs.data.augment import Augment
from acdc.runs.data.base import Batch, Data, Images, Source, Split
from acdc.runs.data.imagenet import ImageFolder, ImageNet
from acdc.runs.data.sources import Cifar10, Cifar100, Digits, FashionMNIST
from acdc.runs.data.tensors import Tensors
from acdc.runs.data.text import Text, TinyShakespeare

__all__ = [
    "Augment",
    "Batch",
    "Cifar10",
    "Cifar100",
    "Data",
    "Digits",
    "FashionMNIST",
    "ImageFolder",
    "ImageNet",
    "Images",
    "Source",
    "Split",
    "Tensors",
    "Text",
    "TinyShakespeare",
]
