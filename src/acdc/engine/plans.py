"""The index lists of the layers that run sparse now."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from acdc.engine.contract import KernelPlan, Kernels
from acdc.engine.graph import ConvSpec
from acdc.engine.layout import Shape
from acdc.engine.tape import Value
from acdc.engine.tile import Tiling


class Plans:
    """The masks of a support, and the index lists that were made from them.

    Args:
        kernels: The kernels that the lists are for.

    """

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self._masks: dict[str, Tensor] = {}
        self._made: dict[tuple[str, Shape, Shape, Tiling | None], KernelPlan] = {}

    def start(self, masks: Mapping[str, Tensor]) -> None:
        """Use these masks from now on; lists of other masks are freed.

        Args:
            masks: Name of a weight -> bool mask, True where it is kept. Other layers are full.

        """
        self._made.clear()
        self._masks = dict(masks)

    def plan(
        self, name: str, spec: ConvSpec, x: Value, out: Value, tiling: Tiling | None
    ) -> KernelPlan:
        """Return the index lists of a layer, made once per support, image size and tiling."""
        lanes, weight = self.kernels.lanes, spec.weight
        x_shape, dy_shape = x.shape(1, lanes, x.halo), out.shape(1, lanes, out.grad_halo)
        if (key := (name, x_shape, dy_shape, tiling)) not in self._made:
            mask = self._mask(name)
            if mask is None:
                support = torch.arange(weight.numel(), device="cpu")
            else:
                support = spec.by_output(mask).reshape(-1).nonzero()[:, 0]
            # The strides that its gradient will have: the weight's own, or contiguous ones if the
            # weight has gaps.
            like = spec.by_output(torch.empty_like(weight, device="meta"))
            outs, per_group, *rest = like.stride()
            rows, columns = rest or (1, 1)
            strides = (outs, per_group, rows, columns)
            self._made[key] = self.kernels.plan(
                spec.geometry, support, x_shape, dy_shape, strides=strides, tiling=tiling
            )
        return self._made[key]

    def keep(self, names: Collection[str]) -> None:
        """Free the lists of all layers but these."""
        self._made = {key: plan for key, plan in self._made.items() if key[0] in names}

    def is_pruned(self, name: str) -> bool:
        """Return whether the support has a mask for a layer."""
        return self._mask(name) is not None

    def density(self, name: str) -> float:
        """Return the share of kept weights of a layer."""
        mask = self._mask(name)
        return 1.0 if mask is None else mask.sum().item() / mask.numel()

    def _mask(self, name: str) -> Tensor | None:
        if not name:
            return self._masks.get("weight")
        # The second is a parameter without a module of its own: `in_proj_weight` of an attention.
        return self._masks.get(f"{name}.weight", self._masks.get(f"{name}_weight"))
