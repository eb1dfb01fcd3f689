"""The dense twin as a teacher: sparse networks cut from it, trained with its outputs or without."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from acdc.layers import Layers
from acdc.methods.oneshot import OneShot
from acdc.pattern import Unstructured
from acdc.schedule import Constant, cosine
from acdc.sparsifier import Sparsifier
from acdc.states import load_into
from acdc.studies.twins import measures
from acdc.studies.twins.networks import Bench, State, Trained

Json = dict[str, Any]

SPARSITIES = (0.95, 0.98)
RATE = 0.01  # the peak of the learning rate: a cosine, SGD with momentum 0.9
SHARE = 0.5  # of the loss that the teacher's outputs are


def taught(bench: Bench, run: Trained, epochs: int, watch: Callable[[str], None]) -> list[Json]:
    """Return the accuracy of cuts of the dense twin, trained on labels alone and with the teacher.

    Args:
        bench: The network and the data.
        run: The run of the twins.
        epochs: How long each network is trained; 0: no network is trained.
        watch: Called with the name of each network before it is trained.
    """
    assert run.dense is not None
    assert run.support is not None
    layers = Layers(types=(), params=tuple(run.support))
    rows = []
    for sparsity in SPARSITIES if epochs else ():
        method = OneShot(
            Unstructured(sparsity, run.scope), Constant(epochs, "sparse"), layers=layers
        )
        for share in (0.0, SHARE):
            teacher = "the dense twin" if share else "none"
            watch(f"{100 * sparsity:g} % from the dense twin, teacher: {teacher}")
            state = _trained(bench, run.dense, method, share)
            outputs, labels = bench.outputs(state)
            quality = measures.accuracy(outputs, labels)
            row = {"sparsity": sparsity, "teacher": bool(share), "epochs": epochs}
            rows.append(row | {"accuracy": quality})
    return rows


def _trained(bench: Bench, dense: State, method: OneShot, share: float) -> State:
    """Cut a dense network, train it with a teacher's share of the loss, and return it."""
    net = load_into(deepcopy(bench.net), dict(dense), "network").train()
    teacher = load_into(deepcopy(bench.net), dict(dense), "network").eval()
    steps = bench.data.steps_per_epoch(bench.batch_size)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9)
    sparsifier = Sparsifier(method.resolve(steps), net, optimizer)
    for epoch in range(sparsifier.schedule.epochs):
        for x, y in bench.data.train_batches(epoch, bench.batch_size, bench.seed):
            optimizer.param_groups[0]["lr"] = RATE * cosine(
                sparsifier.step, 0, sparsifier.schedule.total
            )
            optimizer.zero_grad()
            _loss(net(x), y, teacher, x, share).backward()
            optimizer.step()
    sparsifier.remove()
    return net.state_dict()


def _loss(outputs: Tensor, y: Tensor, teacher: nn.Module, x: Tensor, share: float) -> Tensor:
    """Return the cross-entropy with the labels, mixed with that with the teacher's outputs."""
    loss = nn.functional.cross_entropy(outputs, y)
    if not share:
        return loss
    with torch.no_grad():
        likely = teacher(x).softmax(1)
    return (1 - share) * loss + share * nn.functional.cross_entropy(outputs, likely)
