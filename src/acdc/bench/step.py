"""A whole training step: forward, loss, backward, and a step of SGD with momentum.

Dense PyTorch in each memory format is timed beside the engine with its sparsifier at each sparsity,
in a sparse phase from the first step on. By default every pruned layer has the same sparsity,
because a global cut on untrained weights would prune the wide layers alone. A ResNet keeps its
first and its last layer dense, as the uniform scope does. A GPT keeps its head dense.

The memory of a step is measured in a fresh process that trains this one network: the peak during a
step, minus the memory in use before the network was built. The engine has decided before that step
what stays on; the peak of its first steps, in which it times layers and whole steps, is a figure of
its own.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import acdc
from acdc.bench import networks
from acdc.bench.networks import Network
from acdc.bench.peers import TOLERANCE, Unable, reason, use_sparseprop
from acdc.bench.race import Row, Workload, race, summary
from acdc.cost import measure as flops_of
from acdc.pattern import Scope
from acdc.runs.models import CifarResNet
from acdc.support import Support

CASES = ("resnet20_w16_n128", "resnet14_w64_n64", "gpt_d768_l4_t512")
PEERS = ("torch_csr", "sparseprop", "sparselab")
LAYERS_ONLY = "single layers only: see 'acdc bench layers'"
WARM_UP = 2  # steps

# The learning rate is small, so that no training can diverge.
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-4, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-5),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-5),
}


class Training:
    """One network in training by dense PyTorch.

    Args:
        network: What to train.
        memory_format: Memory format of images and convolutions.
        optimizer: Its name in ``OPTIMIZERS``.
    """

    def __init__(
        self,
        network: Network,
        memory_format: torch.memory_format = torch.channels_last,
        optimizer: str = "sgd",
    ) -> None:
        self.network, self._kind = network, optimizer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = network.build()
        self.x, self.y = network.data()
        if network.images:
            self.net = self.net.to(memory_format=memory_format)  # type: ignore[call-overload]
            self.x = self.x.contiguous(memory_format=memory_format)
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self._kind](self.net.parameters())

    def step(self) -> float:
        """Take one optimizer step, and return the loss before it."""
        self.optimizer.zero_grad()
        loss = self._loss()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def _loss(self) -> Tensor:
        return self.network.loss(self.net, self.x, self.y)


class OnEngine(Training):
    """One network in training on the engine, in a sparse phase.

    Args:
        network: What to train.
        sparsity: Fraction of zeros.
        scope: Scope in which the weights compete.

    Attributes:
        loss: Loss of the first step.
        first: Seconds of the first compression, in which layers are timed and index lists built,
            and of the step after it.
    """

    def __init__(
        self, network: Network, sparsity: float, scope: Scope, optimizer: str = "sgd"
    ) -> None:
        super().__init__(network, optimizer=optimizer)
        self.engine = acdc.Engine(self.net, self.x)
        plan = acdc.constant("sparse", epochs=1).resolve(1_000_000)
        method = acdc.ACDC(acdc.Unstructured(sparsity, scope=scope), plan, layers=network.layers)
        began = time.perf_counter()
        self.sparsifier = acdc.Sparsifier(method, self.net, self.optimizer, engine=self.engine)
        self.loss = self.step()
        self.first = time.perf_counter() - began

    def settle(self) -> None:
        """Take steps until the engine has decided what stays on."""
        self.step()
        while self.engine.judges:
            self.step()

    def again(self) -> float:
        """Return the seconds of another compression, and of the step after it."""
        began = time.perf_counter()
        self.engine.compress(self.sparsifier.support)
        self.step()
        return time.perf_counter() - began


class OnSparseProp(Training):
    """One network in training with SparseProp's modules in place of all pruned layers.

    Args:
        network: What to train.
        support: Which weights are kept.
    """

    def __init__(self, network: Network, support: Support) -> None:
        super().__init__(network, torch.contiguous_format)
        inputs: dict[str, Tensor] = {}
        layers = {name.removesuffix(".weight"): mask for name, mask in support.items()}
        for name in layers:
            self.net.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: inputs.update({name: args[0]})
            )
        with torch.no_grad():
            self.net(self.x)
            for name, mask in layers.items():
                layer = self.net.get_submodule(name)
                assert isinstance(layer, nn.Conv2d | nn.Linear)
                layer.weight.masked_fill_(~mask, 0.0)
        for name in layers:
            use_sparseprop(self.net, name, inputs[name].shape)
        self.optimizer = self._optimizer()


def measure(
    chosen: Sequence[Network], sparsities: Sequence[float], rounds: int, scope: Scope
) -> Iterator[Row]:
    """Yield a row for every network and sparsity, as soon as the network has been timed.

    Args:
        chosen: What to train.
        sparsities: Fractions of weights that are zero.
        rounds: Timed steps of each training, taken in turn.
        scope: Scope in which the weights compete.
    """
    for network in chosen:
        yield from _rows(network, sparsities, rounds, scope)


def _rows(
    network: Network, sparsities: Sequence[float], rounds: int, scope: Scope
) -> Iterator[Row]:
    formats = {"plain": torch.contiguous_format}
    if network.images:
        formats = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
    dense = {setting: Training(network, formats[setting]) for setting in formats}
    engines = {sparsity: OnEngine(network, sparsity, scope) for sparsity in sparsities}
    notes = {sparsity: dict.fromkeys(PEERS, LAYERS_ONLY) for sparsity in sparsities}
    trainings: dict[tuple[str, float | None], Training] = {}
    trainings |= {(setting, None): training for setting, training in dense.items()}
    for sparsity, engine in engines.items():
        trainings["engine", sparsity] = engine
        try:
            trainings["sparseprop", sparsity] = _sparseprop(network, engine)
            del notes[sparsity]["sparseprop"]
        except Unable as error:
            notes[sparsity]["sparseprop"] = str(error)
        engine.settle()
        if engine.engine.off:
            notes[sparsity]["engine"] = engine.engine.off
    for training in trainings.values():
        for _ in range(WARM_UP):
            training.step()
    workloads = {key: Workload((training.step,)) for key, training in trainings.items()}
    seconds = race(workloads, rounds)

    by_setting = {setting: seconds[setting, None] for setting in dense}
    cost = flops_of(network.build(), network.data()[0][:1])
    dense_peaks: Peaks | None = None
    for sparsity, engine in engines.items():
        names = [name for name, zeros in seconds if zeros == sparsity]
        row: Row = {"case": network.name, "sparsity": sparsity}
        row |= summary(by_setting, {name: seconds[name, sparsity] for name in names}, PEERS)
        row["flops_share"] = cost.inference_ratio(engine.sparsifier.support.counts())
        row["compression_steps"] = 1000 * engine.first / row["engine_ms"] - 1
        row["recompression_steps"] = 1000 * engine.again() / row["engine_ms"] - 1
        dense_peaks = dense_peaks or peaks_mb(network.name, formats[row["dense_setting"]])
        row |= memory(dense_peaks, peaks_mb(network.name, sparsity, scope))
        row["layers"] = choices(engine.engine)
        row["verdicts"] = [str(verdict) for verdict in engine.engine.verdicts]
        yield row | {"notes": notes[sparsity]}


def _sparseprop(network: Network, engine: OnEngine) -> Training:
    """Return the training with SparseProp, if its first loss is the engine's."""
    if importlib.util.find_spec("sparseprop") is None:
        raise Unable("not installed")
    try:
        peer = OnSparseProp(network, engine.sparsifier.support)
        loss = peer.step()
    except Exception as error:  # another library may raise any exception
        raise Unable(reason(error)) from error
    if not abs(loss - engine.loss) < TOLERANCE * engine.loss:
        raise Unable(f"its loss is {loss:.4f}, and the engine's {engine.loss:.4f}")
    return peer


def choices(engine: acdc.Engine) -> dict[str, str]:
    """Return for every layer whether it ran sparse or dense, and why it was refused."""
    ran = {name: "sparse" if choice.sparse else "dense" for name, choice in engine.choices.items()}
    return ran | {name: f"dense: {reason}" for name, reason in engine.refused.items()}


# --- memory -------------------------------------------------------------------------------------

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


Find = Callable[[str], Network | None]


class Peaks(NamedTuple):
    """Peaks of the memory that a training needs, in megabytes (10^6 bytes).

    Args:
        step: During a step, when all is decided.
        start: Before that step: while the network is built and compressed, and during the first
            steps.
    """

    step: float
    start: float


def memory(dense: Peaks | None, engine: Peaks | None) -> Row:
    """Return the columns of a row about memory."""
    return {
        "dense_peak_mb": dense and dense.step,
        "engine_peak_mb": engine and engine.step,
        "engine_start_peak_mb": engine and engine.start,
    }


def peaks_mb(name: str, *how: Any, find: Find = networks.parse) -> Peaks | None:
    """Return the peak memory of a training, measured in a fresh process.

    Only Linux reports the peak of a process. Other systems return ``None``.

    Args:
        name: Name of the network.
        how: The memory format of dense PyTorch; or sparsity and scope, for the engine. The name of
            the optimizer may follow.
        find: Returns the network with this name, in the fresh process.
    """
    if not (STATUS.exists() and FORGET.exists()):
        return None
    fresh = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=fresh) as pool:
            return pool.submit(_peaks_mb, find, name, *how).result()
    except (BrokenProcessPool, OSError):  # killed for lack of memory, or no permission
        return None


def _peaks_mb(find: Find, name: str, *how: Any) -> Peaks:
    network = find(name)
    assert network is not None
    Training(networks.Network("", CifarResNet(depth=8, width=1).build, 1, images=True)).step()
    before = _kilobytes("VmRSS") / 1e3  # includes what PyTorch loads at a first step
    made: list[Training] = []
    start = peak_during(lambda: made.append(_started(network, *how))) - before
    return Peaks(peak_during(made[0].step) - before, start)


def _started(network: Network, *how: Any) -> Training:
    """Return a training after its first steps."""
    if isinstance(how[0], torch.memory_format):
        training = Training(network, *how)
    else:
        training = on_engine = OnEngine(network, *how)
        on_engine.settle()
    for _ in range(WARM_UP):
        training.step()
    return training


def peak_during(call: Callable[[], object]) -> float:
    """Return the peak memory of this process during a call, in megabytes."""
    FORGET.write_text("5")  # resets the peak; see proc(5)
    call()
    return _kilobytes("VmHWM") / 1e3


def _kilobytes(what: str) -> float:
    lines = STATUS.read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{what}:"))
    return int(line.split()[1]) * 1024 / 1000  # the kernel's kB are 1024 bytes
