"""A whole run of AC/DC, half of it sparse: data loading, training and evaluation, all epochs.

A quarter of the run is dense, a quarter sparse, a quarter dense, and a quarter sparse. A dense run
of the same epochs is interleaved with it: every epoch of one run is timed next to the same epoch of
the others, so that all meet the same machine. Everything is timed except checkpoints and logs:
making the batches, augmentation, steps, compressions with their index lists, decompressions,
evaluation.

The images are random, with the shape and the number of classes of CIFAR-10, so accuracies mean
nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import nn

import acdc
from acdc.bench.networks import Network
from acdc.bench.race import Row, summary
from acdc.bench.step import LAYERS_ONLY, PEERS, choices
from acdc.errors import InputError
from acdc.pattern import Scope
from acdc.runs.data import Cifar10, Images

CASES = ("resnet20_w16_n128",)
PHASES = [("dense", "25%"), ("sparse", "25%"), ("dense", "25%"), ("sparse", "25%")]
EVALUATED = 1000  # images at a time, as in a recipe


def images(samples: int) -> Images:
    """Return random images of CIFAR-10's shape, a fifth as many of them for testing.

    Raises:
        InputError: ``samples`` is below five.
    """
    if samples < 5:
        raise InputError(f"--samples is {samples}. It is a whole number from 5 up.")
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
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


class Run:
    """One run, an epoch at a time: dense, or AC/DC with the engine.

    Args:
        network: The network to train. Its input is images.
        data: The data to train on.
        epochs: Length of the run.
        sparsity: Fraction of zeros in the sparse phases; ``None``: a dense run.
        scope: Scope in which the weights compete.
    """

    def __init__(
        self, network: Network, data: Images, epochs: int, sparsity: float | None, scope: Scope
    ) -> None:
        self.batch, self.data = network.batch, data
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = network.build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)
        self.engine: acdc.Engine | None = None
        if sparsity is not None:
            example, _ = data.train_batch(0, 0, self.batch, seed=0)
            self.engine = acdc.Engine(self.net, _channels_last(example))
            plan = acdc.phases(epochs, PHASES).resolve(data.steps_per_epoch(self.batch))
            method = acdc.ACDC(acdc.Unstructured(sparsity, scope=scope), plan)
            self.sparsifier = acdc.Sparsifier(method, self.net, self.optimizer, engine=self.engine)

    def epoch(self, number: int) -> None:
        """Train through an epoch, and evaluate."""
        self.net.train()
        for x, y in self.data.train_batches(number, self.batch, seed=0):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(_channels_last(x)), y).backward()
            self.optimizer.step()
        self.net.eval()
        with torch.no_grad():
            for x, y in self.data.eval_batches("test", EVALUATED):
                nn.functional.cross_entropy(self.net(_channels_last(x)), y)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def measure(
    chosen: Sequence[Network],
    sparsities: Sequence[float],
    repeats: int,
    epochs: int,
    samples: int,
    scope: Scope,
) -> Iterator[Row]:
    """Yield a row for every network and sparsity.

    Args:
        chosen: What to train.
        sparsities: Fractions of weights that are zero in the sparse phases.
        repeats: Whole runs of each competitor.
        epochs: Length of a run.
        samples: Images of an epoch.
        scope: Scope in which the weights compete.
    """
    if epochs < 1:
        raise InputError(f"--epochs is {epochs}. It is a whole number from 1 up.")
    for network in chosen:
        if not network.images:
            raise InputError(f"--case {network.name}: a whole run is one of a ResNet.")
        yield from _rows(network, sparsities, repeats, epochs, images(samples), scope)


def _rows(
    network: Network,
    sparsities: Sequence[float],
    repeats: int,
    epochs: int,
    data: Images,
    scope: Scope,
) -> Iterator[Row]:
    taken: dict[float | None, list[list[float]]] = {key: [] for key in (None, *sparsities)}
    for key in taken:  # a process does some work once, at its first step: not timed
        Run(network, images(len(PHASES) * network.batch), 1, key, scope).epoch(0)
    for _ in range(repeats):
        runs, seconds = _side_by_side(network, data, epochs, list(taken), scope)
        for key, by_epoch in seconds.items():
            taken[key].append(by_epoch)
    totals = {key: [sum(seconds) for seconds in every] for key, every in taken.items()}
    for sparsity in sparsities:
        engine = runs[sparsity].engine
        assert engine is not None
        row: Row = {"case": network.name, "sparsity": sparsity}
        row |= summary({"channels_last": totals[None]}, {"engine": totals[sparsity]}, PEERS)
        row |= {"share_of_dense": 1 / row["ratio"], "epochs": epochs, "phases": PHASES}
        row |= {"samples": data.train_samples, "test_samples": data.test_samples}
        row["dense_epochs_ms"] = _milliseconds(taken[None])
        row["engine_epochs_ms"] = _milliseconds(taken[sparsity])
        row["layers"] = choices(engine)
        row["verdicts"] = [str(verdict) for verdict in engine.verdicts]
        yield row | {"notes": dict.fromkeys(PEERS, LAYERS_ONLY)}


def _side_by_side(
    network: Network, data: Images, epochs: int, keys: Sequence[float | None], scope: Scope
) -> tuple[dict[float | None, Run], dict[float | None, list[float]]]:
    """Train all runs to their end; return them, and the seconds of their epochs.

    The time to set a run up counts to its first epoch.
    """
    runs: dict[float | None, Run] = {}
    seconds: dict[float | None, list[float]] = {key: [] for key in keys}
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
