"""The table of deliberate faults (``tools/faults.py``) fits the sources and the tests.

``python tools/faults.py`` tries the faults themselves, which takes about an hour.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

spec = importlib.util.spec_from_file_location("faults", ROOT / "tools" / "faults.py")
assert spec is not None
assert spec.loader is not None
faults = importlib.util.module_from_spec(spec)
sys.modules["faults"] = faults  # dataclasses look their module up
spec.loader.exec_module(faults)


def test_there_are_many_and_no_two_have_one_name() -> None:
    names = [fault.name for fault in faults.FAULTS]
    assert len(set(names)) == len(names) >= 35


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_one_change_of_valid_source_and_names_tests(fault: faults.Fault) -> None:
    source = (ROOT / faults.PACKAGE / fault.file).read_text("utf-8")
    ast.parse(faults.insert(fault, source))
    files = [word for word in fault.tests.split() if word.startswith("tests/")]
    assert files
    assert all((ROOT / file).is_file() for file in files)


def test_a_text_that_is_not_there_once_is_refused() -> None:
    fault = faults.Fault("stale", "x.py", "a", "b", "tests/test_faults.py")
    for source in ("b", "a a"):
        with pytest.raises(ValueError, match=r"not once"):
            faults.insert(fault, source)
