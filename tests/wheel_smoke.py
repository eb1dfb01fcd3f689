"""A check of an installed wheel: run by the Python that it is installed in, in an empty folder.

It needs the wheel and what it depends on, and nothing of the clone. ``--pure`` checks the wheel
without kernels. ``--alone`` checks the kernels without PyTorch, for a Python that has none; an
OpenMP library must then be where the system looks for libraries. ``--commands`` tries the first
commands of README too, which need the extra ``lab``.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import re
import subprocess
import sys
from array import array
from importlib import metadata
from pathlib import Path


def check_origin() -> None:
    """The library comes from the installed wheel, and not from a clone."""
    import acdc

    assert acdc.__version__ == metadata.version("acdc-train")
    (owner,) = [f for f in metadata.files("acdc-train") or () if str(f) == "acdc/__init__.py"]
    assert Path(owner.locate()).resolve() == Path(acdc.__file__).resolve(), acdc.__file__


def check_two_threads() -> None:
    """A kernel starts a second thread, and copies the right numbers.

    It is called by addresses, because PyTorch would start threads of its own for large tensors.
    """
    kernels = importlib.import_module("acdc._kernels")
    count = 1 << 20
    dense, index = array("f", range(count)), array("i", range(count - 1, -1, -1))
    vector = array("f", bytes(4 * count))
    before = threads()
    addresses = [one.buffer_info()[0] for one in (dense, index, vector)]
    kernels.gather(addresses[0], addresses[1], count, addresses[2], 4, 2)
    assert vector == dense[::-1]
    assert threads() == before + 1, f"{before} threads, and then {threads()}"
    assert kernels.supported(0)
    assert kernels.table_count() >= 1
    assert len(kernels.KERNELS) > 20


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def openmp() -> list[str]:
    """Return the OpenMP libraries of this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    return sorted(path for path in paths if re.search(r"/lib(gomp|iomp5|omp)[-.][^/]*$", path))


def network():
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.GELU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def check_engine(pure: bool) -> None:
    """A step of a sparse phase is that of PyTorch, and ran on the kernels."""
    import torch

    import acdc
    from acdc.engine import native

    assert native.available() is not pure, native.why_missing()
    x = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    model = network().double()
    masks = {
        name: torch.rand(weight.shape) < 0.3
        for name, weight in model.named_parameters()
        if weight.dim() > 1
    }
    for name, mask in masks.items():
        model.get_parameter(name).data.masked_fill_(~mask, 0)
    plain = copy.deepcopy(model)
    engine = acdc.Engine(model, x, choose=False)
    engine.compress(masks)
    assert engine.active
    assert [choice.sparse for choice in engine.choices.values()] == [True] * 3, engine.table()
    results = []
    for one in (model, plain):
        out = one(x)
        out.square().sum().backward()
        results.append(out.detach())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
    for name, want in plain.named_parameters():
        mask = masks.get(name, torch.ones_like(want))
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, want.grad * mask, rtol=1e-8, atol=1e-10)
    engine.decompress()


def check_training(pure: bool) -> None:
    """README's loop: train, save the pair, load it, compute it by the runtime."""
    import torch

    import acdc

    model, x = network(), torch.randn(16, 3, 16, 16)
    y = torch.arange(16) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    plan = acdc.phases(6, [("dense", "3ep"), ("sparse", "3ep")])
    method = acdc.ACDC(acdc.Unstructured(sparsity=0.9), plan.resolve(2))
    sparsifier = acdc.Sparsifier(method, model, optimizer, engine=acdc.Engine(model, x))
    for _ in range(12):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    trained = copy.deepcopy(model.state_dict())
    sparsifier.pair().save("pair")
    pair = acdc.Pair.load("pair")
    loaded = pair.sparse_model(network()).eval()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    zeros = sum(int((p == 0).sum()) for p in loaded.parameters() if p.dim() > 1)
    weights = sum(p.numel() for p in loaded.parameters() if p.dim() > 1)
    assert weights - zeros == acdc.kept(weights, 0.9)
    runtime = acdc.Runtime(loaded, x)
    with torch.no_grad():
        want = loaded(x)
    torch.testing.assert_close(runtime(x), want, rtol=1e-4, atol=1e-5)
    if not pure:
        runtime.save("net.acdcrt")
        answer = acdc.Runtime.load("net.acdcrt")(x)
        torch.testing.assert_close(answer, want, rtol=1e-4, atol=1e-5)


def check_commands(pure: bool) -> None:
    """The first commands of README, as a person types them."""
    acdc = str(Path(sys.executable).parent / "acdc")
    doctor = printed(acdc, "doctor")
    assert re.search(rf"built +{'no' if pure else 'yes'}\n", doctor), doctor
    problems = doctor.partition("\nproblems\n")[2]
    assert "distributions" not in problems, problems
    assert pure or "kernels are missing" not in problems, problems
    assert "layers" in printed(acdc, "bench", "--help")
    assert "digits" in printed(acdc, "list")
    assert "sparse twin" in printed(acdc, "run", "digits", "--out", "runs")
    assert Path("runs/digits/report.html").stat().st_size > 20_000
    assert "onnx" in printed(acdc, "export", "--help")


def printed(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pure", action="store_true")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--commands", action="store_true")
    args = parser.parse_args()
    check_origin()
    if args.alone:
        check_two_threads()
        print(f"Python {sys.version.split()[0]}: the kernels compute, without PyTorch")
        return
    import torch

    torch.set_num_threads(2)
    if not args.pure:
        check_two_threads()
    check_engine(args.pure)
    check_training(args.pure)
    if sys.platform == "linux":
        libraries = openmp()
        assert len(libraries) == 1, libraries
        assert "/torch/lib/" in libraries[0], libraries
    if args.commands:
        check_commands(args.pure)
    kind = "without kernels" if args.pure else "kernels and two threads"
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {kind}: all is well")


if __name__ == "__main__":
    main()
