"""Which weights are kept.

A *support* maps the name of every prunable weight tensor to a bool tensor of its shape, True where
the weight is kept. It is a value: nothing in this library changes one in place.

>>> import torch
>>> old = Support({"w": torch.tensor([True, True, False, False])})
>>> new = Support({"w": torch.tensor([True, False, True, False])})
>>> new.nnz, new.density, new.entered(old).nnz, new.churn(old)
(2, 0.5, 1, 0.5)
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from acdc import shards
from acdc.errors import InputError


def check_sparsity(sparsity: float, what: str = "sparsity") -> None:
    """Raise InputError unless ``0 <= sparsity < 1``."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        hint = " (write 0.9 for 90 %)" if isinstance(sparsity, int | float) and sparsity > 1 else ""
        raise InputError(
            f"{what} is {sparsity!r}. It is the fraction of zeros: a number from 0 (dense) up to, "
            f"but without, 1{hint}."
        )


def kept(numel: int, sparsity: float) -> int:
    """Return how many of ``numel`` weights stay: ``numel - round(sparsity · numel)``.

    The one rounding rule of the library. The product is taken exactly, on the decimal that was
    written: in binary floating point ``1 - 0.95`` is not 0.05, and counts would be off by one.
    Halves go to the even number, as in Python's ``round``.

    >>> kept(25_502_912, 0.95), kept(100, 0.95), kept(10, 0.0)
    (1275146, 5, 10)
    """
    check_sparsity(sparsity)
    return numel - round(Fraction(repr(float(sparsity))) * numel)


class Support(Mapping[str, Tensor]):
    """Name of a weight → bool tensor of its shape, True = kept.

    The mask of a sharded weight is a DTensor with the placement of the weight: of one mask at a
    time, ``support[name].full_tensor()`` is the whole, and ``support[name].to_local()`` what this
    rank holds. Counts, shares, ``==`` and ``digest`` are then those of all ranks, and must be asked
    for on all ranks. (Counts are remembered: the second time only memory is read.)

    Args:
        masks: Bool tensors by parameter name, in the order of the model's parameters. They are
            held, not copied.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = dict(masks)
        for name, mask in self._masks.items():
            if mask.dtype != torch.bool:
                raise InputError(f"The mask of {name!r} is of {mask.dtype}. A mask is torch.bool.")
        self._counts: dict[str, int] | None = None

    @classmethod
    def full(cls, tensors: Mapping[str, Tensor]) -> Support:
        """Return the support that keeps every weight of these tensors."""
        return cls({k: torch.ones_like(v, dtype=torch.bool) for k, v in tensors.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Support):
            return NotImplemented
        if self.keys() != other.keys():
            return False
        equal = all([_same(mask, other[name]) for name, mask in self.items()])  # on all ranks
        return not shards.anywhere(not equal, shards.mesh_of(self.values()))

    __hash__ = None  # type: ignore[assignment]  # tensors inside: equal by value, not hashable

    def __repr__(self) -> str:
        return (
            f"Support({len(self)} tensors, {self.nnz:,} of {self.numel:,} weights kept, "
            f"sparsity {self.sparsity:.4f})"
        )

    def counts(self) -> dict[str, int]:
        """Return the number of kept weights by name."""
        if self._counts is None:
            self._counts = shards.counts(self._masks.items())
        return dict(self._counts)

    @property
    def nnz(self) -> int:
        """Kept weights."""
        return sum(self.counts().values())

    @property
    def numel(self) -> int:
        """All prunable weights."""
        return sum(mask.numel() for mask in self._masks.values())

    @property
    def density(self) -> float:
        """Kept share of the prunable weights."""
        return self.nnz / self.numel if self.numel else 1.0

    @property
    def sparsity(self) -> float:
        """Share of zeros among the prunable weights."""
        return 1.0 - self.density

    @property
    def is_full(self) -> bool:
        """Whether every weight is kept."""
        return self.nnz == self.numel

    def _check(self, other: Support) -> None:
        if self.keys() != other.keys():
            raise InputError("The two supports are of different models: their names differ.")

    def entered(self, old: Support) -> Support:
        """Return the weights that are kept here and were not in ``old``."""
        self._check(old)
        return Support({k: v & ~old[k].to(v.device) for k, v in self.items()})

    def regrown(self, old: Support) -> int:
        """Return how many weights are kept here and were not in ``old``."""
        return self.entered(old).nnz

    def churn(self, old: Support) -> float:
        """Return the share of mask bits that differ from ``old``, over all prunable weights.

        At constant sparsity this is twice the regrown positions over the number of weights: the
        mask similarity that the authors log.
        """
        self._check(old)
        pairs = ((k, v ^ old[k].to(v.device)) for k, v in self.items())
        differ = sum(shards.counts(pairs).values())
        return differ / self.numel if self.numel else 0.0

    def to(self, device: torch.device | str) -> Support:
        """Return the same support on ``device``."""
        return Support({k: v.to(device) for k, v in self.items()})

    def pack(self) -> dict[str, Tensor]:
        """Return the masks as uint8 tensors on the CPU, eight weights a byte, first in bit 0.

        The mask of a sharded weight stays a bool DTensor, which other ranks can hold otherwise.
        """
        return {name: pack_bits(mask) for name, mask in self.items()}

    @classmethod
    def unpack(cls, packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Support:
        """Rebuild a support from :meth:`pack` and the shape of every weight."""
        return cls({name: unpack_bits(packed[name], shapes[name]) for name in shapes})

    def digest(self) -> str:
        """Return the SHA-256 of names, shapes and masks: equal supports, equal digests.

        Sharded masks are gathered for it, one at a time: the digest is that of one process.
        """
        digest = hashlib.sha256()
        for name, mask in self.items():
            digest.update(f"{name}:{tuple(mask.shape)};".encode())
            packed = pack_bits(shards.whole(mask))
            digest.update(ctypes.string_at(packed.data_ptr(), packed.numel()))
        return digest.hexdigest()


def _same(mask: Tensor, other: Tensor) -> bool:
    """Return whether two masks are the same, as far as this rank holds them."""
    if mask.shape != other.shape:
        return False
    here = shards.local(mask)
    return torch.equal(here, shards.local(shards.placed(other, mask)).to(here.device))


def pack_bits(mask: Tensor) -> Tensor:
    """Return a bool tensor as ``ceil(numel / 8)`` bytes (uint8, CPU), first element in bit 0.

    A sharded one is returned as it is.
    """
    if shards.is_sharded(mask):
        return mask
    bits = mask.detach().to("cpu").flatten()
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of :func:`pack_bits` for a tensor of ``shape``. A mask is returned as it is."""
    if packed.dtype == torch.bool and packed.shape == torch.Size(shape):
        return packed
    numel = 1
    for size in shape:
        numel *= size
    if packed.dtype != torch.uint8 or packed.numel() != -(-numel // 8):
        raise InputError(
            f"A packed mask for shape {tuple(shape)} has {-(-numel // 8)} bytes of torch.uint8, "
            f"and this one has {packed.numel()} of {packed.dtype}: it belongs to another model, "
            f"or the file is damaged."
        )
    bits = (packed.view(-1, 1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[:numel].to(torch.bool).view(shape)
