"""A network on the test data. The result of an evaluation decides nothing."""

from __future__ import annotations

import torch
from torch import nn

from acdc.runs.record import bits
from acdc.runs.setup import Setup


@torch.no_grad()
def evaluate(run: Setup) -> dict[str, float]:
    """Return accuracy in percent and mean loss on the test data; for text, bits as well.

    Where training images have random labels, accuracy and loss on these images are returned too,
    against the random labels and against the true ones. The network is in evaluation mode
    afterwards.
    """
    run.net.eval()
    right, loss, seen = 0, 0.0, 0
    for x, y in run.data.eval_batches("test", run.recipe.eval_batch_size):
        y = y.to(run.fabric.device)
        outputs = run.model(run.on_device(x)).float()
        right += int((outputs.argmax(1) == y).sum())
        loss += float(nn.functional.cross_entropy(outputs, y, reduction="sum"))
        seen += y.numel()
    found = {"accuracy": 100 * right / seen, "loss": loss / seen, **_memorised(run)}
    return found | ({"bits": bits(loss / seen)} if run.recipe.data.quality == "bits" else {})


def _memorised(run: Setup) -> dict[str, float]:
    """Return accuracy and loss on the training images that have random labels, if there are any."""
    sums: dict[str, float] = {}
    seen = 0
    for x, *labels in run.data.relabelled_batches(run.recipe.eval_batch_size):
        outputs = run.model(run.on_device(x)).float()
        for name, y in zip(("random", "true"), labels, strict=True):
            y = y.to(run.fabric.device)
            right = 100 * float((outputs.argmax(1) == y).sum())
            loss = float(nn.functional.cross_entropy(outputs, y, reduction="sum"))
            sums[f"{name}_accuracy"] = sums.get(f"{name}_accuracy", 0.0) + right
            sums[f"{name}_loss"] = sums.get(f"{name}_loss", 0.0) + loss
        seen += len(x)
    return {name: value / seen for name, value in sums.items()}
