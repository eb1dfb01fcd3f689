"""What only a public CI runs is at least consistent: its workflow, its settings, the changelog."""

from __future__ import annotations

import re
import runpy
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import acdc

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["cibuildwheel"]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def jobs() -> dict[str, Any]:
    return yaml.safe_load(WORKFLOW.read_text("utf-8"))["jobs"]


def commands() -> list[str]:
    return [step["run"] for job in jobs().values() for step in job["steps"] if "run" in step]


def test_the_workflow_makes_targets_that_exist() -> None:
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    made = [target for line in commands() for target in re.findall(r"\bmake ([\w-]+)", line)]
    assert set(made) == {"test", "sanitize", "wheels"}
    assert set(made) <= set(targets)


def test_the_workflow_names_files_and_steps_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f for line in commands() for f in re.findall(r"\b(?:tests|tools)/\S+\.py", line)}
    assert files == {"tests/wheel_smoke.py"}
    assert all((ROOT / file).is_file() for file in files)
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool = runpy.run_path(str(ROOT / "tools" / "wheels.py"))
    named = {s for line in commands() for s in re.findall(r'STEPS="?([a-z ]+)"?', line)}
    assert {"source pure", "check"} == named
    assert {step for steps in named for step in steps.split()} <= set(tool["STEPS"])


def test_a_release_is_published_after_everything_and_from_a_tag_alone() -> None:
    work = jobs()
    publish = work.pop("publish")
    assert publish["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert publish["permissions"] == {"id-token": "write"}
    assert not any("id-token" in job.get("permissions", {}) for job in work.values())
    before, waiting = set(), list(publish["needs"])
    while waiting:
        name = waiting.pop()
        before.add(name)
        waiting += work[name].get("needs", [])
    assert before == set(work)


def test_every_action_has_a_version_and_every_download_an_upload() -> None:
    steps = [step for job in jobs().values() for step in job["steps"]]
    actions = [step["uses"] for step in steps if "uses" in step]
    assert len(actions) > 10
    assert [action for action in actions if not re.search(r"@(v\d+|release/v\d+)$", action)] == []
    uploads = {s["with"]["name"] for s in steps if "upload-artifact" in s.get("uses", "")}
    downloads = [s["with"] for s in steps if "download-artifact" in s.get("uses", "")]
    assert {wanted.get("name", "release") for wanted in downloads} <= uploads
    assert any(name.startswith("dist-") for name in uploads)


def test_the_settings_of_the_wheels_are_those_of_make_wheels() -> None:
    assert SETTINGS["environment"] == {"ACDC_REQUIRE_KERNELS": "1"}
    assert "--exclude libgomp.so.1" in SETTINGS["linux"]["repair-wheel-command"]
    assert {"cp311-*", "cp312-*"} <= set(SETTINGS["build"].split())
    (script,) = re.findall(r"\{project\}/(\S+)", SETTINGS["test-command"])
    assert (ROOT / script).is_file()


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    versions = re.findall(r"^## \[?([\w.]+)\]?", text, re.MULTILINE)
    assert versions[:2] in (["Unreleased", acdc.__version__], [acdc.__version__, versions[1]])
    kinds = set(re.findall(r"^### (.*)", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the tool runs in Python 3.11")
def test_a_step_that_does_not_exist_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool = runpy.run_path(str(ROOT / "tools" / "wheels.py"))
    monkeypatch.setattr(sys, "argv", ["wheels.py", "publish"])
    assert tool["main"]() == 2
    assert "'publish' is no step. The steps are source, pure" in capsys.readouterr().out
