"""What training leaves: a pair, a sparse network alone, or a dense network alone.

A method with a dense phase, or with dense weights behind the sparse ones, leaves a
:class:`~acdc.pair.Pair`. A method that is sparse from its first step leaves a
:class:`SparseNetwork`. Dense training, and a method that ends dense, leave a :class:`DenseNetwork`.
All three can be saved, loaded, and asked for their ``networks()``.

A folder holds one result, and its index says which: ``pair.json`` with both files,
``sparse.json`` with ``sparse.safetensors``, or ``dense.json`` with ``dense.safetensors``. The files
are those of a pair (:mod:`acdc.pair`), and the index has the same checks (:mod:`acdc.index`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeAlias, final

from torch import Tensor

from acdc.bitmask import check_sum, decode, deserialize, encode
from acdc.errors import InputError
from acdc.index import (
    DENSE_NETWORK,
    SPARSE_NETWORK,
    WRONG_CONTENT,
    Index,
    Refused,
    Twin,
    in_order,
    support_entry,
    support_of,
)
from acdc.methods.base import Method
from acdc.pair import Pair
from acdc.states import (
    Model,
    check_pruned,
    json_object,
    load_into,
    plain_tensors,
    same_tensors,
)
from acdc.support import Support


@final
@dataclass(frozen=True, eq=False, repr=False)
class SparseNetwork:
    """A sparse network that has no dense twin.

    Args:
        sparse: Its state dict. Every weight that the support prunes is +0.0, bit for bit.
        support: Which weights are kept, by name.
        facts: What the run has to say: anything that JSON can hold, without NaN and infinity.

    Raises:
        InputError: The state does not belong to the support.
    """

    sparse: dict[str, Tensor]
    support: Support
    facts: dict[str, Any] = field(default_factory=dict)

    index: ClassVar[Index] = SPARSE_NETWORK

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparse", plain_tensors(self.sparse, "the sparse network"))
        object.__setattr__(self, "facts", json_object(self.facts))
        check_pruned(self.support, self.sparse, "the sparse network")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseNetwork):
            return NotImplemented
        return (
            self.facts == other.facts
            and self.support == other.support
            and same_tensors(self.sparse, other.sparse)
        )

    __hash__ = None  # type: ignore[assignment]  # tensors inside: equal by value, not hashable

    def __repr__(self) -> str:
        return (
            f"SparseNetwork({len(self.sparse)} tensors; {self.support.nnz:,} of "
            f"{self.support.numel:,} prunable weights kept, sparsity {self.support.sparsity:.4f})"
        )

    def networks(self) -> dict[Twin, dict[str, Tensor]]:
        """Return the state dict of the sparse network."""
        return {"sparse": self.sparse}

    def state(self, twin: Twin) -> dict[str, Tensor]:
        """Return the state dict of the network.

        Raises:
            InputError: The dense twin was asked for.
        """
        return self.sparse if twin == "sparse" else _not_there(self, twin)

    def sparse_model(self, model: Model) -> Model:
        """Load the network into ``model`` in place, bit for bit, and return the model.

        Raises:
            InputError: The model has other names, shapes or dtypes. It is left as it was.
        """
        return load_into(model, self.sparse, self.index.noun)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the network into ``folder``, which is made if needed, and return the folder.

        A sparse network that is there is replaced. A save that fails for want of space or
        permission leaves it as it was.

        Raises:
            InputError: The disk is full, the folder cannot be written, or it holds another result.
        """
        body = {
            "facts": self.facts,
            "support": support_entry(self.support),
            "tensors": list(self.sparse),
        }
        return self.index.write(Path(folder), body, {"sparse": encode(self.sparse, self.support)})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> SparseNetwork:
        """Read the network that :meth:`save` wrote into ``folder``, bit for bit, onto the CPU.

        Raises:
            InputError: There is no such network, a file is missing, truncated or altered, or a
                newer acdc wrote it.
        """
        folder = Path(folder)
        index = cls.index.read(folder)
        with cls.index.fitting(folder):
            data = cls.index.read_file(folder, "sparse", index["files"]["sparse"])
            state, masks = decode(data)
            support = support_of(index["support"], masks)
            return cls(in_order(index["tensors"], state), support, index["facts"])


@final
@dataclass(frozen=True, eq=False, repr=False)
class DenseNetwork:
    """A dense network that has no sparse twin.

    Args:
        dense: Its state dict.
        facts: What the run has to say: anything that JSON can hold, without NaN and infinity.

    Raises:
        InputError: The state holds something else than ordinary tensors.
    """

    dense: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    index: ClassVar[Index] = DENSE_NETWORK

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense", plain_tensors(self.dense, "the dense network"))
        object.__setattr__(self, "facts", json_object(self.facts))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DenseNetwork):
            return NotImplemented
        return self.facts == other.facts and same_tensors(self.dense, other.dense)

    __hash__ = None  # type: ignore[assignment]  # tensors inside: equal by value, not hashable

    def __repr__(self) -> str:
        return f"DenseNetwork({len(self.dense)} tensors)"

    def networks(self) -> dict[Twin, dict[str, Tensor]]:
        """Return the state dict of the dense network."""
        return {"dense": self.dense}

    def state(self, twin: Twin) -> dict[str, Tensor]:
        """Return the state dict of the network.

        Raises:
            InputError: The sparse twin was asked for.
        """
        return self.dense if twin == "dense" else _not_there(self, twin)

    def dense_model(self, model: Model) -> Model:
        """Load the network into ``model`` in place, bit for bit, and return the model.

        Raises:
            InputError: The model has other names, shapes or dtypes. It is left as it was.
        """
        return load_into(model, self.dense, self.index.noun)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the network into ``folder``, which is made if needed, and return the folder.

        A dense network that is there is replaced. A save that fails for want of space or permission
        leaves it as it was.

        Raises:
            InputError: The disk is full, the folder cannot be written, or it holds another result.
        """
        body = {"facts": self.facts, "tensors": list(self.dense)}
        return self.index.write(Path(folder), body, {"dense": (self.dense, {"format": "pt"})})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> DenseNetwork:
        """Read the network that :meth:`save` wrote into ``folder``, bit for bit, onto the CPU.

        Raises:
            InputError: There is no such network, a file is missing, truncated or altered, or a
                newer acdc wrote it.
        """
        folder = Path(folder)
        index = cls.index.read(folder)
        with cls.index.fitting(folder):
            data = cls.index.read_file(folder, "dense", index["files"]["dense"])
            return cls(in_order(index["tensors"], deserialize(data)), index["facts"])


Result: TypeAlias = Pair | SparseNetwork | DenseNetwork
"""What training leaves."""

RESULTS: tuple[type[Result], ...] = (Pair, SparseNetwork, DenseNetwork)


def leaves(method: Method[Any]) -> type[Result]:
    """Return what a method leaves at the end of its schedule.

    Args:
        method: The method, with its schedule in steps.
    """
    schedule = method.resolved
    ends_dense = method.ends_dense and schedule.phases[-1].kind == "dense"
    if method.sparsity is None or ends_dense:
        return DenseNetwork
    twins = schedule.last("dense") is not None or method.training.is_network
    return Pair if twins else SparseNetwork


def kind_in(folder: str | os.PathLike[str]) -> type[Result]:
    """Return which of the three results a folder holds.

    Raises:
        InputError: The folder holds no result, or the indices of several.
    """
    folder = Path(folder)
    found = [kind for kind in RESULTS if kind.index.is_in(folder)]
    if len(found) > 1:
        raise Refused(
            f"{folder} holds {' and '.join(kind.index.name for kind in found)}: the files of "
            f"several results are mixed there. Take a fresh copy of the folder."
        )
    if not found:
        names = [kind.index.name for kind in RESULTS]
        raise Refused(
            f"There is no result in {folder}: it has none of {', '.join(names)}. Give the folder "
            f"that one of {', '.join(kind.index.saver for kind in RESULTS)} wrote; in the folder "
            f"of a finished run it is pair/."
        )
    return found[0]


def load(folder: str | os.PathLike[str]) -> Result:
    """Read the result in a folder, whichever of the three it is, onto the CPU.

    Raises:
        InputError: There is no result, or one that is damaged.
    """
    return kind_in(folder).load(folder)


def read_sparse(path: str | os.PathLike[str]) -> SparseNetwork:
    """Read a ``sparse.safetensors`` that was taken out of its folder, onto the CPU.

    The file has its own checksum. The facts of the run are in the index, which stays behind: the
    network has none.

    Raises:
        InputError: There is no such file, it was truncated or altered, or it has no checksum,
            because an older version wrote it.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Refused(
            f"{path} cannot be read: {error.strerror or error}. Give a sparse.safetensors that "
            f"acdc wrote."
        ) from error
    try:
        check_sum(data)
        state, masks = decode(data)
        return SparseNetwork(state, Support(masks))
    except WRONG_CONTENT as error:
        raise Refused(
            f"{path} is no sparse network as it was saved ({error}). It was truncated or altered, "
            f"or is of another program or an older version. Take a fresh copy of the file, or load "
            f"the folder that it was saved in."
        ) from error


def sizes(folder: str | os.PathLike[str]) -> dict[Twin, int]:
    """Return the bytes on disk of every network in a folder, such as ``{"sparse": 4711}``.

    Raises:
        InputError: There is no result, or a file is missing.
    """
    return kind_in(folder).index.sizes(Path(folder))


def _not_there(result: SparseNetwork | DenseNetwork, twin: Twin) -> NoReturn:
    """Refuse a network that was not trained."""
    if twin not in ("sparse", "dense"):
        raise InputError(f'The twin is {twin!r}. It is "sparse" or "dense".')
    (there,) = result.networks()
    raise InputError(
        f"There is no {twin} network: the run left a {result.index.noun} alone. Ask for the twin "
        f'"{there}" (on the command line: --twin {there}).'
    )
