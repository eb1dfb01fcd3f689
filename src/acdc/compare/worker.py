"""The process that trains one cell: ``python -m acdc.compare.worker ORDER``.

ORDER is JSON: the grid's function, the cell, its epochs, the folder. It writes a line of JSON to
standard output for every bit of progress, and one when it ends. It stops when its standard input
ends, because then the process that gave the order is no more.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from acdc.compare.cells import Cell, prepare
from acdc.compare.grid import locate
from acdc.compare.work import train_cell
from acdc.runs import train


def main(order: dict[str, Any]) -> None:
    """Train the cell, and say how it ended."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no message
    told = 0.0

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    def watch(share: float) -> None:
        nonlocal told
        if time.monotonic() - told > 0.25:
            told = time.monotonic()
            say(share=share)

    run = prepare(locate(order["grid"]), Cell(**order["cell"]), order["epochs"])
    try:
        reason = train_cell(run, Path(order["folder"]), order["device"], order["command"], watch)
    except train.Interrupted:
        say(end="stopped")
    else:
        say(end="failed", reason=reason) if reason else say(end="done")


def _stop_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin: Python dies at its end while a thread waits for that
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
