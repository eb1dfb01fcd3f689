"""Run by ``make sanitize-threads`` beside the tests of kernels and threads, and by nothing else: is
the module under test the sanitized one, and does ThreadSanitizer see a race of its kernels?
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from acdc.engine import native
from support.threads import trial

# Two threads write one buffer; or, as control, each its own.
RACE = """
import sys
import threading
import torch
from acdc.engine.layout import Buffer, Shape
from acdc.engine.native import Native

k = Native(sys.argv[1])
torch.set_num_threads(1)
shape = Shape(64 * k.lanes, 8, 8, 8, k.lanes)
source, outs = Buffer.zeros(shape), [Buffer.zeros(shape) for _ in range(2)]
start = threading.Barrier(2)

def work(number):
    out = outs[number if sys.argv[2] == "apart" else 0]
    start.wait()
    for _ in range(20):
        k.pointwise("relu", source, out=out)

threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
[t.start() for t in threads], [t.join() for t in threads]
print("done")
"""


def test_the_module_in_use_is_the_sanitized_one():
    assert native.available(), "the sanitized build failed: no compiled kernels"
    assert native._kernels.sanitized == "thread", f"not sanitized: {native._kernels.__file__}"


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("where", ["apart", "together"])
def test_a_race_between_two_kernels_ends_the_process(isa, where):
    command = [sys.executable, "-S", "-c", RACE, isa, where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if where == "apart":
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 66, done.stdout
    assert "data race" in done.stderr, done.stderr
    assert f"{isa}::" in done.stderr, "the report names the kernel"


@pytest.mark.parametrize("seed", range(20, 40))
def test_teams_of_two_and_three_threads_have_no_race(seed):
    assert trial(seed, calls=5, team=True) is None
