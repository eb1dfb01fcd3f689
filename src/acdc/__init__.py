"""acdc: train one network, get two: an accurate sparse model and its dense twin.

AC/DC, Alternating Compressed/DeCompressed training (Peste et al., NeurIPS 2021).
"""

from acdc.errors import AcdcError, InputError, MissingDependency
from acdc.layers import Layers
from acdc.methods.acdc import ACDC
from acdc.methods.dense import Dense
from acdc.pair import Pair
from acdc.pattern import NM, Block, Pattern, Unstructured
from acdc.schedule import Phase, Plan, Schedule, alternate, constant, phases
from acdc.sparsifier import Change, DenseTwin, Sparsifier
from acdc.support import Support, kept

__version__ = "0.1.0"

__all__ = [
    "ACDC",
    "NM",
    "AcdcError",
    "Block",
    "Change",
    "Dense",
    "DenseTwin",
    "InputError",
    "Layers",
    "MissingDependency",
    "Pair",
    "Pattern",
    "Phase",
    "Plan",
    "Schedule",
    "Sparsifier",
    "Support",
    "Unstructured",
    "alternate",
    "constant",
    "kept",
    "phases",
]
