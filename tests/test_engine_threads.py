"""Threads and processes that use one network in a sparse phase: as right as in plain PyTorch."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import acdc
from acdc.engine import memory, segment, tracing
from acdc.engine.arguments import Arguments
from support.engine_nets import cut, support_of
from support.helpers import SCHEDULE
from support.threads import Threads, convolutions, perceptron, trial


def on_engine(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module, acdc.Engine]:
    """Return a network in a sparse phase, the same in plain PyTorch, and the engine."""
    torch.manual_seed(0)
    model = build().double()
    masks = support_of(model, 0.3)
    cut(model, masks)
    plain = copy.deepcopy(model)
    engine = acdc.Engine(model, batch(4), choose=False)
    engine.compress(masks)
    return model, plain, engine


def batch(samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 1, 8, 8, generator=generator, dtype=torch.float64)


# --- threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_any_number_of_threads_computes_as_pytorch(seed: int) -> None:
    """``make soak`` tries thousands of seeds. Every other one changes the network's phases, too."""
    assert trial(seed, calls=10) is None


@pytest.mark.parametrize("build", [perceptron, convolutions])
def test_threads_that_train_one_network_add_up_their_gradients(
    build: Callable[[], nn.Module],
) -> None:
    model, plain, _ = on_engine(build)
    masks = support_of(model, 0.3)
    parts = [batch(samples, samples) for samples in (3, 8, 17)]

    def train(x: Tensor) -> Callable[[], None]:
        return lambda: [model(x).square().sum().backward() for _ in range(10)] and None

    for x in parts:
        for _ in range(10):
            plain(x).square().sum().backward()
    assert Threads().run(*map(train, parts)) is None
    for (name, p), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        grad = want.grad * masks.get(name, torch.ones_like(want))
        torch.testing.assert_close(p.grad, grad, rtol=1e-8, atol=1e-10)


def test_threads_under_a_sparsifier_leave_no_gradient_outside_of_the_support() -> None:
    torch.manual_seed(0)
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    engine = acdc.Engine(model, batch(4).float(), choose=False)
    method = acdc.ACDC(acdc.Unstructured(0.8), SCHEDULE)
    sparsifier = acdc.Sparsifier(method, model, optimizer, engine=engine)
    for step in range(SCHEDULE.total):

        def backward(samples: int) -> None:
            out = model(batch(samples, samples).float())
            F.cross_entropy(out, torch.zeros(samples, dtype=torch.int64)).backward()

        optimizer.zero_grad()
        assert Threads().run(*(lambda n=n: backward(n) for n in (2, 5, 9))) is None
        for name, mask in sparsifier.support.items():
            assert not sparsifier.params[name].grad[~mask].any(), (step, name)
        optimizer.step()
        for name, mask in sparsifier.support.items():
            assert not sparsifier.params[name][~mask].any()
    assert engine.active


def test_a_graph_is_traced_while_other_threads_call_networks_and_draw_numbers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """``torch.fx`` replaces ``nn.Module.__call__`` for all threads while it traces."""
    model, plain, _ = on_engine(convolutions)
    given = Arguments.of(inspect.signature(model.forward), (torch.randn(2, 8, 4, 4),), {})
    other, stop = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).double(), threading.Event()
    x, calls = torch.randn(4, 8, dtype=torch.float64), []
    want = copy.deepcopy(other)(x)

    def elsewhere() -> str | None:
        due = time.monotonic()
        while not stop.is_set():
            if time.monotonic() > due:  # not all the time: tracing is tried a few times only
                torch.rand(1)
                due = time.monotonic() + 0.2
            calls.append(1)
            if not torch.equal(other(x), want):
                return "another network computed something else"
        return None

    def trace() -> str | None:
        try:
            for _ in range(20):
                tracing.trace(model, given)
        finally:
            stop.set()
        return None

    before, interval = nn.Module.__call__, sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # otherwise a trace is mostly over before another thread has a turn
    try:
        assert Threads().run(elsewhere, trace, trace) is None
    finally:
        sys.setswitchinterval(interval)
    assert len(calls) > 20
    assert nn.Module.__call__ is before
    torch.testing.assert_close(model(batch(3)), plain(batch(3)))
    assert not caplog.records


def test_one_thread_waits_while_another_one_computes_and_not_longer() -> None:
    model, _, engine = on_engine(perceptron)
    done = threading.Event()
    with engine.workspace.lock:
        worker = threading.Thread(target=lambda: (model(batch(2)), done.set()))
        worker.start()
        assert not done.wait(0.2)
    worker.join(10)
    assert done.is_set()


def test_without_memory_in_one_thread_pytorch_computes_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, plain, _ = on_engine(perceptron)
    allocate = memory.allocate

    def fails_elsewhere(*args: object) -> list[object]:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("not enough memory: you tried to allocate 1 byte.")
        return allocate(*args)

    monkeypatch.setattr(memory, "allocate", fails_elsewhere)

    def check() -> None:
        torch.testing.assert_close(model(batch(40)), plain(batch(40)))

    assert Threads().run(check) is None
    assert "no memory for its buffers" in caplog.text
    check()


def test_copies_and_pickles_are_made_while_other_threads_compute() -> None:
    model, plain, _ = on_engine(convolutions)
    model.eval(), plain.eval()
    want, stop = plain(batch(3)), threading.Event()

    def evaluate() -> None:
        while not stop.is_set():
            model(batch(5))

    def duplicate() -> str | None:
        try:
            for _ in range(20):
                for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                    if not torch.allclose(other(batch(3)), want):
                        return "a copy computes something else"
        finally:
            stop.set()
        return None

    assert Threads().run(evaluate, evaluate, duplicate) is None


# --- processes ------------------------------------------------------------------------------------


def child(function: Callable[[], object], patience: float = 15.0) -> int | None:
    """Run a function in a forked process; return its exit code, or None if it did not end."""
    number = os.fork()
    if not number:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + patience
    while time.monotonic() < end:
        ended, status = os.waitpid(number, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(number, 9)
    os.waitpid(number, 0)
    return None


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_a_forked_process_computes_and_trains_after_a_step(threads: int) -> None:
    """The child must compute on one thread, as the workers of a loader do: the others of OpenMP
    exist in the parent alone, and PyTorch's own operations wait for them, too.
    """
    model, plain, engine = on_engine(perceptron)
    model(batch(16)).sum().backward()
    want = plain(batch(16))

    def work() -> None:
        torch.set_num_threads(1)
        out = model(batch(16))
        torch.testing.assert_close(out, want)
        out.sum().backward()
        engine.decompress()
        torch.testing.assert_close(model(batch(16)), want)

    assert child(work) == 0
    model(batch(16)).sum().backward()  # and the parent goes on


def test_forks_while_other_threads_compute_never_wait_forever() -> None:
    model, plain, _ = on_engine(convolutions)
    model.eval(), plain.eval()
    want, stop = plain(batch(3)), threading.Event()

    def evaluate() -> None:
        samples = 0
        while not stop.is_set():
            samples = samples % 40 + 1
            with torch.no_grad():
                model(batch(samples))

    def work() -> None:
        torch.testing.assert_close(model(batch(3)), want)

    workers = [threading.Thread(target=evaluate, daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        for _ in range(10):
            assert child(work) == 0
    finally:
        stop.set()
    for worker in workers:
        worker.join(10)


class Scored(Dataset):
    """Samples with what a network in a sparse phase makes of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.model(batch(2, index))


def test_the_workers_of_a_loader_may_call_the_network() -> None:
    model, plain, _ = on_engine(perceptron)
    model(batch(16)).sum().backward()
    loader = DataLoader(Scored(model), batch_size=2, num_workers=2, timeout=30)
    found = torch.cat(list(loader))
    want = torch.stack([plain(batch(2, index)) for index in range(8)])
    torch.testing.assert_close(found, want)


def test_nothing_is_logged_by_all_this(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "acdc")
    assert trial(1, calls=5, changes=True) is None
    assert not [record for record in caplog.records if record.name.startswith("acdc")]


def test_a_backward_pass_on_another_number_of_threads_is_left_to_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The buffers of a frame are sized for the threads of its forward pass."""
    model, plain, _ = on_engine(convolutions)
    x = batch(17)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        out, want = model(x).square().sum(), plain(x).square().sum()
        torch.set_num_threads(2)
        monkeypatch.setattr(segment, "compute_backward", lambda *_: pytest.fail("on the kernels"))
        out.backward()
        want.backward()
    finally:
        torch.set_num_threads(before)
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
