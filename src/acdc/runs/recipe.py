"""A recipe: everything about a run, as one value.

A recipe is written as a function that returns a :class:`Recipe` (see ``acdc.recipes``). The command
line changes single values by their path, ``method.pattern.sparsity=0.95``. The type of the field
decides how the text is read. A component is replaced by the name of another one, ``method=dense``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from acdc.errors import InputError
from acdc.hooks.saved import is_unused
from acdc.layers import Layers
from acdc.methods.base import Method
from acdc.methods.dense import Dense
from acdc.pattern import NM, Block, Pattern, Unstructured
from acdc.runs import data as sources
from acdc.runs import models
from acdc.runs.data import Augment, Source
from acdc.runs.models import Model
from acdc.runs.optim import SGD, AdamW, Cosine, Curve, Optimizer, Rewarm, StepDecay, Tail
from acdc.runs.record import Folder
from acdc.schedule import Constant
from acdc.schema import Misfit, Number, check

Computed = Literal["auto", "off", "reference"]


@dataclass(frozen=True)
class Recipe:
    """Everything about a run.

    Args:
        name: Name of the recipe on the command line.
        about: One sentence for ``acdc list``.
        model: The network.
        data: The data.
        method: The method, holding a plan in epochs.
        optimizer: The optimizer.
        lr: The learning-rate curve, through all phases.
        batch_size: Samples of one optimizer step, over all processes.
        accumulate: Number of parts in which a batch is computed, to save memory. The step is the
            same, except that BatchNorm takes its statistics over a part.
        label_smoothing: Label smoothing of the cross-entropy loss.
        clip: Largest norm of the gradient, or ``None``.
        dense_finetune: Whether to fine-tune the dense twin: from the end of the last dense phase,
            over the rest of the same learning-rate curve. The sparse twin is not touched.
        bn_batches: Batches over which the BatchNorm statistics of the networks are estimated anew
            after training. 0: the statistics of the training stay.
        eval_batch_size: Samples evaluated at a time.
        checkpoint_steps: Steps between two checkpoints.
        precision: Precision of Lightning Fabric: ``"32-true"``, ``"bf16-mixed"``, ``"16-mixed"``.
        channels_last: Keep images and convolutions in PyTorch's channels-last layout.
        devices: Number of processes, one for each device. Every batch is divided among the
            processes, and BatchNorm takes its statistics over the part of a process.
        threads: Threads of PyTorch in each process; ``None``: PyTorch's default. Results are
            bitwise the same only for the same number of threads.
        engine: How sparse phases are computed on a CPU. ``"auto"``: each layer on the kernels or in
            PyTorch, whichever was faster at the first compression, and only what makes whole steps
            faster. ``"off"``: in PyTorch.
            ``"reference"``: by the engine in plain PyTorch, slowly, to check the kernels. Two runs
            with ``"auto"`` may choose differently, and then differ in the last bits. A resumed run
            keeps its choices, and stays bitwise the same.
        seed: Seed of weights, data order, augmentation and dropout.
        start: A finished run, given by the name of its folder beside this run's folder. This run
            starts from its dense network. ``None``: fresh weights.
        supports: Whether the support of each compression is kept in the folder of the run, for
            ``acdc study masks``: a bit for each prunable weight.
    """

    name: str
    about: str
    model: Model
    data: Source
    method: Method[Any]
    optimizer: Optimizer = field(default_factory=SGD)
    lr: Curve = field(default_factory=Cosine)
    batch_size: int = 128
    accumulate: int = 1
    label_smoothing: float = 0.0
    clip: float | None = None
    dense_finetune: bool = False
    bn_batches: int = 0
    eval_batch_size: int = 1000
    checkpoint_steps: int = 500
    precision: str = "32-true"
    channels_last: bool = True
    devices: int = 1
    threads: int | None = None
    engine: Computed = "auto"
    seed: int = 0
    start: str | None = None
    supports: bool = field(default=False, metadata={"added": True})

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "eval_batch_size", "checkpoint_steps", "devices"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}. It is a whole number from 1 up.")
        if self.batch_size % (self.devices * self.accumulate):
            raise InputError(
                f"batch_size is {self.batch_size}, which {self.devices} devices and "
                f"{self.accumulate} parts cannot share evenly. Choose a multiple of "
                f"{self.devices * self.accumulate}."
            )
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads is {self.threads}. It is a whole number from 1 up.")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing is {self.label_smoothing!r}. It is in [0, 1).")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"clip is {self.clip!r}. It is a positive number, or none.")
        if self.bn_batches < 0:
            raise InputError(f"bn_batches is {self.bn_batches}. It is a number from 0 up.")
        if self.engine not in (modes := get_args(Computed)):
            raise InputError(f"engine is {self.engine!r}. It is one of: {', '.join(modes)}.")

    @property
    def epochs(self) -> int:
        """Passes over the training data."""
        return self.method.schedule.epochs


# --- components that can be replaced by name ----------------------------------------------------

_Component = Callable[[Any], Any]


def _dense(old: Method[Any]) -> Method[Any]:
    return Dense(Constant(old.schedule.epochs, "dense"))


def _pattern(kind: type[Pattern]) -> _Component:
    def build(old: Pattern) -> Pattern:
        common = {"sparsity": old.target, "scope": getattr(old, "scope", "global")}
        names = {f.name for f in fields(kind)}
        return kind(**{name: value for name, value in common.items() if name in names})

    return build


COMPONENTS: dict[type, dict[str, _Component]] = {
    Method: {"dense": _dense},
    Pattern: {"unstructured": _pattern(Unstructured), "nm": _pattern(NM), "block": _pattern(Block)},
    Optimizer: {"sgd": lambda _: SGD(), "adamw": lambda _: AdamW()},
    Curve: {
        "cosine": lambda _: Cosine(),
        "steps": lambda _: StepDecay(),
        "rewarm": Rewarm,  # of the curve that is there
        "tail": Tail,
    },
    Layers: {"all": lambda _: Layers(), "default": lambda _: None},
}


# --- changing values by their path --------------------------------------------------------------


def change(recipe: Recipe, settings: Mapping[str, str]) -> Recipe:
    """Return the recipe with the values at these paths replaced.

    Args:
        recipe: The recipe to start from.
        settings: Path → text, as typed after ``--set``; applied in order.

    Raises:
        InputError: A path names no field, a text does not fit its type, or the value is refused.
    """
    for path, text in settings.items():
        recipe = _change(recipe, path.split("."), text, path)
    return recipe


def _change(node: Any, path: list[str], text: str, whole: str) -> Any:
    name, *rest = path
    names = [f.name for f in fields(node)]
    if name not in names or (node.__class__ is Recipe and name in ("name", "about")):
        at = whole.rsplit(".", len(rest) + 1)[0] if whole.count(".") > len(rest) else "the recipe"
        raise InputError(
            f"--set {whole}={text}: {at} ({type(node).__name__}) has no field {name!r}. "
            f"Its fields are: {', '.join(n for n in names if n not in ('name', 'about'))}."
        )
    old = getattr(node, name)
    if rest:
        if old is None and _kind(node, name) is Layers:
            old = Layers()
        if not is_dataclass(old):
            raise InputError(
                f"--set {whole}={text}: {name!r} is the value {old!r} and has no fields of its "
                f"own. Write --set {whole.rsplit('.' + rest[0], 1)[0]}=VALUE."
            )
        new = _change(old, rest, text, whole)
    elif (kind := _kind(node, name)) is not None:
        makers = COMPONENTS[kind]
        if text not in makers:
            raise InputError(
                f"--set {whole}={text}: {name} can be replaced by {', '.join(makers)}"
                f"{f', and its fields set one by one ({whole}.FIELD=VALUE)' if old else ''}."
            )
        new = makers[text](old)
    elif is_dataclass(old):
        raise InputError(
            f"--set {whole}={text}: {name} has fields of its own: "
            f"{', '.join(f'{whole}.{f.name}' for f in fields(old))}. Set one of them."
        )
    else:
        new = parse(text, get_type_hints(type(node))[name], whole)
    return replace(node, **{name: new})


def _kind(node: Any, name: str) -> type | None:
    """Return the component type of a field that can be replaced by name, otherwise ``None``."""
    hint = get_type_hints(type(node))[name]
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [get_origin(option) or option for option in options]
    return next((kind for kind in COMPONENTS if kind in kinds), None)


def parse(text: str, hint: Any, path: str) -> Any:
    """Return the value that ``text`` stands for as the type ``hint``.

    >>> parse("1e-3", float | None, "clip"), parse("none", float | None, "clip")
    (0.001, None)
    >>> parse("conv1,fc", tuple[str, ...], "method.layers.exclude")
    ('conv1', 'fc')

    Raises:
        InputError: The text does not fit the type.
    """
    try:
        value = _read(text, hint)
    except ValueError as error:
        shown = text if len(text) <= 100 else f"{text[:90]} ..."
        raise InputError(
            f"--set {path}={shown}: {shown!r} is not of the type {_spell(hint)}."
        ) from error
    if isinstance(value, float) and math.isnan(value):
        raise InputError(f"--set {path}={text}: NaN is no value.")
    return value


_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NONE = ("none", "null")


def _read(text: str, hint: Any) -> Any:
    """Return the value of a text.

    Raises:
        ValueError: The text does not fit the type.
    """
    word = text.strip().lower()
    kind, options = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        if type(None) in options and word in _NONE:
            return None
        for option in options:
            with contextlib.suppress(ValueError):
                return _read(text, option)
    elif kind is Literal and text in options:
        return text
    elif kind is tuple and word not in _NONE:
        parts = _split(text)
        kinds = options[:1] * len(parts) if options[1:] == (...,) else options
        return tuple(_read(part, each) for part, each in zip(parts, kinds, strict=True))
    elif hint is str:
        return text
    elif hint is int:
        return int(text)
    elif hint is float:
        return float(word.replace(".inf", "inf").replace(".nan", "nan"))
    elif hint is bool and word in _BOOLS:
        return _BOOLS[word]
    raise ValueError(text)


def _split(text: str) -> list[str]:
    """Return the elements of a list, written with brackets or without.

    >>> _split("a, b"), _split("[a,b]"), _split("()"), _split("[[a,1],[b,2]]")
    (['a', 'b'], ['a', 'b'], [], ['[a,1]', '[b,2]'])
    """
    text = text.strip()
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
        if not depth and letter in "])" and parts == [text] and text[0] in "[(":
            return _split(text[1:-1])  # brackets around the whole list
    return [part.strip(" \"'") for part in parts if part.strip()]


def _spell(hint: Any) -> str:
    """Return the name of a type in an error message."""
    kind, options = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(_spell(option) for option in options)
    if kind is tuple and options[1:] == (...,):
        return f"list of {_spell(options[0])}s (a,b,c)"
    if kind is Literal:
        *others, last = map(str, options)
        return f"{', '.join(others)} or {last}"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return names.get(hint, "none" if hint is type(None) else str(hint).replace("typing.", ""))


# --- recipes on disk ----------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """Return a value as JSON can hold it: a dataclass becomes its fields and its type.

    A field that was added later is left out while it has its default (:func:`is_unused`): a recipe
    then has the same values, and a run the same label, as before.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__} | {
            f.name: encode(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if not is_unused(value, f)
        }
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a recipe.json, with defaults for the fields that older versions lack."""
    return {"engine": "off", "start": None, **values}


# A larger model than any that is trained: it would be built before it is refused.
_BOUNDED: dict[Any, Any] = {int: Number(int, 0, 10**5), float: Number(float, 0, 1)}


def decode_model(values: Mapping[str, Any]) -> Model:
    """Return the model with these encoded values: the inverse of :func:`encode`.

    Raises:
        InputError: This version has no such model.
    """
    rest = {key: value for key, value in values.items() if key != "type"}
    kind = getattr(models, str(values.get("type")), None)
    try:
        if not (isinstance(kind, type) and issubclass(kind, Model) and is_dataclass(kind)):
            raise TypeError("it is none of acdc.runs.models")
        hints = {name: hint for name, hint in get_type_hints(kind).items() if name in rest}
        check(rest, {name: _BOUNDED.get(hint, hint) for name, hint in hints.items()}, "the model")
        return kind(**rest)
    except (TypeError, Misfit) as error:
        raise InputError(
            f"The run's model {values.get('type')!r} is not known to this version of acdc "
            f"({error}). Build it in Python, and use acdc.export.to_onnx."
        ) from error


def model_of(folder: Folder) -> Model:
    """Return the model of a run.

    Raises:
        InputError: The folder is not that of a run, or this version has no such model.
    """
    values = folder.read(folder.recipe)["values"]
    try:
        return decode_model(values.get("model", {}))
    except InputError as error:
        raise InputError(f"{folder.recipe}: {error}") from error


def decode_data(values: Mapping[str, Any]) -> Source:
    """Return the data source with these encoded values: the inverse of :func:`encode`.

    Raises:
        InputError: This version has no such source.
    """
    rest = {key: value for key, value in values.items() if key != "type"}
    kind = getattr(sources, str(values.get("type")), None)
    try:
        if not (isinstance(kind, type) and issubclass(kind, Source) and is_dataclass(kind)):
            raise TypeError("it is none of acdc.runs.data")
        if isinstance(augment := rest.get("augment"), Mapping):
            rest["augment"] = Augment(**{k: v for k, v in augment.items() if k != "type"})
        return kind(**rest)
    except TypeError as error:
        raise InputError(
            f"The run's data {values.get('type')!r} are not known to this version of acdc "
            f"({error})."
        ) from error


def data_of(folder: Folder) -> Source:
    """Return the data source of a run.

    Raises:
        InputError: The folder is not that of a run, or this version has no such source.
    """
    values = folder.read(folder.recipe)["values"]
    try:
        return decode_data(values.get("data") or {})
    except InputError as error:
        raise InputError(f"{folder.recipe}: {error}") from error


def label(name: str, settings: Mapping[str, str]) -> str:
    """Return the name of a run: its recipe, and the hash of the changed values."""
    if not settings:
        return name
    text = json.dumps(dict(sorted(settings.items())))
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
