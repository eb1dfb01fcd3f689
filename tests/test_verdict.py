"""Whole steps decide what stays on. The clock is a fake one: it shows what the parts are made to
cost.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import queue
import random
import statistics
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import acdc
from acdc.engine import choice, judge, verdict
from acdc.engine.choice import Choice
from acdc.engine.judge import ENGINE, MOST, OPTIMIZER, TRAINING, Judge, kind_of
from acdc.engine.segment import Segment
from acdc.engine.verdict import ALLOWED, COUNTED, IGNORED, Block, Off, Trial, groups
from acdc.hooks import kept_steps
from acdc.processes import Peers

BLOCK = IGNORED + COUNTED
EVERY = ("0", "2", "4")  # the layers of `net`: each is a segment
ALL = frozenset((OPTIMIZER, *EVERY))


# --- the rule -------------------------------------------------------------------------------------


def run(parts: tuple[str, ...], time_of: Callable[[Off, int], float]) -> tuple[Trial, list[Off]]:
    """Run a trial to its end; return it, and what each step switched off."""
    trial, offs = Trial(parts), []
    while not trial.settled:
        offs.append(trial.off)
        trial.add(time_of(trial.off, len(offs)))
        assert len(offs) < 10_000
    return trial, offs


def blocks(offs: list[Off]) -> list[set[str]]:
    """Return what each block of steps switched off."""
    assert len(offs) % BLOCK == 0
    found = [offs[i : i + BLOCK] for i in range(0, len(offs), BLOCK)]
    assert all(len(set(block)) == 1 for block in found)
    return [set(block[0]) for block in found]


def costs(dense: Mapping[str, float], sparse: Mapping[str, float]) -> Callable[[Off, int], float]:
    """Return steps that take the sum of their parts."""
    return lambda off, _: sum(dense[p] if p in off else sparse[p] for p in dense)


TEN = dict.fromkeys("abcde", 10.0)


@pytest.mark.parametrize(
    ("sparse", "off", "measured"),
    [
        pytest.param({}, "", ["", "abcde"], id="clearly faster"),
        pytest.param(TEN, "", ["", "abcde"] * 2, id="equal"),
        pytest.param({"a": 60.0}, "a", ["", "abcde"] * 2 + ["a"], id="the doubtful one loses"),
        pytest.param(
            {"a": 30.0, "b": 40.0}, "abc", ["", "abcde"] * 2 + ["a", "abc"], id="two of five lose"
        ),
        pytest.param(
            {"e": 60.0}, "de", ["", "abcde"] * 2 + ["a", "bc", "de"], id="the sure one loses"
        ),
        pytest.param(dict.fromkeys("abcde", 11.0), "abcde", None, id="each loses"),
    ],
)
def test_what_stays_off(sparse: dict[str, float], off: str, measured: list[str] | None) -> None:
    gains = dict.fromkeys("abcde", 4.0) if sparse != TEN else TEN
    trial, offs = run(tuple("abcde"), costs(TEN, gains | sparse))
    assert trial.off == set(off)
    if measured is not None:
        assert blocks(offs) == [set(block) for block in measured]


def test_a_part_that_helps_is_switched_on_again() -> None:
    """The order of doubt is a guess: without `a` a step is slower still."""
    dense, sparse = {"a": 20.0, "b": 10.0, "c": 5.0}, {"a": 1.0, "b": 50.0, "c": 1.0}
    trial, offs = run(("a", "b", "c"), costs(dense, sparse))
    assert trial.off == {"b", "c"}
    assert blocks(offs)[-2:] == [{"a"}, {"b", "c"}]


@pytest.mark.parametrize("late", range(1, 2 * BLOCK + 1))
def test_a_pause_in_a_step_changes_nothing(late: int) -> None:
    def time_of(off: Off, step: int) -> float:
        return (10.0 if off else 4.0) + 1e3 * (step == late)

    trial, offs = run(("a",), time_of)
    assert (trial.off, len(offs)) == (set(), 2 * BLOCK)


def test_the_first_steps_after_a_change_do_not_count() -> None:
    def time_of(off: Off, step: int) -> float:
        first = (step - 1) % BLOCK < IGNORED
        return 99.0 if first else 1.0 + step % 2 if off else 3.0 + step % 2

    trial, _ = run(("a",), time_of)
    assert trial.blocks[0] == (4.0, 3.0, 4.0, 3.0, 4.0)
    assert trial.off == {"a"}


def test_other_work_during_one_block_is_not_the_end_of_the_engine() -> None:
    trial, _ = run(("a", "b"), lambda off, step: (9.0 if off else 4.0) * (3 if step <= 7 else 1))
    assert trial.off == set()
    trial, _ = run(("a",), lambda off, step: (9.0 if off else 9.9) * (3 if 7 < step <= 14 else 1))
    assert trial.off == set()  # the price: a step of one block of each would see no difference


@pytest.mark.parametrize("seed", range(300))
def test_whatever_the_times_are_it_ends_and_keeps_nothing_slower(seed: int) -> None:
    draw = random.Random(seed)
    parts = tuple(map(str, range(draw.choice([1, 2, 3, 7, 40]))))
    taken: dict[Off, list[list[float]]] = {}
    kind = draw.choice(["random", "constant", "drift", "wild"])
    level: dict[Off, float] = {}

    def time_of(off: Off, step: int) -> float:
        base = level.setdefault(off, draw.uniform(1, 2))
        noise = {"random": draw.uniform(0.8, 1.2), "constant": 1.0, "drift": 1 + step / 50}
        return base * noise.get(kind, 10 ** draw.uniform(-3, 3))

    trial, offs = run(parts, time_of)
    for off, times in zip(offs[::BLOCK], trial.blocks, strict=True):
        taken.setdefault(off, []).append(list(times))
    assert len(offs) <= BLOCK * (4 + math.ceil(math.log2(len(parts) + 1)))
    everything = frozenset(parts)
    dense = min(map(statistics.median, taken[everything]))
    if trial.off != everything:
        assert min(map(statistics.median, taken[trial.off])) <= dense * (1 + ALLOWED)
    again = Trial.of(trial.state())
    assert (again.off, again.settled) == (trial.off, True)


def test_a_trial_that_is_saved_at_any_step_goes_on_the_same() -> None:
    def time_of(off: Off, step: int) -> float:
        return 12.0 - len(off) + 0.01 * (step % 3) if off != frozenset("abcd") else 9.5

    whole, offs = run(tuple("abcd"), time_of)
    for stop in range(len(offs)):
        trial = Trial(tuple("abcd"))
        for step in range(1, stop + 1):
            trial.add(time_of(trial.off, step))
        trial = Trial.of(copy.deepcopy(trial.state()))
        rest = []
        for step in range(stop + 1, len(offs) + 1):
            rest.append(trial.off)
            trial.add(time_of(trial.off, step))
        assert rest == offs[stop:]
        assert (trial.off, trial.settled) == (whole.off, True)


def test_the_noise_that_is_allowed_is_bounded() -> None:
    noisy = Block((5.0, 8.0, 10.0, 12.0, 15.0))
    assert noisy.spread == 2.0
    assert not replace(noisy, times=(10.4,) * 5).is_slower_than(noisy)
    assert replace(noisy, times=(10.6,) * 5).is_slower_than(noisy)
    assert [len(group) for group in groups([str(i) for i in range(40)])] == [1, 2, 4, 8, 16, 9]


# --- a network ------------------------------------------------------------------------------------


class Between(nn.Module):
    """A module that the engine does not know: it ends a segment."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16) for _ in EVERY]
    return nn.Sequential(layers[0], Between(), layers[1], Between(), layers[2]).double()


@dataclass
class World:
    """A clock that shows what the parts of a step are made to cost, for each sample."""

    dense: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ALL, 10.0))
    sparse: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ALL, 4.0))
    now: float = 0.0
    samples: int = 1
    log: list[str] = field(default_factory=list)  # how each forward pass and step was computed
    evaluation: tuple[float, float] = (5.0, 2.0)  # of a layer, dense and sparse

    def spend(self, part: str, sparse: bool) -> None:
        if part != OPTIMIZER and not torch.is_grad_enabled():
            self.now += self.evaluation[sparse] * self.samples
        else:
            self.now += (self.sparse if sparse else self.dense)[part] * self.samples
        self.log.append(f"{part}{'+' if sparse else '-'}")

    def take(self) -> str:
        """Return how it was computed since the last time."""
        log, self.log = self.log, []
        return " ".join(log).replace(OPTIMIZER, "opt")


SPARSE, DENSE = "0+ 2+ 4+ opt+", "0- 2- 4- opt-"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(judge, "clock", lambda: world.now)
    monkeypatch.setattr(kept_steps, "LARGE", 64)
    monkeypatch.setattr(choice, "segment_pays", lambda *_: True)
    # The last layer is the most doubtful one.
    monkeypatch.setattr(
        choice, "measure", lambda layer, *a: Choice(True, a[2], 9.0, 1.0 + int(layer.name), 0.1)
    )
    begin, skips, on_kernels, keeps = Judge.begin, Judge.skips, Segment._run, Judge.keeps_steps

    def begun(self: Judge, host: str, training: bool, values: list[Tensor]) -> judge.Pass:
        world.samples = values[0].shape[0]
        this = begin(self, host, training, values)
        if this.plain:
            for part in EVERY:
                world.spend(part, False)
        return this

    def skipped(self: Judge, layers: tuple[str, ...]) -> bool:
        off = skips(self, layers)
        if off:
            world.spend(layers[0], False)
        return off

    def ran(self: Segment, inputs: tuple[Tensor, ...]) -> Any:
        world.spend(self._layers[0], True)
        return on_kernels(self, inputs)

    def kept(self: Judge) -> bool:
        may = keeps(self)
        world.spend(OPTIMIZER, may)
        return may

    monkeypatch.setattr(Judge, "begin", begun)
    monkeypatch.setattr(Judge, "skips", skipped)
    monkeypatch.setattr(Judge, "keeps_steps", kept)
    monkeypatch.setattr(Segment, "_run", ran)
    return world


SPARSE_PLAN = acdc.constant("sparse", epochs=1).resolve(1000)


class Training:
    """A network in a sparse phase."""

    def __init__(self, plan: acdc.Schedule = SPARSE_PLAN, **engine: Any) -> None:
        self.net = net()
        self.model: Callable[[Tensor], Tensor] = self.net
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        self.engine = acdc.Engine(self.net, self.batch(8, 0), **engine)
        method = acdc.ACDC(acdc.Unstructured(0.75), plan, layers=acdc.Layers(skip_last=False))
        self.sparsifier = acdc.Sparsifier(method, self.net, self.optimizer, engine=self.engine)
        self.seed = 0

    def batch(self, samples: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(samples, 16, generator=generator, dtype=torch.float64)

    def step(self, samples: int = 8, passes: int = 1) -> None:
        self.seed += 1
        for index in range(passes):
            self.model(self.batch(samples, 10 * self.seed + index)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evaluate(self, samples: int = 8) -> None:
        self.net.eval()
        with torch.no_grad():
            self.model(self.batch(samples, 0))
        self.net.train()

    def states(self) -> list[dict[str, Any]]:
        parts = (self.net, self.optimizer, self.sparsifier)
        return copy.deepcopy([part.state_dict() for part in parts])

    def load(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip((self.net, self.optimizer, self.sparsifier), states, strict=True):
            part.load_state_dict(state)

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.net.parameters()])


def how(training: Training, world: World, steps: int, **step: Any) -> list[tuple[str, int]]:
    """Take steps; return how they were computed, and how many in a row."""
    world.take()
    found = []
    for _ in range(steps):
        training.step(**step)
        found.append(world.take())
    return [(key, len(list(same))) for key, same in itertools.groupby(found)]


def test_the_engine_wins(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "acdc.engine")
    training = Training()
    assert training.engine.judges
    assert how(training, world, 30) == [(SPARSE, BLOCK), (DENSE, BLOCK), (SPARSE, 16)]
    assert not training.engine.judges
    (found,) = training.engine.verdicts
    assert (found.off, found.dense, found.share) == ((), False, pytest.approx(0.4))
    line = "training, about 140 values: sparse takes 0.40 of the dense time"
    assert str(found) == line
    assert training.engine.table().splitlines()[-1] == line
    assert line in caplog.text


def test_the_engine_loses_as_a_whole(world: World) -> None:
    world.sparse = dict.fromkeys(ALL, 11.0)
    training = Training()
    found = how(training, world, 80)
    assert found[:4] == [(SPARSE, BLOCK), (DENSE, BLOCK)] * 2
    assert found[4:6] == [("0+ 2+ 4+ opt-", BLOCK), ("0+ 2- 4- opt-", BLOCK)]
    assert found[6:] == [(DENSE, 80 - 6 * BLOCK)]
    assert training.engine.verdicts[0].dense
    assert training.engine.table().endswith("of the dense time; PyTorch computes it")
    assert all(not any(s._free.values()) for h in training.engine._hosts for s in h.segments())


@pytest.mark.parametrize(
    ("slow", "end"),
    [(OPTIMIZER, "0+ 2+ 4+ opt-"), ("4", "0+ 2- 4- opt+"), ("2", "0+ 2- 4- opt+")],
)
def test_one_part_loses(world: World, slow: str, end: str) -> None:
    world.sparse[slow] = 40.0
    training = Training()
    assert how(training, world, 60)[-1][0] == end
    (found,) = training.engine.verdicts
    assert slow in found.off
    assert not found.dense
    assert "without" in str(found)


def test_a_switched_off_part_computes_what_pytorch_does(world: World) -> None:
    world.sparse["4"] = 40.0
    training, plain = Training(), Training()
    plain.engine.decompress()
    for _ in range(60):
        training.step()
        plain.step()
    torch.testing.assert_close(training.weights(), plain.weights(), rtol=1e-9, atol=1e-12)
    for name, mask in training.sparsifier.support.items():
        assert not training.sparsifier.params[name][~mask].any()


def test_pauses_between_steps_do_not_count(world: World) -> None:
    training = Training()
    for _ in range(2 * BLOCK):
        world.now += 1e4 if not training.engine._judge.trials else 0.0  # a batch is loaded
        training.step()
        training.evaluate()
        world.now += 1e4 if world.log[-1] == "opt-" else 0.0  # a checkpoint is written
    assert training.engine.verdicts[0].share == pytest.approx(0.4)


def test_another_batch_size_is_judged_when_it_appears(world: World) -> None:
    training = Training()
    how(training, world, 2 * BLOCK)
    world.sparse = dict.fromkeys(ALL, 13.0)
    assert how(training, world, BLOCK, samples=2)[0] == (SPARSE, BLOCK)
    assert how(training, world, 3) == [(SPARSE, 3)]  # the size of before, whose verdict stands
    assert how(training, world, BLOCK, samples=2) == [(DENSE, BLOCK)]
    how(training, world, 6 * BLOCK, samples=2)
    assert how(training, world, 2, samples=2) == [(DENSE, 2)]
    assert how(training, world, 2, samples=8) == [(SPARSE, 2)]
    assert [found.dense for found in training.engine.verdicts] == [False, True]


def test_batches_of_nearly_one_size_are_one_kind_and_compared_by_value(world: World) -> None:
    """Tokens of texts: each batch has another number of them."""
    training = Training()
    for index in range(2 * BLOCK):
        # The dense steps are shorter; as times of steps, theirs would be below those of sparse.
        training.step(samples=100 if index < BLOCK else 96)
    (found,) = training.engine.verdicts
    assert found.share == pytest.approx(0.4)


def test_the_size_of_images_and_the_mode_are_parts_of_a_kind() -> None:
    x = torch.empty(4, 3, 32, 32)
    kinds = {kind_of("a", [y]) for y in (x, x[..., :31], x[:1], x.reshape(1, 3, 64, 64))}
    assert len(kinds | {kind_of("b", [x])}) == 5


def test_a_mode_is_judged_by_itself(world: World) -> None:
    training = Training()
    how(training, world, 2 * BLOCK)
    training.net.eval()  # trained with the statistics of before, say
    assert how(training, world, 2 * BLOCK) == [(SPARSE, BLOCK), (DENSE, BLOCK)]
    assert len(training.engine.verdicts) == 2


def test_an_evaluation_with_gradients_is_no_part_of_the_step_after_it(world: World) -> None:
    training = Training()
    for _ in range(2 * BLOCK):
        training.net.eval()
        for _ in range(3):
            training.model(training.batch(8, 0))
        training.net.train()
        training.step()
    (found,) = training.engine.verdicts
    assert found.kind.startswith("training")
    assert found.share == pytest.approx(0.4)


def test_several_passes_for_one_step_count_together(world: World) -> None:
    world.dense[OPTIMIZER], world.sparse[OPTIMIZER] = 1.0, 50.0
    training = Training()
    one = how(training, world, 6 * BLOCK)
    assert one[-1][0] == "0+ 2+ 4+ opt-"  # 62 against 31: the optimizer is what loses
    other = Training()
    assert how(other, world, 6 * BLOCK, passes=8)[-1][0] == "0+ 2+ 4+ " * 8 + "opt+"


def test_passes_inside_of_the_optimizers_step_belong_to_it(world: World) -> None:
    """A closure is called within ``step``, and the kept steps are a part of what is judged."""
    training = Training()
    found = []
    for seed in range(3 * BLOCK):

        def closure(seed: int = seed) -> Tensor:
            training.optimizer.zero_grad()
            loss = training.model(training.batch(8, seed)).square().mean()
            loss.backward()
            return loss

        training.optimizer.step(closure)
        found.append(world.take())
    assert found == [SPARSE] * BLOCK + [DENSE] * BLOCK + [SPARSE] * BLOCK
    (judged,) = training.engine.verdicts
    assert judged.kind.startswith("training")
    assert judged.share == pytest.approx(0.4)


def test_a_step_that_only_makes_state_is_no_part_of_the_next(world: World) -> None:
    training = Training()
    (group,) = training.optimizer.param_groups
    for p in training.net.parameters():
        p.grad = torch.zeros_like(p)
    group["lr"] = 0.0
    training.optimizer.step()  # as torch.distributed.checkpoint does
    training.optimizer.zero_grad()
    group["lr"] = 0.05
    world.now += 1e4
    how(training, world, 2 * BLOCK)
    assert [kind.split(",")[0] for kind in training.engine._judge.trials] == ["training"]


def test_without_a_step_nothing_is_judged(world: World) -> None:
    training = Training()
    for _ in range(3 * BLOCK):
        training.model(training.batch(8, 0)).sum().backward()
    assert not training.engine.verdicts
    assert set(world.take().split()) == {"0+", "2+", "4+"}


@pytest.mark.parametrize(("sparse_ms", "end"), [(2.0, "0+ 2+ 4+"), (6.0, "0- 2- 4-")])
def test_an_evaluation_has_a_verdict_of_its_own(world: World, sparse_ms: float, end: str) -> None:
    world.evaluation = (5.0, sparse_ms)
    training = Training()
    found = []
    for _ in range(5 * BLOCK):
        training.evaluate()
        found.append(world.take())
    assert found[: 2 * BLOCK] == ["0+ 2+ 4+"] * BLOCK + ["0- 2- 4-"] * BLOCK
    assert found[-1] == end
    (judged,) = training.engine.verdicts
    assert judged.kind == "evaluation, about 140 values"
    assert judged.dense is (end == "0- 2- 4-")
    assert how(training, world, 2) == [(SPARSE, 2)]


def test_without_a_choice_nothing_is_timed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(choose=False)
    world.sparse = dict.fromkeys(ALL, 99.0)
    monkeypatch.setattr(Judge, "_open", lambda *_: pytest.fail("it timed a step"))
    assert how(training, world, 5 * BLOCK) == [(SPARSE, 5 * BLOCK)]
    training.evaluate()
    assert training.engine.state_dict()["trials"] == {}
    assert not training.engine.judges


def test_where_no_layer_gains_the_optimizer_is_judged_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "measure", lambda *a: Choice(False, a[3], 1.0, 2.0, 0.1))
    world.sparse[OPTIMIZER] = 20.0
    training = Training()
    found = how(training, world, 5 * BLOCK)
    assert found == [("opt+", BLOCK), ("opt-", BLOCK), ("opt+", BLOCK), ("opt-", 2 * BLOCK)]
    assert training.engine.verdicts[0].off == (OPTIMIZER,)


def test_beyond_many_kinds_pytorch_computes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "MOST", 3)
    training = Training()
    for samples in (1, 2, 4):
        assert how(training, world, 1, samples=samples) == [(SPARSE, 1)]
    assert how(training, world, 2, samples=8) == [(DENSE, 2)]
    assert len(training.engine._judge.trials) == 3
    assert MOST > 3


# --- compressions, and resuming -------------------------------------------------------------------


TWICE = acdc.phases(8, [("sparse", "2ep"), ("dense", "1ep"), ("sparse", "5ep")]).resolve(10)


def test_a_later_phase_goes_on_judging_and_a_verdict_stands(world: World) -> None:
    training = Training(TWICE)
    assert how(training, world, 10) == [(SPARSE, BLOCK), (DENSE, 3)]
    how(training, world, 10)
    (found,) = training.engine.verdicts
    assert how(training, world, 10) == [("", 10)]  # a dense phase
    assert how(training, world, 20) == [(SPARSE, 20)]
    assert training.engine.verdicts == (found,)


def test_a_short_sparse_phase_leaves_the_rest_to_the_next(world: World) -> None:
    plan = acdc.phases(4, [("sparse", "1ep"), ("dense", "1ep"), ("sparse", "2ep")]).resolve(9)
    training = Training(plan)
    how(training, world, 9)
    assert not training.engine.verdicts
    assert how(training, world, 9) == [("", 9)]
    assert how(training, world, 8) == [(DENSE, 5), (SPARSE, 3)]


def test_a_much_sparser_network_is_judged_anew(world: World) -> None:
    training = Training()
    how(training, world, 2 * BLOCK)
    masks = dict(training.sparsifier.support)
    training.engine.compress(masks)
    assert training.engine.verdicts
    for mask in masks.values():
        mask[:, 4:] = False
    training.engine.compress(masks)
    assert not training.engine.verdicts
    assert training.engine.judges
    assert how(training, world, 2 * BLOCK) == [(SPARSE, BLOCK), (DENSE, BLOCK)]


@pytest.mark.parametrize("stop", [1, 5, BLOCK, BLOCK + 4, 3 * BLOCK, 5 * BLOCK + 1, 8 * BLOCK])
def test_a_resumed_run_is_bitwise_the_one_that_did_not_stop(world: World, stop: int) -> None:
    world.sparse["4"] = 40.0
    whole, first = Training(), Training()
    want = [h for h, count in how(whole, world, 9 * BLOCK) for _ in range(count)]
    how(first, world, stop)
    states = first.states()
    second = Training()
    second.load(states)
    second.seed = first.seed
    got = [h for h, count in how(second, world, 9 * BLOCK - stop) for _ in range(count)]
    assert got == want[stop:]
    assert torch.equal(whole.weights(), second.weights())
    assert second.engine.verdicts == whole.engine.verdicts


def test_states_of_older_versions_load(world: World) -> None:
    training = Training()
    states = training.states()
    del states[2]["engine"]["trials"]
    training.load(states)
    assert how(training, world, BLOCK) == [(SPARSE, BLOCK)]


# --- compiled models, threads, processes ----------------------------------------------------------


def test_the_dense_steps_of_a_compiled_model_are_compiled(world: World) -> None:
    compiled: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        def call(*args: Any) -> Any:
            compiled.append(len(list(graph.graph.nodes)))
            return graph.forward(*args)

        return call

    training = Training()
    training.model = torch.compile(training.net, backend=backend)
    how(training, world, BLOCK)
    compiled.clear()
    assert how(training, world, BLOCK) == [(DENSE, BLOCK)]
    assert compiled
    assert max(compiled) > 5  # all five modules
    compiled.clear()
    how(training, world, 2)
    assert max(compiled, default=0) <= 5


def test_a_network_that_threads_evaluate_is_judged_by_its_steps(world: World) -> None:
    training, stop = Training(), threading.Event()
    errors: list[BaseException] = []

    def evaluate() -> None:
        x = training.batch(8, 0)
        try:
            while not stop.is_set():
                with torch.no_grad():
                    training.net(x)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=evaluate)
    thread.start()
    for _ in range(8 * BLOCK):
        training.step()
    stop.set()
    thread.join()
    assert not errors
    assert [v for v in training.engine.verdicts if v.kind.startswith("training")]


def test_two_processes_switch_at_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their clocks and their batches differ; the second one has no forward pass in some steps."""
    judges = [Judge(True), Judge(True)]
    now = [0.0, 0.0]
    for each in judges:
        each.peers = Peers()
        each.peers._group = object()  # two processes; `agree` sends what they send
    monkeypatch.setattr(judge, "clock", lambda: now[int(threading.current_thread().name)])
    sent: queue.Queue[Any] = queue.Queue()
    seen: list[list[tuple[int, Off]]] = [[], []]

    def train(rank: int) -> None:
        mine = judges[rank]
        mine._ended = 0.0

        def agree(value: Any) -> Any:
            if rank == 0:
                sent.put(value)
                return value
            return sent.get(timeout=30)

        for step in range(9 * BLOCK):
            off = mine._off(TRAINING)
            x = torch.ones(1 + (step * (1 + rank)) % 4, 3, requires_grad=True)
            if rank == 0 or step % 5:
                mine.begin("", True, [x])
                for layer in "abc":
                    mine.skips((layer,))
            # Alone, the second one would keep everything.
            now[rank] += (1.0 if off else 5.0 if rank == 0 else 0.1) * x.numel()
            mine.end_step(lambda layers: ord(layers[0]) * (1 - 2 * rank), agree, True)
            seen[rank].append((step, off))

    threads = [threading.Thread(target=train, args=(r,), name=str(r)) for r in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sent.empty()
    assert seen[0] == seen[1]
    assert len(seen[0]) == 9 * BLOCK
    assert judges[0].state() == judges[1].state()
    assert judges[0].verdicts[0].off
    assert [v.kind for v in judges[0].verdicts] == [TRAINING]


def test_names_of_parts_say_what_they_are() -> None:
    assert ENGINE in Trial((ENGINE,)).parts
    assert verdict.Verdict("k", ("a",), True, 1.25, 1.0).__str__() == (
        "k: sparse takes 1.25 of the dense time; PyTorch computes it"
    )
