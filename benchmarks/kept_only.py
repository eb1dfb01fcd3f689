"""What a training step costs outside forward and backward in a sparse phase, and what of it is
saved where only kept elements are touched.

    python benchmarks/kept_only.py [--case TEXT] [--rounds 12] [--seconds 0.5]

One network trains on one batch on the engine: with gradients and steps of dense size, and with
those of kept elements only (``acdc.hooks.kept_steps``). They take turns in a rotating order,
some steps at a time, on one network. ``outside`` is the step without forward and backward: the
optimizer and the projection; ``share`` is its part of the whole step. Masking the gradient happens
within the backward pass. A ratio is that of medians, its spread that of the rounds. ``again`` is a
second turn of dense size: how far from one a ratio may be and mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import acdc
from acdc.engine.gradients import KernelGradients
from acdc.hooks.kept_steps import KeptSteps, pays
from acdc.runs.models import CifarResNet
from common import save, spread


def mlp() -> nn.Module:
    """Return a transformer's largest part."""
    return nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 768-3072-768, 512 tokens": (mlp, (512, 768)),
    "ResNet-20 width 16, batch 128": (CifarResNet(depth=20, width=16).build, (128, 3, 32, 32)),
    "ResNet-8 width 64, batch 32": (CifarResNet(depth=8, width=64).build, (32, 3, 32, 32)),
}
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-5, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-6),
}


class NothingKnown(KernelGradients):
    """Every gradient is masked, wherever it came from."""

    def all_of(self, param: Tensor, kept: int) -> bool:
        """Return False."""
        return False


class Bench:
    """One sparse network, one batch, and the seconds of a training step of either kind."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        shape: tuple[int, ...],
        make: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        sparsity: float,
    ) -> None:
        torch.manual_seed(0)
        self.net, self.x = build(), torch.randn(shape)
        self.optimizer = make(self.net.parameters())
        # Without a choice, so that whole steps cannot switch the engine off in between.
        self.engine = acdc.Engine(self.net, self.x, choose=False)
        method = acdc.ACDC(
            acdc.Unstructured(sparsity, "uniform"),
            acdc.constant("sparse", epochs=1).resolve(1_000_000),
            layers=acdc.Layers(skip_first=False, skip_last=False),
        )
        self.sparsifier = acdc.Sparsifier(method, self.net, self.optimizer, engine=self.engine)
        self.kept_steps: KeptSteps
        (self.kept_steps,) = self.sparsifier._masking._kept_steps
        self.written = self.engine.kernel_gradients
        params, support = self.sparsifier.params, self.sparsifier.support
        self.masks = [(params[name], mask) for name, mask in support.items()]
        self.paying = sum(pays(param, int(mask.sum())) for param, mask in self.masks)

    def step(self) -> tuple[float, float]:
        """Take one step; return the seconds of all of it, and of what is outside of passes."""
        began = time.perf_counter()
        self.net(self.x).square().mean().backward()
        middle = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.perf_counter()
        return end - began, end - middle

    def turn(self, kind: str, steps: int) -> list[tuple[float, float]]:
        """Take some steps of kept elements only, or of dense size."""
        kept = kind == "kept"
        self.kept_steps.start(self.masks if kept else [])
        # The segments still note gradients in the old object; the sparsifier asks this one.
        self.engine.kernel_gradients = self.written if kept else NothingKnown()
        self.step()
        return [self.step() for _ in range(steps)]


def measure(bench: Bench, rounds: int, seconds: float) -> dict[str, object]:
    """Return one row."""
    steps = max(3, round(seconds / min(whole for whole, _ in bench.turn("dense", 3))))
    times: dict[str, list[list[tuple[float, float]]]] = {k: [] for k in ("dense", "kept", "again")}
    sequence = list(times)
    for _ in range(rounds):
        for kind in sequence:
            times[kind].append(bench.turn(kind, steps))
        sequence = sequence[1:] + sequence[:1]
    row: dict[str, object] = {"weights_that_pay": bench.paying}
    middle: dict[str, float] = {}
    for kind, turns in times.items():
        whole, outside = zip(*(step for turn in turns for step in turn), strict=True)
        middle[kind] = statistics.median(whole)
        row[kind] = {
            "step": spread(whole),
            "outside": spread(outside),
            "share": statistics.median(outside) / middle[kind],
        }
    for kind in ("kept", "again"):
        ratios = [
            statistics.median(whole for whole, _ in a) / statistics.median(whole for whole, _ in b)
            for a, b in zip(times[kind], times["dense"], strict=True)
        ]
        low, _, high = statistics.quantiles(ratios, n=4)
        row[f"{kind}_ratio"] = middle[kind] / middle["dense"]
        row[f"{kind}_ratio_q1_q3"] = [low, high]
    return row


def main() -> None:
    """Measure all cases, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="", help="only those with this in their name")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a turn, at least 3 steps")
    args = parser.parse_args()
    rows = []
    print(f"{'case':31} {'optimizer':13} {'sp.':>5} {'dense ms':>9} {'kept ms':>9} {'outside':>14}")
    chosen = {case: network for case, network in NETWORKS.items() if args.case in case}
    for case, (build, shape) in chosen.items():
        for name, make in OPTIMIZERS.items():
            for sparsity in (0.8, 0.9, 0.95):
                bench = Bench(build, shape, make, sparsity)
                row = measure(bench, args.rounds, args.seconds)
                rows.append({"case": case, "optimizer": name, "sparsity": sparsity, **row})
                dense, kept = row["dense"], row["kept"]
                assert isinstance(dense, dict)
                assert isinstance(kept, dict)
                print(
                    f"{case:31} {name:13} {sparsity:5} {dense['step']['median_ms']:9.2f} "
                    f"{kept['step']['median_ms']:9.2f} {100 * dense['share']:5.1f} -> "
                    f"{100 * kept['share']:4.1f}%  x{row['kept_ratio']:.3f} "
                    f"(again x{row['again_ratio']:.3f})",
                    flush=True,
                )
    print(save("kept_only", rows, rounds=args.rounds, seconds=args.seconds))


if __name__ == "__main__":
    main()
