"""The FLOPs of a network as the code of the AC/DC paper counts them, for its published figures."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from acdc.cost import Kept, measure
from acdc.positions import watch

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d)


def reference_flops(model: nn.Module, example: Tensor, support: Kept | None = None) -> int:
    """Return the FLOPs of one sample as the AC/DC paper's code counts them.

    Beside 2 per kept weight and position these are: 1 per output of a layer with bias, 2 per input
    of a BatchNorm *module*, 1 per input of a ReLU *module*, and the size of the window per output
    of a max or average pooling *module*. What a forward pass does with plain functions is not
    counted, nor are residual additions. This is for comparison with published figures; take
    ``acdc.cost.measure`` for everything else.

    Ours is an exact integer, where the original adds up in float32, and a linear layer without bias
    is counted, where the original crashes.

    Args:
        model: As in ``acdc.cost.measure``.
        example: As in ``acdc.cost.measure``.
        support: Kept weights; layers that are missing are dense. The original takes the weights
            that are not zero instead, which makes a dense phase look cheaper than it is.

    Source: IST-DASLab/ACDC, utils/flop_utils.py, commit ac53210.
    """
    total = measure(model, example).flops(support)

    def count(module: nn.Module, args: Any, named: dict[str, Any], output: Tensor) -> None:
        nonlocal total
        x = (*args, *named.values())[0]
        if isinstance(module, _LAYERS):
            total += output.numel() if module.bias is not None else 0
        elif isinstance(module, _NORMS):
            total += 2 * x.numel()
        elif isinstance(module, nn.ReLU):
            total += x.numel()
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            total += x.numel()  # windows that tile the image: their size times their number
        elif isinstance(module, _POOLS):
            size = module.kernel_size
            total += output.numel() * (math.prod(size) if isinstance(size, tuple) else size**2)

    kinds = (*_LAYERS, *_NORMS, nn.ReLU, nn.AdaptiveAvgPool2d, *_POOLS)
    watch(model, example, [m for m in model.modules() if isinstance(m, kinds)], count)
    return total
