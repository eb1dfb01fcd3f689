"""How alike two classifiers are: functions of their outputs on the same samples.

Outputs are logits, float ``[samples, classes]``; labels are int64 ``[samples]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Json = dict[str, Any]


def agreement(one: Tensor, two: Tensor) -> float:
    """Return the share of samples for which both networks predict the same class."""
    return float((one.argmax(1) == two.argmax(1)).double().mean())


def contingency(one: Tensor, two: Tensor, labels: Tensor) -> dict[str, int]:
    """Return how many samples both, one or none of the networks predict correctly.

    ``same_mistake`` counts samples for which both predict the same wrong class; they are part of
    ``neither``.
    """
    first, second = one.argmax(1) == labels, two.argmax(1) == labels
    same = ~first & ~second & (one.argmax(1) == two.argmax(1))
    parts = {
        "both": first & second,
        "first": first & ~second,
        "second": ~first & second,
        "neither": ~first & ~second,
        "same_mistake": same,
    }
    return {name: int(part.sum()) for name, part in parts.items()}


def cross_entropy(one: Tensor, two: Tensor) -> float:
    """Return the mean cross-entropy of the outputs of ``two`` under those of ``one``, in nats."""
    return float(-(one.double().softmax(1) * two.double().log_softmax(1)).sum(1).mean())


def calibration(outputs: Tensor, labels: Tensor, bins: int = 15) -> Json:
    """Return the expected calibration error, and the bins of a reliability diagram.

    A bin holds the samples whose largest probability lies in one of ``bins`` intervals of equal
    width. The error is the mean over samples of the difference between the mean probability and the
    accuracy of their bin.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    sure, predicted = outputs.double().softmax(1).max(1)
    right = (predicted == labels).double()
    index = (sure * bins).ceil().long().clamp(1, bins) - 1
    rows, error = [], 0.0
    for number in range(bins):
        mine = index == number
        if count := int(mine.sum()):
            mean, share = float(sure[mine].mean()), float(right[mine].mean())
            rows.append({"bin": number, "count": count, "confidence": mean, "accuracy": share})
            error += count / len(labels) * abs(mean - share)
    return {"error": error, "bins": rows}


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Return the accuracy in percent."""
    return 100 * float((outputs.argmax(1) == labels).double().mean())


def per_class(outputs: Tensor, labels: Tensor) -> list[float | None]:
    """Return the accuracy of each class in percent; ``None`` for a class without samples."""
    right = (outputs.argmax(1) == labels).double()
    found: list[float | None] = []
    for label in range(outputs.shape[1]):
        mine = labels == label
        found.append(100 * float(right[mine].mean()) if bool(mine.any()) else None)
    return found


def gram(features: Tensor) -> Tensor:
    """Return the centred Gram matrix ``[samples, samples]`` of features ``[samples, ...]``."""
    flat = features.flatten(1).double()
    flat = flat - flat.mean(0)
    return flat @ flat.T


def alignment(one: Tensor, two: Tensor) -> float:
    """Return linear CKA of two Gram matrices: 1 for features that are alike up to a rotation.

    Source: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019.
    """
    scale = float(torch.linalg.norm(one) * torch.linalg.norm(two))
    return float((one * two).sum()) / scale if scale else 0.0
