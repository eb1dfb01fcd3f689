"""``acdc study``: claims of the paper, measured, each with a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from acdc.cli.arguments import Commands, add_command, add_run
from acdc.cli.output import quiet_libraries, say
from acdc.errors import InputError


def add(commands: Commands) -> None:
    """Add the command and its studies."""
    top = add_command(
        commands,
        "study",
        None,
        "measure a claim of the paper, and write its page",
        "Each study writes study.json, with all figures, and report.html.",
    )
    studies = top.add_subparsers(metavar="WHAT", required=True)
    _add_convergence(studies)
    _add_twins(studies)
    _add_masks(studies)
    _add_memorisation(studies)


def _add_out(sub: argparse.ArgumentParser, default: str) -> None:
    sub.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        help=f"where study.json and report.html are written (default: {default})",
    )


def _add_seed(sub: argparse.ArgumentParser, what: str) -> None:
    sub.add_argument("--seed", metavar="N", type=int, default=0, help=f"{what} (default: 0)")


def _add_convergence(studies: Commands) -> None:
    sub = add_command(
        studies,
        "convergence",
        _convergence,
        "hard thresholding, plain, stochastic and alternating, beside proven bounds",
        "Sparse linear and logistic regression and a small network; every bound on every seed, and "
        "what breaks where an assumption is violated. Takes some minutes.",
    )
    _add_out(sub, "runs/convergence")
    _add_seed(sub, "the first seed")
    sub.add_argument(
        "--seeds", metavar="N", type=int, default=20, help="number of seeds (default: 20)"
    )


def _convergence(args: argparse.Namespace) -> int:
    """Measure, write the page, and print its path."""
    from acdc.pages.study import check_folder, publish_study

    if args.seeds < 1:
        raise InputError(f"--seeds is {args.seeds}. It is a whole number from 1 up.")
    out = args.out or Path("runs/convergence")
    check_folder(out)
    from acdc.studies.convergence.page import page
    from acdc.studies.convergence.study import study

    with quiet_libraries():
        found = study(args.seed, args.seeds, say)
        print(publish_study(out, page(found, args.command_line), found))
    return 0


def _add_twins(studies: Commands) -> None:
    sub = add_command(
        studies,
        "twins",
        _twins,
        "how alike the twins of a run are, and what the dense twin is good for",
        "Agreement, who is right, cross-entropy, calibration, classes, and linear CKA along the "
        "layers; the line between the twins, and cuts of the dense twin at other sparsities. "
        "Nothing is trained without --teach.",
    )
    add_run(sub)
    sub.add_argument(
        "--against",
        metavar="RUN",
        type=Path,
        nargs="+",
        default=[],
        help="other runs of the same model and data: dense runs with other seeds, and runs that "
        "prune a trained dense network",
    )
    _add_out(sub, "the folder twins in that of the run")
    _add_seed(sub, "seed of the training batches")
    sub.add_argument(
        "--samples",
        metavar="N",
        type=int,
        default=512,
        help="test samples for the distance along layers (default: 512)",
    )
    sub.add_argument(
        "--bn-batches",
        metavar="N",
        type=int,
        default=20,
        help="training batches over which BatchNorm statistics are estimated (default: 20)",
    )
    sub.add_argument(
        "--teach",
        metavar="EPOCHS",
        type=int,
        default=0,
        help="train cuts of the dense twin for so many epochs, with the twin as their teacher and "
        "without (default: 0, nothing is trained)",
    )


def _twins(args: argparse.Namespace) -> int:
    """Measure, write the page, and print its path."""
    from acdc.pages.study import check_folder, publish_study

    out = args.out or args.run / "twins"
    check_folder(out)
    with quiet_libraries():
        import torch

        from acdc.studies.twins.page import page
        from acdc.studies.twins.study import study

        torch.manual_seed(args.seed)  # dropout, where networks are trained
        found = study(
            args.run, args.against, args.seed, args.samples, args.bn_batches, args.teach, say
        )
        print(publish_study(out, page(found, args.command_line), found))
    return 0


def _add_masks(studies: Commands) -> None:
    sub = add_command(
        studies,
        "masks",
        _masks,
        "how the support of a run changes from one compression to the next",
        "The run was trained with --set supports=true. Change at each compression, weights that "
        "stay, and weights that leave and come back, of the network and of each layer.",
    )
    add_run(sub)
    _add_out(sub, "the folder masks in that of the run")


def _masks(args: argparse.Namespace) -> int:
    """Measure, write the page, and print its path."""
    from acdc.pages.study import check_folder, publish_study
    from acdc.studies.masks.page import page
    from acdc.studies.masks.study import study

    out = args.out or args.run / "masks"
    check_folder(out)
    say(f"supports of {args.run}")
    found = study(args.run)
    print(publish_study(out, page(found, args.command_line), found))
    return 0


def _add_memorisation(studies: Commands) -> None:
    sub = add_command(
        studies,
        "memorisation",
        _memorisation,
        "accuracy on random labels, and on the true ones, through the phases of runs",
        "The runs were trained on data with random labels, such as the recipe cifar10_memorisation "
        "or --set data.random_labels=1000.",
    )
    sub.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="the folders of one or more runs"
    )
    _add_out(sub, "the folder memorisation in that of the first run")


def _memorisation(args: argparse.Namespace) -> int:
    """Gather the evaluations, write the page, and print its path."""
    from acdc.pages.study import check_folder, publish_study
    from acdc.studies.memorisation.page import page
    from acdc.studies.memorisation.study import study

    out = args.out or args.runs[0] / "memorisation"
    check_folder(out)
    say(f"evaluations of {len(args.runs)} runs" if args.runs[1:] else "evaluations of the run")
    found = study(args.runs)
    print(publish_study(out, page(found, args.command_line), found))
    return 0
