"""The distribution: its name, its version and its extras are the same wherever they are written."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import acdc
from acdc.errors import DISTRIBUTION, need

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
TEXTS = [
    path
    for pattern in ("*.md", "*.toml", "*.cff", "Makefile", "docs/**/*.md", "src/**/*.py")
    for path in sorted(ROOT.glob(pattern))
]


def test_the_name_is_that_of_the_installed_distribution() -> None:
    assert PROJECT["name"] == DISTRIBUTION == "acdc-train"
    assert metadata.metadata(DISTRIBUTION)["Name"] == DISTRIBUTION
    (command,) = metadata.distribution(DISTRIBUTION).entry_points
    assert (command.name, command.value) == ("acdc", "acdc.cli:main")


def test_the_version_is_written_the_same_everywhere() -> None:
    cited = re.search(r'^version: "(.*)"$', (ROOT / "CITATION.cff").read_text("utf-8"), re.M)
    assert cited is not None
    found = {PROJECT["version"], acdc.__version__, metadata.version(DISTRIBUTION), cited[1]}
    assert found == {acdc.__version__}


def test_no_text_tells_anyone_to_install_the_other_acdc() -> None:
    """The package ``acdc`` of PyPI is a search for strings, by other authors."""
    other = re.compile(r"\bacdc\[|pip install (-\S+ )*[\"']?acdc(?![\w-])")
    assert other.search('pip install "acdc[lab]"')
    assert other.search("pip install --upgrade acdc")
    assert not other.search('pip install "acdc-train[lab]"')
    found = [path.name for path in TEXTS if other.search(path.read_text("utf-8"))]
    assert found == []
    assert len(TEXTS) > 150


def test_every_extra_that_a_text_names_exists() -> None:
    named = set()
    for path in TEXTS:
        for extras in re.findall(r"acdc-train\[([\w,]+)\]", path.read_text("utf-8")):
            named |= set(extras.split(","))
        named |= set(re.findall(r'\bneed\("?[\w.]+"?, "(\w+)"\)', path.read_text("utf-8")))
    assert named - EXTRAS == set()
    assert {"lab", "onnx", "imagenet"} <= named
    assert 'pip install "acdc-train[onnx]"' in str(need("onnx", "onnx"))


def test_the_versions_of_a_record_are_read_without_a_distribution() -> None:
    """As in a clone whose ``src`` is in PYTHONPATH: a run there writes its record, too."""
    code = (
        "import importlib.metadata as m\n"
        "read = m.version\n"
        "def version(name):\n"
        "    if name.startswith('acdc'):\n"
        "        raise m.PackageNotFoundError(name)\n"
        "    return read(name)\n"
        "m.version = version\n"
        "from acdc.runs.record import versions\n"
        "print(versions()['acdc'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == acdc.__version__
