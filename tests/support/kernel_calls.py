"""Checks at the end of a test run that the kernels' tests called every kernel.

``tests/conftest.py`` registers :class:`KernelCalls`. ``test_kernels.py`` notes its calls in
:data:`CALLED`. Every worker of pytest-xdist reports its calls to the controller, and the controller
judges their union, so the check holds in one process and in many, in any order of the tests.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

# What the kernels' tests really called in this process: (kernel, instruction set, is double).
Call = tuple[str, str, bool]
CALLED: set[Call] = set()

FILE = "test_kernels.py"


def verdict(
    wanted: Collection[Call], called: Collection[Call], left_out: Collection[str]
) -> tuple[bool, str]:
    """Return whether the run fails, and a sentence for the reader.

    Args:
        wanted: Every kernel of this machine.
        called: The kernels that were called.
        left_out: The tests of the kernels that did not run, or did not pass.
    """
    if left_out:
        some = sorted(left_out)
        more = f" and {len(some) - 1} more" if len(some) > 1 else ""
        return False, f"kernels: NOT CHECKED, because {some[0]}{more} did not run and pass"
    if missing := sorted(set(wanted) - set(called)):
        names = ", ".join(f"{name} ({isa}, {'f64' if d else 'f32'})" for name, isa, d in missing)
        return True, f"kernels: {len(missing)} of {len(wanted)} were never called: {names}"
    if strange := sorted(set(called) - set(wanted)):
        return True, f"kernels: called, and not in the table: {strange}"
    return False, f"kernels: all {len(wanted)} of the table were called"


class KernelCalls:
    """The plugin. A worker reports to the controller, and any other process judges."""

    def __init__(self, config: pytest.Config) -> None:
        self.output: dict[str, Any] | None = getattr(config, "workeroutput", None)
        self.partial: str | None = None  # the selection of tests, where it names single tests
        for argument in config.args:
            if FILE in argument and "::" in argument:
                self.partial = argument
        self.functions: set[str] = set()
        self.collected: set[str] = set()
        self.passed: set[str] = set()
        self.left_out: set[str] = set()
        self.called: set[Call] = set()
        self.sentence: str | None = None

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """Note the tests that options such as ``-k`` and ``-m`` deselect."""
        mine = [item for item in items if item.path.name == FILE]
        self.left_out |= {item.nodeid for item in mine}
        self.functions |= {getattr(item, "originalname", "") for item in mine}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note the tests of the kernels."""
        mine = [item for item in session.items if item.path.name == FILE]
        self.collected |= {item.nodeid for item in mine}
        if mine:
            module = mine[0].getparent(pytest.Module)
            assert module is not None
            written = {name for name in vars(module.obj) if name.startswith("test_")}
            self.functions |= {getattr(item, "originalname", "") for item in mine}
            self.left_out |= {f"{mine[0].path.name}::{name}" for name in written - self.functions}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test of the kernels that passed; the controller sees the reports of all."""
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)

    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Add the calls of a worker; a hook of pytest-xdist."""
        seen = getattr(node, "workeroutput", {}).get("kernels")
        if seen is not None:
            self.collected |= set(seen["collected"])
            self.left_out |= set(seen["left_out"])
            self.called |= {(name, isa, double) for name, isa, double in seen["called"]}

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Judge, or report to the process that judges."""
        self.called |= CALLED
        if self.output is not None:
            self.output["kernels"] = {
                "collected": sorted(self.collected),
                "left_out": sorted(self.left_out),
                "called": sorted(self.called),
            }
            return
        if not self.collected or session.config.option.collectonly:
            return
        from acdc.engine import native

        if not native.available():
            self.sentence = "kernels: NOT CHECKED, because acdc was installed without a compiler"
            return
        wanted = {
            (name, isa, double)
            for name in native.kernel_names()
            for isa in native.instruction_sets()
            for double in (False, True)
        }
        left_out = self.left_out | (self.collected - self.passed)
        if self.partial is not None:
            left_out.add(f"what is not {self.partial}")
        fails, self.sentence = verdict(wanted, self.called, left_out)
        if fails:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the sentence."""
        if self.sentence is not None:
            bad = "never called" in self.sentence or "not in the table" in self.sentence
            terminalreporter.write_line(self.sentence, red=bad, yellow="NOT" in self.sentence)
