"""The server of docs/howto/serve.md, alone and behind gunicorn."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import acdc

HOW_TO = Path(__file__).parent.parent / "docs" / "howto" / "serve.md"
LIMIT = 60.0  # seconds until the server answers

for package in ("fastapi", "uvicorn", "gunicorn", "uvicorn_worker", "prometheus_client"):
    pytest.importorskip(package)


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.masked_fill_(torch.rand_like(layer.weight) > 0.2, 0.0)
    return net.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script and the file of a network."""
    path: Path = tmp_path_factory.mktemp("serve")
    (code,) = re.findall(r"```python\n(.*?)```", HOW_TO.read_text(encoding="utf-8"), re.DOTALL)
    (path / "serve.py").write_text(code)
    acdc.Runtime(network(), torch.randn(1, 1, 8, 8)).save(path / "net.acdcrt")
    return path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def served(folder: Path, *command: str) -> Iterator[str]:
    """Run a server, and yield its address when it answers."""
    address = f"http://127.0.0.1:{command[-1].rpartition(':')[2]}"
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "serve:app"], cwd=folder, stdout=output, stderr=output,
            env={**os.environ, "MODEL": "net.acdcrt", "HANDLES": "2"},
        )  # fmt: skip
    try:
        until = time.monotonic() + LIMIT
        while True:
            try:
                get(f"{address}/")
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


def post(url: str, body: Any) -> tuple[int, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def check(address: str) -> None:
    """Many requests at the same time, of several sizes, are answered as PyTorch does."""
    net, generator = network(), torch.Generator().manual_seed(1)
    batches = [torch.randn(1 + i % 3, 1, 8, 8, generator=generator) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda x: post(f"{address}/predict", {"samples": x.tolist()}), batches)
        )
    for x, (status, answer) in zip(batches, answers, strict=True):
        assert status == 200, answer
        with torch.no_grad():
            expected = net(x)
        found = torch.tensor(answer["outputs"])
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert answer["classes"] == found.argmax(1).tolist()


def test_requests_at_the_same_time_and_wrong_ones(folder: Path) -> None:
    with served(folder, "uvicorn", "--port", str(free_port())) as address:
        check(address)
        for wrong in ([[1.0, 2.0]], [[[[0.0] * 8] * 8]] * 0, "text", [[1.0], [1.0, 2.0]]):
            status, answer = post(f"{address}/predict", {"samples": wrong})
            assert status == 422, (wrong, answer)
        check(address)  # no handle is lost: with two, four lost ones would have stopped it
        explained = json.loads(get(f"{address}/"))
        assert explained["input"] == ["batch", 1, 8, 8]
        assert "2 layers run sparse" in explained["layers"]
        metrics = get(f"{address}/metrics/")
        (count,) = re.findall(r"^compute_seconds_count (\S+)", metrics, re.MULTILINE)
        assert float(count) >= 48
        assert 'compute_seconds_bucket{le="+Inf"}' in metrics


def test_processes_that_gunicorn_forks_after_the_file_was_loaded(folder: Path) -> None:
    bind = f"127.0.0.1:{free_port()}"
    worker = "uvicorn_worker.UvicornWorker"
    options = ("gunicorn", "--preload", "--workers", "2", "--worker-class", worker, "--bind", bind)
    with served(folder, *options) as address:
        check(address)
