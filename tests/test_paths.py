"""Commands on paths that cannot be, streams that are full or closed, and users without a home."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from acdc.cli import main
from acdc.errors import InputError
from acdc.files import cache_folder
from acdc.runs.data import FashionMNIST
from acdc.schedule import MOST_PHASES, Phase, Schedule, alternate, constant, phases
from support import compare_grids
from support.ordinary import as_ordinary_user
from support.runs import TINY, words

Capture = pytest.CaptureFixture[str]
# The shortest run with a pair.
SHORT = words({**TINY, "method.schedule.epochs": "4", "method.schedule.last_sparse": "1ep"})
ACDC = [sys.executable, "-m", "acdc"]


def typed(out: Path | str, *more: str) -> list[str]:
    return ["run", "digits", "--out", str(out), "--device", "cpu", *more, *SHORT]


# --- paths --------------------------------------------------------------------------------------

COMMANDS = {
    "run": typed,
    "resume": lambda path: typed(path, "--resume"),
    "report": lambda path: ["report", path],
    "safetensors": lambda path: ["export", path, "--to", "safetensors"],
    "onnx": lambda path: ["export", path, "--to", "onnx"],
    "compare": lambda path: ["compare", "compare_digits", "--out", path],
    "compare again": lambda path: ["compare", "compare_digits", "--out", path, "--resume"],
    "grid": lambda path: ["compare", f"{path}.py:grid"],
    "show": lambda path: ["show", f"{path}.py:grid"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["long", "long folder", "file", "below a file", "loop", "device"])
def test_a_path_that_cannot_be_is_a_sentence(
    command: str, kind: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    path = {
        "long": "n" * 300,
        "long folder": f"{'n/' * 2500}n",
        "file": "file",
        "below a file": "file/x",
        "loop": "loop",
        "device": "/dev/null",
    }[kind]
    assert main(COMMANDS[command](path)) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "error: " in err
    assert err.endswith(".")
    assert "Errno" not in err
    assert (tmp_path / "file").read_text() == "x"


ODD = Path("a b\nc") / "ü 雪" / os.fsdecode(b"\xff") / "-x' \"$(y)"


def test_folders_with_spaces_lines_and_letters(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / ODD
    assert main(typed(out)) == 0
    (run,) = out.iterdir()
    assert main(["report", str(run)]) == 0
    assert main(["export", str(run), "--to", "safetensors"]) == 0
    assert main(typed(out, "--resume")) == 0
    assert (run / "sparse.safetensors").is_file()


@pytest.mark.slow
def test_two_jobs_in_a_folder_with_spaces_lines_and_letters(tmp_path: Path) -> None:
    """The workers are given the folder, and the file of the grid, as text."""
    out, grid = tmp_path / ODD, tmp_path / ODD / "a grid.py"
    out.mkdir(parents=True)
    grid.write_text("from support.compare_grids import small\n")
    words = ["compare", f"{grid}:small", "--jobs", "2", "--out", str(out)]
    done = subprocess.run(
        [*ACDC, *words], cwd=Path(__file__).parent, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (out / "small" / "failed.jsonl").read_text()
    assert (out / "small" / "report.html").is_file()


def test_a_read_only_folder_as_an_ordinary_user(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    done = subprocess.run(
        [*ACDC, *typed(tmp_path / "closed")],
        capture_output=True,
        text=True,
        preexec_fn=as_ordinary_user,
    )
    assert done.returncode == 2, done.stderr
    assert "Permission denied" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "closed").iterdir())


def test_without_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(self: Path) -> Path:
        if str(self).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return self

    monkeypatch.setattr(Path, "expanduser", no_home)
    for name in ("XDG_CACHE_HOME", "ACDC_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(FashionMNIST, "installed", tmp_path / "nothing")
    assert cache_folder() is None
    with pytest.raises(InputError, match=r"Looked in: .*nothing.*What to do: .1. set ACDC_DATA"):
        FashionMNIST().load()
    with pytest.raises(InputError, match=r"no home folder\. Set ACDC_DATA to a folder"):
        FashionMNIST().load(download=True)
    monkeypatch.setenv("ACDC_DATA", "~/data")
    with pytest.raises(InputError, match="Looked in: ~/data"):
        FashionMNIST().load()


NO_SHARED_MEMORY = "mount -t tmpfs -o ro none /dev/shm && exec "


@pytest.mark.slow
def test_workers_without_shared_memory(tmp_path: Path) -> None:
    """Nothing may be written to /dev/shm: no semaphore of Python, no tensor for a process."""
    private = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*private, NO_SHARED_MEMORY + "true"], capture_output=True).returncode:
        pytest.skip("This user may not mount.")
    grid = Path(compare_grids.__file__)

    def compared(*jobs: str) -> subprocess.CompletedProcess[str]:
        line = shlex.join([*ACDC, "compare", f"{grid}:small", "--out", str(tmp_path), *jobs])
        return subprocess.run(
            [*private, NO_SHARED_MEMORY + line],
            cwd=grid.parent.parent, capture_output=True, text=True,
        )  # fmt: skip

    done = compared()
    assert done.returncode == 2
    assert "Workers need semaphores of the system" in " ".join(done.stderr.split())
    done = compared("--jobs", "0", "--resume")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "small" / "failed.jsonl").read_text()


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.rmdir(os.getcwd()); from acdc.cli import main; sys.exit(main(['list']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr == "error: The current folder was removed. Change to another folder.\n"


# --- standard streams ---------------------------------------------------------------------------


def shell(line: str, before: str = "") -> subprocess.CompletedProcess[str]:
    command = f"{before} {sys.executable} -m acdc {line}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--help > /dev/full", "No space left on device"),
        ("--version > /dev/full", "No space left on device"),
        ("cite > /dev/full", "No space left on device"),
        ("--help >&- <&-", "Bad file descriptor"),
    ],
)
def test_full_and_closed_output_is_a_sentence(line: str, words: str) -> None:
    done = shell(line)
    assert done.returncode == 2
    assert " ".join(done.stderr.split()) == (
        f"error: Standard output cannot be written: {words}. Files that were written are kept."
    )


def test_a_closed_pipe_is_quiet() -> None:
    done = shell("--help | true; exit ${PIPESTATUS[0]}")
    assert done.returncode in (0, 141)
    assert done.stderr == ""


def test_a_mistake_has_its_exit_code_without_an_error_stream() -> None:
    for closed in ("2>&-", "2>/dev/full", "2>&- >&-"):
        assert shell(f"report {closed}").returncode == 2
    assert shell("cite lottery 2>/dev/full").returncode == 2


def test_a_run_is_kept_when_its_output_is_full(tmp_path: Path) -> None:
    """The disk of a log may be full as well. The user has no home folder, and needs none."""
    line = " ".join(typed(tmp_path, "--json"))
    done = shell(f"{line} > /dev/full")
    assert done.returncode == 2
    assert "Standard output cannot be written" in " ".join(done.stderr.split())
    (run,) = tmp_path.iterdir()
    assert {"record.json", "report.html", "pair"} <= {path.name for path in run.iterdir()}
    other = tmp_path / "other"
    done = shell(f"{' '.join(typed(other))} 2> /dev/full", "env -u HOME -u XDG_CACHE_HOME")
    assert done.returncode == 0
    assert "test accuracy" in done.stdout
    (run,) = other.iterdir()
    assert (run / "record.json").is_file()


# --- schedules without bounds -------------------------------------------------------------------


def test_a_schedule_of_a_million_phases_is_refused_at_once() -> None:
    spans = [("dense", "1st"), ("sparse", "1st")] * 500_000
    built = tuple(Phase(("dense", "sparse")[i % 2], i, i + 1) for i in range(MOST_PHASES + 1))
    for make in (
        lambda: alternate(1_000_000, "1ep", "1ep", "1ep").resolve(1),
        lambda: alternate(10, "1st", "1st", "1st").resolve(1_000_000),
        lambda: phases(1_000_000, spans),
        lambda: Schedule(built, (1,) * len(built)),
    ):
        with pytest.raises(
            InputError, match=f"more than {MOST_PHASES:,} phases, which is the limit"
        ):
            make()
    with pytest.raises(InputError, match="1,000,000 is the limit"):
        constant("dense", 10**9)
    with pytest.raises(InputError, match="The duration of warmup is"):
        alternate(10, warmup=f"{'9' * 5000}ep")


def test_as_many_phases_as_are_allowed(capsys: Capture) -> None:
    epochs = MOST_PHASES
    schedule = alternate(epochs, "1ep", "1ep", "1ep").resolve(2)
    assert len(schedule.phases) == MOST_PHASES
    assert [schedule.phase_at(step).kind for step in (0, 2, 2 * epochs)] == [
        "dense", "sparse", "sparse"
    ]  # fmt: skip
    assert len(schedule.table().splitlines()) == MOST_PHASES + 2


@pytest.mark.parametrize("value", ["9" * 5000, "1e400", "-1", "nan"])
def test_huge_numbers_on_the_command_line(value: str, capsys: Capture) -> None:
    for path in ("method.schedule.epochs", "batch_size", "seed", "optimizer.lr", "clip"):
        code = main(["show", "digits", "--set", f"{path}={value}"])
        err = capsys.readouterr().err
        assert code in (0, 2)
        assert (code == 0) == (err == "")
        assert len(err) < 1000
