"""What a run is made of: its recipe turned into a network, an optimizer and a sparsifier."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from acdc import cost
from acdc.errors import InputError, need
from acdc.methods.base import Method
from acdc.result import DenseNetwork, Result, leaves, load
from acdc.runs.data import Data
from acdc.runs.recipe import Recipe
from acdc.runs.record import Event, Folder
from acdc.schedule import Schedule
from acdc.sparsifier import Sparsifier
from acdc.states import load_into

try:
    from lightning.fabric import Fabric
    from lightning.fabric.loggers.tensorboard import TensorBoardLogger
    from lightning.fabric.utilities.exceptions import MisconfigurationException
except ImportError as missing:
    raise need("lightning", "lab") from missing

if TYPE_CHECKING:
    from acdc.runs.engine import RunEngine


@dataclass(frozen=True)
class Setup:
    """What a run is made of.

    Args:
        recipe: What to run.
        folder: The folder of the run.
        fabric: Devices, processes and precision.
        data: The data.
        net: The network.
        model: The network as Fabric wraps it: what is called.
        optimizer: The optimizer.
        stepper: The optimizer as Fabric wraps it: what takes steps.
        sparsifier: Method, network and optimizer, bound together.
        network: The counts of the network's weights and FLOPs.
        engine: What computes sparse phases, if PyTorch does not.
        engine_start: What the start event says of the engine.
    """

    recipe: Recipe
    folder: Folder
    fabric: Fabric
    data: Data
    net: nn.Module
    model: Any
    optimizer: torch.optim.Optimizer
    stepper: Any
    sparsifier: Sparsifier
    network: cost.Network
    engine: RunEngine | None
    engine_start: Event

    @property
    def method(self) -> Method[Any]:
        """The method, with its schedule in steps."""
        return self.sparsifier.method

    @property
    def schedule(self) -> Schedule:
        """The phases in steps."""
        return self.sparsifier.schedule

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return self.data.steps_per_epoch(self.recipe.batch_size)

    @property
    def local_batch(self) -> int:
        """Samples of a batch on this process."""
        return self.recipe.batch_size // self.fabric.world_size

    @property
    def leaves(self) -> type[Result]:
        """What the run leaves."""
        return leaves(self.method)

    def on_device(self, x: Tensor) -> Tensor:
        """Return a batch of inputs on the device, in the memory layout of the recipe."""
        return _on_device(x, self.fabric, self.recipe)


def make_fabric(recipe: Recipe, device: str, folder: Path) -> Fabric:
    """Return Fabric for these devices and this precision.

    Metrics go to TensorBoard as well, where the package is installed.

    Raises:
        InputError: The device or the precision is not to be had here.
    """
    installed = importlib.util.find_spec("tensorboard") is not None
    try:
        str(folder.absolute()).encode("utf-8")
    except UnicodeEncodeError:  # TensorBoard cannot write into a folder with such a name
        installed = False
    here, machines = _processes(recipe)
    logger = TensorBoardLogger(folder, name="tensorboard", version="") if installed else None
    try:
        return Fabric(
            accelerator=device,
            devices=here,
            num_nodes=machines,
            precision=recipe.precision,  # type: ignore[arg-type]
            loggers=logger,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise InputError(
            f"The run cannot be set up on device {device!r} with devices={recipe.devices} and "
            f"precision={recipe.precision!r}: {error} Choose --device cpu, or other values."
        ) from error


def _processes(recipe: Recipe) -> tuple[int, int]:
    """Return how many processes of the run are on each machine, and the number of machines.

    Raises:
        InputError: ``torchrun`` has started another number of processes than the recipe asks for.
    """
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        return recipe.devices, 1
    world, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if world != recipe.devices:
        raise InputError(
            f"torchrun has started {world} processes, and the run is one of {recipe.devices}. "
            f"Start {recipe.devices} with --nproc-per-node, or begin a run with --devices {world}."
        )
    return here, world // here


def set_up(recipe: Recipe, folder: Folder, fabric: Fabric, data: Data) -> Setup:
    """Build the network, the optimizer, the engine and the sparsifier of a run.

    Args:
        recipe: What to run.
        folder: The folder of the run.
        fabric: Devices, processes and precision.
        data: The data.

    Raises:
        InputError: The recipe cannot be run.
    """
    torch.manual_seed(recipe.seed)
    net = recipe.model.build()
    if recipe.start is not None:
        _start_from(Folder(folder.path.parent / recipe.start), net)
    if recipe.channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    method = recipe.method.resolve(data.steps_per_epoch(recipe.batch_size))
    kinds = [phase.kind for phase in method.resolved.phases]
    if leaves(method) is not DenseNetwork and kinds[-1] == "dense":
        raise InputError(
            f"The run ends {' and '.join(kinds[-2:])}. A pair needs a last dense phase, whose "
            f"end is the dense twin, and a sparse one after it."
        )
    optimizer = recipe.optimizer.build(net.parameters())
    model, stepper = fabric.setup(net, optimizer)
    data.keep_on(fabric.device)
    engine, engine_start = _engine(recipe, fabric, net, method.resolved)
    # The loop lets it change the support: a phase is evaluated before the next one begins.
    # The wrapped network says which processes train it together.
    sparsifier = Sparsifier(
        method,
        model,
        optimizer,
        engine=engine,
        automatic=False,
        scale_rows=recipe.optimizer.scale_rows,
    )
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            # Imported late: one process does not need it, and it loads torch's checkpoints.
            from acdc.distributed import reduce_kept

            reduce_kept(module, sparsifier)
    example = recipe.model.example(1).to(fabric.device)
    return Setup(
        recipe=recipe,
        folder=folder,
        fabric=fabric,
        data=data,
        net=net,
        model=model,
        optimizer=optimizer,
        stepper=stepper,
        sparsifier=sparsifier,
        network=cost.measure(net, example, also=sparsifier.params),
        engine=engine,
        engine_start=engine_start,
    )


def _engine(
    recipe: Recipe, fabric: Fabric, net: nn.Module, schedule: Schedule
) -> tuple[RunEngine | None, Event]:
    """Return the engine, if the run has one, and what the start event says of it."""
    if recipe.engine == "off" or schedule.last("sparse") is None:
        return None, {"kind": "off", "reason": None}
    # Imported late: the engine takes a while to load, and a run without it need not wait.
    from acdc.runs.engine import RunEngine, why_off

    if reason := why_off(fabric.device, recipe.precision):
        return None, {"kind": "off", "reason": reason}
    samples = recipe.batch_size // fabric.world_size // recipe.accumulate
    example = _on_device(recipe.model.example(samples), fabric, recipe)
    engine = RunEngine(net, example, recipe.engine)
    return engine, engine.start()


def _start_from(folder: Folder, net: nn.Module) -> None:
    """Load the dense network of a finished run.

    Raises:
        InputError: There is none, or it is of another model.
    """
    folder.read(folder.record)
    state = load(folder.result).networks().get("dense")
    if state is None:
        raise InputError(
            f"start is {folder.path.name!r}, and that run left no dense network. Name a run of a "
            f"method that leaves one, such as dense."
        )
    try:
        load_into(net, state, "dense network")
    except InputError as error:
        raise InputError(
            f"start is {folder.path.name!r}, and that run trained another network. {error} Name a "
            f"run with the same model."
        ) from error


def _on_device(x: Tensor, fabric: Fabric, recipe: Recipe) -> Tensor:
    x = x.to(fabric.device)
    if recipe.channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x
