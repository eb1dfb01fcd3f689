"""A cluster of Slurm on this machine: munged, slurmctld and slurmd, under a folder of their own.

Nothing of the system is changed: the key, the configuration, the sockets and the logs are in that
folder. The user is the one that runs the tests; Debian has the programs in ``slurm-wlm`` and
``munge``.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")

CONFIGURATION = """\
ClusterName=acdc
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
JobRequeue=1
KillWait=10
ReturnToService=2
InactiveLimit=0
MaxJobCount=100
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Return the programs that are not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Node:
    """A cluster of one node.

    Args:
        folder: For everything that it writes. Its path is short, because a socket is in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("state", "spool"):
            (folder / name).mkdir()
        folder.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=socket.gethostname().split(".")[0],
                controller=_free_port(),
                node=_free_port(),
                folder=folder,
                user=getpass.getuser(),
            )
        )
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *options: str) -> None:
        """Start a daemon in the foreground."""
        log = (self.folder / f"{name}.out").open("ab")
        self.processes[name] = subprocess.Popen(
            [name, *options], env=self.environment, stdout=log, stderr=log, start_new_session=True
        )

    def start_all(self) -> None:
        """Start the daemons and wait for the node."""
        own = [
            f"--{word}={self.folder}/munge.{word}" for word in ("socket", "pid-file", "seed-file")
        ]
        log, key = f"--log-file={self.folder}/munge.log", f"--key-file={self.folder}/munge.key"
        self.start("munged", "--foreground", "--force", *own, log, key)
        self._until(lambda: (self.folder / "munge.socket").exists())
        self.start("slurmctld", "-D")
        self.start("slurmd", "-D")
        self._until(lambda: "idle" in self.said("sinfo", "--noheader", "--format=%t"))

    def said(self, *words: str) -> str:
        """Return what a command of Slurm says, or nothing if it fails."""
        return subprocess.run(
            words, env=self.environment, capture_output=True, text=True, check=False
        ).stdout

    def kill(self, name: str) -> None:
        """Kill a daemon."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def _until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not true():
            if time.monotonic() > deadline:
                logs = {p.name: p.read_text()[-2000:] for p in self.folder.glob("*.log")}
                raise RuntimeError(f"The cluster does not start: {logs}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End all jobs and all daemons."""
        self.said("scancel", f"--user={getpass.getuser()}")
        self.said("scancel", "--signal=KILL", f"--user={getpass.getuser()}")
        for name in reversed(list(self.processes)):
            self.processes[name].terminate()
        for process in self.processes.values():
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def node(folder: Path) -> Iterator[Node]:
    """Run a cluster for a while."""
    found = Node(folder)
    try:
        found.start_all()
        yield found
    finally:
        found.stop()
