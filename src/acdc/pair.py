"""The two trained twins, and the three files that hold them.

A folder written by :meth:`Pair.save` holds:

``dense.safetensors``
    The state dict of the dense twin, plain: every tensor under its own name.

``sparse.safetensors``
    The state dict of the sparse twin. :mod:`acdc.bitmask` describes the format.

``pair.json``
    The facts of the run, the kept count of every layer, the order of the tensors, and the hashes of
    the files and of the support. :mod:`acdc.index` describes the format.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, final

from torch import Tensor

from acdc.bitmask import decode, deserialize, encode
from acdc.errors import InputError
from acdc.index import PAIR, Index, Twin, in_order, support_entry, support_of
from acdc.states import (
    Model,
    check_pruned,
    differences,
    json_object,
    load_into,
    plain_tensors,
    same_tensors,
)
from acdc.support import Support


@final
@dataclass(frozen=True, eq=False, repr=False)
class Pair:
    """A sparse model, its dense twin, the support that ties them, and the facts of the run.

    Args:
        sparse: State dict of the sparse twin. Every weight that the support prunes is +0.0, bit
            for bit.
        dense: State dict of the dense twin: the same names, shapes and dtypes.
        support: Which weights of ``sparse`` are kept, by the name of the weight.
        facts: What the run has to say: anything that JSON can hold, without NaN and infinity.

    The tensors are held, not copied. Two pairs are equal when all their bits are.

    Raises:
        InputError: The two state dicts do not belong together, or not to the support.
    """

    sparse: dict[str, Tensor]
    dense: dict[str, Tensor]
    support: Support
    facts: dict[str, Any] = field(default_factory=dict)

    index: ClassVar[Index] = PAIR

    def __post_init__(self) -> None:
        for twin in ("sparse", "dense"):
            state = plain_tensors(getattr(self, twin), f"the {twin} twin")
            object.__setattr__(self, twin, state)
        object.__setattr__(self, "facts", json_object(self.facts))
        if found := differences(self.sparse, "the sparse twin", self.dense, "the dense twin"):
            raise InputError(
                f"The two twins are not of one model: {found}. Take both state dicts from the same "
                f"model."
            )
        check_pruned(self.support, self.sparse, "the sparse twin")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pair):
            return NotImplemented
        return (
            self.facts == other.facts
            and self.support == other.support
            and same_tensors(self.sparse, other.sparse)
            and same_tensors(self.dense, other.dense)
        )

    __hash__ = None  # type: ignore[assignment]  # tensors inside: equal by value, not hashable

    def __repr__(self) -> str:
        support = self.support
        facts = f", facts: {', '.join(self.facts)}" if self.facts else ""
        return (
            f"Pair({len(self.dense)} tensors; sparse twin: {support.nnz:,} of {support.numel:,} "
            f"prunable weights kept in {len(support)} layers, sparsity {support.sparsity:.4f}"
            f"{facts})"
        )

    def networks(self) -> dict[Twin, dict[str, Tensor]]:
        """Return the state dicts of both twins."""
        return {"sparse": self.sparse, "dense": self.dense}

    def state(self, twin: Twin) -> dict[str, Tensor]:
        """Return the state dict of one twin, ``"sparse"`` or ``"dense"``."""
        if twin not in ("sparse", "dense"):
            raise InputError(f'The twin is {twin!r}. It is "sparse" or "dense".')
        return self.networks()[twin]

    def sparse_model(self, model: Model) -> Model:
        """Load the sparse twin into ``model`` in place, bit for bit, and return the model.

        Raises:
            InputError: The model has other names, shapes or dtypes. It is left as it was.
        """
        return load_into(model, self.sparse, self.index.noun)

    def dense_model(self, model: Model) -> Model:
        """Load the dense twin into ``model`` in place, bit for bit, and return the model.

        Raises:
            InputError: The model has other names, shapes or dtypes. It is left as it was.
        """
        return load_into(model, self.dense, self.index.noun)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the pair into ``folder``, which is made if needed, and return the folder.

        A pair that is there is replaced. A save that fails for want of space or permission leaves
        it as it was.

        Raises:
            InputError: The disk is full, the folder cannot be written, or it holds another result.
        """
        body = {
            "facts": self.facts,
            "support": support_entry(self.support),
            "tensors": list(self.sparse),
        }
        files: dict[Twin, Any] = {
            "dense": (self.dense, {"format": "pt"}),
            "sparse": encode(self.sparse, self.support),
        }
        return self.index.write(Path(folder), body, files)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Pair:
        """Read the pair that :meth:`save` wrote into ``folder``, bit for bit, onto the CPU.

        Raises:
            InputError: There is no pair, a file is missing, truncated or altered, or a newer acdc
                wrote it.
        """
        folder = Path(folder)
        index = cls.index.read(folder)
        with cls.index.fitting(folder):
            dense_file = cls.index.read_file(folder, "dense", index["files"]["dense"])
            sparse_file = cls.index.read_file(folder, "sparse", index["files"]["sparse"])
            sparse, masks = decode(sparse_file)
            return cls(
                in_order(index["tensors"], sparse),
                in_order(index["tensors"], deserialize(dense_file)),
                support_of(index["support"], masks),
                index["facts"],
            )
