"""Grids of ``acdc compare``: several methods on one task each.

``METHODS`` has a line for each method. A line defines how the method trains a cell: its plan for a
number of epochs, and the dense training that it starts from. All plans are shares of the run, so
that a run of equal training FLOPs is the same run, stretched.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from acdc.compare.grid import Build, Candidate, Grid, GridMethod, Task, address
from acdc.errors import InputError
from acdc.methods import (
    ACDC,
    DPF,
    DSD,
    GMP,
    IMP,
    SET,
    SNFS,
    SNIP,
    SRSTE,
    STR,
    Dense,
    Gradual,
    GraNet,
    Method,
    OneShot,
    PartialACDC,
    RigL,
    Static,
    TopKAST,
    WoodFisher,
)
from acdc.pattern import NM, Pattern, Scope, Unstructured
from acdc.recipes.paper import cifar10_resnet20
from acdc.runs.data import Augment, Cifar10, Digits, FashionMNIST, TinyShakespeare
from acdc.runs.models import CifarResNet, SmallGPT, SmallResNet
from acdc.runs.optim import SGD, AdamW, Cosine
from acdc.runs.recipe import Recipe
from acdc.schedule import Alternate, Constant, alternate, phases

# --- how the methods train ----------------------------------------------------------------------


OFTEN = "2%"  # of the run: 100 steps, a usual interval, in a run of 5,000 steps

# The number of weights that each layer keeps has a large effect in small networks. All methods get
# the same numbers, except lines that name another scope and methods that cannot choose.
SCOPE: Scope = "erk"


def _dense(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    return Candidate(Dense(Constant(epochs)))


def _weights(scope: Scope = SCOPE) -> Callable[[float], Pattern]:
    return lambda sparsity: Unstructured(sparsity, scope)


def _acdc(pattern: Callable[[float], Pattern]) -> Build:
    def build(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
        return Candidate(
            ACDC(pattern(sparsity), alternation(epochs)), changes={"dense_finetune": True}
        )

    return build


def alternation(epochs: int) -> Alternate:
    """Return AC/DC's phases, half of the run dense, as in the published runs on ImageNet.

    The warm-up and the last dense phase take two tenths of the run each, and the last sparse phase
    three. The two sparse phases and the dense phase between them take a tenth each.
    """
    return alternate(
        epochs=epochs, warmup="20%", sparse="10%", dense="10%", last_dense="20%", last_sparse="30%"
    )


def _sparse(
    kind: type[Method[Any]],
    scope: Scope = SCOPE,
    every: str | None = None,
    seeded: bool = False,
) -> Build:
    """Return how to train a method that is sparse from the first step to the last.

    Args:
        kind: The method.
        scope: How kept weights are spread over the layers.
        every: How often the method changes the support; ``None``: its default.
        seeded: Whether the method draws random numbers: they get the seed of the cell.
    """
    more = {} if every is None else {"every": every}

    def build(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
        method: Any = kind  # the first arguments of every method are pattern and schedule
        drawn = {"seed": seed} if seeded else {}
        plan = Constant(epochs, "sparse")
        return Candidate(method(Unstructured(sparsity, scope), plan, **drawn, **more))

    return build


def _topkast(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    """As in the paper, twice as many weights are trained as are used: 80 % sparsity for 90 %."""
    plan = Constant(epochs, "sparse")
    backward = max(0.0, round(2 * sparsity - 1, 6))
    return Candidate(TopKAST(Unstructured(sparsity, SCOPE), plan, backward=backward, every=OFTEN))


def _srste(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    return Candidate(SRSTE(NM(2, 4), Constant(epochs, "sparse")))


def _dsd(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    """As in the paper, every layer is pruned to the same sparsity. The paper divides the learning
    rate by ten for the last phase; the task's cosine curve has fallen to a seventh by then.
    """
    plan = phases(epochs, [("dense", "50%"), ("sparse", "25%"), ("dense", "25%")])
    return Candidate(DSD(Unstructured(sparsity, "uniform"), plan))


def _partial(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    """The full decompression takes the place of the last partial one, and leaves the dense twin."""
    plan = phases(epochs, [("sparse", "62%"), ("dense", "6%"), ("sparse", "32%")])
    return Candidate(
        PartialACDC(Unstructured(sparsity, SCOPE), plan), changes={"dense_finetune": True}
    )


def _imp(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    """The paper cuts 20 % in rounds that are as long as a dense training. Here all rounds together
    take the epochs of one, so there are few: a cut removes more than half of the kept weights.
    """
    method = IMP(Unstructured(sparsity, SCOPE), Constant(epochs), share=0.54, rewind="2%")
    first = round(100 / (method.cuts + 1), 6)
    plan = phases(epochs, [("dense", f"{first}%"), ("sparse", f"{round(100 - first, 6)}%")])
    return Candidate(replace(method, schedule=plan))


def _pretrained(kind: type[Method[Any]]) -> Build:
    """Return how to train a method that starts from a dense network.

    The dense network takes half of the epochs. Fine-tuning has a learning-rate curve of its own,
    from the same peak.
    """

    def build(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
        before = epochs // 2
        rest = _sparse(kind)(task, sparsity, epochs - before, seed)
        return replace(rest, dense_epochs=before)

    return build


METHODS: tuple[GridMethod, ...] = (
    GridMethod("dense", Dense.label, _dense, sparsities=(0.0,)),
    GridMethod("acdc", ACDC.label, _acdc(_weights())),
    GridMethod("acdc_global", f"{ACDC.label}, global", _acdc(_weights("global"))),
    GridMethod("acdc_nm24", f"{ACDC.label}, 2:4", _acdc(lambda _: NM(2, 4)), sparsities=(0.5,)),
    GridMethod("gmp", GMP.label, _sparse(GMP, every=OFTEN)),
    GridMethod("rigl_erk", f"{RigL.label}, ERK", _sparse(RigL, every=OFTEN, seeded=True)),
    GridMethod(
        "rigl_uniform", f"{RigL.label}, uniform", _sparse(RigL, "uniform", OFTEN, seeded=True)
    ),
    GridMethod("set", f"{SET.label}, ERK", _sparse(SET, every=OFTEN, seeded=True)),
    GridMethod("snfs", f"{SNFS.label}, ERK", _sparse(SNFS, seeded=True)),
    GridMethod("snip", SNIP.label, _sparse(SNIP, "global")),
    GridMethod("static_erk", f"{Static.label}, ERK", _sparse(Static, seeded=True)),
    GridMethod(
        "static_uniform", f"{Static.label}, uniform", _sparse(Static, "uniform", seeded=True)
    ),
    GridMethod("str", STR.label, _sparse(STR, "global")),
    GridMethod("topkast", TopKAST.label, _topkast),
    GridMethod("dpf", DPF.label, _sparse(DPF)),
    GridMethod("srste_nm24", f"{SRSTE.label}, 2:4", _srste, sparsities=(0.5,)),
    GridMethod("dsd", DSD.label, _dsd, sparsities=(0.3,)),
    GridMethod("oneshot", f"{OneShot.label} + fine-tune", _pretrained(OneShot)),
    GridMethod("gradual", f"{Gradual.label} + fine-tune", _pretrained(Gradual)),
    GridMethod("woodfisher", f"{WoodFisher.label} + fine-tune", _pretrained(WoodFisher)),
    GridMethod("imp", IMP.label, _imp),
    GridMethod("acdc_partial", PartialACDC.label, _partial),
    GridMethod("granet", f"{GraNet.label}, ERK", _sparse(GraNet, every=OFTEN, seeded=True)),
)

SHORTER_LIST = ("dense", "acdc", "gmp", "topkast", "rigl_erk")  # for tasks with long cells
SHORT_LIST = (*SHORTER_LIST, "set", "static_erk", "oneshot")


def methods(*names: str) -> tuple[GridMethod, ...]:
    """Return these methods; without names: all of them.

    Raises:
        InputError: There is no such method.
    """
    known = {method.name: method for method in METHODS}
    if unknown := [name for name in names if name not in known]:
        raise InputError(
            f"There is no method {unknown[0]!r} for grids. There are: {', '.join(known)}."
        )
    return tuple(known[name] for name in names or known)


def _at(sparsity: float, *names: str) -> tuple[GridMethod, ...]:
    """Return these methods, at this sparsity only."""
    return tuple(replace(method, sparsities=(sparsity,)) for method in methods(*names))


# --- the grids ----------------------------------------------------------------------------------


def compare_digits() -> Grid:
    """Every method on scikit-learn's digits: a demonstration that takes some minutes."""
    return Grid(
        name="compare_digits",
        about="compares all methods on scikit-learn's digits at 90 %: the demo",
        task=Task(
            "scikit-learn's digits, small ResNet",
            Recipe(
                name="digits",
                about="",
                model=SmallResNet(width=16),
                data=Digits(augment=Augment(padding=1)),
                method=Dense(Constant(20)),
                optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=5e-4),
                lr=Cosine(every="step"),
                batch_size=64,
            ),
        ),
        methods=methods(),
        sparsities=(0.9,),
        seeds=(0, 1),
        budgets=("epochs", "flops"),
    )


def compare_fashion_mnist() -> Grid:
    """Fashion-MNIST with the small ResNet of the recipe ``fashion_mnist``, 12 epochs."""
    return Grid(
        name="compare_fashion_mnist",
        about="compares methods on Fashion-MNIST with a small ResNet at 90, 95 and 98 %",
        task=_fashion_mnist(epochs=12),
        methods=methods(*SHORT_LIST),
        sparsities=(0.9, 0.95, 0.98),
        seeds=(0, 1, 2),
    )


def compare_fashion_mnist_long() -> Grid:
    """The same in runs three times as long, 36 epochs: which methods gain by length?"""
    return Grid(
        name="compare_fashion_mnist_long",
        about="compares methods on Fashion-MNIST at 95 and 98 % in runs three times as long",
        task=_fashion_mnist(epochs=36),
        methods=methods(*SHORTER_LIST),
        sparsities=(0.95, 0.98),
        seeds=(0, 1),
    )


def _fashion_mnist(epochs: int) -> Task:
    return Task(
        "Fashion-MNIST, small ResNet",
        Recipe(
            name="fashion_mnist",
            about="",
            model=SmallResNet(width=32, stem_stride=2, stem_pool=2, size=28),
            data=FashionMNIST(augment=Augment(flip=True)),
            method=Dense(Constant(epochs)),
            optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=5e-4),
            lr=Cosine(every="step"),
            batch_size=128,
            checkpoint_steps=469,
        ),
    )


def compare_cifar10() -> Grid:
    """CIFAR-10 with ResNet-20, 15 epochs."""
    return Grid(
        name="compare_cifar10",
        about="compares methods on CIFAR-10 with ResNet-20 at 95 %",
        task=Task(
            "CIFAR-10, ResNet-20",
            Recipe(
                name="cifar10",
                about="",
                model=CifarResNet(depth=20),
                data=Cifar10(),
                method=Dense(Constant(15)),
                optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=5e-4),
                lr=Cosine(every="step"),
                batch_size=128,
                checkpoint_steps=391,
            ),
        ),
        methods=methods(*SHORTER_LIST),
        sparsities=(0.95,),
    )


def compare_cifar10_long() -> Grid:
    """CIFAR-10 with the recipe ``cifar10_resnet20`` of the AC/DC paper: ResNet-20, 200 epochs.

    Model, data, learning rates, pruned layers and the phases of AC/DC are those of the recipe. All
    methods keep the same numbers of weights (``SCOPE``); the recipe itself has one threshold over
    all layers. RigL, GMP and Top-KAST change their supports every 100 steps, their default.
    """
    recipe = cifar10_resnet20()
    published: Any = recipe.method
    layers = published.layers
    dense, acdc, *others = methods(*SHORTER_LIST)
    return Grid(
        name="compare_cifar10_long",
        about="compares methods on CIFAR-10 with ResNet-20 at 90 and 95 %, 200 epochs as the paper",
        task=Task(
            "CIFAR-10, ResNet-20 as in the paper",
            replace(recipe, about="", method=Dense(Constant(recipe.epochs))),
        ),
        methods=(
            dense,
            replace(acdc, build=_changed(_paper_acdc, layers=layers)),
            *(replace(m, build=_changed(m.build, layers=layers, every="100st")) for m in others),
        ),
        sparsities=(0.9, 0.95),
    )


def _paper_acdc(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    """The phases of ``cifar10_resnet20`` as shares of the run: 20 of 200 epochs are a tenth."""
    plan = alternate(epochs=epochs, warmup="5%", sparse="10%", dense="10%", last_sparse="15%")
    return Candidate(ACDC(Unstructured(sparsity, SCOPE), plan), changes={"dense_finetune": True})


def _changed(build: Build, **fields: Any) -> Build:
    """Return how to train a method with other values of its fields."""

    def changed(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
        candidate = build(task, sparsity, epochs, seed)
        method: Any = candidate.method
        return replace(candidate, method=replace(method, **fields))

    return changed


def memorisation_cifar10() -> Grid:
    """CIFAR-10 with 1,000 random labels and no augmentation, ResNet-20, 30 epochs."""
    return Grid(
        name="memorisation_cifar10",
        about="AC/DC on CIFAR-10 with 1,000 random labels at 50, 75, 90 and 95 %",
        task=Task(
            "CIFAR-10 with random labels, ResNet-20",
            Recipe(
                name="cifar10_random_labels",
                about="",
                model=CifarResNet(depth=20),
                data=Cifar10(augment=Augment(), random_labels=1000),
                method=Dense(Constant(30)),
                optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=5e-4),
                lr=Cosine(every="step"),
                batch_size=128,
                checkpoint_steps=391,
                supports=True,
            ),
        ),
        methods=(*methods("dense"), GridMethod("acdc", ACDC.label, _without_finetuning)),
        sparsities=(0.5, 0.75, 0.9, 0.95),
    )


def _without_finetuning(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    """AC/DC with one threshold over all layers, as in the paper; its dense twin stays as it is."""
    return Candidate(ACDC(Unstructured(sparsity), alternation(epochs)))


def compare_tinyshakespeare() -> Grid:
    """Characters of Shakespeare with a transformer of 800 thousand weights, 2,400 steps."""
    return Grid(
        name="compare_tinyshakespeare",
        about="compares methods on characters of Shakespeare with a small GPT at 90 and 95 %",
        task=_tinyshakespeare(epochs=24),
        methods=(*methods(*SHORTER_LIST), *_at(0.95, "set", "static_erk", "oneshot")),
        sparsities=(0.9, 0.95),
        seeds=(0, 1, 2),
    )


def compare_tinyshakespeare_long() -> Grid:
    """The same in runs three times as long, 7,200 steps: which methods gain by length?"""
    return Grid(
        name="compare_tinyshakespeare_long",
        about="compares methods on characters of Shakespeare at 95 % in runs three times as long",
        task=_tinyshakespeare(epochs=72),
        methods=methods(*SHORTER_LIST),
        sparsities=(0.95,),
    )


def _tinyshakespeare(epochs: int) -> Task:
    return Task(
        "tinyshakespeare, small GPT",
        Recipe(
            name="tinyshakespeare",
            about="",
            model=SmallGPT(width=128, depth=4, heads=4, context=64),
            data=TinyShakespeare(train_examples=1600, context=64),
            method=Dense(Constant(epochs)),
            optimizer=AdamW(lr=2e-3, beta2=0.99, weight_decay=0.1),
            lr=Cosine(warmup=1, every="step"),
            batch_size=16,
            clip=1.0,
            eval_batch_size=128,
        ),
    )


GRIDS: dict[str, Callable[[], Grid]] = {
    function.__name__: function
    for function in (
        compare_digits,
        compare_fashion_mnist,
        compare_fashion_mnist_long,
        compare_cifar10,
        compare_cifar10_long,
        compare_tinyshakespeare,
        compare_tinyshakespeare_long,
        memorisation_cifar10,
    )
}


def names() -> list[str]:
    """Return the names of all grids."""
    return list(GRIDS)


def find(name: str) -> str:
    """Return the address of a grid's function, from a name of ``acdc list`` or an address.

    Raises:
        InputError: There is no such grid.
    """
    if ":" in name:
        return name
    if name not in GRIDS:
        near = difflib.get_close_matches(name, GRIDS, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(GRIDS)}."
        raise InputError(
            f"There is no grid {name!r}. {hint} For your own grid write FILE.py:FUNCTION."
        )
    return address(GRIDS[name])
