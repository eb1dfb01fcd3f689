"""``acdc bench``: timings on this machine, beside dense PyTorch and other libraries."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acdc.cli.arguments import Commands, add_command
from acdc.errors import InputError

if TYPE_CHECKING:
    from acdc.bench.breakdown import Table as PartsTable
    from acdc.bench.infer.table import Table as InferTable
    from acdc.bench.table import Table


@dataclass(frozen=True)
class Bench:
    """One of the benchmarks.

    Args:
        name: The word after ``acdc bench``.
        about: One line for ``acdc bench --help``.
        cases: Examples of names of cases.
        repeats: Default of ``--repeats``.
        unit: What is repeated.
        sparsities: Default of ``--sparsity``.
        more: The help of this benchmark.
    """

    name: str
    about: str
    cases: str
    repeats: int
    unit: str
    sparsities: tuple[float, ...]
    more: str


LAYERS = Bench(
    "layers",
    "single layers, forward and backward",
    "conv3x3_128x64_s2_h32_n64, linear_3072x768_t512",
    9,
    "rounds of timing",
    (0.8, 0.9, 0.95),
    "Times single layers, forward and backward, side by side: dense PyTorch in its faster memory "
    "format, the engine, torch.sparse in CSR, and SparseProp and SparseLab if they are installed. "
    "All take turns in every round; times are medians. Convolutions are timed in the engine's "
    "layout, and 'convert' is the cost of converting to that layout and back; the time of a linear "
    "layer includes this conversion.",
)
STEP = Bench(
    "step",
    "a whole training step of a network, and its memory",
    "resnet20_w16_n128, gpt_d768_l4_t512",
    9,
    "steps of each competitor",
    (0.8, 0.9, 0.95),
    "Times whole training steps (forward, loss, backward, SGD with momentum) of small networks in "
    "a sparse phase, side by side: dense PyTorch in its faster memory format, the engine, and "
    "SparseProp if it is installed. Then measures the peak memory of a step, in fresh processes. "
    "'compression' is the cost of the first compression, in which layers are timed and index lists "
    "are built, and 'and again' that of a later compression, both in steps of the engine.",
)
BREAKDOWN = Bench(
    "where",
    "where the time of a training step goes",
    "resnet20_w16_n128, gpt_d768_l4_t512, or a network of 'acdc bench zoo --list'",
    9,
    "steps of each competitor",
    (0.8, 0.9, 0.95),
    "Splits the time of a training step on the engine, in milliseconds: the forward pass of the "
    "sparse layers, their input and weight gradients, the operations between them (BatchNorm, "
    "ReLU, pooling, sums), layout conversions at the ends of fused segments, copies of values into "
    "index lists, threads that wait for each other, the rest inside of segments (Python, "
    "autograd), PyTorch (loss, dense layers), and the optimizer with the sparsifier. Below the "
    "times of the layers stands their speed on kept weights, in 10^9 operations a second.",
)
ZOO = Bench(
    "zoo",
    "training steps of networks of other libraries",
    "",
    5,
    "steps of each competitor",
    (0.9, 0.95),
    "Times whole training steps (forward, loss, backward, optimizer) in a sparse phase of networks "
    "of transformers, timm and torchvision where these are installed, of torch.nn, and of our own, "
    "side by side: dense PyTorch in its faster memory format, and the engine. Weights are random, "
    "and nothing is downloaded. 'sparse' is the share of the prunable multiply-adds that run "
    "sparse. Below the table stand the reasons for the rest, and for networks that fail.",
)
RUN = Bench(
    "run",
    "a whole run, half of it sparse",
    "resnet20_w16_n128, or a network of 'acdc bench zoo --list'",
    1,
    "whole runs of each competitor",
    (0.9, 0.95),
    "Times a whole AC/DC run with half of its epochs sparse, data loading and evaluation included, "
    "on random samples, beside dense runs of the same epochs. The runs take turns, an epoch at a "
    "time. The network is one of our ResNets, or one of 'acdc bench zoo --list'.",
)
INFER = Bench(
    "infer",
    "inference of a finished network, beside other runtimes",
    "",
    5,
    "turns of each contender",
    (0.9, 0.95),
    "Times the sparse runtime beside PyTorch, ONNX Runtime, OpenVINO and DeepSparse, each in a "
    "process of its own and bound to the same CPUs; they take turns. WHAT is the folder of a run "
    "or of a pair, a frozen file, or a network by its name, with random weights: resnet50, "
    "resnet18, mobilenet_v1, bert_d384, vit_d384, or one of 'acdc bench zoo --list'. All get the "
    "same sparse network; those that read ONNX get a file of it. Without WHAT: resnet50.",
)


def add(commands: Commands) -> None:
    """Add the command and its benchmarks."""
    about = "measure on this machine what sparse phases gain, beside dense PyTorch and other peers"
    bench = add_command(commands, "bench", None, about)
    benches = bench.add_subparsers(metavar="WHAT", required=True)
    layers = _add_bench(benches, LAYERS, _layers)
    layers.add_argument(
        "--caches",
        choices=("left", "emptied"),
        default="left",
        help="processor caches before each pass: left as the passes of the same layer leave them, "
        "or emptied, as the other layers of a large network would (default: left)",
    )
    step = _add_bench(benches, STEP, _step)
    breakdown = _add_bench(benches, BREAKDOWN, _breakdown)
    zoo = _add_bench(benches, ZOO, _zoo, cases=False)
    _add_zoo_options(zoo)
    infer = _add_bench(benches, INFER, _infer, cases=False)
    _add_infer_options(infer)
    run = _add_bench(benches, RUN, _run)
    run.add_argument("--epochs", metavar="N", type=int, default=4, help="of a run (default: 4)")
    run.add_argument(
        "--samples",
        metavar="N",
        type=int,
        help="training samples of an epoch; a fifth as many for testing (default: 12800, or 1600 "
        "for a network of 'acdc bench zoo --list')",
    )
    for sub in (step, breakdown, zoo, infer, run):
        sub.add_argument(
            "--scope",
            choices=("uniform", "erk", "global"),
            default="uniform",
            help="how kept weights are spread over the layers (default: uniform, because these "
            "networks are not trained)",
        )


def _add_zoo_options(zoo: argparse.ArgumentParser) -> None:
    zoo.add_argument(
        "--network",
        metavar="NAME",
        action="append",
        default=[],
        help="a network of --list, or one of ours such as gpt_d384_l6_t1024; may be repeated "
        "(default: all whose library is installed)",
    )
    zoo.add_argument("--list", action="store_true", help="list the networks, and time nothing")
    zoo.add_argument(
        "--batch", metavar="N", type=int, help="samples of a batch (default: as --list shows)"
    )
    zoo.add_argument(
        "--optimizer",
        choices=("sgd", "adam", "adamw"),
        default="sgd",
        help="the optimizer; sgd has momentum (default: sgd)",
    )
    zoo.add_argument(
        "--columns",
        metavar="NAMES",
        default="",
        help="further columns: bf16 (autocast) and compile (torch.compile), of dense PyTorch; "
        "with a comma between them",
    )


def _add_infer_options(infer: argparse.ArgumentParser) -> None:
    infer.add_argument(
        "what", metavar="WHAT", nargs="*", help="what to compute (default: resnet50)"
    )
    infer.add_argument(
        "--batch",
        metavar="N[,N]",
        type=_numbers,
        default=[1, 16],
        help="samples of a request (default: 1,16)",
    )
    infer.add_argument(
        "--against",
        metavar="NAMES",
        help="the other contenders, with a comma between them: torch, torch-compile, onnxruntime, "
        "openvino, deepsparse, and of another precision onnxruntime-int8 and openvino-bf16 "
        "(default: torch,onnxruntime,openvino,deepsparse)",
    )
    infer.add_argument(
        "--python",
        metavar="KIND=PATH",
        action="append",
        default=[],
        help="an interpreter of its own for a contender, such as deepsparse=env/bin/python; "
        "DeepSparse 1.8 needs Python 3.11; may be repeated",
    )
    infer.add_argument(
        "--scenario",
        choices=("sync", "async"),
        default="sync",
        help="one request at a time, or one in each stream (default: sync)",
    )
    infer.add_argument(
        "--streams",
        metavar="N",
        type=int,
        help="requests at the same time; with --scenario async (default: as many as threads)",
    )
    infer.add_argument(
        "--seconds", metavar="S", type=float, default=1.0, help="of each turn (default: 1)"
    )
    infer.add_argument(
        "--onnx",
        metavar="FILE",
        type=Path,
        help="the ONNX file of the same network, in place of an exported one; a frozen file alone "
        "holds no model to export",
    )
    infer.add_argument(
        "--model",
        metavar="MODULE:CALLABLE",
        help="for the folder of a pair: what makes the network. Its module is imported, and also "
        "looked for in the working directory",
    )
    infer.add_argument(
        "--shape",
        metavar="N[,N]",
        type=_numbers,
        help="for the folder of a pair: the shape of one sample, such as 3,224,224",
    )


def _numbers(text: str) -> list[int]:
    """Return the whole numbers of a text such as ``1,16``."""
    return [int(word) for word in text.split(",")]


def _add_bench(
    benches: Commands,
    bench: Bench,
    run: Callable[[argparse.Namespace], int],
    *,
    cases: bool = True,
) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = benches.add_parser(
        bench.name, help=bench.about, description=bench.more, allow_abbrev=False
    )
    sub.set_defaults(command=run)
    if cases:
        sub.add_argument(
            "--case",
            metavar="TEXT",
            action="append",
            default=[],
            help=f"only the cases with this text in their name, or a new case whose name follows "
            f"the same pattern: {bench.cases}; may be repeated",
        )
    *others, last = map(str, bench.sparsities)
    sub.add_argument(
        "--sparsity",
        metavar="S",
        type=float,
        action="append",
        help=f"a fraction of zeros; may be repeated (default: {', '.join(others)} and {last})",
    )
    sub.add_argument(
        "--repeats",
        metavar="N",
        type=int,
        default=bench.repeats,
        help=f"{bench.unit} (default: {bench.repeats})",
    )
    sub.add_argument(
        "--threads",
        metavar="N",
        type=int,
        help="threads of each competitor (default: as many as torch uses)",
    )
    sub.add_argument("--json", metavar="FILE", type=Path, help="write all figures to this file")
    return sub


def _layers(args: argparse.Namespace) -> int:
    from acdc.bench import layers
    from acdc.bench.table import Table

    chosen = layers.choose(args.case)
    columns = {"convert_ms": "convert", "torch_csr_ms": "torch CSR"}
    columns |= {"sparseprop_ms": "SparseProp", "sparselab_ms": "SparseLab"}
    table = Table([layer.name for layer in chosen], columns)
    sparsities = _sparsities(args, LAYERS)
    return _measure(args, table, layers.measure(chosen, sparsities, args.repeats, args.caches))


def _step(args: argparse.Namespace) -> int:
    from acdc.bench import networks, step
    from acdc.bench.table import Table

    chosen = networks.choose(args.case, step.CASES)
    columns = {"sparseprop_ms": "SparseProp", "compression_steps": "compression"}
    columns |= {"recompression_steps": "and again", "dense_peak_mb": "dense MB"}
    columns |= {"engine_peak_mb": "engine MB"}
    table = Table([network.name for network in chosen], columns)
    sparsities = _sparsities(args, STEP)
    return _measure(args, table, step.measure(chosen, sparsities, args.repeats, args.scope))


def _breakdown(args: argparse.Namespace) -> int:
    from acdc.bench import breakdown, networks, step, zoo

    chosen = networks.choose(args.case, step.CASES, zoo.find_installed)
    table = breakdown.Table([network.name for network in chosen])
    sparsities = _sparsities(args, BREAKDOWN)
    return _measure(args, table, breakdown.measure(chosen, sparsities, args.repeats, args.scope))


def _zoo(args: argparse.Namespace) -> int:
    from acdc.bench import zoo, zoo_step
    from acdc.bench.table import Table

    if args.list:
        print("\n".join(zoo.listing()))
        return 0
    chosen, missing = zoo.choose(args.network, args.batch)
    names = zoo_step.check_columns(args.columns)
    columns = {f"{name}_ms": name for name in names}
    columns |= {"sparse_percent": "sparse %"}
    columns |= {"dense_peak_mb": "dense MB", "engine_peak_mb": "engine MB"}
    settings = zoo_step.Settings(
        _sparsities(args, ZOO), args.repeats, args.scope, args.optimizer, names
    )
    table = Table([network.name for network in chosen], columns)
    measured = zoo_step.measure(chosen, settings)
    return _measure(args, table, measured, lambda rows: [*missing, *zoo_step.reasons(rows)])


def _run(args: argparse.Namespace) -> int:
    from acdc.bench import networks, run, zoo
    from acdc.bench.table import Table

    chosen = networks.choose(args.case, run.CASES, zoo.find_installed)
    table = Table([network.name for network in chosen], {"share_of_dense": "share of dense"})
    sparsities, size = _sparsities(args, RUN), (args.epochs, args.samples)
    return _measure(args, table, run.measure(chosen, sparsities, args.repeats, *size, args.scope))


def _infer(args: argparse.Namespace) -> int:
    from acdc.bench.infer import cases, measure, table
    from acdc.bench.infer.files import check_onnx
    from acdc.processor import usable_cpus

    threads = args.threads or usable_cpus()
    pythons = {}
    for word in args.python:
        kind, equals, path = word.partition("=")
        if not (equals and path):
            raise InputError(
                f"--python {word}: write KIND=PATH, such as deepsparse=env/bin/python."
            )
        pythons[kind] = path
    if args.streams is not None and args.scenario == "sync":
        raise InputError("--streams is for --scenario async.")
    streams = 1 if args.scenario == "sync" else args.streams or threads
    check_onnx(args.onnx)
    against = measure.AGAINST
    if args.against is not None:
        against = tuple(name for name in args.against.split(",") if name)
    settings = measure.Settings(
        args.batch, against, args.scenario, streams, args.seconds, args.repeats, threads, pythons,
        args.onnx,
    )  # fmt: skip
    shape = tuple(args.shape) if args.shape else None
    asked = [
        cases.Asked(what, sparsity, args.scope, args.model, shape)
        for what in args.what or ["resnet50"]
        for sparsity in (_sparsities(args, INFER) if cases.is_name(what) else [None])
    ]
    names = [case.name for case in asked]
    lines = table.Table(names, settings.entrants)
    return _measure(args, lines, measure.measure(asked, settings), table.notes)


def _sparsities(args: argparse.Namespace, bench: Bench) -> list[float]:
    from acdc.support import check_sparsity

    sparsities = list(dict.fromkeys(args.sparsity or bench.sparsities))
    for sparsity in sparsities:
        check_sparsity(sparsity)
    return sparsities


def _measure(
    args: argparse.Namespace,
    table: Table | PartsTable | InferTable,
    measured: Iterator[dict[str, Any]],
    below: Callable[[list[dict[str, Any]]], list[str]] | None = None,
) -> int:
    """Print each row when it is measured, and write the file again with every row.

    Args:
        args: The options.
        table: What the lines look like.
        measured: The rows.
        below: Returns the lines below the table (default: the libraries that were not timed).
    """
    from acdc import outfile
    from acdc.bench.race import threads
    from acdc.bench.table import notes, save
    from acdc.cli.output import without_folder

    if args.repeats < 1:
        raise InputError(f"--repeats is {args.repeats}. It is a whole number from 1 up.")
    rows: list[dict[str, Any]] = []
    if args.json:
        outfile.check(args.json)
        command = without_folder(args.command_line, args.json)
        once = outfile.is_stream(args.json)  # what went into a pipe cannot be written again
    with threads(args.threads):
        print(table.header(), flush=True)
        for row in measured:
            rows.append(row)
            print(table.line(row), flush=True)
            if args.json and not once:
                save(args.json, command, rows)
    for note in (below or notes)(rows):
        print(note)
    if args.json and once:
        save(args.json, command, rows)
    elif args.json:
        print(args.json)
    return 0
