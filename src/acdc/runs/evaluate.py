"""A network on the test data. The result of an evaluation decides nothing."""

from __future__ import annotations

import torch
from torch import nn

from acdc.runs.record import bits
from acdc.runs.setup import Setup


@torch.no_grad()
def evaluate(run: Setup) -> dict[str, float]:
    """Return accuracy in percent and mean loss on the test data; for text, bits as well.

    The network is in evaluation mode afterwards.
    """
    run.net.eval()
    right, loss, seen = 0, 0.0, 0
    for x, y in run.data.eval_batches("test", run.recipe.eval_batch_size):
        y = y.to(run.fabric.device)
        outputs = run.model(run.on_device(x)).float()
        right += int((outputs.argmax(1) == y).sum())
        loss += float(nn.functional.cross_entropy(outputs, y, reduction="sum"))
        seen += y.numel()
    found = {"accuracy": 100 * right / seen, "loss": loss / seen}
    return found | ({"bits": bits(loss / seen)} if run.recipe.data.quality == "bits" else {})
