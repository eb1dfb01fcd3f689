"""Errors that are sentences: what was given, what is allowed, what to do."""

from __future__ import annotations

# What an installer calls acdc: on the package index, ``acdc`` is another program.
DISTRIBUTION = "acdc-train"


class AcdcError(Exception):
    """Every error that acdc raises on purpose. The message is for the user, as it stands."""


class InputError(AcdcError, ValueError):
    """An argument or a file that cannot work. The command line exits with code 2."""


class MissingDependency(AcdcError, ImportError):
    """An optional package is missing. The message holds the exact install line."""


def need(package: str, extra: str) -> MissingDependency:
    """Return the error for an optional ``package`` that the extra ``extra`` installs."""
    return MissingDependency(
        f"This needs the package {package!r}, which is not installed. "
        f'Install it with: pip install "{DISTRIBUTION}[{extra}]"'
    )
