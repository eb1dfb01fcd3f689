"""The twins of a run: how alike two networks are, and what a dense twin is good for."""
