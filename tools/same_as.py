"""Show that the work tree trains bitwise as another revision does.

    python tools/same_as.py REVISION [--only GLOB] [--skip-runs]

The tool extracts ``src`` of REVISION into a temporary folder and starts the same training in two
processes: A imports the package from that folder, and B imports it from the work tree, uncommitted
changes included. It compares, bit for bit:

* ``METHOD/OPTIMIZER/ENGINE/PLAN``: a small network under every method, with and without the
  engine. The loss, the weights and the support of every step; at three steps the optimizer state,
  the dense weights, the dense twin and the list of changes; the pair; what the network computes in
  evaluation mode, and what ``remove`` leaves.
* In each revision by itself: the run that is stopped and resumed ends as the uninterrupted one.
* ``run/RECIPE/ENGINE``: a short run of the command line. Every event in ``metrics.jsonl``, without
  times, and the networks in ``pair/``.

Both sides use one thread and PyTorch alone: the compiled kernels are hidden from them. The tool
prints a line for each case, and exits with 1 if any case differs or fails. A value that only one
side has is a difference, unless ``ALLOWED`` names it.

Only the public names of the package are used here, because everything else may move.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.abc
import io
import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

# Globs of ``CASE:KEY``. A key that they match may be present on one side only; the tool then lists
# it and goes on. Example: "run/*:*/change/new_field".
ALLOWED: tuple[str, ...] = ()

Flat = dict[str, Any]  # path → tensor, number, text or None, in the order of the training

ROOT = Path(__file__).resolve().parents[1]

# --- the cases: training loops --------------------------------------------------------------------

STEPS_PER_EPOCH = 3
# In the first sparse phase, in the dense one that follows, in the last sparse one. No method
# changes its support there: with the engine, a large weight that it has just dropped may
# stay in the model until the next step, and then the resumed run differs at once.
STOPS = (11, 17, 26)
RESUMED = {"sgd": (11, 26), "adamw": (17,)}  # the stops from which a run is resumed
SPANS = (("dense", "2ep"), ("sparse", "3ep"), ("dense", "2ep"), ("sparse", "5ep"))
ENDS_DENSE = (("dense", "2ep"), ("sparse", "4ep"), ("dense", "2ep"))
SPARSE_EPOCHS = 7

# The learning rates are high, so that weights cross the threshold of a cut within these few steps.
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, weight_decay=1e-2),
}
ENGINES = ("off", "reference")

# Variant of a method → pattern, and the arguments that differ from the defaults.
OFTEN = {"every": "2st", "length": "6st"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "acdc": ("global", {}),
    "acdc:entered": ("global", {"reset": "entered"}),
    "acdc:none": ("erk", {"reset": "none"}),
    "acdc:nm": ("nm", {}),
    "acdc:block": ("block", {}),
    "acdc:ramp": ("erk", {"ramp": 0.5, "every": "2st"}),
    "acdc:average": ("global", {"average": 0.5}),
    "acdc:norms": ("erk", {"restore_norms": True}),
    "acdc:taper": ("global", {"taper": 2.0}),
    "dense": ("", {}),
    "static": ("erk", {"seed": 3}),
    "snip": ("global", {}),
    "set": ("erk", {"every": "2st", "until": "100%", "seed": 3}),
    "snfs": ("erk", {"every": "3st"}),
    "rigl": ("erk", {"every": "3st", "until": "100%"}),
    "gmp": ("global", {"first": 0.3, **OFTEN}),
    "gmp:block": ("block", {"first": 0.3, **OFTEN}),
    "str": ("global", {"first": 0.4, **OFTEN}),
    "topkast": ("erk", {"backward": 0.6, "every": "3st"}),
    "topkast:entered": ("block", {"backward": 0.5, "every": "2st", "reset": "entered"}),
    "dpf": ("global", {"first": 0.3, **OFTEN}),
    "srste": ("nm", {"every": "3st"}),
    "dsd": ("uniform", {}),
    "oneshot": ("uniform", {}),
    "gradual": ("global", OFTEN),
    "woodfisher": ("global", {"every": "3st", "length": "6st", "gradients": 2, "block": 50}),
    "granet": ("erk", {"first": 0.3, **OFTEN}),
    "imp": ("global", {"share": 0.7, "rewind": "2st"}),
    "acdc_partial": ("erk", {"every": "2st", "length": "16st", "period": "4st", "width": "2st"}),
}


def loop_cases() -> list[str]:
    """Return the names of the training loops: ``METHOD/OPTIMIZER/ENGINE/PLAN``."""
    found = []
    for variant in VARIANTS:
        plans = ["alternate", "sparse"]
        if variant == "dense":
            plans = ["dense"]
        elif variant == "imp":  # its first round is dense
            plans = ["alternate"]
        elif ":" in variant:
            found += [f"{variant}/sgd/off/alternate", f"{variant}/adamw/reference/alternate"]
            continue
        elif variant == "dsd":
            plans.append("ends-dense")
        found += [f"{variant}/{o}/{e}/{p}" for o in OPTIMIZERS for e in ENGINES for p in plans]
    return found


# --- the cases: runs of the command line ----------------------------------------------------------

SHORT = {"method.schedule.epochs": "2", "checkpoint_steps": "20"}
RUNS: dict[str, dict[str, str]] = {
    "digits": {
        "method.schedule.epochs": "4",
        "method.schedule.warmup": "1ep",
        "method.schedule.sparse": "1ep",
        "method.schedule.dense": "1ep",
        "method.schedule.last_sparse": "1ep",
        "bn_batches": "4",
        "clip": "1.0",
    },
    "digits_dense": {**SHORT, "method.schedule.epochs": "1"},
    "digits_acdc_nm24": {**SHORT, "method.schedule.epochs": "3", "optimizer": "adamw"},
    "digits_gmp": SHORT,
    "digits_rigl_erk": {**SHORT, "method.every": "10st"},
    "digits_snfs": {**SHORT, "accumulate": "2"},
    "digits_topkast": {**SHORT, "method.every": "5st"},
    "digits_dpf": SHORT,
    "digits_srste_nm24": SHORT,
    "digits_str": SHORT,
    "digits_dsd": SHORT,
    "digits_woodfisher": SHORT,
}
IN_BOTH_ENGINES = ("digits", "digits_gmp", "digits_topkast")
ENGINE_OF_OTHERS = {"digits_acdc_nm24": "reference", "digits_woodfisher": "reference"}
EVERY_RUN = {"threads": "1", "batch_size": "128", "model.width": "8"}

# Of an event: what a clock tells, and what follows from it.
TIMES = ("*seconds*", "*time*", "*_ms", "*clock*", "choices")


def run_cases() -> list[str]:
    """Return the names of the runs: ``run/RECIPE/ENGINE``."""
    return [
        f"run/{recipe}/{engine}"
        for recipe in RUNS
        for engine in (
            ENGINES if recipe in IN_BOTH_ENGINES else (ENGINE_OF_OTHERS.get(recipe, "off"),)
        )
    ]


# --- the network and its data ---------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions with BatchNorm and two linear layers.

    ``conv3`` is large enough for the engine to step its kept weights alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(128)
        self.fc1 = nn.Linear(128, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.bn3(self.conv3(x)).relu()
        return self.fc2(self.fc1(x.mean((2, 3))).relu())


def batch(index: int) -> tuple[Tensor, Tensor]:
    """Return the batch with this number. Every fourth batch is smaller than the others."""
    generator = torch.Generator().manual_seed(1000 + index)
    samples = 6 if index % 4 == 3 else 8
    x = torch.randn(samples, 3, 8, 8, generator=generator)
    y = torch.randint(0, 10, (samples,), generator=generator)
    x[torch.arange(samples), y % 3, y % 8] += 2.0  # so that there is something to learn
    return x, y


# --- one training loop, in the child --------------------------------------------------------------


class Loop:
    """One case: it builds fresh objects, trains them and notes everything.

    Args:
        acdc: The package.
        case: ``METHOD/OPTIMIZER/ENGINE/PLAN``.
    """

    def __init__(self, acdc: Any, case: str) -> None:
        variant, optimizer, engine, plan = case.split("/")
        self.format = torch.channels_last if optimizer == "adamw" else torch.contiguous_format
        torch.manual_seed(0)
        self.model = Net().to(memory_format=self.format)
        self.optimizer = OPTIMIZERS[optimizer](self.model)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.engine = None
        if engine == "reference":  # without compiled kernels, the reference is what there is
            self.engine = acdc.Engine(self.model, self._placed(batch(0)[0]), choose=False)
            if "reference" not in repr(self.engine):
                raise RuntimeError(f"{self.engine!r} does not compute by the reference")
        self.method = _method(acdc, variant, plan)
        self.total = self.method.resolved.total
        self.sparsifier = acdc.Sparsifier(
            self.method, self.model, self.optimizer, engine=self.engine
        )

    def _placed(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=self.format)

    def train(self, start: int, saved: dict[int, bytes]) -> Flat:
        """Train from step ``start`` to the end; return what was seen on the way.

        Args:
            start: Executed steps until now.
            saved: Gets the state at each stop, as the bytes of a checkpoint.
        """
        seen: Flat = {}
        if start == 0:
            seen |= flat("step 00/state", self.state())
        for step in range(start, self.total):
            seen |= self.step(step)
            if step + 1 in STOPS:
                seen |= flat(f"step {step + 1:02}/state", self.state())
                saved[step + 1] = self.save()
        seen |= flat("end", self.state())
        with torch.no_grad():
            self.model.eval()
            seen["end/evaluated"] = self.model(self._placed(batch(999)[0]))
        if pair := self.pair():
            seen |= flat("end/pair", pair)
        self.sparsifier.remove()
        seen |= flat("end/removed", self.model.state_dict())
        return seen

    def step(self, step: int) -> Flat:
        """Take one step, and return its loss and the digest of what it left."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * (1 - step / self.total)
        x, y = batch(step)
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self._placed(x)), y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 3.0)
        self.optimizer.step()
        at = f"step {step + 1:02}"
        active = None if self.engine is None else self.engine.active
        return {
            f"{at}/loss": loss.detach(),
            f"{at}/gradient norm": norm.detach(),
            f"{at}/digest of weights": digest(self.model.state_dict()),
            f"{at}/digest of support": digest(self.sparsifier.support),
            f"{at}/engine is active": active,
        }

    def state(self) -> dict[str, Any]:
        """Return everything that the public surface shows between two steps."""
        twin = self.sparsifier.dense_twin
        return {
            "clock": self.sparsifier.step,
            "model": self.model.state_dict(),
            "support": self.sparsifier.support,
            "optimizer": self.optimizer.state_dict(),
            "dense weights": self.sparsifier.dense_weights,
            "dense twin": None
            if twin is None
            else {"step": twin.step, "model": twin.model, "optimizer": twin.optimizer},
            "changes": self.sparsifier.changes,
            "refused": list(self.sparsifier.refused),
            "engine refused": None if self.engine is None else list(self.engine.refused),
        }

    def pair(self) -> dict[str, Any]:
        """Return the pair, or nothing where there is none."""
        import acdc

        try:
            pair = self.sparsifier.pair()
        except acdc.InputError:
            return {}
        return {"sparse": pair.sparse, "dense": pair.dense, "support": pair.support}

    def save(self) -> bytes:
        """Return the bytes of a checkpoint."""
        file = io.BytesIO()
        parts = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": self.sparsifier.state_dict(),
        }
        torch.save(parts, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        """Go on from a checkpoint."""
        parts = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.sparsifier.load_state_dict(parts["sparsifier"])


def _method(acdc: Any, variant: str, plan: str) -> Any:
    name = variant.partition(":")[0]
    kind = acdc.methods.METHODS[name]
    plans = {
        "dense": lambda: acdc.constant("dense", SPARSE_EPOCHS),
        "sparse": lambda: acdc.constant("sparse", SPARSE_EPOCHS),
        "ends-dense": lambda: acdc.phases(8, ENDS_DENSE),
        "alternate": lambda: acdc.phases(12, SPANS),
    }
    if name == "acdc" and plan == "alternate":  # the same phases
        schedule = acdc.alternate(12, "2ep", "3ep", "2ep", last_sparse="5ep")
    else:
        schedule = plans[plan]()
    schedule = schedule.resolve(STEPS_PER_EPOCH)
    patterns = {
        "global": lambda: acdc.Unstructured(0.9),
        "uniform": lambda: acdc.Unstructured(0.8, "uniform"),
        "erk": lambda: acdc.Unstructured(0.9, "erk"),
        "nm": lambda: acdc.NM(2, 4),
        "block": lambda: acdc.Block((4, 1), 0.8),
    }
    pattern, given = VARIANTS[variant]
    return kind(patterns[pattern](), schedule, **given) if pattern else kind(schedule)


def loop(acdc: Any, case: str) -> Flat:
    """Return what a training loop shows, and how it ends if it is resumed from each stop."""
    saved: dict[int, bytes] = {}
    seen = Loop(acdc, case).train(0, saved)
    for step in (stop for stop in RESUMED[case.split("/")[1]] if stop in saved):
        resumed = Loop(acdc, case)
        resumed.load(saved[step])
        again = flat(f"step {step:02}/state", resumed.state())
        again |= resumed.train(step, {})
        keys = list(seen)
        first = next(n for n, key in enumerate(keys) if key.startswith(f"step {step:02}/state"))
        expected = {key: seen[key] for key in keys[first:] if not key.startswith("resumed/")}
        differences = compare(expected, again)
        seen[f"resumed/{step:02}"] = differences[0] if differences else "same"
    return seen


# --- one run of the command line, in the child ----------------------------------------------------


def run(case: str, folder: Path) -> Flat:
    """Return the events and the networks of a run."""
    from acdc.cli import main

    _, recipe, engine = case.split("/")
    settings = {**EVERY_RUN, **RUNS[recipe], "engine": engine}
    words = ["run", recipe, "--out", str(folder), "--device", "cpu"]
    for path, value in settings.items():
        words += ["--set", f"{path}={value}"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(words)
    if code:
        raise RuntimeError(f"acdc {' '.join(words)} exits with {code}:\n{printed.getvalue()}")
    (metrics,) = folder.rglob("metrics.jsonl")
    seen: Flat = {}
    for number, line in enumerate(metrics.read_text().splitlines()):
        event = _untimed(json.loads(line))
        at = f"event {number:03}/{event.get('event')}"
        # Not the value alone: a list or a mapping that becomes empty is seen, too.
        seen |= {f"{at}/{key}": json.dumps(event[key], sort_keys=True) for key in event}
    for path in sorted(metrics.parent.glob("pair/*.safetensors")):
        size, content = 8, path.read_bytes()
        size += int.from_bytes(content[:8], "little")
        seen[f"pair/{path.name}/header"] = content[8:size].decode()
        seen[f"pair/{path.name}/tensors"] = torch.frombuffer(
            bytearray(content[size:]), dtype=torch.uint8
        )
    return seen


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _untimed(item)
            for key, item in value.items()
            if not any(fnmatch(key, pattern) for pattern in TIMES)
        }
    return [_untimed(item) for item in value] if isinstance(value, list) else value


# --- values ---------------------------------------------------------------------------------------


def flat(path: str, value: Any) -> Flat:
    """Return the leaves of a nested state by path. Fields of dataclasses are numbered, not named,
    so that a new name makes no difference.
    """
    if isinstance(value, Tensor):
        return {path: value.detach().clone()}
    if value is None or isinstance(value, bool | int | float | str):
        return {path: value}
    if is_dataclass(value):
        items: Iterable[tuple[Any, Any]] = enumerate(
            getattr(value, field.name) for field in fields(value)
        )
    elif isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        raise TypeError(f"{path} is a {type(value).__name__}, which is not compared yet")
    found: Flat = {f"{path}/length": len(value)} if not is_dataclass(value) else {}
    for key, item in items:
        found |= flat(f"{path}/{key}", item)
    return found


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(_bits(tensor).numpy().data)
    return total.hexdigest()


def _bits(tensor: Tensor) -> Tensor:
    """Return the bytes: +0.0 and -0.0 differ, and a NaN equals itself."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def compare(a: Flat, b: Flat, allowed: Callable[[str], bool] = lambda key: False) -> list[str]:
    """Return a sentence for each difference, in the order of the keys.

    Args:
        a: Of the one side.
        b: Of the other side.
        allowed: Says of a key whether it may be present on one side only.
    """
    found = []
    for key in [*a, *(key for key in b if key not in a)]:
        if key.startswith("resumed/"):
            continue  # each side is judged by itself
        if key not in a or key not in b:
            if not allowed(key):
                found.append(f"{key}: only in {'A' if key in a else 'B'}")
        elif difference := _difference(a[key], b[key]):
            found.append(f"{key}: {difference}")
    return found


def _difference(a: Any, b: Any) -> str:
    """Return how two leaves differ, or nothing where they do not."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        if type(a) is type(b) and repr(a) == repr(b):  # repr: a NaN equals itself
            return ""
        return f"{_short(a)} in A, {_short(b)} in B"
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{a.dtype} {tuple(a.shape)} in A, {b.dtype} {tuple(b.shape)} in B"
    if torch.equal(_bits(a), _bits(b)):
        return ""
    width = a.element_size()
    differ = (_bits(a).view(-1, width) != _bits(b).view(-1, width)).any(1)
    many = f"{int(differ.sum()):,} of {a.numel():,} elements differ"
    if a.numel() == 1:
        return f"{a.item()!r} in A, {b.item()!r} in B"
    most = float((a.double() - b.double()).abs().max())
    return f"{many}, by up to {most:.3g}" if most else f"{many}, in the sign of zeros"


def _short(value: Any, length: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


# --- the child ------------------------------------------------------------------------------------


class _NoKernels(importlib.abc.MetaPathFinder):
    """Hides the compiled kernels, so that the engine takes its reference."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Refuse the kernels, and leave everything else to the other finders."""
        if name.startswith("acdc.") and name.endswith("_kernels"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def child(source: Path, out: Path, cases: list[str]) -> None:
    """Compute the cases in order with the package in ``source``.

    The result of case N goes to the file ``N.pt`` in ``out``, and its number to standard output as
    soon as the file is complete.
    """
    # An editable installation redirects imports to its own source, before ``sys.path`` is asked.
    sys.meta_path[:] = [
        finder
        for finder in sys.meta_path
        if "ScikitBuildRedirectingFinder" not in f"{type(finder).__name__} {finder!r}"
    ]
    sys.meta_path.insert(0, _NoKernels())
    sys.path.insert(0, str(source))
    torch.set_num_threads(1)
    import acdc
    import acdc.methods

    loaded = Path(str(acdc.__file__)).resolve()
    if not loaded.is_relative_to(source.resolve()):
        raise RuntimeError(f"acdc was imported from {loaded}, not from {source}")
    missing = set(acdc.methods.METHODS) - {variant.partition(":")[0] for variant in VARIANTS}
    if missing:
        raise RuntimeError(f"no case trains {', '.join(sorted(missing))}: add them to VARIANTS")
    logging.getLogger("acdc").setLevel(logging.ERROR)  # it says that the kernels are missing
    report = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing else may write there
    for number, case in enumerate(cases):
        try:
            seen = run(case, out / f"{number}") if case.startswith("run/") else loop(acdc, case)
        except Exception:
            seen = {"failed": traceback.format_exc()}
        torch.save(seen, out / f"{number}.pt")
        print(number, file=report, flush=True)


# --- the parent -----------------------------------------------------------------------------------


def extract(revision: str, folder: Path) -> Path:
    """Write ``src`` of a revision into a folder, and return where it lies."""
    words = ["git", "-C", str(ROOT), "archive", "--format=tar", revision, "src"]
    try:
        archive = subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"git cannot give src of {revision!r}. Name a revision.") from error
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder / "src"


@contextlib.contextmanager
def started(source: Path, out: Path, cases: list[str]) -> Iterator[IO[str]]:
    """Start a child, yield its standard output, and end it."""
    out.mkdir()
    variables = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "COLUMNS": "100",
    }
    variables.pop("PYTHONPATH", None)
    # -P: the folder of this file shall not be on the path.
    words = [sys.executable, "-P", str(Path(__file__).resolve()), "_child", str(source), str(out)]
    with subprocess.Popen(
        [*words, *cases], stdout=subprocess.PIPE, text=True, env=variables, cwd=out
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
        finally:
            process.kill()


def result(name: str, out: Path, number: int, reports: IO[str]) -> Flat:
    """Wait for a case of one side, and return its result."""
    line = reports.readline()
    if line.strip() != str(number):
        raise SystemExit(f"The process of {name} ended before its work. Its words are above.")
    file = out / f"{number}.pt"
    seen: Flat = torch.load(file, weights_only=True)
    file.unlink()
    return seen


def judge(case: str, a: Flat, b: Flat) -> tuple[list[str], list[str]]:
    """Return the differences of a case, and what only one side has and may have."""
    failed = [
        f"{n} failed: {side['failed']}" for n, side in (("A", a), ("B", b)) if "failed" in side
    ]
    if failed:
        return failed, []
    tolerated: list[str] = []

    def allowed(key: str) -> bool:
        # A revision may learn to give a pair where it refused one before, and not the reverse.
        new_pair = key.startswith("end/pair/") and not any(k.startswith("end/pair/") for k in a)
        if new_pair or any(fnmatch(f"{case}:{key}", pattern) for pattern in ALLOWED):
            tolerated.append(f"{key}: only in {'A' if key in a else 'B'}")
            return True
        return False

    differences = compare(a, b, allowed)
    for name, side in (("A", a), ("B", b)):
        differences += [
            f"{name}, {key}: it ends otherwise than the uninterrupted run. {value}"
            for key, value in side.items()
            if key.startswith("resumed/") and value != "same"
        ]
    return differences, tolerated


def _only(key: str) -> bool:
    return key.endswith((": only in A", ": only in B"))


def show(case: str, differences: list[str], tolerated: list[str]) -> None:
    """Print the line of a case, and below it what helps to find the cause."""
    only, others = [d for d in differences if _only(d)], [d for d in differences if not _only(d)]
    print(f"{'DIFFERENT' if differences else 'same':9}  {case}", flush=True)
    if others:
        print(f"           first of {len(others)}: {others[0]}")
        if sized := next((d for d in others[1:] if "elements differ" in d), None):
            print(f"           and {sized}")
    for what, keys in (("", only), (" (allowed)", tolerated)):
        if keys:
            print(f"           on one side only{what}, {len(keys)}: {'; '.join(keys[:4])}")


def main() -> int:
    """Compare REVISION with the work tree; return 1 if anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("revision", metavar="REVISION", help="the revision to compare with")
    parser.add_argument("--only", metavar="GLOB", default="*", help="the cases, such as 'str/*'")
    parser.add_argument("--skip-runs", action="store_true", help="leave out the command line")
    args = parser.parse_args()
    cases = [*loop_cases(), *([] if args.skip_runs else run_cases())]
    cases = [case for case in cases if fnmatch(case, args.only)]
    if not cases:
        parser.error(f"no case is named {args.only!r}")
    began, bad = time.perf_counter(), 0
    with tempfile.TemporaryDirectory(prefix="same_as_") as temporary:
        folder = Path(temporary)
        source = extract(args.revision, folder / "source")
        print(f"A: {args.revision}. B: the work tree. {len(cases)} cases.", flush=True)
        with (
            started(source, folder / "a", cases) as reports_a,
            started(ROOT / "src", folder / "b", cases) as reports_b,
        ):
            for number, case in enumerate(cases):
                a = result("A", folder / "a", number, reports_a)
                b = result("B", folder / "b", number, reports_b)
                differences, tolerated = judge(case, a, b)
                bad += bool(differences)
                show(case, differences, tolerated)
    seconds = time.perf_counter() - began
    print(f"{len(cases) - bad} of {len(cases)} cases are bitwise the same ({seconds:.0f} s).")
    return 1 if bad else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["_child"]:
        child(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    else:
        sys.exit(main())
