"""Something goes wrong in one of several processes: all end within seconds, with a sentence.

The processes are those of ``support/ranks.py``, which tries everything once.
"""

from __future__ import annotations

import json

import pytest

from support import gloo
from support.ranks import CASES

End = tuple[int | None, str]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[End]]:
    """What happens -> exit code and standard error of each rank; None: it did not end."""
    printed = gloo.run("support.ranks", tmp_path_factory.mktemp("ranks"))
    result: dict[str, list[End]] = json.loads(printed)
    assert result.keys() == CASES.keys()
    return result


def test_with_nothing_wrong_all_train_to_the_end(found: dict[str, list[End]]) -> None:
    assert [code for code, _ in found["nothing"]] == [0, 0]


ENDED = {
    "killed": -9, "killed, of four": -9, "terminated": -15, "raised": 1, "fewer batches": 0,
}  # fmt: skip


@pytest.mark.parametrize("what", ENDED)
def test_the_others_say_that_a_process_has_ended(what: str, found: dict[str, list[End]]) -> None:
    *others, (code, said) = found[what]
    assert code == ENDED[what], said
    assert what != "raised" or "the data of this rank are broken" in said
    for rank, (other, why) in enumerate(others):
        assert other == 2, why
        sentence = f"Rank {rank} cannot change the support after step 2: another process has ended"
        assert sentence in why


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("another sparsity", "is after step 2 and keeps 178", "is after step 2 and keeps"),
        ("another model", "is after step 2 and keeps", "is after step 2 and keeps"),
        ("another schedule", "is after step 2 and keeps", "is after step 3 and keeps"),
    ],
)
def test_processes_that_do_not_agree_all_say_so(
    what: str, first: str, second: str, found: dict[str, list[End]]
) -> None:
    ends = found[what]
    assert [code for code, _ in ends] == [2, 2], ends
    for number, (_, said) in enumerate(ends):
        mine, other = (first, second) if number == 0 else (second, first)
        assert f"The processes do not agree: rank {number} {mine}" in said
        assert f"rank {1 - number} {other}" in said


def test_a_nan_on_one_rank_ends_all_that_share_masks_with_its_sentence(
    found: dict[str, list[End]],
) -> None:
    *others, (code, said) = found["nan"]
    assert code == 2, said
    assert said.startswith("The score")
    for other, why in others:
        assert other == 2, why
        assert why == f"Rank 2 could not choose a support after step 2: {said}"


def test_a_nan_on_one_rank_under_ddp_ends_all_with_the_sentence(
    found: dict[str, list[End]],
) -> None:
    first, last = found["nan, under ddp"]
    assert first == last
    assert first[0] == 2
    assert first[1].startswith("The score")


def test_a_nan_ends_no_rank_that_trains_a_model_of_its_own(found: dict[str, list[End]]) -> None:
    (code, _), (last, said) = found["nan, alone"]
    assert (code, last) == (0, 2), said
    assert said.startswith("The score")
