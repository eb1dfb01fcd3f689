"""Is everything that the library promises on a CPU true on the device, bit for bit?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import acdc
from acdc.hooks import flat
from acdc.score import magnitude
from measuring import Bench, Row

PLAN = acdc.phases(1, [("dense", "2st"), ("sparse", "3st"), ("dense", "2st"), ("sparse", "3st")])
ALTERNATING = PLAN.resolve(10)
SPARSE = acdc.constant("sparse", 1).resolve(10)
STEPS = 10

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD, loop": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01, foreach=False),
    "SGD, foreach": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01, fused=True),
    "AdamW, loop": lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "AdamW, capturable": lambda p: torch.optim.AdamW(p, 0.01, capturable=True),
}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUICK = {"SGD, foreach", "AdamW, fused"}


def rows(bench: Bench) -> Iterator[Row]:
    """Yield a row for each promise."""
    cudnn = torch.backends.cudnn
    saved = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False  # resumed runs are compared bit for bit
    try:
        for name, check in _checks(bench):
            if bench.left < 2:
                yield Row(name, note="no time was left")
                continue
            try:
                why = check()
            except Exception as error:  # the other checks go on
                why = f"{type(error).__name__}: {error}"
            yield Row(name, ok=not why, note=why[:500])
    finally:
        cudnn.deterministic, cudnn.benchmark = saved


def _checks(bench: Bench) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield names and functions that return what is wrong, or nothing."""
    for precision in PRECISIONS:
        for name in OPTIMIZERS:
            if (bench.quick and name not in QUICK) or ("capturable" in name and not bench.cuda):
                continue
            case = f"{precision}, {name}"
            yield f"zeros: {case}", lambda p=precision, n=name: _zeros(bench, p, n)
    for pattern in (
        acdc.Unstructured(0.9),
        acdc.Unstructured(0.9, "erk"),
        acdc.NM(2, 4),
        acdc.NM(2, 4, transposable=True),
        acdc.Block((4, 4), 0.9),
    ):
        yield f"mask as on the CPU: {pattern}", lambda p=pattern: _mask(bench, p)
    yield "resumed is uninterrupted", lambda: _resumed(bench)
    yield "goes on on a CPU", lambda: _elsewhere(bench)
    yield "compiled model", lambda: _compiled(bench, step=False)
    yield "compiled optimizer step", lambda: _compiled(bench, step=True)
    if bench.cuda:
        yield "one launch clears all weights", lambda: _flat(bench)
        yield "no step waits for the GPU", lambda: _waits(bench)


# --- training ------------------------------------------------------------------------------------


class Training:
    """A small network with a sparsifier, and batches that are the same on every device."""

    def __init__(
        self, bench: Bench, optimizer: str, schedule: acdc.Schedule, precision: str = "float32"
    ) -> None:
        torch.manual_seed(0)
        self.device = bench.device
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(4),
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8),
        )  # fmt: skip
        self.net = net.to(self.device, memory_format=torch.channels_last)
        self.optimizer = OPTIMIZERS[optimizer](self.net.parameters())
        self.method = acdc.ACDC(acdc.Unstructured(0.8), schedule)
        self.sparsifier = acdc.Sparsifier(self.method, self.net, self.optimizer)
        self.model: Callable[[Tensor], Tensor] = self.net
        self.step: Callable[[], Any] = self.optimizer.step
        self.dtype = PRECISIONS[precision]
        self.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=2.0**10, enabled=precision == "float16"
        )

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a batch."""
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(8, 3, 8, 8, generator=generator)
        y = torch.randint(0, 8, (8,), generator=generator)
        return x.to(self.device), y.to(self.device)

    def backward(self, index: int, factor: float = 1.0) -> None:
        """Compute the gradients of a batch."""
        self.optimizer.zero_grad()
        x, y = self.batch(index)
        context: AbstractContextManager[Any] = nullcontext()
        if self.dtype is not None:
            context = torch.autocast(self.device.type, self.dtype)
        with context:
            loss = nn.functional.cross_entropy(self.model(x), y)
        self.scaler.scale(loss * factor).backward()

    def train(self, steps: range) -> None:
        """Take steps without a scaler."""
        for index in steps:
            self.backward(index)
            self.step()

    def wrong(self, state: bool = False) -> str:
        """Return what is not +0.0 outside the support, or nothing."""
        for name, mask in self.sparsifier.support.items():
            param = self.net.get_parameter(name)
            found = {"weight": param.detach()}
            if not self.sparsifier.support.is_full and param.grad is not None:
                found["gradient"] = param.grad
            if state:
                of_weight = self.optimizer.state[param].items()
                found |= {k: v for k, v in of_weight if v is not None and v.shape == param.shape}
            for what, tensor in found.items():
                if bits(tensor[~mask]).any():
                    return f"{what} of {name} is not +0.0 where it is pruned"
        return ""


def bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor."""
    return tensor.contiguous().view(torch.uint8)


def _zeros(bench: Bench, precision: str, optimizer: str) -> str:
    """Check weights and gradients through the phases, and state where all steps are sparse."""
    for schedule in (ALTERNATING, SPARSE):
        training = Training(bench, optimizer, schedule, precision)
        executed, attempts = 0, 0
        while executed < STEPS:
            overflow = training.scaler.is_enabled() and attempts in (1, 3, 4)
            training.backward(attempts, math.inf if overflow else 1.0)
            if not overflow and (why := training.wrong()):
                return f"before step {executed}: {why}"
            training.scaler.step(training.optimizer)
            training.scaler.update()
            executed, attempts = executed + (not overflow), attempts + 1
            if training.sparsifier.step != executed:
                return f"{executed} steps were executed, {training.sparsifier.step} were counted"
            if why := training.wrong(state=schedule is SPARSE and not overflow):
                return f"after step {executed}: {why}"
        changes = [change.step for change in training.sparsifier.changes]
        if changes != ([2, 5, 7] if schedule is ALTERNATING else [0]):
            return f"the support changed at the steps {changes}"
        if not all(p.isfinite().all() for p in training.net.parameters()):
            return "a weight is not finite"
    return ""


# --- masks ---------------------------------------------------------------------------------------


def _mask(bench: Bench, pattern: acdc.Pattern) -> str:
    """Compare the masks of 25 million weights, many of them equal, with those of the CPU."""
    side = 128 if bench.quick else 2048
    generator = torch.Generator().manual_seed(0)
    steps = {"coarse": 1000, "fine": 1_000_000}  # the coarse ones are tied thousands of times
    weights = {
        f"{name}{i}": torch.randint(-n, n, (side, side), generator=generator).float() / n
        for name, n in steps.items()
        for i in range(3)
    }
    expected = pattern.select(magnitude(weights))
    there = pattern.select(magnitude({n: w.to(bench.device) for n, w in weights.items()}))
    different = sum(int((there[n].cpu() != mask).sum()) for n, mask in expected.items())
    return f"{different} of {expected.numel} weights differ" if different else ""


# --- stop and go on ------------------------------------------------------------------------------


def _state(training: Training) -> dict[str, Any]:
    parts = {"net": training.net, "optimizer": training.optimizer, "acdc": training.sparsifier}
    return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}


def _resumed(bench: Bench) -> str:
    """Compare a run that was stopped at every step with one that was not."""
    whole = Training(bench, "AdamW, foreach", ALTERNATING)
    whole.train(range(STEPS))
    for stop in range(1, STEPS):
        first, second = (Training(bench, "AdamW, foreach", ALTERNATING) for _ in range(2))
        first.train(range(stop))
        state = _state(first)
        second.net.load_state_dict(state["net"])
        second.optimizer.load_state_dict(state["optimizer"])
        second.sparsifier.load_state_dict(state["acdc"])
        second.train(range(stop, STEPS))
        for (name, a), b in zip(whole.net.named_parameters(), second.net.parameters(), strict=True):
            if not torch.equal(bits(a.detach()), bits(b.detach())):
                return f"{name} differs after a stop at step {stop}"
    return ""


def _elsewhere(bench: Bench) -> str:
    """Go on on a CPU from the state of a run on the device, and back."""
    cpu = Bench(torch.device("cpu"), bench.quick, bench.until)
    first = Training(bench, "AdamW, foreach", ALTERNATING)
    first.train(range(3))
    for there, stop in ((cpu, 6), (bench, 9)):
        state, second = _state(first), Training(there, "AdamW, foreach", ALTERNATING)
        second.net.load_state_dict(state["net"])
        second.optimizer.load_state_dict(state["optimizer"])
        second.sparsifier.load_state_dict(state["acdc"])
        for name, mask in second.sparsifier.support.items():
            if not torch.equal(mask.cpu(), first.sparsifier.support[name].cpu()):
                return f"the mask of {name} differs on {there.device}"
        second.train(range(stop - 3, stop))
        if second.sparsifier.step != stop:
            return f"step {second.sparsifier.step} on {there.device}, and not {stop}"
        if why := second.wrong():
            return f"on {there.device}: {why}"
        first = second
    return ""


# --- compiled, one launch, waiting ---------------------------------------------------------------


def _compiled(bench: Bench, step: bool) -> str:
    """Train with a compiled model, or with a compiled step."""
    torch.compiler.reset()
    backend = "inductor" if bench.cuda else "eager"  # a CPU may have no compiler
    training = Training(bench, "AdamW, foreach", ALTERNATING)
    if step:
        training.step = torch.compile(training.optimizer.step, backend=backend)
    else:
        training.model = torch.compile(training.net, backend=backend)
    for index in range(8):
        training.backward(index)
        training.step()
        if training.sparsifier.step != index + 1:
            return f"{index + 1} steps were taken, {training.sparsifier.step} were counted"
        if why := training.wrong():
            return f"after step {index + 1}: {why}"
    return ""


def _flat(bench: Bench) -> str:
    """Compare the kernel with a fill of each tensor, on values that a product would not clear."""
    if not flat.runs_on(bench.device):
        return "Triton is not installed, or does not run"
    values = torch.tensor([-0.0, -1.5, math.inf, -math.inf, math.nan, 0.0, 3.0])
    generator, pairs = torch.Generator().manual_seed(0), []
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for shape in ((3,), (flat.BLOCK,), (5, flat.BLOCK + 1), (64, 32, 3, 3), (4096, 1024)):
            drawn = torch.randint(len(values), shape, generator=generator)
            kept = torch.rand(shape, generator=generator) < 0.4
            pairs.append((values[drawn].to(bench.device, dtype), kept.to(bench.device)))
    expected = [tensor.masked_fill(~kept, 0.0) for tensor, kept in pairs]
    clear = flat.Flat()
    if not all(clear.takes(tensor, kept) for tensor, kept in pairs):
        return "a tensor is not taken"
    for _ in range(2):  # the second time by the same table
        clear.clear(pairs)
        for (tensor, _), wanted in zip(pairs, expected, strict=True):
            if not torch.equal(bits(tensor), bits(wanted)):
                return f"{tuple(tensor.shape)} of {tensor.dtype} differs"
    training = Training(bench, "SGD, foreach", SPARSE)
    support = training.sparsifier.support
    with torch.no_grad():
        taken = [clear.takes(training.net.get_parameter(n), mask) for n, mask in support.items()]
    return "" if all(taken) else f"{taken.count(False)} of {len(taken)} weights are not taken"


def _waits(bench: Bench) -> str:
    """Let PyTorch raise an error where a step of a sparse phase waits for the device."""
    for optimizer in ("SGD, foreach", "AdamW, fused", "AdamW, capturable"):
        training = Training(bench, optimizer, SPARSE)
        training.train(range(2))
        x, y = training.batch(2)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                training.optimizer.zero_grad()
                nn.functional.cross_entropy(training.net(x), y).backward()
                training.optimizer.step()
        except RuntimeError as error:
            return f"{optimizer}: {error}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return ""
