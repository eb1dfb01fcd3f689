"""Sharded weights on 2 and 4 ranks: the checks of ``support.shards``, one test each."""

from __future__ import annotations

import pytest

from support import shards

shards.load()
SHORT = [name for name, (_, long, _) in shards.checks.items() if not long]


@pytest.fixture(scope="module")
def said(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """Run the checks that are wanted once, in one process."""
    wanted = [
        item.callspec.params["name"] for item in request.session.items if item.path == request.path
    ]
    return shards.report(tmp_path_factory.mktemp("shards"), wanted)


@pytest.mark.parametrize("name", SHORT)
def test_on_ranks(said: dict[str, list[str]], name: str) -> None:
    assert said[name] == [""] * len(said[name])
