"""One program for each trainer: trains a tiny network, may be killed at a step, and resumes.

Called by ``test_integrations.py`` and ``tools/soak_trainers.py`` as a process of its own:
``trainers.py TRAINER FOLDER METHOD WORLD STEP...``. WORLD processes train together. A run ends by
SIGKILL after STEP optimizer steps, and resumes from its last checkpoint. The final weights are
written to ``final.pt``, those of further processes to ``final-1.pt`` and so on.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import acdc

EPOCHS, BATCHES, ACCUMULATE, SIZE = 6, 7, 2, 4  # 4 optimizer steps an epoch, the last of one batch
STEPS = EPOCHS * 4


def method(name: str) -> Any:
    """Return a method with a plan in epochs: two compressions and a decompression, or one phase."""
    half = acdc.Unstructured(0.5)
    spans = [("dense", "1ep"), ("sparse", "2ep"), ("dense", "5st"), ("sparse", "7st")]
    plan = acdc.phases(EPOCHS, spans)
    return {
        "acdc": lambda: acdc.ACDC(half, plan),
        "topkast": lambda: acdc.TopKAST(half, acdc.constant("sparse", EPOCHS)),
        "set": lambda: acdc.SET(half, acdc.constant("sparse", EPOCHS), every="3st"),
        "woodfisher": lambda: acdc.WoodFisher(
            half, acdc.phases(EPOCHS, [("dense", "2ep"), ("sparse", "4ep")]), every="2st",
            length="2ep",
        ),
    }[name]()  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def samples() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    count = BATCHES * SIZE * world()  # as many batches on each process
    x = torch.randn(count, 6, generator=draw)
    return list(zip(x, torch.randint(3, (count,), generator=draw), strict=True))


def world() -> int:
    """Return the number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def watch(optimizer: torch.optim.Optimizer, stop: int, done: int) -> None:
    """Kill this process after ``stop`` optimizer steps of the run."""
    count = done

    def after(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    if stop:
        optimizer.register_step_post_hook(after)


def lightning(folder: Path, stop: int, name: str, library: str = "lightning.pytorch") -> nn.Module:
    from acdc.integrations.lightning import SparsifierCallback

    pl = importlib.import_module(library)
    checkpoints = importlib.import_module(f"{library}.callbacks")

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
            decay = torch.optim.lr_scheduler.StepLR(optimizer, 2)
            return [optimizer], [decay]

        def on_train_start(self) -> None:
            watch(self.trainer.optimizers[0], stop, self.trainer.global_step)

    module, last = Module(), folder / "last.ckpt"
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accumulate_grad_batches=ACCUMULATE, accelerator="cpu",
        devices=world(), strategy="auto" if world() == 1 else "ddp",
        default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            SparsifierCallback(method(name), folder / "out"),
            checkpoints.ModelCheckpoint(folder, save_last=True, enable_version_counter=False),
        ],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(samples(), SIZE)
    trainer.fit(module, loader, ckpt_path=last if last.exists() else None)
    return module.net


def transformers(folder: Path, stop: int, name: str) -> nn.Module:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from acdc.integrations.transformers import SparsifierCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": nn.functional.cross_entropy(self.net(x), labels)}

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            watch(more["optimizer"].optimizer, stop, state.global_step)

    args = TrainingArguments(
        folder / "run", num_train_epochs=EPOCHS, per_device_train_batch_size=SIZE,
        gradient_accumulation_steps=ACCUMULATE, save_strategy="steps", save_steps=3,
        save_total_limit=2, logging_steps=2, report_to="none", disable_tqdm=True, use_cpu=True,
        optim="adamw_torch", learning_rate=0.01, seed=3,
        ddp_backend="gloo" if world() > 1 else None,
    )  # fmt: skip
    model = Model()
    data: Any = [{"x": x, "labels": y} for x, y in samples()]
    callbacks = [SparsifierCallback(method(name), folder / "out"), Watch()]
    trainer = Trainer(model, args, train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=any(folder.glob("run/checkpoint-*")) or None)
    return model.net


def accelerate(folder: Path, stop: int, name: str) -> nn.Module:
    from accelerate import Accelerator

    from acdc.integrations.accelerate import attach, save

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    loader = torch.utils.data.DataLoader(samples(), SIZE)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    sparsifier = attach(accelerator, method(name), model, optimizer, loader)
    saved = sorted(folder.glob("epoch-*"))
    if saved:
        accelerator.load_state(saved[-1])
    watch(optimizer.optimizer, stop, sparsifier.step)
    for epoch in range(len(saved), EPOCHS):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(folder / "saving")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (folder / "saving").rename(folder / f"epoch-{epoch}")
    save(accelerator, sparsifier, folder / "out")
    return network_of(model)


def network_of(model: Any) -> nn.Module:
    """Return the network without DistributedDataParallel around it."""
    inner: nn.Module = model.module if world() > 1 else model
    return inner


TRAINERS = {"lightning": lightning, "transformers": transformers, "accelerate": accelerate}


def train(trainer: str, folder: Path, stop: int, name: str) -> dict[str, Tensor]:
    """Train in this process, and return the final weights."""
    warnings.filterwarnings("ignore", module="lightning|pytorch_lightning|transformers|torch")
    folder.mkdir(parents=True, exist_ok=True)
    return dict(TRAINERS[trainer](folder, stop, name).state_dict())


def forked(trainer: str, folder: Path, stop: int, name: str, size: int) -> int:
    """Train in child processes, which cost no imports, and return how the first one ended.

    A process whose peer was killed may end by an error of its own. If the first one trains to its
    end, all must.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, *others = [
        rank(trainer, folder, stop, name, number, size, port) for number in range(size)
    ]
    end = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
    ends = [os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) for other in others]
    return end or max(ends, default=0)


def rank(
    trainer: str, folder: Path, stop: int, name: str, number: int, size: int, port: int
) -> int:
    """Start one of the processes, and return its number in the system."""
    if child := os.fork():
        return child
    if size > 1:
        os.environ.update(
            RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(size),
            LOCAL_WORLD_SIZE=str(size), GROUP_RANK="0", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="here", GLOO_SOCKET_IFNAME="lo",
        )  # fmt: skip
    try:
        final = f"final-{number}.pt" if number else "final.pt"
        torch.save(train(trainer, folder, stop, name), folder / final)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main() -> None:
    """Train in child processes: once undisturbed, then killed after each of the given steps."""
    trainer, folder, name, size, *stops = sys.argv[1:]
    importlib.import_module(f"acdc.integrations.{trainer}")  # once, not in every child
    importlib.import_module({"lightning": "lightning.pytorch"}.get(trainer, trainer))
    torch.set_num_threads(1)
    whole, killed = Path(folder) / "whole", Path(folder) / "killed"
    ends = [forked(trainer, whole, 0, name, int(size))]
    ends += [forked(trainer, killed, int(stop), name, int(size)) for stop in [*stops, "0"]]
    print(ends)


if __name__ == "__main__":
    main()
