"""The scheduler of a Dask cluster that is running: the form of its address, and whether it answers.

A client of Dask that cannot connect says so late, and its threads write to the terminal afterwards.
So an address is checked before there is a client.
"""

from __future__ import annotations

import asyncio
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import dask
from dask.utils import parse_timedelta
from distributed.comm.addressing import parse_address, parse_host_port
from distributed.comm.core import FatalCommClosedError, connect
from distributed.comm.registry import get_backend
from distributed.security import Security

from acdc.compare.cells import explain
from acdc.errors import InputError

TIMEOUT = "distributed.comm.timeouts.connect"  # of Dask's configuration
SOCKETS = ("tcp", "tls", "ucx")  # protocols whose addresses are a host and a port
URLS = ("ws", "wss")  # protocols whose port may be left out, and that may have a path


def check_address(address: str) -> None:
    """See that an address can be that of a scheduler.

    Raises:
        InputError: It cannot.
    """
    try:
        _parts(address)
    except ValueError as error:
        raise InputError(
            f"--on {address!r} is no address of a scheduler of Dask: {error}. Give the address "
            f"that 'dask scheduler' prints, such as tcp://HOST:8786."
        ) from error


def _parts(address: str) -> tuple[str, str, int] | None:
    """Return protocol, host and port of an address.

    ``None``: its form is known to a package that adds the protocol to Dask.

    Raises:
        ValueError: It is no address.
    """
    protocol, rest = parse_address(address)
    if protocol == "inproc":
        raise ValueError("inproc:// names a scheduler in the process of its client")
    try:
        get_backend(protocol)
    except ValueError:
        known = ", ".join(f"{name}://" for name in (*SOCKETS, *URLS))
        raise ValueError(f"Dask knows no protocol {protocol!r}; it knows {known}") from None
    if protocol in URLS:
        parts = urlsplit(f"{protocol}://{rest}")
        host, port = parts.hostname or "", parts.port or {"ws": 80, "wss": 443}[protocol]
    elif protocol in SOCKETS:
        if rest and not re.search(r":[^:\]]*$", rest):
            raise ValueError("it has no port")
        try:
            host, port = parse_host_port(rest)
        except ValueError as error:
            number = rest.rpartition(":")[2]
            why = f"{number!r} is no port" if "int()" in str(error) else str(error)
            raise ValueError(why if rest else "it has no host") from None
    else:
        return None
    if not host or re.search(r"\s", host):
        raise ValueError(f"{host!r} is no host" if host else "it has no host")
    if not 0 < port < 2**16:
        raise ValueError(f"{port} is no port: ports are numbers from 1 to 65535")
    return protocol, host, port


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
    if (parts := _parts(address)) is None:
        return
    _, host, port = parts
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
