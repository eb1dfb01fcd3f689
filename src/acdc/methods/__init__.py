"""Methods: when the support changes, and to what. One final class per paper and file."""

from typing import Any

from acdc.methods.acdc import ACDC
from acdc.methods.base import Method
from acdc.methods.dense import Dense
from acdc.methods.dpf import DPF
from acdc.methods.dsd import DSD
from acdc.methods.given import Given
from acdc.methods.gmp import GMP
from acdc.methods.gradual import Gradual
from acdc.methods.granet import GraNet
from acdc.methods.imp import IMP
from acdc.methods.oneshot import OneShot
from acdc.methods.partial import PartialACDC
from acdc.methods.rigl import RigL
from acdc.methods.set_ import SET
from acdc.methods.snfs import SNFS
from acdc.methods.snip import SNIP
from acdc.methods.srste import SRSTE
from acdc.methods.static import Static
from acdc.methods.str_ import STR
from acdc.methods.topkast import TopKAST
from acdc.methods.woodfisher import WoodFisher

__all__ = [
    "ACDC",
    "DPF",
    "DSD",
    "GMP",
    "IMP",
    "METHODS",
    "SET",
    "SNFS",
    "SNIP",
    "SRSTE",
    "STR",
    "Dense",
    "Given",
    "GraNet",
    "Gradual",
    "Method",
    "OneShot",
    "PartialACDC",
    "RigL",
    "Static",
    "TopKAST",
    "WoodFisher",
]

METHODS: dict[str, type[Method[Any]]] = {
    cls.name: cls
    for cls in (
        ACDC,
        Dense,
        Static,
        SNIP,
        SET,
        SNFS,
        RigL,
        GMP,
        GraNet,
        STR,
        TopKAST,
        DPF,
        SRSTE,
        DSD,
        OneShot,
        Gradual,
        WoodFisher,
        IMP,
        PartialACDC,
    )
}
"""Every method by its name. ``Given`` is not among them: a recipe cannot hold a support."""
