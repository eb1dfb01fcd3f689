"""Sparsifiers for trainers that own the loop: Lightning, transformers and accelerate.

Each trainer has a module of its own, so that a user of one trainer needs none of the others. The
modules share :mod:`acdc.integrations.shared`.
"""
