"""What the tests share. Modules of this package hold no tests, except ``sanitized.py``."""
