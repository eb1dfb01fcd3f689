"""Seconds of an epoch of the paper's CIFAR-10 recipe: ResNet-20, batch 128, float32.

Images are random and lie on the device, where batches are drawn and augmented as ``acdc run`` does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import acdc
from acdc.runs.data.augment import Augment
from acdc.runs.data.base import Images
from acdc.runs.models import CifarResNet
from measuring import Bench, Row

BATCH, EPOCHS = 128, 200


def images(samples: int) -> Images:
    """Return random images of CIFAR-10's shape."""
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> tuple[Tensor, Tensor]:
        pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return pixels, torch.randint(10, (count,), generator=generator)

    means = [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]
    return Images("random", part(samples), part(2 * BATCH), 10, *means, Augment(4, flip=True))


def rows(bench: Bench) -> Iterator[Row]:
    """Yield the seconds of dense and of sparse epochs, and of the whole run."""
    data = images(2 * BATCH if bench.quick else 50_000)
    data.keep_on(bench.device)
    x, y = data.train_batch(0, 0, BATCH, seed=0)
    yield Row(
        "batches are made on the device", {x.device.type, y.device.type} == {bench.device.type}
    )
    seconds = {}
    for kind in ("plain", "dense", "sparse"):
        if bench.left < 10:
            yield Row(f"epoch, {kind}", note="no time was left")
            return
        seconds[kind] = _epoch(bench, data, kind)
        yield Row(f"epoch, {kind}", value=seconds[kind], unit="s")
    whole = EPOCHS * (seconds["dense"] + seconds["sparse"]) / 2 / 60
    yield Row(f"{EPOCHS} epochs, half of them sparse", value=whole, unit="min", note="computed")


def _epoch(bench: Bench, data: Images, kind: str) -> float:
    """Return the seconds of an epoch, after some steps that warm up."""
    torch.manual_seed(0)
    net = CifarResNet(depth=20, width=4 if bench.quick else 16).build()
    net = net.to(bench.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    if kind != "plain":
        plan = acdc.constant(kind, epochs=1)  # type: ignore[arg-type]
        method = acdc.ACDC(acdc.Unstructured(0.9), plan.resolve(1_000_000))
        acdc.Sparsifier(method, net, optimizer)

    def train(epoch: int, steps: int | None = None) -> None:
        for number, (x, y) in enumerate(data.train_batches(epoch, BATCH, seed=0)):
            if number == steps:
                break
            x = x.contiguous(memory_format=torch.channels_last)
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            float(loss.detach())  # as a run does, which records it

    train(0, steps=1 if bench.quick else 20)
    began = time.perf_counter()
    train(1)
    if bench.cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
