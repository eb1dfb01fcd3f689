"""A profile counts the time of the kernels, and changes no result."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import acdc
from acdc.bench import breakdown
from acdc.cli import main
from acdc.engine import native
from acdc.engine.profile import Profile
from acdc.engine.reference import Reference
from acdc.errors import InputError
from acdc.runs.models import SmallResNet

native_only = pytest.mark.skipif(not native.available(), reason="the kernels were not compiled")


def training(backend: Reference | None = None) -> tuple[nn.Module, acdc.Engine, Tensor]:
    """Return a network in a sparse phase, its engine, and a batch."""
    torch.manual_seed(0)
    model = SmallResNet(width=8, blocks=1, size=8).build()
    x = torch.randn(64, 1, 8, 8)
    engine = acdc.Engine(model, x, choose=False, backend=backend)
    masks = {n: torch.rand_like(p) < 0.3 for n, p in model.named_parameters() if p.dim() == 4}
    engine.compress(masks)
    return model, engine, x


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the loss and all gradients."""
    loss = F.cross_entropy(model(x), torch.arange(len(x)) % 10)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@native_only
@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_counted_is_all_named_and_no_more_than_passed(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, engine, x = training()
        with engine.profile() as profile:
            step(model, x)
            profile.clear()
            began = time.perf_counter()
            step(model, x)
            whole = 1e3 * (time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    modules = {name for name, _ in model.named_modules()}
    others = {"conversions", "lists", "pool", "relu", "add"}
    rows = profile.rows
    assert {row.layer for row in rows} <= modules | others
    assert all(row.ms > 0 and row.calls > 0 for row in rows)
    parts = sum(row.ms for row in rows) + profile.waiting_ms
    assert 0 < parts <= profile.segments_ms <= whole
    assert profile.rest_ms == pytest.approx(profile.segments_ms - parts)

    convs = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    found = {(row.layer, row.backward, row.kernel): row for row in rows}
    for name in convs:
        ways = [found[name, False, "conv"], found[name, True, "weight_grad"]]
        if name != convs[0]:  # the images take no gradient
            ways.append(found[name, True, "conv"])
        assert len({row.multiply_adds for row in ways}) == 1
        assert all(row.gflops == 2e-6 * row.multiply_adds / row.ms > 0 for row in ways)


@native_only
def test_numbers_are_bitwise_the_same_before_inside_and_after() -> None:
    results = []
    for profiled in (False, True):
        model, engine, x = training()
        results.append([step(model, x)])
        if profiled:
            with engine.profile() as profile:
                results[-1].append(step(model, x))
            counted = len(profile.rows), profile.segments_ms
        else:
            results[-1].append(step(model, x))
        results[-1].append(step(model, x))
    assert all(same(off, on) for off, on in zip(*results, strict=True))
    assert counted[0] > 0
    assert counted == (len(profile.rows), profile.segments_ms)  # nothing is counted any more
    assert type(engine.backend) is native.Native


@native_only
def test_a_compression_inside_outlives_the_profile() -> None:
    model, engine, x = training()
    state = copy.deepcopy(model.state_dict())
    masks = {n: torch.rand_like(p) < 0.1 for n, p in model.named_parameters() if p.dim() == 4}
    with engine.profile():
        engine.compress(masks)
        inside = step(model, x)
    model.load_state_dict(state)  # the running statistics, too
    assert same(step(model, x), inside)


def test_the_reference_has_no_profile() -> None:
    _, engine, _ = training(Reference())
    with pytest.raises(InputError, match="this is the reference"), engine.profile():
        pass


@native_only
def test_bench_where_sums_up_to_the_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "where.json"
    words = ["bench", "where", "--case", "resnet8_w8_n32", "--sparsity", "0.9", "--repeats", "3"]
    assert main([*words, "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert set(row["parts_ms"]) == set(breakdown.PARTS)
    assert sum(row["parts_ms"].values()) == pytest.approx(row["clocked_ms"])
    assert row["parts_ms"]["optimizer"] > 0
    assert row["parts_ms"]["pytorch"] > 0
    assert row["dense_ms"] > 0 < row["engine_ms"]
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[-1] == "optimizer"
    assert out[2].split()[0] == "GF/s"


def test_an_empty_profile_has_no_rest() -> None:
    profile = Profile(nn.Linear(2, 2))
    assert (profile.rows, profile.rest_ms) == ([], 0.0)
