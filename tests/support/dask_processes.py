"""A scheduler and workers of Dask, each in a process of its own, as on several machines.

The processes are forked from one that has imported everything, so that they start in a moment.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from distributed import Scheduler, Worker

from acdc.compare import cluster


def _scheduler(told: Connection) -> None:
    async def serve() -> None:
        async with Scheduler(host="127.0.0.1", port=0, dashboard=False) as scheduler:
            told.send(scheduler.address)
            await scheduler.finished()

    asyncio.run(serve())


def _worker(told: Connection, address: str, threads: int) -> None:
    async def serve() -> None:
        async with Worker(address, nthreads=threads, memory_limit=0, dashboard=False) as worker:
            told.send(worker.address)
            await worker.finished()

    asyncio.run(serve())


def start(serve: Callable[..., None], *given: object) -> tuple[BaseProcess, str]:
    """Start a process, and return it with the address at which it serves."""
    cluster._preload()
    context = multiprocessing.get_context("forkserver")
    hears, told = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(told, *given), daemon=True)
    process.start()
    assert hears.poll(60)
    return process, hears.recv()


class Machines:
    """A scheduler with workers."""

    def __init__(self, workers: int, threads: int = 1) -> None:
        self.scheduler, self.address = start(_scheduler)
        self.workers = [start(_worker, self.address, threads)[0] for _ in range(workers)]


@contextmanager
def machines(workers: int, threads: int = 1) -> Iterator[Machines]:
    """Start a scheduler with workers, and kill at the end what has not ended."""
    with ExitStack() as stack:
        found = Machines(workers, threads)
        for process in (found.scheduler, *found.workers):
            stack.callback(process.join)
            stack.callback(process.kill)
        yield found
