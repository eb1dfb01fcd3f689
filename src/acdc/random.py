"""From a seed to a stream of random numbers: the one rule.

A stream is named by words, such as ``("order", seed, epoch)``. So everything random is a function
of the seed and of a place in the run, and a resumed run needs no state of any generator.
"""

from __future__ import annotations

import hashlib

import torch


def seed_of(*words: str | int) -> int:
    """Return a seed below 2⁶³ that is a hash of ``words``, the same in every process."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def stream(*words: str | int) -> torch.Generator:
    """Return a fresh CPU generator for ``words``.

    The same words give the same numbers in every process; other words give unrelated numbers. The
    global generators are neither read nor moved.
    """
    # torch's CPU generator uses the low 32 bits of its seed: among the 47,000 steps of a long run
    # two may share a stream. They still hold different images, so nothing notices.
    return torch.Generator().manual_seed(seed_of(*words))
