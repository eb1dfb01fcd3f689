"""Which processes share masks: those of one DistributedDataParallel, or of ``process_group``.

The processes are those of ``support/groups.py``, which tries everything once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support import gloo, groups
from support.groups import CASES, Seen
from support.helpers import CUTS, REVIVAL, TOTAL, build

pytestmark = pytest.mark.slow

CHANGES = len((*CUTS, REVIVAL))
HASHED = 8 * 5  # bytes that a process sends at a change: five numbers


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Seen]]:
    """Name of a case -> what each rank saw."""
    folder = tmp_path_factory.mktemp("groups")
    gloo.run("support.groups", folder)
    return {
        case: [torch.load(folder / f"{case}.{rank}.pt") for rank in range(world)]
        for case, (world, _) in CASES.items()
    }


def test_several_seeds_without_ddp_train_as_each_would_alone(found: dict[str, list[Seen]]) -> None:
    for rank, seen in enumerate(found["seeds"]):
        alone = found["alone"][0][str(rank)]
        assert seen["digests"] == alone["digests"]
        assert all(map(torch.equal, seen["weights"].values(), alone["weights"].values()))
        assert seen["sent"] == ({"broadcast": [], "all_gather": []}, 0)
        assert alone["warned"] == []
    first, second = (seen["digests"] for seen in found["seeds"])
    assert first[CUTS[0] - 1] != second[CUTS[0] - 1]


def test_a_warning_says_that_masks_are_not_shared(found: dict[str, list[Seen]]) -> None:
    for seen in found["seeds"]:
        ((said, file),) = seen["warned"]
        assert "this process chooses its masks alone" in said
        assert "process_group=torch.distributed.group.WORLD" in said
        assert Path(file).name == "groups.py"  # the line of the user


def test_an_engine_of_one_process_waits_for_no_other(found: dict[str, list[Seen]]) -> None:
    for seen in found["one engine"]:
        assert len(seen["digests"]) == TOTAL
        assert len(set(seen["digests"])) > 1


def test_under_ddp_equal_masks_are_compared_and_not_sent(found: dict[str, list[Seen]]) -> None:
    first, second = found["ddp"]
    assert first["digests"] == second["digests"]
    for seen in found["ddp"]:
        assert seen["sent"] == ({"broadcast": [], "all_gather": [HASHED] * CHANGES}, 0)
        assert seen["warned"] == []


def test_masks_that_differ_are_sent_as_bits(found: dict[str, list[Seen]]) -> None:
    first, second = found["differing"]
    assert first["digests"] == second["digests"]
    assert not all(map(torch.equal, first["weights"].values(), second["weights"].values()))
    size = sum(-(-numel // 8) for numel in first["numels"])
    for seen in found["differing"]:  # not at the revival, after which all masks are full
        sent = {"broadcast": [size] * len(CUTS), "all_gather": [HASHED] * CHANGES}
        assert seen["sent"] == (sent, 0)


def test_two_of_four_ranks_share_masks(found: dict[str, list[Seen]]) -> None:
    digests = [seen["digests"] for seen in found["subgroups"]]
    assert digests[0] == digests[1]
    assert digests[2] == digests[3]
    for step in CUTS:
        assert digests[0][step - 1] != digests[2][step - 1]
    for seen in found["subgroups"]:
        assert seen["warned"] == []
        assert "This process is not a member of process_group." in seen["stranger"]


@pytest.mark.parametrize(
    ("how", "shared", "warned"),
    [
        ("ddp", True, False), ("compiled", True, False), ("around", True, False),
        ("inside", False, True), ("alone", False, False), ("ddp, alone", False, False),
    ],
)  # fmt: skip
def test_ddp_is_seen_in_and_around_a_model(
    found: dict[str, list[Seen]], how: str, shared: bool, warned: bool
) -> None:
    for seen in found["wrappers"]:
        assert (seen[how][0], bool(seen[how][1])) == (shared, warned)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("parts", "DistributedDataParallel with 2 different process groups"),
        ("no group", "process_group is a str. It takes a process group"),
    ],
)
def test_a_group_that_cannot_be_meant_is_refused(
    found: dict[str, list[Seen]], how: str, words: str
) -> None:
    for seen in found["wrappers"]:
        assert words in seen[how]


def test_process_group_is_checked_without_processes() -> None:
    model = build()
    options: dict[str, Any] = {"process_group": 0}
    assert "process_group is a int. It takes a process group" in groups.refused(model, **options)
