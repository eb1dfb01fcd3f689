"""Training on several ranks: what a sparsifier needs beside ``torch.distributed`` itself."""

from acdc.distributed.kept import KeptReduction, reduce_kept

__all__ = ["KeptReduction", "reduce_kept"]
