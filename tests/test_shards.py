"""Sharded weights on 2 and 4 ranks: the checks of ``support.shards``, one test each."""

from __future__ import annotations

import pytest

from support import shards

shards.load()


def every() -> list[object]:
    """Return the names of the checks; long ones are for ``make test-distributed``."""
    marks = {True: pytest.mark.distributed, False: pytest.mark.slow}
    return [pytest.param(name, marks=marks[long]) for name, (_, long, _) in shards.checks.items()]


@pytest.fixture(scope="module")
def said(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """Run the checks that are wanted, all in one process; return what their ranks said."""
    items = [item for item in request.session.items if item.path == request.path]
    wanted = [item.callspec.params["name"] for item in items if hasattr(item, "callspec")]
    return shards.report(tmp_path_factory.mktemp("shards"), wanted)


@pytest.mark.parametrize("name", every())
def test_on_ranks(said: dict[str, list[str]], name: str) -> None:
    assert said[name] == [""] * len(said[name]), "\n".join(said[name])
