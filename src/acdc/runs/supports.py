"""The supports of a run, one file for each compression, where the recipe asks for them.

A file ``supports/STEP.safetensors`` holds a mask of uint8 for each pruned weight, eight weights a
byte (:func:`acdc.support.pack_bits`). The shapes are those of the pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from acdc.errors import InputError
from acdc.outfile import write
from acdc.runs.record import Event, Folder
from acdc.support import Support

Shapes = Mapping[str, tuple[int, ...]]


def keep(folder: Folder, step: int, support: Support, weights: Mapping[str, Tensor]) -> Event:
    """Write the support that a compression after ``step`` executed steps chose.

    Args:
        folder: The folder of the run.
        step: Executed steps.
        support: The support.
        weights: The weights after the compression, by name.

    Returns:
        The event of the weights that came back: for each layer how many weights are kept that the
        support before did not keep, and the root mean square of these and of the others.
    """
    shapes = {name: tuple(mask.shape) for name, mask in support.items()}
    before = [path for path in sorted(_files(folder)) if int(path.stem) < step]
    entered = support.to("cpu").entered(_read(before[-1], shapes)) if before else None
    write(folder.supports / f"{step:09d}.safetensors", save(support.pack()))
    layers = {}
    for name, mask in support.items():
        new = torch.zeros_like(mask) if entered is None else entered[name].to(mask.device)
        layers[name] = {
            "entered": int(new.sum()),
            "norm": _root_mean_square(weights[name], new),
            "stayed": _root_mean_square(weights[name], mask & ~new),
        }
    return {"event": "revived", "step": step, "layers": layers}


def _root_mean_square(weights: Tensor, mask: Tensor) -> float | None:
    chosen = weights.detach()[mask].double()
    return float(chosen.square().mean().sqrt()) if chosen.numel() else None


def saved(folder: Folder, shapes: Shapes) -> list[tuple[int, Support]]:
    """Return the steps of the compressions, and their supports on the CPU, in order.

    Args:
        folder: The folder of the run.
        shapes: The shape of every pruned weight.

    Raises:
        InputError: A file is damaged, or belongs to another model.
    """
    return [(int(path.stem), _read(path, shapes)) for path in sorted(_files(folder))]


def _files(folder: Folder) -> list[Path]:
    return [p for p in folder.supports.glob("*.safetensors") if p.stem.isdecimal()]


def _read(path: Path, shapes: Shapes) -> Support:
    try:
        packed = load(path.read_bytes())
        return Support.unpack(packed, shapes)
    except (SafetensorError, KeyError, InputError) as error:
        raise InputError(
            f"{path} holds no support of this run ({error}). Restore the file from a copy, or "
            f"train the run again."
        ) from error
