"""A module of this package that starts processes which train together, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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
    environment = os.environ | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",  # a rank that a signal ends says where it was
    }
    command = [sys.executable, "-m", module, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **pipes)


def ends(children: list[int], patience: float) -> list[int | None]:
    """Wait for processes; return their exit codes, and None for one that does not end."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + patience
    while len(codes) < len(children) and time.monotonic() < deadline:
        for child in set(children) - set(codes):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    for child in set(children) - set(codes):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [codes.get(child) for child in children]
