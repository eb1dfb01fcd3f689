"""acdc: train one network, get two: an accurate sparse model and its dense twin.

AC/DC, Alternating Compressed/DeCompressed training (Peste et al., NeurIPS 2021).

A public name is imported when it is first used: ``import acdc`` alone does not import torch, and
``acdc --help`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names as in _HOME, for type checkers and editors
    from acdc.engine.engine import Engine
    from acdc.errors import AcdcError, InputError, MissingDependency
    from acdc.hooks.changes import Change
    from acdc.hooks.mirror import MirrorStep
    from acdc.hooks.twin import DenseTwin
    from acdc.layers import Layers
    from acdc.methods import (
        ACDC,
        DPF,
        DSD,
        GMP,
        IMP,
        SET,
        SNFS,
        SNIP,
        SRSTE,
        STR,
        Dense,
        Given,
        Gradual,
        GraNet,
        OneShot,
        PartialACDC,
        RigL,
        Static,
        TopKAST,
        WoodFisher,
    )
    from acdc.pair import Pair
    from acdc.pattern import NM, Block, Pattern, Unstructured
    from acdc.result import DenseNetwork, SparseNetwork, read_sparse
    from acdc.runtime.runtime import Runtime
    from acdc.schedule import Phase, Plan, Schedule, alternate, constant, phases
    from acdc.sparsifier import Sparsifier
    from acdc.support import Support, kept

__version__ = "0.2.0"

# Public name -> the module that defines it.
_HOME = {
    "ACDC": "acdc.methods",
    "DPF": "acdc.methods",
    "DSD": "acdc.methods",
    "GMP": "acdc.methods",
    "IMP": "acdc.methods",
    "NM": "acdc.pattern",
    "SET": "acdc.methods",
    "SNFS": "acdc.methods",
    "SNIP": "acdc.methods",
    "SRSTE": "acdc.methods",
    "STR": "acdc.methods",
    "AcdcError": "acdc.errors",
    "Block": "acdc.pattern",
    "Change": "acdc.hooks.changes",
    "Dense": "acdc.methods",
    "DenseNetwork": "acdc.result",
    "DenseTwin": "acdc.hooks.twin",
    "Engine": "acdc.engine.engine",
    "Given": "acdc.methods",
    "GraNet": "acdc.methods",
    "Gradual": "acdc.methods",
    "InputError": "acdc.errors",
    "Layers": "acdc.layers",
    "MirrorStep": "acdc.hooks.mirror",
    "MissingDependency": "acdc.errors",
    "OneShot": "acdc.methods",
    "Pair": "acdc.pair",
    "PartialACDC": "acdc.methods",
    "Pattern": "acdc.pattern",
    "Phase": "acdc.schedule",
    "Plan": "acdc.schedule",
    "RigL": "acdc.methods",
    "Runtime": "acdc.runtime.runtime",
    "Schedule": "acdc.schedule",
    "SparseNetwork": "acdc.result",
    "Sparsifier": "acdc.sparsifier",
    "Static": "acdc.methods",
    "Support": "acdc.support",
    "TopKAST": "acdc.methods",
    "Unstructured": "acdc.pattern",
    "WoodFisher": "acdc.methods",
    "alternate": "acdc.schedule",
    "constant": "acdc.schedule",
    "kept": "acdc.support",
    "phases": "acdc.schedule",
    "read_sparse": "acdc.result",
}

__all__ = [
    "ACDC",
    "DPF",
    "DSD",
    "GMP",
    "IMP",
    "NM",
    "SET",
    "SNFS",
    "SNIP",
    "SRSTE",
    "STR",
    "AcdcError",
    "Block",
    "Change",
    "Dense",
    "DenseNetwork",
    "DenseTwin",
    "Engine",
    "Given",
    "GraNet",
    "Gradual",
    "InputError",
    "Layers",
    "MirrorStep",
    "MissingDependency",
    "OneShot",
    "Pair",
    "PartialACDC",
    "Pattern",
    "Phase",
    "Plan",
    "RigL",
    "Runtime",
    "Schedule",
    "SparseNetwork",
    "Sparsifier",
    "Static",
    "Support",
    "TopKAST",
    "Unstructured",
    "WoodFisher",
    "alternate",
    "constant",
    "kept",
    "phases",
    "read_sparse",
]


def __getattr__(name: str) -> Any:
    """Import a public name, or a module that holds some (PEP 562)."""
    if f"acdc.{name}" in _HOME.values():
        return import_module(f"acdc.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'acdc' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
