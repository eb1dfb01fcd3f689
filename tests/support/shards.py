"""Checks on several ranks whose weights are sharded: gloo on the CPU.

It is a process of its own, which forks the ranks of every check: they cost no imports. Called with
a folder; reads the names of checks, and prints what each rank of a check said, as a line of JSON. A
rank that fails says so with its traceback.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # as the ones below: every rank would import it by itself
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard  # noqa: F401
from torch.distributed.tensor import DTensor, distribute_tensor

from support import gloo

PATIENCE = 180.0  # of a machine that is busy with something else
MODULES = (
    "support.shards_topk",
    "support.shards_training",
    "support.shards_checkpoints",
    "support.shards_results",
    "support.shards_uneven",
)

Check = Callable[[], None]
checks: dict[str, tuple[tuple[int, ...], bool, Check]] = {}
"""Name of a check → ranks, whether it takes long, and the function that every rank calls. Several
numbers of ranks are as many processes after one another, in one folder.
"""


ENDING: set[str] = set()
"""Names of checks that some ranks must end with an error. The test reads the errors."""

CRASHING = {"crashes[1]"}
"""Names of checks whose rank a signal ends."""


def on(*worlds: int, long: bool = False) -> Callable[[Check], Check]:
    """Register a check for so many ranks each."""

    def register(check: Check) -> Check:
        for world in worlds:
            name = f"{check.__name__}[{world}]"
            assert name not in checks
            checks[name] = (world,), long, check
        return check

    return register


def ends_badly(check: Check) -> Check:
    """Register a check for two ranks, of which at least one ends with an error."""
    on(2, long=True)(check)
    ENDING.add(f"{check.__name__}[2]")
    return check


def one_after_another(*worlds: int, long: bool = False) -> Callable[[Check], Check]:
    """Register a check that is run on so many ranks, and then on so many, in one folder."""

    def register(check: Check) -> Check:
        checks[f"{check.__name__}[{','.join(map(str, worlds))}]"] = worlds, long, check
        return check

    return register


def fork(rank: int, world: int, folder: Path, check: Check) -> int:
    """Start a rank, and return the number of its process."""
    child = os.fork()
    if child:
        return child
    code = 1
    with open(folder / f"{rank}", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        try:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            meeting = dist.FileStore(str(folder / f"store{world}"), world)
            badly = f"{check.__name__}[{world}]" in ENDING  # and that may take the whole patience
            patience = timedelta(seconds=PATIENCE / (6 if badly else 2))
            dist.init_process_group(
                "gloo", store=meeting, rank=rank, world_size=world, timeout=patience
            )
            os.chdir(folder)
            with warnings.catch_warnings(action="ignore"):
                check()
            dist.barrier()
            dist.destroy_process_group()
            code = 0
        except BaseException:
            said.write(traceback.format_exc())
        said.flush()
    os._exit(code)


def run(name: str, folder: Path) -> list[str]:
    """Run a check; return what each rank has to say: nothing, if all is well."""
    worlds, _, check = checks[name]
    folder.mkdir()
    return [said for world in worlds for said in together(world, folder, check)]


def together(world: int, folder: Path, check: Check) -> list[str]:
    """Run a check on so many ranks; return what each of them has to say."""
    children = [fork(rank, world, folder, check) for rank in range(world)]
    said = []
    for rank, code in enumerate(gloo.ends(children, PATIENCE)):
        text = (folder / str(rank)).read_text()
        said.append("" if code == 0 else f"ended with {code}: {text}")
    return said


@contextmanager
def started(folder: Path) -> Iterator[Callable[[str], list[str]]]:
    """Start a process that imports everything once; yield what runs a check in it by its name."""
    with gloo.start("support.shards", folder) as process:

        def ask(name: str) -> list[str]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.communicate()


# --- what checks share ---------------------------------------------------------------------------


def placed(full: torch.Tensor, mesh: dist.DeviceMesh, *placements: object) -> DTensor:
    """Return a tensor that every rank holds as a whole, sharded."""
    return distribute_tensor(full.clone(), mesh, placements, src_data_rank=None)


def mesh(*sizes: int) -> dist.DeviceMesh:
    """Return a device mesh of these sizes."""
    names = ("replicate", "shard") if len(sizes) == 2 else ("shard",)
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


@on(1)
def crashes() -> None:
    os.abort()


def main() -> None:
    """Run the checks that the standard input names, until it ends."""
    torch.set_num_threads(1)
    for number, name in enumerate(sys.stdin):
        print(json.dumps(run(name.strip(), Path(sys.argv[1], str(number)))), flush=True)


def load() -> None:
    """Import the modules whose checks are registered."""
    from importlib import import_module

    for module in MODULES:
        import_module(module)


if __name__ == "__main__":
    from support import shards

    shards.load()
    shards.main()
