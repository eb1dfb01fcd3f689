"""In a sparse phase, DistributedDataParallel sends the gradients of kept weights alone.

The gradient of a pruned weight is zero on every rank, and so is its mean. Plain
DistributedDataParallel sends these zeros in every step. The hook of this module packs what is kept,
reduces it, and puts it back. In dense phases, and for steps with a dense gradient, it sends all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from acdc.errors import InputError
from acdc.sparsifier import Sparsifier
from acdc.support import Support

Hook = Callable[[Any, Any], Future[Tensor]]
"""A communication hook of DistributedDataParallel: from its state and a bucket."""

# They treat every value for itself, so that they can treat the kept ones alone.
ELEMENTWISE = frozenset({default_hooks.fp16_compress_hook, default_hooks.bf16_compress_hook})


class KeptReduction:
    """What :func:`reduce_kept` registers: averages gradients over the ranks.

    Attributes:
        sent: Bytes that this rank has given to all-reduce operations so far.
        whole: Bytes of the buckets so far, which plain DistributedDataParallel gives.
    """

    def __init__(
        self,
        params: dict[int, str],
        support: Callable[[], Support | None],
        group: Any,
        inner: Hook | None,
        state: Any,
    ) -> None:
        self._names, self._support, self._group = params, support, group
        self._inner, self._state = inner, state
        self._positions: dict[tuple[int, ...], Tensor | None] = {}  # by the parameters of a bucket
        self._positions_of: Support | None = None
        self.sent = self.whole = 0

    def average(self, bucket: Any) -> Future[Tensor]:
        """Average a ``torch.distributed.GradBucket`` over the ranks."""
        buffer = bucket.buffer()
        self.whole += buffer.nbytes
        positions = self._kept(bucket)
        if positions is None:
            return self._reduced(bucket, buffer, self._inner)
        kept = buffer.index_select(0, positions)
        bucket.set_buffer(kept)
        inner = self._inner if self._inner in ELEMENTWISE else None

        def put_back(done: Future[Tensor]) -> Tensor:
            whole: Tensor = buffer.zero_().index_copy_(0, positions, done.value())
            return whole

        return self._reduced(bucket, kept, inner).then(put_back)

    def _reduced(self, bucket: Any, values: Tensor, inner: Hook | None) -> Future[Tensor]:
        half = inner in ELEMENTWISE
        self.sent += values.numel() * (2 if half else values.element_size())
        if inner is not None:
            return inner(self._state, bucket)
        # As DistributedDataParallel does without a hook: a factor, and then the sum.
        values.mul_(1.0 / distributed.get_world_size(self._group))
        work = distributed.all_reduce(values, group=self._group, async_op=True)
        summed: Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
        return summed

    def _kept(self, bucket: Any) -> Tensor | None:
        """Return the positions in a bucket that have a gradient; ``None``: all have."""
        support = self._support()
        if support is None or bucket.buffer().layout != torch.strided:
            return None
        if support is not self._positions_of:
            self._positions, self._positions_of = {}, support
        # DistributedDataParallel makes other buckets after the first step.
        key = tuple(map(id, bucket.parameters()))
        if key not in self._positions:
            self._positions[key] = self._find(bucket, support)
        return self._positions[key]

    def _find(self, bucket: Any, support: Support) -> Tensor | None:
        buffer = bucket.buffer()
        kept = torch.ones_like(buffer, dtype=torch.bool)
        for param, view in zip(bucket.parameters(), bucket.gradients(), strict=True):
            name = self._names.get(id(param))
            if name is not None:
                offset = view.storage_offset() - buffer.storage_offset()
                kept.as_strided(view.size(), _strides(param), offset).copy_(support[name])
        return None if bool(kept.all()) else kept.nonzero().flatten()


def reduce_kept(
    ddp: DistributedDataParallel,
    sparsifier: Sparsifier,
    inner: Hook | None = None,
    state: Any = None,
) -> KeptReduction:
    """Let DistributedDataParallel reduce the gradients of kept weights alone in sparse phases.

    It registers a communication hook, of which DistributedDataParallel takes one for its whole
    life. Parameters that are not pruned are sent whole. A step for which the method wants the
    gradient of every weight (RigL and SNFS where the support changes; all steps of Top-KAST, DPF
    and SR-STE) is sent whole. With two ranks, the results are bit for bit those without the hook;
    with more, sums may be rounded in another order.

    Call it on every rank, before the first step.

    Args:
        ddp: The wrapped model.
        sparsifier: Of this model, with masks that the ranks share.
        inner: Another communication hook. In dense phases it takes the place of the plain mean.
            ``fp16_compress_hook`` and ``bf16_compress_hook`` of
            ``torch.distributed.algorithms.ddp_comm_hooks.default_hooks`` also compress the kept
            gradients of sparse phases. Other hooks, such as PowerSGD, need whole gradients: in
            sparse phases they are not called.
        state: The state of ``inner``, its first argument; ``None`` is the group of all ranks for
            the hooks of torch.

    Returns:
        What counts the bytes that were sent.

    Raises:
        InputError: The sparsifier is of another model, or its masks are not shared by the ranks, or
            the model has a communication hook already.
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise InputError(
            f"reduce_kept takes the model in torch.nn.parallel.DistributedDataParallel, and was "
            f"given a {type(ddp).__name__}."
        )
    _check_one_model(ddp, sparsifier)
    names = {id(param): name for name, param in sparsifier.params.items()}
    group = ddp.process_group
    reduction = KeptReduction(
        names, lambda: sparsifier.gradient_support, group, inner, group if state is None else state
    )
    try:
        # It reads the annotations of a hook, and takes no strings: a lambda has none.
        ddp.register_comm_hook(None, lambda _, bucket: reduction.average(bucket))
    except RuntimeError as error:
        if "only be called once" not in str(error):
            raise
        raise InputError(
            "The DistributedDataParallel has a communication hook already, and takes one alone. "
            "Wrap the model anew, and give the other hook to reduce_kept(ddp, sparsifier, hook)."
        ) from error
    return reduction


def _check_one_model(ddp: DistributedDataParallel, sparsifier: Sparsifier) -> None:
    held: set[int] = {id(param) for param in ddp.parameters()}
    if missing := [name for name, param in sparsifier.params.items() if id(param) not in held]:
        raise InputError(
            f"The DistributedDataParallel has no weight {missing[0]!r} of the sparsifier. Give the "
            f"wrapper of the model that the sparsifier is bound to."
        )
    if _ranks(ddp.process_group) != _ranks(sparsifier.process_group):
        raise InputError(
            "The ranks of the DistributedDataParallel do not share the masks of this sparsifier, "
            "so that kept weights of one rank may be pruned on another. Make it with "
            "Sparsifier(method, ddp, optimizer), or with process_group=ddp.process_group."
        )


def _strides(param: Tensor) -> tuple[int, ...]:
    """Return how a gradient lies in a bucket: as its parameter does, if that has no gaps.

    (The views of ``GradBucket.gradients`` are contiguous in any case, and show other elements.)
    """
    dense = torch.empty_like(param, device="meta").stride()
    return dense if dense == param.stride() else torch.empty(param.shape, device="meta").stride()


def _ranks(group: Any) -> list[int]:
    """Return the ranks that train one model; of a process alone, its own."""
    return [distributed.get_rank()] if group is None else distributed.get_process_group_ranks(group)
