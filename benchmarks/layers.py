"""Single layers, forward and backward: the engine beside dense PyTorch and other libraries.

    python benchmarks/layers.py [--case TEXT] [--sparsity S] [--repeats N] [--threads N]

The same as ``acdc bench layers``, with its figures in ``results/layers.json``. SparseProp and
SparseLab take part where they are installed (``pip install sparseprop sparselab``).
"""

from __future__ import annotations

import sys

from acdc.cli import main
from common import RESULTS

if __name__ == "__main__":
    sys.exit(main(["bench", "layers", "--json", str(RESULTS / "layers.json"), *sys.argv[1:]]))
