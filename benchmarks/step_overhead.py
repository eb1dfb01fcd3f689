"""How much a sparsifier adds to a training step, in a dense and in a sparse phase.

    python benchmarks/step_overhead.py [--rounds 12] [--seconds 0.6]

One network trains on one batch: plain, with a sparsifier in a dense phase, and with one in a sparse
phase (masks over dense arithmetic). They take turns, some steps at a time, in a rotating order, so
that a change in the machine's speed meets all three; it is one network, because copies lie at
other addresses, and that alone makes a difference of some percent. A ratio is that of the
medians over all steps; its spread is that of the rounds. ``again`` is a second plain turn: how far
from zero a difference may be and mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

import acdc
from acdc.runs.models import CifarResNet, Model, SmallResNet
from common import save, spread

CASES: dict[str, tuple[Model, int]] = {
    "SmallResNet width 32, 28x28, batch 128": (
        SmallResNet(width=32, stem_stride=2, stem_pool=2, size=28),
        128,
    ),
    "ResNet-20 width 16, 32x32, batch 128": (CifarResNet(depth=20, width=16), 128),
    "ResNet-20 width 64, 32x32, batch 32": (CifarResNet(depth=20, width=64), 32),
}


class Bench:
    """One network, one batch, and the seconds of a training step with and without a sparsifier."""

    def __init__(self, model: Model, batch: int) -> None:
        torch.manual_seed(0)
        self.net = model.build().to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4
        )
        x = torch.randn(batch, *model.input_shape)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.y = torch.randint(0, 10, (batch,))

    def step(self) -> float:
        """Take one step and return its seconds."""
        began = time.perf_counter()
        nn.functional.cross_entropy(self.net(self.x), self.y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began

    def turn(self, kind: str, steps: int) -> list[float]:
        """Take some steps with a sparsifier of this kind, or without one; leave the net plain."""
        sparsifier = None
        if kind in ("dense", "sparse"):
            plan = acdc.constant(kind, epochs=1)
            method = acdc.ACDC(acdc.Unstructured(0.9), plan.resolve(1_000_000))
            sparsifier = acdc.Sparsifier(method, self.net, self.optimizer)
        self.step()
        seconds = [self.step() for _ in range(steps)]
        if sparsifier is not None:
            sparsifier.remove()
        return seconds


def main() -> None:
    """Measure all cases, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.6, help="of a turn, at least 3 steps")
    args = parser.parse_args()
    rows = []
    print(f"{'case':42} {'phase':7} {'plain ms':>9} {'with ms':>9} {'added':>8}")
    for case, (model, batch) in CASES.items():
        bench = Bench(model, batch)
        steps = max(3, round(args.seconds / min(bench.turn("plain", 3))))
        times: dict[str, list[list[float]]] = {k: [] for k in ("plain", "dense", "sparse", "again")}
        sequence = list(times)
        for _ in range(args.rounds):
            for kind in sequence:
                times[kind].append(bench.turn(kind, steps))
            sequence = sequence[1:] + sequence[:1]
        flat = {kind: [t for turn in turns for t in turn] for kind, turns in times.items()}
        for kind in ("dense", "sparse", "again"):
            ratio = statistics.median(flat[kind]) / statistics.median(flat["plain"])
            by_round = [
                statistics.median(a) / statistics.median(b)
                for a, b in zip(times[kind], times["plain"], strict=True)
            ]
            low, _, high = statistics.quantiles(by_round, n=4)
            rows.append(
                {
                    "case": case,
                    "phase": kind,
                    "plain": spread(flat["plain"]),
                    "with_sparsifier": spread(flat[kind]),
                    "ratio": ratio,
                    "ratio_q1_q3": [low, high],
                }
            )
            plain, mine = (1000 * statistics.median(flat[key]) for key in ("plain", kind))
            print(
                f"{case:42} {kind:7} {plain:9.2f} {mine:9.2f} {100 * (ratio - 1):+7.2f}%"
                f"  (rounds {100 * (low - 1):+.1f}..{100 * (high - 1):+.1f}%)",
                flush=True,
            )
    print(save("step_overhead", rows, rounds=args.rounds, seconds=args.seconds))


if __name__ == "__main__":
    main()
