"""The command line: list, show, run, compare, report, cost, export, cite, bench.

What a person reads and what a program reads are kept apart: with ``--json`` the last line on
standard output is one JSON object, and all else is on standard error. Exit codes: 0; 2 for what the
user can mend, with a sentence; 128 + signal for a run that was asked to stop; 1, with a traceback,
for what should not happen.

Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from acdc.errors import AcdcError, InputError

if TYPE_CHECKING:
    from acdc.bench.table import Table
    from acdc.bench.where import Table as Where
    from acdc.runs.recipe import Recipe

RECORD = ("sparse", "dense", "inference_flops_ratio", "train_flops_ratio", "seconds", "run")

CONVENTION = (
    "One weight at one output position is one multiply-add, 2 FLOPs. Convolutions and linear "
    "layers count. A training step costs 3 forward passes per sample, in a sparse phase on the "
    "kept weights alone."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: The words after ``acdc``; ``None``: those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    args.command_line = shlex.join(["acdc", *words])
    _forgive_encoding(sys.stdout, sys.stderr)
    try:
        code: int = args.command(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader has left, as in 'acdc list | head -1'. Python would complain once more when it
        # flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        _say("Stopped at once. What is in the last checkpoint is safe: go on with --resume.")
        return 128 + signal.SIGINT
    except AcdcError as error:
        number = getattr(error, "signal", None)  # of train.Interrupted, which is heavy to import
        _say(str(error) if number else f"error: {error}")
        # A helper process that stopped as it was told has not failed.
        return 2 if number is None else 0 if _is_helper() else 128 + int(number)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="acdc",
        description="Train one network, get two: an accurate sparse model and its dense twin.",
        epilog="Start with: acdc run digits",
        allow_abbrev=False,
    )
    top.add_argument("--version", action=_Version, help="print the version, and leave")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Any, about: str, more: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}. {more}".strip(),
            allow_abbrev=False,
        )
        sub.set_defaults(command=run)
        return sub

    command("list", _list, "list the recipes, and the grids of 'acdc compare'")

    sub = command(
        "show",
        _show,
        "show what a recipe would do: values, phases, layers, cost; or the cells of a grid",
        "Nothing is trained, and no data is needed.",
    )
    _add_recipe(sub)

    sub = command("run", _run, "train a recipe: a sparse model, its dense twin and a report")
    _add_recipe(sub)
    sub.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs"),
        help="where the run gets a folder of its own, named after the recipe and what was set "
        "(default: runs)",
    )
    sub.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in that folder from its last checkpoint; show what came out of "
        "it if it is complete",
    )
    sub.add_argument("--seed", metavar="N", type=int, help="short for --set seed=N")
    sub.add_argument(
        "--device",
        metavar="D",
        default="auto",
        help="auto, cpu, cuda or mps (default: auto)",
    )
    sub.add_argument(
        "--download", action="store_true", help="fetch the data if it is found nowhere"
    )
    _add_json(sub, "the record of the run")

    sub = command(
        "compare",
        _compare,
        "train a grid of methods, sparsities and seeds, and write the page that compares them",
        "Stop it at any moment: --resume goes on with the cells that are missing.",
    )
    sub.add_argument(
        "grid",
        metavar="GRID",
        help="a grid of 'acdc list', or FILE.py:FUNCTION for one of your own",
    )
    sub.add_argument(
        "--jobs",
        metavar="N",
        type=int,
        default=1,
        help="cells trained at a time, each in a process with its share of the threads (default: "
        "1, in this process)",
    )
    sub.add_argument(
        "--resume",
        action="store_true",
        help="go on with what is there; cells without results are tried again",
    )
    sub.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs"),
        help="where the grid gets a folder of its own (default: runs)",
    )

    sub = command("report", _report, "write the report page of a run anew")
    _add_run(sub)

    sub = command("cost", _cost, "count the FLOPs of a recipe, by phase and by layer", CONVENTION)
    _add_recipe(sub)
    _add_json(sub, "the counts")

    sub = command("export", _export, "write one twin as a file that other programs read")
    _add_run(sub)
    sub.add_argument("--to", required=True, choices=("safetensors", "onnx"), help="its format")
    sub.add_argument(
        "--twin", choices=("sparse", "dense"), default="sparse", help="which (default: sparse)"
    )
    sub.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="the file to write (default: TWIN.FORMAT in the folder of the run)",
    )

    sub = command("cite", _cite, "print what to cite for a method, as BibTeX")
    sub.add_argument("method", metavar="METHOD", nargs="?", help="its name; without: list them all")

    about = "measure on this machine what sparse phases gain, beside dense PyTorch and other peers"
    _add_benches(command("bench", None, about))
    return top


def _add_benches(bench: argparse.ArgumentParser) -> None:
    benches = bench.add_subparsers(metavar="WHAT", required=True)

    def add(
        what: str, run: Any, of: str, cases: str, rounds: tuple[int, str], zeros: str, about: str
    ) -> argparse.ArgumentParser:
        sub = benches.add_parser(what, help=of, description=about, allow_abbrev=False)
        sub.set_defaults(command=run)
        sub.add_argument(
            "--case",
            metavar="TEXT",
            action="append",
            default=[],
            help=f"only those with this in their name, or any other one that is spelled like them: "
            f"{cases}; may be repeated",
        )
        sub.add_argument(
            "--sparsity",
            metavar="S",
            type=float,
            action="append",
            help=f"a fraction of zeros; may be repeated (default: {zeros})",
        )
        sub.add_argument(
            "--repeats",
            metavar="N",
            type=int,
            default=rounds[0],
            help=f"{rounds[1]} (default: {rounds[0]})",
        )
        sub.add_argument(
            "--threads", metavar="N", type=int, help="threads of everybody (default: as torch has)"
        )
        sub.add_argument("--json", metavar="FILE", type=Path, help="write all figures to this file")
        return sub

    single = add(
        "layers",
        _bench_layers,
        "single layers, forward and backward",
        "conv3x3_128x64_s2_h32_n64, linear_3072x768_t512",
        (9, "rounds of timing"),
        "0.8, 0.9 and 0.95",
        "Times single layers, forward and backward, side by side: dense PyTorch in its better "
        "memory format, the engine, torch.sparse in CSR, and SparseProp and SparseLab where they "
        "are installed. Everybody takes a turn in every round; times are medians. Convolutions "
        "are in the engine's layout, and 'convert' is what it costs to bring them there and back; "
        "a linear layer's time includes that.",
    )
    single.add_argument(
        "--caches",
        choices=("left", "emptied"),
        default="left",
        help="before a pass: left as the same layer's passes before left them, or emptied, as by "
        "the other layers of a large network (default: left)",
    )
    step = add(
        "step",
        _bench_step,
        "a whole training step of a network, and its memory",
        "resnet20_w16_n128, gpt_d768_l4_t512",
        (9, "steps of everybody"),
        "0.8, 0.9 and 0.95",
        "Times whole training steps (forward, loss, backward, SGD with momentum) of small "
        "networks in a sparse phase, side by side: dense PyTorch in its better memory format, the "
        "engine, and SparseProp where it is installed. Then measures the peak memory of a step, in "
        "fresh processes. 'compression' is what the first one takes, in which layers are timed and "
        "index lists built, and 'and again' a later one, counted in steps of the engine.",
    )
    where = add(
        "where",
        _bench_where,
        "where the time of a training step goes",
        "resnet20_w16_n128, gpt_d768_l4_t512",
        (9, "steps of everybody"),
        "0.8, 0.9 and 0.95",
        "Takes a training step on the engine apart, in milliseconds: the sparse layers forward, "
        "their input and weight gradients, what is between them (BatchNorm, ReLU, pooling, sums), "
        "conversions at the ends of runs, values copied into index lists, threads waiting for each "
        "other, the rest inside of runs (Python, autograd), PyTorch (loss, dense layers), and the "
        "optimizer with the sparsifier. Under the layers stands what they compute on kept weights "
        "in 10^9 operations a second.",
    )
    run = add(
        "run",
        _bench_run,
        "a whole run, half of it sparse",
        "resnet20_w16_n128",
        (1, "whole runs of everybody"),
        "0.9 and 0.95",
        "Times a whole AC/DC run with half of its epochs sparse, data loading and evaluation "
        "included, on random images of CIFAR-10's shape, beside a dense run of the same epochs. "
        "The runs take turns, an epoch at a time.",
    )
    run.add_argument("--epochs", metavar="N", type=int, default=4, help="of a run (default: 4)")
    run.add_argument(
        "--samples",
        metavar="N",
        type=int,
        default=12_800,
        help="training images; a fifth as many for testing (default: 12800)",
    )
    for sub in (step, where, run):
        sub.add_argument(
            "--scope",
            choices=("uniform", "erk", "global"),
            default="uniform",
            help="how kept weights are spread over the layers (default: uniform, as these networks "
            "are not trained)",
        )


def _add_recipe(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("recipe", metavar="RECIPE", help="a name of 'acdc list'")
    sub.add_argument(
        "--set",
        metavar="PATH=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change a value of the recipe, such as method.pattern.sparsity=0.95; 'acdc show' "
        "lists all paths",
    )


def _add_run(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", metavar="RUN", type=Path, help="the folder of a run")


def _add_json(sub: argparse.ArgumentParser, what: str) -> None:
    sub.add_argument(
        "--json",
        action="store_true",
        help=f"print {what} as the last line on standard output, and all else on standard error",
    )


class _Version(argparse.Action):
    """Like argparse's own, but the version is looked up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from acdc import __version__

        print(f"acdc {__version__}")
        parser.exit()


# --- list and show ------------------------------------------------------------------------------


def _list(_: argparse.Namespace) -> int:
    from acdc import recipes
    from acdc.recipes import grids

    rows = [(name, recipes.get(name).about) for name in recipes.names()]
    _print_rows([*rows, *((name, grid().about) for name, grid in grids.GRIDS.items())], left=2)
    return 0


def _show_grid(name: str) -> int:
    """Say what a grid would train."""
    from acdc.compare.cells import cells, prepare, said
    from acdc.compare.grid import locate
    from acdc.recipes import grids

    grid = locate(grids.find(name))
    print(f"{grid.name}: {grid.about}\n")
    print(f"Task: {grid.task.name}, {grid.task.epochs} epochs dense\n")
    print("Cells:\n")
    rows = [("  method", "sparsity", "seed", "budget", "epochs", "run", "")]
    for cell in cells(grid):
        what = (f"  {cell.method}", f"{100 * cell.sparsity:g} %", f"{cell.seed}", cell.budget)
        if cell.budget == "flops":
            rows.append((*what, "as measured", "", ""))
            continue
        try:
            run = prepare(grid, cell, grid.task.epochs)
        except Exception as error:  # as in a comparison: a hole, whatever it is
            rows.append((*what, "", "", f"none: {said(error)}"))
            continue
        first = f"after {run.before.label}" if run.before else ""
        rows.append((*what, f"{run.epochs}", run.label, first))
    _print_rows(rows, left=1, last_left=True)
    return 0


def _show(args: argparse.Namespace) -> int:
    from acdc.recipes import grids

    if ":" in args.recipe or args.recipe in grids.GRIDS:
        if args.set:
            raise InputError("--set is for recipes. Change a grid in its function.")
        return _show_grid(args.recipe)
    recipe, changed = _recipe(args)
    from acdc.runs.preview import Preview

    view = Preview(recipe)
    print(f"{recipe.name}: {recipe.about}\n")
    print("Values, each to be changed by --set PATH=VALUE:\n")
    _print_rows(
        [(f"  {path}", str(value), _mark(path, changed)) for path, value in _values(recipe)],
        left=3,
    )
    print(f"\nPhases ({view.schedule.total:,} optimizer steps):\n")
    print(textwrap.indent(view.schedule.table(), "  "))
    print("\nLayers:\n")
    rows = [("  layer", "shape", "weights", "pruned")]
    for layer in view.network.layers:
        rows.append(
            (
                f"  {layer.name.removesuffix('.weight')}",
                "×".join(map(str, layer.shape)),
                f"{layer.weights:,}",
                "yes" if layer.name in view.pruned else f"no: {view.why_dense(layer.name)}",
            )
        )
    _print_rows(rows, left=2, last_left=True)
    print("\nSize and cost:\n")
    inference = view.network.inference_ratio(view.counts) if view.counts else 1.0
    estimate = "" if view.ledger.exact else ", estimated on untrained weights"
    _print_rows(
        [
            ("  parameters", f"{view.parameters:,}", ""),
            ("  prunable weights", f"{view.prunable:,}", f"in {len(view.pruned)} layers"),
            ("  of them kept when sparse", f"{view.kept:,}", _percent(view.kept, view.prunable)),
            ("  FLOPs of an inference, dense", f"{view.network.flops():.3e}", ""),
            (
                "  FLOPs of an inference, sparse",
                f"{view.network.flops(view.counts):.3e}",
                f"{100 * inference:.2f} % of dense{estimate}",
            ),
            (
                "  FLOPs of training",
                f"{view.ledger.flops:.3e}",
                f"{100 * view.ledger.ratio:.2f} % of dense training{estimate}",
            ),
        ],
        left=1,
        last_left=True,
    )
    return 0


def _mark(path: str, changed: Mapping[str, str]) -> str:
    """Say which values are not the recipe's own."""
    return "(changed)" if any(path == c or path.startswith(f"{c}.") for c in changed) else ""


def _values(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every path that can be set, with its value as it is typed."""
    from dataclasses import fields, is_dataclass

    for field in fields(node):
        if not path and field.name in ("name", "about"):
            continue
        value, here = getattr(node, field.name), f"{path}{field.name}"
        if is_dataclass(value):
            yield here, type(value).__name__
            yield from _values(value, f"{here}.")
        elif value is None:
            yield here, "none"
        elif isinstance(value, bool):
            yield here, str(value).lower()
        elif isinstance(value, tuple) and not any(isinstance(v, tuple) for v in value):
            yield here, ",".join(map(str, value)) or "()"
        else:
            yield here, value


# --- cost ---------------------------------------------------------------------------------------


def _cost(args: argparse.Namespace) -> int:
    from acdc.runs.preview import Preview

    recipe, _ = _recipe(args)
    view = Preview(recipe)
    out = sys.stderr if args.json else sys.stdout
    ledger = view.ledger
    dense_total = ledger.dense_flops
    print(f"{recipe.name}: {recipe.about}\n", file=out)
    print(textwrap.fill(CONVENTION, 100), file=out)
    if not ledger.exact:
        note = (
            "Which layers a global pattern cuts most depends on the trained weights: the sparse "
            "figures are estimated on untrained ones. The record of a run has the exact ones."
        )
        print("\n" + textwrap.fill(note, 100), file=out)
    print("\nTraining, by phase:\n", file=out)
    rows = [("  phase", "epochs", "steps", "FLOPs", "of dense training")]
    for (kind, epochs, steps, _), cost in zip(view.schedule.rows(), ledger.phases, strict=True):
        share = _percent(cost.flops, dense_total)
        rows.append((f"  {kind}", epochs, steps, f"{cost.flops:,}", share))
    rows.append(
        (
            "  total",
            str(view.schedule.epochs),
            f"{view.schedule.total:,}",
            f"{ledger.flops:,}",
            _percent(ledger.flops, dense_total),
        )
    )
    _print_rows(rows, left=3, file=out)
    print("\nInference on one sample, by layer:\n", file=out)
    print(textwrap.indent(view.network.table(view.counts), "  "), file=out)
    print("\nInference FLOPs:\n", file=out)
    sparse, dense = view.network.flops(view.counts), view.network.flops()
    _print_rows(
        [("  dense", f"{dense:,}", ""), ("  sparse", f"{sparse:,}", _percent(sparse, dense))],
        left=1,
        file=out,
    )
    if args.json:
        kept = view.network.kept(view.counts)
        layers = [
            {"name": x.name, "weights": x.weights, "kept": kept[x.name], "macs": x.macs}
            for x in view.network.layers
        ]
        _print_json(
            {
                "recipe": recipe.name,
                "estimated": not ledger.exact,
                "dense_flops": dense,
                "sparse_flops": sparse,
                "inference_flops_ratio": view.network.inference_ratio(view.counts),
                "train_flops": ledger.flops,
                "train_flops_dense": dense_total,
                "train_flops_ratio": ledger.ratio,
                "phases": ledger.to_dict()["phases"],
                "layers": layers,
            }
        )
    return 0


# --- run and report -----------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    from acdc.runs.recipe import label

    recipe, changed = _recipe(args)
    # Phases that do not fit are told at once, and not after data and libraries are loaded.
    recipe.method.resolve(recipe.data.steps_per_epoch(recipe.batch_size))

    folder = args.out / label(recipe.name, changed)
    with _quiet_libraries():
        from rich.console import Console

        from acdc import console
        from acdc.runs import train

        helper = _is_helper()
        err = Console(stderr=True, quiet=helper)
        complete = args.resume and (folder / "record.json").exists()
        what = f"{'Going on with ' if args.resume else ''}{recipe.name}, writing to {folder}"
        with console.Watcher(what, recipe.dense_finetune, err) as watcher:
            record = train.run(
                recipe,
                folder,
                changed=changed,
                resume=args.resume,
                device=args.device,
                download=args.download,
                command=args.command_line,
                watch=None if helper else watcher,
            )
        if helper:
            return 0
        # From here on everything is on the disk: neither the table nor the page can lose it.
        out = err if args.json else Console(soft_wrap=True)
        if complete:
            err.print("This run is complete: nothing was trained.", highlight=False)
        try:
            out.print()
            out.print(console.outcome(record))
            out.print(f"\nTook {record['seconds']:.1f} s.", highlight=False)
            page = _render(folder)
            out.print(f"Report: {page}", highlight=False, soft_wrap=True)
        finally:
            if args.json:
                _print_json({key: record[key] for key in RECORD})
    return 0


def _compare(args: argparse.Namespace) -> int:
    from acdc.recipes import grids

    where = grids.find(args.grid)
    with _quiet_libraries():
        from rich.console import Console

        from acdc import console
        from acdc.compare.grid import locate
        from acdc.compare.work import compare

        folder = args.out / locate(where).name
        with console.GridWatcher(Console(stderr=True)) as watcher:
            outcomes = compare(
                where,
                args.out,
                jobs=args.jobs,
                resume=args.resume,
                command=args.command_line.replace(str(args.out), args.out.name),
                watch=watcher,
            )
    holes = sum(outcome.row is None for outcome in outcomes)
    if holes:
        _say(f"{holes} of {len(outcomes)} cells have no results; the page says why.")
    print(folder / "report.html")
    return 0


def _render(folder: Path) -> Path:
    from acdc.pages.run import render

    try:
        return render(folder)
    except (AcdcError, OSError) as error:
        raise InputError(
            f"The run is complete and its record is in {folder}, but its report could not be "
            f"written: {error} Once that is mended: acdc report {shlex.quote(str(folder))}"
        ) from error


def _report(args: argparse.Namespace) -> int:
    from acdc.pages.run import render

    try:
        print(render(args.run))
    except OSError as error:
        raise InputError(
            f"The report of {args.run} could not be written: {error.strerror or error}."
        ) from error
    return 0


# --- export -------------------------------------------------------------------------------------


def _export(args: argparse.Namespace) -> int:
    from acdc.export import to_onnx, to_safetensors
    from acdc.result import load
    from acdc.runs.recipe import decode_model
    from acdc.runs.record import Folder

    folder = Folder(args.run)
    recipe = folder.read(folder.recipe)
    path = args.out or args.run / f"{args.twin}.{args.to}"
    if args.to == "safetensors":
        to_safetensors(load(folder.result), path, args.twin)
    else:
        spec = decode_model(recipe["values"]["model"])
        with _quiet_libraries():
            to_onnx(spec.build(), spec.example(1), path, load(folder.result), args.twin)
    print(f"{path} ({path.stat().st_size:,} bytes)")
    return 0


# --- cite ---------------------------------------------------------------------------------------


def _cite(args: argparse.Namespace) -> int:
    from acdc.methods import METHODS

    if args.method is None:
        firsts = {name: (kind.__doc__ or "").partition(".")[0] for name, kind in METHODS.items()}
        _print_rows([(name, " ".join(first.split())) for name, first in firsts.items()], left=2)
        return 0
    if args.method not in METHODS:
        raise InputError(
            f"There is no method {args.method!r}. The methods are: {', '.join(METHODS)}."
        )
    if not (citation := METHODS[args.method].citation):
        raise InputError(f"The method {args.method!r} is of nobody's paper: there is none to cite.")
    print(citation, end="")
    return 0


# --- bench --------------------------------------------------------------------------------------


def _bench_layers(args: argparse.Namespace) -> int:
    from acdc.bench import layers
    from acdc.bench.table import Table

    chosen = layers.choose(args.case)
    columns = {"convert_ms": "convert", "torch_csr_ms": "torch CSR"}
    columns |= {"sparseprop_ms": "SparseProp", "sparselab_ms": "SparseLab"}
    table = Table([layer.name for layer in chosen], columns)
    sparsities = _sparsities(args, 0.8, 0.9, 0.95)
    return _bench(args, table, layers.measure(chosen, sparsities, args.repeats, args.caches))


def _bench_step(args: argparse.Namespace) -> int:
    from acdc.bench import networks, step
    from acdc.bench.table import Table

    chosen = networks.choose(args.case, step.CASES)
    columns = {"sparseprop_ms": "SparseProp", "compression_steps": "compression"}
    columns |= {"recompression_steps": "and again", "dense_peak_mb": "dense MB"}
    columns |= {"engine_peak_mb": "engine MB"}
    table = Table([network.name for network in chosen], columns)
    sparsities = _sparsities(args, 0.8, 0.9, 0.95)
    return _bench(args, table, step.measure(chosen, sparsities, args.repeats, args.scope))


def _bench_where(args: argparse.Namespace) -> int:
    from acdc.bench import networks, step, where

    chosen = networks.choose(args.case, step.CASES)
    table = where.Table([network.name for network in chosen])
    sparsities = _sparsities(args, 0.8, 0.9, 0.95)
    return _bench(args, table, where.measure(chosen, sparsities, args.repeats, args.scope))


def _bench_run(args: argparse.Namespace) -> int:
    from acdc.bench import networks, run
    from acdc.bench.table import Table

    chosen = networks.choose(args.case, run.CASES)
    table = Table([network.name for network in chosen], {"share_of_dense": "share of dense"})
    sparsities, size = _sparsities(args, 0.9, 0.95), (args.epochs, args.samples)
    return _bench(args, table, run.measure(chosen, sparsities, args.repeats, *size, args.scope))


def _sparsities(args: argparse.Namespace, *default: float) -> list[float]:
    from acdc.support import check_sparsity

    sparsities = list(dict.fromkeys(args.sparsity or default))
    for sparsity in sparsities:
        check_sparsity(sparsity)
    return sparsities


def _bench(
    args: argparse.Namespace, table: Table | Where, measured: Iterator[dict[str, Any]]
) -> int:
    """Print rows as they come, and write the file anew with every one."""
    from acdc.bench.race import threads
    from acdc.bench.table import notes, save

    if args.repeats < 1:
        raise InputError(f"--repeats is {args.repeats}. It is a whole number from 1 up.")
    rows: list[dict[str, Any]] = []
    with threads(args.threads):
        print(table.header(), flush=True)
        for row in measured:
            rows.append(row)
            print(table.line(row), flush=True)
            if args.json:
                # With the file's name alone: where it lies is this machine's business.
                command = args.command_line.replace(str(args.json), args.json.name)
                save(args.json, command, rows)
    for note in notes(rows):
        print(note)
    if args.json:
        print(args.json)
    return 0


# --- what commands share ------------------------------------------------------------------------


def _recipe(args: argparse.Namespace) -> tuple[Recipe, dict[str, str]]:
    """Return the recipe as changed by ``--set`` and ``--seed``, and the changes."""
    from acdc import recipes
    from acdc.runs.recipe import change

    changed: dict[str, str] = {}
    for word in args.set:
        path, equals, value = word.partition("=")
        if not (path and equals):
            raise InputError(
                f"--set {word}: write PATH=VALUE, such as --set method.pattern.sparsity=0.95, and "
                f"the name of the recipe before it."
            )
        changed[path] = value
    if getattr(args, "seed", None) is not None:
        changed["seed"] = str(args.seed)
    return change(recipes.get(args.recipe), changed), changed


def _is_helper() -> bool:
    """Whether this is one of the further processes of a run, which say nothing."""
    return int(os.environ.get("LOCAL_RANK", "0")) > 0


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep from the user what libraries have to say about themselves."""
    import logging
    import warnings

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for module in ("lightning", "torch.jit", "jsonargparse", "tensorboard"):
                warnings.filterwarnings("ignore", module=module.replace(".", r"\."))
            yield
    finally:
        logging.disable(before)


def _forgive_encoding(*streams: TextIO) -> None:
    """Print a question mark for what a terminal of another encoding does not have."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _say(message: str) -> None:
    """Print a message on standard error, wrapped to the terminal."""
    if _is_helper():
        return
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    print(
        textwrap.fill(message, width, break_long_words=False, break_on_hyphens=False),
        file=sys.stderr,
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "–"


def _print_json(data: Mapping[str, Any]) -> None:
    sys.stderr.flush()
    print(json.dumps(data), flush=True)


def _print_rows(
    rows: Sequence[tuple[str, ...]],
    left: int,
    last_left: bool = False,
    file: TextIO | None = None,
) -> None:
    """Print rows in columns, the first ``left`` of them (and the last) from the left."""
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(width) - 1
    for row in rows:
        cells = [
            cell.ljust(w) if i < left or (last_left and i == last) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, width, strict=True))
        ]
        print("  ".join(cells).rstrip(), file=file)
