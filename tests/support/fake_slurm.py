"""The commands of Slurm that ``acdc compare --slurm`` uses, for machines without Slurm.

``install`` writes ``sbatch``, ``squeue``, ``scancel``, ``scontrol`` and ``srun`` into the folder
``bin`` of a cluster; each calls the function of its name here. A job is a process with its own
group, and a folder in ``jobs`` with its state. ``make test-slurm`` runs the same tests with the
programs themselves.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "srun")
KILL_WAIT = 10.0  # seconds between SIGTERM and SIGKILL


def install(folder: Path) -> dict[str, str]:
    """Write the commands, and return the environment in which they are found."""
    (folder / "bin").mkdir(parents=True)
    (folder / "jobs").mkdir()
    for name in COMMANDS:
        path = folder / "bin" / name
        words = shlex.join([sys.executable, "-S", str(Path(__file__)), name, str(folder)])
        path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        path.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


class Job:
    """A job: the folder ``jobs/NUMBER``."""

    def __init__(self, folder: Path, number: str) -> None:
        self.number, self.folder = number, folder / "jobs" / number

    def read(self, name: str) -> str:
        try:
            return (self.folder / name).read_text()
        except OSError:
            return ""

    def write(self, name: str, text: str) -> None:
        part = self.folder / f"{name}.{os.getpid()}.part"  # a job may end while it is cancelled
        part.write_text(text)
        part.rename(self.folder / name)

    def signal(self, number: int) -> None:
        """Send a signal to the tasks of the job, as Slurm does, not to its shell."""
        with contextlib.suppress(ValueError, ProcessLookupError):
            os.kill(int(self.read("task")), number)


def sbatch(folder: Path, script: str) -> int:
    text = Path(script).read_text()
    if (folder / "away").exists():
        print("sbatch: error: Batch job submission failed: Unable to contact slurm controller",
              file=sys.stderr)  # fmt: skip
        return 1
    if (folder / "refuses").exists():
        print("sbatch: error: Batch job submission failed: " + (folder / "refuses").read_text(),
              file=sys.stderr)  # fmt: skip
        return 1
    numbers = [int(path.name) for path in (folder / "jobs").iterdir()]
    job = Job(folder, str(max(numbers, default=0) + 1))
    job.folder.mkdir()
    job.write("script", text)
    job.write("state", "PENDING")
    words = [sys.executable, "-S", __file__, "run", str(folder), job.number]
    subprocess.Popen(words, start_new_session=True, stdin=subprocess.DEVNULL,
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    print(f"Submitted batch job {job.number}")
    return 0


def run(folder: Path, number: str) -> int:
    """Run a job, and again when it was put into the queue again."""
    job = Job(folder, number)
    ranks = dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0")
    sizes = dict.fromkeys(("SLURM_NTASKS", "SLURM_JOB_NUM_NODES"), "1")
    environment = {**os.environ, "SLURM_JOB_ID": number, **ranks, **sizes}
    if found := re.search(r"--cpus-per-task=(\d+)", job.read("script")):
        environment["SLURM_CPUS_PER_TASK"] = found[1]
    while job.read("state") == "PENDING":
        job.write("state", "RUNNING")
        code = subprocess.run(["bash", str(job.folder / "script")], env=environment).returncode
        if job.read("requeued"):
            (job.folder / "requeued").unlink()
            job.write("state", "PENDING")
        elif job.read("state") != "CANCELLED":
            job.write("state", "FAILED" if code else "COMPLETED")
    return 0


def srun(folder: Path, *words: str) -> int:
    """Start the task of a job, and wait for it."""
    job, rest, files = Job(folder, os.environ["SLURM_JOB_ID"]), list(words), {}
    while rest[0].startswith("--"):
        name = rest.pop(0)
        if name in ("--output", "--error"):
            files[name] = rest.pop(0).replace("%j", job.number).replace("%t", "0")
    with open(files["--output"], "a") as out, open(files["--error"], "a") as err:
        task = subprocess.Popen(rest, stdout=out, stderr=err)
        job.write("task", str(task.pid))
        code = task.wait()
        if code < 0:
            name = signal.strsignal(-code)
            print(f"srun: error: node: task 0: {name}", file=err)
    return 128 - code if code < 0 else code


def squeue(folder: Path, *_: str) -> int:
    if (folder / "away").exists():
        print("slurm_load_jobs error: Unable to contact slurm controller", file=sys.stderr)
        return 1
    for path in sorted((folder / "jobs").iterdir()):
        print(path.name, Job(folder, path.name).read("state"))
    return 0


def scancel(folder: Path, *words: str) -> int:
    given = [word.partition("=")[2] for word in words if word.startswith("--signal=")]
    jobs = [Job(folder, word) for word in words if not word.startswith("--")]
    for job in jobs:
        if given:
            job.signal(getattr(signal, f"SIG{given[0]}"))
        else:
            job.write("state", "CANCELLED")
            job.signal(signal.SIGTERM)
    if not given and os.fork() == 0:
        time.sleep(KILL_WAIT)
        for job in jobs:
            job.signal(signal.SIGKILL)
    return 0


def scontrol(folder: Path, verb: str, number: str) -> int:
    assert verb == "requeue"
    Job(folder, number).write("requeued", "yes")
    return 0


if __name__ == "__main__":
    command, where, *given = sys.argv[1:]
    sys.exit(globals()[command](Path(where), *given))
