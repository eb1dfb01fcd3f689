"""Two processes train one model: DDP over gloo on the CPU.

The processes are started once. Each writes down what it saw, and the tests read it. The file takes
about 15 seconds.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import acdc
from acdc import score
from acdc.engine import choice, judge, verdict
from acdc.engine.choice import Choice
from acdc.engine.segment import Segment
from acdc.engine.tile import Tiling
from acdc.engine.timing import Candidate
from acdc.engine.tuning import Tilings
from acdc.hooks import kept_steps
from acdc.methods.acdc import ACDC
from acdc.methods.dpf import DPF
from acdc.methods.families import exchange
from acdc.methods.rigl import RigL
from acdc.methods.str_ import STR
from acdc.methods.woodfisher import WoodFisher
from acdc.pattern import NM, Unstructured
from acdc.schedule import constant
from acdc.sparsifier import Sparsifier
from support.helpers import (
    CUTS,
    REVIVAL,
    SCHEDULE,
    TOTAL,
    Net,
    adam,
    backward,
    batch,
    build,
    is_plus_zero,
    sgd,
)

pytestmark = pytest.mark.slow

WORLD = 2
PATTERN = Unstructured(0.8)
METHOD = ACDC(PATTERN, SCHEDULE)


def own_batch(step: int) -> int:
    """Return the number of this rank's batch, which is different on every rank."""
    return WORLD * step + dist.get_rank()


def flat(tensors: Iterator[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten().clone() for t in tensors])


def trained(
    wrap_first: bool, accumulate: int, method: ACDC = METHOD, factory: Any = sgd, **ddp: Any
) -> dict[str, Any]:
    """Train under DDP; return weights, supports and the clipped norms, step by step."""
    model = build()
    optimizer = factory(model)
    if wrap_first:
        wrapped = DDP(model, **ddp)
        sparsifier = Sparsifier(method, wrapped, optimizer)
    else:
        sparsifier = Sparsifier(method, model, optimizer, process_group=dist.group.WORLD)
        wrapped = DDP(model, **ddp)
    seen: dict[str, Any] = {"weights": [], "digests": [], "outside": [], "norms": []}
    for step in range(TOTAL):
        twin = copy.deepcopy(model)  # what this rank's gradients are without DDP and sparsifier
        optimizer.zero_grad()
        for micro in range(accumulate):
            index = own_batch(accumulate * step + micro)
            last = micro == accumulate - 1
            with nullcontext() if last else wrapped.no_sync():
                backward(wrapped, index)
            backward(twin, index)

        support = sparsifier.support
        outside = [sparsifier.params[n].grad[~mask] for n, mask in support.items()]
        expected = []
        for name, p in twin.named_parameters():
            dist.all_reduce(p.grad)
            grad = p.grad / WORLD
            expected.append(grad.masked_fill(~support[name], 0) if name in support else grad)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        seen["outside"].append(all(map(is_plus_zero, outside)))
        seen["norms"].append((float(norm), float(nn.utils.get_total_norm(expected))))

        optimizer.step()
        seen["weights"].append(flat(model.parameters()))
        seen["digests"].append(sparsifier.support.digest())
        seen["zero"] = all(
            is_plus_zero(sparsifier.params[n][~m]) for n, m in sparsifier.support.items()
        )
    seen["changes"] = sparsifier.changes
    twin_state = sparsifier.dense_twin
    assert twin_state is not None
    seen["twin"] = flat(twin_state.model[name] for name, _ in model.named_parameters())
    return seen


def disagreeing() -> dict[str, Any]:
    """Let the ranks' weights differ in the last bit right before the first compression."""
    model = build()
    optimizer = sgd(model)

    @torch.no_grad()
    def disturb(*_: Any) -> None:  # registered first, so it runs before the sparsifier looks
        disturb.step += 1  # type: ignore[attr-defined]
        if disturb.step in CUTS:  # type: ignore[attr-defined]
            seed = 10 * disturb.step + dist.get_rank()  # type: ignore[attr-defined]
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.copy_(torch.where(p < 0, -0.125, 0.125))  # all tied, but for the last bit
                up = torch.rand(p.shape, generator=generator) < 0.1
                p.copy_(torch.where(up, torch.nextafter(p, p * 2), p))
            local.append(PATTERN.select(score.magnitude(sparsifier.params)).digest())

    disturb.step = 0  # type: ignore[attr-defined]
    local: list[str] = []
    optimizer.register_step_post_hook(disturb)
    wrapped = DDP(model)
    sparsifier = Sparsifier(METHOD, wrapped, optimizer)
    used = []
    for step in range(TOTAL):
        optimizer.zero_grad()
        backward(wrapped, own_batch(step))
        optimizer.step()
        used.append(sparsifier.support.digest())
    zero = all(is_plus_zero(sparsifier.params[n][~m]) for n, m in sparsifier.support.items())
    return {"local": local, "used": used, "zero": zero}


class EngineNet(Net):
    """With a 1x1 convolution, which has several orders in memory, and a head that training does
    not reach.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(8, 8, 1, stride=2)
        self.head = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.training else self.head(x)


MINE = ({"conv1", "fc1"}, {"conv2", "fc2"})  # what each rank measures to be faster sparse


def on_engine(on: bool, memory_format: torch.memory_format, **ddp: Any) -> dict[str, Any]:
    """Train under DDP with or without an engine.

    Each rank alone would choose other layers and other tiles, and only the first one finds that
    whole steps lose.
    """
    now, on_kernels = 0.0, Segment._run

    def measure(layer: Candidate, *_: Any) -> Choice:
        gains = layer.name in {"head", *MINE[dist.get_rank()]}
        return Choice(gains, 0.2, 1e6 if gains else 1.0, 1.0, 1.0)

    def costly(self: Segment, inputs: tuple[Tensor, ...]) -> Any:
        nonlocal now
        now += 5.0 if dist.get_rank() == 0 else -0.5
        return on_kernels(self, inputs)

    model = build(EngineNet).double().to(memory_format=memory_format)
    example = batch(0)[0].double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "measure", measure)
        patch.setattr(choice, "WORK", 0)
        patch.setattr(Tilings, "of", lambda *_: Tiling(2**14, 1 + dist.get_rank()))
        patch.setattr(kept_steps, "LARGE", 64)  # so that optimizer steps are of kept elements, too
        patch.setattr(Segment, "_run", costly)
        patch.setattr(judge, "clock", lambda: now)
        patch.setattr(verdict, "IGNORED", 0)
        patch.setattr(verdict, "COUNTED", 1)
        engine = acdc.Engine(model, example) if on else None
        optimizer = sgd(model)
        wrapped = DDP(model, **ddp)
        sparsifier = Sparsifier(METHOD, wrapped, optimizer, engine=engine)
        seen: dict[str, Any] = {"weights": [], "losses": [], "active": []}
        for step in range(TOTAL):
            seen["active"].append(engine is not None and engine.active)
            x, y = batch(own_batch(step))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(wrapped(x.double()), y)
            loss.backward()
            now += 2.0
            optimizer.step()
            seen["losses"].append(loss.item())
            seen["weights"].append(flat(model.parameters()))
            if engine is not None and dist.get_rank() == 0:  # it alone evaluates
                with torch.no_grad():
                    model.eval()(example)
                model.train()
    if engine is not None:
        seen["trial"] = engine.state_dict()["trials"][judge.TRAINING]
        seen["tilings"] = {choice.tiling for choice in engine.choices.values() if choice.sparse}
        seen["sparse"] = {name for name, choice in engine.choices.items() if choice.sparse}
    seen["zero"] = all(
        is_plus_zero(sparsifier.params[n][~m]) for n, m in sparsifier.support.items()
    )
    return seen


ENGINE_CASES: dict[str, dict[str, Any]] = {
    "contiguous": {"memory_format": torch.contiguous_format},
    "channels_last": {"memory_format": torch.channels_last},
    "gradients in buckets": {
        "memory_format": torch.channels_last, "gradient_as_bucket_view": True,
    },
}  # fmt: skip


def exchanging(wrap_first: bool, accumulate: int) -> dict[str, Any]:
    """Train by RigL; return the weights that it grew, and those by the averaged gradients."""
    schedule = constant("sparse", 3).resolve(3)
    method = RigL(PATTERN, schedule, drop=0.5, every="3st", until="100%")
    model = build()
    optimizer = sgd(model)
    group = None if wrap_first else dist.group.WORLD
    wrapped: nn.Module = DDP(model) if wrap_first else model
    sparsifier = Sparsifier(method, wrapped, optimizer, process_group=group)
    if not wrap_first:
        wrapped = DDP(model)
    seen: dict[str, Any] = {"weights": [], "digests": [], "expected": [], "updates": []}
    for step in range(TOTAL):
        twin = copy.deepcopy(model)
        optimizer.zero_grad()
        for micro in range(accumulate):
            index = own_batch(accumulate * step + micro)
            last = micro == accumulate - 1
            with nullcontext() if last else wrapped.no_sync():  # type: ignore[operator]
                backward(wrapped, index)
            backward(twin, index)
        before, update = sparsifier.support, method.training.wants_dense_gradient(step)
        if update:
            named = {name: twin.get_parameter(name) for name in sparsifier.params}
            for p in named.values():
                dist.all_reduce(p.grad)
            share = method.share(step, schedule.phases[0])
            support = exchange(before, score.magnitude(named), score.gradient(named), share)
            seen["expected"].append(support.digest())
        optimizer.step()
        if update:
            seen["updates"].append(sparsifier.support.digest())
        seen["weights"].append(flat(model.parameters()))
        seen["digests"].append(sparsifier.support.digest())
    return seen


def viewing(kind: type[DPF] | type[STR]) -> dict[str, Any]:
    """Train; return the view, its dense weights, and the number of dense weights that moved."""
    schedule = constant("sparse", 3).resolve(3)
    method = kind(PATTERN, schedule, first=0.5, every="2st", length="5st")
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # moved by gradients, nothing else
    wrapped = DDP(model)
    sparsifier = Sparsifier(method, wrapped, optimizer)
    seen: dict[str, Any] = {"dense": [], "view": [], "digests": [], "moved": [], "learned": []}
    for step in range(TOTAL):
        before = flat(iter(sparsifier.dense_weights.values()))
        outside = torch.cat([~mask.flatten() for mask in sparsifier.support.values()])
        optimizer.zero_grad()
        backward(wrapped, own_batch(step))
        optimizer.step()
        after = flat(iter(sparsifier.dense_weights.values()))
        seen["moved"].append(int((after != before)[outside].sum()))
        seen["dense"].append(after)
        seen["learned"].append(sparsifier.state_dict()["method_state"] or {})
        seen["view"].append(flat(model.parameters()))
        seen["digests"].append(sparsifier.support.digest())
    return seen


def remembering() -> dict[str, Any]:
    """Train by WoodFisher; let the ranks' weights differ in the last bit right before a cut."""
    schedule = constant("sparse", 3).resolve(3)
    method = WoodFisher(PATTERN, schedule, first=0.5, every="3st", length="6st", gradients=1)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @torch.no_grad()
    def disturb(*_: Any) -> None:  # registered first, so it runs before the sparsifier looks
        if sparsifier.step == 2 and dist.get_rank():
            for p in sparsifier.params.values():
                p.copy_(torch.nextafter(p, 2 * p))

    optimizer.register_step_post_hook(disturb)
    wrapped = DDP(model)
    sparsifier = Sparsifier(method, wrapped, optimizer)
    seen: dict[str, Any] = {"past": [], "expected": [], "weights": []}
    for step in range(TOTAL):
        twin = copy.deepcopy(model)
        backward(twin, own_batch(step))
        optimizer.zero_grad()
        backward(wrapped, own_batch(step))
        if step == 2:
            averages = []
            for name, mask in sparsifier.support.items():
                grad = twin.get_parameter(name).grad
                dist.all_reduce(grad)
                averages.append(grad[mask] / WORLD)
            seen["expected"] = flat(iter(averages))

            def look(*_: Any) -> None:  # registered last: sees what was remembered
                memory = sparsifier._hooks._found.state
                seen["past"] = flat(row for _, rows in memory.values() for row in rows)

            pre = optimizer.register_step_pre_hook(look)
            optimizer.step()
            pre.remove()
        else:
            optimizer.step()
        seen["weights"].append(flat(model.parameters()))
    return seen


EXCHANGES: dict[str, dict[str, Any]] = {
    "wrapped first": {"wrap_first": True, "accumulate": 1},
    "sparsifier first": {"wrap_first": False, "accumulate": 1},
    "accumulated": {"wrap_first": True, "accumulate": 2},
}

CASES: dict[str, dict[str, Any]] = {
    "wrapped first": {"wrap_first": True, "accumulate": 1},
    "sparsifier first": {"wrap_first": False, "accumulate": 1},
    "gradients in buckets": {"wrap_first": True, "accumulate": 1, "gradient_as_bucket_view": True},
    "accumulated": {"wrap_first": True, "accumulate": 2},
    "adam, 2:4": {
        "wrap_first": True,
        "accumulate": 1,
        "method": ACDC(NM(2, 4), SCHEDULE),
        "factory": adam,
    },
}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = Path(folder, "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    try:
        result: dict[str, Any] = {name: trained(**case) for name, case in CASES.items()}
        result["disagreeing"] = disagreeing()
        for name, case in EXCHANGES.items():
            result["exchange", name] = exchanging(**case)
        for kind in (DPF, STR):
            result["view", kind.name] = viewing(kind)
        result["memory"] = remembering()
        for name, case in ENGINE_CASES.items():
            for on in (False, True):
                result["engine", name, on] = on_engine(on, **case)
        torch.save(result, Path(folder, f"rank{rank}.pt"))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(worker, (folder,), nprocs=WORLD)
        files = (Path(folder, f"rank{rank}.pt") for rank in range(WORLD))
        return [torch.load(file, weights_only=False) for file in files]


each_case = pytest.mark.parametrize("case", CASES)


@each_case
def test_ranks_agree_bit_for_bit_after_every_step(ranks: list[dict[str, Any]], case: str) -> None:
    first, second = (rank[case] for rank in ranks)
    assert len(first["weights"]) == TOTAL
    assert all(map(torch.equal, first["weights"], second["weights"]))
    assert first["digests"] == second["digests"]
    assert first["changes"] == second["changes"]
    assert [c.step for c in first["changes"]] == [CUTS[0], REVIVAL, CUTS[1]]
    assert torch.equal(first["twin"], second["twin"])
    assert first["zero"]
    assert second["zero"]


@each_case
def test_clipping_sees_the_averaged_gradient_of_the_kept_weights_alone(
    ranks: list[dict[str, Any]], case: str
) -> None:
    # DDP averages what the sparsifier's hook has already cleared on every rank: post-accumulate
    # hooks run before the reducer copies a gradient into its bucket.
    for rank in ranks:
        assert rank[case]["outside"] == [True] * TOTAL
        for seen, expected in rank[case]["norms"]:
            assert seen == pytest.approx(expected, rel=1e-4)
    assert [n for n, _ in ranks[0][case]["norms"]] == [n for n, _ in ranks[1][case]["norms"]]


def test_wrapping_first_or_last_is_the_same_run(ranks: list[dict[str, Any]]) -> None:
    a, b = ranks[0]["wrapped first"], ranks[0]["sparsifier first"]
    assert all(map(torch.equal, a["weights"], b["weights"]))


def test_rank_zero_decides_where_scores_differ_in_the_last_bit(
    ranks: list[dict[str, Any]],
) -> None:
    first, second = (rank["disagreeing"] for rank in ranks)
    for i, step in enumerate(CUTS):
        assert first["local"][i] != second["local"][i]  # each on its own would choose otherwise
        assert first["used"][step - 1] == second["used"][step - 1] == first["local"][i]
    assert first["used"] == second["used"]
    assert first["zero"]
    assert second["zero"]


@pytest.mark.parametrize("case", EXCHANGES)
def test_all_ranks_grow_by_the_averaged_dense_gradient(
    ranks: list[dict[str, Any]], case: str
) -> None:
    first, second = (rank["exchange", case] for rank in ranks)
    assert first["digests"] == second["digests"]
    assert all(map(torch.equal, first["weights"], second["weights"]))
    assert len(first["updates"]) == 3
    assert first["updates"] == second["updates"] == first["expected"]
    assert len(set(first["digests"])) == 3


@pytest.mark.parametrize("name", ["dpf", "str"])
def test_dense_weights_behind_a_view_are_the_same_on_all_ranks(
    ranks: list[dict[str, Any]], name: str
) -> None:
    first, second = (rank["view", name] for rank in ranks)
    assert all(map(torch.equal, first["dense"], second["dense"]))
    assert all(map(torch.equal, first["view"], second["view"]))
    assert first["digests"] == second["digests"]
    assert len(set(first["digests"])) == 4  # chosen at the start, and after steps 2, 4 and 5
    if name == "dpf":
        assert min(first["moved"]) > 0  # what is not computed with is trained, too
    for one, other in zip(first["learned"], second["learned"], strict=True):
        assert one.keys() == other.keys()
        assert bool(one) == (name == "str")
        assert all(torch.equal(one[layer], other[layer]) for layer in one)
    if name == "str":
        layers = [[float(s[0]) for s in learned.values()] for learned in first["learned"]]
        assert all(len(set(values)) > 1 for values in layers)  # gradients parted them


def test_all_ranks_remember_averaged_gradients_and_move_weights_alike(
    ranks: list[dict[str, Any]],
) -> None:
    first, second = (rank["memory"] for rank in ranks)
    assert torch.equal(first["past"], second["past"])
    torch.testing.assert_close(first["past"], first["expected"], rtol=1e-4, atol=1e-6)
    assert all(map(torch.equal, first["weights"], second["weights"]))


each_engine_case = pytest.mark.parametrize("case", ENGINE_CASES)


@each_engine_case
def test_the_engine_of_every_rank_runs_what_the_first_one_chose(
    ranks: list[dict[str, Any]], case: str
) -> None:
    seen = [rank["engine", case, True] for rank in ranks]
    assert [rank["sparse"] for rank in seen] == [MINE[0], MINE[0]]
    assert [rank["tilings"] for rank in seen] == 2 * [{Tiling(2**14, 1)}]
    sparse = [CUTS[0] <= step < REVIVAL or step >= CUTS[1] for step in range(TOTAL)]
    assert [rank["active"] for rank in seen] == [sparse, sparse]
    assert all(map(torch.equal, *(rank["weights"] for rank in seen)))
    assert [rank["zero"] for rank in seen] == [True, True]


@each_engine_case
def test_the_first_rank_judges_whole_steps_for_all(ranks: list[dict[str, Any]], case: str) -> None:
    first, second = (rank["engine", case, True]["trial"] for rank in ranks)
    assert first == second
    trial = verdict.Trial.of(first)
    assert len(trial.blocks) == 3  # alone, the second rank would have ended after two
    assert trial.off
    share = trial.share(frozenset())
    assert share is not None
    assert share > 2


@each_engine_case
def test_with_the_engine_and_without_ranks_train_the_same(
    ranks: list[dict[str, Any]], case: str
) -> None:
    for rank in ranks:
        on, off = (rank["engine", case, on] for on in (True, False))
        assert on["losses"] == pytest.approx(off["losses"], rel=1e-9)
        torch.testing.assert_close(on["weights"], off["weights"], rtol=1e-8, atol=1e-10)
