"""Shared code of the core's tests: a small network, its data, and bitwise comparison."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from acdc.methods.base import Method
from acdc.schedule import Phase, Schedule
from acdc.sparsifier import Sparsifier

Factory = Callable[[nn.Module], torch.optim.Optimizer]

# Dense, sparse, dense, sparse: two compressions, one decompression, the dense twin after step 6.
CUTS = (2, 6)
REVIVAL = 4
TOTAL = 9
SCHEDULE = Schedule(
    (
        Phase("dense", 0, 2),
        Phase("sparse", 2, 4),
        Phase("dense", 4, 6),
        Phase("sparse", 6, 9),
    ),
    (3, 3, 3),
)


class Net(nn.Module):
    """Convolutions, batch norms, linear layers. ``conv1`` has 3 inputs: no groups of four."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc1 = nn.Linear(8, 8)
        self.fc2 = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.fc2(self.fc1(x.mean((2, 3))).relu())


class Flat(nn.Module):
    """Matrices only, for an optimizer that accepts no other parameters (Muon)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc0 = nn.Linear(48, 8, bias=False)
        self.fc1 = nn.Linear(8, 8, bias=False)
        self.fc2 = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.fc0(x.flatten(1)).relu()).relu())


def build(kind: type[nn.Module] = Net, seed: int = 0) -> nn.Module:
    """Return a network whose weights depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind()


def batch(index: int) -> tuple[Tensor, Tensor]:
    """Return the batch with this number: a pure function, so that resuming needs no loader."""
    generator = torch.Generator().manual_seed(1000 + index)
    x = torch.randn(8, 3, 4, 4, generator=generator)
    return x, torch.randint(0, 4, (8,), generator=generator)


def backward(model: nn.Module, index: int) -> Tensor:
    """Accumulate the gradients of one batch and return its loss."""
    x, y = batch(index)
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, start: int = 0, stop: int = TOTAL
) -> Iterator[int]:
    """Train from step ``start`` to ``stop``; yield the executed steps after each of them."""
    for step in range(start, stop):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        yield step + 1


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, start: int = 0, stop: int = TOTAL
) -> None:
    """Train from step ``start`` to ``stop``."""
    for _ in steps(model, optimizer, start, stop):
        pass


def bind(
    method: Method, factory: Factory, kind: type[nn.Module] = Net
) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
    """Return a fresh network, its optimizer and the sparsifier that binds them."""
    model = build(kind)
    optimizer = factory(model)
    return model, optimizer, Sparsifier(method, model, optimizer)


def sgd(model: nn.Module) -> torch.optim.SGD:
    """Return the paper's optimizer."""
    return torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True
    )


def adam(model: nn.Module) -> torch.optim.Adam:
    """Return Adam."""
    return torch.optim.Adam(model.parameters(), lr=0.01)


def bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor: +0.0 and -0.0 differ, a NaN equals itself."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are the same bit for bit, in types and keys too."""
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(bits(a), bits(b))
        )
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def copied(value: Any) -> Any:
    """Return what a checkpoint file would hold of this state; only plain data is let through."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def is_plus_zero(tensor: Tensor) -> bool:
    """Whether every element is +0.0, bit for bit."""
    return not bits(tensor).any()


def dropped(sparsifier: Sparsifier) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name, the weight and the mask of the pruned weights, for every pruned layer."""
    for name, mask in sparsifier.support.items():
        yield name, sparsifier.params[name], ~mask
