"""A whole AC/DC run, half of its epochs sparse, beside a dense run of the same epochs.

    python benchmarks/run.py [--epochs N] [--samples N] [--sparsity S] [--repeats N] [--threads N]

The same as ``acdc bench run``, with its figures in ``results/run.json``.
"""

from __future__ import annotations

import sys

from acdc.cli import main
from common import RESULTS

if __name__ == "__main__":
    sys.exit(main(["bench", "run", "--json", str(RESULTS / "run.json"), *sys.argv[1:]]))
