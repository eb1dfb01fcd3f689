"""Which layers of a model may be pruned.

Only weights of convolutions and linear layers are candidates. A bias and a normalisation parameter
are never pruned. A weight that modules share counts once, under its first name: an embedding that
is tied to a linear layer is pruned as that layer is.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

from torch import nn
from torch.nn.parameter import is_lazy

from acdc.errors import InputError

Prunable = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
_TYPES: dict[str, tuple[type[nn.Module], ...]] = {
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "linear": (nn.Linear,),
}


@dataclass(frozen=True)
class Layers:
    """Layers chosen by type, by name and by place.

    Args:
        types: Kinds of layers: ``"conv"`` (1d, 2d, 3d), ``"linear"``.
        include: Globs over module names (``"layer1.*"``); a layer must match one of them.
        exclude: Globs over module names; a layer that matches one of them stays dense.
        skip_first: Leave the first layer dense, in the order of ``model.named_modules()``.
        skip_last: Leave the last layer dense.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2))
    >>> list(Layers(exclude=("0",)).select(model))
    ['1.weight', '2.weight']
    """

    types: tuple[str, ...] = ("conv", "linear")
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    skip_first: bool = False
    skip_last: bool = False

    def __post_init__(self) -> None:
        for field in ("types", "include", "exclude"):
            if isinstance(names := getattr(self, field), str):
                raise InputError(
                    f"{field} is {names!r}. Layers takes a tuple of names, such as ({names!r},)."
                )
        for kind in self.types:
            if kind not in _TYPES:
                raise InputError(
                    f"Layers(types=...) holds {kind!r}. The kinds are {', '.join(_TYPES)}."
                )

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the chosen weights by parameter name, in the order of the model's modules.

        Raises:
            InputError: A glob matches no layer, no layer is left, or one is lazy still.
        """
        candidates = prunable(model)
        names = list(candidates)
        for pattern in (*self.include, *self.exclude):
            if pattern != "*" and not any(_matches(name, pattern) for name in names):
                raise InputError(
                    f"No layer is called {pattern!r}. The model's convolutions and linear layers "
                    f"are: {', '.join(n.removesuffix('.weight') for n in names) or 'none'}."
                )
        wanted = tuple(cls for kind in self.types for cls in _TYPES[kind])
        first, last = names[:1], names[-1:]
        chosen = {
            name: cast(nn.Parameter, module.weight)
            for name, module in candidates.items()
            if isinstance(module, wanted)
            and any(_matches(name, glob) for glob in self.include)
            and not any(_matches(name, glob) for glob in self.exclude)
            and not (self.skip_first and name in first)
            and not (self.skip_last and name in last)
            and module.weight.requires_grad
        }
        if lazy := [name for name in chosen if is_lazy(chosen[name])]:
            raise InputError(
                f"{len(lazy)} of the {len(chosen)} layers to prune are lazy and have no weights "
                f"yet, {lazy[0].removesuffix('.weight')!r} first. Call the model once on a batch, "
                f"then build the optimizer and the Sparsifier."
            )
        if not chosen:
            raise InputError(
                f"Nothing to prune: {self} leaves none of the model's {len(names)} convolutions "
                f"and linear layers. Loosen include, exclude, skip_first or skip_last, and check "
                f"that the weights require gradients."
            )
        return chosen


def prunable(model: nn.Module) -> dict[str, Prunable]:
    """Return every convolution and linear layer by the name of its weight, shared ones once."""
    every = tuple(cls for group in _TYPES.values() for cls in group)
    own = {id(param): name for name, param in model.named_parameters()}
    found: dict[str, Prunable] = {}
    for module in model.modules():
        if isinstance(module, every):
            name = own.get(id(module.weight))
            if name is not None:
                found.setdefault(name, cast(Prunable, module))
    return found


def _matches(parameter: str, glob: str) -> bool:
    """Whether a glob names the layer of this parameter, or the parameter itself."""
    return fnmatchcase(parameter.removesuffix(".weight"), glob) or fnmatchcase(parameter, glob)


def matches(parameter: str, globs: tuple[str, ...]) -> bool:
    """Whether one of the globs names the layer of this parameter."""
    return any(_matches(parameter, glob) for glob in globs)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's own module inside data-parallel wrappers, ``torch.compile`` and the like.

    A module whose parameters have other names than its ``state_dict`` is taken for a wrapper as
    well, such as that of Lightning Fabric, if a module inside has all of its parameters.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner, nn.Module):
            model = inner
        elif misnamed(model) and (found := _inside(model)) is not None:
            model = found
        else:
            return model


def misnamed(model: nn.Module) -> list[str]:
    """Return the names of parameters that the ``state_dict`` of a module does not have."""
    known = model.state_dict().keys()
    return [name for name, _ in model.named_parameters() if name not in known]


def _inside(wrapper: nn.Module) -> nn.Module | None:
    """Return the module in a wrapper that has all of its parameters, under names of its own."""
    mine = {id(param) for param in wrapper.parameters()}
    named = [getattr(wrapper, name, None) for name in ("module", "_original_module", "model")]
    for inner in (*named, *wrapper.children()):
        if not isinstance(inner, nn.Module) or inner is wrapper:
            continue
        if mine <= {id(param) for param in inner.parameters()}:
            return inner
    return None
