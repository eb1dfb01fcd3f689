"""DistributedDataParallel reduces the gradients of kept weights alone, on two and three ranks.

The ranks are those of ``support/kept_ranks.py``, which trains every case with the hook and without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support import gloo
from support.kept_ranks import CASES

FLOAT = 4  # bytes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[Any, Any]]]:
    """What each rank saw, by the number of ranks."""
    folder: Path = tmp_path_factory.mktemp("kept")
    gloo.run("support.kept_ranks", folder)
    return {
        world: [torch.load(folder / f"{world}.{rank}.pt") for rank in range(world)]
        for world in (2, 3)
    }


def flat(steps: list[list[torch.Tensor | None]]) -> torch.Tensor:
    return torch.cat([t.flatten() for step in steps for t in step if t is not None])


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_bit_for_bit_as_without(name: str, found: dict[int, Any]) -> None:
    for rank in found[2]:
        plain, kept = rank[name, False], rank[name, True]
        for what in ("grads", "weights"):
            bits = [flat(seen[what]).view(torch.int32) for seen in (plain, kept)]
            assert torch.equal(*bits), what  # the sign of a zero, too
        assert plain["digest"] == kept["digest"] == found[2][0][name, True]["digest"]


@pytest.mark.parametrize("name", CASES)
def test_a_sparse_step_sends_what_is_kept_and_no_more(name: str, found: dict[int, Any]) -> None:
    seen = found[2][0][name, True]
    size = FLOAT // 2 if name == "fp16" else FLOAT
    sparse = 0
    for kept, sent, whole in zip(seen["kept"], seen["sent"], seen["whole"], strict=True):
        assert whole == FLOAT * seen["numel"]
        pruned = 0 if kept is None else seen["prunable"] - kept
        assert sent == size * (seen["numel"] - pruned)
        sparse += kept is not None
    expected = {"rigl": 6, "topkast": 0, "str": 9}
    assert sparse == expected.get(name, 5)
    assert sum(seen["sparse"]) == (5 if name == "engine" else 0)


def test_a_segment_sends_its_gradients_before_the_one_before_it_is_computed(
    found: dict[int, Any],
) -> None:
    for rank in found[2]:
        seen = rank["overlapped"]
        assert seen["active"]
        assert len(seen["layers"]) == 4
        at = seen["order"].index("passed")
        assert "reduced" in seen["order"][:at]
        assert "reduced" in seen["order"][at:]


def test_three_ranks_train_the_same_but_for_rounding(found: dict[int, Any]) -> None:
    for rank in found[3]:
        torch.testing.assert_close(
            *(flat(rank["plain", on]["weights"]) for on in (False, True)), rtol=1e-5, atol=1e-6
        )
        assert rank["plain", True]["digest"] == found[3][0]["plain", True]["digest"]
        assert torch.equal(*(flat(each["plain", True]["weights"]) for each in (rank, found[3][0])))


def test_without_the_sparsifier_all_gradients_are_sent(found: dict[int, Any]) -> None:
    assert all(rank["removed"]["outside"] > 0 for rank in found[2])


def test_a_rank_may_have_fewer_batches_in_a_phase(found: dict[int, Any]) -> None:
    assert [rank["uneven"] for rank in found[2]] == 2 * [{"equal": True}]


def test_a_hook_that_needs_whole_gradients_serves_dense_phases(found: dict[int, Any]) -> None:
    first, second = (rank["power"] for rank in found[2])
    assert torch.equal(flat(first["weights"]), flat(second["weights"]))
    for kept, sent in zip(first["kept"], first["sent"], strict=True):
        pruned = 0 if kept is None else first["prunable"] - kept
        assert sent == FLOAT * (first["numel"] - pruned)


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("second_hook", "has a communication hook already"),
        ("not_wrapped", "was given a Net"),
        ("another_model", "has no weight 'conv1.weight' of the sparsifier"),
        ("not_shared", "do not share the masks of this sparsifier"),
    ],
)
def test_what_cannot_be_done_is_refused(case: str, sentence: str, found: dict[int, Any]) -> None:
    assert sentence in found[2][0]["refused"][case]
