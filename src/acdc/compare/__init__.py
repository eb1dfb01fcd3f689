"""A comparison: methods x sparsities x seeds on one task, every cell a run of its own.

``grid`` says what is compared, ``cells`` what that comes to, ``work`` trains it, ``results`` reads
what came out, ``page`` shows it.
"""

from __future__ import annotations

from acdc.compare.grid import Budget, Candidate, Grid, GridMethod, Task

__all__ = ["Budget", "Candidate", "Grid", "GridMethod", "Task"]
