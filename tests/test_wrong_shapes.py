"""Files that are read, with each key of each of them wrong: a sentence, and never a traceback."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from acdc.cli import main
from acdc.index import Twin
from acdc.pages import figure
from acdc.result import Result
from acdc.states import load_into
from support.damage import COMMANDS, Files

# All of them with ACDC_FULL=1, and in 'make soak'; else one of so many.
ONE_OF = 1 if os.environ.get("ACDC_FULL") else 40


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


def no_onnx(model: nn.Module, example: Tensor, path: Path, result: Result, twin: Twin) -> None:
    load_into(model, result.state(twin), result.index.noun)
    model(example)


@pytest.fixture(autouse=True)
def no_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take two seconds a page, and ONNX ten; 'make soak' draws the figures."""
    monkeypatch.setattr(figure, "_svg", lambda *_: "")
    monkeypatch.setattr("acdc.export.to_onnx", no_onnx)


def chosen(names: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield some of the mutants: always the same ones."""
    for name, text in names:
        if zlib.crc32(name.encode()) % ONE_OF == 0:
            yield name, text


@pytest.mark.parametrize("file", COMMANDS)
def test_every_wrong_key_is_a_sentence(
    file: str, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    path = files.root / file
    healthy = path.read_bytes()
    tried, refused, wrong = 0, 0, []
    try:
        for name, text in chosen(files.mutants(file)):
            for command in COMMANDS[file]:
                path.write_bytes(text.encode("utf-8", "surrogateescape"))
                try:
                    code: Any = main(files.words(command))
                except BaseException as error:
                    code = repr(error)
                err = " ".join(capsys.readouterr().err.split())
                tried += 1
                refused += code == 2
                if code not in (0, 2) or (code == 2 and "error: " not in err):
                    wrong.append((name, command, code))
                if code == 2 and path.name not in err and "pair" not in err:
                    wrong.append((name, command, err))
            files.restore()
    finally:
        path.write_bytes(healthy)
    print(f"{file}: {tried} tried, {refused} refused")
    assert not wrong, wrong[:10]
    # A damaged line of the metrics is left out, and a damaged run of a grid is a failed cell.
    assert refused > tried // 10 or "metrics" in file or "grid/small/runs" in file
