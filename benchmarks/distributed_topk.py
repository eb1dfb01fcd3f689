"""The exact global top-k of weights that several ranks share: seconds, memory, bytes sent.

    OMP_NUM_THREADS=1 python benchmarks/distributed_topk.py [--weights 1000000000] [--ranks 1 4]

The weights are those of the blocks of a language model of width 2048, as many blocks as are needed,
sharded along their outputs as ``fully_shard`` does; 90 % are dropped. Every rank is a process with
one thread on this machine, and gloo sends through the loopback interface. One rank
holds all weights. Memory is the peak of a rank above what its weights take; the masks, a byte
for each weight, are in it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import acdc
from acdc import score
from common import save, spread

WIDTH, INNER = 2048, 5504
BLOCK = [*[(WIDTH, WIDTH)] * 4, *[(INNER, WIDTH)] * 2, (WIDTH, INNER)]
SPARSITY = 0.9


def weights(numel: int, ranks: int) -> dict[str, Tensor]:
    """Return about ``numel`` random weights, of which this rank holds its part."""
    mesh = init_device_mesh("cpu", (ranks,))
    generator = torch.Generator().manual_seed(dist.get_rank())
    blocks = max(1, round(numel / sum(rows * columns for rows, columns in BLOCK)))
    found: dict[str, Tensor] = {}
    for block in range(blocks):
        for number, (rows, columns) in enumerate(BLOCK):
            part = torch.randn(rows // ranks, columns, generator=generator)
            found[f"{block}.{number}"] = DTensor.from_local(part, mesh, [Shard(0)])
    return found


class Sent:
    """Counts the bytes that this rank gives to all-reduce operations."""

    def __init__(self) -> None:
        self.bytes, self._plain = 0, dist.all_reduce
        dist.all_reduce = self._count

    def _count(self, tensor: Tensor, *args: Any, **options: Any) -> Any:
        self.bytes += tensor.nbytes
        return self._plain(tensor, *args, **options)


def measure(rank: int, ranks: int, numel: int, times: int, folder: str) -> None:
    """Select on one of the ranks; the first one writes the row."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(Path(folder, "store")), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    params, sent, seconds = weights(numel, ranks), Sent(), []
    pattern = acdc.Unstructured(SPARSITY)
    first = next(iter(params))
    pattern.select(score.magnitude({first: params[first]}))  # imports what DTensor needs
    sent.bytes = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(times):
        dist.barrier()
        began = time.perf_counter()
        support = pattern.select(score.magnitude(params))
        dist.barrier()
        seconds.append(time.perf_counter() - began)
    counted = sent.bytes // times
    peak = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    total = sum(weight.numel() for weight in params.values())
    assert support.nnz == acdc.kept(total, SPARSITY)
    row = {
        "ranks": ranks,
        "weights": total,
        "layers": len(params),
        "kept": support.nnz,
        **(spread(seconds) if times > 1 else {"median_ms": 1000 * seconds[0], "timings": 1}),
        "weights_mb_of_a_rank": round(4 * total / ranks / 1e6, 1),
        "extra_peak_mb_of_a_rank": round(int(peak) / 1e3, 1),
        "all_reduced_mb_of_a_rank": round(counted / 1e6, 2),
    }
    if rank == 0:
        Path(folder, "row").write_text(json.dumps(row))
    dist.destroy_process_group()


def main() -> None:
    """Measure on one rank and on several, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=1_000_000_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 4))
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args()
    rows = []
    print(f"{'ranks':>5} {'weights':>14} {'seconds':>8} {'extra peak MB':>14} {'sent MB':>8}")
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            given = (ranks, args.weights, args.times, folder)
            processes.spawn(measure, given, nprocs=ranks)
            row = json.loads(Path(folder, "row").read_text())
        rows.append(row)
        print(
            f"{ranks:5} {row['weights']:14,} {row['median_ms'] / 1000:8.2f} "
            f"{row['extra_peak_mb_of_a_rank']:14,.1f} {row['all_reduced_mb_of_a_rank']:8.2f}",
            flush=True,
        )
    print(save("distributed_topk", rows))


if __name__ == "__main__":
    main()
