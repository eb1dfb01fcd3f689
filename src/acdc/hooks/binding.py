"""What a sparsifier is bound to: the weights of one model, and the optimizer that steps them.

A model, its weights and an optimizer belong to one sparsifier at a time: two would cut each other's
weights and count each other's steps. And they must stay what they were: a weight that is replaced
by another tensor would be trained dense, without a word.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from acdc.errors import InputError
from acdc.hooks import watch
from acdc.hooks.optimizers import Optimizers, params_of
from acdc.hooks.sharded import reshard
from acdc.hooks.watch import PLAIN, WRAPPED, Watch
from acdc.shards import fsdp_modules, is_sharded, local

Place = tuple[Any, Any, object]
"""A dictionary or a list, a key, and what is there."""

# Model, weight or optimizer -> its binding. A copy of a model is another model.
_bound = WeakIdKeyDictionary()


def is_bound(thing: object) -> bool:
    """Return whether a model, a weight or an optimizer has a sparsifier."""
    binding = _bound.get(thing)
    return binding is not None and binding() is not None


class Binding:
    """Weights as a model and an optimizer hold them.

    Args:
        model: The network.
        params: The prunable weights by name.
        optimizers: The optimizers that step them.

    Raises:
        InputError: One of them has a sparsifier already, or a weight has no values.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, nn.Parameter],
        optimizers: Optimizers,
    ) -> None:
        self._model, self._params, self._optimizers = model, params, tuple(optimizers)
        self._allowed = WRAPPED if any(part.outer for part in optimizers.parts) else PLAIN
        self._watch: Watch | None = None
        self._others = WeakIdKeyDictionary()  # optimizers of something else, as was checked
        _check_memory(model, params)
        if meta := [name for name, param in params.items() if param.is_meta]:
            raise InputError(
                f"{len(meta)} of the {len(params)} weights to prune have no values: {meta[0]!r} is "
                f"on the device 'meta'. Give the model memory and values first, for example by "
                f"model.to_empty(device=...) and load_state_dict, then build the optimizer and the "
                f"Sparsifier."
            )
        taken = [what for what, thing in self._parts() if is_bound(thing)]
        if taken:
            raise InputError(
                f"{taken[0]} has a sparsifier already, and two would cut each other's weights. "
                f"Call remove() on the first one before you attach another."
            )
        self._groups = self._groups_now()
        self._places = self._places_now()

    def claim(self) -> None:
        """Keep other sparsifiers off until ``release``."""
        for _, thing in self._parts():
            _bound[thing] = weakref.ref(self)
        self._watch = Watch(self._params.values(), self._allowed)
        watch.begin(self)

    def release(self) -> None:
        """Let other sparsifiers have the model and the optimizer."""
        for _, thing in self._parts():
            _bound.pop(thing, None)
        watch.end(self)
        self._seen_a_step()

    def check(self) -> None:
        """Check that model and optimizer still hold the weights.

        Called after every step: it compares references, a few for each layer.

        Raises:
            InputError: A weight was replaced, or taken from its group.
        """
        self._seen_a_step()
        if self._is_unchanged():
            return
        # A module may have got a wrapper, such as torch.compile's, and a checkpoint makes new
        # groups: then the weight is elsewhere in the same model or optimizer.
        if (now := self._groups_now()) != self._groups:
            name = next(n for n in self._groups if now.get(n) != self._groups[n])
            raise InputError(
                f"The optimizer's parameter groups have changed: the weight {name!r} was in group "
                f"{self._groups[name]}, and is now in {now.get(name, 'none')}. Groups may be added "
                f"with add_param_group; otherwise call sparsifier.remove(), then attach a new one."
            )
        self._places = self._places_now()

    def check_before(self, optimizer: torch.optim.Optimizer) -> None:
        """Check the model before the first step of an optimizer that no sparsifier has.

        Where weights were replaced (by ``fully_shard``, say) and a new optimizer was made of the
        model, nobody calls the optimizer whose steps are followed by :meth:`check`.

        Raises:
            InputError: The optimizer steps the model, and a weight of the model was replaced.
        """
        if is_bound(optimizer) or optimizer in self._others:
            return
        if not self._is_unchanged():
            held = set(map(id, params_of(optimizer)))
            if any(id(param) in held for param in self._model.parameters()):
                self._places = self._places_now()
        self._others[optimizer] = True

    def _is_unchanged(self) -> bool:
        try:
            for holder, key, held in self._places:
                if holder[key] is not held:
                    return False
        except (KeyError, IndexError):
            return False
        return True

    def _places_now(self) -> list[Place]:
        # After an evaluation FSDP may still hold whole weights, in the places of the sharded ones.
        reshard(fsdp_modules(self._model))
        return [
            *_in_model(self._model, self._params),
            *(place for one in self._optimizers for place in _in_optimizer(one, self._params)),
        ]

    def _seen_a_step(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def _parts(self) -> Iterator[tuple[str, Any]]:
        yield "The model", self._model
        for optimizer in self._optimizers:
            yield "The optimizer", optimizer
        for name, param in self._params.items():
            yield f"The weight {name!r}", param

    def _groups_now(self) -> dict[str, str]:
        """Return the group that each weight is in, and of several optimizers the optimizer."""
        several = len(self._optimizers) > 1
        number = {
            id(p): f"{i} of optimizer {k}" if several else str(i)
            for k, optimizer in enumerate(self._optimizers, 1)
            for i, group in enumerate(optimizer.param_groups)
            for p in group["params"]
        }
        return {n: number[id(p)] for n, p in self._params.items() if id(p) in number}


def _check_memory(model: nn.Module, params: Mapping[str, nn.Parameter]) -> None:
    """Raise InputError if another parameter has memory of a weight: zeros would be zeros there.

    Only parameters without gaps are compared: views of columns lie between one another.
    """
    spans = []
    for name, whole in model.named_parameters():
        param = whole if whole.is_meta else local(whole)
        steps = zip(param.shape, param.stride(), strict=True)
        elements = 1 + sum((size - 1) * stride for size, stride in steps)
        if param.device.type != "meta" and 0 < param.numel() == elements:
            start = param.data_ptr()
            spans.append((str(param.device), start, start + elements * param.element_size(), name))
    mine = {id(param) for param in params.values()}
    chosen = {name for name, param in model.named_parameters() if id(param) in mine}
    spans.sort()
    for (device, _, end, name), (other_device, start, _, other) in pairwise(spans):
        if device == other_device and start < end and {name, other} & chosen:
            raise InputError(
                f"The parameters {name!r} and {other!r} share memory, but are two parameters, so "
                f"that zeros of one would be zeros of the other. Tie them as one parameter "
                f"(module.weight = other.weight), give each its own memory, or leave both out: "
                f"acdc.Layers(exclude=...)."
            )


def _in_model(model: nn.Module, params: Mapping[str, Tensor]) -> Iterator[Place]:
    """Yield the places that lead from a model to its weights.

    Raises:
        InputError: A weight is not a parameter of a module of the model, under its own last name.
    """
    owners: dict[tuple[int, str], nn.Module] = {}
    above: dict[nn.Module, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for key, held in module._parameters.items():
            owners.setdefault((id(held), key), module)
        for key, child in module._modules.items():
            if child is not None:
                above.setdefault(child, (module, key))
    walked = {model}
    for name, param in params.items():
        last = name.rpartition(".")[2]  # a parametrization holds the weight under another name
        owner = owners.get((id(param), last))
        if owner is None and any(map(is_sharded, model.parameters())) and not is_sharded(param):
            raise InputError(
                f"The model was sharded after the sparsifier was attached, and the weight {name!r} "
                f"is no longer a parameter of it. Shard first: fully_shard(model), then build the "
                f"optimizer, then the Sparsifier."
            )
        if owner is None:
            raise InputError(
                f"The weight {name!r} of the model was replaced by another tensor after the "
                f"sparsifier was attached (by an assignment, load_state_dict(assign=True), a "
                f"parametrization, or another layer in its place), so it would train dense. Call "
                f"sparsifier.remove(), then build the optimizer and the Sparsifier anew."
            )
        yield owner._parameters, last, param
        while owner not in walked:
            walked.add(owner)
            parent, key = above[owner]
            yield parent._modules, key, owner
            owner = parent


def _in_optimizer(
    optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]
) -> Iterator[Place]:
    """Yield the places that lead from an optimizer to the weights."""
    wanted = set(map(id, params.values()))
    yield vars(optimizer), "param_groups", optimizer.param_groups
    for number, group in enumerate(optimizer.param_groups):
        yield optimizer.param_groups, number, group
        yield group, "params", group["params"]
        for place, param in enumerate(group["params"]):
            if id(param) in wanted:
                yield group["params"], place, param
