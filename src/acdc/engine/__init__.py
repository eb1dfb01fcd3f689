"""The sparse phase on a CPU: one memory layout, native kernels for it, and the same in PyTorch."""
