"""The published phase tables, durations, tables, and every sentence of refusal."""

from __future__ import annotations

import doctest
import importlib
import json
from fractions import Fraction
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acdc.errors import InputError
from acdc.schedule import (
    Alternate,
    Constant,
    Phase,
    Plan,
    Schedule,
    Spans,
    alternate,
    constant,
    phases,
)

# --- the six published tables (epochs at which the network is cut, and at which it comes back) ----

PUBLISHED = {
    "imagenet100": (
        alternate(100, "10ep", "5ep", "5ep", "10ep", "15ep"),
        [10, 20, 30, 40, 50, 60, 70, 85],
        [15, 25, 35, 45, 55, 65, 75],
        Fraction(1, 2),
    ),
    "imagenet150": (
        alternate(150, "10ep", "5ep", "5ep", "10ep", "15ep"),
        [*range(10, 121, 10), 135],
        [*range(15, 126, 10)],
        Fraction(1, 2),
    ),
    "imagenet200": (
        alternate(200, "10ep", "5ep", "5ep", "10ep", "15ep"),
        [*range(10, 171, 10), 185],
        [*range(15, 176, 10)],
        Fraction(1, 2),
    ),
    "cifar100_freq20": (
        alternate(200, "10ep", "20ep", "20ep", last_sparse="30ep"),
        [10, 50, 90, 130, 170],
        [30, 70, 110, 150],
        Fraction(110, 200),
    ),
    "cifar100_dense13": (
        alternate(225, "10ep", "20ep", "13ep", last_sparse="50ep"),
        [10, 43, 76, 109, 142, 175],
        [30, 63, 96, 129, 162],
        Fraction(150, 225),
    ),
    "cifar10_memorisation": (
        alternate(200, "10ep", "20ep", "20ep", last_sparse="30ep"),
        [10, 50, 90, 130, 170],
        [30, 70, 110, 150],
        Fraction(110, 200),
    ),
}


def lengths_for(epochs: int, rule: int | str) -> list[int]:
    if isinstance(rule, int):
        return [rule] * epochs
    return [3 + (7 * epoch) % 5 for epoch in range(epochs)]


@pytest.mark.parametrize("rule", [1, 4, 391, "uneven"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_phases_epoch_by_epoch(name: str, rule: int | str) -> None:
    plan, cut, back, share = PUBLISHED[name]
    lengths = lengths_for(plan.epochs, rule)
    schedule = plan.resolve(rule if isinstance(rule, int) else lengths)

    starts = [0, *accumulate(lengths)]
    sparse = False
    for epoch in range(plan.epochs):  # what the authors' manager does at the start of every epoch
        assert not (epoch in cut and epoch in back)
        sparse = epoch in cut or (sparse and epoch not in back)
        kind = "sparse" if sparse else "dense"
        for step in (starts[epoch], starts[epoch + 1] - 1):
            assert schedule.phase_at(step).kind == kind, f"epoch {epoch}, step {step}"
    assert [p.start for p in schedule.phases if p.kind == "sparse"] == [starts[e] for e in cut]
    assert [p.start for p in schedule.phases if p.kind == "dense"] == [
        starts[e] for e in [0, *back]
    ]
    assert schedule.total == sum(lengths)
    if rule != "uneven":
        assert schedule.share("sparse") == share
        assert schedule.share("dense") == 1 - share


def test_last_phases_of_imagenet100() -> None:
    schedule = PUBLISHED["imagenet100"][0].resolve(10)
    assert schedule.last("dense") == Phase("dense", 750, 850)
    assert schedule.last("sparse") == Phase("sparse", 850, 1000)
    assert len(schedule.phases) == 16
    assert constant("dense", 3).resolve(2).last("sparse") is None


# --- durations ------------------------------------------------------------------------------------


def test_durations_in_epochs_steps_and_percent_agree() -> None:
    by_epoch = alternate(20, "2ep", "3ep", "1ep", "4ep", "3ep").resolve(10)
    by_step = alternate(20, "20st", "30st", "10st", "40st", "30st").resolve(10)
    by_share = alternate(20, "10%", "15%", "5%", "20%", "15%").resolve(10)
    mixed = alternate(20, "20 st", " 3ep", "5.0%", "4ep ", "30st").resolve(10)
    assert by_epoch == by_step == by_share == mixed
    assert [len(p) for p in by_epoch.phases] == [20, 30, 10, 30, 10, 30, 40, 30]


def test_fractions_of_an_epoch_round_once_and_never_drift() -> None:
    # Seven steps an epoch: half an epoch is 3.5 steps. The boundaries are rounded, not the lengths.
    schedule = alternate(4, "0.5ep", "0.5ep", "0.5ep", "1ep", "1ep").resolve(7)
    halves = [round(Fraction(7 * half, 2)) for half in (1, 2, 3, 4, 6, 8)]
    assert [p.stop for p in schedule.phases] == halves == [4, 7, 10, 14, 21, 28]


def test_short_phases_do_not_add_up_their_rounding() -> None:
    schedule = alternate(5, "0.3ep", "0.3ep", "0.3ep", "1ep", "1ep").resolve(7)  # 2.1 steps each
    assert [p.stop for p in schedule.phases[:-2]] == [round(2.1 * i) for i in range(1, 11)]


def test_uneven_epochs_are_met_exactly() -> None:
    schedule = phases(4, [("dense", "1ep"), ("sparse", "1.5ep"), ("dense", "1.5ep")]).resolve(
        [10, 4, 6, 3]
    )
    assert [(p.start, p.stop) for p in schedule.phases] == [(0, 10), (10, 17), (17, 23)]
    assert [schedule.epoch_at(s) for s in (0, 10, 17, 20, 23)] == [0, 1, Fraction(5, 2), 3, 4]


def test_phases_written_one_by_one() -> None:
    plan = phases(10, [("sparse", "50%"), ("dense", "20st"), ("sparse", "3ep")])
    assert [(p.kind, p.start, p.stop) for p in plan.resolve(10).phases] == [
        ("sparse", 0, 50),
        ("dense", 50, 70),
        ("sparse", 70, 100),
    ]
    assert constant("sparse", 2).resolve([3, 4]).phases == (Phase("sparse", 0, 7),)


def test_middle_may_be_empty_and_the_warmup_may_be_left_out() -> None:
    schedule = alternate(10, warmup="4ep", sparse="2ep", dense="2ep", last_sparse="4ep").resolve(1)
    assert [(p.kind, p.start, p.stop) for p in schedule.phases] == [
        ("dense", 0, 6),
        ("sparse", 6, 10),
    ]
    schedule = alternate(5, warmup="0ep", sparse="1ep", dense="1ep").resolve(2)
    assert [p.kind for p in schedule.phases] == ["sparse", "dense", "sparse", "dense", "sparse"]


def test_at_and_after_the_end_the_last_phase_goes_on() -> None:
    schedule = alternate(4, "1ep", "1ep", "1ep").resolve(5)
    last = schedule.phases[-1]
    assert [schedule.phase_at(s) for s in (19, 20, 10_000)] == [last] * 3
    assert schedule.phase_at(0) == schedule.phases[0]


# --- laws -----------------------------------------------------------------------------------------

DURATION = st.one_of(
    st.integers(0, 6).map(lambda n: f"{n}ep"),
    st.integers(0, 40).map(lambda n: f"{n}st"),
    st.decimals(0, 40, places=1).map(lambda n: f"{n}%"),
    st.sampled_from(["0.5ep", "1.25ep", "2.5st"]),
)


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    durations=st.lists(DURATION, min_size=5, max_size=5),
)
def test_phases_touch_alternate_and_fill_the_run(lengths: list[int], durations: list[str]) -> None:
    try:
        schedule = alternate(len(lengths), *durations).resolve(lengths)
    except InputError:
        return
    stops = [0, *(p.stop for p in schedule.phases)]
    assert [p.start for p in schedule.phases] == stops[:-1]
    assert all(a < b for a, b in pairwise(stops))
    assert stops[-1] == sum(lengths) == schedule.total == sum(len(p) for p in schedule.phases)
    assert all(a.kind != b.kind for a, b in pairwise(schedule.phases))
    assert schedule.phases[-1].kind == "sparse"
    assert schedule.share("dense") + schedule.share("sparse") == 1
    assert [schedule.phase_at(s) for p in schedule.phases for s in (p.start, p.stop - 1)] == [
        p for p in schedule.phases for _ in range(2)
    ]
    epochs = [schedule.epoch_at(step) for step in range(schedule.total + 1)]
    assert all(a < b for a, b in pairwise(epochs))
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


WHOLE = st.integers(1, 6)


@settings(max_examples=200, deadline=None)
@given(epochs=st.integers(1, 60), parts=st.tuples(WHOLE, WHOLE, WHOLE, WHOLE, WHOLE))
def test_a_misfit_names_lengths_that_fit(epochs: int, parts: tuple[int, ...]) -> None:
    warmup, sparse, dense, last_dense, last_sparse = parts
    durations = [f"{n}ep" for n in parts]
    room = epochs - warmup - last_dense - last_sparse
    fits = room == 0 or (room >= sparse and (room - sparse) % (sparse + dense) == 0)
    plan = alternate(epochs, *durations)
    if fits:
        assert plan.resolve(3).epochs == epochs
        return
    with pytest.raises(InputError) as caught:
        plan.resolve(3)
    if room < 0:
        assert "longer than the run" in str(caught.value)
        return
    sentence = str(caught.value).split("Set epochs to ")[1].split(",")[0]
    named = [int(word) for word in sentence.split(" or ")]
    assert len(named) == 2
    for length in named:
        assert alternate(length, *durations).resolve(3).epochs == length


# --- a schedule as text and as data ---------------------------------------------------------------


def test_table() -> None:
    schedule = alternate(8, "2ep", "1.5ep", "1ep", last_sparse="1ep").resolve(1000)
    assert schedule.table() == str(schedule)
    assert schedule.table().splitlines() == [
        "phase   epochs      steps           of the run",
        "dense   [0, 2)      [0, 2,000)      25.0 %",
        "sparse  [2, 3.5)    [2,000, 3,500)  18.8 %",
        "dense   [3.5, 4.5)  [3,500, 4,500)  12.5 %",
        "sparse  [4.5, 6)    [4,500, 6,000)  18.8 %",
        "dense   [6, 7)      [6,000, 7,000)  12.5 %",
        "sparse  [7, 8)      [7,000, 8,000)  12.5 %",
        "total   8           8,000           50.0 % sparse",
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_to_dict_round_trip_through_json(name: str) -> None:
    schedule = PUBLISHED[name][0].resolve(lengths_for(PUBLISHED[name][0].epochs, "uneven"))
    back = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert back == schedule
    assert hash(back) == hash(schedule)


# --- refusals: what was given, what is allowed, what to do ----------------------------------------


def a_schedule(*spans: tuple[str, int, int], lengths: tuple[int, ...] = (10,)) -> Schedule:
    return Schedule(tuple(Phase(*span) for span in spans), lengths)  # type: ignore[arg-type]


REFUSED = {
    "no phase": (lambda: Schedule((), ()), "at least one phase"),
    "unknown kind": (lambda: a_schedule(("warm", 0, 10)), "'dense' or 'sparse', not 'warm'"),
    "late start": (lambda: a_schedule(("dense", 1, 10)), "starts at step 1.*stops at 0"),
    "gap": (
        lambda: a_schedule(("dense", 0, 4), ("sparse", 5, 10)),
        "must touch.*starts at step 5.*stops at 4",
    ),
    "overlap": (lambda: a_schedule(("dense", 0, 4), ("sparse", 3, 10)), "must touch"),
    "empty phase": (
        lambda: a_schedule(("dense", 0, 4), ("sparse", 4, 4), ("dense", 4, 10)),
        "sparse phase at step 4 has no step. Make it longer",
    ),
    "same kind twice": (
        lambda: a_schedule(("dense", 0, 4), ("dense", 4, 10)),
        "Two dense phases follow each other at step 4",
    ),
    "not the run": (
        lambda: a_schedule(("dense", 0, 9)),
        "end at step 9, but the epochs have 10 steps",
    ),
    "an epoch without a step": (
        lambda: a_schedule(("dense", 0, 10), lengths=(15, -5)),
        "Every epoch has at least one step",
    ),
    "no epochs": (lambda: alternate(0), "has 0 epochs. Give a whole number from 1 up"),
    "half an epoch": (lambda: alternate(2.5), "has 2.5 epochs"),  # type: ignore[arg-type]
    "unknown constant": (
        lambda: constant("warm", 3),  # type: ignore[arg-type]
        "'dense' or 'sparse', not 'warm'",
    ),
    "bad unit": (lambda: alternate(10, warmup="10min"), "duration of warmup is '10min'.*'10ep'"),
    "no unit": (lambda: alternate(10, sparse="10"), "duration of sparse is '10'.*a unit"),
    "not text": (lambda: alternate(10, dense=5), "duration of dense is 5"),  # type: ignore[arg-type]
    "negative": (lambda: alternate(10, last_dense="-5ep"), "duration of last_dense is '-5ep'"),
    "empty text": (lambda: alternate(10, last_sparse=""), "duration of last_sparse is ''"),
    "bad span": (lambda: phases(3, [("dense", "3 epochs")]), r"duration of phase 0 \(dense\)"),
    "unknown span": (lambda: phases(3, [("warm", "3ep")]), "'dense' or 'sparse', not 'warm'"),
    "no span": (lambda: phases(3, []), "at least one phase"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_construction(case: str) -> None:
    call, sentence = REFUSED[case]
    with pytest.raises(InputError, match=sentence):
        call()


UNRESOLVED = {
    "warm-up too long": (
        lambda: alternate(20, "12ep", last_dense="5ep", last_sparse="5ep").resolve(3),
        r"warmup='12ep', last_dense='5ep' and last_sparse='5ep' together exceed 20 epochs "
        r"\(60 steps\). Shorten them or raise epochs",
    ),
    "last sparse phase longer than the run": (
        lambda: alternate(20, last_sparse="500st").resolve(3),
        "longer than the run",
    ),
    "misfit": (
        lambda: alternate(100, "10ep", "5ep", "5ep", "10ep", "12ep").resolve(7),
        "do not fit into 100 epochs.*there are 68 epochs.*fill 65 or 75. Set epochs to 97 or 107",
    ),
    "middle ends dense": (
        lambda: alternate(8, "2ep", "1ep", "1ep", "2ep", "2ep").resolve(7),
        "there are 2 epochs.*fill 1 or 3. Set epochs to 7 or 9",
    ),
    "misfit that no whole number of epochs would mend": (
        lambda: alternate(10, "2ep", "1.5ep", "1ep", "1.25ep", "2.5ep").resolve(4),
        "do not fit into 10 epochs.*there are 4.25 epochs.*fill 4 or 6.5. Change a duration",
    ),
    "misfit that one whole number of epochs would mend": (
        lambda: alternate(10, "2ep", "1.5ep", "1ep", "1ep", "2.5ep").resolve(4),
        "there are 4.5 epochs.*fill 4 or 6.5. Set epochs to 12, or change a duration",
    ),
    "misfit in percent": (
        lambda: alternate(10, "10%", "20%", "20%", "10%", "10%").resolve(7),
        "do not fit into 10 epochs.*there are 7 epochs.*fill 6 or 10. Change a duration",
    ),
    "no step in a sparse phase": (
        lambda: alternate(10, "2ep", "0ep", "1ep", "1ep", "2ep").resolve(7),
        "sparse phase of '0ep' has no step",
    ),
    "no step in a dense phase": (
        lambda: alternate(10, "2ep", "1ep", "0.1st", "1ep", "2ep").resolve(7),
        "dense phase of '0.1st' has no step",
    ),
    "no step in the last phase": (
        lambda: alternate(10, "2ep", "1ep", "1ep", "3ep", "0st").resolve(7),
        "last_sparse='0st' has no step|sparse phase .*no step",
    ),
    "a span longer than the run": (
        lambda: phases(3, [("dense", "2ep"), ("sparse", "50%")]).resolve(4),
        r"Phase 1 \(sparse, '50%'\) is longer than the run: it would stop at step 14 of 12",
    ),
    "spans shorter than the run": (
        lambda: phases(3, [("dense", "2ep")]).resolve(4),
        "end at step 8, but the epochs have 12 steps",
    ),
    "an empty span": (
        lambda: phases(3, [("dense", "0ep"), ("sparse", "3ep")]).resolve(4),
        "dense phase at step 0 has no step",
    ),
    "wrong number of epochs": (
        lambda: constant("dense", 3).resolve([4, 4]),
        r"has 3 epochs and steps_per_epoch is \(4, 4\)",
    ),
    "no steps in an epoch": (lambda: constant("dense", 2).resolve([4, 0]), "positive"),
    "zero steps": (lambda: constant("dense", 2).resolve(0), "positive"),
    "half a step": (  # len(loader) / accumulate
        lambda: constant("dense", 2).resolve(3.5),  # type: ignore[arg-type]
        "steps_per_epoch is 3.5.*whole",
    ),
    "half a step in one epoch": (
        lambda: constant("dense", 2).resolve([3, 3.5]),  # type: ignore[list-item]
        r"steps_per_epoch is \(3, 3.5\).*whole",
    ),
}


@pytest.mark.parametrize("case", UNRESOLVED)
def test_refused_when_resolved(case: str) -> None:
    call, sentence = UNRESOLVED[case]
    with pytest.raises(InputError, match=sentence):
        call()


def test_every_plan_is_in_the_tests() -> None:
    assert {cls for cls in Plan.__subclasses__() if cls.__module__.startswith("acdc.")} == {
        Alternate,
        Constant,
        Spans,
    }


# --- the examples in the core's docstrings --------------------------------------------------------


@pytest.mark.parametrize("name", ["schedule", "support", "layers"])
def test_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"acdc.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
