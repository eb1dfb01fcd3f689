"""``torchrun -m acdc run``: as many processes as it starts, killed and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only

from acdc.cli.arguments import chosen_recipe
from acdc.cli.output import is_helper
from acdc.errors import InputError
from acdc.runs.setup import make_fabric
from support.runs import TINY, assert_same_run, tiny, words

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this build of torch has no gloo"
)


def command(out: Path, *more: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = ["acdc", "run", "digits", *words(TINY), "--device", "cpu", "--out", str(out)]
    return [*torchrun, "--nproc-per-node", "2", "-m", *run, *more]


def started(out: Path, *more: str) -> subprocess.Popen[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(out, *more), env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def process_of(rank: int, parent: int) -> int:
    """Return the number of the process that ``torchrun`` has started for a rank."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for child in map(int, children):
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return child
    raise AssertionError(f"rank {rank} is none of {children}")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_whose_process_is_killed_goes_on(tmp_path: Path) -> None:
    first = started(tmp_path)
    assert first.stderr is not None
    for line in first.stderr:
        if line.startswith("epoch 3"):
            os.kill(process_of(1, first.pid), signal.SIGKILL)
            break
    log = first.stderr.read()
    assert first.wait(timeout=60) == 1, log
    assert "Signal 9 (SIGKILL) received" in log
    whole = started(tmp_path / "whole")
    second = started(tmp_path, "--resume")
    for run in (second, whole):
        out, log = run.communicate(timeout=120)
        assert run.returncode == 0, log
        assert out.count("Report: ") == 1
    (name,) = (path.name for path in (tmp_path / "whole").iterdir())
    assert "devices" in (tmp_path / name / "recipe.json").read_text()
    assert_same_run(tmp_path / "whole" / name, tmp_path / name)


class Arguments:
    """What the parser returns for ``acdc run digits``."""

    recipe, set, seed = "digits", (), None
    devices: int | None = None


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of the last of four processes on two machines."""
    names = {
        "TORCHELASTIC_RUN_ID": "1", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }  # fmt: skip
    # Fabric writes its rank there, and a process of rank 3 would log nothing in later tests.
    monkeypatch.setattr(rank_zero_only, "rank", getattr(rank_zero_only, "rank", 0), raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_the_number_of_devices_is_that_of_torchrun(torchrun: pytest.MonkeyPatch) -> None:
    recipe, changed = chosen_recipe(Arguments())  # type: ignore[arg-type]
    assert (recipe.devices, changed) == (4, {"devices": "4"})
    torchrun.setenv("WORLD_SIZE", "1")
    recipe, changed = chosen_recipe(Arguments())  # type: ignore[arg-type]
    assert (recipe.devices, changed) == (1, {})  # the same folder as without torchrun


def test_the_first_process_of_all_machines_prints(torchrun: pytest.MonkeyPatch) -> None:
    assert is_helper()
    torchrun.setenv("LOCAL_RANK", "0")
    assert is_helper()
    torchrun.setenv("RANK", "0")
    assert not is_helper()


def test_processes_of_several_machines_are_one_run(
    torchrun: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fabric = make_fabric(tiny(devices="4"), "cpu", tmp_path)
    assert (fabric.world_size, fabric.global_rank, fabric.node_rank) == (4, 3, 1)


def test_another_number_than_torchruns_is_refused(
    torchrun: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sentence = "torchrun has started 4 processes, and the run is one of 2. Start 2 with"
    with pytest.raises(InputError, match=sentence):
        make_fabric(tiny(devices="2"), "cpu", tmp_path)
