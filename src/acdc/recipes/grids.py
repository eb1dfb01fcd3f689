"""Grids of ``acdc compare``: one task each, all methods on it.

``METHODS`` has a line for each method. A line says how the method trains a cell: its plan for a
number of epochs, and what it needs beforehand. All plans are shares of the run, so that a run of
equal training FLOPs is the same run, stretched.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from acdc.compare.grid import Build, Candidate, Grid, GridMethod, Task, address
from acdc.errors import InputError
from acdc.methods import (
    ACDC,
    DPF,
    DSD,
    GMP,
    SET,
    SNFS,
    SNIP,
    SRSTE,
    STR,
    Dense,
    Gradual,
    Method,
    OneShot,
    RigL,
    Static,
    TopKAST,
    WoodFisher,
)
from acdc.pattern import NM, Pattern, Scope, Unstructured
from acdc.runs.data import Augment, Cifar10, Digits, FashionMNIST, TinyShakespeare
from acdc.runs.models import CifarResNet, SmallGPT, SmallResNet
from acdc.runs.optim import SGD, AdamW, Cosine
from acdc.runs.recipe import Recipe
from acdc.schedule import Alternate, Constant, alternate, phases

# --- how the methods train ----------------------------------------------------------------------


OFTEN = "2%"  # of the run: near the usual 100 steps in runs of 5,000

# How many weights each layer keeps is a choice of its own, and decides much in small networks: all
# methods get the same, but for lines that say otherwise and for those that have none to choose.
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

    The warm-up and the last dense phase have two tenths of the run, the last sparse one has three;
    between them there are two sparse phases and a dense one of a tenth each.
    """
    return alternate(
        epochs=epochs, warmup="20%", sparse="10%", dense="10%", last_dense="20%", last_sparse="30%"
    )


def _sparse(kind: type[Method[Any]], scope: Scope = SCOPE, every: str | None = None) -> Build:
    """Return how a method trains that is sparse from the first step to the last."""
    more = {} if every is None else {"every": every}

    def build(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
        method: Any = kind  # all of them take pattern and schedule first
        own = {"seed": seed} if any(f.name == "seed" for f in fields(method)) else {}
        plan = Constant(epochs, "sparse")
        return Candidate(method(Unstructured(sparsity, scope), plan, **own, **more))

    return build


def _topkast(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    """Twice as many weights are trained as are computed with: 80 % for 90 %, as in the paper."""
    plan = Constant(epochs, "sparse")
    backward = max(0.0, round(2 * sparsity - 1, 6))
    return Candidate(TopKAST(Unstructured(sparsity, SCOPE), plan, backward=backward, every=OFTEN))


def _srste(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    return Candidate(SRSTE(NM(2, 4), Constant(epochs, "sparse")))


def _dsd(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
    """As in the paper every layer is cut to one sparsity. The paper lowers the learning rate
    tenfold for the last phase; on the task's own curve, a cosine has fallen to a seventh by then.
    """
    plan = phases(epochs, [("dense", "50%"), ("sparse", "25%"), ("dense", "25%")])
    return Candidate(DSD(Unstructured(sparsity, "uniform"), plan))


def _pretrained(kind: type[Method[Any]]) -> Build:
    """Return how a method trains that starts from a dense network, which has half of the epochs.

    Fine-tuning runs through a learning-rate curve of its own, from the same peak.
    """

    def build(task: Task, sparsity: float, epochs: int, seed: int) -> Candidate:
        before = epochs // 2
        rest = _sparse(kind)(task, sparsity, epochs - before, seed)
        return replace(rest, dense_epochs=before)

    return build


METHODS: tuple[GridMethod, ...] = (
    GridMethod("dense", "Dense", _dense, sparsities=(0.0,)),
    GridMethod("acdc", "AC/DC", _acdc(_weights())),
    GridMethod("acdc_global", "AC/DC, global", _acdc(_weights("global"))),
    GridMethod("acdc_nm24", "AC/DC, 2:4", _acdc(lambda _: NM(2, 4)), sparsities=(0.5,)),
    GridMethod("gmp", "GMP", _sparse(GMP, every=OFTEN)),
    GridMethod("rigl_erk", "RigL, ERK", _sparse(RigL, every=OFTEN)),
    GridMethod("rigl_uniform", "RigL, uniform", _sparse(RigL, "uniform", OFTEN)),
    GridMethod("set", "SET, ERK", _sparse(SET, every=OFTEN)),
    GridMethod("snfs", "SNFS, ERK", _sparse(SNFS)),
    GridMethod("snip", "SNIP", _sparse(SNIP, "global")),
    GridMethod("static_erk", "Static, ERK", _sparse(Static)),
    GridMethod("static_uniform", "Static, uniform", _sparse(Static, "uniform")),
    GridMethod("str", "STR", _sparse(STR, "global")),
    GridMethod("topkast", "Top-KAST", _topkast),
    GridMethod("dpf", "DPF", _sparse(DPF)),
    GridMethod("srste_nm24", "SR-STE, 2:4", _srste, sparsities=(0.5,)),
    GridMethod("dsd", "DSD", _dsd, sparsities=(0.3,)),
    GridMethod("oneshot", "One-shot + fine-tune", _pretrained(OneShot)),
    GridMethod("gradual", "Gradual + fine-tune", _pretrained(Gradual)),
    GridMethod("woodfisher", "WoodFisher + fine-tune", _pretrained(WoodFisher)),
)

SHORTER_LIST = ("dense", "acdc", "gmp", "topkast", "rigl_erk")  # where a cell takes long
SHORT_LIST = (*SHORTER_LIST, "set", "static_erk", "oneshot")


def methods(*names: str) -> tuple[GridMethod, ...]:
    """Return these methods; none named: all.

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
    """Return these methods, at one sparsity alone."""
    return tuple(replace(method, sparsities=(sparsity,)) for method in methods(*names))


# --- what is to be known of the results ----------------------------------------------------------


BUDGETED = (
    "How many weights each layer keeps is the same for all methods, by ERK, unless their name says "
    "otherwise; SNIP and STR choose over all layers together, 2:4 and DSD have the same share in "
    "every layer. AC/DC’s published recipes choose over all layers, too: in networks as small as "
    "these that left layers almost empty. Half of AC/DC’s run is dense; its phases are the same "
    "for all tasks. Other plans were tried, on one seed each of Fashion-MNIST and of Shakespeare, "
    "and none gave a better sparse network on both."
)

SHORT = (
    "Why AC/DC is not the best here: its dense network hardly moves on while a small part of the "
    "weights is trained, so that in a short run it lags behind the dense run when it is cut for "
    "the last time, the more the higher the sparsity, and neither twin makes up for that (python "
    "experiments/last_cut.py). GMP trains one network from the first step to the last, and takes "
    "its weights away little by little. Runs three times as long were trained to see whether "
    "length is the reason, compare_fashion_mnist_long and compare_tinyshakespeare_long: it is on "
    "Fashion-MNIST at 95\u202f%, but not at 98\u202f%, and not on Shakespeare."
)

LONG_FASHION = (
    "What length gives: at 95\u202f% AC/DC gains 0.91 points on the 12 epochs of "
    "compare_fashion_mnist, RigL 0.84, Top-KAST 0.61, GMP 0.32, the dense run nothing. Behind GMP "
    "and Top-KAST there, AC/DC is here before GMP in both seeds and level with Top-KAST, and its "
    "dense twin is level with the dense run. But all are within half a point of dense, and two "
    "seeds of RigL are 0.25 apart, of Top-KAST 0.30. At 98\u202f% GMP stays ahead, by 0.36 points "
    "for 0.39."
)

LONG_SHAKESPEARE = (
    "Length is not what AC/DC lacks here. It gains 0.25 bits on the 2,400 steps of "
    "compare_tinyshakespeare, as the dense run does, GMP 0.21 and Top-KAST 0.31; both are ahead of "
    "it, by 0.04 and 0.05. The distance of AC/DC to dense is what it was, 0.26 bits; that of its "
    "dense twin is 0.04 for 0.07. One seed."
)

BATCHNORM = (
    "What makes it lag behind BatchNorm (python benchmarks/decompression.py): a cut takes the norm "
    "of the small ResNet’s convolutions from 29 to 18, and with less norm the same learning "
    "rate moves the network the more. When the weights come back, the training loss rises from "
    "0.36 to 0.48, and the dense phase has to win that back. At three tenths of the learning rate "
    "it rises by 0.04 at most, that of a dense run by 0.03 in the same steps; without the momentum "
    "reset it rises as much as with it."
)


# --- the grids ----------------------------------------------------------------------------------


def compare_digits() -> Grid:
    """Every method on scikit-learn's digits: some minutes, to see what a comparison is."""
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
        remarks=(
            "A demo, near the ceiling: one image of the test data is 0.28 points, and differences "
            "of a few tenths between two seeds say nothing. It shows that every method trains, "
            "what it costs, and what it keeps.",
            BUDGETED,
        ),
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
        remarks=(BUDGETED, SHORT, BATCHNORM),
    )


def compare_fashion_mnist_long() -> Grid:
    """The same in runs three times as long, 36 epochs: who gains by length?"""
    return Grid(
        name="compare_fashion_mnist_long",
        about="compares methods on Fashion-MNIST at 95 and 98 % in runs three times as long",
        task=_fashion_mnist(epochs=36),
        methods=methods(*SHORTER_LIST),
        sparsities=(0.95, 0.98),
        seeds=(0, 1),
        remarks=(BUDGETED, LONG_FASHION),
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
    """CIFAR-10 with ResNet-20, 15 epochs. The data says so if it is not the published one."""
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
        remarks=(BUDGETED, SHORT, BATCHNORM),
    )


def compare_tinyshakespeare() -> Grid:
    """Characters of Shakespeare with a transformer of 800 thousand weights, 2,400 steps."""
    return Grid(
        name="compare_tinyshakespeare",
        about="compares methods on characters of Shakespeare with a small GPT at 90 and 95 %",
        task=_tinyshakespeare(epochs=24),
        methods=(*methods(*SHORTER_LIST), *_at(0.95, "set", "static_erk", "oneshot")),
        sparsities=(0.9, 0.95),
        seeds=(0, 1, 2),
        remarks=(BUDGETED, SHORT),
    )


def compare_tinyshakespeare_long() -> Grid:
    """The same in runs three times as long, 7,200 steps: who gains by length?"""
    return Grid(
        name="compare_tinyshakespeare_long",
        about="compares methods on characters of Shakespeare at 95 % in runs three times as long",
        task=_tinyshakespeare(epochs=72),
        methods=methods(*SHORTER_LIST),
        sparsities=(0.95,),
        remarks=(BUDGETED, LONG_SHAKESPEARE),
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
        compare_tinyshakespeare,
        compare_tinyshakespeare_long,
    )
}


def names() -> list[str]:
    """Return the names of all grids."""
    return list(GRIDS)


def find(name: str) -> str:
    """Return where the function of a grid is, for a name of ``acdc list`` or ``FILE.py:FUNCTION``.

    Raises:
        InputError: There is no such grid.
    """
    if ":" in name:
        return name
    if name not in GRIDS:
        near = difflib.get_close_matches(name, GRIDS, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(GRIDS)}."
        raise InputError(
            f"There is no grid {name!r}. {hint} For one of your own write FILE.py:FUNCTION."
        )
    return address(GRIDS[name])
