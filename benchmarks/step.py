"""A whole training step and its memory: the engine beside dense PyTorch.

    python benchmarks/step.py [--case TEXT] [--sparsity S] [--repeats N] [--threads N]

The same as ``acdc bench step``, with its figures in ``results/step.json``. SparseProp takes part
where it is installed (``pip install sparseprop``).
"""

from __future__ import annotations

import sys

from acdc.cli import main
from common import RESULTS

if __name__ == "__main__":
    sys.exit(main(["bench", "step", "--json", str(RESULTS / "step.json"), *sys.argv[1:]]))
