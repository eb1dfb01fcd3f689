"""A module of this package that starts processes which train together, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

TESTS = Path(__file__).parents[1]


def run(module: str, folder: Path) -> str:
    """Run a module with a folder as its argument, and return what it prints.

    Skips the test where PyTorch was built without gloo.
    """
    with start(module, folder) as process:
        printed, said = process.communicate()
    assert process.returncode == 0, said
    return printed


def start(module: str, folder: Path) -> subprocess.Popen[str]:
    """Start a module with a folder as its argument; its input and outputs are pipes.

    Skips the test where PyTorch was built without gloo.
    """
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **pipes)
