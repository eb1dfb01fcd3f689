"""Comparisons whose cells are jobs of Slurm. Everything may be killed.

``make test`` has programs that do what Slurm's commands do (``support/fake_slurm.py``);
``make test-slurm`` sets ACDC_SLURM=1, and has a controller and a node of Slurm itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from acdc.cli import main
from acdc.compare import slurm, work
from acdc.compare.results import Outcome
from acdc.compare.work import Progress
from acdc.errors import InputError, MissingDependency
from acdc.runs import train
from support import compare_grids, fake_slurm, slurm_node
from support.runs import assert_same_run

GRIDS = str(Path(compare_grids.__file__))
REAL = os.environ.get("ACDC_SLURM") == "1"


class Cluster:
    """A cluster, of Slurm or of what stands for it."""

    def __init__(self, folder: Path, node: slurm_node.Node | None) -> None:
        self.folder, self.node = folder, node
        own = fake_slurm.install(folder) if node is None else node.environment
        self.environment = {name: own[name] for name in ("PATH", "SLURM_CONF") if name in own}

    def states(self) -> dict[str, str]:
        words = ["squeue", "--noheader", "--states=all", "--format=%i %T"]
        answer = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        return dict(line.split()[:2] for line in answer.splitlines())

    def alive(self) -> list[str]:
        return [number for number, state in self.states().items() if state not in slurm.ENDED]

    def take_jobs(self, takes: bool) -> None:
        """Let the cluster take jobs or refuse them; those in the queue are not affected."""
        if self.node is None:
            refusals = self.folder / "refuses"
            refusals.unlink() if takes else refusals.write_text("the partition takes no jobs")
        else:
            state = f"State={'UP' if takes else 'DRAIN'}"
            subprocess.run(["scontrol", "update", "PartitionName=test", state], check=True)

    def leave(self) -> None:
        """Let the controller end."""
        if self.node is None:
            (self.folder / "away").touch()
        else:
            self.node.kill("slurmctld")
        assert subprocess.run(["squeue"], capture_output=True).returncode != 0

    def come_back(self) -> None:
        """Start the controller again."""
        if self.node is None:
            (self.folder / "away").unlink()
        else:
            self.node.start("slurmctld", "-D")

    def cancel(self, *words: str) -> None:
        subprocess.run(["scancel", *words], check=True)


@pytest.fixture(scope="module")
def cluster_of_the_module() -> Iterator[Cluster]:
    if REAL and (missing := slurm_node.missing()):
        pytest.fail(f"Not installed: {', '.join(missing)}. Debian: apt install slurm-wlm munge")
    with tempfile.TemporaryDirectory(prefix="acdc", dir="/tmp") as folder:
        if not REAL:
            yield Cluster(Path(folder), None)
            return
        with slurm_node.node(Path(folder)) as node:
            yield Cluster(Path(folder), node)


@pytest.fixture
def cluster(cluster_of_the_module: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    for name, value in cluster_of_the_module.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("ACDC_TEST_PARENT", str(os.getpid()))
    monkeypatch.setattr(slurm, "LOOKED_EVERY", 0.5)
    monkeypatch.setattr(slurm, "HEARD_EVERY", 0.1)
    monkeypatch.setattr(slurm, "PATIENCE", 1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield cluster_of_the_module
    torch.set_num_threads(before)
    if alive := cluster_of_the_module.alive():
        cluster_of_the_module.cancel(*alive)


def compare(name: str, out: Path, *options: str, **more: Any) -> list[Outcome]:
    return work.compare(f"{GRIDS}:{name}", out, device="cpu", slurm=options, **more)


def reasons(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.cell.method: outcome.reason for outcome in outcomes if outcome.row is None}


def wait(true: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of the grid ``two``, trained in this process by nothing but calls."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("straight")
    work.compare(f"{GRIDS}:two", out, device="cpu")
    return out / "two" / "runs"


def assert_same_runs(folder: Path, straight: Path) -> None:
    assert sorted(os.listdir(folder)) == sorted(os.listdir(straight))
    for run in straight.iterdir():
        assert_same_run(folder / run.name, run)


class Once:
    """Watches a grid, and does something when a cell is past a share of its steps.

    Args:
        do: What to do then, given the number of the job.
    """

    def __init__(self, out: Path, do: Callable[[str], object], after: float = 0.2) -> None:
        self.out, self.do, self.after = out, do, after
        self.done = False
        self.shares: dict[str, list[float]] = {}  # of each cell after it was done

    def __call__(self, progress: Progress) -> None:
        for cell, share in progress.running:
            if self.done:
                if share:
                    self.shares.setdefault(str(cell), []).append(share)
            elif share > self.after:
                (file,) = [p for p in self.out.rglob("*.share") if float(p.read_text()) == share]
                self.done = True
                self.do(file.with_suffix(".jobs").read_text().split()[-1])


def task_of(number: str) -> int:
    """Return the process that trains in a job."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            job = process.environ().get("SLURM_JOB_ID")
            if job == number and process.cmdline()[1:4] == ["-u", "-m", "submitit.core._submit"]:
                return process.pid
    raise AssertionError(f"no process of job {number}")


# --- what may happen to a job -------------------------------------------------------------------


def test_a_killed_cell_and_one_whose_time_runs_out_go_on_from_their_checkpoints(
    cluster: Cluster, tmp_path: Path, straight: Path
) -> None:
    """The first cell is killed, the second one gets the signal at which submitit requeues."""
    kill = Once(tmp_path, lambda number: os.kill(task_of(number), signal.SIGKILL))
    renew = Once(tmp_path, lambda number: cluster.cancel("--signal=USR2", number))
    before = set(cluster.states())

    def watch(progress: Progress) -> None:
        (kill if progress.done == 0 else renew)(progress)

    outcomes = compare("two", tmp_path, "cpus-per-task=1", jobs=1, watch=watch)
    assert kill.done
    assert renew.done
    assert not reasons(outcomes)
    for once in (kill, renew):
        again = next(iter(once.shares.values()))
        assert min(again) > 0.05  # no cell began anew
    assert len(set(cluster.states()) - before) == 3  # only the killed cell took another job
    assert_same_runs(tmp_path / "two" / "runs", straight)
    assert not (tmp_path / "two" / "slurm").exists()


def test_errors_of_cells_are_the_sentences_of_one_process(cluster: Cluster, tmp_path: Path) -> None:
    here = work.compare(f"{GRIDS}:failing", tmp_path / "here", device="cpu")
    there = compare("failing", tmp_path / "there")
    assert reasons(here)
    assert reasons(here) == reasons(there)


def test_a_cell_that_crashes_its_process_costs_itself_alone(
    cluster: Cluster, tmp_path: Path
) -> None:
    outcomes = compare("crashing", tmp_path)
    (sentence,) = reasons(outcomes).values()
    assert "of Slurm ended as FAILED. Its last words:" in sentence
    assert "Segmentation fault" in sentence


def test_stopped_jobs_leave_cells_to_resume_and_nothing_in_the_queue(
    cluster: Cluster, tmp_path: Path
) -> None:
    watch = Once(tmp_path, lambda _: os.kill(os.getpid(), signal.SIGINT), after=0.0)
    with pytest.raises(train.Interrupted, match="of 2 cells settled"):
        compare("endless", tmp_path, watch=watch)
    assert not cluster.alive()
    assert list((tmp_path / "endless" / "runs").glob("*/checkpoint/last.ckpt"))


def test_a_cancelled_job_fails_its_cell_until_it_is_asked_for_again(
    cluster: Cluster, tmp_path: Path, straight: Path
) -> None:
    watch = Once(tmp_path, cluster.cancel)
    outcomes = compare("two", tmp_path, jobs=1, watch=watch)
    (sentence,) = reasons(outcomes).values()
    assert "of Slurm was cancelled" in sentence
    assert not reasons(compare("two", tmp_path, resume=True))
    assert_same_runs(tmp_path / "two" / "runs", straight)


def test_jobs_outlive_a_killed_command_and_the_next_one_takes_them_over(
    cluster: Cluster, tmp_path: Path, straight: Path
) -> None:
    words = [sys.executable, "-m", "acdc", "compare", f"{GRIDS}:two", "--out", str(tmp_path)]
    command = subprocess.Popen([*words, "--jobs", "1", "--slurm", "cpus-per-task=1"])
    folder = tmp_path / "two" / "slurm"
    try:
        wait(lambda: list(folder.glob("*.jobs")))
    finally:
        command.kill()
        command.wait()
    before = set(cluster.states())
    assert not reasons(compare("two", tmp_path, resume=True))
    assert len(set(cluster.states()) - before) == 1  # the second cell alone took a job
    assert_same_runs(tmp_path / "two" / "runs", straight)


def test_the_controller_may_be_away_for_a_while(
    cluster: Cluster, tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is away while the first cell ends and the job of the second one is submitted."""
    refused: list[str] = []
    submit = slurm.submitit.SlurmExecutor.submit

    def note(self: Any, cell: Any) -> Any:
        try:
            return submit(self, cell)
        except Exception as error:
            if not refused:
                cluster.come_back()
            refused.append(str(error))
            raise

    monkeypatch.setattr(slurm.submitit.SlurmExecutor, "submit", note)
    watch = Once(tmp_path, lambda _: cluster.leave())
    assert not reasons(compare("two", tmp_path, jobs=1, watch=watch))
    assert "Unable to contact slurm controller" in refused[0]
    assert_same_runs(tmp_path / "two" / "runs", straight)


# --- what Slurm and acdc refuse -----------------------------------------------------------------


def test_what_slurm_refuses_is_its_sentence(cluster: Cluster, tmp_path: Path) -> None:
    before = cluster.states()
    if not REAL:
        (cluster.folder / "refuses").write_text("invalid partition specified: nowhere")
    try:
        with pytest.raises(InputError, match=r"Slurm refused the job of .*: .*partition") as caught:
            compare("small", tmp_path, "partition=nowhere")
    finally:
        (cluster.folder / "refuses").unlink(missing_ok=True)
    assert "\n" not in str(caught.value)
    assert cluster.states().keys() == before.keys()
    assert not list(tmp_path.iterdir())  # the corrected command needs no --resume


def test_without_a_controller_the_command_ends_and_leaves_nothing(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.leave()
    try:
        with pytest.raises(InputError, match="Unable to contact slurm controller"):
            compare("small", tmp_path / "out")
    finally:
        cluster.come_back()
    assert not list(tmp_path.iterdir())
    assert not reasons(compare("small", tmp_path / "out"))


def test_ctrl_c_that_ends_sbatch_ends_the_command(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C of a terminal reaches the command and its sbatch; no job is waited for then."""

    def fails(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise slurm.submitit.core.utils.FailedJobError("sbatch was interrupted")

    monkeypatch.setattr(slurm.submitit.SlurmExecutor, "submit", fails)
    with pytest.raises(train.Interrupted, match="0 of 3 cells settled"):
        compare("small", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_takes_no_more_jobs_makes_cells_wait(
    cluster: Cluster, tmp_path: Path
) -> None:
    pool = slurm.SlurmJobs(work.Order(f"{GRIDS}:small", str(tmp_path), "cpu", ""), [], None)
    grid = compare_grids.small()
    runs = [work.prepare(grid, cell, grid.task.epochs) for cell in work.cells(grid)]
    heard: list[tuple[str, str | None]] = []

    class Hears:
        def advanced(self, label: str, share: float) -> None: ...
        def stopped(self, label: str) -> None: ...
        def lost(self, label: str, reason: str) -> None: ...
        def ended(self, label: str, reason: str | None) -> None:
            heard.append((label, reason))

    pool.begin(runs[0])
    assert pool.free()
    cluster.take_jobs(False)
    try:
        pool.begin(runs[1])
        assert not pool.free()
        assert list(pool.given) == [runs[0].label]
    finally:
        cluster.take_jobs(True)
    while len(heard) < 2:
        pool.wait(Hears())
    pool.close()
    assert sorted(heard) == sorted((run.label, None) for run in runs[:2])  # they run side by side


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["nodes=2"], "acdc sets nodes itself"),
        (["--ntasks=2"], "acdc sets ntasks itself"),
        (["time=soon"], "this is no time of sbatch"),
        (["time=0"], "needs a minute or more"),
        (["partition="], "is no option of sbatch"),
        (["=x"], "is no option of sbatch"),
        (["A B=1"], "is no option of sbatch"),
        (["comment=a\n#SBATCH --nodes=2"], "more than one line"),
    ],
)
def test_options_that_give_no_job_of_one_task_are_sentences(
    cluster: Cluster, tmp_path: Path, options: list[str], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        compare("small", tmp_path, *options)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:00", 90), ("1:30:00", 90), ("90:01", 91), ("1-0", 1440), ("2-1:30", 2970),
     ("1-00:00:30", 1441)],
)  # fmt: skip
def test_times_are_those_of_sbatch(text: str, minutes: int) -> None:
    assert slurm._read([f"time={text}"]) == (minutes, {})


def test_options_reach_sbatch_with_dashes_and_flags() -> None:
    options = ["--partition=gpu", "gres=gpu:1", "cpus_per_task=4", "exclusive"]
    assert slurm._read(options) == (
        slurm.MINUTES,
        {"partition": "gpu", "gres": "gpu:1", "cpus-per-task": "4", "exclusive": True},
    )


def test_without_the_commands_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="--slurm needs sbatch, squeue, scancel, srun"):
        compare("small", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_submitit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "acdc.compare.slurm")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(MissingDependency, match=r"'submitit'.*acdc-train\[slurm\]"):
        compare("small", tmp_path)


def test_one_cluster_or_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", f"{GRIDS}:small", "--out", str(tmp_path), "--on", "tcp://x:1", "--slurm"]
    assert main(words) == 2
    assert "--on and --slurm are both given" in capsys.readouterr().err
