"""Methods: when the support changes, and to what. One final class per paper and file."""

from acdc.methods.acdc import ACDC
from acdc.methods.base import Method
from acdc.methods.dense import Dense

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (ACDC, Dense)}
"""Every method by its name."""
