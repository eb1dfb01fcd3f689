"""The imports between modules, from the syntax trees: imports point down, never sideways or up."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import acdc

ROOT = Path(acdc.__file__).parent

# From the top down; a row may import the rows below it. The parts of one room may import each
# other, and the public names (acdc itself) are at hand from the export up.
ROWS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {"console", "doctor"},
    {"recipes"},
    {"studies"},
    {"pages"},
    {"compare", "bench"},
    {"runs", "integrations"},
    {"export", "distributed"},
    {"acdc"},
    {"sparsifier"},
    {"hooks", "result", "summary"},
    {"methods", "pair", "runtime"},
    {"index", "states"},
    {"pattern", "engine", "cost", "bitmask"},
    {"topk", "transposable", "processes", "positions"},
    {"layers", "support", "schedule", "score"},
    {"kinds"},
    {"random", "shape", "shards", "outfile", "schema", "address"},
    {"files", "processor", "collectives"},
    {"errors"},
]
RANK = {room: len(ROWS) - i for i, row in enumerate(ROWS) for room in row}

# What a method may import of its own room. It must not import another method.
SHARED_BY_METHODS = {f"acdc.methods.{part}" for part in ("base", "families", "training", "weights")}

# The compiled kernels are no module of the plan: this one module may load them, nothing else.
KERNELS, KERNELS_OWNER = "acdc._kernels", "acdc.engine.native"

# What else a room may import beside the standard library; torch is everywhere but in schedule.
EVERYWHERE = {"torch"}
ALLOWED: dict[str, set[str]] = {
    "acdc.bitmask": {"safetensors", "numpy"},
    "acdc.hooks.flat_kernel": {"triton"},
    "acdc.export": {"onnx", "onnxscript", "numpy"},
    "acdc.runs": {"lightning", "sklearn", "numpy", "torchvision", "PIL"},
    "acdc.runs.supports": {"safetensors"},
    "acdc.compare.cluster": {"dask", "distributed"},
    "acdc.compare.scheduler": {"dask", "distributed"},
    "acdc.compare.slurm": {"submitit"},
    "acdc.pages": {"numpy"},
    "acdc.pages.paired": {"scipy"},
    "acdc.integrations.accelerate": {"accelerate"},
    "acdc.integrations.lightning": {"lightning", "pytorch_lightning"},
    "acdc.integrations.transformers": {"transformers"},
    "acdc.bench.peers": {"sparseprop", "sparselab"},
    "acdc.bench.zoo": {"transformers", "timm", "torchvision"},
    "acdc.bench.infer.files": {"numpy", "onnxruntime"},
    "acdc.bench.infer.contender": {"numpy", "onnxruntime", "openvino", "deepsparse"},
    "acdc.pages.figure": {"matplotlib", "jinja2"},
    "acdc.pages.plots": {"matplotlib"},
    "acdc.pages.comparison": {"matplotlib"},
    "acdc.studies": {"matplotlib"},
    "acdc.console": {"rich"},
    "acdc.cli": {"rich"},
    "acdc.cli.infer": {"numpy"},
}


def modules() -> dict[str, str]:
    """Return the source of every module of the library by its dotted name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text("utf-8")
    return found


def imports(name: str, source: str, known: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of everything a module imports, inside functions too."""
    known = set(known)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name if f"{name}." in " ".join(known) else name.rpartition(".")[0]
                upward = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*upward, base]).rstrip(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield node.lineno, whole if whole in known or whole == KERNELS else base
        elif isinstance(node, ast.Constant) and node.value == KERNELS:
            yield node.lineno, KERNELS  # importlib.import_module and its like take a string


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "acdc"


def complaints(sources: dict[str, str]) -> list[str]:
    """Return a sentence for every import that the layout forbids."""
    found = []
    for module, source in sources.items():
        own = room(module)
        if own not in RANK:
            found.append(f"{module}: {own!r} is no room of the plan")
            continue
        for line, target in imports(module, source, sources):
            at = f"{module}:{line}"
            if target == KERNELS:
                if module != KERNELS_OWNER:
                    found.append(f"{at} imports {KERNELS}, which only {KERNELS_OWNER} may")
            elif target.split(".")[0] == "acdc":
                other = room(target)
                if other not in RANK:
                    found.append(f"{at} imports {target}, which is in no row")
                elif module == "acdc" and RANK[other] >= RANK["acdc"]:
                    found.append(f"{at} makes every user import {target}")
                elif own != other and RANK[other] >= RANK[own]:
                    found.append(f"{at} imports {target}: not below it")
                elif (
                    own == other == "methods"
                    and module != "acdc.methods"  # the list of them all
                    and target not in SHARED_BY_METHODS
                ):
                    found.append(f"{at} imports {target}: methods do not know one another")
            if target.split(".")[0] == "acdc":
                continue
            package = target.split(".")[0]
            if package in sys.stdlib_module_names or (
                package in EVERYWHERE and module != "acdc.schedule"
            ):
                continue
            owners = [o for o in ALLOWED if module == o or module.startswith(f"{o}.")]
            if not any(package in ALLOWED[owner] for owner in owners):
                found.append(f"{at} imports {package}, which is not its business")
    return found


def test_imports_point_down() -> None:
    assert complaints(modules()) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("acdc.support", "import acdc.pattern", "imports acdc.pattern: not below it"),
        ("acdc.support", "from acdc import pattern", "imports acdc.pattern: not below it"),
        ("acdc.support", "def f():\n    from acdc.layers import Layers", "acdc.layers: not below"),
        ("acdc.score", "from . import sparsifier", "imports acdc.sparsifier: not below it"),
        ("acdc.pattern", "from acdc.cost import measure", "imports acdc.cost: not below it"),
        ("acdc.methods.acdc", "from acdc.sparsifier import Sparsifier", "not below it"),
        ("acdc.methods.acdc", "from acdc.methods.dense import Dense", "do not know one another"),
        ("acdc.methods.acdc", "from .dense import Dense", "do not know one another"),
        ("acdc.sparsifier", "from acdc import ACDC", "imports acdc: not below it"),
        ("acdc.export", "import acdc.runs.train", "imports acdc.runs.train: not below it"),
        ("acdc", "from acdc.runs import train", "makes every user import acdc.runs"),
        ("acdc", "from acdc.export import onnx_file", "makes every user import acdc.export"),
        ("acdc.schedule", "import torch", "imports torch, which is not its business"),
        ("acdc.pattern", "import numpy as np", "imports numpy, which is not its business"),
        ("acdc.runs.train", "import matplotlib.pyplot", "imports matplotlib"),
        ("acdc.runs.train", "import rich", "imports rich"),
        ("acdc.cli", "import lightning", "imports lightning"),
        (
            "acdc.engine.layout",
            "from acdc.pattern import Unstructured",
            "acdc.pattern: not below it",
        ),
        (
            "acdc.engine.layout",
            "import acdc.sparsifier",
            "imports acdc.sparsifier: not below it",
        ),
        (
            "acdc.cost",
            "from acdc.engine import layout",
            "imports acdc.engine.layout: not below it",
        ),
        ("acdc.layers", "import acdc.engine.layout", "acdc.engine.layout: not below it"),
        ("acdc.engine.native", "import numpy", "imports numpy, which is not its business"),
        ("acdc.engine.layout", "import acdc._kernels", "which only acdc.engine.native may"),
        (
            "acdc.engine.layout",
            "from acdc import _kernels",
            "which only acdc.engine.native may",
        ),
        ("acdc.engine.layout", "from .. import _kernels", "which only acdc.engine.native may"),
        ("acdc.runs.train", "f('acdc._kernels')", "which only acdc.engine.native may"),
        ("acdc.attic", "", "'attic' is no room of the plan"),
    ],
)
def test_the_rule_can_fail(module: str, source: str, complaint: str) -> None:
    known = {name: "" for name in modules()}
    found = complaints(known | {module: source})
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("acdc.methods.acdc", "from acdc.methods.families import Phased\nfrom acdc import score"),
        ("acdc.runs.train", "from acdc import ACDC\nfrom acdc.runs.record import Record"),
        ("acdc.pages.plots", "import matplotlib, json"),
        ("acdc.engine.native", "from acdc import _kernels\nfrom acdc.engine import layout"),
        ("acdc.engine.layout", "from acdc import layers, support, errors"),
        ("acdc", "from acdc.sparsifier import Sparsifier"),
    ],
)
def test_the_rule_lets_good_imports_through(module: str, source: str) -> None:
    known = {name: "" for name in modules()}
    assert complaints(known | {module: source}) == []


def circles(sources: dict[str, str]) -> list[str]:
    """Return the circles of imports between modules, one through each module that is in some.

    An import inside of a function and one under TYPE_CHECKING count: who reads one of the modules
    has to read all of them.
    """
    below = {
        module: sorted({target for _, target in imports(module, source, sources)} & set(sources))
        for module, source in sources.items()
    }
    found = set()
    for start in sources:
        paths, seen = [[start]], {start}  # breadth first: the shortest way back
        while paths:
            path = paths.pop(0)
            if start in below[path[-1]]:
                first = path.index(min(path))  # the same circle, wherever the search began
                turned = path[first:] + path[:first]
                found.add(" -> ".join([*turned, turned[0]]))
                break
            for target in below[path[-1]]:
                if target not in seen:
                    seen.add(target)
                    paths.append([*path, target])
    return sorted(found)


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert circles(modules()) == []


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"acdc.a": "import acdc.b", "acdc.b": "import acdc.c", "acdc.c": ""}, []),
        (
            {"acdc.a": "import acdc.b", "acdc.b": "from acdc import a"},
            ["acdc.a -> acdc.b -> acdc.a"],
        ),
        (
            {
                "acdc.c": "from acdc.a import f",
                "acdc.a": "if TYPE_CHECKING:\n    from acdc.b import B",
                "acdc.b": "def f():\n    from acdc import c",
                "acdc.above": "import acdc.a",
            },
            ["acdc.a -> acdc.b -> acdc.c -> acdc.a"],
        ),
        ({"acdc.e": "", "acdc.e.a": "from acdc.e.b import f", "acdc.e.b": "from . import a"},
         ["acdc.e.a -> acdc.e.b -> acdc.e.a"]),
    ],
    ids=["none", "two", "three", "in one room"],
)  # fmt: skip
def test_a_circle_is_found(sources: dict[str, str], found: list[str]) -> None:
    assert circles(sources) == found


def unused(sources: dict[str, str]) -> list[str]:
    """Return the rooms of the plan that are empty, and the permissions that are not used."""
    rooms = {room(module) for module in sources}
    found = [name for name in sorted(RANK) if name not in rooms]
    for owner, packages in ALLOWED.items():
        used = {
            target.split(".")[0]
            for module, source in sources.items()
            if module == owner or module.startswith(f"{owner}.")
            for _, target in imports(module, source, sources)
        }
        found += [f"{owner}: {package}" for package in sorted(packages - used)]
    return found


def test_the_plan_holds_no_room_and_no_permission_that_is_not_there() -> None:
    sources = modules()
    assert unused(sources) == []
    assert unused({name: sources[name] for name in sources if name != "acdc.topk"}) == ["topk"]
    assert unused(sources | {"acdc.bench.peers": "import sparselab"}) == [
        "acdc.bench.peers: sparseprop"
    ]


def calls(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def global_effects(sources: dict[str, str]) -> list[str]:
    """Return the places in which the library prints, or changes the state of the process."""
    found = []
    for module, source in sources.items():
        for line, call in calls(source):
            if call == "print" and room(module) != "cli":
                found.append(f"{module}:{line} prints")
            seeds = {"torch.manual_seed", "torch.random.manual_seed", "random.seed"}
            seeds |= {"np.random.seed", "numpy.random.seed", "torch.cuda.manual_seed_all"}
            if call in seeds and room(module) not in ("runs", "compare", "bench", "recipes", "cli"):
                found.append(f"{module}:{line} seeds the process")
            process = {"torch.set_num_threads", "torch.use_deterministic_algorithms"}
            process |= {"torch.set_default_dtype", "torch.set_default_device", "signal.signal"}
            if call in process and room(module) not in (
                "runs",
                "compare",
                "bench",
                "recipes",
                "cli",
            ):
                found.append(f"{module}:{line} calls {call}")
    return found


def test_no_print_and_no_global_seed() -> None:
    assert global_effects(modules()) == []
    assert global_effects(
        {"acdc.score": "print(1)\ntorch.manual_seed(0)\nsignal.signal(2, f)"}
    ) == [
        "acdc.score:1 prints",
        "acdc.score:2 seeds the process",
        "acdc.score:3 calls signal.signal",
    ]
    assert global_effects({"acdc.score": "torch.Generator().manual_seed(0)"}) == []


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_acdc_alone_does_not_load_torch() -> None:
    """``acdc --help`` is quick, because the first use of a name loads torch."""
    loaded = run(
        """
        import sys, acdc
        print("torch" in sys.modules, "Sparsifier" in dir(acdc))
        acdc.Sparsifier
        print("torch" in sys.modules)
        """
    )
    assert loaded.splitlines() == ["False True", "True"]


def test_the_names_of_acdc_load_torch_and_nothing_else_heavy() -> None:
    optional = ["lightning", "sklearn", "matplotlib", "jinja2", "rich", "distributed"]
    optional += [
        "tensorboard",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "torchvision",
        "transformers",
        "accelerate",
    ]
    loaded = run(
        f"""
        import sys
        from acdc import *
        assert Sparsifier.__module__ == "acdc.sparsifier"
        print([m for m in {optional} if m in sys.modules])
        rooms = ("acdc.runs", "acdc.pages", "acdc.compare", "acdc.export", "acdc.recipes")
        print([m for m in sys.modules if m.startswith(rooms)])
        """
    )
    assert loaded.splitlines() == ["[]", "[]"]
    assert all(importlib.util.find_spec(name) for name in optional[:6])  # they could have been


def test_the_core_imports_what_the_package_declares() -> None:
    project = tomllib.loads((ROOT.parent.parent / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {re.split(r"[^\w.-]", line)[0] for line in project["dependencies"]}
    imported = set()
    for module, source in modules().items():
        if RANK[room(module)] <= RANK["acdc"]:
            names = {target.split(".")[0] for _, target in imports(module, source, modules())}
            imported |= names - set(sys.stdlib_module_names) - {"acdc"}
    assert imported - {"triton"} <= declared  # builds of torch for CUDA bring Triton
    assert "torch" in imported


def test_acdc_works_without_the_extras() -> None:
    run(
        """
        import sys

        for name in ("lightning", "sklearn", "matplotlib", "jinja2", "rich", "distributed"):
            sys.modules[name] = None  # importing it fails, looking for it finds nothing
        import torch, acdc

        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        plan = acdc.phases(4, [("dense", "2ep"), ("sparse", "2ep")])
        method = acdc.ACDC(acdc.Unstructured(0.75), plan.resolve(2))
        sparsifier = acdc.Sparsifier(method, model, optimizer)
        for _ in range(8):
            optimizer.zero_grad()
            model(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
        assert sparsifier.pair().support.nnz == 24
        """
    )


def test_public_names_are_there_once() -> None:
    assert all(hasattr(acdc, name) for name in acdc.__all__)
    assert len(set(acdc.__all__)) == len(acdc.__all__)
    assert not hasattr(acdc, "nothing")


def test_type_checkers_see_the_public_names() -> None:
    """Type checkers read the block under TYPE_CHECKING; Python reads the table ``_HOME``."""
    tree = ast.parse((ROOT / "__init__.py").read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == acdc._HOME
    assert sorted(seen) == sorted(acdc.__all__)
