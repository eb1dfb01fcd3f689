"""How much a sparsifier adds to a training step, in a dense and in a sparse phase.

    python benchmarks/step_overhead.py [--steps 60] [--rounds 15]

Three copies of a network train side by side on the same batches: one plain, one with a sparsifier
in a dense phase, one with a sparsifier in a sparse phase (masks over dense arithmetic). They take
turns, a few steps at a time, in an order that rotates, so that a change in the machine's speed
meets all three. A ratio is that of the medians over all steps; its spread is that of the rounds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import acdc
from acdc.lab.models import CifarResNet, Model, SmallResNet
from common import save, spread

CASES: dict[str, tuple[Model, int]] = {
    "SmallResNet width 32, 28x28, batch 128": (
        SmallResNet(width=32, stem_stride=2, stem_pool=2, size=28),
        128,
    ),
    "ResNet-20 width 16, 32x32, batch 128": (CifarResNet(depth=20, width=16), 128),
    "ResNet-20 width 64, 32x32, batch 32": (CifarResNet(depth=20, width=64), 32),
}


def stepper(net: nn.Module, kind: str | None, batch: int, shape: tuple[int, ...]) -> Callable:
    """Return a function that takes one training step of ``net`` and returns its seconds."""
    net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    if kind is not None:
        plan = acdc.constant(kind, epochs=1)
        method = acdc.ACDC(acdc.Unstructured(0.9), plan.resolve(1_000_000))
        acdc.Sparsifier(method, net, optimizer)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *shape, generator=generator).contiguous(
        memory_format=torch.channels_last
    )
    y = torch.randint(0, 10, (batch,), generator=generator)

    def step() -> float:
        began = time.perf_counter()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    return step


def main() -> None:
    """Measure all cases, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="of each copy in a round")
    args = parser.parse_args()
    rows = []
    print(f"{'case':42} {'phase':7} {'plain ms':>9} {'with ms':>9} {'added':>8}")
    for case, (model, batch) in CASES.items():
        torch.manual_seed(0)
        net = model.build()
        steps = {
            name: stepper(copy.deepcopy(net), kind, batch, model.input_shape)
            for name, kind in (("plain", None), ("dense", "dense"), ("sparse", "sparse"))
        }
        for step in steps.values():
            for _ in range(3):
                step()
        times: dict[str, list[list[float]]] = {name: [] for name in steps}
        order = list(steps)
        for _ in range(args.rounds):
            for name in order:
                times[name].append([steps[name]() for _ in range(args.steps)])
            order = order[1:] + order[:1]
        flat = {name: [t for r in rounds for t in r] for name, rounds in times.items()}
        for name in ("dense", "sparse"):
            ratio = statistics.median(flat[name]) / statistics.median(flat["plain"])
            by_round = [
                statistics.median(a) / statistics.median(b)
                for a, b in zip(times[name], times["plain"], strict=True)
            ]
            low, _, high = statistics.quantiles(by_round, n=4)
            rows.append(
                {
                    "case": case,
                    "phase": name,
                    "plain": spread(flat["plain"]),
                    "with_sparsifier": spread(flat[name]),
                    "ratio": ratio,
                    "ratio_q1_q3": [low, high],
                }
            )
            plain, mine = (1000 * statistics.median(flat[key]) for key in ("plain", name))
            print(
                f"{case:42} {name:7} {plain:9.2f} {mine:9.2f} {100 * (ratio - 1):+7.2f}%"
                f"  (rounds {100 * (low - 1):+.1f}..{100 * (high - 1):+.1f}%)"
            )
    print(save("step_overhead", rows, rounds=args.rounds, steps=args.steps))


if __name__ == "__main__":
    main()
