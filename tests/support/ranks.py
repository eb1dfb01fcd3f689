"""Several processes that train one model, in the last of which something goes wrong.

It is a process of its own, which forks the ranks: they cost no imports. Called by ``test_peers.py``
with a folder; prints the exit code of each rank, and what it said, as JSON. A sentence that acdc
raises ends a rank with 2, any other error with 1.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import acdc
from acdc.errors import AcdcError
from acdc.schedule import Phase, Schedule
from acdc.sparsifier import Sparsifier
from support import gloo
from support.helpers import SCHEDULE, TOTAL, Net, backward, build, sgd

CASES = {
    "nothing": 2, "killed": 2, "killed, of four": 4, "terminated": 2, "raised": 2,
    "fewer batches": 2, "another sparsity": 2, "another model": 2, "another schedule": 2,
    "nan": 3, "nan, under ddp": 2, "nan, alone": 2,
}  # fmt: skip
LATER = Schedule((Phase("dense", 0, 3), Phase("sparse", 3, 9)), (3, 3, 3))
PATIENCE = 30.0
AT = 1  # steps that are taken before something happens; the first compression is after 2


def train(rank: int, world: int, store: Path, what: str) -> None:
    """Train, and let something happen in the last process."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = dist.FileStore(str(store), world)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world)
    last = rank == world - 1
    model = build(Net)
    if last and what == "another model":
        model.fc2 = torch.nn.Linear(8, 5)
    optimizer = sgd(model)
    sparsity = 0.5 if last and what == "another sparsity" else 0.8
    schedule = LATER if last and what == "another schedule" else SCHEDULE
    # Nothing but the sparsifier communicates, mostly: DDP would notice some of this by itself.
    method = acdc.ACDC(acdc.Unstructured(sparsity), schedule)
    net = DDP(model) if what == "nan, under ddp" else model
    group = None if what in ("nan, under ddp", "nan, alone") else dist.group.WORLD
    with warnings.catch_warnings(action="ignore"):
        sparsifier = Sparsifier(method, net, optimizer, process_group=group)
    steps = AT if last and what == "fewer batches" else TOTAL
    for step in range(steps):
        if last and step == AT:
            happen(what, model)
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step()
    assert sparsifier.step == steps
    dist.destroy_process_group()


def happen(what: str, model: torch.nn.Module) -> None:
    """Let it happen."""
    if what.startswith("nan"):
        torch.nn.init.constant_(model.fc2.bias, math.nan)  # so is the loss, and every gradient
    if what.startswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "terminated":
        os.kill(os.getpid(), signal.SIGTERM)
    elif what == "raised":
        raise ValueError("the data of this rank are broken")


def fork(rank: int, world: int, folder: Path, what: str) -> int:
    """Start a rank, and return the number of its process."""
    child = os.fork()
    if child:
        return child
    code = 1
    with open(folder / f"{rank}", "w") as said:
        os.dup2(said.fileno(), 2)
        try:
            train(rank, world, folder / "store", what)
            code = 0
        except AcdcError as error:
            code = 2
            said.write(str(error))
        except Exception:
            said.write(traceback.format_exc())
    os._exit(code)


def main() -> None:
    """Let everything happen, one after the other."""
    torch.set_num_threads(1)
    sgd(build(Net)).step()  # imports what every rank would have to import by itself
    found = {}
    for what, world in CASES.items():
        folder = Path(sys.argv[1], what)
        folder.mkdir()
        children = [fork(rank, world, folder, what) for rank in range(world)]
        codes = gloo.ends(children, PATIENCE)
        said = [(folder / str(rank)).read_text() for rank in range(world)]
        found[what] = list(zip(codes, said, strict=True))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
