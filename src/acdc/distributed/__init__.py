"""Training on several ranks: what a sparsifier needs beside ``torch.distributed`` itself."""
