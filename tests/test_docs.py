"""The documentation: its code runs, its picture is of a committed page, its links lead to files."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from acdc.pair import Pair
from acdc.support import Support

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # a benchmark imports its neighbours by name
HOW_TO = sorted((ROOT / "docs" / "howto").glob("*.md"))
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *HOW_TO,
]
# How-to -> the packages that its script needs, and what the script prints at the end.
SCRIPTS = {
    "language_models": (["transformers", "onnxruntime"], "both lengths agree"),
    "quantize": (["onnxruntime"], "weights were pruned"),
}

HOWTO = ROOT / "docs" / "howto"


def the_reader() -> Callable[[Path], dict[str, np.ndarray]]:
    """Return the function of docs/formats.md, which does not use acdc."""
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert not re.search(r"import.*\b(acdc|torch)\b", code)
    names: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {}
    exec(code, names)
    return names["read_sparse"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_reader_in_the_documentation_reads_what_a_pair_writes(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "conv.weight": (6, 3, 3, 3),
        "fc.weight": (5, 16),
        "gain": (11,),
        "deep.conv.weight": (4, 2, 3),
        "empty.weight": (3, 7),
    }
    state = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    masks = {name: torch.rand(shape, generator=draw) < 0.3 for name, shape in shapes.items()}
    masks["empty.weight"][:] = False
    for name, mask in masks.items():
        state[name].masked_fill_(~mask, 0.0)
    state["fc.weight"][masks["fc.weight"]] = torch.tensor(0.0, dtype=dtype)  # kept, and zero
    state |= {
        "tied.weight": state["conv.weight"],
        "fc.bias": torch.randn(5, generator=draw).to(dtype),
        "norm.steps": torch.tensor(7),
        "fc.shape": torch.tensor([1, 2]),  # in the way of the prefix that comes first to mind
    }
    Pair(state, state, Support(masks)).save(tmp_path)

    found = the_reader()(tmp_path / "sparse.safetensors")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.numpy().dtype
        assert found[name].shape == tuple(tensor.shape)
        assert found[name].tobytes() == tensor.numpy().tobytes()


def test_the_picture_of_the_readme_is_that_of_its_page() -> None:
    draw = runpy.run_path(str(ROOT / "docs" / "images" / "draw.py"))
    drawing = draw["drawing"](draw["PAGE"].read_text(encoding="utf-8"))
    assert drawing == draw["OUT"].read_text(encoding="utf-8"), "run python docs/images/draw.py"
    assert "](docs/images/accuracy.svg)" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [*PAGES, *sorted(HOWTO.glob("*.md"))], ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    inside = [link.partition("#")[0] for link in links if not link.startswith("http")]
    assert [link for link in inside if link and not (page.parent / link).exists()] == []


def test_the_readme_names_the_pages_of_the_documentation() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT) for page in PAGES[3:]]
    assert [str(page) for page in pages if f"({page})" not in text] == []


ALONE = [page for page in HOW_TO if page.stem != "serve"]  # a server: tests/test_serve.py runs it


@pytest.mark.parametrize("page", ALONE, ids=lambda page: page.name)
def test_the_script_of_a_how_to_runs_in_an_empty_folder(page: Path, tmp_path: Path) -> None:
    """The first Python block of a how-to is complete."""
    packages, printed = SCRIPTS.get(page.stem, ([], ""))
    for package in packages:
        pytest.importorskip(package)
    code, *_ = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "script.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert printed in done.stdout


def test_the_table_of_quantized_twins_is_that_of_its_command() -> None:
    quantize = runpy.run_path(str(ROOT / "benchmarks" / "quantize.py"))
    stored = json.loads((ROOT / "benchmarks" / "results" / "quantize.json").read_text())
    rows = [quantize["Row"](**row) for row in stored["rows"]]
    assert quantize["table"](rows) in (HOWTO / "quantize.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore")  # torch's own tool is deprecated, and says so at length
def test_symmetric_codes_keep_every_zero_and_others_keep_every_value() -> None:
    """What the page says in words, counted anew."""
    pytest.importorskip("onnxruntime")
    rows = list(runpy.run_path(str(ROOT / "benchmarks" / "quantize.py"))["rows"]())
    asymmetric = ("uint8", "WeightSymmetric=False", "affine", ", asymmetric")
    assert len(rows) >= 12
    for row in rows:
        assert row.pruned == row.values > 50_000
        if any(word in row.scheme for word in asymmetric):
            assert row.codes < row.pruned
        else:
            assert row.codes == row.pruned


def test_the_promises_name_tests_that_exist() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)(?: -k (\"[^\"]+\"|\w+))?`", text)
    assert len(named) > 15
    for file, words in named:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        tests = " ".join(re.findall(r"def (test_\w+)", source))
        missing = [word for word in words.strip('"').split(" or ") if word not in tests]
        assert not missing, f"{file} has no test with {missing} in its name"
