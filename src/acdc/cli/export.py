"""``acdc export``: one network of a run as a file for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from acdc.cli.arguments import Commands, add_command, add_run
from acdc.cli.output import quiet_libraries
from acdc.errors import InputError

_ENDINGS = {"safetensors": "safetensors", "onnx": "onnx", "runtime": "acdcrt"}


def add(commands: Commands) -> None:
    """Add the command."""
    sub = add_command(commands, "export", run, "write one network of a run for other programs")
    add_run(sub)
    sub.add_argument("--to", required=True, choices=tuple(_ENDINGS), help="file format")
    sub.add_argument(
        "--twin",
        choices=("sparse", "dense"),
        default="sparse",
        help="which network of the run (default: sparse)",
    )
    sub.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="the file to write (default: in the folder of the run, TWIN.FORMAT, or TWIN.acdcrt "
        "for runtime)",
    )
    sub.add_argument(
        "--sparse",
        action="store_true",
        help="onnx: write weights with more than two zeros in three as sparse initializers, so "
        "that the file is small",
    )
    sub.add_argument(
        "--dynamic",
        metavar="INPUT:DIM=NAME",
        nargs="+",
        default=[],
        help="onnx: let a dimension of an input vary, such as x:2=height; the batch always may, "
        "and so may the length of token sequences unless this is given",
    )


def run(args: argparse.Namespace) -> int:
    """Write the file, and print its path and its size."""
    from acdc import outfile
    from acdc.export import to_onnx, to_runtime, to_safetensors
    from acdc.result import load
    from acdc.runs.recipe import model_of
    from acdc.runs.record import Folder

    if args.to != "onnx" and (args.sparse or args.dynamic):
        raise InputError(
            "--sparse and --dynamic are for --to onnx. A small safetensors file is in the folder "
            "of the run already: pair/sparse.safetensors."
        )
    dynamic = _dynamic(args.dynamic)
    folder = Folder(args.run)
    folder.read(folder.recipe)  # a folder that is not of a run is refused before the file is
    path = args.out or args.run / f"{args.twin}.{_ENDINGS[args.to]}"
    outfile.check(path)
    if args.to == "safetensors":
        to_safetensors(load(folder.result), path, args.twin)
    else:
        spec = model_of(folder)
        if args.to == "runtime":
            to_runtime(spec.build(), spec.example(1), path, load(folder.result), args.twin)
            return _say_written(path)
        with quiet_libraries():
            to_onnx(
                spec.build(), spec.example(1), path, load(folder.result), args.twin,
                dynamic=dynamic or None, sparse=args.sparse,
            )  # fmt: skip
    return _say_written(path)


def _say_written(path: Path) -> int:
    from acdc import outfile

    if not outfile.is_stream(path):  # standard output may be the file
        print(f"{path} ({path.stat().st_size:,} bytes)")
    return 0


def _dynamic(words: list[str]) -> dict[str, dict[int, str]]:
    """Return what ``--dynamic`` asks for, as ``to_onnx`` takes it."""
    found: dict[str, dict[int, str]] = {}
    for word in words:
        place, equals, name = word.partition("=")
        argument, colon, dim = place.rpartition(":")
        if not (argument and colon and equals and name and dim.isdecimal()):
            raise InputError(
                f"--dynamic {word}: write INPUT:DIM=NAME, such as x:2=height for the third "
                f"dimension of the input x."
            )
        found.setdefault(argument, {})[int(dim)] = name
    return found
