"""Bytes and seconds of a training step with two ranks: plain DistributedDataParallel against
``acdc.distributed.reduce_kept``, in turns in one run.

    OMP_NUM_THREADS=1 python benchmarks/reduce_kept.py

Each rank has one thread. Both ranks are on one machine, so that gloo sends through the loopback
interface: over a network, fewer bytes save more.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import acdc
from acdc.distributed import reduce_kept
from acdc.schedule import constant
from common import save, spread

WORLD = 2


class MLP(nn.Module):
    """Linear layers, most of whose step is communication."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(width, width) for _ in range(depth)]
        self.body = nn.Sequential(*(each for layer in layers for each in (layer, nn.ReLU())))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of ten classes."""
        return self.head(self.body(x))


class Line:
    """One way to train."""

    def __init__(self, args: argparse.Namespace, sparsity: float, kept: bool, engine: bool) -> None:
        torch.manual_seed(0)
        model = MLP(args.width, args.depth)
        self.x = torch.randn(args.batch, args.width)
        self.y = torch.randint(0, 10, (args.batch,))
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        self.ddp = DDP(model, gradient_as_bucket_view=True)
        method = acdc.Static(acdc.Unstructured(sparsity), constant("sparse", 1000).resolve(1))
        self.engine = acdc.Engine(model, self.x) if engine else None
        self.sparsifier = acdc.Sparsifier(method, self.ddp, self.optimizer, engine=self.engine)
        self.reduction = reduce_kept(self.ddp, self.sparsifier) if kept else None
        self.weights = sum(p.numel() for p in model.parameters())
        support = self.sparsifier.support
        self.share = 1 - (support.numel - support.nnz) / self.weights

    @property
    def layers_on_engine(self) -> int:
        """The layers that the engine computes sparsely."""
        if self.engine is None or not self.engine.active:
            return 0
        return sum(choice.sparse for choice in self.engine.choices.values())

    def step(self) -> float:
        """Return the seconds of a step; the slower rank counts."""
        dist.barrier()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.ddp(self.x), self.y).backward()
        self.optimizer.step()
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return float(seconds)


def work(rank: int, args: argparse.Namespace, folder: str) -> None:
    """Measure on one rank."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(Path(folder, "store")), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    found: list[dict[str, Any]] = []
    for sparsity in args.sparsity:
        for engine in (False, True):
            lines = [Line(args, sparsity, kept, engine) for kept in (False, True)]
            for line in lines:
                for _ in range(args.warmup):
                    line.step()
            reduction = lines[1].reduction
            assert reduction is not None
            sent, whole = reduction.sent, reduction.whole
            seconds: list[list[float]] = [[], []]
            for turn in range(args.steps):
                for which in (0, 1) if turn % 2 else (1, 0):
                    seconds[which].append(lines[which].step())
            plain, kept = map(spread, seconds)
            found.append(
                {
                    "sparsity": sparsity,
                    "engine": engine,
                    "layers_on_engine": lines[1].layers_on_engine,
                    "weights": lines[1].weights,
                    "share_kept_or_not_pruned": lines[1].share,
                    "share_sent": (reduction.sent - sent) / (reduction.whole - whole),
                    "plain": plain,
                    "kept": kept,
                    "plain_to_kept": plain["median_ms"] / kept["median_ms"],
                }
            )
            for line in lines:
                line.sparsifier.remove()
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40, help="steps of each line, in turns")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (args, folder), nprocs=WORLD)
        found = json.loads(Path(folder, "found.json").read_text())
    print("sparsity  engine  kept + not pruned  sent     plain ms  kept ms  plain / kept")
    for row in found:
        print(
            f"{row['sparsity']:<8}  {'on' if row['engine'] else 'off':<6}  "
            f"{row['share_kept_or_not_pruned']:<17.4f}  {row['share_sent']:<7.4f}  "
            f"{row['plain']['median_ms']:<8.1f}  {row['kept']['median_ms']:<7.1f}  "
            f"{row['plain_to_kept']:.2f}"
        )
    network = f"{args.depth} linear layers of width {args.width}, batch {args.batch}"
    print(save("reduce_kept", found, ranks=WORLD, network=network))


if __name__ == "__main__":
    main()
