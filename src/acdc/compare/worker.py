"""A worker, the process that trains one cell: ``python -m acdc.compare.worker REQUEST``.

REQUEST is JSON: the grid's function, the cell, its epochs, the folder. The worker writes a line of
JSON to standard output for every message about its progress, and one when it ends. It stops when
its standard input ends, because then the process that started it is gone.
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
from acdc.compare.work import WATCHED_EVERY, train_cell
from acdc.runs import train


def main(request: dict[str, Any]) -> None:
    """Train the cell, and send how it ended."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(
        sys.stderr.fileno(), sys.stdout.fileno()
    )  # keeps prints of libraries out of the messages
    sent = 0.0

    def send(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    def watch(share: float) -> None:
        nonlocal sent
        if time.monotonic() - sent > WATCHED_EVERY:
            sent = time.monotonic()
            send(share=share)

    run = prepare(locate(request["grid"]), Cell(**request["cell"]), request["epochs"])
    try:
        folder = Path(request["folder"])
        reason = train_cell(run, folder, request["device"], request["command"], watch)
    except train.Interrupted:
        send(end="stopped")
    else:
        send(end="failed", reason=reason) if reason else send(end="done")


def _stop_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin: Python aborts at exit while a thread holds its lock
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
