"""Files at a path that the user names: links are followed, and devices are never replaced."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from acdc.bench import table
from acdc.cli import main
from acdc.errors import InputError
from acdc.export import to_onnx, to_safetensors
from acdc.outfile import check, write
from acdc.pages.figure import publish
from acdc.result import DenseNetwork
from acdc.runs.record import Folder
from support.ordinary import as_ordinary_user

Capture = pytest.CaptureFixture[str]
NETWORK = DenseNetwork({"w": torch.arange(3.0)})

# Everything that writes a file at a path that somebody chose.
WRITERS = {
    "write": lambda path: write(path, b"new"),
    "safetensors": lambda path: to_safetensors(NETWORK, path, "dense"),
    "bench": lambda path: table.save(path, "acdc bench", []),
    "page": lambda path: publish(path, "new"),
    "record": lambda path: Folder(path.parent).write(path, {"new": 1}),
}
every_writer = pytest.mark.parametrize("name", WRITERS)


@every_writer
def test_a_link_is_followed_and_stays(tmp_path: Path, name: str) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    target, link = tmp_path / "there" / "file", tmp_path / "here" / "link"
    (tmp_path / "middle").symlink_to(target)
    link.symlink_to("../middle")  # a link to a link, relative
    for old in (None, b"old"):  # the target need not exist
        if old is not None:
            target.write_bytes(old)
        WRITERS[name](link)
        assert link.is_symlink()
        assert (tmp_path / "middle").is_symlink()
        assert not target.is_symlink()
        assert target.read_bytes() not in (None, b"old", b"")
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "file",
        "here",
        "link",
        "middle",
        "there",
    ]


@every_writer
def test_the_permissions_of_the_old_file_are_kept(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file"
    for mode in (0o600, 0o640, 0o755):
        path.write_bytes(b"old")
        path.chmod(mode)
        WRITERS[name](path)
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert path.read_bytes() != b"old"


@every_writer
def test_a_device_is_written_into_and_stays(tmp_path: Path, name: str) -> None:
    link = tmp_path / "null"
    link.symlink_to(os.devnull)
    before = os.stat(os.devnull)
    for path in (Path(os.devnull), link):
        WRITERS[name](path)
        assert os.path.samestat(os.stat(os.devnull), before)
        assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert link.is_symlink()


@every_writer
def test_a_pipe_is_written_into(tmp_path: Path, name: str) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    WRITERS[name](pipe)
    reader.join(20)
    WRITERS[name](tmp_path / "file")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    if name != "bench":  # which writes the time of day
        assert read == [(tmp_path / "file").read_bytes()]
    assert read[0]


@every_writer
def test_a_folder_is_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "link"):
        with pytest.raises(InputError, match="is a folder, and a file is to be written there"):
            WRITERS[name](path)


def hopeless(tmp_path: Path) -> dict[str, Path]:
    """Return paths that cannot be written, each with the words of the system."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    return {
        "File name too long": tmp_path / ("n" * 300),
        "Not a directory": tmp_path / "file" / "x",
        "Too many levels of symbolic links": tmp_path / "loop",
        "No space left on device": Path("/dev/full"),
    }


@every_writer
def test_paths_that_cannot_be_written_are_a_sentence(tmp_path: Path, name: str) -> None:
    for words, path in hopeless(tmp_path).items():
        with pytest.raises(InputError, match=words):
            WRITERS[name](path)
        if path != Path("/dev/full"):
            with pytest.raises(InputError, match=words):
                check(path)
    assert (tmp_path / "file").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "loop"]


def test_a_file_that_must_not_be_written_is_left_alone(tmp_path: Path) -> None:
    path, folder = tmp_path / "file", tmp_path / "folder"
    path.write_text("old")
    path.chmod(0o444)
    folder.mkdir(mode=0o555)
    code = (
        "import sys; from pathlib import Path; from acdc import outfile\n"
        "from acdc.errors import InputError\n"
        "for path in sys.argv[1:]:\n"
        "    for f in (outfile.check, lambda p: outfile.write(p, b'new')):\n"
        "        try: f(Path(path))\n"
        "        except InputError as error: print(error)\n"
    )
    words = [sys.executable, "-c", code, str(path), str(folder / "new")]
    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=as_ordinary_user)
    assert done.stdout.count("Permission denied") == 4, done
    assert path.read_text() == "old"
    assert not list(folder.iterdir())


def test_onnx_goes_through_links_and_into_devices(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model, example = nn.Linear(3, 2), torch.zeros(1, 3)
    target, link = tmp_path / "model.onnx", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    to_onnx(model, example, link)
    assert link.is_symlink()
    assert target.stat().st_size > 100
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    to_onnx(model, example, os.devnull)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    with pytest.raises(InputError, match="is a folder"):
        to_onnx(model, example, tmp_path)


PRINTS = (
    "import sys; from acdc.cli.output import prepare_streams; prepare_streams()\n"
    "from acdc.outfile import write; print('before')\n"
    "write(sys.argv[1], b'data\\n'); print('after')\n"
)


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_receives_the_file_in_its_turn(tmp_path: Path, path: str) -> None:
    """Also where it is a regular file: replaced, it would lose what is printed afterwards."""
    out = tmp_path / "out"
    with out.open("wb") as file:
        subprocess.run([sys.executable, "-c", PRINTS, path], stdout=file, check=True)
    assert out.read_text() == "before\ndata\nafter\n"
    (tmp_path / "link").symlink_to(path)
    words = [sys.executable, "-c", PRINTS, str(tmp_path / "link")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "before\ndata\nafter\n"


# --- the command line ---------------------------------------------------------------------------


def bench(path: Path) -> list[str]:
    words = ["bench", "layers", "--case", "linear_64x64_t8", "--sparsity", "0.9"]
    return [*words, "--repeats", "1", "--threads", "1", "--json", str(path)]


def test_bench_refuses_a_path_before_it_measures(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object) -> Iterator[dict[str, object]]:
        pytest.fail("measured")
        yield {}

    monkeypatch.setattr("acdc.bench.layers.measure", measure)
    for path in (tmp_path, *hopeless(tmp_path).values()):
        if path != Path("/dev/full"):
            assert main(bench(path)) == 2
            assert capsys.readouterr().err.startswith("error: ")


def test_bench_writes_into_a_device_once(tmp_path: Path, capsys: Capture) -> None:
    link = tmp_path / "link"
    link.symlink_to(os.devnull)
    assert main(bench(link)) == 0
    assert link.is_symlink()
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    link.unlink()
    link.symlink_to(tmp_path / "file")
    assert main(bench(link)) == 0
    assert link.is_symlink()
    assert (tmp_path / "file").stat().st_size > 100
