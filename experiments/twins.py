"""Do AC/DC's twins agree more than a dense network and its pruned version?

Trains, on a task of ``acdc compare`` at 90 %: AC/DC with a dense twin that is fine-tuned, a dense
network, and one-shot and gradual pruning that start from this very dense network and train it for
as long again. All have the same seed, data, network and learning-rate curve. Then it runs ``acdc
study twins``. A run that is there already is not trained again.

    python experiments/twins.py                       # digits, some minutes
    python experiments/twins.py --task fashion_mnist --epochs 5 --seeds 1 --teach 1
    python experiments/twins.py --task fashion_mnist  # an hour
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from acdc.methods import ACDC, Dense, Gradual, Method, OneShot
from acdc.pages.study import publish_study
from acdc.pattern import Unstructured
from acdc.recipes.grids import GRIDS, alternation
from acdc.runs import train
from acdc.runs.recipe import Recipe
from acdc.schedule import Constant
from acdc.studies.twins.page import page
from acdc.studies.twins.study import study

HERE = Path(__file__).parent


def recipes(task: str, epochs: int | None, seed: int) -> dict[str, Recipe]:
    """Return the runs of a seed by the name of their folder; a dense run before what it starts."""
    base = replace(GRIDS[f"compare_{task}"]().task.recipe, seed=seed, threads=1)
    base = replace(base, method=Dense(Constant(epochs or base.epochs)))
    pattern = Unstructured(0.9, "erk")
    dense = f"dense_seed{seed}"
    pruned: dict[str, Method[Any]] = {
        "oneshot": OneShot(pattern, Constant(base.epochs, "sparse")),
        "gradual": Gradual(pattern, Constant(base.epochs, "sparse")),
    }
    acdc = ACDC(pattern, alternation(base.epochs))
    return {
        f"acdc_seed{seed}": replace(base, method=acdc, dense_finetune=True, supports=True),
        dense: base,
        **{
            f"{name}_seed{seed}": replace(base, method=method, start=dense)
            for name, method in pruned.items()
        },
    }


def main() -> None:
    """Train what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=("digits", "fashion_mnist", "cifar10"), default="digits")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--teach", type=int, default=5, help="as in acdc study twins (default: 5)")
    parser.add_argument("--epochs", type=int, help="length of each run (default: the task's)")
    args = parser.parse_args()
    folder = HERE / f"twins_{args.task}"
    runs = []
    for seed in range(args.seeds):
        for name, recipe in recipes(args.task, args.epochs, seed).items():
            path = folder / "runs" / name
            print(f"{name}: {recipe.epochs} epochs", flush=True)
            train.run(recipe, path, device="cpu", resume=(path / "recipe.json").exists())
            runs.append(path)
    torch.manual_seed(0)  # as acdc study twins does
    found = study(runs[0], runs[1:], teach=args.teach, watch=print)
    command = "python experiments/twins.py"
    command += f" --task {args.task}" * (args.task != "digits")
    command += f" --epochs {args.epochs}" * (args.epochs is not None)
    command += f" --seeds {args.seeds}" * (args.seeds != 3)
    command += f" --teach {args.teach}" * (args.teach != 5)
    print(publish_study(folder, page(found, command), found))


if __name__ == "__main__":
    main()
