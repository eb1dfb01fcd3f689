"""What a wheel holds and needs: the part of ``make wheels`` that takes seconds."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import acdc
from acdc.engine import native

ROOT = Path(__file__).parent.parent
SYMBOLS = runpy.run_path(str(ROOT / "tools" / "symbols.py"))
too_new = SYMBOLS["too_new"]

read_elf = pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf (binutils)")
compiled = pytest.mark.skipif(not native.available(), reason="installed without a compiler")


# --- symbols --------------------------------------------------------------------------------------


@read_elf
@compiled
def test_the_kernels_need_no_symbol_that_an_older_linux_lacks() -> None:
    module = Path(native.library())
    if "libstdc++.so.6" in SYMBOLS["libraries"](module):
        pytest.skip("the kernels are linked with libstdc++.so: this system has no libstdc++.a")
    assert too_new(module) == []


@read_elf
@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")
def test_a_symbol_that_is_too_new_is_named(tmp_path: Path) -> None:
    (tmp_path / "new.cpp").write_text(
        "#include <math.h>\n"
        'extern "C" double old_one(double x) { return fabs(atan(x)); }\n'
        'extern "C" double new_one(double x) { return exp(x); }\n'
    )
    library = tmp_path / "new.so"
    command = ["c++", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "new.cpp"), "-lm"]
    subprocess.run(command, check=True)
    needs = subprocess.run(["readelf", "-W", "--dyn-syms", library], capture_output=True, text=True)
    assert "atan" in needs.stdout
    if " exp@GLIBC_2.29" not in needs.stdout:
        pytest.skip("the C library of this system has no exp of a new version")
    found = too_new(library)
    assert [symbol.partition(" ")[0] for symbol in found] == ["exp@GLIBC_2.29"]


@read_elf
@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")
def test_a_library_that_other_systems_lack_is_named(tmp_path: Path) -> None:
    for name, other in (("mine", []), ("user", ["mine.so"])):
        (tmp_path / f"{name}.cpp").write_text(f"int {name};")
        command = ["c++", "-shared", "-fPIC", "-Wl,--no-as-needed", "-o", f"{name}.so"]
        subprocess.run([*command, f"{name}.cpp", *other], cwd=tmp_path, check=True)
    assert too_new(tmp_path / "mine.so") == []
    assert too_new(tmp_path / "user.so") == ["mine.so"]


@read_elf
@compiled
def test_the_machine_is_that_of_the_module() -> None:
    name = {"x86_64": "X86-64", "aarch64": "AArch64"}.get(os.uname().machine)
    if name is None:
        pytest.skip("neither an x86-64 CPU nor a 64-bit ARM CPU")
    assert name in SYMBOLS["machine"](Path(native.library()))


# --- builds ---------------------------------------------------------------------------------------


def build_wheel(out: Path, settings: dict[str, str], **environment: str) -> Path | str:
    """Build a wheel; return its path, or what the build printed if it failed."""
    code = f"import scikit_build_core.build as b; print(b.build_wheel({str(out)!r}, {settings!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    name = done.stdout.splitlines()[-1] if done.returncode == 0 else ""
    return out / name if name else done.stdout + done.stderr


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel without kernels, for systems that have no wheel of their own."""
    out = tmp_path_factory.mktemp("pure")
    wheel = build_wheel(out, {"wheel.cmake": "false", "wheel.py-api": "py3"})
    assert isinstance(wheel, Path), wheel
    return wheel


def test_the_wheel_without_kernels_installs_everywhere(pure: Path) -> None:
    assert pure.name == f"acdc_train-{acdc.__version__}-py3-none-any.whl"


def test_a_wheel_holds_the_package_and_nothing_else(pure: Path) -> None:
    package = ROOT / "src"
    want = {
        str(path.relative_to(package))
        for path in (package / "acdc").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {"acdc/py.typed", "acdc/pages/templates/report.html.jinja"} <= want
    info = f"acdc_train-{acdc.__version__}.dist-info/"
    found = set(zipfile.ZipFile(pure).namelist())
    assert {name for name in found if not name.startswith(info)} == want
    assert {f"{info}METADATA", f"{info}entry_points.txt", f"{info}licenses/LICENSE"} <= found


def test_the_metadata_say_what_is_needed(pure: Path) -> None:
    with zipfile.ZipFile(pure) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        facts = Parser().parsestr(archive.read(name).decode())
    assert (facts["Name"], facts["Version"]) == ("acdc-train", acdc.__version__)
    assert facts["Requires-Python"] == ">=3.11"
    needed = facts.get_all("Requires-Dist", [])
    assert sorted(line for line in needed if "extra ==" not in line) == [
        "numpy>=1.26",
        "safetensors>=0.4",
        'torch>=2.10; platform_machine == "aarch64"',
        'torch>=2.8; platform_machine != "aarch64"',
    ]
    assert {"lab", "onnx", "dev"} <= set(facts.get_all("Provides-Extra", []))


def test_the_source_distribution_builds_and_holds_no_measurements(tmp_path: Path) -> None:
    code = f"import scikit_build_core.build as b; print(b.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "csrc/module.cpp"}
    needed |= {"src/acdc/__init__.py", "tests/native/main.cpp", "cmake/aarch64-linux-gnu.cmake"}
    assert needed <= names
    folders = {name.split("/")[0] for name in names}
    assert folders & {"experiments", "benchmarks", "build", "runs", ".venv", ".ci"} == set()


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_a_build_without_a_compiler_has_no_kernels_and_a_release_fails(tmp_path: Path) -> None:
    """Who has no compiler gets the library all the same; a wheel for others needs kernels."""
    settings = {"build-dir": str(tmp_path / "build")}
    broken = {"CXX": str(tmp_path / "no-compiler")}
    wheel = build_wheel(tmp_path, settings, **broken)
    assert isinstance(wheel, Path), wheel
    assert wheel.name.endswith("-none-any.whl")
    settings = {"build-dir": str(tmp_path / "release")}
    printed = build_wheel(tmp_path, settings, ACDC_REQUIRE_KERNELS="1", **broken)
    assert isinstance(printed, str), f"{printed} was built"
    assert "CMAKE_CXX_COMPILER" in printed


@pytest.mark.skipif(shutil.which("c++") is None or shutil.which("cmake") is None, reason="no c++")
def test_a_compiler_without_openmp_builds_kernels_and_no_release(tmp_path: Path) -> None:
    compiler = tmp_path / "plain-c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *fopenmp*) exit 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    command = ["cmake", "-S", str(ROOT), "-DACDC_CHECK=ON", f"-DCMAKE_CXX_COMPILER={compiler}"]
    for required in ("0", "1"):
        done = subprocess.run(
            [*command, "-B", str(tmp_path / required)],
            env=os.environ | {"ACDC_REQUIRE_KERNELS": required},
            capture_output=True,
            text=True,
        )
        assert done.returncode == int(required), done.stderr
    assert re.search("Could NOT find OpenMP", done.stderr)


# --- the check of an installed wheel --------------------------------------------------------------


@compiled
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_check_of_an_installed_wheel_passes_for_this_installation(tmp_path: Path) -> None:
    """All of it but its first question, whether it is a wheel that is installed."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        f"import torch, wheel_smoke as smoke\n"
        f"torch.set_num_threads(2)\n"
        f"smoke.check_two_threads()\n"
        f"smoke.check_engine(pure=False)\n"
        f"smoke.check_training(pure=False)\n"
        f"print(smoke.openmp())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.fullmatch(r"\['[^,]*/torch/lib/libgomp[^,]*'\]\n", done.stdout), done.stdout


@compiled
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_check_of_an_installed_wheel_sees_a_clone_and_a_kernel_on_one_thread() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        f"import torch, importlib, wheel_smoke as smoke\n"
        f"kernels = importlib.import_module('acdc._kernels')\n"
        f"gather = kernels.gather\n"
        f"kernels.gather = lambda *args: gather(*args[:-1], 1)\n"
        f"for check in (smoke.check_origin, smoke.check_two_threads):\n"
        f"    try:\n        check()\n"
        f"    except (AssertionError, ValueError) as error:\n        print('seen')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["seen", "seen"], done.stderr
