"""Sharded weights on 2 and 4 ranks: the checks of ``support.shards``, one test each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from support import shards

shards.load()


def every() -> list[object]:
    """Return the names of the checks; long ones are for ``make test-distributed``."""
    marks = {True: pytest.mark.distributed, False: pytest.mark.slow}
    return [
        pytest.param(name, marks=marks[long])
        for name, (_, long, _) in shards.checks.items()
        if name not in shards.ENDING | shards.CRASHING
    ]


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], list[str]]]:
    """Run a check; return what its ranks said."""
    with shards.started(tmp_path_factory.mktemp("shards")) as ask:
        yield ask


@pytest.mark.parametrize("name", every())
def test_on_ranks(check: Callable[[str], list[str]], name: str) -> None:
    said = check(name)
    assert said == [""] * len(said), "\n".join(said)


@pytest.mark.slow
def test_a_rank_that_crashes_says_where(check: Callable[[str], list[str]]) -> None:
    (said,) = check("crashes[1]")
    assert said.startswith("ended with -6: Fatal Python error: Aborted")
    assert "in crashes\n" in said


@pytest.mark.distributed
@pytest.mark.parametrize("name", sorted(shards.ENDING))
def test_no_rank_waits_for_ever(check: Callable[[str], list[str]], name: str) -> None:
    said = check(name)
    assert any(said)
    assert all("ended with None" not in text for text in said), "\n".join(said)
    assert all("as if nothing had happened" not in text for text in said), "\n".join(said)
