"""What the engine costs where no layer gains by it: nothing, it stays off.

    python benchmarks/no_gain.py [--rounds 15] [--seconds 0.2]

Two equal networks train under equal sparsifiers, one with an engine that has measured all layers
and runs none of them, one without. They take turns, some steps at a time. A ratio is the time
without by the time with the engine, the median of the rounds with its quartiles: below one it
costs something. ``again`` is a second turn without: how far from one a ratio may be and mean
nothing. A case in which a layer does gain is an error.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

import acdc
from common import save, spread


def mlp() -> nn.Module:
    """Return a transformer's largest part."""
    return nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))


def convolutions() -> nn.Module:
    """Return two convolutions as a ResNet's second stage has them."""
    return nn.Sequential(
        *(
            part
            for _ in range(2)
            for part in (
                nn.Conv2d(128, 128, 3, padding=1, bias=False),
                nn.BatchNorm2d(128),
                nn.ReLU(),
            )
        )
    )


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "MLP 768-3072-768, 512 tokens": (mlp, (512, 768), 0.2),
    "2 convolutions 128-128, 16x16": (convolutions, (32, 128, 16, 16), 0.1),
}


class Training:
    """A network in a sparse phase, with an engine or without."""

    def __init__(
        self, build: Callable[[], nn.Module], shape: tuple[int, ...], sparsity: float, engine: bool
    ) -> None:
        torch.manual_seed(0)
        self.net, self.x = build(), torch.randn(shape)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-5, momentum=0.9)
        self.engine = acdc.Engine(self.net, self.x) if engine else None
        method = acdc.ACDC(
            acdc.Unstructured(sparsity, "uniform"),
            acdc.constant("sparse", epochs=1).resolve(1_000_000),
            layers=acdc.Layers(skip_first=False, skip_last=False),
        )
        self.sparsifier = acdc.Sparsifier(method, self.net, self.optimizer, engine=self.engine)

    @property
    def gains(self) -> list[str]:
        """The layers that run sparse."""
        choices = {} if self.engine is None else self.engine.choices
        return [name for name, choice in choices.items() if choice.sparse]

    def step(self) -> float:
        """Take one step, and return its seconds."""
        began = time.perf_counter()
        self.net(self.x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


def measure(case: str, rounds: int, seconds: float) -> dict[str, object]:
    """Return one row."""
    build, shape, sparsity = CASES[case]
    without, with_engine = (Training(build, shape, sparsity, engine) for engine in (False, True))
    if with_engine.gains:
        sys.exit(f"{case} at {sparsity}: {', '.join(with_engine.gains)} gain here.")
    assert with_engine.engine is not None
    with_engine.step()
    while with_engine.engine.judges:  # its optimizer steps of kept weights
        with_engine.step()
    kinds = {"without": without, "engine": with_engine, "again": without}
    steps = max(2, round(seconds / min(without.step() for _ in range(3))))
    times: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    sequence = list(kinds)
    for _ in range(rounds):
        for kind in sequence:
            kinds[kind].step()
            times[kind].append([kinds[kind].step() for _ in range(steps)])
        sequence = sequence[1:] + sequence[:1]
    row: dict[str, object] = {
        "case": case,
        "sparsity": sparsity,
        "layers_measured": len(with_engine.engine.choices),
    }
    for kind, turns in times.items():
        row[kind] = spread([step for turn in turns for step in turn])
    for kind in ("engine", "again"):
        ratios = [
            statistics.median(plain) / statistics.median(other)
            for plain, other in zip(times["without"], times[kind], strict=True)
        ]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row[f"{kind}_ratio"], row[f"{kind}_ratio_q1_q3"] = middle, [low, high]
    return row


def main() -> None:
    """Measure all cases, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a turn, at least 2 steps")
    args = parser.parse_args()
    rows = []
    for case in CASES:
        row = measure(case, args.rounds, args.seconds)
        rows.append(row)
        print(
            f"{case:31} {row['sparsity']:4} engine x{row['engine_ratio']:.3f} "
            f"again x{row['again_ratio']:.3f}",
            flush=True,
        )
    print(save("no_gain", rows, rounds=args.rounds, seconds=args.seconds))


if __name__ == "__main__":
    main()
