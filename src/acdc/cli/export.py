"""``acdc export``: one network of a run as a file for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from acdc.cli.arguments import Commands, add_command, add_run
from acdc.cli.output import quiet_libraries
from acdc.errors import InputError


def add(commands: Commands) -> None:
    """Add the command."""
    sub = add_command(commands, "export", run, "write one network of a run for other programs")
    add_run(sub)
    sub.add_argument("--to", required=True, choices=("safetensors", "onnx"), help="file format")
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
        help="the file to write (default: TWIN.FORMAT in the folder of the run)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the file, and print its path and its size."""
    from acdc import outfile
    from acdc.export import to_onnx, to_safetensors
    from acdc.result import load
    from acdc.runs.recipe import decode_model
    from acdc.runs.record import Folder

    folder = Folder(args.run)
    recipe = folder.read(folder.recipe)
    path = args.out or args.run / f"{args.twin}.{args.to}"
    outfile.check(path)
    if args.to == "safetensors":
        to_safetensors(load(folder.result), path, args.twin)
    else:
        try:
            spec = decode_model(recipe["values"].get("model", {}))
        except InputError as error:
            raise InputError(f"{folder.recipe}: {error}") from error
        with quiet_libraries():
            to_onnx(spec.build(), spec.example(1), path, load(folder.result), args.twin)
    if not outfile.is_stream(path):  # standard output may be the file
        print(f"{path} ({path.stat().st_size:,} bytes)")
    return 0
