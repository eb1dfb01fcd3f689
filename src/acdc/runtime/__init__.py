"""Inference on the kept weights of a finished network: ``docs/runtime.md``."""
