"""How the exact global top-k grows with the number of weights, in seconds and in memory.

    python benchmarks/topk.py [--largest 1000000000]

The weights are those of ResNet-50's 54 layers, repeated until there are enough; 90 % are dropped.
Beside it, at sizes where both fit, the usual way: concatenate all magnitudes and call
``torch.topk`` or ``torch.kthvalue``. Memory is the peak of the process above what the weights take.
Every row runs in a fresh process, so that one peak does not hide another.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import acdc
from acdc import score
from acdc.runs.models import ResNet50
from common import save, spread

SIZES = (1_000_000, 10_000_000, 25_502_912, 100_000_000, 300_000_000, 1_000_000_000)


def weights(numel: int) -> dict[str, Tensor]:
    """Return ``numel`` random weights in layers of ResNet-50's sizes."""
    sizes = [layer.weights for layer in ResNet50().network().layers]
    generator = torch.Generator().manual_seed(0)
    layers: dict[str, Tensor] = {}
    while numel > 0:
        size = min(numel, sizes[len(layers) % len(sizes)])
        layers[str(len(layers))] = torch.randn(size, generator=generator)
        numel -= size
    return layers


def ours(layers: dict[str, Tensor]) -> int:
    """Select by the library."""
    return acdc.Unstructured(0.9).select(score.magnitude(layers)).nnz


def by_topk(layers: dict[str, Tensor]) -> int:
    """Concatenate and take ``torch.topk``."""
    flat = torch.cat([w.abs() for w in layers.values()])
    k = acdc.kept(flat.numel(), 0.9)
    mask = torch.zeros(flat.numel(), dtype=torch.bool)
    mask[torch.topk(flat, k, sorted=False).indices] = True
    return sum(int(part.sum()) for part in mask.split([w.numel() for w in layers.values()]))


def by_kthvalue(layers: dict[str, Tensor]) -> int:
    """Concatenate and compare with ``torch.kthvalue`` (keeps all ties: not exact)."""
    flat = torch.cat([w.abs() for w in layers.values()])
    threshold = torch.kthvalue(flat, flat.numel() - acdc.kept(flat.numel(), 0.9) + 1).values
    return sum(int((w.abs() >= threshold).sum()) for w in layers.values())


WAYS: dict[str, Callable[[dict[str, Tensor]], int]] = {
    "acdc": ours,
    "cat + topk": by_topk,
    "cat + kthvalue": by_kthvalue,
}


def measure(way: str, numel: int, times: int) -> dict[str, object]:
    """Time one way at one size in this process."""
    layers = weights(numel)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        nnz = WAYS[way](layers)
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "way": way,
        "weights": numel,
        "layers": len(layers),
        "kept": nnz,
        **spread(seconds),
        "weights_mb": round(4 * numel / 1e6, 1),
        "extra_peak_mb": round(max(0, peak - before) / 1e3, 1),
    }


def main() -> None:
    """Measure every way at every size it can do, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=int, default=SIZES[-1])
    parser.add_argument("--one", nargs=3, metavar=("WAY", "WEIGHTS", "TIMES"))
    args = parser.parse_args()
    if args.one:
        way, numel, times = args.one
        print(json.dumps(measure(way, int(numel), int(times))))
        return
    rows = []
    print(f"{'way':16} {'weights':>14} {'kept':>12} {'median s':>9} {'extra peak MB':>14}")
    for numel in (size for size in SIZES if size <= args.largest):
        for way in WAYS:
            if way != "acdc" and numel > 300_000_000:
                continue  # a second copy, indices and masks no longer fit beside the weights
            times = 9 if numel < 50_000_000 else 3
            command = [sys.executable, __file__, "--one", way, str(numel), str(times)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = json.loads(out.splitlines()[-1])
            rows.append(row)
            print(
                f"{way:16} {numel:14,} {row['kept']:12,} {row['median_ms'] / 1000:9.3f} "
                f"{row['extra_peak_mb']:14,.1f}",
                flush=True,
            )
    print(save("topk", rows))


if __name__ == "__main__":
    main()
