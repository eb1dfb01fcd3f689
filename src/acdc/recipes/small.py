"""Recipes for a laptop: digits takes a minute, Fashion-MNIST some minutes."""

from __future__ import annotations

from acdc.methods.acdc import ACDC
from acdc.pattern import Unstructured
from acdc.runs.data import Augment, Digits, FashionMNIST
from acdc.runs.models import SmallResNet
from acdc.runs.optim import SGD, Cosine
from acdc.runs.recipe import Recipe
from acdc.schedule import alternate


def digits() -> Recipe:
    """scikit-learn's 8x8 digits: the demonstration, with no download."""
    return Recipe(
        name="digits",
        about="scikit-learn's 8x8 digits with a small ResNet, 90 %: the demo, no download",
        model=SmallResNet(width=16),
        data=Digits(augment=Augment(padding=1)),
        method=ACDC(
            Unstructured(0.9),
            alternate(epochs=40, warmup="4ep", sparse="4ep", dense="4ep", last_sparse="12ep"),
        ),
        optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=5e-4),
        lr=Cosine(),
        batch_size=64,
        dense_finetune=True,
        checkpoint_steps=200,
    )


def fashion_mnist() -> Recipe:
    """Fashion-MNIST, 60,000 images of 28x28, with a small ResNet of 308 thousand weights.

    The stem halves the image twice, like the stem of an ImageNet ResNet. This makes the network
    cheap enough for a CPU at the width that 90 % sparsity needs. The last dense and the last sparse
    phase are longer than the others, as in the paper: the last sparse phase is a third of the run.
    """
    return Recipe(
        name="fashion_mnist",
        about="Fashion-MNIST with a small ResNet, 90 %",
        model=SmallResNet(width=32, stem_stride=2, stem_pool=2, size=28),
        data=FashionMNIST(augment=Augment(flip=True)),
        method=ACDC(
            Unstructured(0.9),
            alternate(
                epochs=24,
                warmup="3ep",
                sparse="3ep",
                dense="3ep",
                last_dense="4ep",
                last_sparse="8ep",
            ),
        ),
        optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=5e-4),
        lr=Cosine(every="step"),
        batch_size=128,
        dense_finetune=True,
        checkpoint_steps=469,
    )
