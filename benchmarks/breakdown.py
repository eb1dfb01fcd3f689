"""Where the time of a training step on the engine goes, beside dense PyTorch.

    python benchmarks/breakdown.py [--case TEXT] [--sparsity S] [--repeats N] [--threads N]

The same as ``acdc bench where``, with its figures in ``results/breakdown.json``.
"""

from __future__ import annotations

import sys

from acdc.cli import main
from common import RESULTS

if __name__ == "__main__":
    sys.exit(main(["bench", "where", "--json", str(RESULTS / "breakdown.json"), *sys.argv[1:]]))
