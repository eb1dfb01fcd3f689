"""Convergence: iterative hard thresholding, plain, stochastic and alternating, beside bounds.

``docs/convergence.md`` states the bounds T0 to T3 and proves them.
"""
