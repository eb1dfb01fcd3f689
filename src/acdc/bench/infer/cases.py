"""What ``acdc bench infer`` computes: a run, a pair, a frozen file, or a network by its name.

Networks that are named have random weights, and nothing is downloaded. The largest weights of each
layer are kept. BatchNorm has the statistics of random inputs, so that folding changes values.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acdc.bench import zoo
from acdc.errors import InputError
from acdc.layers import Layers
from acdc.pattern import Scope, Unstructured
from acdc.result import DenseNetwork, load
from acdc.runs.models import MobileNetV1, ResNet50
from acdc.runs.recipe import model_of
from acdc.runs.record import Folder
from acdc.score import magnitude

Inputs = Callable[[int], dict[str, Tensor]]

_CALIBRATED = 8  # random samples from which BatchNorm takes its statistics
_WORDS = 1000


@dataclass(frozen=True)
class Case:
    """A network to compute.

    Args:
        name: What stands in the table.
        sparsity: Fraction of its pruned weights that is zero. None: it was not pruned here.
        build: Makes the network in evaluation mode; every call returns equal weights.
        inputs: Returns random inputs by name, for a number of samples.
        frozen: A frozen file in place of a model.
    """

    name: str
    sparsity: float | None
    build: Callable[[], nn.Module] | None
    inputs: Inputs
    frozen: Path | None = None


@dataclass(frozen=True)
class Asked:
    """What the command line says about one case.

    Args:
        what: A run, a pair, a frozen file, or a name.
        sparsity: For a name: the fraction of zeros.
        scope: For a name: the scope in which its weights compete.
        model: For a pair: ``MODULE:CALLABLE``, which makes the network.
        shape: For a pair: the shape of one sample.
    """

    what: str
    sparsity: float | None = None
    scope: Scope = "uniform"
    model: str | None = None
    shape: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """What stands in the table."""
        return self.what if is_name(self.what) else Path(self.what).name

    def case(self) -> Case:
        """Return the case.

        Raises:
            InputError: There is no such file, folder or network, or a pair lacks its model.
        """
        path = Path(self.what)
        if is_name(self.what):
            return _named(self)
        if path.is_file():
            return _frozen(path)
        if (path / "recipe.json").exists():
            return _run(path)
        if (path.parent / "recipe.json").exists():
            return _run(path.parent)
        return _pair(path, self)


def is_name(what: str) -> bool:
    """Return whether it can only be the name of a network: there is no such file or folder."""
    return not Path(what).exists()


# --- networks by name -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    argument: str = "x"
    library: str | None = None


_RESNET18 = {
    "num_labels": 1000, "layer_type": "basic", "embedding_size": 64,
    "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2],
}  # fmt: skip
_D384 = {
    "num_labels": 1000, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
    "intermediate_size": 1536,
}  # fmt: skip
_NAMED: dict[str, _Entry] = {
    "resnet50": _Entry(ResNet50().build, (3, 224, 224)),
    "resnet18": _Entry(
        partial(zoo.of_transformers, "ResNetForImageClassification", "ResNetConfig", **_RESNET18),
        (3, 224, 224), "pixel_values", "transformers",
    ),
    "mobilenet_v1": _Entry(MobileNetV1().build, (3, 224, 224)),
    "bert_d384": _Entry(
        partial(
            zoo.of_transformers, "BertForSequenceClassification", "BertConfig", vocab_size=_WORDS,
            **_D384,
        ),
        (128,), "input_ids", "transformers",
    ),
    "vit_d384": _Entry(
        partial(zoo.of_transformers, "ViTForImageClassification", "ViTConfig", **_D384),
        (3, 224, 224), "pixel_values", "transformers",
    ),
}  # fmt: skip
NAMES = tuple(_NAMED)
"""Networks of the usual sizes; those of ``acdc bench zoo`` can be named, too."""


def _named(asked: Asked) -> Case:
    entry = _NAMED.get(asked.what) or _of_zoo(asked.what)
    if entry is None:
        raise InputError(
            f"{asked.what} is no file, no folder and no network. The networks are "
            f"{', '.join(NAMES)}, and those of 'acdc bench zoo --list'."
        )
    if entry.library is not None and find_spec(entry.library) is None:
        raise InputError(
            f"{asked.what} needs {entry.library}, which is not installed: "
            f"pip install {entry.library}."
        )
    inputs = partial(_random, ((entry.argument, entry.shape),))
    build = partial(_pruned, entry, inputs, asked.sparsity, asked.scope)
    return Case(asked.what, asked.sparsity, build, inputs)


def _of_zoo(name: str) -> _Entry | None:
    network = zoo.ZOO.get(name)
    if network is None:
        return None
    shape = (3, network.size, network.size) if network.images else (network.size,)
    known = {"transformers": "pixel_values" if network.images else "input_ids"}
    argument = known.get(network.library, "x")
    library = network.library if network.library in zoo.INSTALL else None
    return _Entry(network.build, shape, argument, library)


def _random(shapes: tuple[tuple[str, tuple[int, ...]], ...], samples: int) -> dict[str, Tensor]:
    """Return random inputs: words for one dimension, images otherwise."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, shape in shapes:
        size = (samples, *shape)
        if len(shape) == 1 and name == "input_ids":
            found[name] = torch.randint(1, _WORDS, size, generator=generator)
        else:
            found[name] = torch.randn(size, generator=generator)
    return found


def _pruned(entry: _Entry, inputs: Inputs, sparsity: float | None, scope: Scope) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = entry.build()
    config: Any = getattr(net, "config", None)
    if getattr(config, "use_cache", None) is True:
        config.use_cache = False  # a whole text at once needs no cache
    if sparsity:
        layers = Layers(types=("conv", "linear", "attention"), skip_first=True, skip_last=True)
        params = layers.select(net)
        support = Unstructured(sparsity, scope=scope).select(magnitude(params))
        with torch.no_grad():
            for name, param in params.items():
                param.masked_fill_(~support[name], 0.0)
    _calibrate(net, inputs(_CALIBRATED))
    return net.eval()


def _calibrate(net: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Give every BatchNorm the statistics of these inputs."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    before = [norm.momentum for norm in norms]
    net.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches, of which there is one
    with torch.no_grad():
        net(*inputs.values())
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


# --- what was trained -----------------------------------------------------------------------------


def _run(path: Path) -> Case:
    folder = Folder(path)
    spec = model_of(folder)
    example = spec.example(1)
    shape = tuple(example.shape[1:])

    def inputs(samples: int) -> dict[str, Tensor]:
        if example.is_floating_point():
            return _random((("x", shape),), samples)
        return {"x": spec.example(samples)}

    return _trained(path.name, folder.result, spec.build, inputs)


def _pair(path: Path, asked: Asked) -> Case:
    if asked.model is None or asked.shape is None:
        raise InputError(
            f"{path} holds weights and no model: give the folder of its run, or the model by "
            f"--model MODULE:CALLABLE and the shape of one sample by --shape, such as "
            f"--model my_package.networks:make --shape 3,224,224."
        )
    inputs = partial(_random, (("x", asked.shape),))
    return _trained(path.name, path, partial(_made, asked.model), inputs)


def _made(model: str) -> nn.Module:
    """Call ``MODULE:CALLABLE``. The module is also looked for in the working directory."""
    module, colon, name = model.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        net = getattr(importlib.import_module(module), name)() if colon else None
    except Exception as error:  # a module of the user's may raise any exception
        raise InputError(
            f"--model {model}: {type(error).__name__}: {error}. Write MODULE:CALLABLE, such as "
            f"my_package.networks:make; the callable takes nothing and returns the network."
        ) from error
    if not isinstance(net, nn.Module):
        raise InputError(
            f"--model {model} made a {type(net).__name__}. Write MODULE:CALLABLE, such as "
            f"my_package.networks:make; the callable takes nothing and returns a torch.nn.Module."
        )
    return net


def _trained(name: str, folder: Path, make: Callable[[], nn.Module], inputs: Inputs) -> Case:
    result = load(folder)
    if isinstance(result, DenseNetwork):
        raise InputError(f"{folder} holds a dense network alone, and no sparse one to compute.")

    def build() -> nn.Module:
        return result.sparse_model(make()).eval()

    return Case(name, result.support.sparsity, build, inputs)


def _frozen(path: Path) -> Case:
    from acdc.runtime.runtime import Runtime

    arguments = Runtime.load(path).get_inputs()
    shapes = tuple((a.name, tuple(int(n) for n in a.shape[1:])) for a in arguments)
    if any("int" in argument.type for argument in arguments):
        return Case(path.name, None, None, partial(_words, shapes), path)
    return Case(path.name, None, None, partial(_random, shapes), path)


def _words(shapes: tuple[tuple[str, tuple[int, ...]], ...], samples: int) -> dict[str, Tensor]:
    return {name: torch.zeros(samples, *shape, dtype=torch.int64) for name, shape in shapes}
