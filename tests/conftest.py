"""Settings of every test run: the plugin of the kernels, the instruction sets that the tests
see, and the threads of parallel workers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch

from acdc.engine import native, segment
from support.kernel_calls import KernelCalls


def pytest_configure(config: pytest.Config) -> None:
    if widest := os.environ.get("ACDC_WIDEST"):
        _hide_wider(widest)
    os.environ.setdefault("ACDC_TILES", "rule")  # no test measures, or writes in the user's folder
    config.pluginmanager.register(KernelCalls(config))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:  # two workers of two threads on two cores wait for one another
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that a test starts


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave long checks on several ranks to ``make test-distributed``."""
    if "distributed" in config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker("distributed")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The segments that the kernels computed."""
    count: list[int] = []
    compute = segment.compute
    monkeypatch.setattr(segment, "compute", lambda *args: count.append(1) or compute(*args))
    return count


@pytest.fixture
def runs(ran: list[int], caplog: pytest.LogCaptureFixture) -> Iterator[list[int]]:
    """The segments that the kernels computed. A fallback to PyTorch fails the test."""
    caplog.set_level(logging.WARNING, "acdc.engine")
    yield ran
    assert [r.getMessage() for r in caplog.get_records("call")] == []


def _hide_wider(widest: str) -> None:
    """Let the tests of this process see a CPU that has no wider instruction set than this one."""
    sets = native.instruction_sets()
    if widest not in sets:
        raise pytest.UsageError(f"ACDC_WIDEST is {widest!r}, and this machine has {sets}.")
    fewer = sets[: sets.index(widest) + 1]
    native.instruction_sets = lambda: list(fewer)  # type: ignore[assignment]
