"""The form of an address of a Dask scheduler, checked before anything heavy is imported."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from urllib.parse import urlsplit

from acdc.errors import InputError

SOCKETS = ("tcp", "tls", "ucx")  # protocols of Dask whose addresses are a host and a port
URLS = {"ws": 80, "wss": 443}  # protocols whose port may be left out, and that may have a path


def check_address(address: str) -> None:
    """See that an address can be that of a scheduler.

    Raises:
        InputError: It cannot.
    """
    try:
        host_and_port(address)
    except ValueError as error:
        raise InputError(
            f"--on {address!r} is no address of a scheduler of Dask: {error}. Give the address "
            f"that 'dask scheduler' prints, such as tcp://HOST:8786."
        ) from error


def host_and_port(address: str) -> tuple[str, int] | None:
    """Return host and port of an address.

    ``None``: its form is known to a package that adds the protocol to Dask.

    Raises:
        ValueError: It is no address.
    """
    protocol, separator, rest = address.rpartition("://")
    if not separator:
        protocol = "tcp"
    if protocol == "inproc":
        raise ValueError("inproc:// names a scheduler in the process of its client")
    if protocol in URLS:
        parts = urlsplit(f"{protocol}://{rest}")
        host, port = parts.hostname or "", parts.port or URLS[protocol]
    elif protocol in SOCKETS:
        host, port = _socket(rest)
    elif entry_points(group="distributed.comm.backends", name=protocol):
        return None
    else:
        known = ", ".join(f"{name}://" for name in (*SOCKETS, *URLS))
        raise ValueError(f"Dask knows no protocol {protocol!r}; it knows {known}")
    if not host or re.search(r"\s", host):
        raise ValueError(f"{host!r} is no host" if host else "it has no host")
    if not 0 < port < 2**16:
        raise ValueError(f"{port} is no port: ports are numbers from 1 to 65535")
    return host, port


def _socket(rest: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``, or ``[IPv6]:PORT``."""
    if not rest:
        raise ValueError("it has no host")
    found = re.fullmatch(
        r"(?:\[(?P<six>[^\[\]]*)\]|(?P<name>[^\[\]]*?))(?::(?P<port>[^:\]]*))?", rest
    )
    if found is None or ":" in (found["name"] or ""):
        raise ValueError("a host with colons (IPv6) needs brackets, such as tcp://[::1]:8786")
    if found["port"] is None:
        raise ValueError("it has no port")
    if not re.fullmatch("-?[0-9]+", found["port"]):
        raise ValueError(f"{found['port']!r} is no port")
    return found["six"] or found["name"] or "", int(found["port"])
