"""Shared code of the tests. Modules of this package hold no tests, except ``sanitized.py``."""
