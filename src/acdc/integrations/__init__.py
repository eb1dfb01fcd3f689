"""Sparsifiers for trainers that own the loop: Lightning, transformers and accelerate.

One module a trainer, each imported by the users of that trainer alone. What they share is in
:mod:`acdc.integrations.shared`.
"""
