"""A CPU without the newer instructions gets the kernels that it can run, and meets no others: on
emulated CPUs, and read from the machine code. The file takes about a minute.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from acdc.engine import native

ROOT = Path(__file__).parent.parent
QEMU = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
# Of the editable install, by wheel tag; `make sanitize` and `make check-kernels` build deeper down.
OBJECTS = sorted(ROOT.glob("build/*/CMakeFiles"))

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not an x86-64 CPU"),
    pytest.mark.skipif(not native.available(), reason="installed without a compiler"),
]
emulated = pytest.mark.skipif(QEMU is None, reason="no qemu-x86_64 (Debian's qemu-user)")
disassembled = pytest.mark.skipif(
    not OBJECTS or shutil.which("objdump") is None,
    reason="no objdump, or no object files: not an editable install",
)

# The module alone, without torch: which sets it offers, and what it says when asked for another.
ASK = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_kernels", sys.argv[1])
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
for i in range(kernels.table_count()):
    if kernels.supported(i):
        print(kernels.isa(i))
        continue
    try:
        kernels.relu(i, False, kernels.pointwise_args())
    except IndexError:
        continue
    print(kernels.isa(i), "was run")
"""


# The kernels' tests, but those of the reference: it is torch's, and half of the time.
RUN = """
import sys
import pytest

class Native:
    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if "reference" not in item.name]

sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/test_kernels.py"], [Native()]))
"""


@emulated
@pytest.mark.parametrize(
    ("cpu", "sets"),
    [
        ("Nehalem", ["baseline"]),  # 2008: SSE4.2
        ("SandyBridge", ["baseline"]),  # 2011: AVX
        ("Haswell,-fma", ["baseline"]),
        ("Haswell", ["baseline", "avx2"]),  # 2013: AVX2 and FMA
    ],
)
def test_a_cpu_is_offered_only_what_it_has(cpu, sets):
    command = [QEMU, "-cpu", cpu, sys.executable, "-I", "-S", "-c", ASK, native._kernels.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[:-1] == sets


@pytest.mark.slow
@emulated
def test_the_kernels_pass_their_tests_on_a_cpu_without_avx():
    done = subprocess.run(
        [QEMU, "-cpu", "Nehalem", sys.executable, "-c", RUN],
        env={**os.environ, "ACDC_EXAMPLES": "5", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout, done.stdout
    assert re.search(r"kernels: all \d+ of the table were called", done.stdout), done.stdout


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def code(path: Path) -> dict[str, list[str]]:
    """Return the instructions of every function of an object file."""
    functions: dict[str, list[str]] = {}
    for line in output("objdump", "-d", "--no-show-raw-insn", path).splitlines():
        if head := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            functions[head[1]] = []
        elif found := re.match(r" +[0-9a-f]+:\t(.*)", line):
            functions[next(reversed(functions))].append(found[1])
    assert functions or path.name == "portable.cpp.o", path  # that one holds a variable alone
    return functions


def newer(instructions: list[str]) -> list[str]:
    """Return the instructions of AVX and later (VEX and EVEX encodings: all start with v), and of
    BMI. A compiler writes tzcnt for old CPUs, too: they execute it as bsf, which counts the same
    zeros of a number that is not 0, and of 0 the result of __builtin_ctz is undefined.
    """
    bmi = r"(andn|bextr|bls\w+|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|lzcnt|popcnt)\b"
    return [line for line in instructions if re.match(rf"v|{bmi}", line)]


def build_files(*patterns: str) -> list[Path]:
    files = [path for pattern in patterns for build in OBJECTS for path in build.glob(pattern)]
    assert files
    return files


@disassembled
def test_what_every_cpu_runs_holds_no_newer_instruction():
    files = build_files("_kernels.dir/csrc/*.o", "acdc_baseline.dir/csrc/*.o")
    assert {path.name for path in files} >= {"dispatch.cpp.o", "plan.cpp.o", "body.cpp.o"}
    for path in files:
        for function, instructions in code(path).items():
            assert not newer(instructions), (path, function)


@disassembled
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_nothing_of_a_newer_set_runs_before_the_cpu_was_asked(isa):
    for path in build_files(f"acdc_{isa}.dir/csrc/body.cpp.o"):
        # A function that another object file also has is kept once by the linker, perhaps this one.
        # DW.ref.__gxx_personality_v0 is a pointer, not code.
        names = output("nm", "--defined-only", "--extern-only", "--format=posix", path).split("\n")
        shared = {line.split()[0] for line in names if line and not line.startswith("DW.ref.")}
        assert shared == {f"acdc_table_{isa}"}
        assert "init_array" not in output("objdump", "-h", path), "runs when the module is loaded"
        functions = code(path)
        (supported,) = (name for name in functions if "supported" in name)
        assert not newer(functions[supported])
        assert any(newer(lines) for lines in functions.values()), "compiled without its flags"
