"""``acdc doctor`` reads every fact by itself, never raises, and says what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import acdc
from acdc import doctor
from acdc.cli import main
from acdc.engine import native

SECTIONS = ["versions", "packages", "kernels", "threads", "openmp", "machine", "gpu", "problems"]


def problems_with(word: str) -> list[str]:
    return [problem for problem in doctor.facts()["problems"] if word in problem]


def test_the_facts_are_those_of_this_process() -> None:
    found = doctor.facts()
    assert list(found) == SECTIONS
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["acdc"] == acdc.__version__
    assert found["versions"]["distributions"] == [f"acdc-train {metadata.version('acdc-train')}"]
    assert found["packages"]["onnx"] == metadata.version("onnx")
    assert found["kernels"]["built"] is native.available()
    assert found["kernels"]["usable here"] == native.instruction_sets()
    assert found["kernels"]["in use"] == native.Native().isa
    assert len(found["kernels"]["sha256"]) == 16
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert any("libgomp" in path for path in found["openmp"]["libraries"])
    assert found["machine"]["memory"].endswith("available")


def test_the_text_names_every_fact_and_every_problem() -> None:
    found = doctor.facts()
    found["problems"] = ["The first.", "The second."]
    text = doctor.report(found)
    for section in SECTIONS:
        assert f"\n{section}\n" in f"\n{text}\n"
    for section in SECTIONS[:-1]:
        assert all(f"  {name}" in text for name in found[section])
    assert text.endswith("problems\n  The first.\n  The second.")
    assert doctor.report(found | {"problems": []}).endswith("problems\n  none was found")


def test_json_is_one_line_of_the_same_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["versions"] == doctor.facts()["versions"]
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.startswith("versions\n  acdc ")


def install(folder: Path, name: str, version: str, *files: str) -> None:
    """Write what an installer writes: files, and what it knows about the distribution."""
    for file in files:  # some versions of importlib.metadata list those alone that are there
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    # Python 3.11 looks into a folder again only when its time has changed, and the clock of the
    # file system may give two changes the same time.
    time = 1_000_000_000 * (1 + len(list(folder.iterdir())))
    os.utime(folder, ns=(time, time))


def test_another_distribution_with_the_name_or_the_folder_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "another", "1.0", "another/__init__.py", "another/acdc/__init__.py")
    assert problems_with("distributions") == []
    install(tmp_path, "acdc", "0.1.1")  # the name alone, as an editable install has it
    (problem,) = problems_with("distributions")
    assert "acdc 0.1.1" in problem
    assert "pip uninstall acdc acdc-train" in problem
    install(tmp_path, "forked", "3.0", "acdc/__init__.py")  # the folder alone
    (problem,) = problems_with("distributions")
    assert f"acdc 0.1.1, acdc-train {acdc.__version__}, forked 3.0" in problem
    assert "pip uninstall acdc acdc-train forked" in problem
    found = doctor.facts()["versions"]["distributions"]
    assert found == ["acdc 0.1.1", f"acdc-train {acdc.__version__}", "forked 3.0"]


def test_a_second_copy_of_the_distribution_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "acdc-train", "9.9", "acdc/__init__.py")
    (problem,) = problems_with("distributions")
    assert "acdc-train 9.9" in problem


def test_missing_kernels_are_a_problem_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_kernels", None)
    monkeypatch.setattr(native, "_why_missing", "undefined symbol: omp_x")
    found = doctor.facts()
    assert found["kernels"] == {"built": False, "reason": "undefined symbol: omp_x"}
    (problem,) = problems_with("kernels are missing")
    assert "are missing (undefined symbol: omp_x)" in problem
    assert "not faster than dense" in problem


def test_more_threads_than_cpus_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    (problem,) = problems_with("PyTorch has")
    assert "has 8 threads, and this process may run on 3 CPUs" in problem
    assert doctor.facts()["threads"]["CPUs of this process"] == "0-1, 5"


def test_more_threads_than_a_container_has_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text(f"{2**32}\n")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    (problem,) = problems_with("container")
    assert "has the time of 1.5 CPUs. Set OMP_NUM_THREADS=1." in problem
    assert doctor.facts()["machine"]["memory of the container"] == "4.0 GiB"
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert problems_with("container") == []


MAPS = """\
7f00-7f01 r-xp 00000000 08:01 42    /opt/my env/torch/lib/libgomp-a34b3233.so.1
7f02-7f03 r--p 00001000 08:01 42    /opt/my env/torch/lib/libgomp-a34b3233.so.1
7f04-7f05 r-xp 00000000 08:01 43    /opt/lib/libompl_geometry.so
7f06-7f07 rw-p 00000000 00:00 0
7f08-7f09 rw-p 00000000 00:00 0     [heap]
"""


def test_two_openmp_libraries_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "_MAPS", tmp_path / "maps")
    (tmp_path / "maps").write_text(MAPS)
    assert doctor.facts()["openmp"] == {
        "libraries": ["/opt/my env/torch/lib/libgomp-a34b3233.so.1"]
    }
    assert problems_with("OpenMP") == []
    (tmp_path / "maps").write_text(f"{MAPS}7f0a-7f0b r-xp 00000000 08:01 44 /opt/lib/libiomp5.so\n")
    (problem,) = problems_with("OpenMP")
    assert "2 OpenMP libraries" in problem
    assert "lib/libiomp5.so" in problem


def test_what_cannot_be_read_is_said_and_the_rest_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise OSError("no such file\nand more")

    for name in ("processor_name", "_memory", "affinity", "_version"):
        monkeypatch.setattr(doctor, name, broken)
    monkeypatch.setattr(native, "kernel_names", broken)
    found = doctor.facts()
    reason = "cannot be read (OSError: no such file)"
    assert found["machine"]["cpu"] == found["machine"]["memory"] == reason
    assert found["packages"]["onnx"] == reason
    assert found["threads"] == found["kernels"] == {"cannot be read": "OSError: no such file"}
    assert found["machine"]["caches"] is not None
    assert "L1" in doctor.report(found)


def test_a_module_that_cannot_be_imported_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)")
    sys.path.insert(0, str(tmp_path))
    try:
        problems = doctor.facts(["leaves", "no_such_module"])["problems"]
    finally:
        sys.path.remove(str(tmp_path))
    assert "'leaves' cannot be imported: SystemExit: 3." in problems[0]
    assert "'no_such_module' cannot be imported: ModuleNotFoundError" in problems[1]


def test_it_works_without_any_optional_package() -> None:
    """And where the system has no /proc, and no torch that can be imported."""
    code = """
import sys
for name in {optional!r} + ("numpy", "torch.cuda"):
    sys.modules[name.replace("scikit-learn", "sklearn")] = None
from pathlib import Path
from acdc import doctor
doctor._MAPS = doctor._CGROUP = Path("/nowhere")
found = doctor.facts()
print(doctor.report(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code.format(optional=doctor.OPTIONAL)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "torch cannot be imported" in done.stdout
    assert "numpy cannot be imported" in done.stdout
    assert "\nmachine\n  cpu" in done.stdout


def test_a_path_does_not_name_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert doctor._without_home("/home/somebody/env/x.so") == "~/env/x.so"
    assert doctor._without_home("/home/somebody2/x.so") == "/home/somebody2/x.so"
    monkeypatch.setenv("HOME", "/")
    assert doctor._without_home("/opt/x.so") == "/opt/x.so"
