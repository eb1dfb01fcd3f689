"""The kernels without Python and torch: the program of ``tests/native`` compares every kernel with
plain loops in double, on this CPU and on an emulated ARM CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from acdc import files
from acdc.engine import native

ROOT = Path(__file__).parent.parent
BUILDS = ROOT / "build" / "kernels"
TOOLCHAIN = ROOT / "cmake" / "aarch64-linux-gnu.cmake"
COMPILER = "aarch64-linux-gnu-g++"
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
# What the program checks once, for no table of kernels.
WITHOUT_TABLE = ["kept elements: 60 examples", "the runtime's layers: 60 examples"]
EMULATED = [str(QEMU), "-L", "/usr/aarch64-linux-gnu"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake"),
    pytest.mark.skipif(not native.available(), reason="installed without a compiler"),
]
arm = pytest.mark.skipif(
    shutil.which(COMPILER) is None or QEMU is None,
    reason=f"no {COMPILER} and qemu-aarch64 (Debian's g++-aarch64-linux-gnu and qemu-user)",
)


def built(folder: str, *settings: str) -> Path:
    """Build the program in a folder where the next build finds what has not changed.

    Another worker of the test run may build at the same time: the folder has a lock.
    """
    build = BUILDS / folder
    with files.alone(build, f"{build} is in use", patience=1200):
        for command in (
            ["-S", str(ROOT), "-B", str(build), "-DACDC_CHECK=ON", *settings],
            ["--build", str(build)],
        ):
            done = subprocess.run(["cmake", *command], capture_output=True, text=True, timeout=1200)
            assert done.returncode == 0, done.stdout + done.stderr
    return build / "check-kernels"


@pytest.fixture(scope="module")
def here() -> list[str]:
    return [str(built("check"))]


@pytest.fixture(scope="module")
def on_arm() -> list[str]:
    return [*EMULATED, str(built("aarch64", f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}"))]


def check(command: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, timeout=600
    )


def lines(command: list[str], *options: str) -> list[str]:
    done = check(command, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def expected(isa: str, examples: int) -> str:
    return f"{isa}: {2 * len(native.kernel_names())} kernels, {examples} examples"


def test_every_kernel_of_every_instruction_set_agrees_with_plain_loops(here: list[str]) -> None:
    found = lines(here, "--examples", "60")
    for isa in native.instruction_sets():
        assert expected(isa, 60) in found
    assert all(line in found for line in WITHOUT_TABLE)


@pytest.mark.parametrize("isa", native.instruction_sets())
def test_a_kernel_that_does_nothing_is_seen(here: list[str], isa: str) -> None:
    (line,) = lines(here, "--isa", isa, "--examples", "10", "--self-test")
    assert line == f"{isa}: each of {2 * len(native.kernel_names())} kernels is checked"
    # With no example, no check can see anything.
    blind = check(here, "--isa", isa, "--examples", "0", "--self-test")
    assert blind.returncode == 1
    assert "no check saw that conv (f32) does nothing" in blind.stdout


def test_a_kernel_that_no_example_calls_fails_the_check(here: list[str]) -> None:
    done = check(here, "--examples", "0", "--isa", "baseline")
    assert done.returncode == 1
    assert "was never called (baseline)" in done.stdout


def test_words_that_are_no_option_are_refused(here: list[str]) -> None:
    for words in (["--isa", "mmx"], ["--examples"], ["fast"]):
        done = check(here, *words)
        assert done.returncode == 2
        assert "The options are" in done.stderr


@arm
def test_the_kernels_for_arm_agree_with_plain_loops(on_arm: list[str]) -> None:
    found = lines(on_arm, "--examples", "60")
    assert found == [expected("baseline", 60), *WITHOUT_TABLE]


@arm
def test_a_kernel_for_arm_that_does_nothing_is_seen(on_arm: list[str]) -> None:
    (line,) = lines(on_arm, "--examples", "10", "--self-test")
    assert line == f"baseline: each of {2 * len(native.kernel_names())} kernels is checked"


@arm
@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-objdump") is None, reason="no objdump for ARM")
def test_the_kernels_for_arm_multiply_and_add_vectors_at_once(on_arm: list[str]) -> None:
    """Without fused operations, or number by number, they would be right, and slow."""
    (path,) = (BUILDS / "aarch64").glob("CMakeFiles/acdc_baseline.dir/csrc/body.cpp.o")
    command = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", str(path)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # The tile of 3 x 4 pixels, without a stride.
    start = code.index("conv_tileIfLi3ELi4ELi1ELi1EE")
    tile = code[start : code.index("\n\n", start)]
    assert tile.count("fmla\tv") >= 12
