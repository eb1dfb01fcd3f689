"""A whole run of AC/DC, half of it sparse: data loading, training and evaluation, all epochs.

A quarter of the run is dense, a quarter sparse, a quarter dense, and a quarter sparse. Dense runs
of the same epochs are interleaved with it: every epoch of one run is timed next to the same epoch
of the others, so that all meet the same machine. Everything is timed except checkpoints and logs:
making the batches, augmentation, steps, compressions with their index lists, decompressions,
evaluation.

The data are random: for our own ResNets images of the shape and the number of classes of CIFAR-10,
for a network of ``acdc bench zoo`` batches as there, in memory. Accuracies mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import acdc
from acdc.bench.networks import Network
from acdc.bench.race import Row, summary
from acdc.bench.step import LAYERS_ONLY, PEERS, choices
from acdc.bench.zoo import CLASSES, ZooNetwork
from acdc.errors import InputError
from acdc.pattern import Scope
from acdc.runs.data import Cifar10, Data, Images, Tensors

CASES = ("resnet20_w16_n128",)
PHASES = [("dense", "25%"), ("sparse", "25%"), ("dense", "25%"), ("sparse", "25%")]
EVALUATED = 1000  # CIFAR images at a time, as in a recipe
CIFAR_SAMPLES, ZOO_SAMPLES = 12_800, 1_600  # training samples of an epoch, by default

Key = str | float
"""A run: dense in a memory format of ``Network.formats``, or AC/DC to a sparsity."""


def images(samples: int) -> Images:
    """Return random images of CIFAR-10's shape, a fifth as many of them for testing.

    Raises:
        InputError: ``samples`` is below five.
    """
    check_samples(samples)
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> tuple[Tensor, Tensor]:
        pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return pixels, torch.randint(10, (count,), generator=generator)

    like = Cifar10()
    return Images(
        "random images of CIFAR-10's shape",
        split(samples),
        split(samples // 5),
        like.classes,
        like.mean,
        like.std,
        like.augment,
    )


def samples_of(network: ZooNetwork, samples: int) -> Tensors:
    """Return random samples for a network of the zoo, a fifth as many of them for testing.

    Raises:
        InputError: ``samples`` is below five.
    """
    check_samples(samples)
    x, y = replace(network, batch=samples + samples // 5).data()
    parts = (x[:samples], y[:samples]), (x[samples:], y[samples:])
    return Tensors(f"random samples for {network.name}", *parts, CLASSES)


def check_samples(samples: int) -> None:
    """Raise InputError unless an epoch has samples to train and to test with."""
    if samples < 5:
        raise InputError(f"--samples is {samples}. It is a whole number from 5 up.")


class Run:
    """One run, an epoch at a time: dense, or AC/DC with the engine.

    Args:
        network: The network to train.
        data: The data to train on.
        epochs: Length of the run.
        key: What the run is.
        scope: Scope in which the weights compete.
    """

    def __init__(self, network: Network, data: Data, epochs: int, key: Key, scope: Scope) -> None:
        self.network, self.data = network, data
        self._format = network.formats[key] if isinstance(key, str) else torch.channels_last
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = network.build()
        if network.images:
            self.net = self.net.to(memory_format=self._format)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)
        self.engine: acdc.Engine | None = None
        if not isinstance(key, str):
            example, _ = data.train_batch(0, 0, network.batch, seed=0)
            self.engine = acdc.Engine(self.net, self._laid(example))
            plan = acdc.phases(epochs, PHASES).resolve(data.steps_per_epoch(network.batch))
            method = acdc.ACDC(acdc.Unstructured(key, scope=scope), plan, layers=network.layers)
            self.sparsifier = acdc.Sparsifier(method, self.net, self.optimizer, engine=self.engine)

    def epoch(self, number: int) -> None:
        """Train through an epoch, and evaluate."""
        self.net.train()
        for x, y in self.data.train_batches(number, self.network.batch, seed=0):
            self.optimizer.zero_grad()
            self.network.loss(self.net, self._laid(x), y).backward()
            self.optimizer.step()
        self.net.eval()
        at_once = self.network.batch if isinstance(self.network, ZooNetwork) else EVALUATED
        with torch.no_grad():
            for x, y in self.data.eval_batches("test", at_once):
                self.network.loss(self.net, self._laid(x), y)

    def _laid(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=self._format) if self.network.images else x


def measure(
    chosen: Sequence[Network],
    sparsities: Sequence[float],
    repeats: int,
    epochs: int,
    samples: int | None,
    scope: Scope,
) -> Iterator[Row]:
    """Yield a row for every network and sparsity.

    Args:
        chosen: What to train.
        sparsities: Fractions of weights that are zero in the sparse phases.
        repeats: Whole runs of each competitor.
        epochs: Length of a run.
        samples: Samples of an epoch; ``None``: 12,800, or 1,600 for a network of the zoo.
        scope: Scope in which the weights compete.
    """
    if epochs < 1:
        raise InputError(f"--epochs is {epochs}. It is a whole number from 1 up.")
    for network in chosen:
        formats: tuple[str, ...] = ("channels_last",)
        data: Data
        warm: Data
        if isinstance(network, ZooNetwork):
            formats = tuple(network.formats)
            data = samples_of(network, ZOO_SAMPLES if samples is None else samples)
            warm = samples_of(network, len(PHASES) * max(5, network.batch))
        elif network.images:
            data = images(CIFAR_SAMPLES if samples is None else samples)
            warm = images(len(PHASES) * network.batch)
        else:
            raise InputError(
                f"--case {network.name}: a whole run is one of a ResNet such as {CASES[0]}, or of "
                f"a network of 'acdc bench zoo --list'."
            )
        yield from _rows(network, [*formats, *sparsities], repeats, epochs, (warm, data), scope)


def _rows(
    network: Network,
    keys: Sequence[Key],
    repeats: int,
    epochs: int,
    data: tuple[Data, Data],
    scope: Scope,
) -> Iterator[Row]:
    """Yield the rows of a network.

    Args:
        network: The network.
        keys: The runs that are timed side by side.
        repeats: Whole runs of each.
        epochs: Length of a run.
        data: The data of a short run that is not timed, and of those that are.
        scope: Scope in which the weights compete.
    """
    warm, timed = data
    taken: dict[Key, list[list[float]]] = {key: [] for key in keys}
    for key in taken:  # a process does some work once, at its first step: not timed
        Run(network, warm, 1, key, scope).epoch(0)
    for _ in range(repeats):
        runs, seconds = _side_by_side(network, timed, epochs, list(taken), scope)
        for key, by_epoch in seconds.items():
            taken[key].append(by_epoch)
    totals = {key: [sum(seconds) for seconds in every] for key, every in taken.items()}
    dense = {key: every for key, every in totals.items() if isinstance(key, str)}
    for sparsity in (key for key in keys if not isinstance(key, str)):
        engine = runs[sparsity].engine
        assert engine is not None
        row: Row = {"case": network.name, "sparsity": sparsity}
        row |= summary(dense, {"engine": totals[sparsity]}, PEERS)
        row |= {"share_of_dense": 1 / row["ratio"], "epochs": epochs, "phases": PHASES}
        row |= {"samples": timed.train_samples, "test_samples": timed.test_samples}
        row["dense_epochs_ms"] = _milliseconds(taken[row["dense_setting"]])
        row["engine_epochs_ms"] = _milliseconds(taken[sparsity])
        row["layers"] = choices(engine)
        row["verdicts"] = [str(verdict) for verdict in engine.verdicts]
        yield row | {"notes": dict.fromkeys(PEERS, LAYERS_ONLY)}


def _side_by_side(
    network: Network, data: Data, epochs: int, keys: Sequence[Key], scope: Scope
) -> tuple[dict[Key, Run], dict[Key, list[float]]]:
    """Train all runs to their end; return them, and the seconds of their epochs.

    The time to set a run up counts to its first epoch.
    """
    runs: dict[Key, Run] = {}
    seconds: dict[Key, list[float]] = {key: [] for key in keys}
    sequence = list(keys)
    for number in range(epochs):
        for key in sequence:
            began = time.perf_counter()
            if number == 0:
                runs[key] = Run(network, data, epochs, key, scope)
            runs[key].epoch(number)
            seconds[key].append(time.perf_counter() - began)
        sequence = sequence[1:] + sequence[:1]
    return runs, seconds


def _milliseconds(every: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(1000 * second, 1) for second in seconds] for seconds in every]
