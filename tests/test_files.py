"""Files that appear as a whole, and the lock of a folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acdc import files
from acdc.errors import InputError
from acdc.files import Staging, alone, latest, read


def save(folder: Path, **contents: str) -> None:
    """Save these files together."""
    with Staging(folder, "the files") as staging:
        for name, text in contents.items():
            staging.add(name, text.encode())
        staging.commit()


def refusal(folder: Path, **contents: str) -> str | None:
    """Save these files together, and return the sentence if that was refused."""
    try:
        save(folder, **contents)
    except InputError as error:
        return str(error)
    return None


def killed_between_moves(folder: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Save the files a and b, and stop after so many of them are in place."""
    replace, left = os.replace, [after]

    def dying(source: Any, target: Any) -> None:
        if Path(source).name != ".acdc-saving":
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            save(folder, a="new a", b="new b")


@pytest.mark.parametrize("after", [0, 1])
def test_reading_finds_a_save_that_was_killed_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    save(tmp_path, a="old a", b="old b")
    killed_between_moves(tmp_path, monkeypatch, after)
    before = sorted(tmp_path.rglob("*"))
    assert [read(tmp_path / name) for name in "ab"] == [b"new a", b"new b"]
    assert latest(tmp_path / "b").read_text() == "new b"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("names", [("c",), ("a",), ("a", "c")])
def test_the_next_save_ends_what_a_killed_one_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    save(tmp_path, a="old a", b="old b")
    killed_between_moves(tmp_path, monkeypatch, 0)
    save(tmp_path, **dict.fromkeys(names, "newest"))
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"a": "new a", "b": "new b"} | dict.fromkeys(names, "newest")


def test_what_a_killed_save_wrote_aside_is_not_saved_with_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".acdc-saving" / "folder").mkdir(parents=True)
    (tmp_path / ".acdc-saving" / "half").write_text("ha")
    save(tmp_path, a="a", b="b")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_saves_of_several_threads_do_not_mix(tmp_path: Path) -> None:
    wrong: list[object] = []

    def work(name: str) -> None:
        try:
            for _ in range(10):
                save(tmp_path, a=name * 1000, b=name * 1000)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_save_that_waits_too_long_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_PATIENCE", 0.2)
    with Staging(tmp_path, "the first") as staging:
        staging.add("a", b"a")
        with pytest.raises(InputError, match="another process has been writing"):
            save(tmp_path, b="b")
        staging.commit()
    save(tmp_path, b="b")


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace"])
def test_a_quota_that_ends_at_any_call_leaves_the_old_files_or_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    """A file system may count the quota late: at a flush, or when a folder has to grow."""
    outcomes = []
    for failing in range(20):
        folder = tmp_path / str(failing)
        save(folder, a="old a", b="old b")
        real, left = getattr(os, call), [failing]

        def limited(*given: Any, real: Any = real, left: Any = left, **more: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(code, os.strerror(code))
            return real(*given, **more)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, limited)
            said = refusal(folder, a="new a", b="new b")
        if left[0] >= 0:
            break
        if said is not None:
            assert os.strerror(code) in said
            assert ("Free some space" in said) == (code != errno.EIO)
        found = {read(folder / name).decode() for name in "ab"}
        assert found in ({"old a", "old b"}, {"new a", "new b"})
        outcomes.append(found)
        save(folder, a="newest", b="newest")  # once there is space
        assert sorted(os.listdir(folder)) == ["a", "b"]
    assert left[0] >= 0, "there are more calls"
    assert len(outcomes) >= 2


# --- what a save does not replace ---------------------------------------------------------------


def link(path: Path) -> None:
    path.with_name("target").write_text("old")
    path.symlink_to("target")


def dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (link, "a symbolic link"),
        (dangling_link, "a symbolic link"),
        (os.mkfifo, "no regular file"),
        (os.mkdir, "no regular file"),
    ],
)
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_save_replaces_regular_files_alone(
    tmp_path: Path, make: Callable[[Path], None], what: str, name: str
) -> None:
    """Writing through a link to another disk could not be done as a whole."""
    make(tmp_path / name)
    before = {path: path.lstat() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=f"^Cannot write the files to .*: {name} there is {what}"):
        save(tmp_path, a="new a", b="new b")
    assert {path: path.lstat() for path in tmp_path.iterdir()} == before


def test_a_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "folder").symlink_to("disk")
    save(tmp_path / "folder", a="new a", b="new b")
    assert (tmp_path / "folder").is_symlink()
    assert sorted(os.listdir(tmp_path / "disk")) == ["a", "b"]


# --- locks --------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from acdc.files import alone
with alone(Path(sys.argv[1]), "taken"):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_lock_keeps_others_out_and_goes_with_its_process(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(InputError, match="taken by another"), alone(folder, "taken by another"):
        pytest.fail("two hold it")
    assert holder.poll() is None
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with alone(folder, "taken"):
        pass
    assert folder.exists()  # it was not made by the one who held the lock last


def test_a_folder_with_nothing_but_the_lock_is_removed(tmp_path: Path) -> None:
    with alone(tmp_path / "a" / "b", "taken"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert not (tmp_path / "a").exists()
    with alone(tmp_path / "a" / "b", "taken"):
        (tmp_path / "a" / "b" / "file").touch()
    assert sorted(os.listdir(tmp_path / "a" / "b")) == [".lock", "file"]


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    def hold() -> None:
        with alone(tmp_path, "taken"):
            held.set()
            time.sleep(0.3)

    held = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with alone(tmp_path, "taken", patience=20):
        pass
    thread.join()


def test_a_lock_that_was_removed_while_it_was_waited_for_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two could hold a lock: the one of the file that is gone, and the one of the new file."""
    locked, calls = files._locked, []

    def removed_meanwhile(descriptor: int, patience: float) -> bool:
        calls.append(1)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        return locked(descriptor, patience)

    monkeypatch.setattr(files, "_locked", removed_meanwhile)
    with alone(tmp_path, "taken"):
        assert len(calls) == 2
        with pytest.raises(InputError, match="taken"), alone(tmp_path, "taken"):
            pytest.fail("two hold it")


def test_only_one_thread_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    inside: list[str] = []

    def work(name: str) -> None:
        for _ in range(20):
            with alone(tmp_path / "x", "taken", patience=20):
                inside.append(name)
                assert len(inside) == 1
                inside.pop()

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not inside


def test_where_there_are_no_locks_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def unsupported(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with alone(tmp_path, "taken"), alone(tmp_path, "taken"):
        save(tmp_path, a="a", b="b")
    assert read(tmp_path / "a") == b"a"
