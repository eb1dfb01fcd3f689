"""Single layers, forward and backward: the engine beside dense PyTorch and other libraries.

    python benchmarks/layers.py [--caches emptied] [--case TEXT] [--sparsity S] [--repeats N]

The same as ``acdc bench layers``, with its figures in ``results/layers.json``, or, with emptied
caches, in ``results/layers_emptied.json``. SparseProp and
SparseLab take part where they are installed (``pip install sparseprop sparselab``).
"""

from __future__ import annotations

import sys

from acdc.cli import main
from common import RESULTS

if __name__ == "__main__":
    file = "layers_emptied.json" if "emptied" in sys.argv[1:] else "layers.json"
    sys.exit(main(["bench", "layers", "--json", str(RESULTS / file), *sys.argv[1:]]))
