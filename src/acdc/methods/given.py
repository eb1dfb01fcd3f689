"""A support that is given: the zeros of a sparse network are kept while its weights are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn

from acdc import shards
from acdc.errors import InputError
from acdc.kinds import weights
from acdc.layers import Chosen, Layers
from acdc.methods.base import Forecast, Method, Reset, check_reset, check_schedule
from acdc.methods.weights import Weights
from acdc.schedule import Plan, Schedule
from acdc.support import Support


@final
@dataclass(frozen=True)
class Given(Method[None]):
    """Keep a support that another training run, or another pruner, has found.

    For transfer of a sparse network to another task, and for fine-tuning with its zeros kept. The
    support stays the same in every sparse phase. A dense phase trains all weights.

    Args:
        support: The weights that are kept, by the names of the model's parameters:
            ``pair.support``, for example. Layers that the support does not name stay dense.
        schedule: Usually one sparse phase: ``acdc.constant("sparse", epochs=10)``.
        reset: As for :class:`~acdc.ACDC`, where a dense phase follows a sparse one.

    Example: load a sparse network, give it another head, and train what is left::

        model = pair.sparse_model(MyNetwork())
        model.fc = nn.Linear(512, 37)
        method = acdc.Given.zeros(model, acdc.constant("sparse", epochs=10).resolve(len(loader)))

    Source: Iofinova, Peste, Kurtz, Alistarh, CVPR 2022 ("How Well Do Sparse ImageNet Models
    Transfer?"), full fine-tuning.
    """

    name: ClassVar[str] = "given"
    label: ClassVar[str] = "Given support"
    citation: ClassVar[str] = """\
@inproceedings{iofinova2022transfer,
  title     = {How Well Do Sparse {ImageNet} Models Transfer?},
  author    = {Iofinova, Eugenia and Peste, Alexandra and Kurtz, Mark and Alistarh, Dan},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2022},
  note      = {arXiv:2111.13445}
}
"""

    support: Support
    schedule: Plan | Schedule
    reset: Reset = "all"

    def __post_init__(self) -> None:
        check_schedule("Given", self.schedule)
        if not isinstance(self.support, Support) or not len(self.support):
            raise InputError(
                f"Given(support=...) is {self.support!r}. Give a Support that names at least one "
                f"weight, such as pair.support, or call acdc.Given.zeros(model, schedule)."
            )
        check_reset(self.reset)

    @classmethod
    def zeros(
        cls,
        model: nn.Module,
        schedule: Plan | Schedule,
        *,
        layers: Layers | None = None,
        reset: Reset = "all",
    ) -> Self:
        """Keep the zeros that a model has now.

        A layer without zeros stays dense, as does a new head.

        Args:
            model: A sparse network, with exact zeros in its weights.
            schedule: As for the class.
            layers: Which layers are looked at; ``None``: all convolutions and linear layers.
            reset: As for the class.

        Raises:
            InputError: No layer has zeros, or a layer has nothing else.
        """
        masks = {name: w.detach() != 0 for name, w in (layers or Layers()).select(model).items()}
        if dead := [name for name, mask in masks.items() if not mask.any()]:
            raise InputError(
                f"Every weight of {dead[0]!r} is zero, and a layer that keeps no weight cannot be "
                f"trained. Exclude the layer: Given.zeros(..., layers=acdc.Layers(exclude=...))."
            )
        support = {name: mask for name, mask in masks.items() if not bool(mask.all())}
        if not support:
            raise InputError(
                f"None of the {len(masks)} layers has a weight that is exactly zero. Load the "
                f"sparse network into the model first, for example with pair.sparse_model(model)."
            )
        return cls(Support(support), schedule, reset)

    def update(
        self, step: int, weights: Weights, support: Support, state: None
    ) -> tuple[Support, None]:
        """Keep the given support in a sparse phase, and all weights in a dense one."""
        phase = self.resolved.phase_at(step)
        if phase.kind == "dense":
            return support if support.is_full else Support.full(weights), None
        if step != phase.start:
            return support, None
        return Support(
            {n: shards.placed(self.support[n], w).to(w.device) for n, w in weights.items()}
        ), None

    def forecast(self, weights: Mapping[str, Tensor]) -> Forecast:
        """Return the supports of a run: exact, because they are given."""
        counts = self.support.counts()
        return Forecast(
            tuple(
                (phase.start, None if phase.kind == "dense" else counts)
                for phase in self.resolved.phases
            )
        )

    def select(self, model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        """Return the weights that the support names.

        Raises:
            InputError: The model has no such weight, or one of another shape.
        """
        params = dict(model.named_parameters())
        for name, mask in self.support.items():
            if name not in params:
                raise InputError(
                    f"The support that was given names {name!r}, and the model has no such "
                    f"parameter. Give the support of this very model, or leave the name out: "
                    f"Support({{name: mask for name, mask in support.items() if ...}})."
                )
            if params[name].shape != mask.shape:
                raise InputError(
                    f"The support that was given has shape {tuple(mask.shape)} for {name!r}, and "
                    f"the parameter has shape {tuple(params[name].shape)}. Leave a layer that was "
                    f"replaced out of the support, or call Given.zeros(model, schedule)."
                )
            if not torch.is_floating_point(params[name]) or not params[name].requires_grad:
                raise InputError(
                    f"The support that was given names {name!r}, which is not trained. Leave it "
                    f"out of the support, or let it require gradients."
                )
        found = weights(model)
        chosen = {name: params[name] for name in params if name in self.support}
        refused = {
            name: weight.fixed or weight.reason or "the support that was given does not name it"
            for name, weight in found.items()
            if name not in chosen
        }
        return Chosen(chosen, {n: w.shape for n, w in found.items()}), refused

    @property
    def sparsity(self) -> float:
        """The sparsity of the support."""
        return self.support.sparsity
