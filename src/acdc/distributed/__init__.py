"""Training on several ranks: what a sparsifier needs beside ``torch.distributed`` itself."""

from acdc.distributed.checkpoints import load, save
from acdc.distributed.kept import KeptReduction, reduce_kept
from acdc.distributed.results import pair, sparse_network

__all__ = ["KeptReduction", "load", "pair", "reduce_kept", "save", "sparse_network"]
