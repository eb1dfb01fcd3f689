"""How large a saved sparse twin is beside its dense one, at 95 %, by network.

    python benchmarks/file_size.py

Fresh weights are cut by global magnitude and saved as a pair; the size of a file depends on shapes
and counts, not on what was trained.
"""

from __future__ import annotations

import tempfile

import torch

import acdc
from acdc import score
from acdc.result import sizes
from acdc.runs.models import CifarResNet, Model, ResNet50, SmallResNet
from common import save

NETWORKS: dict[str, Model] = {
    "SmallResNet width 16 (digits)": SmallResNet(width=16),
    "SmallResNet width 32 (Fashion-MNIST)": SmallResNet(width=32, stem_stride=2, size=28),
    "CIFAR ResNet-20": CifarResNet(depth=20),
    "ResNet-50": ResNet50(),
}


def main() -> None:
    """Save every network's pair, print a table, write the results."""
    rows = []
    print(f"{'network':38} {'prunable':>12} {'sparse':>12} {'dense':>12} {'share':>7}")
    for name, spec in NETWORKS.items():
        torch.manual_seed(0)
        net = spec.build()
        params = acdc.Layers().select(net)
        support = acdc.Unstructured(0.95).select(score.magnitude(params))
        dense = {key: value.clone() for key, value in net.state_dict().items()}
        sparse = {key: value.clone() for key, value in dense.items()}
        for key, mask in support.items():
            sparse[key].masked_fill_(~mask, 0.0)
        with tempfile.TemporaryDirectory() as folder:
            acdc.Pair(sparse, dense, support).save(folder)
            found = sizes(folder)
        share = found["sparse"] / found["dense"]
        rows.append({"network": name, "prunable": support.numel, **found, "share": share})
        print(
            f"{name:38} {support.numel:12,} {found['sparse']:12,} {found['dense']:12,} "
            f"{100 * share:6.2f}%"
        )
    print(save("file_size", rows, sparsity=0.95))


if __name__ == "__main__":
    main()
