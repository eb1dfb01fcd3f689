"""Networks in a sparse phase on the engine, against masked dense PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from acdc.engine import memory, segment
from acdc.runs.models import CifarResNet
from support.engine_nets import BACKENDS, NETWORKS, Gpt, Pair, close, in_place_late, segments

networks = pytest.mark.parametrize("name", NETWORKS)
backends = pytest.mark.parametrize("backend", BACKENDS)


def fresh(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = NETWORKS[name].build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


@networks
@backends
def test_training(name: str, backend: str, runs: list[int]) -> None:
    network = NETWORKS[name]
    pair = Pair(fresh(name), network.shape, backend_name=backend, zero=network.zero)
    for seed, samples in enumerate((5, 33, 2, 20)):  # ragged, and frames that grow
        runs.clear()
        pair.step(samples, seed)
        assert len(runs) == network.runs


@networks
@backends
def test_evaluation(name: str, backend: str, runs: list[int]) -> None:
    network = NETWORKS[name]
    pair = Pair(fresh(name), network.shape, backend_name=backend, zero=network.zero)
    pair.step(6)
    pair.train(False)
    for seed, (samples, grad) in enumerate([(1, False), (9, True), (4, False)]):
        runs.clear()
        pair.step(samples, seed, grad)
        assert len(runs) == network.runs_eval
    pair.train(True)
    pair.step(6, seed=9, grad=False)  # statistics move without gradients, too


@pytest.mark.parametrize(
    ("build", "shape", "layers"),
    [(CifarResNet(20, 4).build, (3, 12, 12), 22), (Gpt, (7, 16), 9)],
    ids=["ResNet-20", "GPT"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_networks_with_a_ragged_last_block(
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    layers: int,
    dtype: torch.dtype,
    runs: list[int],
) -> None:
    torch.manual_seed(0)
    pair = Pair(build(), shape, 130, dtype)
    for seed in range(2):
        pair.step(130, seed)
    assert runs
    assert len([c for c in pair.engine.choices.values() if c.sparse]) == layers
    assert sum(len(run.program.convs) for run in segments(pair.engine)) == layers


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.SiLU()])
def test_an_activation_goes_block_by_block_and_is_not_kept(activation: nn.Module) -> None:
    """A segment with an activation keeps only the inputs of its layers for the backward pass."""
    pair = Pair(nn.Sequential(nn.Linear(12, 48), activation, nn.Linear(48, 12)), (12,))
    pair.step(256)
    (run,) = segments(pair.engine)
    (tape,) = run._tapes.values()
    first, act, _ = run.program.ops
    assert not any(instruction.alone for instruction in tape.forward + tape.backward)
    kept = [slot for slot in tape.slots if tape.is_kept(slot)]
    assert kept == [tape.value(first.x), tape.value(act.x)]
    assert tape.value(act.out).is_transient


@backends
def test_a_hardsigmoid(backend: str, runs: list[int]) -> None:
    """PyTorch's gradient has the digits of float in float64, too."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardsigmoid(), nn.Conv2d(8, 4, 3))
    pair = Pair(model, (3, 6, 6), backend_name=backend)
    pair.step(5, limit=1e-7)
    assert len(runs) == 1


@pytest.mark.parametrize("where", ["tokens", "images", "channels_last"])
def test_dropout_draws_the_numbers_of_pytorch(where: str, runs: list[int]) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.4), nn.Linear(8, 8))
    if where != "tokens":
        model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Dropout(0.4), nn.Conv2d(8, 8, 3))
    pair = Pair(model, (6,) if where == "tokens" else (6, 7, 7), lay=LAYS.get(where, lambda x: x))
    for seed, samples in enumerate((33, 5)):
        pair.step(samples, seed)
        assert torch.equal(torch.rand(1), drawn_after(pair, samples, seed))
    assert len(runs) == 2
    first = pair.model(x := pair.batch(9))
    assert not torch.equal(first, pair.model(x))


def drawn_after(pair: Pair, samples: int, seed: int) -> Tensor:
    """Return the next random number after a step of plain PyTorch."""
    torch.manual_seed(seed)
    pair.plain(pair.lay(pair.batch(samples, seed)))
    return torch.rand(1)


LAYS = {"channels_last": lambda x: x.contiguous(memory_format=torch.channels_last)}


def test_a_second_derivative_has_the_masks_of_the_forward_pass(runs: list[int]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.4), nn.Linear(8, 8))
    pair = Pair(model, (6,))
    found = []
    for net in (pair.plain, pair.model):
        x = pair.batch(20, 3).requires_grad_()
        torch.manual_seed(0)
        (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [x, net[0].bias]))
    for want, got in zip(*found, strict=True):
        close(got, want)
    assert runs


class FromEachOther(nn.Module):
    """The inputs of a segment depend on each other, and on its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(x.sin() + self.a(x)))
        return self.a(self.a(x).sin() + x.cos())


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 12, 0.0, batch_first=True, norm_first=True)


class TwoEncoders(nn.Module):
    """An encoder that is called twice: weights of an attention, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = encoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).sin())


@pytest.mark.parametrize("build", [FromEachOther, encoder, TwoEncoders])
@pytest.mark.parametrize("way", ["create_graph", "threads"])
def test_pytorch_differentiates_a_segment_alone(
    build: Callable[[], nn.Module], way: str, runs: list[int]
) -> None:
    """A history that inputs and weights of a segment share counts once."""
    torch.manual_seed(0)
    pair = Pair(build(), (5, 6))
    threads = torch.get_num_threads()
    found = []
    for net in (pair.plain, pair.model):
        x = pair.batch(3, 3).requires_grad_()
        weights = [p for p in net.parameters() if p.dim() == 1]
        out = net(x).square().sum()
        try:
            torch.set_num_threads(threads + (way == "threads"))
            grads = torch.autograd.grad(out, [x, *weights], create_graph=way == "create_graph")
        finally:
            torch.set_num_threads(threads)
        found.append(grads)
        if way == "create_graph" and build is FromEachOther:  # PyTorch has none of its attention
            found[-1] += torch.autograd.grad(grads[0].square().sum(), [x], allow_unused=True)
    for want, got in zip(*found, strict=True):
        close(got, want, least=1e-3)
    assert runs


def frames(pair: Pair) -> list[memory.Frame]:
    """Return the frames of all segments, each of one batch size."""
    arenas = [a for run in segments(pair.engine) for free in run._free.values() for a in free]
    return [frame for arena in arenas for frame in arena._frames.values()]


def test_segments_share_the_buffers_of_one_pass() -> None:
    """Each of three segments of one shape keeps memory only for the inputs of its backward pass."""
    layers = (nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)) for _ in range(3))
    pair = Pair(nn.Sequential(*(nn.Sequential(part, nn.Tanh()) for part in layers)), (24,))
    pair.step(256)
    kept, shared = [], []
    for run, frame in zip(segments(pair.engine), frames(pair), strict=True):
        (tape,) = run._tapes.values()
        address = {s: frame.buffer(s).data.untyped_storage().data_ptr() for s in tape.slots}
        kept.append({address[slot] for slot in tape.slots if tape.is_kept(slot)})
        shared.append(set(address.values()) - kept[-1])
    assert shared[0]
    assert shared[0] == shared[1] == shared[2]
    assert len(set.union(*kept)) == 3


def test_one_segment_at_a_time_uses_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, held, plain = Pair(nn.Linear(12, 8), (12,)), [], segment._plain

    def convert(*args):
        held.append(pair.engine.workspace.lock.is_mine)
        return plain(*args)

    monkeypatch.setattr(segment, "_plain", convert)
    pair.step(4)
    assert held == [True, True]  # forward and back
    assert not pair.engine.workspace.lock.is_mine


def test_a_tensor_that_changes_in_place_after_it_was_read() -> None:
    """The network cannot be traced, so each layer runs alone. PyTorch refuses to train it."""
    pair = Pair(in_place_late(), (8, 5, 5))
    pair.step(4, grad=False)
    assert [len(run.program.convs) for run in segments(pair.engine)] == [1, 1]


def test_a_layer_that_is_the_whole_network(runs: list[int]) -> None:
    pair = Pair(nn.Linear(12, 8), (12,))
    assert pair.engine.choices[""].density == pytest.approx(0.3, abs=0.15)
    pair.step(5)
    assert len(runs) == 1


def test_an_empty_batch_is_left_to_pytorch_and_said_once(caplog) -> None:
    pair = Pair(nn.Linear(12, 8), (12,))
    pair.step(0)
    pair.step(0)
    (warning,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert "its batch has [0] samples" in warning
