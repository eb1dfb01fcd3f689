"""Comparisons on the workers of Dask: of one command, and of a cluster. Everything may be killed.

The processes are forked from one that has imported torch; the first test waits for it.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
import torch
from distributed import Client
from distributed.comm.registry import backends

from acdc.address import SOCKETS, URLS, check_address
from acdc.cli import main
from acdc.compare import cluster, pool, scheduler, work
from acdc.compare.cells import Cell, prepare
from acdc.compare.results import Outcome
from acdc.compare.work import Progress
from acdc.errors import InputError, MissingDependency
from acdc.files import alone
from acdc.runs import train
from support import compare_grids
from support.dask_processes import _worker, machines, start
from support.runs import assert_same_run

GRIDS = str(Path(compare_grids.__file__))
SHORT = {"distributed.comm.timeouts.connect": "500ms"}


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("ACDC_TEST_PARENT", str(os.getpid()))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def compare(name: str, out: Path, **more: Any) -> list[Outcome]:
    return work.compare(f"{GRIDS}:{name}", out, device="cpu", **more)


def reasons(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.cell.method: outcome.reason for outcome in outcomes if outcome.row is None}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of the grid ``slow``, trained in this process by nothing but calls."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("straight")
    compare("slow", out)
    return out / "slow" / "runs"


def assert_same_runs(folder: Path, straight: Path) -> None:
    assert sorted(os.listdir(folder)) == sorted(os.listdir(straight))
    for run in straight.iterdir():
        assert_same_run(folder / run.name, run)


class KillOnce:
    """Watches a grid, and kills something when a cell is past its middle.

    Args:
        kill: What to do then.
    """

    def __init__(self, kill: Callable[[], object]) -> None:
        self.kill = kill
        self.killed = False
        self.after: dict[str, list[float]] = {}  # shares of each cell after the kill

    def __call__(self, progress: Progress) -> None:
        if self.killed:
            for cell, share in progress.running:
                if share:
                    self.after.setdefault(str(cell), []).append(share)
        elif all(share > 0.4 for _, share in progress.running) and len(progress.running) == 2:
            self.killed = True
            self.kill()


# --- the workers of a command -------------------------------------------------------------------


def test_a_worker_that_is_killed_costs_the_steps_since_the_last_checkpoint(
    tmp_path: Path, straight: Path
) -> None:
    def kill() -> None:
        workers = [p for p in multiprocessing.active_children() if "Dask" in p.name]
        assert len(workers) == 2
        workers[0].kill()

    watch = KillOnce(kill)
    outcomes = compare("slow", tmp_path, jobs=2, watch=watch)
    assert watch.killed
    assert not reasons(outcomes)
    first = {cell: shares[0] for cell, shares in watch.after.items() if "75" not in cell}
    assert len(first) == 2
    assert min(first.values()) > 0.3  # no cell began anew
    assert_same_runs(tmp_path / "slow" / "runs", straight)


def test_a_cell_that_crashes_its_process_costs_itself_alone(tmp_path: Path) -> None:
    outcomes = compare("crashing", tmp_path, jobs=2)
    assert reasons(outcomes) == {"crasher": "Its process was killed by SIGSEGV."}


def test_by_default_a_cell_that_crashes_its_process_costs_itself_alone(tmp_path: Path) -> None:
    """The command has one worker: its crash ends neither the command nor what --resume goes on."""
    folder = tmp_path / "crashing"
    finished: dict[str, str] = {}
    for more in ([], ["--resume"]):
        assert main(["compare", f"{GRIDS}:crashing", "--out", str(tmp_path), *more]) == 0
        (failed,) = map(json.loads, (folder / "failed.jsonl").read_text().splitlines())
        assert failed["method"] == "crasher"
        assert failed["reason"] == "Its process was killed by SIGSEGV."
        found = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        assert [row["method"] for row in found] == ["dense", "acdc"]
        before, finished = finished, {row["cell"]: row["finished"] for row in found}
        assert before in ({}, finished)  # --resume tries the crash again, and trains nothing else


def test_one_worker_trains_what_this_process_trains(tmp_path: Path) -> None:
    for jobs in (0, 1):
        assert not reasons(compare("small", tmp_path / str(jobs), jobs=jobs))
    assert_same_runs(tmp_path / "1" / "small" / "runs", tmp_path / "0" / "small" / "runs")


def test_workers_are_seen_while_the_client_asks_for_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client itself asks every two seconds, and keeps the answer where others read theirs."""
    ask = Client._update_scheduler_info

    async def as_if_both_asked(self: Client, n_workers: int = 0) -> None:
        await ask(self, n_workers)
        await ask(self)

    monkeypatch.setattr(Client, "_update_scheduler_info", as_if_both_asked)
    monkeypatch.setattr(cluster, "LOOKED_EVERY", 0.05)
    monkeypatch.setattr(cluster, "PATIENCE", 5.0)
    outcomes = compare("small", tmp_path, jobs=2)
    assert not reasons(outcomes)


@pytest.mark.slow
def test_one_killed_and_all_stopped(tmp_path: Path) -> None:
    asked = False

    def watch(progress: Progress) -> None:
        nonlocal asked
        shares = [share for cell, share in progress.running if cell.method == "acdc"]
        if any(shares) and not asked:
            asked = True
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(train.Interrupted, match="of 3 cells settled") as caught:
        compare("deadly", tmp_path, jobs=2, watch=watch)
    assert caught.value.signal == signal.SIGTERM
    folder = tmp_path / "deadly"
    failed = [json.loads(line) for line in (folder / "failed.jsonl").read_text().splitlines()]
    found = {cell["method"]: cell["reason"] for cell in failed}
    assert found["killer"] == (
        "Its process was killed by SIGKILL. The system may have run out of memory."
    )
    assert found["acdc"] == "Not trained yet."
    assert len(list((folder / "runs").glob("*/checkpoint/last.ckpt"))) == 2
    # Without jobs this process trains, and no worker is killed.
    assert not reasons(compare("deadly", tmp_path, resume=True))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_worker_has_its_share_of_the_threads_and_the_environment_is_left_alone(
    tmp_path: Path, jobs: int
) -> None:
    torch.set_num_threads(4)
    before = dict(os.environ)
    own = cluster.Embedded(pool.Order("", str(tmp_path), "cpu", ""), jobs)
    try:
        assert own.free()
        assert own.client is not None
        given = own.client.submit(
            lambda: (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.getcwd())
        ).result()
        assert given == (4 // jobs, str(4 // jobs), os.getcwd())
    finally:
        own.close()
    assert dict(os.environ) == before
    assert not [p for p in multiprocessing.active_children() if "Dask" in p.name]


def test_a_finished_grid_starts_no_worker(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.Embedded, "_connect", lambda _: pytest.fail("a worker was started"))
    assert not reasons(compare("slow", straight.parent.parent, jobs=2, resume=True))


def test_errors_of_cells_are_the_sentences_of_one_process(tmp_path: Path) -> None:
    alike = [compare("failing", tmp_path / str(jobs), jobs=jobs) for jobs in (0, 2)]
    assert reasons(alike[0])
    assert reasons(alike[0]) == reasons(alike[1])


def test_without_dask_this_process_trains_and_workers_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "acdc.compare.cluster")
    monkeypatch.delattr("acdc.compare.cluster")
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert not reasons(compare("small", tmp_path))
    for jobs in (1, 2):
        with pytest.raises(MissingDependency, match=r"'distributed'.*acdc-train\[lab\]"):
            compare("small", tmp_path, jobs=jobs, resume=True)


@pytest.mark.parametrize("asked", [False, True])
def test_a_worker_that_dies_while_it_starts_is_a_sentence_or_the_end_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    def fails(**_: Any) -> None:
        if asked:
            os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("Nanny failed to start worker process")

    monkeypatch.setattr(cluster, "LocalCluster", fails)
    before = dict(os.environ)
    error = train.Interrupted if asked else InputError
    sentence = "Nothing is lost" if asked else "A worker died while it was started"
    with pytest.raises(error, match=sentence):
        compare("small", tmp_path, jobs=2)
    assert dict(os.environ) == before


@pytest.mark.slow
def test_ctrl_c_and_a_kill_leave_cells_to_resume_and_no_process(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "acdc", "compare", f"{GRIDS}:endless", "--jobs", "2"]
    runs = tmp_path / "endless" / "runs"
    size = 0  # of all metrics
    for number in (signal.SIGINT, signal.SIGKILL):
        command = subprocess.Popen(
            [*words, "--out", str(tmp_path), *(["--resume"] * bool(size))],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        wait(lambda: len(list(runs.glob("*/checkpoint/last.ckpt"))) == 2)
        wait(lambda before=size: _size(runs) > before)
        below = psutil.Process(command.pid).children(recursive=True)
        assert len(below) >= 2
        if number == signal.SIGINT:  # of a terminal: to all processes of its group
            os.killpg(command.pid, number)
        else:
            command.kill()
        _, errors = command.communicate(timeout=60)
        if number == signal.SIGINT:
            assert command.returncode == 128 + number
            assert "Nothing is lost: go on with --resume." in " ".join(errors.split())
            assert len(errors.strip().splitlines()) <= 2, errors
        _, alive = psutil.wait_procs(below, timeout=20)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
        size = _size(runs)


def _size(runs: Path) -> int:
    return sum(path.stat().st_size for path in runs.glob("*/metrics.jsonl"))


def wait(true: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- the workers of a cluster -------------------------------------------------------------------


def test_on_a_cluster_lost_workers_and_a_lost_scheduler_cost_no_finished_cell(
    tmp_path: Path, straight: Path
) -> None:
    with machines(2) as first:
        with pytest.raises(InputError, match="scheduler that trains this grid is gone"):
            compare("slow", tmp_path, on=first.address, watch=KillOnce(first.scheduler.kill))
        for worker in first.workers:
            worker.join(30)
            assert worker.exitcode == 0
    with machines(3) as second:
        lost, asked, _ = second.workers
        watch = KillOnce(lambda: (lost.kill(), asked.terminate()))
        outcomes = compare("slow", tmp_path, on=second.address, jobs=2, resume=True, watch=watch)
        assert not reasons(outcomes)
        assert watch.killed
        asked.join(30)
        assert asked.exitcode == 0
    assert_same_runs(tmp_path / "slow" / "runs", straight)


def test_cells_whose_command_is_gone_stop_after_a_checkpoint(tmp_path: Path) -> None:
    """The next command waits for them, and trains nothing twice."""
    grid = compare_grids.endless()
    run = prepare(grid, Cell("acdc", 0.5, 0), grid.task.epochs)
    folder = tmp_path / "endless" / "runs" / run.label
    (tmp_path / "endless").mkdir()
    with machines(1) as there:
        order = pool.Order(f"{GRIDS}:endless", str(tmp_path / "endless"), "cpu", "")
        running = cluster.Running(order, there.address, None)
        assert running.free()
        running.begin(run)
        assert not running.free()
        wait(lambda: (folder / "checkpoint" / "last.ckpt").exists())
        with pytest.raises(InputError), alone(folder, ""):
            pass
        running.close()
        with alone(folder, "", patience=20):
            pass
        assert there.workers[0].is_alive()


@pytest.mark.parametrize(
    ("workers", "threads", "sentence"),
    [(0, 1, "has no workers"), (1, 2, "has 2 threads"), (None, 1, "no scheduler of Dask answers")],
)
def test_a_cluster_that_cannot_train_a_grid_is_a_sentence(
    tmp_path: Path, workers: int | None, threads: int, sentence: str
) -> None:
    """It leaves nothing either, so that the corrected command needs no --resume."""
    if workers is None:
        with dask.config.set(SHORT), pytest.raises(InputError, match=sentence):
            compare("small", tmp_path / "out", on="tcp://127.0.0.1:9")
    else:
        with machines(workers, threads) as there, pytest.raises(InputError, match=sentence):
            compare("small", tmp_path / "out", on=there.address)
    assert not list(tmp_path.iterdir())


def test_a_wrong_address_leaves_the_results_of_another_command_alone(tmp_path: Path) -> None:
    compare("failing", tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with dask.config.set(SHORT), pytest.raises(InputError, match="no scheduler of Dask answers"):
        compare("failing", tmp_path, on="tcp://127.0.0.1:9", resume=True)
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1", "it has no port"),
        ("tcp://host", "it has no port"),
        ("tcp://[::1]", "it has no port"),
        ("tcp://::1:8786", "(IPv6) needs brackets"),
        ("tcp://host:notaport", "'notaport' is no port"),
        ("tcp://host:8786/", "'8786/' is no port"),
        ("tcp://host:70000", "70000 is no port"),
        ("ws://host:notaport", "'notaport'"),
        ("", "it has no host"),
        ("tcp://:8786", "it has no host"),
        ("tcp://a host:8786", "'a host' is no host"),
        ("nonsense://x:1", "knows no protocol 'nonsense'; it knows tcp://, tls://, ucx://"),
        ("inproc://127.0.0.1/1/1", "in the process of its client"),
    ],
)
def test_what_is_no_address_is_refused_at_once(tmp_path: Path, address: str, sentence: str) -> None:
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        compare("small", tmp_path / "out", on=address)
    assert time.monotonic() - began < 1
    assert f"--on {address!r} is no address of a scheduler" in str(caught.value)
    assert sentence in str(caught.value)
    assert "such as tcp://HOST:8786." in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:8786", "tcp://host:1", "tcp://[::1]:8786", "tls://host:8786", "ucx://host:8786",
     "ws://host", "wss://host/user/me/scheduler", "ws://host:8786"],
)  # fmt: skip
def test_addresses_that_dask_takes_are_taken(address: str) -> None:
    check_address(address)


def test_the_protocols_are_those_of_dask() -> None:
    assert {*SOCKETS, *URLS, "inproc"} == set(backends)


def test_the_command_refuses_what_is_no_address_before_it_imports_torch() -> None:
    code = (
        "import sys; from acdc.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    )
    words = ["compare", "compare_digits", "--on", "127.0.0.1"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"]
    assert done.stderr.startswith("error: --on '127.0.0.1' is no address of a scheduler of Dask")


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("tcp://nowhere.invalid:8786", "the name 'nowhere.invalid' is not known here"),
        ("ws://nowhere.invalid", "the name 'nowhere.invalid' is not known here"),
        ("tls://127.0.0.1:9", r"Dask cannot connect \(TypeError: TLS expects a `ssl_context`"),
        ("ws://127.0.0.1:9", "no scheduler of Dask answers there within 0.5 s"),
    ],
)
def test_why_a_scheduler_cannot_be_reached(address: str, sentence: str) -> None:
    async def as_in_a_notebook() -> None:
        scheduler.check_answer(address)

    with dask.config.set(SHORT):
        for check in (lambda: scheduler.check_answer(address),
                      lambda: asyncio.run(as_in_a_notebook())):  # fmt: skip
            with pytest.raises(InputError, match=f"--on {re.escape(address)}: {sentence}"):
                check()


def test_what_answers_is_a_scheduler() -> None:
    with socket.socket() as silent, dask.config.set(SHORT):
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(InputError, match="no scheduler of Dask answers there"):
            scheduler.check_answer(f"tcp://127.0.0.1:{silent.getsockname()[1]}")
    with machines(0) as there:
        scheduler.check_answer(there.address)
        process, worker = start(_worker, there.address, 1)
        try:
            with pytest.raises(InputError, match="a worker of Dask answers there"):
                scheduler.check_answer(worker)
        finally:
            process.kill()
            process.join()


def test_the_command_says_one_sentence_about_an_address_and_leaves_nothing(tmp_path: Path) -> None:
    """Threads of Dask must not write their errors after it."""
    words = [sys.executable, "-m", "acdc", "compare", f"{GRIDS}:small", "--out", str(tmp_path)]
    done = subprocess.run(
        [*words, "--on", "tcp://127.0.0.1:9"], capture_output=True, text=True,
        env=os.environ | {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "1s"},
    )  # fmt: skip
    assert done.returncode == 2
    assert " ".join(done.stderr.split()) == (
        "error: --on tcp://127.0.0.1:9: no scheduler of Dask answers there within 1 s "
        "(distributed.comm.timeouts.connect in Dask's configuration). Start it with 'dask "
        "scheduler', and workers with 'dask worker tcp://127.0.0.1:9 --nthreads 1'."
    )
    assert not list(tmp_path.iterdir())


def test_a_cluster_with_another_environment_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machines(1) as there:
        monkeypatch.setattr("acdc.__version__", "9.9")
        with pytest.raises(InputError, match=r"the version of acdc is .* and 9\.9 here"):
            compare("small", tmp_path, on=there.address)


def test_a_grid_without_workers_ends_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "PATIENCE", 1.0)
    with machines(2) as there:
        watch = KillOnce(lambda: [worker.kill() for worker in there.workers])
        with pytest.raises(InputError, match="No worker has been left for 1 seconds"):
            compare("slow", tmp_path, on=there.address, watch=watch)


def test_a_cell_waits_for_a_process_that_still_trains_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "PATIENCE", 0.2)
    grid = compare_grids.small()
    label = prepare(grid, Cell("dense", 0.0, 0), grid.task.epochs).label
    with alone(tmp_path / "small" / "runs" / label, ""):
        found = reasons(compare("small", tmp_path, resume=True))
    assert found == {
        "dense": f"Another process trains the run in runs/{label}. Wait for it, or stop it."
    }
