"""Run by ``make sanitize`` beside ``test_kernels.py``, and by nothing else: is the module under
test the sanitized one, and do the sanitizers see what its kernels do?
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from acdc.engine import native

# A ReLU over 16 pixels: in memory that ends one pixel early, or that starts at a wrong alignment.
BROKEN_RELU = """
import sys
import torch
from acdc.engine.layout import Buffer, Shape
from acdc.engine.native import Native

k = Native(sys.argv[1])
shape = Shape(k.lanes, 1, 4, 4, k.lanes)
memory = torch.zeros(int(sys.argv[3]) * k.lanes)
k.pointwise("relu", Buffer(shape, memory[int(sys.argv[2]) :]), out=Buffer.zeros(shape))
print("nobody saw it")
"""


def test_the_module_in_use_is_the_sanitized_one():
    assert native.available(), "the sanitized build failed: no compiled kernels"
    assert native._kernels.sanitized == "address", (
        f"not a sanitized build: {native._kernels.__file__}"
    )


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize(
    ("first", "pixels", "report"),
    [("0", "15", "heap-buffer-overflow"), ("1", "17", "misaligned address")],
    ids=["address", "undefined"],
)
def test_a_wrong_access_in_a_kernel_ends_the_process(isa, first, pixels, report):
    command = [sys.executable, "-S", "-c", BROKEN_RELU, isa, first, pixels]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0, done.stdout
    assert report in done.stderr, done.stderr
    assert f"{isa}::" in done.stderr, "the report names the kernel"
