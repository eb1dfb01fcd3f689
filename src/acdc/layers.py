"""Which weights of a model may be pruned.

By default these are the weights of every convolution and every linear layer, of whatever class. An
embedding, and what is tied to one, is not pruned unless it is named. A bias is never pruned. A
weight that modules share counts once, under its first name, and every one of its names means it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from acdc.errors import InputError
from acdc.kinds import KINDS, Weight, weights
from acdc.shape import Shape

Choice = str | nn.Module
Axes = tuple[tuple[str, tuple[int, int]], ...] | Mapping[str, tuple[int, int]]
_SHOWN = 20  # names in an error message, at most


class Chosen(dict[str, nn.Parameter]):
    """The weights that are pruned, by name.

    Args:
        params: The weights.
        shapes: Their shapes, with the axes along which they are multiplied, where these are known.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], shapes: Mapping[str, Shape]) -> None:
        super().__init__(params)
        self.shapes = {
            name: shapes[name] if name in shapes else Shape(param.shape)
            for name, param in params.items()
        }


@dataclass(frozen=True)
class Layers:
    """Weights chosen by the type, the name and the place of their layer.

    Args:
        types: Kinds of layers: ``"conv"`` (1d, 2d, 3d, transposed ones too), ``"linear"`` (the
            ``Conv1D`` of transformers too), ``"rnn"`` (RNN, LSTM, GRU and their cells),
            ``"attention"`` (the projections that ``nn.MultiheadAttention`` holds itself),
            ``"experts"`` (stacked matrices of a mixture of experts).
        include: Names that a layer of these types must have, as globs (``"layer1.*"``). A glob
            names a parameter or the module that holds it. A module object names all layers in it.
        exclude: Names, or module objects, of what stays dense.
        params: Names of parameters of two dimensions or more, or module objects, that are pruned
            beside the layers of these types: embeddings, or parameters of a class of your own. With
            ``types=()`` they are all that is pruned.
        axes: Glob → (axis of outputs, axis of inputs) of parameters for which they are not known,
            or are not ``(0, 1)``. Patterns of groups and blocks need them.
        skip_first: Leave the first layer dense, in the order of ``model.named_modules()``.
        skip_last: Leave the last layer dense.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2))
    >>> list(Layers(exclude=("0",)).select(model))
    ['1.weight', '2.weight']
    """

    types: tuple[str, ...] = ("conv", "linear")
    include: tuple[Choice, ...] = ("*",)
    exclude: tuple[Choice, ...] = ()
    skip_first: bool = False
    skip_last: bool = False
    params: tuple[Choice, ...] = field(default=(), metadata={"added": True})
    axes: Axes = field(default=(), metadata={"added": True})

    def __post_init__(self) -> None:
        for names in ("types", "include", "exclude", "params"):
            self._check_names(names)
        for kind in self.types:
            if kind not in KINDS:
                raise InputError(
                    f"Layers(types=...) holds {kind!r}. The kinds are {', '.join(KINDS)}."
                )
        if isinstance(self.axes, Mapping):
            object.__setattr__(self, "axes", tuple(self.axes.items()))
        if not isinstance(self.axes, tuple) or not all(map(_are_axes, self.axes)):
            raise InputError(
                f"axes is {self.axes!r}. Give a dictionary from a glob to the axis of the outputs "
                f'and the axis of the inputs, such as {{"*.experts.w1": (1, 2)}}.'
            )

    def _check_names(self, which: str) -> None:
        """Raise InputError unless a field holds names; a list becomes a tuple."""
        names = getattr(self, which)
        if isinstance(names, Choice):
            text = isinstance(names, str)
            shown, name = (f"{names!r}",) * 2 if text else (f"a {type(names).__name__}", "it")
            raise InputError(
                f"{which} is {shown}. Layers takes a tuple of names, such as ({name},)."
            )
        try:
            object.__setattr__(self, which, tuple(names))
        except TypeError as error:
            raise InputError(f"{which} is {names!r}. Layers takes a tuple of names.") from error
        only, kinds = (str, "texts") if which == "types" else (Choice, "globs and modules")
        if wrong := [name for name in getattr(self, which) if not isinstance(name, only)]:
            raise InputError(f"{which} holds {wrong[0]!r}. Layers takes a tuple of {kinds}.")

    def select(self, model: nn.Module) -> Chosen:
        """Return the chosen weights by parameter name, in the order of the model's modules.

        Raises:
            InputError: A name matches nothing, or no weight is left.
        """
        return self.split(model)[0]

    def split(self, model: nn.Module) -> tuple[Chosen, dict[str, str]]:
        """Return the chosen weights by name, and why every other one stays dense.

        The others are all parameters of two dimensions or more.

        Raises:
            InputError: A name matches nothing, or no weight is left.
        """
        found = weights(model)
        means = _Means(found)
        include = means.all_of(self.include, "include")
        exclude = means.all_of(self.exclude, "exclude")
        named = means.all_of(self.params, "params")
        shapes = {name: weight.shape for name, weight in found.items()} | self._shapes(means)
        layers = {id(module) for weight in found.values() for module in weight.layers}
        order = [id(module) for module in model.modules() if id(module) in layers]
        refused = {}
        for name, weight in found.items():
            mine = {id(module) for module in weight.layers}
            if why := weight.fixed or (name not in named and weight.reason):
                refused[name] = why
            elif name in exclude:
                refused[name] = "excluded by name"
            elif self.skip_first and order[:1] and order[0] in mine:
                refused[name] = "the first layer"
            elif self.skip_last and order[-1:] and order[-1] in mine:
                refused[name] = "the last layer"
            elif name not in named and (why := self._other(weight, name in include)):
                refused[name] = why
        if len(refused) == len(found):
            raise InputError(_nothing(refused))
        params = {name: weight.param for name, weight in found.items() if name not in refused}
        return Chosen(params, shapes), refused

    def _other(self, weight: Weight, included: bool) -> str | None:
        """Return why a weight is not among those of the wanted types and names."""
        if weight.kind is None:
            owner = type(weight.modules[0]).__name__
            return f"a parameter of {owner}, which is no layer of a known type: params names it"
        if weight.kind not in self.types:
            return f"of the type {weight.kind!r}, which types does not name"
        return None if included else "not among the included layers"

    def _shapes(self, means: _Means) -> dict[str, Shape]:
        """Return the shapes of the parameters whose axes were given."""
        shapes: dict[str, Shape] = {}
        for glob, (outputs, inputs) in dict(self.axes).items():
            for name in sorted(means.one(glob, "axes") - shapes.keys()):
                param = means.found[name].param
                if max(outputs, inputs) >= param.ndim:
                    raise InputError(
                        f"axes gives {name!r} the axes {outputs} and {inputs}, and its shape is "
                        f"{tuple(param.shape)}: it has the axes 0 to {param.ndim - 1}."
                    )
                shapes[name] = Shape(param.shape, outputs=outputs, inputs=inputs)
        return shapes


class _Means:
    """What names mean in a model.

    Args:
        found: The parameters of the model that have two dimensions or more.
    """

    def __init__(self, found: Mapping[str, Weight]) -> None:
        self.found = found

    def all_of(self, choices: Iterable[Choice], where: str) -> set[str]:
        """Return the parameters that one of these names or objects means."""
        return {name for choice in choices for name in self.one(choice, where)}

    def one(self, choice: Choice, where: str) -> set[str]:
        """Return the parameters that a name or an object means.

        Raises:
            InputError: There is none.
        """
        if isinstance(choice, str):
            return self._glob(choice, where)
        inside = {id(param) for param in unwrapped(choice).parameters()}
        if meant := {name for name, weight in self.found.items() if id(weight.param) in inside}:
            return meant
        what = type(choice).__name__
        raise InputError(
            f"{where} holds a {what} that has no parameter of two dimensions or more in this "
            f"model. Give a part of this very model (not of a copy), or its name."
        )

    def _glob(self, glob: str, where: str) -> set[str]:
        meant = {
            name
            for name, weight in self.found.items()
            if any(fnmatchcase(own, glob) for own in weight.names)
        }
        if meant or glob == "*":
            return meant
        if where in ("params", "axes"):
            raise InputError(
                f"No parameter of two dimensions or more is called {glob!r}. They are: "
                f"{_listed(self.found)}."
            )
        layers = [name.removesuffix(".weight") for name, w in self.found.items() if w.kind]
        raise InputError(
            f"No layer is called {glob!r}. The model's layers whose weights can be pruned are: "
            f"{_listed(layers)}."
        )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more or "none"


def _nothing(refused: Mapping[str, str]) -> str:
    """Return the sentence for a model of which no weight is left to prune."""
    if not refused:
        return "Nothing to prune: the model has no parameter of two dimensions or more."
    reasons: dict[str, list[str]] = {}
    for name, why in refused.items():
        reasons.setdefault(why, []).append(name)
    parts = [
        f"{_listed(names[:3])}{' ...' * (len(names) > 3)}: {why}" for why, names in reasons.items()
    ]
    more = f"; and {len(parts) - _SHOWN} more reasons" if len(parts) > _SHOWN else ""
    return (
        f"Nothing to prune: Layers(...) leaves none of the model's {len(refused)} parameters of "
        f"two dimensions or more ({'; '.join(parts[:_SHOWN])}{more}). Name others by types, "
        f"include or params, or loosen exclude, skip_first and skip_last."
    )


def _are_axes(pair: object) -> bool:
    if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
        return False
    axes = pair[1]
    return (
        isinstance(axes, tuple)
        and len(axes) == 2
        and all(isinstance(axis, int) and axis >= 0 for axis in axes)
        and axes[0] != axes[1]
    )


def matches(parameter: str, globs: tuple[str, ...]) -> bool:
    """Whether one of the globs names this parameter, or the module that holds it."""
    layer = parameter.rpartition(".")[0]
    return any(fnmatchcase(layer, glob) or fnmatchcase(parameter, glob) for glob in globs)


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
