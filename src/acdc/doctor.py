"""Facts about this installation and this machine, to paste into a report, and what is wrong.

Every fact is read by itself: one that cannot be read is text that says so, and never an error. This
module therefore imports torch and the kernels inside of functions.

    >>> sorted(facts(()))
    ['gpu', 'kernels', 'machine', 'openmp', 'packages', 'problems', 'threads', 'versions']
"""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from acdc import __version__
from acdc.errors import DISTRIBUTION
from acdc.processor import affinity, processor_name

NEEDED = ("torch", "numpy", "safetensors")
OPTIONAL = (
    "lightning", "scikit-learn", "matplotlib", "jinja2", "rich", "distributed", "tensorboard",
    "torchvision", "onnx", "onnxscript", "onnxruntime", "transformers", "accelerate", "timm",
)  # fmt: skip
SETTINGS = ("OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "ACDC_", "CUDA_VISIBLE_DEVICES")

_OPENMP = re.compile(r"lib(gomp|iomp5|omp)\b[^/]*$")
_CGROUP = Path("/sys/fs/cgroup")
_MAPS = Path("/proc/self/maps")

Facts = dict[str, Any]


def facts(modules: Iterable[str] = ()) -> Facts:
    """Return all facts, and the problems as sentences.

    Args:
        modules: To import first, such as those of the program that is slow: a second OpenMP
            library often comes with another package.
    """
    problems: list[str] = []
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException as error:  # a module may exit as it is imported
            problems.append(f"The module {name!r} cannot be imported: {_text(error)}.")
    parts: dict[str, Callable[[list[str]], Facts]] = {
        "versions": _versions,
        "packages": _packages,
        "kernels": _kernels,
        "threads": _threads,
        "openmp": _openmp,
        "machine": _machine,
        "gpu": _gpu,
    }
    found: Facts = {}
    for name, read in parts.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = read(problems)
        except Exception as error:
            found[name] = {"cannot be read": _text(error)}
    return found | {"problems": problems}


def report(found: Facts) -> str:
    """Return facts as text."""
    lines = []
    for section, values in found.items():
        if section == "problems":
            continue
        lines.append(section)
        lines += [f"  {name:<22}  {_shown(value)}" for name, value in values.items()]
    problems = found["problems"] or ["none was found"]
    return "\n".join([*lines, "problems", *(f"  {problem}" for problem in problems)])


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else str(value)


def _text(error: BaseException) -> str:
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _or_reason(read: Callable[[], Any]) -> Any:
    """Return a fact, or why it cannot be read."""
    try:
        return read()
    except Exception as error:
        return f"cannot be read ({_text(error)})"


def _without_home(path: str | os.PathLike[str]) -> str:
    """Write a path without the name of the user."""
    text, home = str(path), os.path.expanduser("~")
    return f"~{text[len(home) :]}" if len(home) > 1 and text.startswith(f"{home}/") else text


# --- software -------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions(problems: list[str]) -> Facts:
    found: Facts = {
        "acdc": __version__,
        "distributions": _or_reason(lambda: _distributions(problems)),
        "acdc is in": _without_home(Path(__file__).parent),
        "python": sys.version.split()[0],
        "platform": _or_reason(platform.platform),
    }
    for name in NEEDED:
        found[name] = _or_reason(partial(_version, name))
        try:
            module = importlib.import_module(name)
        except BaseException as error:
            problems.append(f"{name} cannot be imported ({_text(error)}). acdc needs it.")
        else:
            found[name] = getattr(module, "__version__", found[name])
    return found


def _distributions(problems: list[str]) -> list[str]:
    """Return what is installed under the name or in the folder of acdc."""
    found: dict[Path, str] = {}  # the same folder may be in sys.path twice
    for one in metadata.distributions():
        name = str(one.metadata["Name"])
        if re.sub("[-_.]+", "-", name).lower() in ("acdc", DISTRIBUTION) or any(
            file.parts == ("acdc", "__init__.py") for file in one.files or ()
        ):
            text = f"{name} {one.version}"
            found[Path(str(one.locate_file(text))).resolve()] = text
    texts = sorted(found.values(), key=str.lower)
    names = [text.split()[0] for text in texts]
    if names not in ([], [DISTRIBUTION]):
        problems.append(
            f"Of all distributions, {DISTRIBUTION} alone should have the name or the folder of "
            f"acdc, and installed are: {', '.join(texts)}. One overwrites files of another. Run "
            f"pip uninstall {' '.join(dict.fromkeys([*names, DISTRIBUTION]))} until none of them "
            f"is left, and install {DISTRIBUTION} again."
        )
    return texts


def _packages(problems: list[str]) -> Facts:
    return {name: _or_reason(partial(_version, name)) or "not installed" for name in OPTIONAL}


def _kernels(problems: list[str]) -> Facts:
    from acdc.engine import native

    if not native.available():
        reason = native.why_missing()
        problems.append(
            f"The compiled kernels are missing ({reason}). Sparse phases run on plain PyTorch, and "
            f"are not faster than dense ones. Reinstall acdc-train where there is a C++17 compiler."
        )
        return {"built": False, "reason": reason}
    path = Path(native.library())
    usable = native.instruction_sets()
    return {
        "built": True,
        "in use": usable[-1],
        "usable here": usable,
        "kernels": len(native.kernel_names()),
        "file": _without_home(path),
        "sha256": _or_reason(lambda: hashlib.sha256(path.read_bytes()).hexdigest()[:16]),
    }


# --- threads --------------------------------------------------------------------------------------


def _threads(problems: list[str]) -> Facts:
    import torch

    threads = torch.get_num_threads()
    own = affinity()
    quota = _quota()
    if own is not None and threads > len(own):
        problems.append(
            f"PyTorch has {threads} threads, and this process may run on {len(own)} CPUs: "
            f"threads wait for one another. Call torch.set_num_threads({len(own)}), or set "
            f"OMP_NUM_THREADS={len(own)}."
        )
    elif quota is not None and threads > max(1.0, quota):
        problems.append(
            f"PyTorch has {threads} threads, and the container has the time of {quota:g} CPUs. "
            f"Set OMP_NUM_THREADS={max(1, int(quota))}."
        )
    return {
        "torch": threads,
        "torch, between ops": torch.get_num_interop_threads(),
        "CPUs": os.cpu_count(),
        "CPUs of this process": None if own is None else _ranges(own),
        "CPUs of the container": "no limit" if quota is None else f"{quota:g}",
        **{name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)},
    }


def _ranges(cpus: list[int]) -> str:
    """Write CPU numbers as ranges.

    >>> _ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    ranges: list[list[int]] = []
    for cpu in cpus:
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in ranges)


def _quota() -> float | None:
    """Return how many CPUs the control group of a container gives, or None."""
    try:
        allowed, period = (_CGROUP / "cpu.max").read_text().split()
        return None if allowed == "max" else int(allowed) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _openmp(problems: list[str]) -> Facts:
    if not _MAPS.exists():
        return {"libraries": None}
    paths = {line.split(maxsplit=5)[5] for line in _MAPS.read_text().splitlines() if "/" in line}
    found = sorted(path for path in paths if _OPENMP.search(path))
    if len(found) > 1:
        problems.append(
            f"{len(found)} OpenMP libraries are in one process ({', '.join(map(_short, found))}). "
            f"Each has threads of its own, which spin while they wait and take time from the "
            f"others. Set OMP_WAIT_POLICY=PASSIVE, or install all packages from one source."
        )
    return {"libraries": [_without_home(path) for path in found]}


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


# --- machine --------------------------------------------------------------------------------------


def _machine(problems: list[str]) -> Facts:
    return {
        "cpu": _or_reason(processor_name),
        "caches": _or_reason(_caches),
        "memory": _or_reason(_memory),
        "memory of the container": _or_reason(_memory_limit),
    }


def _caches() -> list[str] | None:
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / n).read_text().strip() for n in ("level", "type", "size"))
        found.append(f"L{level} {kind.lower()} {size}")
    return found or None


def _memory() -> str | None:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return _bytes(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    kib = {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return f"{_bytes(kib['MemTotal'] * 1024)}, {_bytes(kib['MemAvailable'] * 1024)} available"


def _memory_limit() -> str:
    try:
        text = (_CGROUP / "memory.max").read_text().strip()
    except OSError:
        return "no limit"
    return "no limit" if text == "max" else _bytes(int(text))


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _gpu(problems: list[str]) -> Facts:
    import torch

    found: Facts = {"CUDA of torch": torch.version.cuda or "none", "visible": []}
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found["visible"] = [torch.cuda.get_device_name(i) for i in range(count)]
    elif Path("/proc/driver/nvidia/version").exists():
        problems.append(
            "There is an NVIDIA driver, and this torch does not see a GPU. Install a torch that is "
            "built for CUDA, or check CUDA_VISIBLE_DEVICES."
        )
    mps = getattr(torch.backends, "mps", None)
    if mps is not None and mps.is_available():
        found["visible"] = ["Apple GPU"]
    return found
