"""The checkpoint of a run, and which run a folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from acdc.errors import InputError
from acdc.files import Staging
from acdc.runs.recipe import Recipe, complete, encode
from acdc.runs.record import Folder
from acdc.runs.setup import Setup

FORMAT = 1  # of checkpoints
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
    """

    leg: Leg = "main"
    step: int = 0
    batches: int = 0
    batches_at_twin: int = 0
    seconds: float = 0.0


def save(run: Setup, progress: Progress, metrics: int) -> None:
    """Replace the last checkpoint by one of this moment.

    Args:
        run: The run.
        progress: How far it is.
        metrics: Bytes of ``metrics.jsonl`` that are on the disk.
    """
    state = {
        "format": FORMAT,
        "recipe": encode(run.recipe),
        "data": run.data.digest(),
        **asdict(progress),
        "metrics": metrics,
        "model": run.net.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "sparsifier": run.sparsifier.state_dict(),
        "precision": run.fabric.strategy.precision.state_dict(),
    }
    path = run.folder.checkpoint
    if not run.fabric.is_global_zero:
        run.fabric.save(path, state)  # writes nothing, and waits
        run.fabric.barrier()
        return
    with Staging(path.parent, "the checkpoint") as staging:
        run.fabric.save(staging.place(path.name), state)
        staging.commit()
    run.fabric.barrier()


def load(run: Setup) -> tuple[Progress, int]:
    """Go back to the last checkpoint.

    Returns:
        How far the run was, and the size of its metrics file at the time.

    Raises:
        InputError: The checkpoint is damaged, or of another run.
    """
    path = run.folder.checkpoint
    try:
        state = run.fabric.load(path, weights_only=True)
    except Exception as error:
        raise InputError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}: {error}). Restore "
            f"it from a copy, or start the run anew in another folder."
        ) from error
    if state.get("format") != FORMAT:
        raise InputError(
            f"The checkpoint {path} has format {state.get('format')!r}, and this version of "
            f"acdc reads format {FORMAT}."
        )
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
    progress = Progress(**{name: state[name] for name in vars(Progress())})
    run.sparsifier.load_state_dict(state["sparsifier"])
    if progress.leg == "finetune":
        run.sparsifier.remove()
    run.net.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.fabric.strategy.precision.load_state_dict(state["precision"])
    return progress, int(state["metrics"])


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
    if folder.checkpoint.exists():
        return f"What was trained until the last checkpoint is in {folder.checkpoint}."
    return "No checkpoint was due yet."


def _first_difference(old: Any, new: Any, path: str = "") -> str:
    """Return the first value in which two encoded recipes differ, as words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    return f"{path} was {old!r} and is {new!r}"
