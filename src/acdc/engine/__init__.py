"""Sparse training on a CPU: a memory layout, compiled kernels, and their reference in PyTorch."""
