"""Layers whose outputs are multiplied by a factor each, without a change of the network's outputs.

BatchNorm divides by the standard deviation of what it reads. Where it reads the outputs of a
layer, these can be multiplied by any positive factor: in training nothing changes behind the
BatchNorm, and in evaluation nothing changes if its running statistics are multiplied, too. (Up to
the small number that BatchNorm adds to the variance.)
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from acdc.errors import InputError

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # axis 0 of their weights are the outputs


class Rescaling:
    """Finds the BatchNorm that reads the outputs of a layer, and multiplies both.

    The forward passes of the model show who reads whom: hooks on the modules compare the tensor
    that a layer returned with the one that a BatchNorm is given. They are taken off once a pass has
    shown some. A layer that is left to something else in one of its calls is not rescaled, nor one
    whose BatchNorm reads something else, too. Who reads a tensor beside the BatchNorm is not seen.

    Args:
        model: The network.
        params: The prunable weights by name.
        wanted: Whether layers are rescaled at all. Otherwise no hook is set.
    """

    def __init__(self, model: nn.Module, params: Iterable[str], wanted: bool) -> None:
        self._model, self._wanted = model, wanted
        self.followers: dict[str, str] = {}  # weight → BatchNorm that reads the layer's outputs
        self._calls: Counter[str] = Counter()  # weight → outputs of the layer
        # (weight, BatchNorm) → how often the BatchNorm read the outputs of the layer. The weight is
        # "" for tensors that no such layer returned.
        self._reads: Counter[tuple[str, str]] = Counter()
        self._returned: dict[int, tuple[str, weakref.ref[Tensor], int]] = {}
        self._hooks: list[RemovableHandle] = []
        if wanted:
            self._watch(set(params))

    def _watch(self, weights: set[str]) -> None:
        owners = [id(p) for m in self._model.modules() for p in m._parameters.values()]
        for path, module in self._model.named_modules():
            name = f"{path}.weight" if path else "weight"
            if isinstance(module, _BatchNorm):
                self._hooks.append(module.register_forward_pre_hook(_Reads(self, path)))
            elif name in weights and isinstance(module, _LAYERS):
                if owners.count(id(module.weight)) > 1:
                    continue  # another layer has the same weight
                self._hooks.append(module.register_forward_hook(_Returns(self, name)))

    def returned(self, name: str, output: Tensor) -> None:
        """Note the tensor that a layer has returned."""
        self._calls[name] += 1
        self._returned[id(output)] = name, weakref.ref(output), output._version

    def read(self, path: str, x: Tensor) -> None:
        """Note the tensor that a BatchNorm is given."""
        name, output, version = self._returned.get(id(x), ("", lambda: None, 0))
        as_it_was = output() is x and x._version == version
        self._reads[name if as_it_was else "", path] += 1

    def end_step(self) -> None:
        """End the search, if the forward passes until now have shown who reads whom."""
        if self._hooks:
            self._returned.clear()
            self.followers = {n: path for n, path in self._reads if self._are_a_pair(n, path)}
            if self.followers:
                self.remove()

    def _are_a_pair(self, name: str, path: str) -> bool:
        """Return whether a BatchNorm reads every output of a layer, and neither of them another."""
        if not name or any((name in pair) != (path in pair) for pair in self._reads):
            return False
        norm = self._model.get_submodule(path)
        assert isinstance(norm, _BatchNorm)
        outputs = self._model.get_parameter(name).shape[0]
        return self._reads[name, path] == self._calls[name] and norm.num_features == outputs

    def apply(self, factors: Mapping[str, Tensor]) -> None:
        """Multiply the outputs of layers that a BatchNorm reads; leave other layers alone.

        Args:
            factors: Name of a weight → the factors of its outputs, ``[outputs]``, positive.

        Raises:
            InputError: No BatchNorm was seen to read the outputs of a pruned layer.
        """
        if factors and not self.followers:
            raise InputError(
                "The norms of filters are to be restored, and no BatchNorm was seen that reads the "
                "outputs of a pruned convolution or linear layer. Set restore_norms=False: without "
                "BatchNorm the network would compute something else."
            )
        for name, path in self.followers.items():
            if (factor := factors.get(name)) is None:
                continue
            weight = self._model.get_parameter(name)
            weight.mul_(factor.view(-1, *[1] * (weight.dim() - 1)))
            layer = self._model.get_submodule(name.rpartition(".")[0])
            norm = self._model.get_submodule(path)
            for tensor, power in ((layer.bias, 1), (norm.running_mean, 1), (norm.running_var, 2)):
                if isinstance(tensor, Tensor):
                    tensor.mul_(factor.to(tensor.dtype) ** power)

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds: nothing, where no layer is rescaled."""
        return {"followers": dict(self.followers)} if self._wanted else {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` returned, from the state of a sparsifier."""
        if self._wanted and state["followers"]:
            self.followers = dict(state["followers"])
            self.remove()


class _Returns:
    """A hook on a layer. It holds the search weakly: modules are copied with their hooks."""

    def __init__(self, search: Rescaling, name: str) -> None:
        self._search, self._name = weakref.ref(search), name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        search = self._search()
        if search is not None and isinstance(output, Tensor):
            search.returned(self._name, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


class _Reads:
    """A hook on a BatchNorm."""

    def __init__(self, search: Rescaling, path: str) -> None:
        self._search, self._path = weakref.ref(search), path

    def __call__(self, module: nn.Module, args: Any) -> None:
        search = self._search()
        if search is not None and args and isinstance(args[0], Tensor):
            search.read(self._path, args[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> Any:
    """Return the hook that a copy of the model has: one that does nothing."""
    return _do_nothing


def _do_nothing(*args: Any) -> None:
    """Do nothing."""
