"""The memory that an engine holds, and when it is free again."""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

import acdc
from acdc.engine import choice, memory, native, segment
from acdc.engine import engine as engine_module
from acdc.engine.layout import Shape
from acdc.engine.pieces import Grid, Pieces
from acdc.engine.timing import LayerTimes
from acdc.runs.models import SmallResNet
from support.engine_nets import BACKENDS, NETWORKS, Network, Pair, cut


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Reference counts alone free memory."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def tokens() -> tuple[nn.Module, Tensor]:
    layers = (nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 8))
    return nn.Sequential(*layers), torch.randn(4, 8)


def images() -> tuple[nn.Module, Tensor]:
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3))
    return nn.Sequential(*layers), torch.randn(4, 3, 8, 8)


def residual() -> tuple[nn.Module, Tensor]:
    return SmallResNet(width=8, blocks=1, size=8).build(), torch.randn(4, 1, 8, 8)


def sparse(net: nn.Module, x: Tensor) -> acdc.Engine:
    masks = {n: torch.rand(p.shape) < 0.4 for n, p in net.named_parameters() if p.dim() > 1}
    cut(net, masks)
    engine = acdc.Engine(net, x, choose=False)
    engine.compress(masks)
    return engine


@pytest.mark.parametrize("made", [tokens, images, residual])
@pytest.mark.usefixtures("no_collector")
def test_freed_buffers_are_free_at_once(made: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    """Otherwise dense steps and sparse ones hold their memory together."""
    net, x = made()
    engine = sparse(net, x)
    net(x).square().sum().backward()
    segments = [segment for host in engine._hosts for segment in host.segments()]
    arenas = [arena for s in segments for free in s._free.values() for arena in free]
    storages = [memory.untyped_storage() for arena in arenas for memory in arena.kept]
    weak = [StorageWeakRef(storage) for storage in storages]
    assert weak
    del arenas, storages
    engine._free()
    assert all(ref.expired() for ref in weak)


def test_an_engine_that_is_traced_in_parts_holds_no_activations() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 173), nn.Linear(173, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second(-x if x.sum() > 0 else x)

    net, x = Net(), torch.randn(4, 8)
    engine = sparse(net, x)
    assert engine.active  # in parts
    net(x).sum().backward()
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    with_values = [t for t in tensors if t.device.type == "cpu" and type(t) is not FakeTensor]
    assert not [t for t in with_values if t.shape == (4, 173)]


def test_memory_goes_back_where_steps_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """When dense steps become sparse, and sparse ones dense; not at each change of the support."""
    calls: list[str] = []
    monkeypatch.setattr(engine_module, "give_memory_back", lambda: calls.append("back"))
    net, x = tokens()
    masks = {f"{i}.weight": torch.rand(net[i].weight.shape) < 0.4 for i in (0, 4)}
    engine = acdc.Engine(net, x)
    engine.compress(masks)
    assert calls == ["back"]
    engine.compress(masks)
    assert calls == ["back"]
    engine.decompress()
    assert calls == ["back"] * 2


def test_memory_goes_back_after_each_block_of_judged_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(choice, "time_layer", lambda *_: LayerTimes(1.0, 0.1, 0.01))
    monkeypatch.setattr(choice, "conversion_ms", lambda *_: 0.01)
    net, x = tokens()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    engine = acdc.Engine(net, x)
    method = acdc.ACDC(acdc.Unstructured(0.6), acdc.constant("sparse", epochs=1).resolve(1000))
    acdc.Sparsifier(method, net, optimizer, engine=engine)
    monkeypatch.setattr(engine_module, "give_memory_back", lambda: calls.append("back"))
    steps = 0
    net(x).sum().backward()
    optimizer.step()
    while engine.judges:
        net(x).sum().backward()
        optimizer.step()
        steps += 1
    assert 2 <= len(calls) <= steps / 5
    calls.clear()
    for _ in range(4):
        net(x).sum().backward()
        optimizer.step()
    assert calls == ["back"] * 2  # of the first steps after the verdict


@pytest.mark.parametrize("again", [False, True])
def test_memory_of_the_first_sparse_steps_goes_back(
    monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """They free dense gradients and moments, which were alive when the support changed."""
    net, x = tokens()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    engine = acdc.Engine(net, x, choose=False)
    plan = acdc.constant("sparse", epochs=1).resolve(1000)
    acdc.Sparsifier(acdc.ACDC(acdc.Unstructured(0.6), plan), net, optimizer, engine=engine)
    if again:
        engine.decompress()
    calls: list[int] = []
    steps = 0
    monkeypatch.setattr(engine_module, "give_memory_back", lambda: calls.append(steps))
    if again:
        masks = {f"{i}.weight": net[i].weight != 0 for i in (0, 4)}
        engine.compress(masks)
        assert calls == [0]
        calls.clear()
    for _ in range(5):
        steps += 1
        net(x).sum().backward()
        optimizer.step()
    assert calls == [1, 2]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.skipif(not native.available(), reason="no compiled kernels")
def test_freed_memory_goes_back_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])  # pages

    pieces = [torch.ones(2**14) for _ in range(2**11)]  # 128 MiB; the heap, not maps of their own
    kept = pieces[::64]
    del pieces
    native.give_memory_back()
    before = resident()
    pieces = [torch.ones(2**14) for _ in range(2**11)]
    kept += pieces[::64]
    del pieces
    full = resident()
    native.give_memory_back()
    assert resident() < full - 2**14  # 64 MiB of pages of 4 KiB
    assert resident() < before + 2**13
    assert kept


def test_large_masks_are_held_once() -> None:
    """The mask of a support serves as the mask of the weights outside it."""
    net = nn.Sequential(nn.Conv2d(64, 128, 3), nn.Conv2d(128, 64, 3)).to(
        memory_format=torch.channels_last
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    plan = acdc.constant("sparse", epochs=1).resolve(100)
    sparsifier = acdc.Sparsifier(acdc.ACDC(acdc.Unstructured(0.9), plan), net, optimizer)
    net(torch.randn(2, 64, 8, 8)).square().sum().backward()
    optimizer.step()
    gc.collect()
    shapes = {p.shape for p in sparsifier.params.values()}
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    masks = [t for t in tensors if t.dtype == torch.bool and t.shape in shapes]
    assert len({m.data_ptr() for m in masks}) == len(shapes) == 2
    for name, param in sparsifier.params.items():
        mask = sparsifier.support[name]
        assert not param[~mask].any()
        assert param.grad is not None
        assert not param.grad[~mask].any()
        assert param.grad[mask].any()


# --- shared memory --------------------------------------------------------------------------------


def spoil(pieces: Pieces) -> None:
    """Write NaN wherever another buffer of these pieces of memory may write."""
    for (grid, _), piece in zip(pieces.wanted, pieces.given, strict=True):
        if grid.halos is None:
            piece.data.fill_(float("nan"))
            continue
        height, width, halo, lanes = grid.halos
        shape = Shape(1, 1, height, width, lanes, halo, False, grid.dtype)
        whole = piece.data[: piece.data.numel() // shape.channel * shape.channel]
        rows = whole.view(-1, shape.channel)[:, : (height + 2 * halo) * shape.row]
        rows = rows.view(-1, height + 2 * halo, width + 2 * halo, lanes)
        rows[:, halo : halo + height, halo : halo + width] = float("nan")


@pytest.mark.parametrize("samples", [16, 3])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_buffer_may_hold_anything_at_first(
    network: str, backend: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another buffer was in its memory before, of another shape."""
    arenas: dict[memory.Frame, memory.Arena] = {}
    frame_of, back = memory.Arena.frame, segment.compute_backward

    def frame(arena: memory.Arena, samples: int) -> memory.Frame:
        found = frame_of(arena, samples)
        arenas[found] = arena
        for pieces in {pieces for pieces, *_ in arena._piece_of.values()}:
            spoil(pieces)
        return found

    def backward(lease: memory.Lease, *args: Any) -> Any:
        spoil(arenas[lease.frame]._shared)
        return back(lease, *args)

    monkeypatch.setattr(memory.Arena, "frame", frame)
    monkeypatch.setattr(segment, "compute_backward", backward)
    torch.manual_seed(1)
    net = NETWORKS[network]
    pair = Pair(net.build(), net.shape, samples, backend_name=backend, zero=net.zero)
    for seed in range(2):
        pair.step(samples, seed)
    assert arenas


def arenas_of(engine: acdc.Engine) -> list[memory.Arena]:
    found = [segment for host in engine._hosts for segment in host.segments()]
    return [arena for s in found for free in s._free.values() for arena in free]


def sizes_of(pieces: Iterable[tuple[Grid, int]]) -> dict[Grid, list[int]]:
    """Return the sizes of pieces of memory by grid, the largest first."""
    found: dict[Grid, list[int]] = {}
    for grid, size in sorted(pieces, key=lambda piece: -piece[1]):
        found.setdefault(grid, []).append(size)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_memory_of_gradients_may_hold_anything(
    network: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are zero outside of the support, whatever was written into the memory before."""
    monkeypatch.setattr(memory, "LARGE", 0)
    net = NETWORKS[network]
    pair = Pair(net.build(), net.shape, backend_name=backend, zero=net.zero)
    pair.step(3)
    params, compare = dict(pair.model.named_parameters()), pair.same_gradients
    sparse = {name for name, chosen in pair.engine.choices.items() if chosen.sparse}
    seen = []

    def same_gradients(limit: float) -> None:
        for name, support in pair.support.items():
            if (grad := params[name].grad) is not None and name.rpartition(".")[0] in sparse:
                assert not grad[~support].any(), name
                seen.append(name)
        compare(limit)

    monkeypatch.setattr(pair, "same_gradients", same_gradients)
    for seed in range(1, 3):
        held = list(pair.engine.workspace._gradients.values())
        assert held
        for grad in held:
            grad.fill_(float("nan"))
        pair.step(5, seed)
    assert seen


def test_a_gradient_that_no_kernel_writes_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LARGE", 0)
    pair = Pair(nn.Linear(8, 8), (8,))
    pair.step(3)
    (arena,) = arenas_of(pair.engine)
    (frame,) = arena._frames.values()
    (held,) = (g for g in pair.engine.workspace._gradients.values() if g.dim() == 2)
    held.fill_(float("nan"))
    pair.model.zero_grad()
    frame.targets.clear()
    frame.make_results([pair.model.weight], pair.engine.workspace)
    assert not frame.results[id(pair.model.weight)].any()


@pytest.mark.parametrize("network", ["DenseNet", "MobileNet", "squeeze-and-excitation"])
def test_buffers_of_different_shapes_share_memory(network: str) -> None:
    """The shared memory is little more than what is in use at the same time."""
    net = NETWORKS[network]
    pair = Pair(net.build(), net.shape, backend_name="reference")  # not block by block
    pair.step(3)
    (arena,) = arenas_of(pair.engine)
    shapes = {s: arena._whole_shape(s) for s in arena.tape.slots if not arena.tape.is_kept(s)}
    assert len({shape.numel for shape in shapes.values()}) > 2
    for grid, sizes in sizes_of(arena._shared.wanted).items():
        slots = [s for s, shape in shapes.items() if (shape.dtype, shape.halos) == grid]
        in_use = [
            sum(shapes[s].numel for s in slots if s.first <= now <= s.last)
            for now in range(max(s.last for s in slots) + 1)
        ]
        assert sum(sizes) <= 1.5 * max(in_use)


class Widening(nn.Module):
    """Two segments. The second one needs larger buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.second = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.cumsum(self.first(x), 1))


@pytest.mark.parametrize("network", ["branching", "towers", "unlike towers", "widening"])
def test_segments_share_memory(network: str) -> None:
    """All together need as many pieces as the one that needs most, and hardly larger ones."""
    net = Network(Widening, (8,), 2) if network == "widening" else NETWORKS[network]
    pair = Pair(net.build(), net.shape)
    for seed in range(3):
        pair.step(3, seed)
    wanted = [sizes_of(arena._shared.wanted) for arena in arenas_of(pair.engine)]
    assert len(wanted) > 1
    have = pair.engine.workspace._pieces
    for grid in set().union(*wanted):
        columns = zip_longest(*(sizes.get(grid, []) for sizes in wanted), fillvalue=0)
        most = [max(column) for column in columns]
        sizes = [piece.data.numel() for piece in have[grid]]
        assert len(sizes) == len(most)
        assert max(sizes) == max(most)
        assert sum(sizes) <= 1.2 * sum(most)
