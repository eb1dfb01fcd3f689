"""Trainers that own the loop: Lightning, transformers and accelerate, the real libraries.

The programs that are killed are in ``support/trainers.py``.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import acdc
from acdc.errors import InputError
from acdc.integrations import shared
from acdc.result import load
from support import trainers

FULL = bool(os.environ.get("ACDC_FULL"))
TESTS = Path(__file__).parent
NAMES = ["lightning", "transformers", "accelerate"]


def killed(trainer: str, folder: Path, method: str, *stops: int, world: int = 1) -> list[int]:
    """Train undisturbed, and killed after each of these steps; return how each attempt ended."""
    done = subprocess.run(
        [sys.executable, "-m", "support.trainers", trainer, folder, method, str(world),
         *map(str, stops)],
        cwd=TESTS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends: list[int] = json.loads(done.stdout.splitlines()[-1])
    assert world > 1 or 1 not in ends, done.stderr
    return ends


@pytest.mark.slow
@pytest.mark.parametrize("trainer", NAMES)
@pytest.mark.parametrize(
    "method",
    ["acdc", *(pytest.param(m, marks=pytest.mark.skipif(not FULL, reason="ACDC_FULL=1"))
               for m in ("topkast", "set", "woodfisher"))],
)  # fmt: skip
def test_a_killed_and_resumed_run_ends_bitwise_as_the_other(
    trainer: str, method: str, tmp_path: Path
) -> None:
    pytest.importorskip(trainer)
    stops = sorted(random.sample(range(4, trainers.STEPS), 4 if FULL else 1))
    assert killed(trainer, tmp_path, method, *stops) == [0, *[-9] * len(stops), 0], stops
    whole, resumed = (torch.load(tmp_path / k / "final.pt") for k in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole), stops
    left = load(tmp_path / "killed" / "out")
    assert left == load(tmp_path / "whole" / "out")
    assert left.support.sparsity == 0.5
    assert isinstance(left, acdc.SparseNetwork if method == "set" else acdc.Pair)
    if isinstance(left, acdc.Pair):
        assert left.facts["dense_step"] == {"acdc": 17, "topkast": 24, "woodfisher": 8}[method]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", NAMES)
def test_two_processes_that_are_killed_end_as_the_others(trainer: str, tmp_path: Path) -> None:
    pytest.importorskip(trainer)
    stop = random.randrange(4, trainers.STEPS)
    assert killed(trainer, tmp_path, "acdc", stop, world=2) == [0, -9, 0], stop
    whole, resumed, other = (
        torch.load(tmp_path / name)
        for name in ("whole/final.pt", "killed/final.pt", "killed/final-1.pt")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole), stop
    weights = [name for name in whole if "running" not in name]  # of the batches of a process
    assert all(torch.equal(resumed[name], other[name]) for name in weights), stop
    left = load(tmp_path / "killed" / "out")
    assert left == load(tmp_path / "whole" / "out")
    assert left.support.sparsity == 0.5
    assert left.facts["step"] == trainers.STEPS


# --- Lightning ----------------------------------------------------------------------------------


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


def lightning_run(
    pl: Any,
    method: Any,
    folder: Path,
    ckpt: Path | None = None,
    callbacks: Any = (),
    **settings: Any,
) -> Any:
    from acdc.integrations.lightning import SparsifierCallback

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = trainers.network()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    callback = SparsifierCallback(method, folder / "out") if method is not None else None
    trainer = pl.Trainer(
        **{"max_epochs": trainers.EPOCHS, "accumulate_grad_batches": 2, "logger": False} | settings,
        accelerator="cpu", default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*callbacks, *([callback] if callback else [])],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(trainers.samples(), trainers.SIZE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning|pytorch_lightning|torch")
        trainer.fit(Module(), loader, ckpt_path=ckpt)
    return trainer, callback


def test_lightning_logs_progress_and_saves_the_pair(pl: Any, tmp_path: Path) -> None:
    trainer, callback = lightning_run(pl, trainers.method("acdc"), tmp_path)
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    assert logged == {"acdc/progress": 1.0, "acdc/sparse_phase": 1.0, "acdc/sparsity": 0.5}
    assert [p.stop for p in callback.sparsifier.schedule.phases] == [4, 12, 17, 24]
    assert load(tmp_path / "out") == callback.result
    # The module is free again.
    optimizer = torch.optim.SGD(trainer.lightning_module.parameters(), 0.1)
    method = trainers.method("acdc").resolve(4)
    acdc.Sparsifier(method, trainer.lightning_module, optimizer).remove()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_epochs": 5}, ["24", "20", "max_epochs=5"]),
        ({"max_steps": 23}, ["24", "23", "max_steps=23"]),
        ({"accumulate_grad_batches": 1, "max_epochs": 7}, ["42", "49"]),
        ({"max_epochs": -1}, ["no end", "Set max_epochs or max_steps"]),
    ],
)
def test_lightning_refuses_a_schedule_of_another_length(
    tmp_path: Path, settings: dict[str, Any], words: list[str]
) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    with pytest.raises(InputError) as refused:
        lightning_run(pl, trainers.method("set"), tmp_path, **settings)
    assert all(word in str(refused.value) for word in words), refused.value


def test_lightning_refuses_a_checkpoint_without_a_sparsifier(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    trainer, _ = lightning_run(pl, None, tmp_path, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(InputError, match="step 8 was saved without a SparsifierCallback"):
        lightning_run(pl, trainers.method("acdc"), tmp_path, tmp_path / "plain.ckpt")


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_lightning_refuses_a_strategy_that_shards(name: str, tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    # These strategies do not start without a GPU: a stand-in has their name.
    strategy = type(name, (pl.strategies.SingleDeviceStrategy,), {})("cpu")
    with pytest.raises(InputError, match=rf"uses {name}: .*Train on one device, or with DDP"):
        lightning_run(pl, trainers.method("acdc"), tmp_path, strategy=strategy)


def manual_module(pl: Any) -> Any:
    """Return a module that steps two optimizers by itself."""

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = trainers.network()
            self.automatic_optimization = False

        def training_step(self, batch: Any, _: int) -> None:
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
            for optimizer in optimizers:
                optimizer.step()

        def configure_optimizers(self) -> Any:
            first, *others = self.net
            rest = [p for layer in others for p in layer.parameters()]
            return [
                torch.optim.SGD(first.parameters(), 0.1, momentum=0.9),
                torch.optim.AdamW(rest, 0.01),
            ]

    return Module()


@pytest.mark.parametrize("stop", [None, 2], ids=["whole", "resumed"])
def test_lightning_manual_optimization_with_two_optimizers(
    stop: int | None, tmp_path: Path
) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from acdc.integrations.lightning import SparsifierCallback

    method = trainers.method("acdc").resolve(4)
    last = tmp_path / "last.ckpt"

    def fit(epochs: int, ckpt: Path | None) -> Any:
        module, callback = manual_module(pl), SparsifierCallback(method, tmp_path / "out")
        trainer = pl.Trainer(
            max_epochs=epochs, limit_train_batches=4, accelerator="cpu", logger=False,
            default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=[callback],
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loader = torch.utils.data.DataLoader(trainers.samples(), trainers.SIZE)
            trainer.fit(module, loader, ckpt_path=ckpt)
            trainer.save_checkpoint(last)
        return module, callback

    whole, callback = fit(6, None)
    assert callback.sparsifier.step == trainers.STEPS  # not 48: one step is one call of each
    assert len(callback.sparsifier.optimizers) == 2
    assert load(tmp_path / "out").facts["step"] == trainers.STEPS
    if stop:
        fit(stop, None)
        resumed, callback = fit(6, last)
        assert callback.sparsifier.step == trainers.STEPS
        states = whole.state_dict(), resumed.state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_lightning_stopped_early_warns_and_resumes_after_an_exception(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")

    class Stop(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 3

    class Fail(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 15:
                raise ValueError("mine")

    with pytest.warns(UserWarning, match="after 16 of 24 optimizer steps.*Resume"):
        _, callback = lightning_run(
            pl, trainers.method("acdc"), tmp_path, callbacks=[Stop()], min_epochs=1
        )
    assert callback.result is None
    assert not (tmp_path / "out").exists()
    last = pl.callbacks.ModelCheckpoint(tmp_path, save_on_exception=True, save_top_k=0)
    with pytest.raises(ValueError, match="mine"):
        lightning_run(pl, trainers.method("acdc"), tmp_path, callbacks=[Fail(), last])
    (saved,) = tmp_path.glob("*.ckpt")
    state = torch.load(saved, weights_only=False)["callbacks"]["SparsifierCallback"]
    assert state["step"] == 15


# --- transformers -------------------------------------------------------------------------------


def transformers_run(
    method: Any, folder: Path, resume: Any = None, callbacks: Any = (), data: Any = None,
    **settings: Any,
) -> Any:  # fmt: skip
    transformers = pytest.importorskip("transformers")
    from acdc.integrations.transformers import SparsifierCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = trainers.network()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    defaults = {
        "num_train_epochs": trainers.EPOCHS, "gradient_accumulation_steps": 2, "logging_steps": 8,
        "save_strategy": "no",
    }  # fmt: skip
    args = transformers.TrainingArguments(
        folder / "run", per_device_train_batch_size=trainers.SIZE, report_to="none",
        disable_tqdm=True, use_cpu=True, **defaults | settings,
    )  # fmt: skip
    rows = [{"x": x, "labels": y} for x, y in trainers.samples()]
    callback = [SparsifierCallback(method, folder / "out")] if method is not None else []
    trainer = transformers.Trainer(
        Model(), args, train_dataset=data or rows, eval_dataset=rows,
        callbacks=[*callbacks, *callback],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback[0] if callback else None


def test_transformers_takes_the_pair_before_the_best_model_is_loaded(tmp_path: Path) -> None:
    trainer, callback = transformers_run(
        trainers.method("acdc"), tmp_path, save_strategy="epoch", eval_strategy="epoch",
        load_best_model_at_end=True, save_total_limit=1, metric_for_best_model="eval_loss",
        greater_is_better=True, learning_rate=0.01,
    )  # fmt: skip
    assert trainer.state.best_global_step < trainers.STEPS  # the case that is tested
    pair = load(tmp_path / "out")
    assert pair.facts["step"] == trainers.STEPS
    assert callback.sparsifier.step == trainers.STEPS
    differ = [
        n for n, w in trainer.model.state_dict().items() if not torch.equal(w, pair.sparse[n])
    ]
    assert differ
    # Logged, and the states of removed checkpoints are removed.
    assert trainer.state.log_history[0]["acdc/sparsity"] == 0.5
    steps = {int(p.name.split("-")[1]) for p in (tmp_path / "run").glob("checkpoint-*")}
    states = {int(p.name.split("-")[1]) for p in (tmp_path / "run" / "sparsifier").glob("*.pt")}
    assert states == steps


def test_transformers_refuses_what_it_cannot_resume(tmp_path: Path) -> None:
    run, method = tmp_path / "run", trainers.method("acdc")
    transformers_run(None, tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    with pytest.raises(InputError, match="step 4 was saved without a SparsifierCallback"):
        transformers_run(method, tmp_path, str(run / "checkpoint-4"))
    transformers_run(method, tmp_path, save_strategy="steps", save_steps=8)
    states = sorted((run / "sparsifier").iterdir())
    state = next(path for path in states if path.name.startswith("step-8-"))
    data = state.read_bytes()
    state.write_bytes(data[:-1])
    with pytest.raises(InputError, match="truncated or altered"):
        transformers_run(method, tmp_path, str(run / "checkpoint-8"))
    state.unlink()
    with pytest.raises(InputError, match=r"needs the sparsifier's state .*step-8-.*not there"):
        transformers_run(method, tmp_path, str(run / "checkpoint-8"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_train_epochs": 5}, ["24", "20", "num_train_epochs=5"]),
        ({"max_steps": 23}, ["24", "23", "max_steps=23"]),
        ({"restore_callback_states_from_checkpoint": True}, ["Set it to False"]),
    ],
)
def test_transformers_refuses_settings(
    tmp_path: Path, settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InputError) as refused:
        transformers_run(trainers.method("acdc"), tmp_path, **settings)
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_transformers_and_accelerate_refuse_what_shards(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU accelerate starts DDP instead: the state is changed after it was made."""
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    from acdc.integrations.accelerate import attach
    from acdc.integrations.transformers import SparsifierCallback

    words = rf"uses {kind}: .*Train on one device, or with DDP"
    method, sharded = trainers.method("acdc"), accelerate.DistributedType[kind]
    accelerator = accelerate.Accelerator(cpu=True)
    model = trainers.network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    monkeypatch.setattr(accelerator.state, "distributed_type", sharded)
    with pytest.raises(InputError, match=words):
        attach(accelerator, method.resolve(4), model, optimizer)
    begin, seen = SparsifierCallback.on_train_begin, []

    def sharded_begin(self: Any, args: Any, *more: Any, **kwargs: Any) -> None:
        seen.append(kwargs["model"])
        monkeypatch.setattr(args.distributed_state, "distributed_type", sharded)
        begin(self, args, *more, **kwargs)

    monkeypatch.setattr(SparsifierCallback, "on_train_begin", sharded_begin)
    with pytest.raises(InputError, match=words):
        transformers_run(method, tmp_path)
    assert len(seen) == 1


def test_transformers_data_without_a_length_needs_a_schedule_in_steps(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter([{"x": x, "labels": y} for x, y in trainers.samples()])

    method = trainers.method("acdc")
    with pytest.raises(InputError, match=r"method.resolve\(steps_per_epoch\)"):
        transformers_run(method, tmp_path, data=Stream(), max_steps=24)
    transformers_run(method.resolve(4), tmp_path, data=Stream(), max_steps=24)
    assert load(tmp_path / "out").facts["step"] == 24


def test_transformers_stopped_early_saves_only_in_the_last_phase(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Stop(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def __init__(self, step: int) -> None:
            self.step = step

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step == self.step

    with pytest.warns(UserWarning, match="after 16 of 24 optimizer steps.*No result"):
        transformers_run(trainers.method("acdc"), tmp_path, callbacks=[Stop(16)])
    assert not (tmp_path / "out").exists()
    transformers_run(trainers.method("acdc"), tmp_path, callbacks=[Stop(20)])
    assert load(tmp_path / "out").facts["step"] == 20


# --- accelerate, and what all share -------------------------------------------------------------


def test_accelerate_refuses_what_is_not_prepared(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    from acdc.integrations.accelerate import attach, save

    accelerator = accelerate.Accelerator(cpu=True)
    model = trainers.network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = trainers.method("acdc")
    with pytest.raises(InputError, match="Call prepare first"):
        attach(accelerator, method, model, optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    with pytest.raises(InputError, match=r"method.resolve\(steps_per_epoch\)"):
        attach(accelerator, method, model, optimizer)
    sparsifier = attach(accelerator, method.resolve(4), model, optimizer)
    with pytest.warns(UserWarning, match="after 0 of 24"):
        assert save(accelerator, sparsifier, tmp_path) is None


def test_accelerate_with_two_optimizers_has_one_clock() -> None:
    accelerate = pytest.importorskip("accelerate")
    from acdc.integrations.accelerate import attach

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = trainers.network()
    first, *others = model  # type: ignore[misc]
    rest = [p for layer in others for p in layer.parameters()]
    loader = torch.utils.data.DataLoader(trainers.samples(), trainers.SIZE)  # type: ignore[var-annotated, arg-type]
    model, one, two, loader = accelerator.prepare(
        model, torch.optim.SGD(first.parameters(), 0.1), torch.optim.AdamW(rest, 0.01), loader
    )
    with pytest.raises(InputError, match="a plain AdamW"):
        attach(accelerator, trainers.method("acdc"), model, [one, two.optimizer], loader)
    sparsifier = attach(accelerator, trainers.method("acdc"), model, [one, two], loader)
    for _ in range(trainers.EPOCHS):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                for optimizer in (one, two):
                    optimizer.step()
                    optimizer.zero_grad()
    assert sparsifier.step == trainers.STEPS
    assert sparsifier.optimizers == (one.optimizer, two.optimizer)
    for name, mask in sparsifier.support.items():
        assert not sparsifier.params[name][~mask].any()


@pytest.mark.parametrize(
    "name", ["DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "DEEPSPEED", "FSDP",
             "MEGATRON_LM", "XLAStrategy"],
)  # fmt: skip
def test_sharded_training_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name}: .*Train on one device, or with DDP\."):
        shared.refuse_sharded(name)
    for plain in ("SingleDeviceStrategy", "DDPStrategy", "NO", "MULTI_GPU", "MULTI_CPU"):
        shared.refuse_sharded(plain)


@pytest.mark.parametrize("trainer", NAMES)
def test_the_trainers_ask_for_their_own_kind_of_process(
    trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each integration hands over its strategy before it touches the model."""
    pytest.importorskip(trainer)
    seen: list[str] = []

    def refuse(strategy: str) -> None:
        seen.append(strategy)
        raise InputError("refused")

    module = importlib.import_module(f"acdc.integrations.{trainer}")
    monkeypatch.setattr(module, "refuse_sharded", refuse)
    runs = {
        "lightning": lambda m: lightning_run(
            importlib.import_module("lightning.pytorch"), m, tmp_path
        ),
        "transformers": lambda m: transformers_run(m, tmp_path),
        "accelerate": lambda m: module.attach(
            importlib.import_module("accelerate").Accelerator(cpu=True), m, nn.Linear(2, 2), None
        ),
    }
    with pytest.raises(InputError, match="refused"):
        runs[trainer](trainers.method("acdc"))
    assert seen == [{"lightning": "SingleDeviceStrategy"}.get(trainer, "NO")]


def test_a_folder_with_another_result_is_refused_before_training(tmp_path: Path) -> None:
    acdc.DenseNetwork({"a": torch.zeros(2)}).save(tmp_path)
    method = trainers.method("acdc").resolve(4)
    with pytest.raises(InputError, match=r"already holds a dense network.*leaves a pair"):
        shared.check_folder(tmp_path, method)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        shared.check_folder(tmp_path / "file", method)


def test_a_missing_library_is_named_in_a_sentence() -> None:
    libraries = ("lightning", "pytorch_lightning", "transformers", "accelerate")
    code = (
        f"import importlib, sys\n"
        f"for name in {libraries}:\n    sys.modules[name] = None\n"
        f"import acdc.integrations\n"
        f"for name in {NAMES}:\n"
        f"    try:\n        importlib.import_module('acdc.integrations.' + name)\n"
        f"    except acdc.MissingDependency as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name, line in zip(NAMES, done.stdout.splitlines(), strict=True):
        assert f"{name!r}" in line
        assert f'pip install "acdc-train[{name}]"' in line
