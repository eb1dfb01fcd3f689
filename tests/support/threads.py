"""Python threads that use one network on the engine, compared with masked dense PyTorch."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

import acdc
from acdc.runs.models import SmallResNet
from support.engine_nets import block, conv, cut, support_of

Call = Callable[[nn.Module, Tensor], list[Tensor]]


def perceptron() -> nn.Module:
    """Return linear layers of two segments, with an operation of PyTorch between them."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 10)
    )


def convolutions() -> nn.Module:
    """Return a convolution whose gradient is summed over the batch, and a BatchNorm."""
    return nn.Sequential(
        conv(1, 8, bias=True), nn.ReLU(), block(8, 16, stride=2), nn.AdaptiveAvgPool2d(1)
    )


NETWORKS: tuple[Callable[[], nn.Module], ...] = (
    lambda: SmallResNet(width=8, blocks=1, size=8).build(), perceptron, convolutions,
)  # fmt: skip


# --- what a thread does ---------------------------------------------------------------------------


def evaluated(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output without gradients."""
    with torch.no_grad():
        return [model(x)]


def inferred(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output in inference mode."""
    with torch.inference_mode():
        return [model(x)]


def differentiated(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output and the gradient of the input."""
    x = x.clone().requires_grad_()
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), x)]


def differentiated_elsewhere(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the same, with the backward pass in another thread than the forward pass."""
    x = x.clone().requires_grad_()
    out = model(x)
    found: list[Tensor] = []
    loss = out.square().sum()
    worker = threading.Thread(target=lambda: found.extend(torch.autograd.grad(loss, x)))
    worker.start()
    worker.join()
    return [out.detach(), *found]


CALLS: tuple[Call, ...] = (evaluated, inferred, differentiated, differentiated_elsewhere)


# --- many of them ---------------------------------------------------------------------------------


class Threads:
    """Runs functions in threads of their own, all of which begin at once.

    Attributes:
        errors: What was raised, or said.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []

    def run(self, *functions: Callable[[], str | None], patience: float = 120.0) -> str | None:
        """Run the functions to their ends, and return the first complaint."""
        start = threading.Barrier(len(functions))

        def work(function: Callable[[], str | None]) -> None:
            start.wait()
            try:
                if (reason := function()) is not None:
                    self.errors.append(reason)
            except Exception as error:
                self.errors.append(f"{type(error).__name__}: {error}")

        workers = [threading.Thread(target=work, args=(f,), daemon=True) for f in functions]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(patience)
        if any(worker.is_alive() for worker in workers):
            return f"A thread did not end within {patience:.0f} seconds."
        return self.errors[0] if self.errors else None


def difference(got: list[Tensor], want: list[Tensor]) -> float:
    """Return how far results are from one another, relative to their size."""
    return max(float((a - b).norm() / (b.norm() + 1e-30)) for a, b in zip(got, want, strict=True))


def trial(
    seed: int, calls: int = 25, changes: bool | None = None, team: bool = False
) -> str | None:
    """Call one network from several threads, and return what went wrong.

    The network, the number of threads, their batch sizes, modes and kinds of calls follow from the
    seed. In every other try one more thread compresses and decompresses the network meanwhile.

    Args:
        seed: Of everything.
        calls: Of each thread.
        changes: Whether the network changes between its phases; None: every other seed.
        team: Let every kernel compute on two or three threads, instead of mostly on one.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = draw.choice(NETWORKS)().double().train(draw.random() < 0.3)
    masks = support_of(model, draw.choice([0.1, 0.3, 0.6]), seed)
    cut(model, masks)
    plain = copy.deepcopy(model)
    engine = acdc.Engine(model, torch.randn(4, 1, 8, 8, dtype=torch.float64), choose=False)
    engine.compress(masks)
    stop = threading.Event()

    def caller(own: int) -> Callable[[], str | None]:
        mine = random.Random(own)

        def work() -> str | None:
            generator = torch.Generator().manual_seed(own)
            torch.set_num_threads(mine.choice([2, 3] if team else [1, 1, 2]))
            for _ in range(calls):
                samples = mine.choice([2, 3, 5, 8, 17, 33])
                x = torch.randn(samples, 1, 8, 8, generator=generator, dtype=torch.float64)
                call = mine.choice(CALLS)
                far = difference(call(model, x), call(plain, x))
                if not far < 1e-9:
                    return f"{call.__name__} of {samples} samples differs by {far:.1e}"
            return None

        return work

    def change() -> str | None:
        while not stop.is_set():
            engine.decompress()
            engine.compress(masks)
        return None

    def all_callers() -> str | None:
        try:
            count = draw.choice([2, 3, 4])
            return Threads().run(*(caller(1000 * seed + i) for i in range(count)))
        finally:
            stop.set()

    before = torch.get_num_threads()
    try:
        if seed % 2 if changes is None else changes:
            return Threads().run(all_callers, change)
        return all_callers()
    finally:
        torch.set_num_threads(before)
