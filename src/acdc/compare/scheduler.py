"""The scheduler of a Dask cluster that is running: whether it answers.

A client of Dask that cannot connect says so late, and its threads write to the terminal afterwards.
So an address is checked before there is a client; ``acdc.address`` checks its form.
"""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask
from dask.utils import parse_timedelta
from distributed.comm.core import FatalCommClosedError, connect
from distributed.security import Security

from acdc.address import host_and_port
from acdc.compare.cells import explain
from acdc.errors import InputError

TIMEOUT = "distributed.comm.timeouts.connect"  # of Dask's configuration


def check_answer(address: str) -> None:
    """See that a scheduler answers at an address, within the time that Dask's configuration gives.

    Raises:
        InputError: None does.
    """
    _resolve(address)
    seconds = parse_timedelta(dask.config.get(TIMEOUT), default="seconds")
    # In a thread: this one may have a loop of asyncio, as in a notebook.
    with ThreadPoolExecutor(1) as thread:
        try:
            kind = thread.submit(asyncio.run, _kind(address, seconds)).result()
        except FatalCommClosedError as error:  # of TLS
            raise _refused(address, error) from error
        except OSError as error:
            raise InputError(
                f"--on {address}: no scheduler of Dask answers there within {seconds:g} s "
                f"({TIMEOUT} in Dask's configuration). Start it with 'dask scheduler', and workers "
                f"with 'dask worker {address} --nthreads 1'."
            ) from error
        except Exception as error:  # raised by the protocol: no certificates, a missing package
            raise _refused(address, error) from error
    if kind != "Scheduler":
        raise InputError(
            f"--on {address}: a {kind.lower()} of Dask answers there. Give the address of the "
            f"scheduler: it prints the address when it starts."
        )


def _refused(address: str, error: Exception) -> InputError:
    return InputError(
        f"--on {address}: Dask cannot connect ({explain(error).rstrip('.')}). See distributed.comm "
        f"in its configuration, or give another address of the scheduler, such as tcp://HOST:8786."
    )


def _resolve(address: str) -> None:
    """See that the name of the host is known.

    Raises:
        InputError: It is not.
    """
    if (parts := host_and_port(address)) is None:
        return
    host, port = parts
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        cause = getattr(error, "strerror", None) or error
        raise InputError(
            f"--on {address}: the name {host!r} is not known here ({cause}). Give a name that this "
            f"machine knows, or the number (IP) of the scheduler's machine."
        ) from error


async def _kind(address: str, seconds: float) -> str:
    """Return what answers at an address: ``"Scheduler"``, ``"Worker"`` or ``"Nanny"``."""

    async def ask() -> Any:
        given = Security().get_connection_args("client")
        comm = await connect(address, timeout=seconds, **given)
        try:
            await comm.write({"op": "identity", "reply": True})
            return await comm.read()
        finally:
            comm.abort()

    # Dask waits for a connection, but not for the first words of a program that is none of its own.
    answer = await asyncio.wait_for(ask(), seconds)
    return str(answer["type"])
