"""What training leaves of a network that several ranks hold: all ranks gather, the first one saves.

One tensor is gathered at a time. Each function also takes a sparsifier whose weights are whole, of
DistributedDataParallel or of one process: then nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from acdc.collectives import together
from acdc.distributed.ranks import check_same_step
from acdc.errors import InputError
from acdc.hooks.pairing import facts_of, twins
from acdc.pair import Pair
from acdc.result import SparseNetwork
from acdc.shards import whole
from acdc.sparsifier import Sparsifier
from acdc.support import Support

State = Mapping[str, Tensor]


def pair(sparsifier: Sparsifier, **facts: Any) -> Pair | None:
    """Return the pair of a network on the first rank, and ``None`` on all others.

    All ranks must call it. One tensor at a time is gathered; the first rank copies it to memory of
    the CPU, where it holds both networks in the end. Then ``pair.save(folder)`` writes them.

    Args:
        sparsifier: What trains the network.
        **facts: Anything JSON can hold, kept with the pair.

    Raises:
        InputError: The network is dense now, or there is no dense network.
        PeerError: The ranks have executed different numbers of steps.
    """
    gathered = _gathering(sparsifier)
    sparse, dense, dense_step = twins(
        sparsifier.method,
        sparsifier.step,
        sparsifier.model,
        sparsifier.dense_twin,
        sparsifier.dense_weights,
        gathered,
        instead="call acdc.distributed.sparse_network(sparsifier) on every rank",
    )
    masks = gathered(sparsifier.support)
    if not sparsifier.is_first:
        return None
    known = facts_of(sparsifier.method, sparsifier.step, dense_step)
    return Pair(sparse, dense, Support(masks), {**known, **facts})


def sparse_network(sparsifier: Sparsifier, **facts: Any) -> SparseNetwork | None:
    """Return the sparse network as it is now on the first rank, and ``None`` on all others.

    It is for methods that keep no dense twin, such as GMP and RigL, and for any other method that
    is in a sparse phase. All ranks must call it. One tensor at a time is gathered; the first rank
    copies it to memory of the CPU. Then ``network.save(folder)`` writes the files that one process
    writes from the same weights, byte for byte.

    Args:
        sparsifier: What trains the network.
        **facts: Anything JSON can hold, kept with the network.

    Raises:
        InputError: The network is dense now, or a pruned weight is not zero.
        PeerError: The ranks have executed different numbers of steps.
    """
    method, step = sparsifier.method, sparsifier.step
    if sparsifier.phase.kind == "dense":
        raise InputError(
            f"There is no sparse network now: after {step} of {sparsifier.schedule.total} steps "
            f"the network is dense. Call acdc.distributed.sparse_network(sparsifier) in a sparse "
            f"phase, usually after the last step. A dense network is gathered by get_model_"
            f"state_dict of torch.distributed.checkpoint.state_dict, with "
            f"StateDictOptions(full_state_dict=True, cpu_offload=True), and saved by "
            f"acdc.DenseNetwork(state).save(folder) on the first rank."
        )
    gathered = _gathering(sparsifier)
    state, masks = gathered(sparsifier.model.state_dict()), gathered(sparsifier.support)
    if not sparsifier.is_first:
        return None
    return SparseNetwork(state, Support(masks), {**facts_of(method, step), **facts})


def _gathering(sparsifier: Sparsifier) -> Callable[[State], dict[str, Tensor]]:
    """Return a function from tensors to whole copies on the CPU; the other ranks get none.

    Raises:
        PeerError: The ranks have executed different numbers of steps.
    """
    check_same_step(sparsifier)
    is_first = sparsifier.is_first

    def copied(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):  # the extra state of a module
            return tensor
        with together("gather what training leaves"):
            full = whole(tensor.detach())
        return full.to("cpu", copy=True) if is_first else None

    # A whole tensor is freed with the call of `copied`, before the next one is gathered.
    def gathered(state: State) -> dict[str, Tensor]:
        found = ((name, copied(tensor)) for name, tensor in state.items())
        return {name: copy for name, copy in found if is_first}

    return gathered
