"""A run is killed before any system call that changes the disk, and ends as if it had not been.

``ACDC_FULL=1`` tries every call. ``make soak`` tries them at random, of more kinds of runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
FULL = bool(os.environ.get("ACDC_FULL"))


def killed_at_points(folder: Path, settings: dict[str, str], stride: int) -> dict[str, Any]:
    """Run ``kill_points.py`` and return what it found."""
    words = [sys.executable, "-m", "support.kill_points", str(folder), json.dumps(settings)]
    done = subprocess.run(
        [*words, str(stride)], cwd=TESTS, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_killed_before_any_call_that_changes_the_disk_it_ends_bitwise_the_same(
    tmp_path: Path,
) -> None:
    found = killed_at_points(tmp_path, {"bn_batches": "2"}, stride=1 if FULL else 50)
    assert not found["wrong"]
    assert found["tried"] > 3
    # The list of calls is whole: every kind of file, and every kind of call.
    for part in ("last.ckpt", "dense.safetensors", "pair.json", "record.json", "metrics.jsonl"):
        assert any(part in call for call in found["calls"]), part
    for kind in ("open", "fsync", "os.rename", "os.mkdir", "os.rmdir", "os.link"):
        assert any(call.startswith(kind) for call in found["calls"]), kind
