"""Networks of timm and torchvision, and adapters and averages of other packages, end to end.

`make test-zoo` runs these tests in an environment of its own; elsewhere they are skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import acdc
from acdc.pattern import Unstructured
from support.helpers import SCHEDULE, TOTAL, is_plus_zero, same
from support.phases import every_other_stands_in_refused, train
from support.vision import ON_ENGINE, TIMM, TORCHVISION

WHY = "{} is not installed: 'make test-zoo' runs this test in an environment that has it"
NETWORKS = TIMM | TORCHVISION


def needs(name: str) -> None:
    package = "timm" if name in TIMM else "torchvision"
    pytest.importorskip(package, reason=WHY.format(package))


def slow_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_four_phases_and_the_pair_on_disk(name: str, tmp_path: Path) -> None:
    needs(name)
    case = NETWORKS[name]
    model, sparsifier = train(case, Unstructured(0.9), optimizer=slow_sgd)
    assert len(sparsifier.params) == case.weights
    every_other_stands_in_refused(model, sparsifier)
    pair = sparsifier.pair()
    pair.save(tmp_path / "pair")
    loaded = acdc.Pair.load(tmp_path / "pair")
    assert loaded.support == sparsifier.support
    other = case.build()
    other.load_state_dict(loaded.sparse)
    assert same(other.state_dict(), model.state_dict())
    other.load_state_dict(loaded.dense)
    assert sum(int(p.count_nonzero()) for p in other.parameters()) > sum(
        int(p.count_nonzero()) for p in model.parameters()
    )


@pytest.mark.parametrize("name", ON_ENGINE)
def test_the_engine_computes_what_pytorch_does(name: str) -> None:
    needs(name)
    case = NETWORKS[name]
    plain, _ = train(case, Unstructured(0.9), optimizer=slow_sgd)
    ran, sparsifier = train(case, Unstructured(0.9), engine=True, optimizer=slow_sgd)
    assert sparsifier.engine is not None
    sparse = {name for name, choice in sparsifier.engine.choices.items() if choice.sparse}
    assert len(sparse | sparsifier.engine.refused.keys()) >= len(sparsifier.params)
    assert len(sparse) > len(sparsifier.params) // 2
    for (key, mine), other in zip(
        ran.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-3, msg=key)


def test_convolutions_that_standardise_their_weights_stand_in_refused() -> None:
    needs("standardised resnet")
    for name in ("standardised resnet", "normalizer-free resnet"):
        model = NETWORKS[name].build()
        chosen, refused = acdc.Layers().split(model)
        assert len(chosen) == 1
        assert any("zeros are no zeros" in reason for reason in refused.values())


def test_lora_of_peft_on_a_network_of_timm() -> None:
    peft = pytest.importorskip("peft", reason=WHY.format("peft"))
    needs("vit_small")
    case = TIMM["vit_small"]
    config = peft.LoraConfig(target_modules=["qkv", "proj"], r=2)
    adapted = peft.get_peft_model(case.build(), config)
    method = acdc.ACDC(Unstructured(0.9), SCHEDULE)
    with pytest.raises(acdc.InputError, match=r"Nothing to prune.*an adapter of the layer"):
        acdc.Sparsifier(method, adapted, slow_sgd(adapted))
    merged = adapted.merge_and_unload().requires_grad_(True)
    model, sparsifier = train(
        type(case)(lambda: merged, case.loss, case.example, case.weights),
        Unstructured(0.9),
        optimizer=slow_sgd,
    )
    assert len(sparsifier.params) == case.weights
    assert sparsifier.pair().sparse.keys() == model.state_dict().keys()


def test_the_average_of_timm_is_projected_and_paired(tmp_path: Path) -> None:
    needs("vit_small")
    from timm.utils import ModelEmaV3

    case = TIMM["vit_small"]
    model = case.build()
    method = acdc.ACDC(Unstructured(0.9), SCHEDULE)
    average = ModelEmaV3(model, decay=0.5)
    with pytest.raises(acdc.InputError, match=r"average of weights \(ModelEmaV3\)"):
        acdc.Sparsifier(method, average, slow_sgd(average))
    optimizer = slow_sgd(model)
    sparsifier = acdc.Sparsifier(method, model, optimizer)
    sparsifier.register_average(average)
    for step in range(TOTAL):
        optimizer.zero_grad()
        case.loss(model, step).backward()
        optimizer.step()
        average.update(model, step)
        sparsifier.project(average)
        if not sparsifier.support.is_full:
            for name, mask in sparsifier.support.items():
                assert is_plus_zero(average.module.get_parameter(name)[~mask]), (step, name)
    pair = sparsifier.pair(average=average)
    pair.save(tmp_path / "pair")
    assert same(acdc.Pair.load(tmp_path / "pair").sparse, pair.sparse)
    assert not same(pair.sparse, sparsifier.pair().sparse)
