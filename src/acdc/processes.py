"""The processes that train one model together."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from acdc.collectives import PeerError, together
from acdc.errors import InputError
from acdc.shards import Mesh, extremes, like, local
from acdc.support import Support

SHOWN = 3  # processes that a sentence names


class Peers:
    """The processes that train one model together, of which this process is one.

    Several objects are true, a process that trains alone is false.

    Args:
        group: Their process group. ``None``: this process trains alone.
    """

    def __init__(self, group: Any = None) -> None:
        alone = group is None or distributed.get_world_size(group) == 1
        self._group: Any = None if alone else group

    def __bool__(self) -> bool:
        return self._group is not None

    @property
    def group(self) -> Any:
        """Their process group; ``None``: this process trains alone, or they are those of a mesh."""
        return self._group

    @property
    def is_first(self) -> bool:
        """Whether this is the first process of the group; a process alone is."""
        return self._group is None or distributed.get_rank(self._group) == 0

    def from_first(self, tensor: Tensor) -> Tensor:
        """Fill a tensor in place with the values of the first process; return it.

        Sums may differ in the last bit between ranks. What decides about a support must not.
        """
        if self:
            with together("receive what rank 0 has chosen"):
                distributed.broadcast(tensor, src=self._global(0), group=self._group)
        return tensor

    def object_from(self, value: Any, rank: int, what: str) -> Any:
        """Return the object that a process of the group gives here; all must call this.

        Args:
            value: Of this process.
            rank: In the group.
            what: What the processes do, for the sentence of an error.
        """
        if not self:
            return value
        values = [value]
        with together(what):
            distributed.broadcast_object_list(values, src=self._global(rank), group=self._group)
        return values[0]

    def agreed(self, support: Support, step: int) -> Support:
        """Return the support of the first process on every process.

        Scores may differ in the last bit. The processes compare a hash of their masks, and send
        masks, a bit for each weight, only where the hashes differ.

        Args:
            support: The support that this process has chosen.
            step: Executed steps of this process.

        Raises:
            PeerError: The processes are at different steps, prune different layers, or one of them
                could not choose a support.
        """
        if not self or self._are_equal(support, step):
            return support
        return self._of_first(support)

    def same_masks(self, support: Support, step: int) -> Support:
        """Return the masks of the first process, of processes that may keep other numbers of
        weights: each holds a part of the model, and all hold the same part.

        Args:
            support: What this process has chosen for the part.
            step: Executed steps of this process.
        """
        if not self:
            return support
        ranks = self._compared([_hash(support), 0], step, "", _device(support))
        return support if all(rank == ranks[0] for rank in ranks) else self._of_first(support)

    def _of_first(self, support: Support) -> Support:
        """Return the masks of the first process, of the same shapes."""
        packed = support.pack()
        device = _device(support)
        bits = self.from_first(torch.cat([part.to(device) for part in packed.values()])).cpu()
        parts = bits.split([len(part) for part in packed.values()])
        shapes = {name: tuple(mask.shape) for name, mask in support.items()}
        masks = Support.unpack(dict(zip(packed, parts, strict=True)), shapes)
        return Support({name: mask.to(support[name].device) for name, mask in masks.items()})

    @contextmanager
    def informed(self, support: Support, step: int) -> Iterator[None]:
        """Let the other processes know of a sentence that keeps this one from choosing a support.

        They wait in :meth:`agreed`, and raise the same sentence. (An error of another kind ends the
        process, which closes its connections.)

        Args:
            support: The support so far.
            step: Executed steps of this process.
        """
        try:
            yield
        except InputError as error:
            if self:
                try:
                    self._compared([step, 0, 0, 0, 1], step, str(error), _device(support))
                except PeerError as others:
                    raise error from others
            raise

    def _are_equal(self, support: Support, step: int) -> bool:
        """Return whether all processes have chosen the same masks.

        It is checked that all change the same layers after the same step. A broadcast of other
        sizes may wait forever, or fill a mask with the bytes of another.
        """
        shapes = _layers(support)
        # The number of kept weights, which a seed cannot change: the sparsity that was asked for.
        mine = [step, shapes, support.nnz, _hash(support), 0]
        ranks = self._compared(mine, step, "", _device(support))
        if any(rank[:3] != mine[:3] for rank in ranks):
            others = [i for i, rank in enumerate(ranks) if rank[:3] != mine[:3]][:SHOWN]
            said = "; ".join(f"rank {self._global(i)} {_describe(*ranks[i][:3])}" for i in others)
            raise PeerError(
                f"The processes do not agree: rank {distributed.get_rank()} "
                f"{_describe(*mine[:3])}; {said}. Every process needs the same model, method and "
                f"schedule, and equally many batches."
            )
        return all(rank == mine for rank in ranks)

    def _compared(
        self, mine: list[int], step: int, why: str, device: torch.device
    ) -> list[list[int]]:
        """Return the numbers of every process. The last number says that a process has failed.

        Args:
            mine: The numbers of this process.
            step: Executed steps of this process.
            why: The sentence with which this process has failed.
            device: On which the numbers are sent.

        Raises:
            PeerError: Another process has failed.
        """
        size = distributed.get_world_size(self._group)
        every = [torch.empty(len(mine), dtype=torch.int64, device=device) for _ in range(size)]
        with together(f"change the support after step {step}"):
            distributed.all_gather(every, torch.tensor(mine, device=device), group=self._group)
        ranks: list[list[int]] = [tensor.tolist() for tensor in every]
        failed = next((i for i, rank in enumerate(ranks) if rank[-1]), None)
        if failed is None:
            return ranks
        said = self.object_from(why, failed, "receive why another process has failed")
        raise PeerError(
            f"Rank {self._global(failed)} could not choose a support after step {step}: {said}"
        )

    def _global(self, rank: int) -> int:
        return int(distributed.get_global_rank(self._group, rank))


class MeshPeers(Peers):
    """The ranks of a device mesh, over which the weights are sharded.

    Their masks agree by themselves, because they are chosen by sums over all ranks. But ranks that
    hold the same part of a weight (HSDP) may have weights that differ in the last bit: they take
    the masks of the first of them.

    Args:
        mesh: The ``DeviceMesh``.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self._mesh = mesh

    def __bool__(self) -> bool:
        return bool(self._mesh.size() > 1)

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of the mesh."""
        return not any(self._mesh.get_coordinate())

    def from_first(self, tensor: Tensor) -> Tensor:
        """Fill a tensor in place with the values of the first rank; return it.

        Raises:
            InputError: It is sharded.
        """
        raise InputError("What differs between ranks of a mesh has no values of the first rank.")

    def agreed(self, support: Support, step: int) -> Support:
        """Return the support, the same where ranks hold the same part of a weight."""
        self._check(support, step, failed=False)
        for dim in range(self._mesh.ndim):
            same = {n: m for n, m in support.items() if m.placements[dim].is_replicate()}  # type: ignore[attr-defined]
            if not same or self._mesh.size(dim) == 1:
                continue
            parts = Support({name: local(mask) for name, mask in same.items()})
            chosen = Peers(self._mesh.get_group(dim)).same_masks(parts, step)
            if chosen is not parts:
                changed = {name: like(same[name], part) for name, part in chosen.items()}
                support = Support({**support, **changed})
        return support

    @contextmanager
    def informed(self, support: Support, step: int) -> Iterator[None]:
        """Let the other ranks know of a sentence that keeps this one from choosing a support."""
        try:
            yield
        except InputError as error:
            try:
                self._check(support, step, failed=True)
            except PeerError as others:
                raise error from others
            raise

    def _check(self, support: Support, step: int, failed: bool) -> None:
        """Raise PeerError unless all ranks change the same layers after the same step."""
        shapes = _layers(support)
        low, high = extremes([step, shapes, int(failed)], self._mesh)
        if high[2]:
            raise PeerError(
                f"A rank could not choose a support after step {step}. What that rank raises says "
                f"why."
            )
        if low != high:
            raise PeerError(
                f"The ranks do not agree: some are after step {low[0]}, and others after step "
                f"{high[0]}, or they prune different layers. Every rank needs the same model, "
                f"method and schedule, and equally many batches."
            )


ALONE = Peers()


def group_of(model: nn.Module) -> Any:
    """Return the process group of the DistributedDataParallel in or around a model, or ``None``.

    Raises:
        InputError: There are several with groups of their own.
    """
    wrappers = (m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel))
    groups = {id(wrapper.process_group): wrapper.process_group for wrapper in wrappers}
    if len(groups) > 1:
        raise InputError(
            f"Parts of the model are in DistributedDataParallel with {len(groups)} different "
            f"process groups. Say which processes share masks: Sparsifier(..., process_group=...)."
        )
    return next(iter(groups.values()), None)


def _describe(step: int, shapes: int, kept: int) -> str:
    return f"is after step {step} and keeps {kept:,} weights (layers {shapes:08x})"


def _layers(support: Support) -> int:
    """Return a number that says which layers are pruned, and their shapes."""
    return zlib.crc32(repr([(n, tuple(m.shape)) for n, m in support.items()]).encode())


def _hash(support: Support) -> int:
    return int(support.digest()[:15], 16)  # fits in 64 bits with a sign


def _device(support: Support) -> torch.device:
    return next((mask.device for mask in support.values()), torch.device("cpu"))
