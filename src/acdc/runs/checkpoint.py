"""The checkpoint of a run, and which run a folder holds.

A checkpoint is one file, which holds the hash of its bytes (:mod:`acdc.runs.sealed`). The one
before it is kept beside it. A checkpoint that is damaged is set aside, and the run goes on from the
one before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from acdc.errors import InputError
from acdc.files import Staging, latest, read
from acdc.pair import Pair
from acdc.runs import sealed
from acdc.runs.contents import check_fits, check_types
from acdc.runs.recipe import Recipe, complete, encode
from acdc.runs.record import Folder
from acdc.runs.sealed import Damaged
from acdc.runs.setup import Setup
from acdc.schema import Misfit
from acdc.support import Support

FORMAT = 2  # of checkpoints; those of format 1 have no hash, and no pair
Leg = Literal["main", "finetune"]


@dataclass
class Progress:
    """How far a run is. A checkpoint holds it.

    Args:
        leg: ``"main"`` trains by the method, ``"finetune"`` trains the dense twin on.
        step: Executed optimizer steps of this leg, on the clock of the main leg.
        batches: Batches drawn: more than steps where a GradScaler skipped some.
        batches_at_twin: Batches drawn when the dense twin was captured.
        seconds: Time the run has taken until the last checkpoint.
        pair: The twins at the end of the main leg, while the dense one is trained on.
        computed: What computes the run (:mod:`acdc.runs.rounding`); ``None``: not known.
        warnings: What went wrong so far, each with the step at which it was found.
    """

    leg: Leg = "main"
    step: int = 0
    batches: int = 0
    batches_at_twin: int = 0
    seconds: float = 0.0
    pair: Pair | None = None
    computed: dict[str, Any] | None = None
    warnings: list[dict[str, Any]] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """Return the entries of a checkpoint. The dense twin is in the sparsifier's state."""
        pair = self.pair
        entry = None if pair is None else {"sparse": pair.sparse, "facts": pair.facts}
        return vars(self) | {"pair": entry}


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on.

    Args:
        progress: How far it was.
        metrics: The size of its metrics file at the time.
        warning: A sentence, if the last checkpoint was damaged and it was another one.
    """

    progress: Progress
    metrics: int
    warning: str | None


def save(run: Setup, progress: Progress, metrics: int) -> None:
    """Make a checkpoint of this moment the last one, and keep the one before.

    Args:
        run: The run.
        progress: How far it is.
        metrics: Bytes of ``metrics.jsonl`` that are on the disk.
    """
    if run.fabric.is_global_zero:
        state = {
            "format": FORMAT,
            "recipe": encode(run.recipe),
            "data": run.data.digest(),
            **progress.state(),
            "metrics": metrics,
            "model": run.net.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "sparsifier": run.sparsifier.state_dict(),
            "precision": run.fabric.strategy.precision.state_dict(),
        }
        last, previous = run.folder.checkpoint, run.folder.previous_checkpoint
        with Staging(last.parent, "the checkpoint") as staging:
            staging.add(last.name, sealed.dump(state))
            if last.exists():
                _duplicate(last, staging.place(previous.name))
            staging.commit()
    run.fabric.barrier()


def _duplicate(file: Path, name: Path) -> None:
    """Give a file a second name; where the disk knows no second names, copy it."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


def exists(folder: Folder) -> bool:
    """Return whether a run has a checkpoint to go on from."""
    return any(latest(path).exists() for path in (folder.checkpoint, folder.previous_checkpoint))


def load(run: Setup) -> Resumed:
    """Go back to the last checkpoint; to the one before, if the last is damaged or missing.

    Raises:
        InputError: Both are damaged, or they are of another run. Nothing was loaded.
    """
    folder, warning = run.folder, None
    path = folder.checkpoint
    try:
        state = _read(folder, path)
    except Damaged as error:
        path = folder.previous_checkpoint
        state = _read_previous(folder, error)
        warning = (
            f"The checkpoint {folder.checkpoint} cannot be read: {error}. The run goes on from the "
            f"one before it, {path.name}, at step {state['step']}."
        )
    _check_same_run(run, state, path)
    with _fitting(folder, path):
        check_fits(state, run)
        progress = _restore(run, state)
    run.fabric.barrier()
    if warning is not None and run.fabric.is_global_zero:
        _set_aside(folder)
    return Resumed(progress, state["metrics"], warning)


def _read(folder: Folder, path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds, if its hash and the types of its entries are right.

    Raises:
        Damaged: The file is missing, or an accident changed it.
        InputError: The file is whole, and no checkpoint that can be read.
    """
    try:
        data = read(path)
    except FileNotFoundError:
        raise Damaged("it is missing") from None
    except OSError as error:
        raise Damaged(error.strerror or str(error)) from error
    state, has_hash = sealed.load(data)
    form = state.get("format") if isinstance(state, dict) else None
    if isinstance(form, int) and form > FORMAT:
        raise InputError(
            f"The checkpoint {path} has format {form}, and this version of acdc reads formats up "
            f"to {FORMAT}. Upgrade acdc."
        )
    if form != (FORMAT if has_hash else 1):
        checksum = "a checksum" if has_hash else "no checksum"
        raise _refusal(folder, path, f"has format {form!r} and {checksum}: acdc did not write it")
    try:
        return check_types(_completed(state))
    except Misfit as error:
        raise _refusal(folder, path, f"was not written by acdc: {error}") from error


def _completed(state: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint of an older version with the entries that it did not have."""
    sparsifier = state.get("sparsifier")
    if state["format"] == 1 and isinstance(sparsifier, dict):
        state["sparsifier"] = {"engine": None, **sparsifier}  # from before there was an engine
    later: dict[str, Any] = {"computed": None, "warnings": []}
    if state["format"] == 1:
        later["pair"] = None
    return later | state


def _read_previous(folder: Folder, reason: Damaged) -> dict[str, Any]:
    """Return what the checkpoint before the last one holds."""
    path = folder.previous_checkpoint
    try:
        return _read(folder, path)
    except Damaged as error:
        raise InputError(
            f"The checkpoint {folder.checkpoint} cannot be read: {reason}. Nor can the one before "
            f"it, {path.name}: {error}. Restore one of them from a copy, or start the run anew in "
            f"another folder."
        ) from error


def _refusal(folder: Folder, path: Path, why: str) -> InputError:
    """Return the sentence for a checkpoint that no accident made what it is."""
    remedy = "start the run anew in another folder"
    if path == folder.checkpoint and latest(folder.previous_checkpoint).exists():
        remedy = f"remove it, and --resume goes on from {folder.previous_checkpoint.name}"
    return InputError(f"The checkpoint {path} {why}. Restore it from a copy, or {remedy}.")


def _check_same_run(run: Setup, state: Mapping[str, Any], path: Path) -> None:
    """See that a checkpoint is of this recipe and of these data."""
    if (old := complete(state["recipe"])) != encode(run.recipe):
        raise InputError(
            f"The checkpoint {path} is of another recipe: "
            f"{_first_difference(old, encode(run.recipe))}. Resume with the same "
            f"--set values and the same version of acdc."
        )
    if state["data"] != run.data.digest():
        raise InputError(
            f"The run in {run.folder.path} was trained on other data than is found now. Point "
            f"ACDC_DATA to the data it was started with."
        )


def _restore(run: Setup, state: dict[str, Any]) -> Progress:
    """Load a checkpoint that was checked, and return how far the run was."""
    names = ("leg", "step", "batches", "batches_at_twin", "seconds")
    progress = Progress(**{name: state[name] for name in names})
    progress.computed, progress.warnings = state["computed"], state["warnings"]
    # The recipe decides all values of the groups but the learning rate, which every step sets.
    groups = run.optimizer.state_dict()["param_groups"]
    state["optimizer"]["param_groups"] = groups
    if (twin := state["sparsifier"]["dense_twin"]) is not None:
        twin["optimizer"]["param_groups"] = groups
    if progress.leg == "finetune":
        progress.pair = _pair(run, state)
    run.sparsifier.load_state_dict(state["sparsifier"])
    if progress.leg == "finetune":
        run.sparsifier.remove()
    run.net.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.fabric.strategy.precision.load_state_dict(state["precision"])
    return progress


def _pair(run: Setup, state: Mapping[str, Any]) -> Pair:
    """Return the twins at the end of the main leg, from a checkpoint of the second leg."""
    if state["pair"] is None:  # format 1 kept the pair in the folder of the run alone
        return Pair.load(run.folder.result)
    shapes = {name: tuple(weight.shape) for name, weight in run.sparsifier.params.items()}
    support = Support.unpack(state["sparsifier"]["support"], shapes)
    dense = state["sparsifier"]["dense_twin"]["model"]
    return Pair(dense=dense, support=support, **state["pair"])


@contextmanager
def _fitting(folder: Folder, path: Path) -> Iterator[None]:
    """Turn errors of a whole file with wrong content into a sentence."""
    try:
        yield
    except (Misfit, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # The hash agrees, so no accident did this: another program wrote the file.
        why = f"does not fit the run: {str(error).rstrip('.')}"
        raise _refusal(folder, path, why) from error


def _set_aside(folder: Folder) -> None:
    """Keep a damaged checkpoint under another name, so that the next one does not take its place
    as the one before.
    """
    path = latest(folder.checkpoint)
    if path.exists():
        os.replace(path, folder.damaged_checkpoint)


# --- which run a folder holds -------------------------------------------------------------------


def identity(recipe: Recipe, changed: Mapping[str, str]) -> dict[str, Any]:
    """Return what ``recipe.json`` holds: everything about a run before it begins."""
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "values": encode(recipe),
        "changed": dict(changed),
    }


def as_begun(recipe: Recipe, folder: Folder) -> Recipe:
    """Return the recipe without the engine, if the folder's run began before there was one."""
    if folder.recipe.exists() and "engine" not in folder.read(folder.recipe)["values"]:
        return replace(recipe, engine="off")
    return recipe


def check_free(folder: Folder, recipe: Recipe, resume: bool) -> None:
    """See that the folder holds no run, or the very one that is to be resumed.

    Raises:
        InputError: It holds another run, or none to resume.
    """
    if not resume:
        if folder.recipe.exists():
            raise InputError(
                f"{folder.path} already holds a run. Go on with it by --resume, or choose another "
                f"folder with --out."
            )
        return
    if not folder.recipe.exists():
        raise InputError(
            f"There is no run to resume in {folder.path}. Leave --resume out to start it."
        )
    check_same(folder, recipe)


def check_same(folder: Folder, recipe: Recipe) -> None:
    """See that the folder's run, if it holds one, is of this very recipe.

    Raises:
        InputError: It is of another one.
    """
    if not folder.recipe.exists():
        return
    old, new = complete(folder.read(folder.recipe)["values"]), encode(recipe)
    if old != new:
        raise InputError(
            f"The run in {folder.path} has another recipe: {_first_difference(old, new)}. Resume "
            f"with the same --set values, or start a new run in another folder."
        )


def safe(folder: Folder) -> str:
    """Return a sentence that says which part of the training is on the disk."""
    if exists(folder):
        return f"What was trained until the last checkpoint is in {folder.checkpoint}."
    return "No checkpoint was due yet."


def _first_difference(old: Any, new: Any, path: str = "") -> str:
    """Return the first value in which two encoded recipes differ, as words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    return f"{path} was {old!r} and is {new!r}"
