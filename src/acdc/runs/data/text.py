"""Text as characters: the network predicts the next character at each position of a window."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from acdc.errors import InputError
from acdc.random import stream
from acdc.runs.data.base import Batch, Data, Source, Split, known_split, steps_per_epoch
from acdc.runs.data.files import VARIABLE, candidates, find, not_found


class Text(Data):
    """A text in memory, as the numbers of its characters.

    A sample is a window of ``context`` characters, int64 ``[context]``. Its targets are the window
    of the same shape one character later. The starts of training windows are random, a function of
    seed, epoch and index of the batch. Test windows are consecutive. Characters at the end that do
    not fill a window are not used.

    Args:
        name: See ``Data``.
        train: Characters to train on, int64 ``[n]``, ``n > context``.
        test: Characters to test on, int64 ``[n]``, ``n > context``.
        classes: Characters are ``0 .. classes - 1``.
        context: Characters of a window.
        windows: Training windows of an epoch.

    Raises:
        InputError: A part is shorter than a window and its targets.
    """

    def __init__(
        self, name: str, train: Tensor, test: Tensor, classes: int, context: int, windows: int
    ) -> None:
        super().__init__(name)
        self.context = context
        for split, part in (("training", train), ("test", test)):
            if len(part) <= context:
                raise InputError(
                    f"The {split} part of {name} has {len(part)} characters, and a window with its "
                    f"targets takes {context + 1}. Choose a smaller context."
                )
        self._train, self._windows = train, windows
        count = (len(test) - 1) // context
        inputs, targets = test[: count * context], test[1 : count * context + 1]
        self._test = inputs.view(count, context), targets.view(count, context)
        self._parts = train, test

    @property
    def train_samples(self) -> int:
        """Training windows of an epoch."""
        return self._windows

    @property
    def test_samples(self) -> int:
        """Test windows."""
        return len(self._test[0])

    def digest(self) -> str:
        """Return the sha256 (hex) of both parts, in order."""
        sha = hashlib.sha256()
        for part in self._parts:
            sha.update(repr(tuple(part.shape)).encode())
            sha.update(part.numpy().astype("<i8").tobytes())
        return sha.hexdigest()

    def train_batch(
        self, epoch: int, index: int, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> Batch:
        """Return batch ``index`` of epoch ``epoch``; see ``Data.train_batch``."""
        picked, rows = self._indices(epoch, index, batch_size, seed, rank, world)
        generator = stream("windows", seed, epoch, index)
        starts = torch.randint(
            len(self._train) - self.context, (batch_size * world,), generator=generator
        )
        positions = starts[rows][: len(picked), None] + torch.arange(self.context + 1)
        windows = self._train[positions]
        return windows[:, :-1], windows[:, 1:]

    def eval_batches(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """Yield every window of a split once, in the order of the text."""
        inputs, targets = self._test
        if known_split(split) == "train":
            count = (len(self._train) - 1) // self.context
            inputs = self._train[: count * self.context].view(count, self.context)
            targets = self._train[1 : count * self.context + 1].view(count, self.context)
        steps_per_epoch(len(inputs), batch_size)  # refuses a batch size below 1
        yield from zip(inputs.split(batch_size), targets.split(batch_size), strict=True)


@dataclass(frozen=True)
class TinyShakespeare(Source):
    """The plays of Shakespeare, 1,115,394 characters of 65 kinds, in one file.

    The first nine tenths are the training text, the rest is the test text. With ``validation`` the
    last part of the training text takes the place of the test text. ``train_examples`` is
    the number of windows of an epoch; None: as many as cover the training text once.
    ``test_examples`` is the number of test windows to use, from the first on.

    Args:
        context: Characters that the network reads at a time.

    Source: A. Karpathy, char-rnn, ``data/tinyshakespeare/input.txt``.
    """

    context: int = 128

    name: ClassVar[str] = "tinyshakespeare"
    holds_out: ClassVar[bool] = True
    published: ClassVar[tuple[int, int]] = (1_003_854, 111_540)  # characters
    quality: ClassVar[Literal["accuracy", "bits"]] = "bits"
    sha256: ClassVar[str] = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

    def __post_init__(self) -> None:
        super().__post_init__()
        shortest = min(self.available)
        if not 1 <= self.context < shortest:
            raise InputError(
                f"context is {self.context}. It is a number of characters from 1 to {shortest - 1}."
            )
        if self.test_examples is not None and self.test_examples > self._windows(1):
            raise InputError(
                f"test_examples is {self.test_examples}, and the test text has "
                f"{self._windows(1)} windows of {self.context} characters."
            )

    def _windows(self, part: int) -> int:
        return (self.available[part] - 1) // self.context

    @property
    def classes(self) -> int:
        """Number of different characters."""
        return 65

    @property
    def train_samples(self) -> int:
        """Training windows of an epoch."""
        return self._windows(0) if self.train_examples is None else self.train_examples

    @property
    def test_samples(self) -> int:
        """Test windows."""
        return self._windows(1) if self.test_examples is None else self.test_examples

    def load(self, root: Path | None = None, download: bool = False) -> Text:
        """Find ``tinyshakespeare.txt`` and return its characters.

        Args:
            root: The only folder to look in. None: the folder that ``ACDC_DATA`` names, then the
                cache of earlier downloads.
            download: Without effect: the text has no official address.

        Raises:
            InputError: The file was not found, or has another length or alphabet.
        """
        names = ["tinyshakespeare.txt"]
        folders = candidates(root, ("tinyshakespeare",))
        files = find(names, folders)
        if files is None:
            way = (
                f"set {VARIABLE} to the folder with {names[0]}, which is "
                f"data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn"
            )
            raise not_found(self.name, names, folders, (way,))
        raw = files[0].read_bytes()
        kinds = sorted(set(raw))
        if len(raw) != sum(self.published) or len(kinds) > self.classes:
            raise InputError(
                f"{files[0]} has {len(raw):,} bytes of {len(kinds)} kinds. The text has "
                f"{sum(self.published):,} of {self.classes}: fetch it anew."
            )
        official = hashlib.sha256(raw).hexdigest() == self.sha256
        number = torch.zeros(256, dtype=torch.int64)
        number[torch.tensor(kinds)] = torch.arange(len(kinds))
        text = number[torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()]
        length, tested = self.available  # the text to evaluate on follows the training text
        train, test = text[:length], text[length : length + tested]
        if self.test_examples is not None:
            test = test[: self.test_examples * self.context + 1]
        return Text(
            self.title if official else f"{self.title} (not the published file)",
            train,
            test,
            self.classes,
            self.context,
            self.train_samples,
        )
