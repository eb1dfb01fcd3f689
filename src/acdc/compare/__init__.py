"""A comparison: methods x sparsities x seeds on one task, every cell a run of its own.

``grid`` holds the values that describe a comparison, ``cells`` derives the runs, ``work`` plans
their training, ``pool`` and ``cluster`` train them, ``results`` collects the results.
``acdc.pages.comparison`` draws the page.
"""

from __future__ import annotations

from acdc.compare.grid import Budget, Candidate, Grid, GridMethod, Task

__all__ = ["Budget", "Candidate", "Grid", "GridMethod", "Task"]
