"""What a sparsifier adds to a training step of ResNet-50 at batch 256.

One network takes turns: plain, with a sparsifier in a dense phase, with one in a sparse phase, and
plain again, which says how far from 1 a ratio may be and mean nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch
from torch import nn

import acdc
from acdc.hooks import flat
from acdc.runs.models import ResNet50, SmallResNet
from measuring import Bench, Row

WANTED = 1.01
KINDS = ("plain", "dense", "sparse", "again")


class Training:
    """One network on one batch, in bfloat16 on a GPU."""

    def __init__(self, bench: Bench) -> None:
        torch.manual_seed(0)
        model = SmallResNet() if bench.quick else ResNet50()
        batch = 4 if bench.quick else 256
        self.bench = bench
        self.net = model.build().to(bench.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4
        )
        x = torch.randn(batch, *model.input_shape, device=bench.device)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.y = torch.randint(0, 10, (batch,), device=bench.device)

    def step(self) -> None:
        """Take one step."""
        with torch.autocast(self.bench.device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(self.net(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def attach(self, kind: str) -> acdc.Sparsifier | None:
        """Attach a sparsifier of this kind, if it has one."""
        if kind not in ("dense", "sparse"):
            return None
        plan = acdc.constant(kind, epochs=1)  # type: ignore[arg-type]
        method = acdc.ACDC(acdc.Unstructured(0.9), plan.resolve(1_000_000))
        return acdc.Sparsifier(method, self.net, self.optimizer)

    def turn(self, kind: str, steps: int) -> float:
        """Return the milliseconds of a step, over some that follow one another without waiting,
        with a sparsifier of this kind, or without one.
        """
        sparsifier = self.attach(kind)
        for _ in range(2):
            self.step()
        taken = self.bench.milliseconds(lambda: [self.step() for _ in range(steps)]) / steps
        if sparsifier is not None:
            sparsifier.remove()
        return taken


def rows(bench: Bench) -> Iterator[Row]:
    """Yield the ratios of the medians, and the time of the masks alone."""
    training = Training(bench)
    torch.backends.cudnn.benchmark = True
    training.turn("plain", 3)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    order, rounds = list(KINDS), 2 if bench.quick else 12
    for _ in range(rounds):
        for kind in order:
            times[kind].append(training.turn(kind, 1 if bench.quick else 5))
        order = order[1:] + order[:1]
        if bench.left < 20:
            break
    plain = statistics.median(times["plain"])
    yield Row("plain step", value=plain, unit="ms", note=f"{len(times['plain'])} turns")
    for kind in ("dense", "sparse", "again"):
        ratio = statistics.median(times[kind]) / plain
        wanted = None if kind == "again" or bench.quick else ratio <= WANTED
        note = f"wanted: at most {WANTED}" if kind != "again" else "two plain turns"
        yield Row(f"step, {kind}, over plain", wanted, ratio, note=note)
    yield from _masks_alone(bench, training)


def _masks_alone(bench: Bench, training: Training) -> Iterator[Row]:
    """Yield the milliseconds of one projection, by one launch and by one for each weight."""
    sparsifier = training.attach("sparse")
    assert sparsifier is not None
    project, devices = sparsifier._masking.project, flat.DEVICES

    def by_weight() -> None:
        flat.DEVICES = ()
        try:
            project()
        finally:
            flat.DEVICES = devices

    with torch.no_grad():
        functions = {"flat": project, "by weight": by_weight}
        taken = bench.interleaved(functions, 3 if bench.quick else 30)
    sparsifier.remove()
    runs = bench.cuda and flat.runs_on(bench.device)
    note = "" if runs else "the kernel does not run here: both are the same"
    yield Row("zeros after a step, one launch", value=taken["flat"], unit="ms", note=note)
    yield Row("zeros after a step, a launch for each weight", value=taken["by weight"], unit="ms")
