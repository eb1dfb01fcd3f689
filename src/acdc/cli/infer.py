"""``acdc infer``: compute a frozen network on numpy files."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from acdc.cli.arguments import Commands, add_command
from acdc.errors import InputError


def add(commands: Commands) -> None:
    """Add the command."""
    sub = add_command(
        commands,
        "infer",
        run,
        "compute a frozen network on numpy files",
        "'acdc export RUN --to runtime' writes the network.",
    )
    sub.add_argument("file", metavar="FILE", type=Path, help="the frozen network")
    sub.add_argument(
        "--input",
        metavar="X.npy",
        type=Path,
        nargs="+",
        required=True,
        help="the inputs, one file for each, with the batch first",
    )
    sub.add_argument(
        "--output",
        metavar="Y.npy",
        type=Path,
        nargs="+",
        required=True,
        help="the files to write, one for each output",
    )
    sub.add_argument("--threads", metavar="N", type=int, help="default: all CPUs of this process")


def run(args: argparse.Namespace) -> int:
    """Write the outputs, and print each file with its shape."""
    from acdc import outfile
    from acdc.runtime.runtime import Runtime

    runtime = Runtime.load(args.file, threads=args.threads)
    names = [argument.name for argument in runtime.get_inputs()]
    outputs = [argument.name for argument in runtime.get_outputs()]
    for words, wanted, option in (
        (args.input, names, "--input"),
        (args.output, outputs, "--output"),
    ):
        if len(words) != len(wanted):
            raise InputError(
                f"{option} takes a file for each of {', '.join(wanted)}, got {len(words)} files."
            )
    for path in args.output:
        outfile.check(path)
    feeds = dict(zip(names, map(_read, args.input), strict=True))
    for path, result in zip(args.output, runtime.run(None, feeds), strict=True):
        outfile.write(path, _written(result))
        if not outfile.is_stream(path):
            print(f"{path} ({'x'.join(map(str, result.shape))})")
    return 0


def _read(path: Path) -> Any:
    """Return the array of a file. Its size is compared with the file before memory is taken."""
    import numpy as np

    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as an array of numpy: {error}. Write it with numpy.save."
        ) from error
    if not isinstance(mapped, np.ndarray) or mapped.dtype.kind not in "fiub":
        raise InputError(f"{path} holds no array of numbers. Write one array with numpy.save.")
    return np.array(mapped)


def _written(array: Any) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
