"""acdc: train one network, get two: an accurate sparse model and its dense twin.

AC/DC, Alternating Compressed/DeCompressed training (Peste et al., NeurIPS 2021).
"""

from typing import TYPE_CHECKING, Any

from acdc.errors import AcdcError, InputError, MissingDependency
from acdc.hooks.changes import Change
from acdc.hooks.twin import DenseTwin
from acdc.layers import Layers
from acdc.methods import (
    ACDC,
    DPF,
    DSD,
    GMP,
    SET,
    SNFS,
    SNIP,
    SRSTE,
    STR,
    Dense,
    Gradual,
    OneShot,
    RigL,
    Static,
    TopKAST,
    WoodFisher,
)
from acdc.pair import Pair
from acdc.pattern import NM, Block, Pattern, Unstructured
from acdc.result import DenseNetwork, SparseNetwork
from acdc.schedule import Phase, Plan, Schedule, alternate, constant, phases
from acdc.sparsifier import Sparsifier
from acdc.support import Support, kept

if TYPE_CHECKING:
    from acdc.engine.engine import Engine

__version__ = "0.1.0"

__all__ = [
    "ACDC",
    "DPF",
    "DSD",
    "GMP",
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
    "Gradual",
    "InputError",
    "Layers",
    "MissingDependency",
    "OneShot",
    "Pair",
    "Pattern",
    "Phase",
    "Plan",
    "RigL",
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
]


def __getattr__(name: str) -> Any:
    if name == "Engine":  # loads torch's tracing tools, which only its users need
        from acdc.engine.engine import Engine

        return Engine
    raise AttributeError(f"module 'acdc' has no attribute {name!r}")
