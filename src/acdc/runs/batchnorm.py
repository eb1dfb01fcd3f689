"""Estimate the running statistics of BatchNorm anew.

After a cut the activations are not those that the running averages remember. Averages over some
batches of training data, the weights untouched, mend that.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from acdc.errors import InputError


@torch.no_grad()
def reestimate(model: nn.Module, inputs: Iterable[Tensor], batches: int) -> None:
    """Set running means and variances to plain averages over ``batches`` batches.

    Args:
        model: The network; only its BatchNorm statistics change, and its mode is put back.
        inputs: Batches of inputs.
        batches: How many of them to use.

    Raises:
        InputError: There are no batches.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momentum, modes = [m.momentum for m in layers], [m.training for m in model.modules()]
    model.eval()  # dropout off
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average
        layer.train()
    seen = 0
    for x in islice(inputs, batches):
        model(x)
        seen += 1
    for layer, value in zip(layers, momentum, strict=True):
        layer.momentum = value
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    if not seen:
        raise InputError("BatchNorm statistics cannot be estimated: there are no batches.")
